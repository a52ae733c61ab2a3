"""Slots: chunks of tokens against whole passes over the text, rows that know nothing of each other, and scoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax.models import KVCache
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.decode import DecodeSettings, Entries, Prefilled, Suffixes, row_keys
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.types import PackedRows
from tests.models.cases import by_token
from tests.sampling.drawing import Responses, draw_all

VOCAB, LIMIT, SLOTS = 64, 12, 10
# Ten rows: of four prompts, two or three samples each. One limit is 0, some are short.
LENGTHS = np.array([8, 2, 5, 1], np.int32)
SOURCE = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3], np.int32)
LIMITS = np.array([12, 12, 12, 12, 12, 3, 12, 1, 12, 12], np.int32)
WIDTH = 8
TEXT = WIDTH + LIMIT
# One token in eight ends a response, so that most end early; 0, which pads, is one of them.
ENDS = tuple(range(0, VOCAB, 8))
ENDLESS = (VOCAB,)
WHOLE = SamplingParams()


def make_prompts(width=WIDTH, filler=0):
  """Prompts padded on the right; a prompt's tokens do not depend on the width."""
  tokens = np.full((len(LENGTHS), width), filler, np.int32)
  for row, length in enumerate(LENGTHS):
    tokens[row, :length] = np.random.default_rng([0, row]).integers(0, VOCAB, length)
  return tokens


@pytest.fixture(scope="module")
def keys():
  return np.asarray(row_keys(jax.random.key(0), *np.divmod(np.arange(10, dtype=np.uint32), 2)))


def fill(policy, keys, order=range(SLOTS), limits=LIMITS, prompts=None, steps=16, slots=None, sampling=WHOLE):
  """Slots with row `order[i]` of the ten in slot i; None leaves a slot empty."""
  count = len(order)
  if slots is None:
    slots = decode.empty_slots(policy.model, policy.params, count, TEXT + steps)
  prompts = make_prompts() if prompts is None else prompts
  hidden, cache = decode.prefill(policy.model, policy.params, prompts, LENGTHS)
  rows = np.array([0 if row is None else row for row in order])
  target = np.array([count if row is None else slot for slot, row in enumerate(order)], np.int32)
  entries = Entries(
    source=SOURCE[rows], target=target, keys=keys[rows], limits=limits[rows], sampling=stack([sampling] * count)
  )
  return decode.insert(policy.model, policy.params, slots, Prefilled(hidden, cache, LENGTHS), entries)


def run(policy, slots, eos_ids=ENDS, steps=16, kv_length=TEXT, before=None):
  """Chunks until no row is active: the slots then, and what was drawn."""
  settings = DecodeSettings(steps, eos_ids)
  return draw_all(policy.model, policy.params, slots, settings, kv_length, LIMIT, before)


def read(slots, drawn):
  """Of each row lengths, counts, finished, tokens, log-probabilities; -1 and 0 beyond its end."""
  there = np.arange(LIMIT) < drawn.counts[:, None]
  return {
    "lengths": np.asarray(slots.lengths), "counts": drawn.counts, "finished": drawn.finished,
    "tokens": np.where(there, drawn.tokens, -1), "logprobs": np.where(there, drawn.logprobs, 0),
  }  # fmt: skip


def assert_same(found, expected, rows=slice(None)):
  for name in expected:
    tolerance = 1e-5 if name == "logprobs" else 0
    np.testing.assert_allclose(found[name], expected[name][rows], atol=tolerance, rtol=0, err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
  """Logits of whole rows."""
  decoder = nnx.merge(model, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


def one_after_another(policy, keys, sampling, eos_ids):
  """The ten rows as the definition has them: a whole pass over the text for every token, logits in float64."""
  texts, prompts = np.zeros((SLOTS, TEXT), np.int32), make_prompts()[SOURCE]
  texts[:, :WIDTH] = prompts
  lengths, counts = LENGTHS[SOURCE].copy(), np.zeros(SLOTS, np.int32)
  finished, active = np.zeros(SLOTS, bool), LIMITS > 0
  tokens, logprobs = np.full((SLOTS, LIMIT), -1), np.zeros((SLOTS, LIMIT))
  for place in range(LIMIT):
    logits = np.asarray(forward(policy.model, policy.params, texts), np.float64)[np.arange(SLOTS), lengths - 1]
    logps = logits / (sampling.temperature or 1)
    logps -= np.log(np.exp(logps).sum(axis=1, keepdims=True))
    for row in np.flatnonzero(active):
      if sampling.temperature:
        key = jax.random.fold_in(jax.random.wrap_key_data(keys[row]), place)
        token = int(np.argmax(logps[row] + np.asarray(jax.random.gumbel(key, (VOCAB,)))))
      else:
        token = int(np.argmax(logits[row]))
      tokens[row, place], logprobs[row, place] = token, logps[row, token]
      texts[row, lengths[row]] = token
      lengths[row] += 1
      counts[row] += 1
      finished[row] = token in eos_ids
      active[row] = not finished[row] and counts[row] < LIMITS[row]
  return {"lengths": lengths, "counts": counts, "finished": finished, "tokens": tokens, "logprobs": logprobs}


@pytest.fixture(scope="module")
def expected(policy, keys):
  """What the ten rows come to at temperature 1."""
  return one_after_another(policy, keys, WHOLE, ENDS)


@pytest.fixture(scope="module")
def ended(policy, keys):
  """The ten rows in slots, all ended, and what was drawn. Calls that donate must copy."""
  return run(policy, fill(policy, keys))


def copy(slots):
  return jax.tree.map(jnp.array, slots)


def text_of(row, tokens, count):
  return [*make_prompts()[SOURCE[row], : LENGTHS[SOURCE[row]]], *tokens[row, :count]]


def test_rows_end_at_eos_or_at_their_limit(expected):
  """That the rows by which everything else is judged are of every kind."""
  assert len(np.unique(expected["counts"])) > 4
  assert 0 < expected["finished"].sum() < SLOTS
  assert (~expected["finished"] & (expected["counts"] == LIMIT)).any()
  assert expected["counts"][7] == 1
  last = expected["tokens"][np.arange(SLOTS), expected["counts"] - 1]
  np.testing.assert_array_equal(np.isin(last, ENDS), expected["finished"])


@pytest.mark.parametrize("steps", [1, 5, 16])
def test_chunks_are_one_token_after_another(policy, keys, expected, steps):
  assert_same(read(*run(policy, fill(policy, keys, steps=steps), steps=steps)), expected)


@pytest.mark.parametrize("sampling", [SamplingParams(0.5), SamplingParams(0.0)])
@pytest.mark.parametrize("eos_ids", [ENDLESS, ENDS])
def test_other_temperatures_and_greedy(policy, keys, sampling, eos_ids):
  found = read(*run(policy, fill(policy, keys, steps=5, sampling=sampling), eos_ids, steps=5))
  assert_same(found, one_after_another(policy, keys, sampling, eos_ids))
  if eos_ids == ENDLESS:
    np.testing.assert_array_equal(found["counts"], LIMITS)
    assert not found["finished"].any()


def test_truncation_reaches_the_tokens_and_not_their_log_probabilities(policy, keys):
  sampling = SamplingParams(1.0, top_k=3)
  found = read(*run(policy, fill(policy, keys, steps=5, sampling=sampling), ENDLESS, steps=5))
  texts = np.zeros((SLOTS, TEXT), np.int32)
  for row in range(SLOTS):
    texts[row, : found["lengths"][row]] = text_of(row, found["tokens"], found["counts"][row])
  logps = np.asarray(jax.nn.log_softmax(forward(policy.model, policy.params, texts)))
  ranks = set()
  for row, (length, count) in enumerate(zip(found["lengths"], found["counts"], strict=True)):
    at = logps[row, length - count - 1 : length - 1]
    drawn = at[np.arange(count), found["tokens"][row, :count]]
    np.testing.assert_allclose(found["logprobs"][row, :count], drawn, atol=1e-5)
    ranks |= set(np.sum(at > drawn[:, None], axis=1).tolist())
  assert ranks == {0, 1, 2}


def test_neighbours_and_slots_change_nothing(policy, keys, expected):
  order = [8, None, 2, 5, 0, None, 3, 9, 1, 6]
  found = read(*run(policy, fill(policy, keys, order)))
  there = [slot for slot, row in enumerate(order) if row is not None]
  assert_same({name: x[there] for name, x in found.items()}, expected, [order[slot] for slot in there])
  for slot in (1, 5):  # and what is not there does nothing
    assert found["counts"][slot] == 0
    assert not found["finished"][slot]


def test_a_samples_number_and_the_prompts_number_decide(policy, keys, expected):
  """The same prompt under another key comes out otherwise."""
  rolled = read(*run(policy, fill(policy, np.roll(keys, 1, axis=0))))
  assert np.mean(rolled["tokens"][:, 0] == expected["tokens"][:, 0]) < 0.5
  assert len({tuple(row) for row in expected["tokens"][:5]}) == 5


def test_prompt_padding_changes_nothing(policy, keys, expected):
  wide = fill(policy, keys, prompts=make_prompts(width=13, filler=9))
  assert_same(read(*run(policy, wide)), expected)


@pytest.mark.parametrize("kv_length", [16, TEXT, 36])
def test_reach_changes_nothing_where_it_is_enough(policy, keys, expected, kv_length):
  """16 is less than the longest text comes to; when the last chunk begins, no active row may be longer."""
  slots, before = fill(policy, keys, steps=16), None
  if kv_length < TEXT:
    slots, new = decode.decode(policy.model, policy.params, slots, DecodeSettings(8, ENDS), SLOTS, WIDTH)
    assert WIDTH < np.asarray(slots.lengths)[np.asarray(slots.active)].max() <= kv_length
    tokens, logprobs = (np.pad(x, ((0, 0), (0, LIMIT - 8))) for x in (new.tokens, new.logprobs))
    before = Responses(tokens, logprobs, new.counts, new.finished)
  assert_same(read(*run(policy, slots, kv_length=kv_length, before=before)), expected)


def test_ended_rows_stay_as_they_are(policy, ended):
  before = jax.device_get(ended[0])
  assert not before.active.any()
  again = decode.decode(policy.model, policy.params, copy(ended[0]), DecodeSettings(16, ENDS), SLOTS, TEXT)
  after, new = jax.device_get(again)
  for x in (new.counts, new.finished, new.active):
    np.testing.assert_array_equal(x, np.zeros(SLOTS))
  for name in set(before._fields) - {"cache"}:
    np.testing.assert_array_equal(getattr(after, name), getattr(before, name), name)
  for row, length in enumerate(before.lengths):
    np.testing.assert_array_equal(after.cache.keys[:, row, ..., :length], before.cache.keys[:, row, ..., :length])


def test_ended_rows_stay_as_they_are_while_others_go_on(policy, keys):
  """Bit for bit, also the row whose text is as long as a text can be."""
  steps = 4
  first, drawn = run(policy, fill(policy, keys, [0, 7, 5, 2], steps=steps), eos_ids=ENDLESS, steps=steps)
  slots = fill(policy, keys, [None, None, None, 8], steps=steps, slots=copy(first))
  last, then = run(policy, slots, eos_ids=ENDLESS, steps=steps)
  first, last = jax.device_get((first, last))
  assert first.lengths[0] == TEXT == first.cache.values.shape[3] - steps
  assert then.tokens[3].tolist() != drawn.tokens[3].tolist()
  for slot in (0, 1, 2):
    for name in set(first._fields) - {"cache", "adjustments"}:
      np.testing.assert_array_equal(getattr(last, name)[slot], getattr(first, name)[slot], name)
    for old, new in zip(by_token(first.cache), by_token(last.cache), strict=True):
      np.testing.assert_array_equal(new[:, slot, : first.lengths[slot]], old[:, slot, : first.lengths[slot]])


@pytest.mark.parametrize("steps", [1, 5, 16])
def test_the_cache_holds_the_text(policy, keys, steps):
  """Keys and values of prompt and response, EOS included, as one pass over the text gives them."""
  slots, drawn = jax.device_get(run(policy, fill(policy, keys, steps=steps), steps=steps))
  texts = np.zeros((SLOTS, TEXT), np.int32)
  for row in range(SLOTS):
    texts[row, : slots.lengths[row]] = text_of(row, drawn.tokens, drawn.counts[row])
  hidden, cache = decode.prefill(policy.model, policy.params, texts, slots.lengths)
  for found, expected in zip(by_token(slots.cache), by_token(cache), strict=True):
    for row, length in enumerate(slots.lengths):
      np.testing.assert_allclose(found[:, row, :length], expected[:, row, :length], atol=1e-5)
  np.testing.assert_allclose(slots.hidden, hidden, atol=1e-5)


def test_decoding_stops_when_the_last_row_ends(policy, keys):
  """A step writes keys of some token behind every text; where none was taken, the fresh slots are still zero."""
  settings = DecodeSettings(16, tuple(range(VOCAB)))  # everything ends
  slots, new = jax.device_get(decode.decode(policy.model, policy.params, fill(policy, keys), settings, SLOTS, TEXT))
  assert (new.counts == 1).all()
  assert new.finished.all()
  written = np.abs(slots.cache.values).sum(axis=(0, 2, 4)) > 0  # [S, C]
  for row, length in enumerate(slots.lengths):
    assert written[row, :length].all()
    assert not written[row, max(length, WIDTH) :].any()  # up to WIDTH the prompt's padding was written


def test_insert_leaves_the_other_slots_alone(policy, keys, ended, expected):
  """Bit for bit; and what is inserted where another row was decodes as in a fresh slot."""
  before = jax.device_get(ended[0])
  order = [None, 2, None, None, 8, None, None, 0, None, None]
  slots = fill(policy, keys, order, slots=copy(ended[0]))
  after = jax.device_get(slots)
  others = [slot for slot, row in enumerate(order) if row is None]
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    axis = 1 if old.ndim == 5 else 0
    np.testing.assert_array_equal(np.take(new, others, axis), np.take(old, others, axis))
  assert np.flatnonzero(after.active).tolist() == [1, 4, 7]
  assert (after.counts[[1, 4, 7]] == 0).all()
  found = read(*run(policy, slots, before=ended[1]))
  rows = [row if row is not None else slot for slot, row in enumerate(order)]
  assert_same(found, expected, rows)


def test_a_limit_of_nothing_is_no_row(policy, keys):
  limits = np.where(np.arange(SLOTS) == 4, 0, LIMITS)
  found = read(*run(policy, fill(policy, keys, limits=limits)))
  assert found["counts"][4] == 0
  assert (found["counts"][np.arange(SLOTS) != 4] > 0).all()


def poison(slots):
  """Large numbers wherever no text is."""
  room = np.arange(slots.cache.values.shape[3]) >= np.asarray(slots.lengths)[:, None]
  return slots._replace(
    cache=KVCache(
      jnp.where(room[None, :, None, None], 1e4, slots.cache.keys),
      jnp.where(room[None, :, None, :, None], 1e4, slots.cache.values),
    )
  )


def test_garbage_behind_the_text_never_shows(policy, keys, expected):
  assert_same(read(*run(policy, poison(fill(policy, keys)))), expected)


def make_suffixes(of_rows, texts, kept, groups, width, picks):
  """Suffixes in segments after the first `kept` tokens of each text, which are those of rows `of_rows` of a cache.

  Args:
    groups: for each row the suffixes, lists of tokens.
    picks: how many tokens of each suffix are scored, the last ones.

  Returns:
    the suffixes; and the whole texts that they stand for, with how many tokens of each are scored, in order.
  """
  rows, scored = len(groups), max(sum(min(picks, len(s)) for s in group) for group in groups)
  out = Suffixes(
    np.array(of_rows, np.int32),
    *(np.zeros((rows, width), np.int32) for _ in range(3)),
    *np.zeros((2, rows, scored), np.int32),
  )
  whole = []
  for row, (text, keep, group) in enumerate(zip(texts, kept, groups, strict=True)):
    at, done = 0, 0
    for number, suffix in enumerate(group, 1):
      here, count = slice(at, at + len(suffix)), min(picks, len(suffix))
      out.tokens[row, here] = [text[keep - 1], *suffix[:-1]]
      out.positions[row, here] = keep - 1 + np.arange(len(suffix))
      out.segment_ids[row, here] = number
      out.places[row, done : done + count] = np.arange(here.stop - count, here.stop)
      out.targets[row, done : done + count] = suffix[-count:]
      whole.append((row, done, [*text[:keep], *suffix], count))
      at, done = here.stop, done + count
  return out, whole


@functools.partial(jax.jit, static_argnums=(0, 3))
def trainer_logprobs(model, params, rows, temperature):
  return row_logprobs(model, params, rows, temperature)[0]


def whole_pass(policy, texts, temperature):
  """The trainer's log-probability of each token of each text."""
  width = 48
  tokens, segments = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)], segments[row, : len(text)] = text, 1
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
  rows = PackedRows(tokens, positions, segments, mask=segments > 0, old_logprobs=None, advantages=None, weights=None)
  return np.asarray(trainer_logprobs(policy.model, policy.params, rows, temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("poisoned", [False, True])
def test_suffixes_are_scored_as_in_a_whole_pass(policy, ended, temperature, poisoned):
  """After any part of any row's text, in any order, one row twice, one to three suffixes a row."""
  slots = poison(copy(ended[0])) if poisoned else ended[0]
  rng = np.random.default_rng(0)
  rows = np.array([3, 9, 0, 3, 6, 1, 8], np.int32)
  lengths, tokens, counts = np.asarray(slots.lengths), ended[1].tokens, ended[1].counts
  texts = [text_of(row, tokens, counts[row]) for row in rows]
  kept = rng.integers(LENGTHS[SOURCE[rows]], lengths[rows] + 1)  # from the bare prompt to the whole text
  kept[0], kept[1] = LENGTHS[SOURCE[rows[0]]], lengths[rows[1]]
  groups = [
    [rng.integers(0, VOCAB, rng.integers(1, 7)).tolist() for _ in range(1 + row % 3)] for row in range(len(rows))
  ]
  suffixes, whole = make_suffixes(rows, texts, kept, groups, width=20, picks=4)
  before = jax.device_get(slots.cache)
  found = np.asarray(decode.score(policy.model, policy.params, slots.cache, suffixes, temperature, int(kept.max())))
  far = np.asarray(decode.score(policy.model, policy.params, slots.cache, suffixes, temperature, TEXT + 16))
  expected = whole_pass(policy, [text for _, _, text, _ in whole], temperature)
  for i, (row, start, text, count) in enumerate(whole):
    logps = expected[i, len(text) - count : len(text)]
    np.testing.assert_allclose(found[row, start : start + count], logps, atol=2e-5)
    np.testing.assert_allclose(far[row, start : start + count], logps, atol=2e-5)
  for old, new in zip(before, slots.cache, strict=True):
    np.testing.assert_array_equal(new, old)  # the cache was read and no more


def test_padding_of_the_suffixes_changes_nothing(policy, ended):
  text = text_of(2, ended[1].tokens, 1)
  scores = []
  for width, filler in ((5, 0), (11, 0), (11, 63)):
    suffixes, _ = make_suffixes([2], [text], [len(text)], [[[5, 6, 7, 8, 9]]], width, picks=5)
    suffixes.tokens[:, 5:] = filler
    scores.append(np.asarray(decode.score(policy.model, policy.params, ended[0].cache, suffixes, 1.0, TEXT)))
    assert np.isfinite(scores[-1]).all()
  np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=1e-6)


def test_tokens_of_a_row_are_drawn_independently(policy):
  """A key used twice would draw like tokens in like places: under a flat policy nothing else could tell rows apart."""
  count = 128
  flat = jax.tree.map(np.zeros_like, policy.params)  # uniform over the vocabulary
  keys = np.asarray(row_keys(jax.random.key(3), *np.divmod(np.arange(count, dtype=np.uint32), count // 2)))
  hidden, cache = decode.prefill(policy.model, flat, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
  slots = decode.empty_slots(policy.model, flat, count, 5)
  for rows in np.split(np.arange(count, dtype=np.int32), count // 32):
    entries = Entries(
      source=np.zeros(32, np.int32),
      target=rows,
      keys=keys[rows],
      limits=np.full(32, 2, np.int32),
      sampling=stack([WHOLE] * 32),
    )
    slots = decode.insert(policy.model, flat, slots, Prefilled(hidden, cache, np.ones(1, np.int32)), entries)
  _, new = decode.decode(policy.model, flat, slots, DecodeSettings(2, ENDLESS), count, 3)
  np.testing.assert_allclose(new.logprobs, -np.log(VOCAB), rtol=1e-6)
  first, second = np.asarray(new.tokens).T
  for one, other in ((first, second), (first[: count // 2], first[count // 2 :]), (first[1:], first[:-1])):
    assert abs(np.mean(one == other) - 1 / VOCAB) < 5 * np.sqrt(1 / VOCAB / len(one))


def test_prefill_returns_the_last_hidden_state_of_each_prompt(policy):
  hidden, _ = decode.prefill(policy.model, policy.params, make_prompts(), LENGTHS)
  logits = np.asarray(hidden) @ np.asarray(policy.params["head"]).T
  expected = np.asarray(forward(policy.model, policy.params, make_prompts()))[np.arange(4), LENGTHS - 1]
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  assert np.ptp(expected, axis=0).max() > 0.1  # the prompts do differ


@pytest.mark.parametrize("program", ["decode", "insert", "move"])
def test_the_cache_is_written_where_it_is(policy, program):
  """Donated and never copied: the program's own memory does not grow with the cache."""

  def temporary(rows: int) -> tuple[int, int]:
    make = functools.partial(decode.empty_slots, policy.model, slots=rows, capacity=1024)
    slots = jax.eval_shape(make, policy.params)
    few = np.zeros(4, np.int32)
    hidden, cache = jax.eval_shape(
      functools.partial(decode.prefill, policy.model), policy.params, np.zeros((4, 8), np.int32), few
    )
    match program:
      case "decode":  # as many rows decoded, however many there are
        arguments = slots, DecodeSettings(4, ENDS), 4, 64
      case "insert":
        entries = Entries(few, few, np.zeros((4, 2), np.uint32), few, stack([WHOLE] * 4))
        arguments = slots, Prefilled(hidden, cache, few), entries
      case "move":
        arguments = slots, few, few
    memory = getattr(decode, program).lower(policy.model, policy.params, *arguments).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots.cache))
    assert memory.alias_size_in_bytes >= size
    return size, memory.temp_size_in_bytes

  (small, before), (large, after) = temporary(16), temporary(64)
  assert after - before < 0.1 * (large - small)
