"""The policy network: configuration, decoder, token log-probabilities, Hugging Face directories."""

from rlpr_jax.models.attention import UNSEEN
from rlpr_jax.models.config import LINEAR, LoRA, ModelConfig, Rope, Runtime
from rlpr_jax.models.loading import load_config, load_pretrained, resolve
from rlpr_jax.models.logprobs import token_logprobs
from rlpr_jax.models.lora import adapters, combine, init_adapters
from rlpr_jax.models.saving import save_adapter, save_pretrained
from rlpr_jax.models.transformer import (
  Decoder,
  KVCache,
  Params,
  Part,
  abstract_params,
  axis_sizes,
  cast,
  default_attention,
  definition,
  init_params,
  param_axes,
  place,
)

__all__ = [
  "LINEAR",
  "UNSEEN",
  "Decoder",
  "KVCache",
  "LoRA",
  "ModelConfig",
  "Params",
  "Part",
  "Rope",
  "Runtime",
  "abstract_params",
  "adapters",
  "axis_sizes",
  "cast",
  "combine",
  "default_attention",
  "definition",
  "init_adapters",
  "init_params",
  "load_config",
  "load_pretrained",
  "param_axes",
  "place",
  "resolve",
  "save_adapter",
  "save_pretrained",
  "token_logprobs",
]
