"""The reward for other trainers, against the same texts put together and scored by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax.reference_reward import ReferenceReward

PROMPT = "<q>6*7<a>"
RESPONSES = {
  "<think>6*7=42</think> <answer>41</answer>": "<think>6*7=42</think> <answer> 42 </answer>",
  "<think>6</think> <answer>4": "<think>6</think> <answer> 42 </answer>",  # cut
  "<think>7</think> <answer></answer>": "<think>7</think> <answer> 42 </answer>",
  "41 it is": None,  # has no place for the reference
}


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
  found = reward([ids(PROMPT)] * len(RESPONSES), responses, ["42"] * len(RESPONSES))
  baseline = probability(" ", "42")
  expected = []
  for text, spliced in RESPONSES.items():
    r = probability(spliced.partition("42 <")[0], "42") if spliced else 0.0
    expected.append(0.9 * np.clip(r - baseline, 0, 1) + 0.1 * (text.endswith("</answer>")))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert calls == [1, 3]  # r' once, and what can be scored
  reward([ids(PROMPT)], responses[:1], ["42"])
  assert calls == [1, 3, 1]  # r' is known
  assert reward([ids(PROMPT)], responses[3:], ["42"]).tolist() == [0.0]
