"""Rollouts: what is sampled, and the reference's log-probabilities against one forward pass over the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax import splicing
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.decode import Samples, SamplingSettings, prefill
from rlpr_jax.sampling.engine import Engine, pad_prompts, row_keys

LIMIT, RESPONSE, ROOM = 14, 28, 10  # tokens of a prompt, of a response, of a spliced reference
SAMPLES = 8


def ids_of(tokenizer, *tokens):
  """One id a token: characters and tags, as the built-in vocabulary has them."""
  ids = tokenizer.convert_tokens_to_ids(list(tokens))
  assert tokenizer.unk_token_id not in ids or "?" in tokens
  return ids


def make_prompt(tokenizer, question, reference, row):
  ids = ids_of(tokenizer, "<q>", *question, "<a>")
  return Prompt(np.array(ids, np.int32), reference, question, "test", row)


@pytest.fixture(scope="module")
def engine(policy):
  """Of `answer_only`, where a random policy often happens to write `<answer>` exactly once."""
  settings = SamplingSettings(RESPONSE, ROOM, 1.0, (policy.tokenizer.eos_token_id,))
  return Engine(
    policy.model, policy.tokenizer, settings, LIMIT, "answer_only", score_temperature=1.0, baseline_prefix="bare"
  )


@pytest.fixture(scope="module")
def prompts(policy):
  questions = [("7+5", "12"), ("wed+23", "fri"), ("e in sleeve", "three"), ("3*4+5 coins", "1g 7s")]
  return [make_prompt(policy.tokenizer, *pair, row) for row, pair in enumerate(questions)]


@pytest.fixture(scope="module")
def rollouts(engine, policy, prompts):
  return engine.rollout(policy.params, list(enumerate(prompts, 100)), jax.random.key(0), SAMPLES)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
  decoder = nnx.merge(model, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


def score(policy, texts, answers, temperature=1.0):
  """Float64 log-probabilities of the last `answers[i]` tokens of each text, from one pass over the whole of it."""
  tokens = np.zeros((32, LIMIT + RESPONSE + ROOM), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = text
  logits = np.asarray(forward(policy.model, policy.params, tokens), np.float64) / temperature
  logps = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  return [
    [logps[row, place - 1, text[place]] for place in range(len(text) - count, len(text))]
    for row, (text, count) in enumerate(zip(texts, answers, strict=True))
  ]


def splice_by_hand(tokenizer, prompt, response):
  """Prompt, response up to `<answer>` and the spaces after it (or one), and the reference, a token a character."""
  tag, space = ids_of(tokenizer, "<answer>", " ")
  end = response.index(tag) + 1
  spaces = 0
  while end + spaces < len(response) and response[end + spaces] == space:
    spaces += 1
  return [*prompt.ids, *response[:end], *[space] * max(spaces, 1), *ids_of(tokenizer, *prompt.reference)]


def test_a_rollout_is_what_sample_gives(engine, policy, prompts, rollouts):
  samples, _ = engine.sample(policy.params, list(enumerate(prompts, 100)), jax.random.key(0), SAMPLES)
  for name, field in samples._asdict().items():
    np.testing.assert_array_equal(getattr(rollouts, name), field)
  shapes = {name: getattr(rollouts, name).shape for name in ("tokens", "lengths", "reference_tokens", "reference_mask")}
  assert shapes == {
    "tokens": (32, RESPONSE), "lengths": (32,), "reference_tokens": (32, ROOM), "reference_mask": (32, ROOM),
  }  # fmt: skip
  assert rollouts.reference_logps.dtype == np.float32


def test_texts_are_the_responses_without_eos(policy, rollouts):
  names = {i: token for token, i in policy.tokenizer.get_vocab().items()}
  for text, tokens, length, finished in zip(
    rollouts.texts, rollouts.tokens, rollouts.lengths, rollouts.finished, strict=True
  ):
    assert text == "".join(names[i] for i in tokens[: length - finished])
  assert 0 < rollouts.finished.sum() < 32


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_references_are_scored_as_in_one_pass_over_the_spliced_text(engine, policy, prompts, temperature):
  engine = dataclasses.replace(engine, score_temperature=temperature)
  out = engine.rollout(policy.params, list(enumerate(prompts, 100)), jax.random.key(0), SAMPLES)
  rows, texts = [], []
  for row in np.flatnonzero(out.scorable):
    prompt = prompts[row // SAMPLES]
    response = out.tokens[row, : out.lengths[row]].tolist()
    text = splice_by_hand(policy.tokenizer, prompt, response)
    splice = splicing.splice(policy.tokenizer, prompt.ids, response, prompt.reference, "answer_only")
    last = max(np.flatnonzero(splice.answer_mask)) + 1
    assert text == [*prompt.ids, *response[: splice.prefix_length], *splice.suffix_ids[:last]]
    rows.append(row)
    texts.append(text)
  assert len(rows) >= 6
  assert len({row // SAMPLES for row in rows}) >= 3  # of different prompts
  assert len({len(text) for text in texts}) > 4
  expected = score(policy, texts, [len(prompts[row // SAMPLES].reference) for row in rows], temperature)
  for row, logps in zip(rows, expected, strict=True):
    mask, reference = out.reference_mask[row], prompts[row // SAMPLES].reference
    assert out.reference_tokens[row][mask].tolist() == ids_of(policy.tokenizer, *reference)
    np.testing.assert_allclose(out.reference_logps[row][mask], logps, atol=1e-4)


def test_scorable_is_what_the_template_says(engine, policy, rollouts):
  tag = ids_of(policy.tokenizer, "<answer>")[0]
  counts = [np.sum(tokens[:length] == tag) for tokens, length in zip(rollouts.tokens, rollouts.lengths, strict=True)]
  assert {0, 1, 2} <= set(counts)
  np.testing.assert_array_equal(rollouts.scorable | rollouts.overlong, np.array(counts) == 1)
  assert not rollouts.reference_mask[~rollouts.scorable].any()
  assert np.isfinite(rollouts.reference_logps).all()


class Scripted(Engine):
  """Says what it is told to, in the place of what the policy would sample."""

  def sample(self, params, draws, key, samples):
    del key
    width = LIMIT + RESPONSE
    tokens, ends = pad_prompts([prompt for _, prompt in draws for _ in range(samples)], width)
    out = Samples(*(np.zeros(shape, kind) for shape, kind in (
      ((32, RESPONSE), np.int32), (32, np.int32), ((32, RESPONSE), np.float32), (32, bool)
    )))  # fmt: skip
    for row, response in enumerate(self.script):
      out.tokens[row, : len(response)] = response
      out.lengths[row], out.finished[row] = len(response), response[-1] == self.tokenizer.eos_token_id
      tokens[row, ends[row] : ends[row] + len(response)] = response
    _, cache = prefill(self.model, params, tokens, ends, capacity=self._capacity)
    return out, cache


@pytest.fixture(scope="module")
def play(engine, policy):
  """Rollouts of given responses (text, or token by token) to given references, after one prompt."""

  def run(responses, references, template="think"):
    script = [ids_of(policy.tokenizer, *response) for response in responses]
    references = [*references, *[references[-1]] * (32 - len(references))]
    prompts = [make_prompt(policy.tokenizer, "1+1", reference, 0) for reference in references]
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    scripted = Scripted(**settings | {"template": template})
    object.__setattr__(scripted, "script", [*script, *[script[-1]] * (32 - len(script))])
    return prompts, scripted.rollout(policy.params, list(enumerate(prompts)), jax.random.key(0), 1)

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
  found = np.select([out.scorable, out.overlong], ["scored", "overlong"], "unscorable")[: len(cases)]
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


def test_other_rows_change_no_score(play):
  response = (*THOUGHT, "<answer>", *" 3 ", "</answer>", "<end>")
  _, among = play([("<end>",), response, (*THOUGHT, "<answer>", *" " * 20), response], ["2", "2", "2", "two"])
  _, alone = play([response], ["2"])
  np.testing.assert_allclose(among.reference_logps[1], alone.reference_logps[0], atol=1e-5)


@pytest.mark.parametrize("prefix", ["bare", "tagged"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_baselines_are_the_references_straight_after_the_prompt(engine, policy, prompts, prefix, temperature):
  engine = dataclasses.replace(engine, baseline_prefix=prefix, score_temperature=temperature)
  logps, mask = engine.baseline(policy.params, prompts)
  assert logps.shape == mask.shape == (4, ROOM)
  before = {"bare": [" "], "tagged": ["<answer>", " "]}[prefix]
  texts = [[*prompt.ids, *ids_of(policy.tokenizer, *before, *prompt.reference)] for prompt in prompts]
  expected = score(policy, texts, [len(prompt.reference) for prompt in prompts], temperature)
  for row in range(4):
    assert mask[row].sum() == len(prompts[row].reference)
    np.testing.assert_allclose(logps[row][mask[row]], expected[row], atol=1e-4)


def test_a_draws_number_decides_its_samples(engine, policy, prompts, rollouts):
  """Not its place in the batch, nor its neighbours, nor the padding; and further samples leave the first ones alone."""
  order = [2, 0, 3]
  draws = [(100 + i, prompts[i]) for i in order] + [(7, prompts[0])]
  wider = dataclasses.replace(engine, prompt_limit=LIMIT + 3)
  for other, samples in ((engine, SAMPLES), (wider, SAMPLES), (engine, SAMPLES + 2)):
    found = jax.device_get(other.sample(policy.params, draws, jax.random.key(0), samples)[0])
    for place, prompt in enumerate(order):
      ours = found.tokens.reshape(4, samples, -1)[place, :SAMPLES]
      np.testing.assert_array_equal(ours, rollouts.tokens.reshape(4, SAMPLES, -1)[prompt])
  # The same prompt under another number, and everything under another key, comes out otherwise.
  assert np.mean(found.tokens.reshape(4, SAMPLES + 2, -1)[3, :SAMPLES] == found.tokens[SAMPLES + 2 :][:SAMPLES]) < 0.5
  rekeyed = jax.device_get(engine.sample(policy.params, draws, jax.random.key(1), SAMPLES)[0])
  assert np.mean(rekeyed.tokens[:SAMPLES] == rollouts.tokens[2 * SAMPLES : 3 * SAMPLES]) < 0.5


def test_every_draw_and_every_sample_has_a_key_of_its_own():
  draws = np.array([0, 1, 2, 1000, 2**31, 2**32 - 1], np.uint32)
  data = {}
  for seed in (0, 1):
    keys = row_keys(jax.random.key(seed), draws, 16)
    assert keys.shape == (96,)
    for i, key in enumerate(np.asarray(jax.random.key_data(keys))):
      data[seed, i] = tuple(key)
  assert len(set(data.values())) == 2 * 96
  again = row_keys(jax.random.key(0), draws[::-1].copy(), 16).reshape(6, 16)[::-1].reshape(-1)
  np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(row_keys(jax.random.key(0), draws, 16)))


def test_samples_of_one_prompt_differ(rollouts):
  assert len(np.unique(rollouts.tokens, axis=0)) == 32


def test_nothing_compiles_twice(engine, policy, prompts, rollouts):
  """Other prompts, draws and keys, and other lengths of everything, run through what is compiled."""
  del rollouts
  functions = (decode.prefill, decode.decode, decode.score_suffix)
  before = [function._cache_size() for function in functions]
  others = [make_prompt(policy.tokenizer, "2+2", "four", 0), *prompts[:3]]
  engine.rollout(policy.params, list(enumerate(others, 5)), jax.random.key(9), SAMPLES)
  assert [function._cache_size() for function in functions] == before
