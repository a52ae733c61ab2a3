"""Penalties, biases, endings and forms of a server's responses, against the formulas on a whole forward pass."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax.sampling import decode
from rlpr_jax.sampling.adjustments import Adjustments, everything
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Extras, Scheduler
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.types import Prompt

EOS, SIZE, LIMIT = 1, 64, 20  # of the built-in vocabulary; tokens of a response
PROMPT = np.array([4, 30, 31, 30, 5], np.int32)
SHAPES = Shapes(
  slots=4,
  prompt_limit=12,
  max_response_length=LIMIT,
  suffix_length=1,
  steps=4,
  prefill_rows=2,
  score_rows=4,
  insert_rows=2,
)


def run(policy, asked, sampling=SamplingParams(), seed=0, limit=LIMIT, stop=(), **extras):
  """A response to PROMPT for each of the adjustments, all in the same slots."""
  device = Device(policy.model, DecodeSettings(SHAPES.steps, (EOS,)), SHAPES)
  scheduler = Scheduler(device, policy.params, jax.random.key(0), policy.tokenizer.decode)
  prompt = Prompt(ids=PROMPT)
  requests = [
    scheduler.add(prompt, seed, [limit], sampling, stop, Extras(adjustments=each, **extras))[0] for each in asked
  ]
  while scheduler.busy:
    scheduler.round()
  assert scheduler.slots.adjustments is None or any(asked)
  return requests


@functools.cache
def forward(model):
  return jax.jit(lambda params, tokens: (d := nnx.merge(model, params)).logits(d.prefill(tokens)[0])[0])


def logits_of(policy, response):
  """float64[T, V]: what the model says before each token of the response."""
  text = np.zeros((1, SHAPES.longest), np.int32)
  text[0, : PROMPT.size + len(response)] = [*PROMPT, *response]
  logits = np.asarray(forward(policy.model)(policy.params, text), np.float64)
  return logits[PROMPT.size - 1 : PROMPT.size - 1 + len(response)]


def log_softmax(x):
  return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def by_hand(logits, asked, response):
  """The formulas of vLLM's SamplingParams, token by token."""
  x = logits.copy()
  for token, value in asked.bias:
    x[token] += value
  if asked.only:
    x[[token for token in range(SIZE) if token not in asked.only]] = -np.inf
  if len(response) < asked.min_tokens:
    x[[EOS, *asked.stop_ids]] = -np.inf
  for token in {*PROMPT.tolist(), *response}:
    x[token] = x[token] / asked.repetition_penalty if x[token] > 0 else x[token] * asked.repetition_penalty
  for token, count in collections.Counter(response).items():
    x[token] -= asked.frequency_penalty * count + asked.presence_penalty
  return x


ASKED = (
  Adjustments(presence_penalty=1.5, top=3),
  Adjustments(frequency_penalty=0.7),
  Adjustments(frequency_penalty=-1.0, presence_penalty=-0.5),
  Adjustments(repetition_penalty=1.8),
  Adjustments(repetition_penalty=0.5, bias=((EOS, -100.0),)),
  Adjustments(bias=((7, 2.0), (9, -100.0), (12, 0.5)), top=5),
  Adjustments(only=(10, 11, 12, EOS), raw=True, top=20),
  Adjustments(min_tokens=6, bias=((EOS, 50.0),)),
  Adjustments(min_tokens=5, bias=((20, 50.0),), stop_ids=(20,)),
  Adjustments(ignore_eos=True, bias=((EOS, 6.0),), frequency_penalty=0.3),
)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_and_what_is_told_of_them_are_by_the_formulas(policy, temperature):
  for asked, request in zip(ASKED, run(policy, ASKED, SamplingParams(temperature)), strict=True):
    response = request.tokens.tolist()
    for place, (token, logits) in enumerate(zip(response, logits_of(policy, response), strict=True)):
      adjusted = by_hand(logits, asked, response[:place])
      assert np.isfinite(adjusted[token])
      assert temperature or adjusted[token] >= adjusted.max() - 1e-4
      told = log_softmax(logits if asked.raw else adjusted / (temperature or 1))
      np.testing.assert_allclose(request.logprobs[place], told[token], atol=1e-4)
      if asked.top:
        ids, values = request.top.ids[place], request.top.logprobs[place]
        np.testing.assert_allclose(values[: asked.top], np.sort(told)[::-1][: asked.top], atol=1e-4)
        np.testing.assert_allclose(told[ids[: asked.top]], values[: asked.top], atol=1e-4)


def test_what_ends_a_response(policy):
  least, stopped, endless = (run(policy, [asked], SamplingParams(0.0))[0] for asked in ASKED[-3:])
  assert least.tokens.tolist().index(EOS) == 6  # as soon as it may
  assert least.finished
  assert stopped.tokens.tolist().index(20) == 5
  assert stopped.finished
  assert stopped.text == policy.tokenizer.decode(stopped.tokens[:-1])
  assert (len(endless.tokens), endless.finished) == (LIMIT, False)
  assert endless.tokens.tolist().count(EOS) > 1


def test_neighbours_that_ask_for_nothing_stay_as_they_are(policy):
  """Beside those that do, and after them, when the programs are the plain ones again."""
  (alone,) = run(policy, [None])
  mixed = run(policy, [None, ASKED[0], None, ASKED[3], None, None])
  for request in mixed:
    if request.group.extras.adjustments is None:
      np.testing.assert_array_equal(request.tokens, alone.tokens)
      np.testing.assert_allclose(request.logprobs, alone.logprobs, atol=1e-5)
  (neutral,) = run(policy, [Adjustments()])
  np.testing.assert_array_equal(neutral.tokens, alone.tokens)


def test_strings_end_nothing_before_the_least_tokens(policy):
  digits = tuple(policy.tokenizer.convert_tokens_to_ids(list("123")))
  (plain,) = run(policy, [Adjustments(only=digits)])
  first, second = [i for i, letter in enumerate(plain.text) if letter == plain.text[0]][:2]
  for least, end in ((0, first), (1, second)):
    (request,) = run(policy, [Adjustments(only=digits, min_tokens=least)], stop=[plain.text[0]])
    assert request.tokens.tolist() == plain.tokens[: end + 1].tolist()
    assert (request.text, request.finished) == (plain.text[:end], True)


def test_hidden_tokens_are_not_shown(policy):
  asked = Adjustments(ignore_eos=True, bias=((EOS, 6.0),), frequency_penalty=0.3)
  shown, hidden = (run(policy, [asked], hidden=frozenset(ids))[0] for ids in ((), (EOS,)))
  np.testing.assert_array_equal(shown.tokens, hidden.tokens)
  assert policy.tokenizer.eos_token in shown.text
  assert hidden.text == shown.text.replace(policy.tokenizer.eos_token, "")


class Digits:
  """Some tokens of one kind, then the end: a form of which the test knows all that it may be."""

  def __init__(self, ids, count):
    self.ids, self.count, self.taken = ids, count, []

  def allowed(self):
    bits = np.zeros_like(everything(1, SIZE)[0])
    for token in self.ids if len(self.taken) < self.count else [EOS]:
      bits[token // 32] |= np.uint32(1 << token % 32)
    return bits

  def take(self, token):
    self.taken.append(token)


def test_forms_are_followed_token_by_token(policy):
  (alone,) = run(policy, [None])
  forms = [[(10, 40, 63), 5], [(33,), 3]]
  asked = [Adjustments(form=functools.partial(Digits, *form)) for form in forms]
  found = run(policy, [asked[0], None, asked[1], None])
  for request, (ids, count) in zip(found[::2], forms, strict=True):
    *digits, end = request.tokens.tolist()
    assert (len(digits), end) == (count, EOS)
    assert set(digits) <= set(ids)
    assert request.form.taken == digits[: len(request.form.taken)]
  for request in found[1::2]:
    np.testing.assert_array_equal(request.tokens, alone.tokens)


@pytest.mark.parametrize("top", [0, 1, 7])
def test_prompts_are_scored_as_in_a_whole_pass(policy, top):
  (request,) = run(policy, [None], limit=0, prompt_top=top)
  assert request.tokens.size == 0
  scores = request.group.scores
  text = np.zeros((1, SHAPES.longest), np.int32)
  text[0, : PROMPT.size] = PROMPT
  logits = np.asarray(forward(policy.model)(policy.params, text), np.float64)
  told = np.array([log_softmax(x) for x in logits[: PROMPT.size - 1]])
  places = np.arange(PROMPT.size - 1)
  np.testing.assert_allclose(scores.logprobs, told[places, PROMPT[1:]], atol=1e-4)
  ranks = [1 + int(np.sum(row > row[token])) for row, token in zip(told, PROMPT[1:], strict=True)]
  assert scores.ranks.tolist() == ranks
  np.testing.assert_allclose(scores.top.logprobs[:, :top], -np.sort(-told)[:, :top], atol=1e-4)
  np.testing.assert_array_equal(scores.top.ids[:, :top], np.argsort(-told)[:, :top])


def test_prompts_are_scored_in_chunks(policy, monkeypatch):
  """Of any size, and with a remainder."""
  tokens = np.random.default_rng(0).integers(0, SIZE, (2, 11)).astype(np.int32)
  lengths = np.array([11, 4], np.int32)
  found = []
  for at_once in (6, 256):
    monkeypatch.setattr(decode, "_SCORED_AT_ONCE", at_once)
    program = jax.jit(decode.prefill_and_score.__wrapped__, static_argnames=("model", "top"))
    found.append(program(policy.model, policy.params, tokens, lengths, 3))
  for parts, whole in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(parts, whole, atol=1e-5)
  assert found[0][2].logprobs.shape == (2, 11)
  assert jnp.all(found[0][2].ranks[:, :-1] >= 1)
