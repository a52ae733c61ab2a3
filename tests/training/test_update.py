"""Packing and the optimiser step, against gradients taken one sequence at a time and float64 sums."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlpr_jax import grpo, types
from rlpr_jax.models.masks import alignment
from rlpr_jax.runs.metrics import compilations
from rlpr_jax.sampling.decode import DecodeSettings, Entries, Prefilled, empty_slots, insert, prefill
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.training import packing
from rlpr_jax.training.logprobs import LogprobProgram, compute_logprobs, row_logprobs
from rlpr_jax.training.old_logprobs import importance_weights
from rlpr_jax.training.optimizer import clipped_optimizer, learning_rate
from rlpr_jax.training.packing import Branch, PackingSettings, Piece, Tree
from rlpr_jax.training.update import (
  Trainable,
  UpdateProgram,
  UpdateSettings,
  loss,
  optimizer_step,
)
from rlpr_jax.types import AnswerCredit, Groups, PackedRows
from tests.sampling.drawing import draw_all
from tests.training.groups import PROMPT, RESPONSE, SAMPLES, TEMPERATURE, make_groups, padded, trainer_logprobs

SETTINGS = UpdateSettings(TEMPERATURE, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.1, micro_batch_rows=0)
# With this "optimiser" the change of the parameters is the gradient.
GRADIENT = optax.sgd(-1.0)
OPTIMIZER = clipped_optimizer("adamw", 1e-6, weight_decay=0.01, max_grad_norm=1.0)


def near_policy(policy, groups, noise=0.3):
  """The groups with old log-probabilities so near the policy's that some tokens are clipped and some are not."""
  rows = padded(groups, groups.num_groups, "token_mean")
  logps = np.asarray(trainer_logprobs(policy.model, policy.params, rows)[0])
  old = np.zeros_like(groups.logprobs)
  for row, (k, g) in enumerate(np.ndindex(groups.lengths.shape)):
    start, end = groups.prompt_lengths[k], groups.prompt_lengths[k] + groups.lengths[k, g]
    old[k, g, : end - start] = logps[row, start:end]
  old += noise * np.random.default_rng(1).normal(size=old.shape)
  return groups._replace(logprobs=old.astype(np.float32))


@pytest.fixture(scope="module")
def groups(policy):
  return near_policy(policy, make_groups())


def gradients(policy, rows, settings=SETTINGS):
  """(gradient, metrics) by way of `update` and an optimiser that only adds it."""
  params = jax.tree.map(jnp.copy, policy.params)  # donated
  settings = dataclasses.replace(settings, micro_batch_rows=settings.micro_batch_rows or len(rows.tokens))
  (after, _), metrics = optimizer_step(
    UpdateProgram(policy.model, GRADIENT, settings), {}, Trainable(params, GRADIENT.init(params)), rows
  )
  metrics = {name: float(value) for name, value in metrics.items()}
  return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after, policy.params), metrics


def assert_close(found, expected, tolerance=2e-6):
  """Equal to within float32's last digits of the largest gradient."""
  largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance * largest, rtol=0), found, expected)


def assert_metrics(found, expected):
  assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
  assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def one_sequence(model, params, tokens, length, start, old, advantage, weight):
  """One sequence by itself: sums over its response of weight * clipped loss, less the bonus, and without it.

  `tokens` is padded to [1, L].
  """
  decoder = nnx.merge(model, params)
  places = jnp.arange(tokens.shape[1])
  hidden = decoder(tokens, places[None], jnp.ones_like(tokens))
  logps = jax.nn.log_softmax(decoder.logits(hidden)[0] / TEMPERATURE)
  ratio = jnp.exp(logps[places[:-1], tokens[0, 1:]] - old[1:])
  token_loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.27) * advantage)
  entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)[:-1]
  weights = jnp.where((places[1:] >= start) & (places[1:] < length), weight, 0.0)
  return jnp.sum(weights * (token_loss - 0.1 * entropy)), jnp.sum(weights * token_loss)


def one_at_a_time(policy, groups):
  """Loss and gradient of the token mean, summed over sequences that are run one by one."""
  tokens = groups.lengths.sum()
  total, gradient = 0.0, jax.tree.map(np.zeros_like, policy.params)
  for k, g in np.ndindex(groups.lengths.shape):
    start, new = groups.prompt_lengths[k], groups.lengths[k, g]
    text, old = np.zeros((1, PROMPT + RESPONSE), np.int32), np.zeros(PROMPT + RESPONSE, np.float32)
    text[0, : start + new] = np.concatenate([groups.prompt_tokens[k, :start], groups.tokens[k, g, :new]])
    old[start : start + new] = groups.logprobs[k, g, :new]
    (_, value), part = jax.value_and_grad(one_sequence, argnums=1, has_aux=True)(
      policy.model, policy.params, text, start + new, start, old, groups.advantages[k, g], 1 / tokens
    )
    total += float(value)
    gradient = jax.tree.map(np.add, gradient, part)
  return total, gradient


def test_update_is_the_sum_over_single_sequences(policy, groups):
  """Response tokens alone, EOS among them and prompts not, in a mean over all tokens of the minibatch."""
  expected_loss, expected = one_at_a_time(policy, groups)
  found, metrics = gradients(policy, padded(groups, groups.num_groups, "token_mean"))
  assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-6)
  assert 0 < metrics["clip_fraction"] < 1
  assert_close(found, expected)
  norm = math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(expected)))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  assert norm > 0.1


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_micro_batches_add_up_to_the_minibatch(policy, groups, aggregate):
  """Two groups of three, so that one micro-batch is padding alone."""
  rows = padded(groups.take(slice(1, None)), 3, aggregate)
  expected, expected_metrics = gradients(policy, rows)
  assert max(np.max(np.abs(x)) for x in jax.tree.leaves(expected)) > 0.01
  for size in (1, 2):
    found, metrics = gradients(policy, rows, dataclasses.replace(SETTINGS, micro_batch_rows=size))
    assert_close(found, expected)
    assert_metrics(metrics, expected_metrics)


def test_adamw_is_the_papers():
  """First step by hand: clip the global norm to one, divide by its own size, decay."""
  params, gradient = {"w": jnp.array([2.0, -3.0])}, {"w": jnp.array([30.0, -40.0])}
  optimizer = clipped_optimizer("adamw", 1e-2, weight_decay=0.1, max_grad_norm=1.0)
  steps, _ = optimizer.update(gradient, optimizer.init(params), params)
  expected = [-1e-2 * (sign + 0.1 * w) for sign, w in ((1, 2.0), (-1, -3.0))]
  np.testing.assert_allclose(steps["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("schedule", "warmup", "expected"),
  [
    ("constant", 0, [2.0] * 9),
    ("constant", 4, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
    ("linear", 0, [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]),
    ("linear", 4, [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5, 0.0]),
    ("cosine", 0, [1 + math.cos(math.pi * i / 8) for i in range(9)]),
    ("cosine", 4, [0.0, 0.5, 1.0, 1.5] + [1 + math.cos(math.pi * i / 4) for i in range(5)]),
  ],
)
def test_learning_rates_by_hand(schedule, warmup, expected):
  rate = learning_rate(2.0, schedule, warmup, total=8)
  found = [float(rate(i)) if callable(rate) else rate for i in range(9)]
  assert found == pytest.approx(expected, abs=1e-6)


def test_an_update_of_a_millionth_is_not_lost(policy, groups):
  """fp32 masters: AdamW at the paper's 1e-6 moves every parameter that has a gradient."""
  rows, params = padded(groups, 3, "token_mean"), jax.tree.map(jnp.copy, policy.params)
  settings = dataclasses.replace(SETTINGS, micro_batch_rows=6)
  (after, _), _ = optimizer_step(
    UpdateProgram(policy.model, OPTIMIZER, settings), {}, Trainable(params, OPTIMIZER.init(params)), rows
  )
  moved = np.abs(np.asarray(after["layers"]["up"]["weight"]) - np.asarray(policy.params["layers"]["up"]["weight"]))
  assert np.mean((moved > 5e-7) & (moved < 2e-6)) > 0.95


def test_two_sequences_in_one_row_are_two_rows(policy, groups):
  rows = padded(groups, 3, "token_mean")
  length = 2 * rows.tokens.shape[1]
  packed = types.PackedRows.empty(3, length)
  for row in range(3):
    start = 0
    for number, source in enumerate((row, row + 3)):
      tokens = int(np.sum(rows.segment_ids[source] > 0))
      for name, field in packed._asdict().items():
        if field is None:
          continue
        before = number * {"segment_ids": 2, "group_ids": 1}.get(name, 0)
        field[row, start : start + tokens] = before + getattr(rows, name)[source, :tokens]
      start += tokens
  expected, expected_metrics = gradients(policy, rows)
  found, metrics = gradients(policy, packed)
  assert_metrics(metrics, expected_metrics)
  assert_close(found, expected)


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_loss_and_metrics_against_float64(policy, groups, aggregate):
  rows = padded(groups, 4, aggregate)  # the rows of one group are padding
  logps, entropies = (np.asarray(x, np.float64) for x in trainer_logprobs(policy.model, policy.params, rows))
  sequences = {}
  for row in range(6):
    k, g = divmod(row, SAMPLES)
    start = groups.prompt_lengths[k]
    tokens = []
    for t in range(groups.lengths[k, g]):
      ratio, advantage = math.exp(logps[row, start + t] - groups.logprobs[k, g, t]), float(groups.advantages[k, g])
      token_loss = -min(ratio * advantage, min(max(ratio, 0.8), 1.27) * advantage)
      tokens.append((token_loss, ratio, entropies[row, start + t]))
    sequences[row] = np.array(tokens)
  everything = np.concatenate(list(sequences.values()))
  expected = {
    "token_mean": everything.mean(axis=0),
    "seq_mean_token_sum": np.mean([tokens.sum(axis=0) / RESPONSE for tokens in sequences.values()], axis=0),
    "seq_mean_token_mean": np.mean([tokens.mean(axis=0) for tokens in sequences.values()], axis=0),
  }[aggregate]
  value, sums = jax.jit(loss, static_argnums=(0, 3))(policy.model, policy.params, rows, SETTINGS)
  assert float(value) == pytest.approx(expected[0] - 0.1 * expected[2], abs=1e-6)
  assert float(sums["loss"]) == pytest.approx(expected[0], abs=1e-6)
  assert int(sums["tokens"]) == len(everything) == groups.lengths.sum()
  _, metrics = gradients(policy, rows)
  assert metrics["ratio_mean"] == pytest.approx(everything[:, 1].mean(), rel=1e-5)
  assert metrics["ratio_worst"] == pytest.approx(np.max(np.abs(everything[:, 1] - 1)), rel=1e-5)
  assert metrics["entropy"] == pytest.approx(everything[:, 2].mean(), rel=1e-5)


def test_first_update_on_samples_of_the_policy_has_ratio_one(policy):
  rng = np.random.default_rng(2)
  prompts = rng.integers(0, 64, (3, PROMPT)).astype(np.int32)
  lengths = np.array([2, 6, 4], np.int32)
  settings = DecodeSettings(steps=3, eos_ids=tuple(range(0, 64, 8)))
  slots = empty_slots(policy.model, policy.params, 6, PROMPT + RESPONSE + settings.steps)
  hidden, cache = prefill(policy.model, policy.params, prompts, lengths)
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), 6))
  entries = Entries(
    source=np.repeat(np.arange(3), 2),
    target=np.arange(6),
    keys=keys,
    limits=np.full(6, RESPONSE, np.int32),
    sampling=stack([SamplingParams(TEMPERATURE)] * 6),
  )
  slots = insert(policy.model, policy.params, slots, Prefilled(hidden, cache, lengths), entries)
  _, drawn = draw_all(policy.model, policy.params, slots, settings, PROMPT + RESPONSE, RESPONSE)
  by_prompt = [field.reshape(3, 2, *field.shape[1:]) for field in (drawn.tokens, drawn.counts, drawn.logprobs)]
  advantages = rng.normal(size=(3, 2)).astype(np.float32)
  groups = Groups(prompts, lengths, *by_prompt, advantages)
  gradient, metrics = gradients(policy, padded(groups, 3, "token_mean"))
  assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
  assert metrics["ratio_worst"] < 1e-4
  assert metrics["clip_fraction"] == 0
  expected = -np.sum(advantages * by_prompt[1]) / np.sum(by_prompt[1])
  assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
  assert np.max(np.abs(gradient["head"])) > 1e-3


def test_entropy_bonus_raises_entropy(policy, groups):
  """With no advantage anywhere there is no other gradient."""
  rows = padded(groups._replace(advantages=np.zeros_like(groups.advantages)), 3, "token_mean")
  gradient, before = gradients(policy, rows)
  moved = jax.tree.map(lambda x, g: x - 0.5 * g, policy.params, gradient)
  _, after = gradients(policy._replace(params=moved), rows)
  assert after["entropy"] > before["entropy"] + 0.01
  assert before["loss"] == 0  # the metric is without the bonus


def test_gradient_goes_up_for_good_responses_and_down_for_bad_ones(policy):
  groups = near_policy(policy, make_groups(), noise=0.0)
  advantages = np.resize(np.array([1.0, -1.0], np.float32), (3, 2))
  rows = padded(groups._replace(advantages=advantages), 3, "token_mean")
  gradient, _ = gradients(policy, rows)
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, policy.params, gradient)
  after = np.asarray(trainer_logprobs(policy.model, moved, rows)[0])
  change = np.sum((after - rows.old_logprobs) * rows.mask, axis=1)
  assert np.sum(change * np.resize([1.0, -1.0], 6)) > 0.01


def test_padding_has_no_influence(policy, groups):
  """What pads rows, and rows that are padding, may hold anything that is a token."""
  rows = padded(groups, 4, "token_mean")
  expected, expected_metrics = gradients(policy, rows)
  noise = np.random.default_rng(0).integers(0, 64, rows.tokens.shape)
  found, metrics = gradients(policy, rows._replace(tokens=np.where(rows.segment_ids == 0, noise, rows.tokens)))
  assert_close(found, expected, tolerance=1e-7)
  assert_metrics(metrics, expected_metrics)
  fewer, fewer_metrics = gradients(policy, padded(groups, 3, "token_mean"))
  assert_close(fewer, expected)
  assert_metrics(fewer_metrics, expected_metrics)


def test_prompts_are_read_and_not_trained(policy, groups):
  """Old log-probabilities or advantages of prompt tokens do not exist; were there some, they would weigh nothing."""
  rows = padded(groups, 3, "token_mean")
  expected, _ = gradients(policy, rows)
  junk = {name: np.where(rows.mask, getattr(rows, name), 0.5) for name in ("old_logprobs", "advantages")}
  found, metrics = gradients(policy, rows._replace(**junk))
  assert_close(found, expected, tolerance=1e-7)
  assert metrics["clip_fraction"] < 1
  other = rows.tokens.copy()
  other[:, 0] = (other[:, 0] + 1) % 64
  assert np.max(np.abs(gradients(policy, rows._replace(tokens=other))[0]["head"] - expected["head"])) > 1e-4


# --- packing ---


def tree_of(stem, *branches):
  return Tree(np.arange(stem), [Branch.of_tokens(np.arange(n)) for n in branches])


def test_arrange_by_hand():
  """Longest first: 9 and 8 open rows, 5 has no room behind them, 4 has neither; the 3 joins the first."""
  trees = [tree_of(2, 3), tree_of(1, 4, 4), tree_of(2, 1), tree_of(3, 5)]
  assert packing.arrange(trees, 12) == [
    Piece(1, 0, 0, [(0, 1), (1, 5)]),
    Piece(2, 0, 9, [(0, 11)]),
    Piece(3, 1, 0, [(0, 3)]),
    Piece(0, 2, 0, [(0, 2)]),
  ]


def test_trees_are_cut_where_that_saves_rows():
  """Rows of 13: two trees of nine and one of seven would take three; a stem of one token stands twice in two."""
  trees = [tree_of(1, 3, 3, 2), tree_of(1, 3, 3, 2), tree_of(1, 3, 3)]
  assert packing.arrange(trees, 13) == [
    Piece(0, 0, 0, [(0, 1), (1, 4), (2, 7)]),
    Piece(1, 0, 9, [(0, 10)]),
    Piece(1, 1, 0, [(1, 1), (2, 4)]),
    Piece(2, 1, 6, [(0, 7), (1, 10)]),
  ]


def test_a_tree_for_which_rows_are_too_short_is_refused():
  for tree in (tree_of(3, 2, 8), tree_of(11, 1), tree_of(0, 1)):
    with pytest.raises(ValueError, match="tree 1: expected a stem with room for each branch"):
      packing.arrange([tree_of(1, 1), tree], 10)


@pytest.mark.parametrize("length", [40, 200, 3000, 5000])
@pytest.mark.parametrize("seed", range(10))
def test_arrange_loses_nothing_and_wastes_little(seed, length):
  """Each branch once, behind its stem; no two in one place; ends of stems and beginnings of branches as splash asks."""
  rng, step = np.random.default_rng(seed), alignment(length)
  trees = []
  for _ in range(rng.integers(1, 40)):
    stem = int(rng.integers(1, length // 5))
    branches = np.clip(rng.lognormal(np.log(length / 6), 0.8, rng.integers(1, 9)), 1, length - stem - step)
    trees.append(tree_of(stem, *branches.astype(int)))
  pieces = packing.arrange(trees, length)
  used, seen = np.zeros((max(piece.row for piece in pieces) + 1, length), int), []
  for piece in pieces:
    stem, branches = trees[piece.tree]
    assert (piece.start + stem.size) % step == 0
    assert piece.start >= 0
    used[piece.row, piece.start : piece.start + stem.size] += 1
    for number, start in piece.branches:
      assert start % step == 0
      assert start >= piece.start + stem.size
      assert start + branches[number].tokens.size <= length
      used[piece.row, start : start + branches[number].tokens.size] += 1
      seen.append((piece.tree, number))
  assert used.max() == 1
  assert sorted(seen) == [(k, g) for k, tree in enumerate(trees) for g in range(len(tree.branches))]
  assert pieces == packing.arrange(trees, length)
  alone = sum(tree.stem.size + branch.tokens.size for tree in trees for branch in tree.branches)
  assert len(used) <= max(np.ceil(2 * alone / length), 1)  # what first-fit has of sequences that each bring their stem


def test_rows_of_the_papers_lengths_are_full():
  """Prompts to 1,024 and responses to 3,072 tokens, 300 and 1,000 in the mean, in rows of 8,192."""
  rng = np.random.default_rng(0)

  def lengths(mean, most, count):
    return np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6, count), 1, most).astype(int)

  trees = [tree_of(stem, *lengths(1000, 3072, 8)) for stem in lengths(300, 1024, 128)]
  rows = packing.pack_trees(trees, 256, 8192)
  assert rows.padding() < 0.05
  assert rows.padding(8) < 0.06  # the last micro-batch is not full
  read = np.sum(rows.positions >= 0)
  alone = sum(tree.stem.size + branch.tokens.size for tree in trees for branch in tree.branches)
  assert alone / read > 1.2


def test_the_loss_of_mixed_policies_against_float64(policy, groups):
  """Tokens by several policies: ratios start from the trainer's, each counts min(trainer / sampler, cap) times."""
  rng = np.random.default_rng(3)
  sampler = -rng.exponential(2.0, groups.logprobs.shape)
  importance, _ = importance_weights(sampler.astype(np.float32), groups.logprobs, cap=2.0)
  rows = padded(groups._replace(importance=importance), 3, "token_mean")
  logps = np.asarray(trainer_logprobs(policy.model, policy.params, rows)[0], np.float64)
  loss, _ = grpo.policy_loss(
    logps, rows.old_logprobs, rows.advantages, rows.mask, clip_low=0.2, clip_high=0.27, weights=rows.weights
  )
  total, tokens = 0.0, int(groups.lengths.sum())
  for row, (k, g) in enumerate(np.ndindex(groups.lengths.shape)):
    start = groups.prompt_lengths[k]
    for t in range(groups.lengths[k, g]):
      old, advantage = float(groups.logprobs[k, g, t]), float(groups.advantages[k, g])
      ratio, weight = np.exp(logps[row, start + t] - old), min(np.exp(old - sampler[k, g, t]), 2.0)
      total -= weight * min(ratio * advantage, np.clip(ratio, 0.8, 1.27) * advantage) / tokens
  assert float(loss) == pytest.approx(total, rel=1e-5)
  unweighted = padded(groups, 3, "token_mean")
  assert not np.allclose(unweighted.advantages, rows.advantages)


def test_own_answers_have_the_advantage_they_are_credited_with():
  groups = make_groups()
  groups = groups._replace(tokens=np.arange(groups.tokens.size, dtype=np.int32).reshape(groups.tokens.shape))
  starts = np.minimum(groups.lengths, 3).astype(np.int32)
  credit = AnswerCredit(starts, -groups.advantages - 1)
  rows = packing.pack(groups._replace(credit=credit), "token_mean", 8, 20)
  found = {}
  for row in range(len(rows.tokens)):
    for segment in np.unique(rows.segment_ids[row][rows.mask[row]]):
      here = rows.mask[row] & (rows.segment_ids[row] == segment)
      found[tuple(rows.tokens[row][here])] = rows.advantages[row][here]
  for k, g in np.ndindex(groups.lengths.shape):
    length, start = groups.lengths[k, g], starts[k, g]
    expected = np.repeat([groups.advantages[k, g], -groups.advantages[k, g] - 1], [start, length - start])
    np.testing.assert_array_equal(found[tuple(groups.tokens[k, g, :length])], expected.astype(np.float32))
  plain, outside = packing.pack(groups, "token_mean", 8, 20), ~rows.mask
  assert not rows.advantages[outside].any()
  jax.tree.map(np.testing.assert_array_equal, rows._replace(advantages=plain.advantages), plain)


def test_rows_by_hand():
  """Two trees, the first cut between rows; what the fields hold where, and nothing elsewhere."""
  old, ones = np.array([-1.0, -2.0], np.float32), np.ones(2, bool)
  branch = Branch(np.array([7, 2]), ones, old, advantages=0.5, weight=0.25)
  trees = [Tree(np.array([5, 6]), [branch, branch._replace(tokens=np.array([9, 2]))])]
  trees.append(Tree(np.array([8]), [Branch.of_tokens(np.array([4, 2]), np.array([False, True]))]))
  pieces = [Piece(0, 0, 0, [(1, 2)]), Piece(1, 0, 5, [(0, 6)]), Piece(0, 1, 0, [(0, 2)])]
  rows = packing.lay(trees, pieces, rows=2, row_length=9)
  assert rows.tokens.tolist() == [[5, 6, 9, 2, 0, 8, 4, 2, 0], [5, 6, 7, 2, 0, 0, 0, 0, 0]]
  assert rows.positions.tolist() == [[0, 1, 2, 3, -1, 0, 1, 2, -1], [0, 1, 2, 3, -1, -1, -1, -1, -1]]
  assert rows.segment_ids.tolist() == [[1, 1, 2, 2, 2, 3, 4, 4, 0], [1, 1, 2, 2, 0, 0, 0, 0, 0]]
  assert rows.group_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]]
  assert rows.mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]]
  assert rows.old_logprobs[:, 2:4].tolist() == [[-1.0, -2.0]] * 2
  assert rows.advantages.sum(axis=1).tolist() == [1.0, 1.0]
  assert rows.weights.sum(axis=1).tolist() == [0.5, 0.5]
  assert rows.padding() == pytest.approx(7 / 18)
  assert rows.padding(4) == pytest.approx(25 / 36)


@pytest.mark.parametrize(
  ("row_length", "micro_batch_rows"),
  [
    pytest.param(length, rows, marks=[] if (length, rows) in ((29, 3), (100, 12)) else [pytest.mark.slow])
    for length, rows in itertools.product((PROMPT + RESPONSE, 29, 100), (1, 3, 12))
  ],
)
@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_packing_and_micro_batches_change_no_gradient(policy, row_length, micro_batch_rows, aggregate):
  """Against one row a sequence and all rows at once; lengths from one token to all there is room for, and answers."""
  groups = with_answers(near_policy(policy, make_groups(count=6, seed=5)))
  longest = PROMPT + RESPONSE + groups.answers.mask.shape[2]
  expected, expected_metrics = gradients(policy, padded(groups, 6, aggregate))
  rows = packing.pack(groups, aggregate, 12, max(row_length, longest))
  assert np.any(rows.segment_ids > 1)
  found, metrics = gradients(policy, rows, dataclasses.replace(SETTINGS, micro_batch_rows=micro_batch_rows))
  assert_metrics(metrics, expected_metrics)
  assert_close(found, expected, tolerance=1e-5)


def test_rows_of_padding_cost_nothing(policy, groups):
  """One program whatever is packed; micro-batches without a sequence are not run."""
  settings = dataclasses.replace(SETTINGS, micro_batch_rows=2)
  rows = padded(groups, 8, "token_mean")
  broken = rows.tokens.copy()
  broken[6:] = -(2**31)  # were they looked at, this would be NaN
  expected, _ = gradients(policy, rows, settings)
  few = padded(groups.take(slice(1)), 8, "token_mean")
  before = compilations()
  found, metrics = gradients(policy, rows._replace(tokens=broken), settings)
  gradients(policy, few, settings)
  assert compilations() == before
  assert_close(found, expected, tolerance=1e-7)
  assert not metrics["skipped"]


def test_a_step_that_is_not_finite_changes_nothing(policy, groups):
  rows = padded(groups, 3, "token_mean")
  settings = dataclasses.replace(SETTINGS, micro_batch_rows=2)
  bad = rows._replace(advantages=np.where(rows.mask & (np.arange(6) == 5)[:, None], np.nan, rows.advantages))
  for part, skipped in ((bad, True), (rows, False)):
    params = jax.tree.map(jnp.copy, policy.params)
    state = OPTIMIZER.init(params)
    kept = jax.device_get(state)
    (after, state), metrics = optimizer_step(
      UpdateProgram(policy.model, OPTIMIZER, settings), {}, Trainable(params, state), part
    )
    assert bool(metrics["skipped"]) is skipped
    same = [np.array_equal(x, y) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(policy.params), strict=True)]
    same += [np.array_equal(x, y) for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True)]
    assert all(same) if skipped else not any(same)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon", "sgd"])
def test_moments_are_finite_where_the_norm_of_the_gradients_is(policy, kind):
  """Gradients as large as their norm can be: nothing else is looked at."""
  optimizer = clipped_optimizer(kind, 1e-6, weight_decay=0.01, max_grad_norm=1e18)
  huge = jax.tree.map(lambda x: jnp.full(x.shape, 1.8e19 / math.sqrt(policy_size(policy))), policy.params)
  assert np.isfinite(optax.tree.norm(huge))
  state = optimizer.init(policy.params)
  for _ in range(5):
    steps, state = jax.jit(optimizer.update)(huge, state, policy.params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((steps, state)))


def policy_size(policy):
  return sum(leaf.size for leaf in jax.tree.leaves(policy.params))


def test_pack_row_by_row():
  groups = make_groups(count=3, seed=4)
  rows = padded(groups, 5, "token_mean")
  assert {field.shape for field in rows if field is not None} == {(10, PROMPT + RESPONSE)}
  dtypes = [field.dtype for field in rows if field is not None]
  assert dtypes == [np.int32, np.int32, np.int32, np.bool_, np.float32, np.float32, np.float32, np.int32]
  for row in range(6):
    k, g = divmod(row, SAMPLES)
    start, end = groups.prompt_lengths[k], groups.prompt_lengths[k] + groups.lengths[k, g]
    text = [*groups.prompt_tokens[k, :start], *groups.tokens[k, g, : end - start]]
    assert rows.tokens[row, :end].tolist() == text
    assert rows.positions[row, :end].tolist() == list(range(end))
    padding = [0] * (PROMPT + RESPONSE - end)
    assert rows.segment_ids[row].tolist() == [1] * start + [2] * (end - start) + padding
    assert rows.group_ids[row].tolist() == [1] * end + padding
    assert not rows.mask[row, start - 1]  # the last prompt token is not trained,
    assert rows.mask[row].tolist() == [start <= place < end for place in range(PROMPT + RESPONSE)]
    assert text[-1] == 0  # and EOS, which looks like padding here, is
    assert rows.old_logprobs[row, start:end].tolist() == groups.logprobs[k, g, : end - start].tolist()
    assert set(rows.advantages[row, start:end]) == {groups.advantages[k, g]}
    for field in (rows.old_logprobs, rows.advantages, rows.weights):
      assert not field[row][~rows.mask[row]].any()
  for name, field in rows._asdict().items():  # the rows of the missing groups
    assert field is None or np.all(field[6:] == (-1 if name == "positions" else 0))
  np.testing.assert_allclose(rows.weights[rows.mask], 1 / groups.lengths.sum(), rtol=1e-6)


@pytest.mark.parametrize(
  ("kept", "sizes"), [(8, [2, 2, 2, 2]), (7, [2, 2, 2, 1]), (5, [2, 1, 1, 1]), (2, [1, 1]), (1, [1]), (0, [])]
)
@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_minibatches_are_dealt_evenly(kept, sizes, aggregate):
  """Eight prompts in four minibatches; when fewer were kept every minibatch has its share, and always one shape."""
  groups = make_groups(count=8, seed=1).take(slice(kept))
  settings = PackingSettings(
    prompts_per_step=8, minibatches=4, aggregate=aggregate, row_length=PROMPT + RESPONSE, micro_batch_rows=3
  )
  minibatches = packing.pack_minibatches(groups, settings)
  found = []
  for rows in minibatches:
    assert {field.shape for field in rows if field is not None} == {(6, PROMPT + RESPONSE)}  # 4, a multiple of 3
    dealt = sorted({float(advantage) for advantage in rows.advantages[rows.mask]})
    found.append(len(dealt) / SAMPLES)
    assert not rows.weights[rows.segment_ids == 0].any()
    expected = rows.mask.sum() / (len(dealt) * RESPONSE) if aggregate == "seq_mean_token_sum" else 1
    assert rows.weights.sum() == pytest.approx(expected, rel=1e-6)
  assert found == sizes
  everything = np.concatenate([rows.advantages[rows.mask] for rows in minibatches]) if minibatches else []
  assert sorted(set(everything)) == sorted(groups.advantages.reshape(-1))  # each response once
  assert len(everything) == groups.lengths.sum()


def test_groups_select_and_join():
  groups = make_groups(count=4)
  assert groups.num_groups == 4
  kept = groups.take(np.array([True, False, True, True]))
  np.testing.assert_array_equal(kept.advantages, groups.advantages[[0, 2, 3]])
  joined = packing.concatenate([groups.take(slice(0)), groups.take(slice(1)), groups.take(slice(1, None))])
  for found, expected in zip(joined, groups, strict=True):
    np.testing.assert_array_equal(found, expected)


# --- other terms ---


def with_answers(groups, seed=3):
  """Answers of one to three tokens in the place of what each response wrote from some token on; two have no place."""
  rng = np.random.default_rng(seed)
  shape, width = groups.lengths.shape, 5
  mask = np.zeros((*shape, width), bool)
  for k, g in np.ndindex(shape):
    first = rng.integers(1, 3)
    mask[k, g, first : first + rng.integers(1, 4)] = (k, g) not in ((0, 1), (1, 0))
  answers = types.Answers(
    weights=np.where(mask, rng.random(mask.shape), 0).astype(np.float32),
    starts=rng.integers(0, groups.lengths + 1).astype(np.int32),
    tokens=rng.integers(0, 64, (*shape, width)).astype(np.int32),
    mask=mask,
  )
  return groups._replace(answers=answers)


def test_the_gradient_through_answers_is_that_of_their_weighted_log_probability(policy, groups):
  """Against one sequence at a time: A log p of what was sampled before the answer, and w log p of the answer."""
  spliced = with_answers(groups)
  settings = dataclasses.replace(SETTINGS, entropy_coefficient=0.0, clip_low=1.0, clip_high=100.0)
  rows = padded(spliced, 3, "token_mean")
  found, metrics = gradients(policy, rows, settings)
  answers, total = spliced.answers, 0
  texts = []
  for k, g in np.ndindex(spliced.lengths.shape):
    start, kept = int(spliced.prompt_lengths[k]), int(spliced.lengths[k, g])
    suffix, places = [], []
    if answers.mask[k, g].any():
      kept = int(answers.starts[k, g])
      places = np.flatnonzero(answers.mask[k, g])
      suffix = answers.tokens[k, g, : places[-1] + 1].tolist()
    text = [*spliced.prompt_tokens[k, :start], *spliced.tokens[k, g, :kept], *suffix]
    texts.append((np.array(text), start, kept, np.array(places, int), k, g))
    total += kept + len(places)

  def objective(params):
    value = 0.0
    for text, start, kept, places, k, g in texts:
      ones = np.ones((1, len(text)), int)
      rows = PackedRows(text[None], np.arange(len(text))[None], ones, ones > 0, *[None] * 3)
      logps = row_logprobs(policy.model, params, rows, TEMPERATURE)[0][0]
      old = spliced.logprobs[k, g, :kept]
      ratio = jnp.exp(logps[start : start + kept] - old)
      value += jnp.sum(ratio * spliced.advantages[k, g])
      value += jnp.sum(answers.weights[k, g, places] * logps[start + kept + places])
    return -value / total

  expected = jax.grad(objective)(policy.params)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(np.abs(theirs).max())))
  assert metrics["answer_loss"] > 0


def test_answers_change_nothing_where_none_has_a_place(policy, groups):
  spliced = with_answers(groups)
  nowhere = spliced._replace(answers=spliced.answers._replace(mask=np.zeros_like(spliced.answers.mask)))
  expected, _ = gradients(policy, padded(groups, 3, "token_mean"))
  found, metrics = gradients(policy, padded(nowhere, 3, "token_mean"))
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert metrics["answer_loss"] == 0


@pytest.mark.parametrize("micro_batch_rows", [pytest.param(6, marks=pytest.mark.slow), 2])
def test_kl_is_measured_from_the_reference(policy, groups, micro_batch_rows):
  """No gradient from the policy to itself; from another policy that of exp(d) - d - 1, by differences in float64."""
  settings = dataclasses.replace(
    SETTINGS, entropy_coefficient=0.0, kl_coefficient=0.7, micro_batch_rows=micro_batch_rows
  )
  rows = padded(groups._replace(advantages=np.zeros_like(groups.advantages)), 3, "token_mean")
  other = jax.tree.map(lambda x: x * 1.05, policy.params)
  program = LogprobProgram(policy.model, TEMPERATURE, micro_batch_rows, settings.sharding)
  own = rows._replace(reference_logprobs=compute_logprobs(program, policy.params, rows))
  found, metrics = gradients(policy, own, settings)
  assert abs(metrics["kl"]) < 1e-6
  assert max(float(np.abs(x).max()) for x in jax.tree.leaves(found)) < 1e-5
  far = rows._replace(reference_logprobs=compute_logprobs(program, other, rows))
  np.testing.assert_allclose(far.reference_logprobs, row_logprobs(policy.model, other, rows, TEMPERATURE)[0], atol=1e-5)
  assert np.all(np.asarray(far.reference_logprobs)[rows.mask] < 0)
  found, metrics = gradients(policy, far, settings)
  reference = np.asarray(far.reference_logprobs, np.float64)

  def kl(params):
    logps = np.asarray(trainer_logprobs(policy.model, params, rows)[0], np.float64)
    d = reference - logps
    return float(np.mean((np.exp(d) - d - 1)[rows.mask]))

  assert metrics["kl"] == pytest.approx(kl(policy.params), rel=1e-4)
  assert metrics["kl"] > 1e-4
  towards = jax.tree.map(lambda x, g: x - 1e-3 * g, policy.params, found)
  change = 0.7 * (kl(towards) - kl(policy.params))
  predicted = -1e-3 * sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in jax.tree.leaves(found))
  assert change == pytest.approx(predicted, rel=0.1)


def test_truncated_weights_and_dual_clip_reach_the_update(policy, groups):
  rows = padded(groups, 3, "token_mean")
  rows = rows._replace(old_logprobs=rows.old_logprobs - 1.5 * (rows.advantages < 0))  # ratios of bad tokens above 4
  plain = dataclasses.replace(SETTINGS, entropy_coefficient=0.0)
  _, clipped = gradients(policy, rows, plain)
  _, dual = gradients(policy, rows, dataclasses.replace(plain, dual_clip=2.0))
  _, truncated = gradients(policy, rows, dataclasses.replace(plain, loss="truncated", ratio_cap=1.5))
  logps = np.asarray(trainer_logprobs(policy.model, policy.params, rows)[0], np.float64)
  ratio, a, m = np.exp(logps - rows.old_logprobs), rows.advantages, rows.mask
  loss = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.27) * a)
  assert clipped["loss"] == pytest.approx(np.mean(loss[m]), rel=1e-4)
  bounded = np.where(a < 0, np.minimum(loss, -2 * a), loss)
  assert dual["loss"] == pytest.approx(np.mean(bounded[m]), rel=1e-4)
  assert dual["loss"] < clipped["loss"] - 0.01
  assert truncated["loss"] == pytest.approx(np.mean((-np.minimum(ratio, 1.5) * a * logps)[m]), rel=1e-4)
