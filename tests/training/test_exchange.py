"""Own answers behind each other's reasoning, against one whole pass over each text by itself."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlpr_jax import config, rewards
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes, pad_rows
from rlpr_jax.sharding import Sharding
from rlpr_jax.splicing import OwnAnswer
from rlpr_jax.training.collect import reference_scorer
from rlpr_jax.training.exchange import choose_pairs, exchange_answers
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.training.run import Run
from rlpr_jax.types import PackedRows, Prompt, Rollouts

TEMPERATURE, LIMIT, RESPONSE, SUFFIX, SAMPLES = 0.8, 8, 40, 16, 4
TEXTS = (
  ("7<answer>41</answer>", "xy<answer> 42 </answer>", "x z <answer>41</answer>", "<answer>  </answer>"),
  ("no tags", "<answer>abc", "q<answer>a</answer>", "<answer>much longer than all others</answer>"),
  ("a", "b", "c", "<answer>a<answer>b</answer>"),
)
REFERENCES = ("42", "a b", "mon")


@pytest.fixture(scope="module")
def case(policy):
  c = config.default()
  c.samples_per_prompt, c.data.template = SAMPLES, "answer_only"
  c.data.prompt_limit, c.rollout.max_response_length, c.data.max_reference_length = LIMIT, RESPONSE, SUFFIX
  c.rollout.score_rows, c.reward.score_temperature = 4, TEMPERATURE
  settings = DecodeSettings(8, (policy.tokenizer.eos_token_id,))
  device = Device(policy.model, settings, Shapes(16, LIMIT, RESPONSE, SUFFIX, 8, 2, 4, 4), TEMPERATURE)
  engine = Engine(device, policy.tokenizer, "answer_only", baseline_prefix="bare")
  sampler = SimpleNamespace(sampler=policy.model, sampling=SimpleNamespace(sharding=Sharding()))
  run = Run(**dict.fromkeys(Run._fields))._replace(config=c, engine=engine, policy=sampler)
  rng = np.random.default_rng(0)
  numbered = [
    (5 + row, Prompt(ids=rng.integers(10, 60, 3 + row).astype(np.int32), reference=reference, row=row))
    for row, reference in enumerate(REFERENCES)
  ]
  texts = [text for group in TEXTS for text in group]
  ids = [policy.tokenizer.encode(f"{text}<end>") for text in texts]
  scorable = [text.count("<answer>") == 1 for text in texts]
  rollouts = Rollouts(
    **dict.fromkeys(Rollouts._fields)
    | {
      "texts": texts,
      "tokens": pad_rows(ids, RESPONSE),
      "lengths": np.array([len(one) for one in ids], np.int32),
      "scorable": np.array(scorable),
    }
  )
  return run, numbered, rollouts


def logprob(policy, prompt, before, scored):
  """Of a text behind another one and a prompt; the built-in tokenizer has a token a character, and one a tag."""
  encode = policy.tokenizer.encode
  ids = np.array([*prompt.ids, *encode(before + scored)])
  ones = np.ones((1, len(ids)), int)
  rows = PackedRows(ids[None], np.arange(len(ids))[None], ones, ones > 0, *[None] * 3)
  logps = row_logprobs(policy.model, policy.params, rows, TEMPERATURE)[0][0]
  return float(logps[len(ids) - len(encode(scored)) :].sum())


def own(text):
  """Stripped answer and what ends it, of a text with one closed answer that is not empty and has room."""
  if text.count("<answer>") != 1 or "</answer>" not in text:
    return None
  inside = text.split("<answer>")[1].split("</answer>")[0]
  answer = inside.strip()
  return (answer, inside[len(inside.rstrip()) :] + "</answer>") if answer and len(answer) < 10 else None


def test_every_answer_behind_every_reasoning(case, policy):
  run, numbered, rollouts = case
  found = exchange_answers(reference_scorer(run, policy.params), run.engine, numbered, rollouts)
  for p, (_, prompt) in enumerate(numbered):
    for k, text in enumerate(TEXTS[p]):
      has_place = text.count("<answer>") == 1
      if has_place:
        behind = text.split("<answer>")[1]
        space = behind[: len(behind) - len(behind.lstrip())] or " "
        before = f"{text.split('<answer>')[0]}<answer>{space}"
        expected = logprob(policy, prompt, before, f"{REFERENCES[p]} </answer>")
        np.testing.assert_allclose(found.reference_logps[p, k], expected, atol=1e-4)
      for j, other in enumerate(TEXTS[p]):
        answer = own(other)
        assert found.pairs[p, k, j] == (has_place and answer is not None)
        if found.pairs[p, k, j]:
          # After its own reasoning an answer stands as it was sampled, which may be without a space.
          written = behind[: len(behind) - len(behind.lstrip())]
          start = before.removesuffix(space) + (written if answer == own(text) else space)
          np.testing.assert_allclose(
            found.answer_logps[p, k, j], logprob(policy, prompt, start, "".join(answer)), atol=1e-4
          )
  assert found.answered.tolist() == [[own(text) is not None for text in group] for group in TEXTS]
  np.testing.assert_array_equal(found.answer_logps[0, :, 0], found.answer_logps[0, :, 2])
  reward = np.asarray(rewards.conditional_expectation(*found))
  assert (reward > 0).tolist() == found.answered.tolist()


def test_some_pairs_are_left_out(case, policy):
  run, numbered, rollouts = case
  scorer = reference_scorer(run, policy.params)
  all_of_them = exchange_answers(scorer, run.engine, numbered, rollouts)
  few = exchange_answers(scorer, run.engine, numbered, rollouts, most=1, seed=3)
  assert few.pairs[0].sum(axis=0).tolist() == [1, 1, 1, 0]
  assert few.pairs[0, 1, 1]
  np.testing.assert_array_equal(few.answered, all_of_them.answered)
  np.testing.assert_allclose(few.answer_logps[few.pairs], all_of_them.answer_logps[few.pairs], atol=1e-5)
  np.testing.assert_array_equal(few.answer_logps[~few.pairs], 0)


def test_without_prompts_there_is_nothing(case, policy):
  run, _, rollouts = case
  empty = rollouts._replace(
    texts=[], tokens=rollouts.tokens[:0], lengths=rollouts.lengths[:0], scorable=rollouts.scorable[:0]
  )
  found = exchange_answers(reference_scorer(run, policy.params), run.engine, [], empty)
  assert found.pairs.shape[0] == 0


def test_those_that_led_to_an_answer_come_first():
  answers = [OwnAnswer(text, "</answer>") for text in ("8", "9", "8", "7")]
  for seed in range(5):
    rng = np.random.default_rng(seed)
    chosen = choose_pairs(answers, [True] * 4, 3, rng)
    assert chosen.sum(axis=0).tolist() == [3, 3, 3, 3]
    assert chosen[0, 0]
    assert chosen[2, 0]
    np.testing.assert_array_equal(chosen[:, 0], chosen[:, 2])
    assert chosen.diagonal().all()
  assert choose_pairs(answers, [True] * 4, 0, np.random.default_rng(0)).all()
