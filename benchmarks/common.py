"""What the benchmarks share."""

import statistics
from collections.abc import Callable, Sequence

from absl import app, flags

from rlpr_jax.errors import exit_with_one_line

MODEL = flags.DEFINE_string("model", ".cache/smollm2-135m-instruct", "a Hugging Face directory")
REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each contender, in turns", lower_bound=1)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a benchmark: what ends it early is one line and a status, as of every program here."""
  with exit_with_one_line():
    app.run(main)


def spread(values: Sequence[float], unit: str = "") -> str:
  """Median (least to most)."""
  return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"
