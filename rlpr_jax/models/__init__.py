"""The policy network: configuration, decoder, token log-probabilities, adapters."""

from typing import Any

from rlpr_jax.models.config import LoRA, ModelConfig, Reader, Rope, Runtime
from rlpr_jax.models.logprobs import token_logprobs
from rlpr_jax.models.lora import adapters, combine, init_adapters
from rlpr_jax.models.masks import UNSEEN
from rlpr_jax.models.transformer import (
  CacheView,
  Decoder,
  KVCache,
  ModelGraph,
  Text,
  abstract_params,
  cast,
  default_attention,
  definition,
  for_device,
  init_params,
  place,
)
from rlpr_jax.models.weights import LINEAR, axis_sizes, matrix_axes, param_axes
from rlpr_jax.types import Params

__all__ = [
  "LINEAR",
  "UNSEEN",
  "CacheView",
  "Decoder",
  "KVCache",
  "LoRA",
  "ModelConfig",
  "ModelGraph",
  "Params",
  "Reader",
  "Rope",
  "Runtime",
  "Text",
  "abstract_params",
  "adapters",
  "axis_sizes",
  "cast",
  "combine",
  "default_attention",
  "definition",
  "for_device",
  "init_adapters",
  "init_params",
  "matrix_axes",
  "param_axes",
  "place",
  "token_logprobs",
]


def __getattr__(name: str) -> Any:
  """Other programs import `load_pretrained` and `save_pretrained` from here; they stand in `rlpr_jax.huggingface`."""
  if name in ("load_pretrained", "save_pretrained"):
    from rlpr_jax import huggingface

    return getattr(huggingface, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
