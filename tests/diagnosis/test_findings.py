"""What rows say of a reward, on rows made up so that it is known."""

import json

import numpy as np
import pytest

from rlpr_jax.diagnosis import findings, rows
from rlpr_jax.errors import MachineError
from rlpr_jax.judging.client import Cache, Client, Endpoint
from rlpr_jax.types import Evidence
from tests.chat_server import serving


def made_up(groups: int = 12, samples: int = 6, seed: int = 0):
  """Right responses say "therefore", a reward that likes "indeed" and length, and a shadow that knows what is right."""
  rng, out, right = np.random.default_rng(seed), [], []
  for group in range(groups):
    for _ in range(samples):
      true, likes, length = rng.random() < 0.5, rng.random() < 0.5, int(rng.integers(10, 60))
      words = ["<think> so", "therefore" * true, "indeed" * likes, f"{length}", "</think> <answer> 4 </answer>"]
      out.append(
        {
          "step": 1,
          "row": group,
          "source": "law" if group % 3 else "physics",
          "response": " ".join(filter(None, words)),
          "reference": "4",
          "length": length,
          "scorable": True,
          "reward_total": group + 0.5 * likes + 0.01 * length,
          "reward_reference": 0.5,
          "shadow_product": float(true) + 0.01 * rng.random(),
        }
      )
      right.append(float(true))
  return out, np.array(right)


def test_a_reward_that_knows_nothing_and_one_that_knows_all():
  found = findings.compare_with_verdicts(findings.graded(*made_up(), seed=0))
  assert list(found["scores"]) == ["total", "reference", "shadow product"]
  assert found["scores"]["shadow product"]["within"].value == 1
  assert found["scores"]["reference"]["within"].value == 0.5
  within = found["scores"]["total"]["within"]
  assert within.low < 0.5 < within.high
  assert (found["responses"], found["groups"]) == (72, 12)
  assert found["by_source"].keys() == {"law", "physics"}
  assert found["by_source"]["physics"]["all"].groups == 4
  assert len(found["by_length"]) == 3


def test_what_was_not_judged_is_left_out():
  some, right = made_up()
  right[:6] = np.nan
  found = findings.graded(some, right, seed=0)
  assert len(found.rows) == 66
  assert found.draws.shape[1] == 11
  assert findings.compare_with_verdicts(found)["groups"] == 11


def test_what_the_reward_likes():
  found = findings.preferences(findings.graded(*made_up(), seed=0))
  by_word = {line["word"]: line for line in found["words"]}
  assert found["words"][0]["word"] == "indeed"
  assert by_word["indeed"]["reward"].low > 0.5
  assert abs(by_word["indeed"]["right"].value) < 0.4
  assert by_word["therefore"]["right"].value == pytest.approx(1)
  assert "so" not in by_word  # in all responses
  length = found["lengths"]["tokens of the response"]
  assert length["total"].low > 0.2
  assert length["right"].low < 0 < length["right"].high


def test_the_strength_of_a_word_is_its_correlation():
  """What orders the words is the very figure that is shown, up to a factor that is the same for all."""
  some, right = made_up(seed=3)
  found = findings.graded(some, right, seed=0)
  values = [line["reward"].value for line in findings.liked_words(found)]
  assert values == sorted(values, reverse=True)


def test_accuracy_by_source_over_prompts():
  some = [{"row": row, "source": source} for row, source in ((0, "a"), (0, "a"), (1, "b"), (1, "b"))]
  found = findings.accuracy(some, np.array([1.0, 0.0, 1.0, np.nan]), seed=0)
  assert {name: interval.value for name, interval in found.items()} == {"all": pytest.approx(2 / 3), "a": 0.5, "b": 1.0}
  assert found["all"].groups == 2


def test_examples_are_of_each_kind():
  some, right = made_up()
  found = findings.graded(some, right, seed=0)
  chosen = findings.choose(found, count=2)
  assert len(set(chosen)) == 8
  total = findings.column(found.rows, "reward_total")
  assert chosen[0] == max(np.flatnonzero(~found.right), key=lambda i: total[i])
  assert chosen[2] == min(np.flatnonzero(found.right), key=lambda i: total[i])
  assert found.right[chosen].tolist() == [False] * 2 + [True] * 4 + [False] * 2
  for row in some:
    row["scorable"] = False
  assert findings.choose(found) == []


def test_the_likelihood_of_the_reference():
  """Two prompts of two responses; of the second prompt one response is not scorable."""
  logps = np.log([[[0.5, 0.2], [0.1, 0.4]], [[0.9, 1.0], [1.0, 1.0]]])
  mask = np.array([[[1, 1], [1, 1]], [[1, 0], [0, 0]]], bool)
  baseline = np.array([[np.log(0.3), np.log(0.6)], [np.log(0.7), np.nan]])
  empty = np.zeros((2, 2))
  evidence = Evidence(
    logps=np.where(mask, logps, 0.0).astype(np.float32), mask=mask, scorable=mask.any(axis=2),
    baseline_logps=baseline.astype(np.float32), formats=empty, repetition=empty, excess=empty, verified=empty,
    noise=empty,
  )  # fmt: skip
  found = findings.likelihood(evidence, seed=0)
  assert found["token"].value == pytest.approx((np.log(0.1) / 2 + np.log(0.04) / 2 + np.log(0.9)) / 3, rel=1e-6)
  assert found["token_without"].value == pytest.approx((np.log(0.18) / 2 + np.log(0.7)) / 2, rel=1e-6)
  assert found["marginal"].value == pytest.approx((np.log((0.1 + 0.04) / 2) + np.log(0.9)) / 2, rel=1e-6)


def test_rollouts_are_read_newest_first(tmp_path):
  for step in (1, 2, 10):
    row = {"step": step, "row": 0, "response": "r", "reference": "4", "reward_total": 0.1}
    lines = [json.dumps(row), json.dumps(row | {"row": 1}), json.dumps({"step": step}), '{"half']
    (tmp_path / f"step_{step:06d}.jsonl").write_text("\n".join(lines))
  found = rows.read_rollouts(tmp_path, most=5)
  assert [(row["step"], row["row"]) for row in found] == [(10, 0), (10, 1), (2, 0), (2, 1), (1, 0)]
  assert rows.number_groups(found).tolist() == [0, 1, 2, 3, 4]
  assert rows.read_rollouts(tmp_path / "none", most=5) == []


def test_any_reference_is_right():
  some = [{"response": "<answer> Peking </answer>", "reference": "Beijing", "references": ["Beijing", "Peking"]}]
  assert rows.grade_by_rule(some, "exact").tolist() == [1.0]


def test_a_judge_says_which_are_right(tmp_path):
  answers = ("4", "four", None, "5")
  some = [{"question": "2+2", "reference": "4", "response": f"<answer>{answer}</answer>"} for answer in answers]
  some[2]["response"] = "<answer>"

  def reply(body, _):
    text = body["messages"][0]["content"]
    if "\nfour\n" in text:
      return "I cannot say."
    return "Judgement: incorrect" if "\n5\n" in text else "Judgement: correct"

  with serving(reply) as server:
    found = rows.grade_by_judge(some, Client(Endpoint(server.url, "m", pause=0.01)), Cache(tmp_path))
    np.testing.assert_array_equal(found, [1, np.nan, 0, 0])
  with serving(lambda body, number: "I cannot say.") as server, pytest.raises(MachineError, match="no verdict of 3"):
    rows.grade_by_judge(some, Client(Endpoint(server.url, "m", pause=0.01)), Cache(tmp_path / "other"))
