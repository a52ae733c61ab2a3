"""Compiled programs, from one process to the next."""

import os

import jax


def keep_programs(directory: str) -> None:
  """Keeps what takes a tenth of a second or more to compile in `directory`; "" for nowhere.

  Without effect where `processes.start` has said that no programs are kept.
  """
  if directory:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
