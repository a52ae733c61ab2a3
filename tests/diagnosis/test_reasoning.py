"""Reasoning that is exchanged: the texts that are scored, and their scores against a plain pass of the model."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from rlpr_jax import config
from rlpr_jax.diagnosis import reasoning
from rlpr_jax.diagnosis.reasoning import Reasoned
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.collect import reference_scorer
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt

QUESTIONS = (("6*7", "42"), ("tue+2", "thu"), ("1+1", "2"), ("1+1", "2"))
RESPONSES = (
  "<think>6*7=42. so 42.</think> <answer> 43 </answer><end>",
  "<think>mon tue wed</think><answer>fri</answer><end>",
  "<think></think><answer> 2 </answer><end>",
  "<think>2</think> <answer> two",
)
LIMIT = 90


@pytest.fixture(scope="module")
def case(policy):
  """An engine, its scorer, and a response to each question."""
  tokenizer = policy.tokenizer
  c = config.default()
  c.data.prompt_limit, c.rollout.max_response_length, c.data.max_reference_length = 8, LIMIT - 24, 16
  c.rollout.score_rows = 2
  device = Device(policy.model, DecodeSettings(8, (tokenizer.eos_token_id,)), Shapes(4, 8, LIMIT - 24, 16, 8, 2, 2, 4))
  engine = Engine(device, tokenizer, "think", baseline_prefix="bare")
  sampler = SimpleNamespace(sampler=policy.model, sampling=SimpleNamespace(sharding=Sharding()))
  scorer = reference_scorer(
    Run(**dict.fromkeys(Run._fields))._replace(config=c, engine=engine, policy=sampler), policy.params
  )
  responses = [
    Reasoned(
      Prompt(ids=np.array(tokenizer.encode(f"<q>{question}<a>"), np.int32), reference=reference, question=question),
      np.array(tokenizer.encode(response), np.int32),
    )
    for (question, reference), response in zip(QUESTIONS, RESPONSES, strict=True)
  ]
  return engine, scorer, responses


def logprobs(policy, prompt, ids) -> np.ndarray:
  """Of each of `ids` behind a prompt, by one pass over both."""
  tokens = np.concatenate([prompt.ids, ids])[None]
  decoder = nnx.merge(policy.model, policy.params)
  logits = decoder.logits(decoder(tokens, np.arange(tokens.size)[None], np.ones_like(tokens)))
  table = log_softmax(np.asarray(logits, np.float64)[0], axis=-1)
  return table[np.arange(prompt.ids.size - 1, tokens.size - 1), ids]


def test_texts_with_other_reasoning(case):
  engine, _, responses = case
  found = reasoning.variants(engine, responses[0], responses[1], seed=0)
  text = {name: engine.decode_text(of.ids) for name, of in found.items()}
  assert text.pop("own") == "<think>6*7=42. so 42.</think> <answer> 42 </answer><end>"
  assert text.pop("other") == "<think>mon tue wed</think><answer> 42 </answer><end>"
  assert text.pop("sentences") == "<think>so 42. 6*7=42.</think> <answer> 42 </answer><end>"
  assert text.pop("none") == "<think></think> <answer> 42 </answer><end>"
  assert text.pop("straight") == " 42 <end>"
  words = text.pop("words")
  assert words != "<think>6*7=42. so 42.</think> <answer> 42 </answer><end>"
  assert sorted(words.replace("<think>", "").split("</think>")[0].split()) == ["42.", "6*7=42.", "so"]
  assert text == {}
  for of in found.values():
    assert engine.decode_text(of.ids[of.mask]) == "42"


def test_what_there_is_no_other_order_of(case):
  engine, _, responses = case
  found = reasoning.variants(engine, responses[2], responses[0], seed=0)
  assert [name for name, of in found.items() if of is None] == ["sentences", "words"]
  np.testing.assert_array_equal(found["own"].ids, found["none"].ids)


def test_scores_are_those_of_a_plain_pass(case, policy):
  engine, scorer, responses = case
  scored = reasoning.score_variants(scorer, engine, responses, "mean_prob", LIMIT, seed=0)
  pairs = reasoning.pair_with_others(responses, seed=0)
  assert all(responses[i].prompt.question != responses[j].prompt.question for i, j in enumerate(pairs))
  for i, (response, other) in enumerate(zip(responses, pairs, strict=True)):
    for name, text in reasoning.variants(engine, response, responses[other], seed=i).items():
      if text is None:
        assert np.isnan(scored[name][i])
        continue
      expected = np.exp(logprobs(policy, response.prompt, text.ids)[text.mask]).mean()
      assert scored[name][i] == pytest.approx(expected, rel=1e-4)


def test_a_text_that_is_too_long_is_left_out(case):
  engine, scorer, responses = case
  longest = responses[0].prompt.ids.size + reasoning.variants(engine, responses[0], responses[1], 0)["own"].ids.size
  scored = reasoning.score_variants(scorer, engine, responses[:2], "mean_prob", longest - 1, seed=0)
  assert np.isnan(scored["own"]).tolist() == [True, False]
  assert not np.isnan(scored["straight"]).any()


def test_nothing_to_score(case):
  engine, scorer, responses = case
  assert reasoning.score_variants(scorer, engine, [], "mean_prob", LIMIT, seed=0) == {}
  assert reasoning.measure_information(scorer, engine, responses[2:3], LIMIT, seed=0) == {}
  assert reasoning.token_maps(scorer, engine, [], LIMIT) == []
  assert np.isnan(reasoning.score_variants(scorer, engine, responses[2:], "mean_prob", LIMIT, 0)["other"]).all()


def test_information_is_that_of_a_plain_pass(case, policy):
  engine, scorer, responses = case
  found = reasoning.measure_information(scorer, engine, responses, LIMIT, seed=0)
  reasoned = [responses[i] for i in (0, 1, 3)]  # the third has no reasoning
  thoughts = [engine.tokenizer.encode(text) for text in ("6*7=42. so 42.", "mon tue wed", "2")]
  opening = engine.tokenizer.encode("<think>")
  logps = np.array(
    [
      [logprobs(policy, other.prompt, np.array(opening + ids))[len(opening) :].sum() for other in reasoned]
      for ids in thoughts
    ]
  )
  lengths = np.array([len(ids) for ids in thoughts])
  own = np.diagonal(logps)
  terms = own - np.log(np.exp(logps).mean(axis=1))
  assert found["information"].value == pytest.approx(terms.mean(), rel=1e-4)
  per_token = logps / lengths[:, None]
  expected = np.mean(np.diagonal(per_token) - np.log(np.exp(per_token).mean(axis=1)))
  assert found["per_token"].value == pytest.approx(expected, abs=1e-5)
  assert found["entropy"].value == pytest.approx(np.mean(-own / lengths), rel=1e-4)
  assert found["retrieval"] == pytest.approx(np.mean(logps.argmax(axis=1) == np.arange(3)))
  assert (found["prompts"], found["most"]) == (3, pytest.approx(np.log(3)))


def test_maps_of_tokens(case, policy):
  engine, scorer, responses = case
  maps = reasoning.token_maps(scorer, engine, responses, LIMIT)
  assert [[token["token"] for token in of["reference"]] for of in maps] == [["4", "2"], ["t", "h", "u"], ["2"], ["2"]]
  # The last response has no answer that ends.
  assert [[token["token"] for token in of["own"]] for of in maps] == [["4", "3"], ["f", "r", "i"], ["2"], []]
  text = reasoning.spliced(engine, responses[0].prompt, responses[0].ids, "43")
  expected = np.exp(logprobs(policy, responses[0].prompt, text.ids)[text.mask])
  np.testing.assert_allclose([token["with"] for token in maps[0]["own"]], expected, rtol=1e-4)
  straight = reasoning.straight(engine, "43")
  expected = np.exp(logprobs(policy, responses[0].prompt, straight.ids)[straight.mask])
  np.testing.assert_allclose([token["without"] for token in maps[0]["own"]], expected, rtol=1e-4)


def test_losses_are_means_over_what_both_have():
  scored = {"own": np.array([0.9, 0.5, 0.3, np.nan]), "other": np.array([0.4, 0.5, np.nan, 0.2])}
  found = reasoning.compare_variants(scored, np.array([0, 0, 1, 1]), seed=0)
  assert found["own"].keys() == {"r"}
  assert found["own"]["r"].value == pytest.approx(1.7 / 3)
  assert found["other"]["r"].value == pytest.approx(1.1 / 3)
  assert found["other"]["loss"].value == pytest.approx(0.25)
  assert found["other"]["helped"].value == pytest.approx(0.75)
  assert found["other"]["loss"].groups == 1
