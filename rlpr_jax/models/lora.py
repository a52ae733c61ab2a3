"""Low-rank adapters: the part of a parameter tree that LoRA trains."""

import jax

from rlpr_jax.models.config import ModelConfig
from rlpr_jax.models.transformer import abstract_params, init_params
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import Params


def adapters(params: Params) -> Params:
  """The adapters of a parameter tree, without anything else.

  >>> adapters({"layers": {"query": {"weight": 1, "lora_a": 2}, "mlp_norm": {"scale": 3}}})
  {'layers': {'query': {'lora_a': 2}}}
  """
  kept = {name: adapters(part) if isinstance(part, dict) else part for name, part in params.items()}
  return {name: part for name, part in kept.items() if (part if isinstance(part, dict) else name.startswith("lora_"))}


def combine(one: Params, other: Params) -> Params:
  """Two parts of a parameter tree as one; nothing is copied.

  >>> combine({"query": {"weight": 1}}, {"query": {"lora_a": 2}})
  {'query': {'weight': 1, 'lora_a': 2}}
  """
  whole = dict(one)
  for name, part in other.items():
    whole[name] = combine(whole[name], part) if name in whole else part
  return whole


def init_adapters(config: ModelConfig, seed: int, sharding: Sharding = Sharding()) -> Params:
  """Adapters that change nothing yet: A is random, B is zero (Hu et al. 2021, section 4.1). float32."""
  shardings = jax.tree.map(lambda x: x.sharding, adapters(abstract_params(config, sharding)))
  return jax.jit(lambda: adapters(init_params(config, seed, sharding)), out_shardings=shardings)()
