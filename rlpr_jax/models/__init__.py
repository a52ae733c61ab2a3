"""The policy network: configuration, decoder, token log-probabilities, Hugging Face directories."""

from rlpr_jax.models.config import ModelConfig
from rlpr_jax.models.huggingface import load_pretrained
from rlpr_jax.models.logprobs import token_logprobs
from rlpr_jax.models.transformer import (
  Decoder,
  KVCache,
  Params,
  abstract_params,
  definition,
  empty_cache,
  init_params,
)

__all__ = [
  "Decoder",
  "KVCache",
  "ModelConfig",
  "Params",
  "abstract_params",
  "definition",
  "empty_cache",
  "init_params",
  "load_pretrained",
  "token_logprobs",
]
