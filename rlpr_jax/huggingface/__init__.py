"""Hugging Face directories: config.json of each family, tensors by their names there, loading, saving, pushing."""

from rlpr_jax.huggingface.generation import generation_eos, load_generation, with_eos
from rlpr_jax.huggingface.loading import load_config, load_pretrained, resolve
from rlpr_jax.huggingface.pushing import check_account, check_push, push
from rlpr_jax.huggingface.saving import save_adapter, save_pretrained

__all__ = [
  "check_account",
  "check_push",
  "generation_eos",
  "load_config",
  "load_generation",
  "load_pretrained",
  "push",
  "resolve",
  "save_adapter",
  "save_pretrained",
  "with_eos",
]
