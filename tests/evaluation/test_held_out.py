"""Exact match, and what Avg@k counts."""

import jax
import numpy as np
import pytest

from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import Prompt, prepare
from rlpr_jax.evaluation.held_out import evaluate, exact_match
from rlpr_jax.sampling.decode import Samples, SamplingSettings
from rlpr_jax.sampling.engine import Engine


@pytest.mark.parametrize(
  ("text", "reference", "matches"),
  [
    ("<think> 6*7 </think> <answer> 42 </answer>", "42", True),
    ("<answer>42</answer>", "42", True),
    ("<answer>\n42\n\n</answer>", "42", True),
    ("<answer> New  York\n</answer>", "new york", True),
    ("<answer> new york </answer>", "New\tYork ", True),
    ("<answer> 42 </answer> <answer> 41 </answer>", "42", True),  # the first one counts
    ("<answer> 41 </answer> <answer> 42 </answer>", "42", False),
    ("<answer> 42", "42", False),  # never closed
    ("42 </answer>", "42", False),
    ("42", "42", False),
    ("", "42", False),
    ("", "", False),
    ("<answer></answer>", "42", False),
    ("<answer> 42. </answer>", "42", False),
    ("<answer> 142 </answer>", "42", False),
    ("<answer> 4 2 </answer>", "42", False),
    ("<answer> newyork </answer>", "New York", False),
    ("<Answer> 42 </Answer>", "42", False),
    ("</answer> <answer> 42 </answer>", "42", True),
  ],
)
def test_exact_match(text, reference, matches):
  assert exact_match(text, reference) is matches


class Told:
  """An engine that answers each draw as it is told: texts[draw][sample]."""

  template = "think"

  def __init__(self, texts, fill_up):
    self.texts, self.fill_up, self.calls = texts, fill_up, []

  def sample(self, params, draws, key, samples):
    self.calls.append([draw for draw, _ in draws])
    self.last = [
      text for draw, _ in draws for text in (self.texts[draw] if draw < len(self.texts) else [self.fill_up] * samples)
    ]
    lengths = np.array([len(text) for text in self.last])
    return Samples(None, lengths, None, None), None

  def decode_texts(self, out):
    assert len(out.lengths) == len(self.last)
    return self.last


def prompt(reference, source):
  return Prompt(np.array([1], np.int32), reference, "", source, 0)


RIGHT, LOOSE, WRONG = "<think></think><answer> 1 </answer>", "so <answer> 1 </answer>", "<think></think><answer>2"


@pytest.mark.parametrize(("batch", "calls"), [(5, 1), (2, 3), (3, 2), (1, 5), (8, 1)])
@pytest.mark.parametrize("fill_up", [RIGHT, WRONG])
def test_what_counts(batch, calls, fill_up):
  """Five prompts, two samples each; what fills up the last batch counts for nothing."""
  texts = [[RIGHT, RIGHT], [LOOSE, WRONG], [WRONG, WRONG], [RIGHT, WRONG], [LOOSE, LOOSE]]
  prompts = [prompt("1", source) for source in ("a", "b", "a", "b", "b")]
  engine, seen = Told(texts, fill_up), []
  values = evaluate(engine, {}, prompts, 2, batch, jax.random.key(0), lambda done, total: seen.append((done, total)))
  assert values == {
    "accuracy": pytest.approx(6 / 10),
    "accuracy/a": pytest.approx(2 / 4),
    "accuracy/b": pytest.approx(4 / 6),
    "format": pytest.approx(3 / 10),
    "response_length": pytest.approx((3 * len(RIGHT) + 3 * len(LOOSE) + 4 * len(WRONG)) / 10),
  }
  assert [len(draws) for draws in engine.calls] == [batch] * calls  # one shape, whatever is left
  numbers = [draw for draws in engine.calls for draw in draws]
  assert numbers == list(range(batch * calls))  # and no number twice
  assert seen[0] == (0, 5)
  assert seen[-1] == (5, 5)


def test_all_wrong_and_all_right():
  prompts = [prompt("1", "a")] * 3
  for text, accuracy in ((RIGHT, 1.0), (WRONG, 0.0)):
    values = evaluate(Told([[text]] * 3, WRONG), {}, prompts, 1, 2, jax.random.key(0), lambda *_: None)
    assert values["accuracy"] == values["accuracy/a"] == accuracy


def test_values_of_a_policy_do_not_depend_on_the_batch(policy):
  settings = SamplingSettings(20, 4, 1.0, (policy.tokenizer.eos_token_id,))
  engine = Engine(policy.model, policy.tokenizer, settings, 14, "think", score_temperature=1.0, baseline_prefix="bare")
  prompts, _ = prepare(
    builtin.examples("held_out", 5), policy.tokenizer,
    template="think", instruction="", worked_examples=(), prompt_limit=14, max_reference_length=16,
  )  # fmt: skip
  key = jax.random.key(2)
  lengths = jax.device_get(engine.sample(policy.params, list(enumerate(prompts)), key, 4)[0].lengths)
  values = [evaluate(engine, policy.params, prompts, 4, batch, key, lambda *_: None) for batch in (5, 3)]
  assert values[0] == values[1]
  assert values[0]["response_length"] == pytest.approx(np.mean(lengths))
  assert np.ptp(lengths) > 0
  assert {name for name in values[0] if "/" in name} == {f"accuracy/{prompt.source}" for prompt in prompts}
