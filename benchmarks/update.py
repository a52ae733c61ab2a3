"""The update of groups: each prompt read once and logits at sampled tokens alone, beside each response on its own.

    make smollm2
    PYTHONPATH=. .venv/bin/python -m benchmarks.update --groups=2 --samples=8 --prompt=110 --response=33

Optimiser steps on the same random texts, each contender in turns:
  plain    every response behind a copy of its prompt in a row of its own length, and logits at every place, as a
           trainer without rows of groups does it; --plain_rows at once;
  groups   what `rlpr train` does: rows of --row_length tokens, one at a time.
The last line has the ratio of the medians. Beside the times: the temporary memory of each compiled step, and how far
the losses and gradients are apart. All responses are as long as --response says; with --spread half as long and more.
"""

import functools
import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks.common import MODEL, REPEATS, run, spread
from rlpr_jax import config as configs
from rlpr_jax import models
from rlpr_jax.models import ModelGraph, Params
from rlpr_jax.policy import Policy, initial_params, load_policy
from rlpr_jax.training import packing, update
from rlpr_jax.training.optimizer import clipped_optimizer
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, optimizer_step
from rlpr_jax.types import Groups, PackedRows

_GROUPS = flags.DEFINE_integer("groups", 2, "prompts of the minibatch", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 8, "responses of each", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt", 110, "tokens of a prompt", lower_bound=1)
_RESPONSE = flags.DEFINE_integer("response", 33, "tokens of a response", lower_bound=1)
_SPREAD = flags.DEFINE_bool("spread", False, "responses of half that length and more")
_ROW_LENGTH = flags.DEFINE_integer(
  "row_length", 0, "tokens of a row of groups; 0 for as many as are not over 1,024, or one"
)
_ATTENTION = flags.DEFINE_enum("plain_attention", "auto", ["auto", "xla"], "attention of the plain rows")
_PLAIN_ROWS = flags.DEFINE_integer("plain_rows", 4, "rows of one response each whose gradients are taken at once")
_RANK = flags.DEFINE_integer("lora_rank", 0, "trains adapters of this rank; 0 for all parameters")
_DTYPE = flags.DEFINE_string("dtype", "float32", "compute dtype")


class Step(NamedTuple):
  """A compiled optimiser step and what it is given."""

  compiled: Any
  rows: PackedRows


def make_groups(vocab_size: int) -> Groups:
  """Random texts."""
  rng, shape = np.random.default_rng(0), (_GROUPS.value, _SAMPLES.value)
  least = max(_RESPONSE.value // 2, 1) if _SPREAD.value else _RESPONSE.value
  return Groups(
    prompt_tokens=rng.integers(5, vocab_size, (_GROUPS.value, _PROMPT.value)).astype(np.int32),
    prompt_lengths=np.full(_GROUPS.value, _PROMPT.value, np.int32),
    tokens=rng.integers(5, vocab_size, (*shape, _RESPONSE.value)).astype(np.int32),
    lengths=rng.integers(least, _RESPONSE.value + 1, shape).astype(np.int32),
    logprobs=np.full((*shape, _RESPONSE.value), -10.0, np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )


def pack_plainly(groups: Groups) -> PackedRows:
  """One response a row, behind its prompt, as one sequence."""
  trees = packing.to_trees(groups, packing.sequence_weights(groups, "token_mean", groups.lengths.size))
  alone = [packing.Tree(tree.stem, [branch]) for tree in trees for branch in tree.branches]
  pieces = [packing.Piece(i, i, 0, [(0, tree.stem.size)]) for i, tree in enumerate(alone)]
  count = -(-len(alone) // _PLAIN_ROWS.value) * _PLAIN_ROWS.value
  rows = packing.lay(alone, pieces, count, _PROMPT.value + _RESPONSE.value)
  return rows._replace(segment_ids=np.minimum(rows.segment_ids, 1), group_ids=None)


def logprobs_everywhere(
  model: ModelGraph, params: Params, rows: PackedRows, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """What `row_logprobs` was before: of the tokens at every place."""
  decoder = nnx.merge(model, params)
  tokens = jnp.asarray(rows.tokens)
  hidden = decoder(tokens, rows.positions, rows.segment_ids)
  found = decoder.logprobs(hidden[:, :-1], tokens[:, 1:], temperature)
  logps, entropy = (jnp.pad(x, ((0, 0), (1, 0))) for x in found)
  return logps, entropy


def compile_step(
  policy: Policy, trainable: Trainable, rows: PackedRows, size: int, optimizer: Any, attention: str = "auto"
) -> Step:
  """The optimiser step on such rows, `size` of them at a time."""
  settings = UpdateSettings(1.0, 0.2, 0.27, 0.0, size, sharding=policy.sharding)
  model = models.definition(policy.config, models.Runtime(_DTYPE.value, attention, sharding=policy.sharding))
  program = UpdateProgram(model, optimizer, settings)
  optimizer_step.clear_cache()
  return Step(optimizer_step.lower(program, policy.frozen, trainable, rows).compile(), rows)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  config = configs.default()
  config.model.path, config.lora.rank, config.model.compute_dtype = MODEL.value, _RANK.value, _DTYPE.value
  policy = load_policy(config)
  params = initial_params(config, policy)
  groups = make_groups(policy.config.known_tokens or policy.config.vocab_size)
  group = _PROMPT.value + _SAMPLES.value * _RESPONSE.value
  several = max(1, min(_GROUPS.value, 1024 // group))
  length = _ROW_LENGTH.value or packing.shortest_row(several * group)
  together = packing.pack(groups, "token_mean", groups.lengths.size, length)
  used = int(np.any(together.segment_ids > 0, axis=1).sum())
  together = jax.tree.map(lambda x: x[:used], together)
  plain = pack_plainly(groups)
  print(f"{groups.lengths.size} responses, {int(groups.lengths.sum())} sampled tokens", flush=True)
  print(
    f"plain: {plain.tokens.size} places; groups: {together.tokens.size}, padding {together.padding():.1%}", flush=True
  )

  ascent = optax.sgd(1.0)  # the change of the parameters is the gradient
  adamw = clipped_optimizer("adamw", 1e-6, 0.01, 1.0)

  def steps(optimizer: Any) -> dict[str, Step]:
    state = Trainable(params, jax.jit(optimizer.init)(params))
    with mock.patch.object(update, "row_logprobs", logprobs_everywhere):
      found = {"plain": compile_step(policy, state, plain, _PLAIN_ROWS.value, optimizer, _ATTENTION.value)}
    return found | {"groups": compile_step(policy, state, together, 1, optimizer)}

  gradients = {}
  for name, (compiled, rows) in steps(ascent).items():
    copy = jax.tree.map(jnp.copy, params)
    after, metrics = compiled(policy.frozen, Trainable(copy, jax.jit(ascent.init)(copy)), rows)
    gradients[name] = jax.tree.map(jnp.subtract, params, after.params), float(metrics["loss"])
  (first, loss), (second, other) = gradients.values()

  def apart(x: jax.Array, y: jax.Array) -> float:
    """Over the largest; as it is where that is 0, as of an adapter's first half while its second one is."""
    largest = float(jnp.max(jnp.abs(x)))
    return float(jnp.max(jnp.abs(x - y))) / (largest or 1.0)

  distance = jax.tree.map(apart, first, second)
  print(f"loss {loss:.7f} and {other:.7f}, gradients within {max(jax.tree.leaves(distance)):.1e} of their largest")
  del gradients, first, second

  contenders, seconds = steps(adamw), {"plain": [], "groups": []}
  for name, step in contenders.items():
    print(f"{name}: temporary memory {step.compiled.memory_analysis().temp_size_in_bytes / 2**20:,.0f} MiB", flush=True)
  state = Trainable(params, jax.jit(adamw.init)(params))
  for _ in range(REPEATS.value):
    for name, (compiled, rows) in contenders.items():
      start = time.perf_counter()
      state, _ = jax.block_until_ready(compiled(policy.frozen, state, rows))
      seconds[name].append(time.perf_counter() - start)
      print(f"{name}: {seconds[name][-1]:.2f}s", flush=True)
  ratio = functools.reduce(lambda x, y: x / y, (np.median(took) for took in seconds.values()))
  print(f"plain {spread(seconds['plain'], 's')}, groups {spread(seconds['groups'], 's')}, ratio {ratio:.2f}")


if __name__ == "__main__":
  run(main)
