"""Compiled programs, from one process to the next."""

import os

import jax


def keep_programs(directory: str) -> None:
  """Keeps what takes a tenth of a second or more to compile in `directory`; "" for nowhere.

  Not of several processes on CPUs, wherever else jax was told to keep them: these run a program's collectives in the
  order in which it was compiled, and one that was read has another than one that is compiled now, so that processes
  would wait for each other for ever.
  """
  if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)
  elif directory:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
