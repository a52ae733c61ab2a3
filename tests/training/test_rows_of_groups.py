"""Prompts that are read once a group, against rows that hold one response each behind its own prompt.

In float64, where the two differ by rounding in the last of sixteen digits alone.
"""

import contextlib
import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from rlpr_jax import grpo, models, train
from rlpr_jax.models import attention, blockwise, logprobs, transformer
from rlpr_jax.training import packing
from rlpr_jax.training.update import UpdateSettings, loss
from rlpr_jax.types import Answers, Groups, PackedRows
from tests.models import cases

PROMPT, RESPONSE, ANSWER, GROUPS, SAMPLES = 9, 8, 3, 4, 5
ROW = 27  # so that groups are cut between rows, and some rows hold two
SETTINGS = UpdateSettings(0.8, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.1, micro_batch_rows=1)
VARIANTS = {
  "dual_clip": {"dual_clip": 1.5},
  "truncated": {"loss": "truncated", "ratio_cap": 1.1},
  "kl": {"kl_coefficient": 0.3},
  "answers": {},  # of VeriFree and JEPO
}


class Wide:
  """jax.numpy in which float32 is float64, for modules that ask for float32 by name."""

  float32 = jnp.float64

  def __getattr__(self, name):
    return getattr(jnp, name)


@pytest.fixture
def wide():
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(mock.patch.object(logprobs, "CHUNK", 6))
    for module in (transformer, attention, blockwise, logprobs):
      stack.enter_context(mock.patch.object(module, "jnp", Wide()))
    yield


def random_groups(with_answers=False) -> Groups:
  """Ragged: prompts and responses from one token to the limits."""
  rng, shape = np.random.default_rng(0), (GROUPS, SAMPLES)
  lengths = rng.integers(1, RESPONSE + 1, shape).astype(np.int32)
  lengths[0, 0], lengths[0, 1] = 1, RESPONSE
  groups = Groups(
    prompt_tokens=rng.integers(0, cases.VOCAB, (GROUPS, PROMPT)).astype(np.int32),
    prompt_lengths=np.array([PROMPT, 1, 4, 6], np.int32),
    tokens=rng.integers(0, cases.VOCAB, (*shape, RESPONSE)).astype(np.int32),
    lengths=lengths,
    logprobs=rng.normal(-4.6, 0.5, (*shape, RESPONSE)).astype(np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )
  if not with_answers:
    return groups
  mask = np.zeros((*shape, ANSWER), bool)
  mask[..., 1:] = rng.random(shape)[..., None] < 0.8  # of some responses no answer is scored
  answers = Answers(
    weights=np.where(mask, rng.random(mask.shape), 0).astype(np.float32),
    starts=rng.integers(0, lengths + 1).astype(np.int32),
    tokens=rng.integers(0, cases.VOCAB, (*shape, ANSWER)).astype(np.int32),
    mask=mask,
  )
  return groups._replace(answers=answers)


def plain_rows(groups: Groups) -> PackedRows:
  """One sequence a row, without any word of groups."""
  trees = packing.to_trees(groups, packing.sequence_weights(groups, "token_mean", groups.lengths.size))
  alone = [packing.Tree(tree.stem, [branch]) for tree in trees for branch in tree.branches]
  pieces = [packing.Piece(row, row, 0, [(0, tree.stem.size)]) for row, tree in enumerate(alone)]
  rows = packing.lay(alone, pieces, len(alone), PROMPT + RESPONSE + ANSWER)
  return rows._replace(segment_ids=np.minimum(rows.segment_ids, 1), group_ids=None)


def evaluate(config, rows, settings) -> tuple[float, dict[str, float], models.Params]:
  """Loss, sums and gradients."""
  model = models.definition(config, models.Runtime(compute_dtype="float64"))
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), cases.random_params(config))
  rows = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, rows)
  compute = jax.value_and_grad(loss, argnums=1, has_aux=True)
  # Compiling is nearly all of its time, and nothing is run often.
  quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  compiled = jax.jit(compute, static_argnums=(0, 3), compiler_options=quick)
  (value, sums), gradients = compiled(model, params, rows, settings)
  return float(value), {name: float(x) for name, x in sums.items()}, gradients


def assert_same(config, groups, settings=SETTINGS, kl=False):
  plain = plain_rows(groups)
  together = packing.pack(groups, "token_mean", groups.lengths.size, ROW)
  assert len({tuple(row) for row in np.sort(together.group_ids).tolist()}) > 2
  pieces = packing.arrange(packing.to_trees(groups, np.zeros(groups.lengths.size)), ROW)
  assert GROUPS < len(pieces) < groups.lengths.size  # some are cut, and prompts are read less often than responses
  if kl:  # some other policy's, which follow from the token alone
    plain, together = (
      rows._replace(reference_logprobs=np.where(rows.mask, -4.0 - 0.01 * rows.tokens, 0).astype(np.float32))
      for rows in (plain, together)
    )
  value, sums, expected = evaluate(config, plain, settings)
  found_value, found_sums, found = evaluate(config, together, settings)
  assert found_value == pytest.approx(value, rel=1e-10)
  assert found_sums == pytest.approx(sums, rel=1e-10)
  differences = cases.differences(found, expected)
  assert max(differences.values()) < 1e-10, differences


FAST = ("gemma2", "smollm3_windows")


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in sorted(cases.CASES)]
)
def test_every_family(wide, name):
  assert_same(cases.config(name), random_groups())


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name == "answers" else [pytest.mark.slow]) for name in sorted(VARIANTS)]
)
def test_every_variant(wide, name):
  settings = dataclasses.replace(SETTINGS, **VARIANTS[name])
  assert_same(cases.config("gemma2"), random_groups(with_answers=name == "answers"), settings, kl=name == "kl")


@pytest.mark.slow
def test_adapters(wide):
  config = dataclasses.replace(cases.config("qwen2"), lora=models.LoRA(2, 4.0, ("query", "value", "down")))
  assert_same(config, random_groups())


@pytest.mark.slow
def test_a_branch_that_sees_another_is_noticed(wide):
  """That the comparison sees one: all responses of a group as one text, in which a place is wrong."""
  groups = random_groups()
  rows = packing.pack(groups, "token_mean", groups.lengths.size, ROW)
  value, _, _ = evaluate(cases.config("llama"), rows, SETTINGS)
  joined = rows._replace(segment_ids=rows.group_ids, group_ids=None)
  assert abs(evaluate(cases.config("llama"), joined, SETTINGS)[0] - value) > 1e-3


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_weights_are_those_of_the_sequences(aggregate):
  """Whatever the rows: of each response the tokens' weights add up to the same."""
  groups = random_groups(with_answers=True)
  rows = packing.pack(groups, aggregate, 20, ROW)
  weights = packing.sequence_weights(groups, aggregate, 20).reshape(groups.lengths.shape)
  sampled = packing.sampled_lengths(groups)
  assert rows.weights.sum() == pytest.approx(np.sum(weights * sampled), rel=1e-6)
  answers = groups.answers.weights.sum(axis=2) * weights
  assert rows.answer_weights.sum() == pytest.approx(answers.sum(), rel=1e-6)
  assert rows.mask.sum() == sampled.sum()


@pytest.mark.slow
def test_the_quickstart_is_the_same(tmp_path, monkeypatch):
  """Ten steps after a short supervised start, by every metric but times, memory and what says how rows are filled."""
  config = quickstart.get_config()
  config.steps, config.evaluation.prompts, config.warm_start.steps = 10, 0, 200

  def pack_alone(groups: Groups, aggregate: str, rows: int, row_length: int) -> PackedRows:
    trees = packing.to_trees(groups, packing.sequence_weights(groups, aggregate, rows))
    alone = [packing.Tree(tree.stem, [branch]) for tree in trees for branch in tree.branches]
    return packing.pack_trees(alone, rows, row_length)

  train.train(config, tmp_path / "groups")
  monkeypatch.setattr(packing, "pack", pack_alone)
  train.train(config, tmp_path / "alone")
  found, expected = (
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("groups", "alone")
  )
  assert [row["step"] for row in found] == list(range(1, 11))
  beside = ("seconds/", "tokens_per_second/", "memory/", "update/padding", "compilations")
  for row, of_alone in zip(found, expected, strict=True):
    compared = {name for name in row if not name.startswith(beside)}
    assert len(compared) > 20
    assert {name: row[name] for name in compared} == pytest.approx(
      {name: of_alone[name] for name in compared}, abs=1e-4, nan_ok=True
    )
    assert row["update/padding"] != of_alone["update/padding"]
