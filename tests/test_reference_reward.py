"""The reward for other trainers, against the same texts put together and scored by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax.reference_reward import ReferenceReward

PROMPT = "<q>6*7<a>"
# What stands before the reference once it is put in; None where there is no place for it.
RESPONSES = {
  "<think>6*7=42</think> <answer>41</answer>": "<think>6*7=42</think> <answer> ",
  "<think>6</think> <answer>4": "<think>6</think> <answer> ",  # cut
  "<think>7</think> <answer></answer>": "<think>7</think> <answer> ",
  "41 it is": None,
}
REFERENCES = "42", "7", "13", "9", "e", "tue"


@pytest.fixture(scope="module")
def token_logps(policy):
  @jax.jit
  def logps(params, tokens):
    decoder = nnx.merge(policy.model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jax.nn.log_softmax(decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens))))

  def of(ids):
    """float[N] of each token after the first, which has 0."""
    found = np.asarray(logps(policy.params, np.array([[*ids, *[0] * (96 - len(ids))]])))[0]
    return np.array([0.0, *(found[i - 1, token] for i, token in enumerate(ids[1:], 1))])

  return of


def test_by_hand(policy, token_logps):
  tokenizer, calls = policy.tokenizer, []

  def ids(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]

  def log_probabilities(texts, suffixes):
    calls.append(len(texts))
    return [token_logps(text + suffix)[len(text) :] for text, suffix in zip(texts, suffixes, strict=True)]

  def probability(before, answer):
    """Mean over the answer's tokens, behind a text that ends with a space."""
    assert ids(before) + ids(answer) == ids(before + answer)
    return np.mean(np.exp(token_logps(ids(PROMPT) + ids(before + answer))[-len(ids(answer)) :]))

  reward = ReferenceReward(tokenizer, log_probabilities)
  eos = [tokenizer.eos_token_id]
  responses = [ids(text) + (eos if text.endswith("</answer>") else []) for text in RESPONSES]
  gains = []
  for reference in REFERENCES:
    found = reward([ids(PROMPT)] * len(RESPONSES), responses, [reference] * len(RESPONSES))
    r = np.array([probability(before, reference) if before else 0.0 for before in RESPONSES.values()])
    gains += list(np.clip(r - probability(" ", reference), 0, 1))
    well_formed = [text.endswith("</answer>") for text in RESPONSES]
    np.testing.assert_allclose(found, 0.9 * np.array(gains[-len(r) :]) + 0.1 * np.array(well_formed), atol=1e-5)
  assert np.sum(np.array(gains) > 1e-3) > 2  # not all are cut at 0
  assert calls == [1, 3] * len(REFERENCES)  # r' once, and what can be scored
  reward([ids(PROMPT)], responses[:1], ["42"])
  assert calls[-1:] == [1]  # r' is known
  assert len(calls) == 2 * len(REFERENCES) + 1
  assert reward([ids(PROMPT)], responses[3:], ["42"]).tolist() == [0.0]
