"""Several reference answers to one question: rewards against float64 by hand, rows of files, and whole runs."""

import json
import math

import jax
import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import rewards, train, validation
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.policy import initial_params
from rlpr_jax.runs.inputs import row_digest
from rlpr_jax.training.baselines import measure_baselines
from rlpr_jax.training.reward import RewardSettings, compute_rewards, gather_evidence, parse_shadow
from rlpr_jax.training.run import load_prompts, set_up
from rlpr_jax.types import Prompt, Rollouts
from tests import tiny_run
from tests.evidence import make_evidence

P, G, M, A = 4, 3, 3, 4
COUNTS = [[2, 4, 1], [3, 2], [2], [1, 1, 3]]  # tokens of each prompt's references
OVER = {"best": max, "mean": np.mean}


@pytest.fixture(scope="module")
def evidence():
  """In the first group all is scored but one reference of one response, in the last nothing."""
  rng = np.random.default_rng(0)
  mask, known = np.zeros((P, G, M, A), bool), np.zeros((P, M, A), bool)
  for p, of_prompt in enumerate(COUNTS):
    for m, count in enumerate(of_prompt):
      mask[p, :, m, :count] = known[p, m, :count] = True
  mask[0, 1, 1] = mask[1, 0, 0] = mask[1, 2] = mask[2, 1] = mask[3] = False
  logps = np.where(mask, -rng.exponential(1, mask.shape), 0).astype(np.float32)
  baseline_logps = np.where(known, -rng.exponential(2, known.shape), np.nan).astype(np.float32)
  formats = rng.integers(0, 2, (P, G)).astype(np.float32)
  return make_evidence(
    logps=logps, mask=mask, scorable=mask.any((-1, -2)), baseline_logps=baseline_logps, formats=formats
  )


def settings(**changes):
  c = configs.default()
  c.reward.update(changes)
  return RewardSettings.of(c.reward)


def aggregate_by_hand(kind, logps, weights):
  logps = logps.astype(np.float64)
  mean = np.sum(weights * (np.exp(logps) if kind == "mean_prob" else logps)) / np.sum(weights)
  return {
    "mean_prob": mean,
    "mean_logprob": mean,
    "geometric_mean": np.exp(mean),
    "product": np.exp(mean * len(logps)),
    "weighted_sum": np.sum(weights * np.exp(logps)) / len(logps),
  }[kind]


def score_by_hand(evidence, p, g, m, kind, token_weights):
  """r of a reference after the reasoning of response g, or without it for None."""
  logps, mask = evidence.logps[p, :, m], evidence.mask[p, :, m]
  known = evidence.baseline_logps[p, m, : COUNTS[p][m]]
  weights = np.ones(len(known))
  if token_weights == "base" and (g is not None or mask.any()):
    weights = 1 - np.exp(known.astype(np.float64))
  if token_weights == "spread" and mask.any(axis=-1).sum() > 1:
    weights = np.exp(logps[mask.any(axis=-1), : len(known)].astype(np.float64)).std(axis=0, ddof=1)
  return aggregate_by_hand(kind, known if g is None else logps[g][mask[g]], weights)


@pytest.mark.parametrize("references", ["best", "mean"])
@pytest.mark.parametrize("kind", rewards.AGGREGATES)
@pytest.mark.parametrize("token_weights", ["uniform", "base", "spread"])
def test_rewards_of_several_references_by_hand(evidence, references, kind, token_weights):
  parts = jax.device_get(
    compute_rewards(
      evidence, settings(references=references, aggregate=kind, token_weights=token_weights, shaping="identity")
    )
  )
  for p, g in np.ndindex(P, G):
    scored = [m for m in range(len(COUNTS[p])) if evidence.mask[p, g, m].any()]
    scores = [score_by_hand(evidence, p, g, m, kind, token_weights) for m in scored]
    r = OVER[references](scores) if scores else math.log(1e-9) if kind == "mean_logprob" else 0.0
    # Of the same references; where none was scored, of all.
    r0 = OVER[references](
      [score_by_hand(evidence, p, None, m, kind, token_weights) for m in scored or range(len(COUNTS[p]))]
    )
    assert parts.reference[p, g] == pytest.approx(r, abs=2e-6)
    assert parts.baseline[p, g] == pytest.approx(r0, abs=2e-6)
    assert parts.debiased[p, g] == pytest.approx(r - r0, abs=4e-6)
    assert parts.total[p, g] == pytest.approx(0.9 * (r - r0) + 0.1 * evidence.formats[p, g], abs=4e-6)
    each = parts.each_reference[p, g]
    np.testing.assert_allclose(each[scored], scores, atol=2e-6)
    assert np.isnan(each).sum() == M - len(scored)


def test_the_first_reference_of_several_is_a_reward_like_any(evidence):
  """A shadow of a run that scores all: what the run would have given for the first alone."""
  alone = evidence._replace(
    logps=evidence.logps[:, :, 0],
    mask=evidence.mask[:, :, 0],
    scorable=evidence.mask[:, :, 0].any(-1),
    baseline_logps=evidence.baseline_logps[:, 0],
  )
  found, expected = (jax.device_get(compute_rewards(one, settings())) for one in (evidence, alone))
  for name in found._fields:
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
  assert found.each_reference is None
  assert found.baseline.shape == (P,)
  assert not found.reference[1, 0]  # of which the second was scored


def test_one_reference_of_several_that_there_may_be_is_worth_the_same(evidence):
  one = evidence._replace(
    mask=evidence.mask & (np.arange(M) < 1)[:, None],
    scorable=evidence.mask[:, :, 0].any(-1),
    baseline_logps=np.where((np.arange(M) < 1)[:, None], evidence.baseline_logps, np.nan),
  )
  expected = jax.device_get(compute_rewards(one, settings()))
  for references in OVER:
    found = jax.device_get(compute_rewards(one, settings(references=references)))
    np.testing.assert_allclose(found.total, expected.total, atol=1e-6)
    np.testing.assert_allclose(found.baseline, np.repeat(expected.baseline[:, None], G, 1), atol=1e-6)


def test_without_baselines_nothing_is_subtracted(evidence):
  parts = compute_rewards(evidence, settings(references="best", baseline_policy="none", shaping="identity"))
  assert not np.any(parts.baseline)
  np.testing.assert_array_equal(parts.debiased, parts.reference)


def test_unknown_references_are_a_value_error():
  with pytest.raises(ValueError, match="references 'worst': expected one of best, mean"):
    rewards.over_references(np.zeros(2, np.float32), np.ones(2, bool), "worst")


def test_any_reference_is_right_and_the_longest_measures_an_answer():
  c = configs.default()
  c.samples_per_prompt, c.reward.verifier = 2, "exact"
  texts = ["<answer>eight</answer>", "<answer>seven!!!</answer>"]
  fields = dict.fromkeys(Rollouts._fields) | {"texts": texts, "scorable": np.ones(2, bool), "lengths": np.full(2, 9)}
  rollouts = Rollouts(**fields)._replace(reference_logps=np.zeros((2, 2, 3)), reference_mask=np.ones((2, 2, 3), bool))

  def found(*references):
    prompt = Prompt(ids=np.arange(3), reference=references[0], alternatives=references[1:], question="4+4")
    evidence = gather_evidence(c, [(0, prompt)], rollouts, np.zeros((1, 2, 3), np.float32))
    return evidence.verified.tolist(), evidence.excess.tolist()

  assert found("8") == ([[0, 0]], [[-1, -1]])
  assert found("8", "Eight") == ([[1, 0]], [[0, pytest.approx(-0.6)]])


def test_rows_are_told_apart_by_all_their_references():
  prompt = Prompt(ids=np.zeros(0, int), question="6 * 7?", reference="42")
  one, other = (Prompt(ids=prompt.ids, question="6 * 7?", reference="42", alternatives=(x,)) for x in ("XLII", "6*7"))
  assert len({row_digest(prompt), row_digest(one), row_digest(other)}) == 3


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"reward.references": "worst"}, "config.reward.references: 'worst', expected one of first, best, mean"),
    ({"data.max_references": 0}, "config.data.max_references: 0, expected at least 1"),
    (
      {"reward.references": "best", "training.answer_gradient": "verifree"},
      "config.training.answer_gradient: verifree goes through one reference answer, expected config.reward.references"
      " first, found best",
    ),
    ({"reward.references": "mean", "training.answer_gradient": "jepo"}, "jepo goes through one reference answer"),
    (
      {"reward.shadow": ("x: references=mean",)},
      "config.reward.shadow x.references: mean, but the run scores the first",
    ),
    ({"reward.references": "best", "reward.shadow": ("x: references=all",)}, "x.references: 'all', expected one of"),
  ],
)
def test_settings_that_cannot_be_are_one_line(changes, line):
  c = configs.default()
  c.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    validation.validate(c)
  assert line in str(error.value)
  assert "\n" not in str(error.value)


def test_shadows_may_take_references_otherwise():
  c = configs.default()
  c.reward.references, c.reward.shadow = "best", ("mean: references=mean", "first: references=first")
  validation.validate(c)
  assert [parse_shadow(c, text)[1].references for text in c.reward.shadow] == ["mean", "first"]


# ---- rows ----

ROWS = [
  {"question": "1+1", "answer": ["2", "two", "2 ", "two"]},
  {"question": "1+2", "answer": "3"},
  {"question": "1+3", "answer": ["4", "four", "2+2", "IV", "3+1"]},
  {"question": "1+4", "answer": ["5", "five and nothing else at all"]},
]


def write(path, rows):
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return str(path)


def load(path, references, max_references, **fields):
  c = configs.default()
  c.data.path, c.data.instruction, c.data.max_dropped = path, "", 0.5
  c.reward.references = references
  c.data.update(fields)
  return load_prompts(c, c.data, builtin.tokenizer(), "train", count=0, max_references=max_references)


def test_references_of_rows(tmp_path, capsys):
  """Each once; a row with more than there may be is dropped and named, one with too long a one dropped and counted."""
  path = write(tmp_path / "a.jsonl", ROWS)
  prompts, dropped = load(path, "best", 4, max_reference_length=20)
  assert [prompt.references for prompt in prompts] == [("2", "two"), ("3",)]
  (row,) = dropped
  assert (row.row, row.reason) == (3, "answer: too many references")
  assert row.detail == "column answer: expected at most 4 different references (data.max_references), found 5"
  assert capsys.readouterr().out.splitlines()[1:] == [
    f"{path}: 2 prompts, dropped: {{'prompt_too_long': 0, 'reference_too_long': 1}}; 1 unusable, named in"
    " dropped_rows.jsonl: {'answer: too many references': 1}",
    f"{path}: 2 rows have several references, all of each count (best)",
  ]
  # Held-out rows may have any number.
  prompts, dropped = load(path, "mean", None)
  assert [len(prompt.references) for prompt in prompts] == [2, 1, 5, 2]
  assert not dropped
  assert capsys.readouterr().out.endswith("3 rows have several references, any of each is right\n")


def test_the_first_reference_is_all_there_is_where_it_alone_counts(tmp_path):
  prompts, dropped = load(write(tmp_path / "a.jsonl", ROWS), "first", None, max_reference_length=20)
  assert [prompt.references for prompt in prompts] == [("2",), ("3",), ("4",), ("5",)]
  assert not dropped


# ---- whole runs ----


def questions():
  """Rows of the built-in questions, most of them with further references."""
  rows = []
  for i, example in enumerate(builtin.examples("train", 20, 0, "short")):
    others = [f"0{example.reference}", f"{example.reference} ok"][: i % 3]
    question = example.messages[0]["content"]
    rows.append({"question": question, "answer": [example.reference, *others], "source": example.source})
  return rows


def config_of(tmp_path, name, rows, **reward):
  c = tiny_run.tiny()
  # A random policy writes `<answer>` once in every third response or so.
  c.steps, c.warm_start.steps, c.data.template, c.evaluation.prompts = 2, 0, "answer_only", 4
  c.data.path = c.evaluation.path = write(tmp_path / f"{name}.jsonl", rows)
  c.reward.update(reward)
  validation.validate(c)
  return c


def run(tmp_path, name, rows, **reward):
  c = config_of(tmp_path, name, rows, **reward)
  train.train(c, tmp_path / name)
  return tmp_path / name, c


def test_baselines_that_a_stop_left_are_those_of_all_references(tmp_path):
  run = set_up(config_of(tmp_path, "run", questions(), references="best"))
  params = initial_params(run.config, run.policy)
  measured = measure_baselines(run, params, run.prompts, tmp_path)
  np.testing.assert_array_equal(np.isfinite(measured).any(-1).sum(-1), 1 + np.arange(20) % 3)
  kept = measure_baselines(run._replace(engine=None), params, run.prompts, tmp_path)
  np.testing.assert_array_equal(kept, measured)


@pytest.mark.parametrize("references", ["best", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_run_on_several_references(tmp_path, references):
  shadow = ("other: references=mean, aggregate=product", "first: references=first")
  workdir, c = run(tmp_path, "run", questions(), references=references, shadow=shadow, verifier="exact")
  metrics = tiny_run.rows(workdir)
  assert all(math.isfinite(value) for row in metrics for value in row.values())
  assert metrics[-1]["reward/each_reference"] > 0
  baselines = tiny_run.final_state(workdir, c).baselines
  assert baselines.shape == (20, 4, 16)
  counts = np.isfinite(baselines).any(-1).sum(-1)
  np.testing.assert_array_equal(counts, 1 + np.arange(20) % 3)
  shown = [json.loads(line) for line in (workdir / "rollouts/step_000002.jsonl").read_text().splitlines()]
  assert any(len(row["references"]) == 3 and row["scorable"] for row in shown)
  for row in shown:
    found = [score for score in row["reward_each_reference"] if score is not None]
    assert len(found) == (len(row["references"]) if row["scorable"] else 0)
    if found:
      assert row["reward_reference"] == pytest.approx(OVER[references](found), abs=1e-6)
      assert np.mean(row["reference_probs"]) == pytest.approx(max(found), abs=1e-6)
      assert "".join(row["reference_tokens"]).strip() == row["reference"]
      assert row["reference"] == row["references"][np.argmax(found)]


@pytest.mark.slow
def test_where_the_first_counts_the_others_change_nothing(tmp_path):
  several, _ = run(tmp_path, "several", questions())
  alone, _ = run(tmp_path, "alone", [row | {"answer": row["answer"][0]} for row in questions()])
  assert tiny_run.timeless(several) == tiny_run.timeless(alone)
  assert (several / "rollouts/step_000002.jsonl").read_text() == (alone / "rollouts/step_000002.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"scorer": "lagged", "scorer_every": 1}, {"baseline_policy": "moving_average"}])
def test_rows_of_one_reference_are_worth_the_same_whatever_is_made_of_several(tmp_path, fields):
  rows = [row | {"answer": row["answer"][0]} for row in questions()]
  first, _ = run(tmp_path, "first", rows, **fields)
  best, _ = run(tmp_path, "best", rows, references="best", **fields)
  for ours, theirs in zip(tiny_run.timeless(best), tiny_run.timeless(first), strict=True):
    ours.pop("reward/each_reference", None)
    assert ours == pytest.approx(theirs, abs=1e-4)
