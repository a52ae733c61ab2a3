"""Rollouts: what is sampled whatever the slots, and reference answers against one forward pass over the whole text."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax import serve, splicing, types
from rlpr_jax.errors import InputError, SettingError, setting_names
from rlpr_jax.models import Reader, Runtime, definition
from rlpr_jax.runs import metrics
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.decode import DecodeSettings, row_keys
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine, SampleOptions
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Beginning
from rlpr_jax.sampling.shapes import Shapes, buckets
from rlpr_jax.training import packing, settings
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.types import Prompt

LIMIT, RESPONSE, SUFFIX = 70, 28, 64  # tokens of a prompt, of a response, of a spliced reference
SAMPLES = 8
SHAPES = Shapes(
  slots=16,
  prompt_limit=LIMIT,
  max_response_length=RESPONSE,
  suffix_length=SUFFIX,
  steps=5,
  prefill_rows=4,
  score_rows=4,
  insert_rows=8,
)
KEY = jax.random.key(0)
# Tokens and references of each prompt: both buckets of either, in turns, and the longest there can be.
SIZES = [(5, 2), (70, 3), (9, 40), (36, 1), (35, 62), (12, 5), (61, 2), (2, 13), (33, 30), (44, 4), (8, 3), (20, 6)]


def ids_of(tokenizer, *tokens):
  """One id a token: characters and tags, as the built-in vocabulary has them."""
  ids = tokenizer.convert_tokens_to_ids(list(tokens))
  assert tokenizer.unk_token_id not in ids or "?" in tokens
  return ids


def make_prompt(tokenizer, question, reference, row=0):
  ids = ids_of(tokenizer, "<q>", *question, "<a>")
  return Prompt(ids=np.array(ids, np.int32), reference=reference, question=question, source="test", row=row)


def letters(count, seed):
  return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), count))


@pytest.fixture(scope="module")
def make(policy):
  """Engines of `answer_only`, where a random policy often happens to write `<answer>` exactly once."""

  def make_engine(template="answer_only", score_temperature=1.0, prefix="bare", sampling=SamplingParams(), **changes):
    shapes = dataclasses.replace(SHAPES, **changes)
    settings = DecodeSettings(shapes.steps, (policy.tokenizer.eos_token_id,))
    device = Device(policy.model, settings, shapes, score_temperature)
    return Engine(device, policy.tokenizer, template, prefix, sampling)

  return make_engine


@pytest.fixture(scope="module")
def draws(policy):
  return [
    (100 + row, make_prompt(policy.tokenizer, letters(length - 2, row), letters(reference, 50 + row), row))
    for row, (length, reference) in enumerate(SIZES)
  ]


@pytest.fixture(scope="module")
def rollouts(make, policy, draws):
  return make().rollout(policy.params, draws, KEY, SAMPLES)


SPENT = ("seconds", "slot_steps")  # fields of what rollouts took
SCORED = ("scorable", "overlong", "reference_starts", "reference_tokens", "reference_logps", "reference_mask")


def assert_same(found, expected, scored=True):
  """All of two rollouts but the time they took; of one without references, all that was sampled."""
  for name in found._fields:
    ours, theirs = getattr(found, name), getattr(expected, name)
    if name in SCORED and not scored:
      assert not ours.any()
    elif name in ("logprobs", "reference_logps"):
      np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
    elif name not in SPENT:
      np.testing.assert_array_equal(ours, theirs, err_msg=name)


def take(rollouts, prompts, samples=SAMPLES):
  """The rollouts of some prompts, in their order."""
  rows = [prompt * samples + sample for prompt in prompts for sample in range(samples)]
  return rollouts._replace(
    **{
      name: [value[row] for row in rows] if name == "texts" else value[rows]
      for name, value in rollouts._asdict().items()
      if name not in SPENT
    }
  )


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
  decoder = nnx.merge(model, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


def score(policy, texts, answers, temperature=1.0):
  """Float64 log-probabilities of the last `answers[i]` tokens of each text, from one pass over the whole of it."""
  found = []
  for first in range(0, len(texts), 16):
    tokens = np.zeros((16, LIMIT + RESPONSE + SUFFIX), np.int32)
    for row, text in enumerate(texts[first : first + 16]):
      tokens[row, : len(text)] = text
    logits = np.asarray(forward(policy.model, policy.params, tokens), np.float64) / temperature
    logps = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for row, (text, count) in enumerate(zip(texts[first : first + 16], answers[first : first + 16], strict=True)):
      found.append([logps[row, place - 1, text[place]] for place in range(len(text) - count, len(text))])
  return found


def splice_by_hand(tokenizer, prompt, response):
  """Prompt, response up to `<answer>` and the spaces after it (or one), and the reference, a token a character."""
  tag, space = ids_of(tokenizer, "<answer>", " ")
  end = response.index(tag) + 1
  spaces = 0
  while end + spaces < len(response) and response[end + spaces] == space:
    spaces += 1
  return [*prompt.ids, *response[:end], *[space] * max(spaces, 1), *ids_of(tokenizer, *prompt.reference)]


def test_rollouts_are_of_every_kind(rollouts):
  """That what everything else is judged by holds all there is to judge."""
  total = len(SIZES) * SAMPLES
  shapes = {name: getattr(rollouts, name).shape for name in ("tokens", "lengths", "reference_tokens", "reference_mask")}
  assert shapes == {
    "tokens": (total, RESPONSE), "lengths": (total,),
    "reference_tokens": (total, SUFFIX), "reference_mask": (total, SUFFIX),
  }  # fmt: skip
  assert rollouts.reference_logps.dtype == rollouts.logprobs.dtype == np.float32
  assert 0 < rollouts.finished.sum() < total
  assert (rollouts.lengths[~rollouts.finished] == RESPONSE).all()
  assert len(np.unique(rollouts.lengths)) > 10
  assert len(np.unique(rollouts.tokens[rollouts.lengths > 2], axis=0)) == np.sum(rollouts.lengths > 2)
  assert not rollouts.refused.any()
  sizes = rollouts.reference_mask.sum(axis=1)
  assert (sizes > 16).any()
  assert ((sizes > 0) & (sizes < 10)).any()
  assert set(rollouts.seconds) == {"prefill", "decode", "score"}
  there = np.arange(RESPONSE) < rollouts.lengths[:, None]
  assert (rollouts.logprobs[there] < 0).all()
  assert (rollouts.logprobs[~there] == 0).all()
  assert (rollouts.tokens[~there] == 0).all()


@pytest.mark.parametrize(
  "changes",
  [
    {"slots": 4},  # fewer than a prompt has samples
    pytest.param({"slots": 64, "steps": 16}, marks=pytest.mark.slow),
    pytest.param({"slots": 128, "score_rows": 16, "insert_rows": 3}, marks=pytest.mark.slow),  # more than responses
    pytest.param({"steps": 1, "prefill_rows": 3, "score_rows": 2, "insert_rows": 5}, marks=pytest.mark.slow),
    {"slots": 7, "prefill_rows": 1, "prompt_limit": 90, "suffix_length": SUFFIX},
  ],
)
def test_slots_and_batches_change_nothing(make, policy, draws, rollouts, changes):
  assert_same(make(**changes).rollout(policy.params, draws, KEY, SAMPLES), rollouts)


@pytest.mark.parametrize(("slots", "scored"), [(64, True), (64, False), pytest.param(16, True, marks=pytest.mark.slow)])
def test_a_tail_is_decoded_in_fewer_rows(make, policy, draws, rollouts, monkeypatch, slots, scored):
  """The last rows move to the front, whether ended ones still wait there to be scored or not."""
  engine, real, calls = make(slots=slots, steps=3), decode.decode, []

  def counted(model, params, state, settings, rows, kv_length):
    calls.append((rows, int(np.sum(state.active))))
    return real(model, params, state, settings, rows, kv_length)

  monkeypatch.setattr(decode, "decode", counted)
  if scored:
    assert_same(engine.rollout(policy.params, draws, KEY, SAMPLES), rollouts)
  else:
    assert_same(engine.sample(policy.params, draws, KEY, SAMPLES), rollouts, scored=False)
  rows = [rows for rows, _ in calls]
  assert set(rows) in ({slots, 16, 4}, {slots, 16})
  assert rows[0] == slots > rows[-1]
  assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("kernel", ["tpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_texts_read_by_a_kernel_are_the_same(make, policy, draws, rollouts, kernel):
  """Decoding and scoring, with what finished rows hold left unread; and one program does for all lengths."""
  engine = make(steps=30, ragged=True)  # for whole registers in a slot
  assert engine.device.shapes.capacity == 128
  runtime = Runtime(decode_attention=Reader(kernel, interpret=True, required=True))
  device = dataclasses.replace(engine.device, model=definition(policy.config, runtime))
  found = dataclasses.replace(engine, device=device).rollout(policy.params, draws, KEY, SAMPLES)
  assert_same(found, rollouts)
  assert len(dataclasses.replace(SHAPES, max_response_length=3000, ragged=True).kv_lengths) == 1


@pytest.mark.parametrize("slots", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_what_begins_ahead_is_the_same(make, policy, draws, rollouts, slots):
  """Batches that begin in the free slots of the one before are what they are alone, and keep more slots busy."""
  session = make(slots=slots).session(policy.params, KEY, SAMPLES)
  parts = draws[:4], draws[4:8], draws[8:]
  for number, (part, ahead) in enumerate(zip(parts, (*parts[1:], []), strict=True)):
    order = np.arange(4 * number, 4 * number + len(part))
    found = session.run(part, ahead=ahead)
    assert_same(found, take(rollouts, order))
    busy, steps = found.slot_steps
    assert 0 <= busy <= steps
    assert busy or number  # all of a batch may have ended while the one before it ran; then nothing is drawn
    if ahead and busy:
      assert session.tokens_ahead() > 0
  assert session.tokens_ahead() == 0
  assert not session.scheduler.busy
  alone = [make(slots=slots).rollout(policy.params, part, KEY, SAMPLES).slot_steps for part in parts]
  busy, steps = np.sum(alone, axis=0)
  assert busy == rollouts.slot_steps[0] == session.scheduler.clock().slot_steps[0]
  assert session.scheduler.clock().slot_steps[1] < steps


def beginnings_of(rollouts, parts=1):
  """What there is of responses, as a later session takes it."""
  fields = zip(rollouts.tokens, rollouts.logprobs, rollouts.lengths, rollouts.finished, strict=True)
  return [Beginning(tokens[:n], logprobs[:n], bool(finished), parts) for tokens, logprobs, n, finished in fields]


def test_a_response_goes_on_by_other_parameters(make, policy, draws):
  """Its first part stays as it was sampled; the rest, and the reference, are the new policy's, whatever the slots."""
  few, budget = draws[:6], 6
  newer = policy._replace(params=jax.tree.map(lambda x: 1.03 * x, policy.params))
  first = make().sample(policy.params, few, KEY, SAMPLES, SampleOptions(limits=[budget] * len(few) * SAMPLES))
  limits = np.where(first.finished, 0, RESPONSE)

  def go_on(slots, parts=1):
    options = SampleOptions(limits=limits, beginnings=beginnings_of(first, parts))
    return make(slots=slots, continues=True).session(newer.params, KEY, SAMPLES).run(few, options)

  out = go_on(16)
  assert_same(go_on(4), out)
  goes_on = ~first.finished
  assert 8 < goes_on.sum() < goes_on.size  # some have ended
  np.testing.assert_array_equal(out.lengths[~goes_on], first.lengths[~goes_on])
  assert out.finished[~goes_on].all()
  assert (out.finished | (out.lengths == RESPONSE)).all()
  np.testing.assert_array_equal(out.tokens[:, :budget], first.tokens[:, :budget])
  np.testing.assert_array_equal(out.logprobs[:, :budget], first.logprobs[:, :budget])
  texts = [
    [*few[row // SAMPLES][1].ids, *response[:length]]
    for row, (response, length) in enumerate(zip(out.tokens, out.lengths, strict=True))
  ]
  counts = out.lengths - first.lengths
  for row, logps in enumerate(score(newer, texts, counts)):
    np.testing.assert_allclose(out.logprobs[row, first.lengths[row] : out.lengths[row]], logps, atol=1e-4)
  assert not out.scorable[~goes_on].any()  # what had ended is not scored again
  assert [text for text, on in zip(out.texts, goes_on, strict=True) if not on] == [
    text for text, on in zip(first.texts, goes_on, strict=True) if not on
  ]
  rows = np.flatnonzero(out.scorable)
  assert len(rows) >= 4
  spliced = [
    splice_by_hand(policy.tokenizer, few[row // SAMPLES][1], out.tokens[row, : out.lengths[row]].tolist())
    for row in rows
  ]
  expected = score(newer, spliced, [len(few[row // SAMPLES][1].reference) for row in rows])
  for row, logps in zip(rows, expected, strict=True):
    np.testing.assert_allclose(out.reference_logps[row][out.reference_mask[row]], logps, atol=1e-4)
  again = go_on(16, parts=2)  # another part has other random numbers
  assert np.mean(again.tokens[goes_on, budget] == out.tokens[goes_on, budget]) < 0.7


def test_another_batch_than_the_one_that_has_begun(make, policy, draws):
  session = make().session(policy.params, KEY, SAMPLES)
  session.run(draws[:1], ahead=draws[1:2])
  with pytest.raises(ValueError, match="expected the batch that has begun"):
    session.run(draws[2:3])


@pytest.mark.slow
def test_an_int8_cache_is_nearly_the_same(make, policy, draws, rollouts):
  """Eight bits change log-probabilities a little and so, sooner or later, a token; what was sampled is what is told."""
  runtime, engine = Runtime("float32", "xla", int8_cache=True), make(slots=16)
  device = dataclasses.replace(engine.device, model=definition(policy.config, runtime))
  engine = dataclasses.replace(engine, device=device)
  cache = decode.empty_slots(device.model, policy.params, 16, 8).cache
  assert {x.dtype for x in jax.tree.leaves(cache)} == {np.dtype(np.int8), np.dtype(np.float32)}
  found = engine.rollout(policy.params, draws, KEY, SAMPLES)
  # Up to the first token that differs the two saw the same text, and so did the first one's log-probability.
  gaps, agreeing = [], 0
  for row in range(len(found.lengths)):
    length = min(found.lengths[row], rollouts.lengths[row])
    differs = np.flatnonzero(found.tokens[row, :length] != rollouts.tokens[row, :length])
    same = differs[0] if differs.size else length
    gaps += list(np.abs(found.logprobs[row, :same] - rollouts.logprobs[row, :same]))
    agreeing += same == length
  assert agreeing > len(found.lengths) / 2
  assert 1e-6 < np.mean(gaps) < 0.02
  assert max(gaps) < 0.2
  both = (found.tokens == rollouts.tokens).all(axis=1) & found.scorable
  assert both.sum() > 5
  np.testing.assert_allclose(found.reference_logps[both], rollouts.reference_logps[both], atol=0.2)


def test_the_order_of_draws_changes_nothing(make, policy, draws, rollouts):
  order = np.random.default_rng(0).permutation(len(draws))
  found = make().rollout(policy.params, [draws[i] for i in order], KEY, SAMPLES)
  assert_same(found, take(rollouts, order))


def test_a_draws_number_decides_its_samples(make, policy, draws, rollouts):
  """Not its place in the batch, nor its neighbours; and further samples leave the first ones alone."""
  chosen = [2, 0, 3]
  others = [draws[i] for i in chosen] + [(7, draws[0][1])]
  found = make().sample(policy.params, others, KEY, SAMPLES + 2)
  tokens = found.tokens.reshape(4, SAMPLES + 2, -1)
  np.testing.assert_array_equal(tokens[:3, :SAMPLES], rollouts.tokens.reshape(len(SIZES), SAMPLES, -1)[chosen])
  # The same prompt under another number, and everything under another key, comes out otherwise.
  assert np.mean(tokens[3] == tokens[1]) < 0.5
  rekeyed = make().sample(policy.params, draws[:2], jax.random.key(1), SAMPLES)
  assert np.mean(rekeyed.tokens == rollouts.tokens[: 2 * SAMPLES]) < 0.5


def test_a_rollout_is_what_sample_gives(make, policy, draws, rollouts):
  seen = []
  options = SampleOptions(progress=lambda *counts: seen.append(counts))
  samples = make().sample(policy.params, draws, KEY, SAMPLES, options)
  assert_same(samples, rollouts, scored=False)
  total = len(SIZES) * SAMPLES
  assert {whole for _, whole in seen} == {total}
  assert sorted(seen) == seen
  assert seen[-1] == (total, total)
  assert len({done for done, _ in seen}) > 10


def test_every_response_ends_at_its_own_limit(make, policy, draws, rollouts):
  limits = np.random.default_rng(0).integers(1, RESPONSE + 5, len(draws) * SAMPLES)  # some over what a slot can hold
  found = make().sample(policy.params, draws, KEY, SAMPLES, SampleOptions(limits=limits))
  np.testing.assert_array_equal(found.lengths, np.minimum(rollouts.lengths, limits))
  np.testing.assert_array_equal(found.finished, rollouts.finished & (rollouts.lengths <= limits))
  there = np.arange(RESPONSE) < found.lengths[:, None]
  np.testing.assert_array_equal(found.tokens, np.where(there, rollouts.tokens, 0))


def test_slots_that_do_not_fit_are_one_line(make, policy):
  line = r"^config\.rollout\.slots: 1000000 is too much for .*, room for at most \d+ slots; each .* MiB$"
  with pytest.raises(InputError, match=line) as error, setting_names(settings.NAMES):
    make(slots=10**6, max_response_length=10**6).device.compile_programs(policy.params, scoring=True)
  assert int(re.search(r"at most (\d+)", str(error.value))[1]) < 1000


@pytest.mark.parametrize(
  ("names", "says"),
  [
    (settings.NAMES, "config.rollout.prefill_prompts: 4"),
    (serve.SIZES, f"--prompt_limit: {LIMIT}"),
    ({"slots": "--streams", "max_response_length": "--tokens"}, "--streams: 16"),
  ],
)
def test_prompts_that_do_not_fit_are_called_as_the_program_calls_them(make, policy, monkeypatch, names, says):
  def full(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(decode, "prefill", full)
  device = make().device
  slots = re.escape(names["slots"])
  with (
    pytest.raises(InputError, match=rf"^{re.escape(says)} is too much .*; each of {slots} takes [\d.]+ MiB$"),
    setting_names(names),
  ):
    device.compile_programs(policy.params, scoring=True)
  # And where no program has names for them, as the fields of `Shapes`.
  with pytest.raises(SettingError, match=r"^prefill_rows: 4 is too much .*; each of slots takes [\d.]+ MiB$"):
    device.compile_programs(policy.params, scoring=True)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_stop_string_ends_a_response_wherever_its_tokens_lie(make, policy, draws, rollouts, steps):
  """Two letters of the vocabulary in a row are never one token, nor always in one chunk."""
  text = max(rollouts.texts, key=len)
  stops = (text[len(text) // 2 :][:2], "never comes up", text[-3:])
  found = make(steps=steps).sample(policy.params, draws, KEY, SAMPLES, SampleOptions(stop=stops))
  decode = make().decode_text
  cut = 0
  for row, whole in enumerate(rollouts.texts):
    places = [whole.find(stop) for stop in stops if stop in whole]
    tokens = rollouts.tokens[row, : rollouts.lengths[row]]
    if not places:
      assert found.texts[row] == whole
      assert found.lengths[row] == len(tokens)
      continue
    cut += 1
    assert found.texts[row] == whole[: min(places)]
    ends = [n for n in range(1, len(tokens) + 1) if any(stop in decode(tokens[:n]) for stop in stops)]
    assert found.lengths[row] == ends[0]
    assert found.finished[row]
    np.testing.assert_array_equal(found.tokens[row, : ends[0]], tokens[: ends[0]])
    assert not found.tokens[row, ends[0] :].any()
  assert 0 < cut < len(rollouts.texts)


def test_texts_are_the_responses_without_eos(policy, rollouts):
  names = {i: token for token, i in policy.tokenizer.get_vocab().items()}
  for text, tokens, length, finished in zip(
    rollouts.texts, rollouts.tokens, rollouts.lengths, rollouts.finished, strict=True
  ):
    assert text == "".join(names[i] for i in tokens[: length - finished])


@functools.partial(jax.jit, static_argnums=(0, 3))
def trainer_logprobs(model, params, rows, temperature):
  return row_logprobs(model, params, rows, temperature)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_trainer(make, policy, draws, temperature):
  few = draws[:4]
  out = make(sampling=SamplingParams(temperature)).sample(policy.params, few, KEY, SAMPLES)
  tokens = np.zeros((4, LIMIT), np.int32)
  for row, (_, prompt) in enumerate(few):
    tokens[row, : len(prompt.ids)] = prompt.ids
  fields = [x.reshape(4, SAMPLES, *x.shape[1:]) for x in (out.tokens, out.lengths, out.logprobs)]
  lengths = np.array([len(prompt.ids) for _, prompt in few])
  groups = types.Groups(tokens, lengths, *fields, advantages=np.zeros((4, SAMPLES), np.float32))
  rows = packing.pack(groups, "token_mean", rows=4 * SAMPLES, row_length=LIMIT + out.tokens.shape[1])
  found = np.asarray(trainer_logprobs(policy.model, policy.params, rows, temperature))
  assert rows.mask.sum() == out.lengths.sum()
  np.testing.assert_allclose(found[rows.mask], rows.old_logprobs[rows.mask], atol=1e-4)


def test_long_prompts_are_read_whole_where_short_ones_were(make, policy):
  """Slots are read no further than the longest text; a long prompt comes into a slot in which a short text stood."""
  engine = make(prompt_limit=256, slots=4)
  assert engine.device.shapes.kv_lengths == (128, 192, 256, 284)
  lengths = [20, 30, 10, 5, 250, 15, 140, 200]
  draws = [
    (row, make_prompt(policy.tokenizer, letters(length - 2, row), "x", row)) for row, length in enumerate(lengths)
  ]
  out = engine.sample(policy.params, draws, KEY, 2)
  tokens = np.zeros((16, 284), np.int32)
  for row, response in enumerate(out.tokens):
    text = [*draws[row // 2][1].ids, *response[: out.lengths[row]]]
    tokens[row, : len(text)] = text
  logps = np.asarray(jax.nn.log_softmax(forward(policy.model, policy.params, tokens)))
  for row, count in enumerate(out.lengths):
    first = lengths[row // 2]
    places = np.arange(first - 1, first - 1 + count)
    expected = logps[row, places, out.tokens[row, :count]]
    np.testing.assert_allclose(out.logprobs[row, :count], expected, atol=1e-4)


@pytest.mark.parametrize(("temperature", "slots"), [(1.0, 16), (0.7, 4)])
def test_references_are_scored_as_in_one_pass_over_the_spliced_text(make, policy, draws, temperature, slots):
  """With four slots every one of them is used again some twenty times, and by scored rows too."""
  out = make(score_temperature=temperature, slots=slots).rollout(policy.params, draws, KEY, SAMPLES)
  rows, texts = np.flatnonzero(out.scorable), []
  for row in rows:
    prompt = draws[row // SAMPLES][1]
    response = out.tokens[row, : out.lengths[row]].tolist()
    text = splice_by_hand(policy.tokenizer, prompt, response)
    splice = splicing.splice(policy.tokenizer, prompt.ids, response, prompt.reference, "answer_only")
    last = max(np.flatnonzero(splice.answer_mask)) + 1
    assert text == [*prompt.ids, *response[: splice.prefix_length], *splice.suffix_ids[:last]]
    texts.append(text)
  assert len(rows) >= 12
  assert len({row // SAMPLES for row in rows}) >= 8  # of different prompts
  assert len({len(text) for text in texts}) > 10
  expected = score(policy, texts, [len(draws[row // SAMPLES][1].reference) for row in rows], temperature)
  for row, logps in zip(rows, expected, strict=True):
    mask, reference = out.reference_mask[row], draws[row // SAMPLES][1].reference
    assert out.reference_tokens[row][mask].tolist() == ids_of(policy.tokenizer, *reference)
    np.testing.assert_allclose(out.reference_logps[row][mask], logps, atol=1e-4)
  assert (out.reference_logps[~out.reference_mask] == 0).all()


def test_scorable_is_what_the_template_says(policy, rollouts):
  tag = ids_of(policy.tokenizer, "<answer>")[0]
  counts = [np.sum(tokens[:length] == tag) for tokens, length in zip(rollouts.tokens, rollouts.lengths, strict=True)]
  assert {0, 1, 2} <= set(counts)
  np.testing.assert_array_equal(rollouts.scorable | rollouts.overlong, np.array(counts) == 1)
  assert not rollouts.reference_mask[~rollouts.scorable].any()
  assert np.isfinite(rollouts.reference_logps).all()


@pytest.fixture(scope="module")
def play(make, policy):
  """Rollouts of given responses (text, or token by token) to given references, after one prompt each.

  All is as it always is but the choice of the token: that looks up the key's, of which each row and place has its own.
  """
  script = {}

  def look_up(keys):
    return np.array([script.get(np.asarray(key).tobytes(), 0) for key in keys], np.int32)

  def sample_token(logits, keys, sampling):
    tokens = jax.pure_callback(
      look_up, jax.ShapeDtypeStruct(keys.shape, jnp.int32), jax.random.key_data(keys), vmap_method="sequential"
    )
    return tokens, jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]

  def run(responses, references, template="think", slots=4):
    prompts = [make_prompt(policy.tokenizer, letters(1 + row, row), text) for row, text in enumerate(references)]
    keys = row_keys(KEY, np.arange(len(prompts)), np.zeros(len(prompts), int))
    script.clear()
    for key, response in zip(keys, responses, strict=True):
      for place, token in enumerate(ids_of(policy.tokenizer, *response)):
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), place)
        script[np.asarray(jax.random.key_data(folded)).tobytes()] = token
    engine = make(template, suffix_length=10, slots=slots)
    # EOS twice over: settings that no other test has, for what was traced with another `sample_token` is kept.
    settings = dataclasses.replace(engine.device.settings, eos_ids=(policy.tokenizer.eos_token_id,) * 2)
    engine = dataclasses.replace(engine, device=dataclasses.replace(engine.device, settings=settings))
    options = SampleOptions(limits=[len(response) for response in responses])
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(decode, "sample_token", sample_token)
      out = engine.rollout(policy.params, list(enumerate(prompts)), KEY, 1, options)
    for row, response in enumerate(responses):
      assert out.tokens[row, : out.lengths[row]].tolist() == ids_of(policy.tokenizer, *response)
    return prompts, out

  return run


THOUGHT = ("<think>", *"1+1=2", "</think>")


def test_responses_of_every_kind(play, policy):
  """(response, reference, what happens): scored, not scorable, or too long for the room of ten."""
  cases = [
    ((*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>"), "2", "scored"),
    ((*THOUGHT, "<answer>", *"3", "</answer>", "<end>"), "two", "scored"),  # no space of its own: one is put in
    ((*THOUGHT, "<answer>", *"   3", "</answer>", "<end>"), "2", "scored"),  # three of its own: they stay
    ((*THOUGHT, *" so", "<answer>"), "2", "scored"),  # cut before the answer
    ((*THOUGHT, "<answer>", "</answer>", "</answer>", "<end>"), "2", "scored"),  # what follows does not matter
    ((*"oh", *THOUGHT, "<answer>", *" 3", "<end>"), "2", "scored"),
    ((*THOUGHT, *"<answer>", *" 3 ", "</answer>", "<end>"), "2", "scored"),  # the tag letter by letter
    ((*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>"), "12345678", "scored"),  # <answer>, space and eight: ten
    ((*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>"), "123456789", "overlong"),
    ((*THOUGHT, "<answer>", *"    3", "</answer>", "<end>"), "123456", "overlong"),  # for its own whitespace
    ((*THOUGHT, "<answer>", *" " * 20), "2", "overlong"),
    (("<end>",), "2", "unscorable"),  # EOS as the first token
    (("<answer>", *" 2 ", "</answer>", "<end>"), "2", "unscorable"),
    ((*THOUGHT, *" 2", "<end>"), "2", "unscorable"),
    ((*THOUGHT, *THOUGHT, "<answer>", *" 2"), "2", "unscorable"),
    ((*THOUGHT, "<answer>", "<answer>", *" 2"), "2", "unscorable"),
    (("<answer>", *" 2", "</answer>", *THOUGHT, "<end>"), "2", "unscorable"),
  ]
  responses, references, outcomes = zip(*cases, strict=True)
  prompts, out = play(responses, references)
  found = np.select([out.scorable, out.overlong], ["scored", "overlong"], "unscorable")
  assert found.tolist() == list(outcomes)
  assert not np.any(out.scorable & out.overlong)
  assert np.isfinite(out.reference_logps).all()
  np.testing.assert_array_equal(out.reference_mask.any(axis=1), out.scorable)

  texts = []
  scored = [row for row, outcome in enumerate(outcomes) if outcome == "scored"]
  for row in scored:
    response = ids_of(policy.tokenizer, *responses[row])
    if row == 6:  # `<answer` is kept as it was written, `>` and the rest are tokenised anew
      end = len(THOUGHT) + len("<answer>")
      texts.append([*prompts[row].ids, *response[:end], *ids_of(policy.tokenizer, " ", "2")])
    else:
      texts.append(splice_by_hand(policy.tokenizer, prompts[row], response))
  expected = score(policy, texts, [len(references[row]) for row in scored])
  for row, logps in zip(scored, expected, strict=True):
    np.testing.assert_allclose(out.reference_logps[row][out.reference_mask[row]], logps, atol=1e-4)


def test_an_overlong_reference_harms_no_other_row(play):
  response = (*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>")
  _, among = play([response] * 5, ["2", "123456789", "two", "1" * 60, "4"])
  assert among.overlong.tolist() == [False, True, False, True, False]
  _, alone = play([response] * 5, ["2", "1", "two", "1", "4"])
  for row in (0, 2, 4):
    np.testing.assert_allclose(among.reference_logps[row], alone.reference_logps[row], atol=1e-5)
    np.testing.assert_array_equal(among.reference_mask[row], alone.reference_mask[row])


def test_rows_wait_to_be_scored_while_their_neighbours_slots_are_used_again(play, policy):
  """Scored responses among ones that are not and leave their slots at once, many of them at a time."""
  scored, short = (*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>"), ("a", "<end>")
  responses = [scored if row % 3 else short for row in range(30)]
  references = [str(row) for row in range(30)]
  prompts, out = play(responses, references, slots=6)
  rows = np.flatnonzero(out.scorable)
  assert rows.tolist() == [row for row in range(30) if row % 3]
  texts = [splice_by_hand(policy.tokenizer, prompts[row], ids_of(policy.tokenizer, *scored)) for row in rows]
  for row, logps in zip(rows, score(policy, texts, [len(references[row]) for row in rows]), strict=True):
    np.testing.assert_allclose(out.reference_logps[row][out.reference_mask[row]], logps, atol=1e-4)


@pytest.fixture(scope="module")
def several(draws):
  """The prompts with one, two and three references by turns, and each reference by itself; "x" where there is none."""
  others = [(letters(4, 90), letters(30, 91)), (letters(70, 92), letters(1, 93)), (), (letters(5, 94),)]
  several = [(n, dataclasses.replace(prompt, alternatives=others[row % 4])) for row, (n, prompt) in enumerate(draws)]

  def alone(number):
    return [
      (n, dataclasses.replace(prompt, reference=(*prompt.references, "x", "x")[number], alternatives=()))
      for n, prompt in several
    ]

  return several, [alone(number) for number in range(3)]


@pytest.mark.parametrize("slots", [4, 16])
def test_several_references_are_scored_as_each_of_them_alone(make, policy, several, slots):
  """From one rollout; a slot that went to the next response before its last reference was scored would show."""
  draws, alone = several
  out = dataclasses.replace(make(slots=slots), max_references=3).rollout(policy.params, draws, KEY, SAMPLES)
  assert out.reference_logps.shape == out.reference_tokens.shape == (len(draws) * SAMPLES, 3, SUFFIX)
  scorable, overlong = np.zeros((2, len(out.texts)), bool)
  for number in range(3):
    there = np.repeat([number < len(prompt.references) for _, prompt in draws], SAMPLES)
    expected = make(slots=slots).rollout(policy.params, alone[number], KEY, SAMPLES)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    for name in ("reference_tokens", "reference_mask"):
      np.testing.assert_array_equal(getattr(out, name)[there, number], getattr(expected, name)[there], err_msg=name)
    np.testing.assert_allclose(out.reference_logps[there, number], expected.reference_logps[there], atol=1e-5)
    scored = there & expected.scorable
    assert scored.sum() > 5
    np.testing.assert_array_equal(out.reference_starts[scored], expected.reference_starts[scored])
    assert not out.reference_mask[~there, number].any()
    scorable |= scored
    overlong |= there & expected.overlong
  np.testing.assert_array_equal(out.scorable, scorable)
  np.testing.assert_array_equal(out.overlong, overlong)
  assert (scorable & overlong).any()  # one reference fits where another does not


def test_baselines_of_several_references_are_those_of_each_alone(make, policy, several):
  draws, alone = several
  found = dataclasses.replace(make(), max_references=3).baseline(policy.params, [prompt for _, prompt in draws])
  assert found.shape == (len(draws), 3, SUFFIX)
  for number in range(3):
    there = [number < len(prompt.references) for _, prompt in draws]
    expected = make().baseline(policy.params, [prompt for _, prompt in alone[number]])
    np.testing.assert_allclose(found[there, number], expected[there], atol=1e-5)  # NaN where the other is NaN
    assert np.isnan(found[np.logical_not(there), number]).all()


@pytest.mark.parametrize(("prefix", "temperature"), [("bare", 1.0), ("tagged", 0.7)])
def test_baselines_are_the_references_straight_after_the_prompt(make, policy, draws, prefix, temperature):
  prompts = [prompt for _, prompt in draws]
  logps = make(score_temperature=temperature, prefix=prefix).baseline(policy.params, prompts)
  assert logps.shape == (len(prompts), SUFFIX)
  assert logps.dtype == np.float32
  before = {"bare": [" "], "tagged": ["<answer>", " "]}[prefix]
  texts = [[*prompt.ids, *ids_of(policy.tokenizer, *before, *prompt.reference)] for prompt in prompts]
  expected = score(policy, texts, [len(prompt.reference) for prompt in prompts], temperature)
  for row, prompt in enumerate(prompts):
    count = len(prompt.reference)
    assert np.isnan(logps[row, count:]).all()
    np.testing.assert_allclose(logps[row, :count], expected[row], atol=1e-4)


def test_a_baseline_that_cannot_be_had_harms_no_other(make, policy, draws):
  good = [prompt for _, prompt in draws[:3]]
  long = dataclasses.replace(good[0], reference="a" * (SUFFIX + 1))
  nothing = dataclasses.replace(good[0], ids=np.zeros(0, np.int32))
  beyond = dataclasses.replace(good[0], ids=np.ones(LIMIT + 1, np.int32))
  logps = make().baseline(policy.params, [good[0], long, good[1], nothing, beyond, good[2]])
  expected = make().baseline(policy.params, good)
  np.testing.assert_allclose(logps[[0, 2, 5]], expected, atol=1e-5)  # NaN where the other is NaN
  assert np.isnan(logps[[1, 3, 4]]).all()


def test_prompts_that_cannot_be_read_are_refused_one_by_one(make, policy, draws, rollouts):
  """Empty ones and ones over the limit, first, among the others and last."""
  nothing = dataclasses.replace(draws[0][1], ids=np.zeros(0, np.int32))
  beyond = dataclasses.replace(draws[1][1], ids=np.ones(LIMIT + 1, np.int32))
  mixed = [(0, nothing), *draws[:3], (1, beyond), (2, nothing), *draws[3:], (3, beyond)]
  bad = [0, 4, 5, len(mixed) - 1]
  found = make().rollout(policy.params, mixed, KEY, SAMPLES)
  refused = take(found, bad)
  assert refused.refused.all()
  assert not any(refused.texts)
  for name in ("tokens", "lengths", "logprobs", "finished", "scorable", "overlong", "reference_mask"):
    assert not getattr(refused, name).any(), name
  assert_same(take(found, [row for row in range(len(mixed)) if row not in bad]), rollouts)
  # And where no other prompt is.
  alone = make().rollout(policy.params, [mixed[row] for row in bad], KEY, 2)
  assert alone.refused.tolist() == [True] * 8
  assert not alone.lengths.any()


def test_no_draws_are_no_rollouts(make, policy):
  found = make().rollout(policy.params, [], KEY, SAMPLES)
  assert found.tokens.shape == (0, RESPONSE)
  assert found.texts == []
  assert found.refused.shape == found.scorable.shape == (0,)


@pytest.mark.parametrize("slots", [4, 16])
def test_every_prompt_is_read_once_for_all_its_samples(make, policy, draws, monkeypatch, slots):
  calls, inner = [], decode.prefill

  def prefill(model, params, tokens, lengths):
    calls.append((np.array(tokens), np.array(lengths)))
    return inner(model, params, tokens, lengths)

  monkeypatch.setattr(decode, "prefill", prefill)
  make(slots=slots).rollout(policy.params, draws, KEY, SAMPLES)
  read = [
    tuple(row[:length])
    for tokens, lengths in calls
    for row, length in zip(tokens, lengths, strict=True)
    if length > 1  # the rows of length 1 fill a call up
  ]
  assert sorted(read) == sorted(tuple(prompt.ids) for _, prompt in draws)
  # In rows, padding included: five calls of four where a call for every four samples would have been 24.
  assert len(calls) <= 5
  widths = [tokens.shape[1] for tokens, _ in calls]
  assert set(widths) <= set(SHAPES.prompt_buckets)
  assert {tokens.shape[0] for tokens, _ in calls} == {SHAPES.prefill_rows}


@pytest.mark.parametrize("stop", [(), ("ab", "c")])
def test_a_round_copies_what_was_drawn_in_it(make, policy, draws, monkeypatch, stop):
  """Once, and nothing that the slots hold, stop strings or not."""
  engine, copied, inner = make(), [], jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: copied.append(sum(y.size for y in jax.tree.leaves(x))) or inner(x))
  scheduler = engine.scheduler(policy.params, KEY)
  rounds = 0
  for draw, prompt in draws:
    scheduler.add(prompt, draw, [RESPONSE] * SAMPLES, SamplingParams(), stop)
  while scheduler.busy:
    scheduler.round()
    rounds += 1
  assert len(copied) == rounds > 4
  shapes = engine.device.shapes
  assert max(copied) == shapes.slots * (2 * shapes.steps + 3)  # tokens and log-probabilities; counts and two flags


def test_nothing_compiles_after_the_first_compilation(make, policy):
  """Prompts and references of all lengths, responses that end by EOS and ones that are cut, long and short."""
  limit, response = 64, 200
  # 270 tokens of text: four lengths to which slots are read.
  engine = make(prompt_limit=limit, max_response_length=response, slots=12, steps=6, prefill_rows=3, score_rows=5)
  shapes = engine.device.shapes
  assert len(shapes.kv_lengths) == 4
  assert (len(shapes.prompt_buckets), len(shapes.suffix_buckets)) == (2, 3)
  pairs = [(length, 1 + 37 * length % SUFFIX) for length in range(1, limit + 1)]
  prompts = [
    Prompt(
      ids=np.array(ids_of(policy.tokenizer, *letters(length, length)), np.int32),
      reference=letters(reference, 1),
      question="",
      source="test",
      row=row,
    )
    for row, (length, reference) in enumerate(pairs)
  ]
  assert {len(prompt.reference) for prompt in prompts} == set(range(1, SUFFIX + 1))
  draws, keys = list(enumerate(prompts)), list(jax.random.split(KEY, 2))
  engine.device.compile_programs(policy.params, scoring=True)
  before = metrics.compilations()
  out = [engine.rollout(policy.params, draws[first:] + draws[:first], key, 1) for first, key in enumerate(keys)]
  engine.sample(policy.params, draws[:7], KEY, 2, SampleOptions(stop=(out[0].texts[0][:2],)))
  engine.baseline(policy.params, prompts)
  assert metrics.compilations() == before

  def everywhere(name):
    return np.concatenate([getattr(part, name) for part in out])

  assert (everywhere("lengths")[~everywhere("finished")] == response).all()
  assert (~everywhere("finished")).any()
  assert everywhere("finished").any()
  sizes = everywhere("reference_mask").sum(axis=1)
  assert (sizes > 16).any()
  assert ((sizes > 0) & (sizes < 14)).any()


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["", "ragged"])
def test_a_mesh_changes_nothing_and_compiles_nothing_twice(reading):
  """Eight devices, two ways to split rows among them, against one; texts read by plain XLA, or by a kernel."""
  root = Path(__file__).parents[2]
  path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
  done = subprocess.run(
    [sys.executable, "-m", "tests.sampling.engine_on_mesh", *filter(None, [reading])],
    cwd=root,
    env=os.environ
    | {
      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": path,
    },
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for result in json.loads(done.stdout.splitlines()[-1]):
    assert all(result["same"].values()), result["same"]
    assert max(result["off"]) < 1e-5
    assert result["scored"] > 10
    assert result["compiled"] == 0


@pytest.mark.parametrize(("limit", "response", "steps"), [(8, 12, 3), (64, 200, 1), (100, 157, 4), (1024, 3072, 16)])
def test_slots_are_never_read_beyond_their_room(limit, response, steps):
  shapes = dataclasses.replace(SHAPES, prompt_limit=limit, max_response_length=response, steps=steps)
  assert sorted(shapes.kv_lengths) == list(shapes.kv_lengths)
  assert limit + response <= shapes.kv_lengths[-1] <= shapes.capacity


@pytest.mark.parametrize(
  ("limit", "smallest", "ratio"), [(1, 32, 2), (64, 32, 2), (70, 32, 2), (2048, 32, 2), (300, 16, 4)]
)
def test_buckets_are_few_and_reach_to_the_limit(limit, smallest, ratio):
  found = buckets(limit, smallest, ratio)
  assert found[-1] == limit
  assert all(one < other <= ratio * one for one, other in itertools.pairwise(found))
  assert all(length >= min(smallest, limit) for length in found)
  assert found[0] < ratio * smallest or len(found) == 1


def test_every_draw_and_every_sample_has_a_key_of_its_own():
  draws = np.repeat(np.array([0, 1, 2, 1000, 2**31, 2**32 - 1], np.uint32), 16)
  samples, data = np.tile(np.arange(16), 6), set()
  for seed in (0, 1):
    keys = np.asarray(row_keys(jax.random.key(seed), draws, samples))
    assert keys.shape == (96, 2)
    data |= set(map(tuple, keys))
    one = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draws[40]), 8)
    np.testing.assert_array_equal(keys[40], jax.random.key_data(one))
  assert len(data) == 2 * 96
