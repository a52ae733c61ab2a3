"""Sampling: the right distribution, the right log-probabilities, and rows that know nothing of each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from rlpr_jax.models import token_logprobs
from rlpr_jax.sampling.decode import SamplingSettings, decode, prefill, score_suffix
from rlpr_jax.sampling.engine import row_keys
from rlpr_jax.training import packing
from rlpr_jax.training.update import row_logprobs

VOCAB, LIMIT, ROOM = 64, 12, 4
SETTINGS = SamplingSettings(LIMIT, ROOM, temperature=1.0, eos_ids=(1,))
# One token in eight ends a response, so that most end early; 0, which pads, is one of them.
ENDS = tuple(range(0, VOCAB, 8))
ENDING = SamplingSettings(LIMIT, ROOM, temperature=1.0, eos_ids=ENDS)
LENGTHS = np.array([7, 2, 5, 1], np.int32)


def make_prompts(lengths=LENGTHS, width=8, seed=0):
  """Prompts padded on the right; a prompt's tokens do not depend on the width."""
  tokens = np.zeros((len(lengths), width), np.int32)
  for row, length in enumerate(lengths):
    tokens[row, :length] = np.random.default_rng([seed, row]).integers(0, VOCAB, length)
  return tokens


def sample(policy, settings, prompts, lengths, keys, capacity=None):
  hidden, cache = prefill(policy.model, policy.params, prompts, lengths, capacity or prompts.shape[1] + LIMIT + ROOM)
  samples, cache = decode(policy.model, policy.params, hidden, cache, lengths, keys, settings)
  return jax.device_get(samples), cache


@functools.partial(jax.jit, static_argnums=(0, 3))
def trainer_logprobs(model, params, rows, temperature):
  return row_logprobs(model, params, rows, temperature)[0]


def to_rows(prompts, lengths, samples):
  """Samples as the rows that training sees."""
  count = len(lengths)
  fields = [x.reshape(count, -1, *x.shape[1:]) for x in samples[:3]]
  groups = packing.Groups(prompts, lengths, *fields, advantages=np.zeros(fields[1].shape, np.float32))
  return packing.pack(groups, count, "token_mean")


@pytest.fixture(scope="module")
def keys():
  return row_keys(jax.random.key(0), np.arange(4, dtype=np.uint32), 8)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_trainer(policy, keys, temperature):
  settings = SamplingSettings(LIMIT, ROOM, temperature, ENDS)
  prompts = make_prompts()
  samples, _ = sample(policy, settings, prompts, LENGTHS, keys)
  rows = to_rows(prompts, LENGTHS, samples)
  found = np.asarray(trainer_logprobs(policy.model, policy.params, rows, temperature))
  assert rows.mask.sum() == samples.lengths.sum()
  np.testing.assert_allclose(found[rows.mask], rows.old_logprobs[rows.mask], atol=1e-4)


def test_rows_end_at_their_first_eos_and_are_empty_after_it(policy, keys):
  samples, _ = sample(policy, ENDING, make_prompts(), LENGTHS, keys)
  assert len(np.unique(samples.lengths)) > 4
  assert 0 < np.sum(samples.finished) < len(samples.finished)
  for tokens, length, logprobs, finished in zip(*samples, strict=True):
    ends = np.isin(tokens[:length], ENDS)
    assert not ends[:-1].any()
    assert finished == ends[-1]
    assert finished or length == LIMIT
    assert (tokens[length:] == 0).all()
    assert (logprobs[length:] == 0).all()
    assert (logprobs[:length] < 0).all()
  # The token that pads is a token like others where it was sampled.
  assert np.any(samples.tokens[np.arange(32), samples.lengths - 1] == 0)


def test_eos_changes_nothing_before_it(policy, keys):
  endless, _ = sample(policy, SamplingSettings(LIMIT, ROOM, 1.0, eos_ids=(VOCAB,)), make_prompts(), LENGTHS, keys)
  assert (endless.lengths == LIMIT).all()
  assert not endless.finished.any()
  ending, _ = sample(policy, ENDING, make_prompts(), LENGTHS, keys)
  kept = np.arange(LIMIT) < ending.lengths[:, None]
  np.testing.assert_array_equal(ending.tokens[kept], endless.tokens[kept])
  np.testing.assert_allclose(ending.logprobs[kept], endless.logprobs[kept], atol=1e-5)


def test_prompt_padding_changes_nothing(policy, keys):
  expected, _ = sample(policy, ENDING, make_prompts(), LENGTHS, keys)
  wide = make_prompts(width=13)
  wide[np.arange(13) >= LENGTHS[:, None]] = 9  # nor does what it holds
  found, _ = sample(policy, ENDING, wide, LENGTHS, keys)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.lengths, expected.lengths)
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_neighbours_and_their_order_change_nothing(policy, keys):
  expected, _ = sample(policy, ENDING, make_prompts(), LENGTHS, keys)
  order = np.array([2, 0, 3, 1])
  keys = keys.reshape(4, 8)[order].reshape(-1)
  prompts = make_prompts()[order]
  prompts[3, : LENGTHS[1]] = 5  # another neighbour in the last place
  found, _ = sample(policy, ENDING, prompts, LENGTHS[order], keys)
  for field, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
    ours, theirs = (x.reshape(4, 8, *x.shape[1:]) for x in (ours, theirs))
    np.testing.assert_allclose(ours[:3], theirs[order[:3]], atol=1e-5 if field == 2 else 0)


def test_greedy_takes_the_likeliest_token_and_says_how_likely_it_is_at_temperature_one(policy, keys):
  settings = SamplingSettings(LIMIT, ROOM, temperature=0.0, eos_ids=(VOCAB,))
  prompts = make_prompts()
  samples, _ = sample(policy, settings, prompts, LENGTHS, keys)
  rows = to_rows(prompts, LENGTHS, samples)

  @jax.jit
  def forward(params, rows):
    decoder = nnx.merge(policy.model, params)
    return jax.nn.log_softmax(decoder.logits(decoder(rows.tokens, rows.positions, rows.segment_ids)))

  before = np.roll(rows.mask, -1, axis=1)  # places whose next token is of the response
  logps = np.asarray(forward(policy.params, rows))[before]
  np.testing.assert_array_equal(rows.tokens[rows.mask], logps.argmax(axis=-1))
  np.testing.assert_allclose(rows.old_logprobs[rows.mask], logps.max(axis=-1), atol=1e-4)
  by_prompt = samples.tokens.reshape(4, 8, LIMIT)
  np.testing.assert_array_equal(by_prompt, by_prompt[:, :1].repeat(8, axis=1))


def first_token_counts(policy, temperature, rows=8192):
  """Counts [2, V] of the first token after two prompts."""
  settings = SamplingSettings(1, ROOM, temperature, eos_ids=(1,))
  prompts, lengths = make_prompts()[:2], LENGTHS[:2]
  keys = row_keys(jax.random.key(7), np.arange(2, dtype=np.uint32), rows)
  samples, _ = sample(policy, settings, prompts, lengths, keys, capacity=8 + 1 + ROOM)
  return np.stack([np.bincount(tokens, minlength=VOCAB) for tokens in samples.tokens[:, 0].reshape(2, rows)])


def first_token_probabilities(policy, temperature):
  """The same from the softmax, float64 [2, V]."""
  prompts, lengths = make_prompts()[:2], LENGTHS[:2]
  hidden, _ = prefill(policy.model, policy.params, prompts, lengths, capacity=8 + 1 + ROOM)
  logits = np.asarray(hidden, np.float64) @ np.asarray(policy.params["head"], np.float64).T / temperature
  exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return exponents / exponents.sum(axis=-1, keepdims=True)


def chi_square(counts, probabilities):
  """p-value; tokens that are expected fewer than five times are taken together."""
  expected = probabilities * counts.sum()
  rare = expected < 5
  found = np.append(counts[~rare], counts[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  return stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_of_first_tokens_are_the_softmax(policy, temperature):
  counts = first_token_counts(policy, temperature)
  for prompt in range(2):
    assert chi_square(counts[prompt], first_token_probabilities(policy, temperature)[prompt]) > 1e-3
    # The test can tell: another temperature or another prompt is out of the question.
    assert chi_square(counts[prompt], first_token_probabilities(policy, 1.2 * temperature)[prompt]) < 1e-6
    assert chi_square(counts[prompt], first_token_probabilities(policy, temperature)[1 - prompt]) < 1e-6


def test_tokens_of_a_row_are_drawn_independently(policy):
  """A key used twice would draw like tokens in like places: here each prompt is one token, told again and again."""
  keys = row_keys(jax.random.key(3), np.arange(2, dtype=np.uint32), 512)
  flat = jax.tree.map(np.zeros_like, policy.params)  # uniform over the vocabulary
  prompts, lengths = np.zeros((2, 1), np.int32), np.ones(2, np.int32)
  samples, _ = sample(policy._replace(params=flat), SamplingSettings(2, ROOM, 1.0, (VOCAB,)), prompts, lengths, keys)
  np.testing.assert_allclose(samples.logprobs, -np.log(VOCAB), rtol=1e-6)
  first, second = samples.tokens.T
  share_alike = np.mean(first == second)
  assert abs(share_alike - 1 / VOCAB) < 5 * np.sqrt(1 / VOCAB / 1024)
  neighbours_alike = np.mean(first[:512] == first[512:])
  assert abs(neighbours_alike - 1 / VOCAB) < 5 * np.sqrt(1 / VOCAB / 512)


def test_decoding_stops_when_the_last_row_ends(policy, keys):
  """Rows that have ended write into the slot after their end; none is written once all have."""
  everything_ends = SamplingSettings(LIMIT, ROOM, 1.0, eos_ids=tuple(range(VOCAB)))
  prompts = make_prompts(np.full(4, 8))
  samples, cache = sample(policy, everything_ends, prompts, np.full(4, 8, np.int32), keys)
  assert (samples.lengths == 1).all()
  assert samples.finished.all()
  slots = np.abs(np.asarray(cache.keys)).sum(axis=(0, 2, 4))  # [B, slots]
  assert slots.shape == (32, 8 + LIMIT + ROOM)
  assert (slots[:, :9] > 0).all()
  assert (slots[:, 9:] == 0).all()

  often = SamplingSettings(LIMIT, ROOM, 1.0, eos_ids=tuple(range(0, VOCAB, 2)))
  samples, cache = sample(policy, often, prompts, np.full(4, 8, np.int32), keys)
  longest = samples.lengths.max()
  assert 1 < longest < LIMIT
  slots = np.abs(np.asarray(cache.keys)).sum(axis=(0, 2, 4))
  assert (slots[:, 8 + longest :] == 0).all()


def test_suffixes_are_scored_as_if_read_from_the_beginning(policy, keys):
  """After any number of sampled tokens, whatever stood in the cache beyond them."""
  prompts = make_prompts()
  samples, cache = sample(policy, ENDING, prompts, LENGTHS, keys)
  rng = np.random.default_rng(0)
  lengths = np.repeat(LENGTHS, 8)
  kept = rng.integers(0, samples.lengths + 1)
  suffix = rng.integers(0, VOCAB, (32, ROOM)).astype(np.int32)
  starts = (lengths + kept).astype(np.int32)
  texts = np.zeros((32, 8 + LIMIT + ROOM), np.int32)
  for row, start in enumerate(starts):
    texts[row, :start] = np.concatenate([prompts[row // 8, : lengths[row]], samples.tokens[row, : kept[row]]])
    texts[row, start : start + ROOM] = suffix[row]
  found, _ = score_suffix(
    policy.model, policy.params, cache, texts[np.arange(32), starts - 1], starts, suffix, temperature=0.7
  )
  places = np.arange(texts.shape[1])
  rows = packing.PackedRows(
    tokens=texts,
    positions=np.broadcast_to(places, texts.shape),
    segment_ids=(places < starts[:, None] + ROOM).astype(np.int32),
    mask=None, old_logprobs=None, advantages=None, weights=None,
  )  # fmt: skip
  expected = np.asarray(trainer_logprobs(policy.model, policy.params, rows, 0.7))
  for row, start in enumerate(starts):
    np.testing.assert_allclose(found[row], expected[row, start : start + ROOM], atol=1e-4)


def test_prefill_returns_the_last_hidden_state_of_each_prompt(policy):
  hidden, _ = prefill(policy.model, policy.params, make_prompts(), LENGTHS, capacity=9)
  for row, length in enumerate(LENGTHS[:2]):
    alone = make_prompts()[row : row + 1, :length]
    expected, _ = prefill(policy.model, policy.params, alone, LENGTHS[row : row + 1], capacity=9)
    np.testing.assert_allclose(hidden[row], expected[0], atol=1e-5)
  logps = [token_logprobs(policy.params["head"], hidden[:, None], jnp.full((4, 1), token))[0] for token in (3, 4)]
  assert np.ptp(logps) > 0.1  # the prompts do differ
