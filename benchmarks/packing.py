"""The update on packed rows, against rows that are padded: waste by count, and time on a small model.

    make smollm2
    PYTHONPATH=. .venv/bin/python -m benchmarks.packing  # ten minutes on two cores

Lengths are log-normal, cut at the limits, as responses of a run are: a few reach the limit, most are far shorter. The
waste is counted at the paper's limits (prompts to 2048 tokens, responses to 3072). Time is measured with all lengths
divided by `--shrink`, each contender in turns:
  padded    one sequence a row, rows as long as the limit;
  longest   one sequence a row, each micro-batch cut after its longest, which is what a trainer without packing can do;
            one program for each multiple of an eighth of the limit, so that not every length compiles anew;
  packed    first-fit into rows as long as the limit.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.common import MODEL, REPEATS, spread
from rlpr_jax import huggingface, models
from rlpr_jax.training import packing
from rlpr_jax.training.optimizer import clipped_optimizer
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, optimizer_step
from rlpr_jax.types import Groups, PackedRows

PROMPT_LIMIT, RESPONSE_LIMIT = 2048, 3072  # tokens, RLPR section 4.1

_PROMPTS = flags.DEFINE_integer("prompts", 192, "prompts of the minibatch whose waste is counted, of 8 responses each")
_MEDIAN = flags.DEFINE_integer("median", 600, "median tokens of a response")
_SIGMA = flags.DEFINE_float("sigma", 0.6, "standard deviation of the logarithm of the lengths")
_SHRINK = flags.DEFINE_integer("shrink", 16, "by how much lengths are divided where time is measured")
_TIMED = flags.DEFINE_integer("timed", 4, "prompts of the minibatch whose update is timed")


def make_groups(prompts: int, shrink: int, seed: int = 0) -> Groups:
  """Prompts of about 150 tokens and 8 responses each, random tokens."""
  rng = np.random.default_rng(seed)
  prompt_limit, limit, shape = PROMPT_LIMIT // shrink, RESPONSE_LIMIT // shrink, (prompts, 8)

  def lengths(median: float, most: int, size: tuple[int, ...]) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median / shrink), _SIGMA.value, size), 1, most).astype(np.int32)

  return Groups(
    rng.integers(0, 1000, (prompts, prompt_limit)).astype(np.int32),
    lengths(150, prompt_limit, (prompts,)),
    rng.integers(0, 1000, (*shape, limit)).astype(np.int32),
    lengths(_MEDIAN.value, limit, shape),
    np.full((*shape, limit), -7.0, np.float32),
    rng.normal(size=shape).astype(np.float32),
  )


def padded(groups: Groups, rows: int, row_length: int) -> PackedRows:
  """One sequence a row."""
  segments = packing.to_segments(groups, packing.sequence_weights(groups, "token_mean", rows))
  places = np.stack([np.arange(len(segments)), np.zeros(len(segments), int)], axis=1)
  return packing.pack_rows(segments, places, rows, row_length)


def cut(rows: PackedRows, size: int, step: int) -> list[PackedRows]:
  """Micro-batches of `size` rows, each as long as its longest row, in multiples of `step`."""
  parts = [jax.tree.map(lambda x, i=i: x[i : i + size], rows) for i in range(0, len(rows.tokens), size)]
  lengths = [-(-int((part.segment_ids > 0).sum(axis=1).max()) // step) * step for part in parts]
  return [
    jax.tree.map(lambda x, length=length: x[:, :length], part) for part, length in zip(parts, lengths, strict=True)
  ]


def waste(parts: list[PackedRows]) -> float:
  """Share of the places in rows that hold a token at all, which hold none."""
  used = [part.segment_ids[np.any(part.segment_ids > 0, axis=1)] > 0 for part in parts]
  return 1 - sum(int(x.sum()) for x in used) / sum(x.size for x in used)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  groups, length = make_groups(_PROMPTS.value, 1), PROMPT_LIMIT + RESPONSE_LIMIT
  count = groups.lengths.size
  whole = padded(groups, count, length)
  packed = packing.pack(groups, "token_mean", count, length)
  tokens = int((whole.segment_ids > 0).sum())
  print(f"{count} sequences, {tokens / count:.0f} tokens in the mean, rows of {length}")
  print(f"waste: padded {waste([whole]):.1%}, longest of 8 {waste(cut(whole, 8, length // 8)):.1%},", end=" ")
  print(f"packed {waste([packed]):.2%} ({int(np.any(packed.segment_ids > 0, axis=1).sum())} rows)", flush=True)

  config, params = huggingface.load_pretrained(MODEL.value, dtype=jnp.float32)
  model, optimizer = (
    models.definition(config, models.Runtime(remat="dots")),
    clipped_optimizer("adamw", 1e-6, 0.01, 1.0),
  )
  groups, length = make_groups(_TIMED.value, _SHRINK.value, seed=1), length // _SHRINK.value
  count = groups.lengths.size
  whole = padded(groups, count, length)

  def run(minibatches: list[PackedRows], micro_batch_rows: int) -> float:
    settings = UpdateSettings(1.0, 0.2, 0.27, 0.0, micro_batch_rows)
    start = time.perf_counter()
    for rows in minibatches:
      state[0], _ = optimizer_step(UpdateProgram(model, optimizer, settings), {}, state[0], rows)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  state = [Trainable(params, jax.jit(optimizer.init)(params))]
  contenders = {
    "padded": ([whole], 4),
    "longest": (cut(whole, 4, max(length // 8, 1)), 4),
    "packed": ([packing.pack(groups, "token_mean", count, length)], 1),
  }
  seconds = {name: [] for name in contenders}
  for repeat in range(REPEATS.value + 1):
    for name, (minibatches, size) in contenders.items():
      took = run(minibatches, size)
      if repeat:  # the first one compiles
        seconds[name].append(took)
        print(f"{name}: {took:.2f}s", flush=True)
  for name, took in seconds.items():
    ratios = [x / y for x, y in zip(took, seconds["packed"], strict=True)]
    print(f"{name}: waste {waste(contenders[name][0]):.1%}, {spread(took, 's')}, {spread(ratios)} times packed")


if __name__ == "__main__":
  app.run(main)
