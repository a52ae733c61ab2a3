"""RLPR in JAX: reinforcement learning for language models on any question with a reference answer, no verifier.

rewards, filtering, grpo, splicing   the method, pure functions that another trainer can call
models                               decoder, token log-probabilities, Hugging Face directories
config                               every setting of a run
train, sft, evaluate, plan,          programs: `rlpr NAME` or `python -m rlpr_jax.NAME`; each has a main()
serve, curate, view, export
report                               the page of a run, and a program too

Modules are imported when they are first asked for, `rlpr_jax.rewards` for instance.
"""

import importlib
import logging
import sys
from typing import Any

from rlpr_jax import interruption

__version__ = "0.2.0"
__all__ = [
  "config", "curate", "evaluate", "export", "filtering", "grpo", "models", "plan", "report", "rewards", "serve", "sft",
  "splicing", "train", "view",
]  # fmt: skip

if interruption.is_program(sys.orig_argv, sys.argv):
  interruption.end_at_once()

# That there is no torch is no news here.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def __getattr__(name: str) -> Any:
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*globals(), *__all__]
