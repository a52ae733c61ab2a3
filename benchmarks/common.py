"""What the benchmarks share."""

import statistics
from collections.abc import Sequence

from absl import flags

MODEL = flags.DEFINE_string("model", ".cache/smollm2-135m-instruct", "a Hugging Face directory")
REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each contender, in turns", lower_bound=1)


def spread(values: Sequence[float], unit: str = "") -> str:
  """Median (least to most)."""
  return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"
