"""The policy network: configuration, decoder, token log-probabilities, Hugging Face directories."""

from rlpr_jax.models.config import LoRA, ModelConfig, Rope, Runtime
from rlpr_jax.models.huggingface import load_pretrained
from rlpr_jax.models.logprobs import token_logprobs
from rlpr_jax.models.transformer import (
  Decoder,
  KVCache,
  Params,
  abstract_params,
  definition,
  init_params,
)

__all__ = [
  "Decoder",
  "KVCache",
  "LoRA",
  "ModelConfig",
  "Params",
  "Rope",
  "Runtime",
  "abstract_params",
  "definition",
  "init_params",
  "load_pretrained",
  "token_logprobs",
]
