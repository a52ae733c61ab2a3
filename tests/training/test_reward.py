"""From rollouts to rewards: evidence against the pure functions, shadows, and what is measured between rewards."""

import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import custom_reward, rewards, splicing, validation
from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders, mathverify
from rlpr_jax.grading.agreement import auc, group_auc, within_group_correlation
from rlpr_jax.runs.records import timeout_metrics
from rlpr_jax.training.reward import (
  RewardSettings,
  align,
  compute_rewards,
  credit_of_answer,
  credits_parts,
  gather_evidence,
  looks_at_answers,
  parse_shadow,
  watch_answers,
)
from rlpr_jax.types import Evidence, ExchangedAnswers, Prompt, Rollouts

P, G, E = 3, 4, 7
TEXTS = (
  "<think>a</think><answer> 4 </answer>",
  "<think>a</think><answer> four </answer>",
  "<think>a</think><answer> 4",
  "no tags",
)


def config(**changes):
  c = configs.default()
  c.samples_per_prompt, c.reward.verifier = G, "exact"
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


@pytest.fixture
def evidence():
  """Answers of two tokens, of three in the second group, which begin at different places of the suffix."""
  rng = np.random.default_rng(0)
  mask, logps = np.zeros((P * G, E), bool), np.zeros((P * G, E), np.float32)
  for row in range(P * G):
    begin, count = row % 3, 2 + (row // G == 1)
    mask[row, begin : begin + count] = True
    logps[row, begin : begin + count] = -rng.exponential(1, count)
  scorable = np.resize([True, True, True, False], P * G)
  mask &= scorable[:, None]
  numbered = [
    (7 + p, Prompt(ids=np.arange(3, dtype=np.int32), reference="4", question="2+2", source="test", row=p))
    for p in range(P)
  ]
  fields = dict.fromkeys(Rollouts._fields)
  rollouts = Rollouts(
    **fields
    | {
      "texts": list(TEXTS) * P,
      "lengths": np.arange(P * G, dtype=np.int32) * 300,
      "scorable": scorable,
      "reference_logps": logps * mask,
      "reference_mask": mask,
    }
  )
  baselines = np.full((P, E), np.nan, np.float32)
  baselines[0, :2], baselines[1, :3] = np.log([0.2, 0.1]), np.log([0.3, 0.2, 0.1])  # the third one is not known

  def gather(c):
    return gather_evidence(c, numbered, rollouts, baselines)

  return gather, logps * mask, mask, baselines


def test_own_answers_beside_the_references():
  prompts = [Prompt(ids=np.arange(3, dtype=np.int32), reference=" 4 ", alternatives=("IV",), row=0)]
  own = watch_answers(["4", "", None, "four", "IV", "4.0"], prompts, samples=6)
  assert own.found.tolist() == [[True, True, False, True, True, True]]
  assert own.empty.tolist() == [[False, True, False, False, False, False]]
  assert own.exact.tolist() == [[True, False, False, False, True, False]]
  assert own.lengths.tolist() == [[1, 0, 0, 4, 2, 3]]
  assert own.reference_lengths.tolist() == [[1] * 6]


@pytest.mark.parametrize(("empty", "expected"), [("malformed", [1, 0, 0, 1]), ("allowed", [1, 1, 1, 1])])
def test_an_empty_answer_is_malformed(empty, expected):
  c = config(reward__empty_answer=empty)
  texts = [f"<think>a</think><answer>{answer}</answer>" for answer in ("4", "", " \n ", " . ")]
  prompt = Prompt(ids=np.arange(3, dtype=np.int32), reference="4", row=0)
  blank = np.zeros((G, E), np.float32)
  fields = dict.fromkeys(Rollouts._fields) | {
    "texts": texts, "scorable": np.ones(G, bool), "reference_logps": blank, "reference_mask": blank > 0,
    "lengths": np.full(G, 9, np.int32),
  }  # fmt: skip
  found = gather_evidence(c, [(0, prompt)], Rollouts(**fields), np.zeros((1, E), np.float32))
  assert found.formats.tolist() == [expected]


def test_comparisons_that_took_too_long_are_counted(evidence, monkeypatch):
  """Of each response that of the verifier alone; without one of mathematics there is nothing to count."""

  def late(answer, reference):
    mathverify.process.timeouts += answer == "four"
    return False

  monkeypatch.setattr(mathverify.process, "timeouts", 5)
  monkeypatch.setattr(graders, "verify_any", lambda kind, text, *_: late(splicing.extract_answer(text), ""))
  found = evidence[0](config(reward__verifier="math"))
  assert found.timeouts.tolist() == [[0, 1, 0, 0]] * P
  assert evidence[0](config()).timeouts is None
  batch = SimpleNamespace(evidence=found)
  assert timeout_metrics([batch, batch]) == {"reward/timeouts": 2 * P}
  assert timeout_metrics([SimpleNamespace(evidence=evidence[0](config()))]) == {}


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, lambda e, parts: 0.1 * e.formats + e.repetition),
    ({"reward__answer_length_coefficient": 0.3}, lambda e, parts: 0.1 * e.formats + e.repetition + 0.3 * e.excess),
    ({"reward__kind": "rule"}, lambda e, parts: e.verified),
    ({"reward__kind": "random"}, lambda e, parts: e.noise),
    ({"reward__format_coefficient": -1.0}, lambda e, parts: parts.total),
    (
      {"reward__kind": "mixture", "reward__rule_weight": 0.25},
      lambda e, parts: 0.75 * (0.1 * e.formats + e.repetition) + 0.25 * e.verified,
    ),
  ],
)
def test_what_own_answers_are_credited_with(evidence, changes, expected):
  """All of the reward but what follows from the reasoning alone."""
  gather, *_ = evidence
  c = config(**changes)
  found, settings = gather(c), RewardSettings.of(c.reward)
  parts = compute_rewards(found, settings)
  credit = credit_of_answer(found, parts, settings)
  np.testing.assert_allclose(credit, expected(found, parts), atol=1e-6)
  if not changes:
    np.testing.assert_allclose(parts.total - credit, 0.9 * parts.debiased, atol=1e-6)


def test_penalties_of_lengths(evidence):
  """All of them at once, of answers of 1, 4 and no characters beside "4", and responses of 0 to 3,300 tokens."""
  gather, *_ = evidence
  c = config(
    reward__length_difference_coefficient=0.2, reward__overlong_coefficient=0.5, reward__overlong_buffer=1000,
    reward__concentration_coefficient=0.1, reward__concentration_length=0.0, reward__concentration_gap=1.0,
    reward__answer_length_coefficient=0.3,
  )  # fmt: skip
  found, settings = gather(c), RewardSettings.of(c.reward)
  parts = compute_rewards(found, settings)
  lengths = np.arange(P * G).reshape(P, G) * 300.0
  own = np.array([0, -0.2, 0, 0]) + np.array([0, -0.3, 0, 0])  # "four" is three times too long, twice counted
  overlong = -0.5 * np.clip((lengths - 2072) / 1000, 0, 1)
  ranges = [np.ptp(np.asarray(parts.reference)[p, :3]) for p in range(P)]  # the fourth response has no score
  equals = [0.1 * (ranges[p] < max(ranges) and lengths[p, 0] > 0) for p in range(P)]
  concentration = -np.array(equals)[:, None] * np.array([0, 0.5, 1, 0])
  np.testing.assert_allclose(parts.length, own + overlong + concentration, atol=1e-6)
  assert np.count_nonzero(equals) > 0
  np.testing.assert_allclose(parts.total, 0.9 * parts.debiased + 0.1 * parts.format + parts.length, atol=1e-6)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_own_answers_judged_are_a_part_of_the_reward_and_of_their_credit(evidence, weight):
  gather, *_ = evidence
  rng = np.random.default_rng(0)
  exchanged = ExchangedAnswers(
    *(-rng.exponential(1, shape).astype(np.float32) for shape in ((P, G), (P, G, G))),
    answered=np.tile([True, True, False, False], (P, 1)),
    pairs=np.tile([[True], [True], [True], [False]], (P, 1, G)),
  )
  c = config(reward__conditional_weight=weight)
  found, settings = gather(c)._replace(exchanged=exchanged), RewardSettings.of(c.reward)
  parts = compute_rewards(found, settings)
  judged = rewards.conditional_expectation(*exchanged)
  assert (np.asarray(judged)[:, 2:] == 0).all()
  total = 0.9 * ((1 - weight) * parts.debiased + weight * judged) + 0.1 * found.formats
  np.testing.assert_allclose(parts.total, total, atol=1e-6)
  np.testing.assert_allclose(
    parts.total - credit_of_answer(found, parts, settings), 0.9 * (1 - weight) * parts.debiased, atol=1e-6
  )
  assert looks_at_answers(c)
  assert not looks_at_answers(config())
  with pytest.raises(ValueError, match="conditional_weight: expected evidence with exchanged answers"):
    compute_rewards(found._replace(exchanged=None), settings)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"reward__references": "best", "reward__conditional_weight": 0.5}, "of one reference answer"),
    (
      {"reward__references": "best", "reward__shadow": ("a: conditional_weight=1, references=best",)},
      "of one reference",
    ),
    ({"reward__baseline_policy": "none", "reward__token_weights": "surprise"}, "token weights surprise are made of"),
    (
      {"reward__baseline_policy": "none", "reward__shadow": ("a: token_weights=inverse_base",)},
      "token weights inverse_base are made of",
    ),
    ({"training__answer_gradient": "jepo", "reward__conditional_weight": 0.1}, "config.reward.conditional_weight 0"),
    ({"reward__conditional_weight": 1.5}, "config.reward.conditional_weight: 1.5"),
    ({"filter__share": 0.0}, "config.filter.share: 0.0"),
  ],
)
def test_rewards_that_cannot_be_are_refused(changes, said):
  with pytest.raises(InputError, match=re.escape(said)):
    validation.validate(config(**changes))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"training__answer_gradient": "verifree"}, "config.training.answer_gradient none, found verifree"),
    ({"reward__custom": "mine.py:reward"}, "expected no config.reward.custom"),
    ({"reward__kind": "mixture", "reward__normalization": "separate"}, "expected config.reward.normalization joint"),
  ],
)
def test_credit_by_parts_of_what_has_none_is_refused_and_not_chosen(changes, said):
  with pytest.raises(InputError, match=said):
    validation.validate(config(training__credit="parts", **changes))
  assert not credits_parts(config(**changes))
  assert credits_parts(config())


def test_the_reward_is_the_pure_functions_of_the_parts(evidence):
  gather, logps, mask, baselines = evidence
  c = config()
  parts = jax.device_get(compute_rewards(gather(c), RewardSettings.of(c.reward)))
  for p, g in np.ndindex(P, G):
    row = p * G + g
    there = mask[row]
    r = np.exp(logps[row][there].astype(np.float64)).mean() if there.any() else 0.0
    known = baselines[p][np.isfinite(baselines[p])].astype(np.float64)
    r0 = np.exp(known).mean() if known.size else 0.0
    form = [1.0, 1.0, 0.0, 0.0][g]
    assert parts.reference[p, g] == pytest.approx(r, abs=1e-6)
    assert parts.baseline[p] == pytest.approx(r0, abs=1e-6)
    assert parts.total[p, g] == pytest.approx(0.9 * np.clip(r - r0, 0, 1) + 0.1 * form, abs=1e-6)


def test_kinds(evidence):
  gather, *_ = evidence

  def total(**changes):
    c = config(**changes)
    return np.asarray(compute_rewards(gather(c), RewardSettings.of(c.reward)).total)

  right = np.tile([1.0, 0.0, 0.0, 0.0], (P, 1))
  np.testing.assert_array_equal(total(reward__kind="rule"), right)
  mixed = total(reward__kind="mixture", reward__rule_weight=0.25)
  np.testing.assert_allclose(mixed, 0.75 * total() + 0.25 * right, atol=1e-6)
  noise = total(reward__kind="random")
  assert ((noise >= 0) & (noise < 1)).all()
  assert len(np.unique(noise)) == P * G
  np.testing.assert_array_equal(noise[1], np.random.default_rng([0, 8]).random(G).astype(np.float32))
  # "four" for "4" is three characters too many; without an answer nothing is taken off.
  taken = total() - total(reward__answer_length_coefficient=0.5)
  np.testing.assert_allclose(taken, np.tile([0, 0.5, 0, 0], (P, 1)), atol=1e-6)


def test_weighted_rewards_weigh_their_baselines_alike(evidence):
  """Were only r weighted and r' not, the difference would not be what the reasoning added."""
  gather, logps, mask, baselines = evidence
  c = config(reward__token_weights="base", reward__shaping="identity")
  parts = jax.device_get(compute_rewards(gather(c), RewardSettings.of(c.reward)))
  p0 = np.exp(baselines[0, :2].astype(np.float64))
  weights = 1 - p0
  assert parts.baseline[0] == pytest.approx((weights * p0).sum() / weights.sum(), abs=1e-5)
  r = np.exp(logps[0][mask[0]].astype(np.float64))
  assert parts.reference[0, 0] == pytest.approx((weights * r).sum() / weights.sum(), abs=1e-5)
  plain = jax.device_get(compute_rewards(gather(c), RewardSettings.of(config().reward)))
  assert abs(plain.baseline[0] - parts.baseline[0]) > 1e-3
  assert parts.baseline[2] == 0


def test_no_baseline_is_zero(evidence):
  gather, *_ = evidence
  c = config(reward__baseline_policy="none")
  assert not np.any(compute_rewards(gather(c), RewardSettings.of(c.reward)).baseline)


def test_shadows_are_rewards_of_the_same_evidence(evidence):
  gather, *_ = evidence
  c = config()
  name, settings = parse_shadow(c, "odd: aggregate=product, format_coefficient=0.3, baseline_policy=none")
  assert name == "odd"
  other = config(reward__aggregate="product", reward__format_coefficient=0.3, reward__baseline_policy="none")
  assert settings == RewardSettings.of(other.reward)
  np.testing.assert_array_equal(
    compute_rewards(gather(c), settings).total, compute_rewards(gather(other), RewardSettings.of(other.reward)).total
  )


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("aggregate=product", "expected 'name: field=value, ...'"),
    ("x:", "expected 'name: field=value, ...'"),
    ("x: agregate=product", "'agregate=product', expected field=value with one of kind, aggregate"),
    ("x: format_coefficient=much", "expected a number"),
  ],
)
def test_a_shadow_that_cannot_be_is_one_line(text, line):
  with pytest.raises(InputError, match=r"^config\.reward\.shadow: ") as error:
    parse_shadow(config(), text)
  assert line in str(error.value)


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"reward.shadow": ("x: aggregate=median",)}, "config.reward.shadow x.aggregate: 'median', expected one of mean"),
    ({"reward.shadow": ("x: shaping=clap",)}, "config.reward.shadow x.shaping: shaping 'clap'"),
    ({"reward.shadow": ("x: kind=rule",)}, "config.reward.shadow x.kind: rule needs a verifier"),
    ({"reward.shadow": ("x: baseline_policy=current",)}, "config.reward.shadow x: baselines of the run itself or none"),
    ({"reward.shadow": ("x: kind=random", "x: kind=reference")}, "'x' twice"),
    ({"reward.kind": "mixture"}, "config.reward.kind: mixture needs a verifier"),
    ({"filter.kind": "accuracy"}, "config.filter.kind: accuracy needs a verifier"),
    ({"filter.source_scales": (("stem", -1.0),)}, "config.filter.source_scales: expected pairs"),
    ({"training.dual_clip": 0.5}, "config.training.dual_clip: 0.5, expected 0, or more than 1"),
    ({"reward.baseline_rate": 0.0}, "config.reward.baseline_rate: 0.0, expected more than 0"),
    ({"training.loss": "ppo"}, "config.training.loss: 'ppo', expected one of clip, truncated"),
  ],
)
def test_settings_that_cannot_be_are_one_line(changes, line):
  c = configs.default()
  with c.ignore_type():
    c.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    validation.validate(c)
  assert line in str(error.value)


def test_aligned_answers_begin_in_column_0():
  mask = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
  logps = np.array([[9, -1, -2, 9], [-3, 9, 9, -4], [9, 9, 9, 9]], np.float32)
  found, there = align(logps, mask)
  np.testing.assert_array_equal(there, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(found[:2, :2], [[-1, -2], [-3, -4]])


def test_auc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  scores, right = rng.integers(0, 5, (6, 4)).astype(np.float32), rng.random((6, 4)) < 0.4
  pairs = [
    (good > bad) + (good == bad) / 2 for good, bad in itertools.product(scores[right].tolist(), scores[~right].tolist())
  ]
  assert auc(scores, right) == pytest.approx(np.mean(pairs))
  assert auc(scores, np.zeros_like(right)) is None


def test_auc_within_groups_compares_no_two_groups():
  rng = np.random.default_rng(0)
  scores, right = rng.integers(0, 5, (6, 4)).astype(np.float32), rng.random((6, 4)) < 0.4
  scores[0], right[0] = [1, np.nan, 0, np.nan], [True, True, False, False]  # what is not finite has no say
  pairs = [
    (good > bad) + (good == bad) / 2
    for row, is_right in zip(scores, right, strict=True)
    for good, bad in itertools.product(row[is_right].tolist(), row[~is_right].tolist())
    if np.isfinite(good) and np.isfinite(bad)
  ]
  assert group_auc(scores, right) == pytest.approx(np.mean(pairs))
  assert group_auc(scores + 10 * np.arange(6)[:, None], right) == pytest.approx(np.mean(pairs))
  assert group_auc(scores, np.ones_like(right)) is None


def test_correlation_is_within_groups():
  rng = np.random.default_rng(0)
  totals = rng.normal(size=(5, 4))
  moved = 3 * totals + rng.normal(size=(5, 1))  # what a whole group shares does not matter
  assert within_group_correlation(totals, moved) == pytest.approx(1)
  assert within_group_correlation(totals, -moved) == pytest.approx(-1)
  assert within_group_correlation(totals, np.ones((5, 4))) is None


def test_the_module_is_given_what_rewards_says():
  """Every aggregate and shaping can be a shadow."""
  for aggregate, shaping in itertools.product(rewards.AGGREGATES, ("clip", "rank", "zscore", "threshold_0.1")):
    c = configs.default()
    c.reward.shadow = (f"x: aggregate={aggregate}, shaping={shaping}",)
    validation.validate(c)


def evidence_of(prompts: int, samples: int) -> Evidence:
  shape = (prompts, samples)
  fields = {name: np.zeros(shape, np.float32) for name in Evidence._fields} | {"formats": np.ones(shape, np.float32)}
  return Evidence(**fields)


@pytest.mark.parametrize(
  ("given", "found"),
  [
    (None, "gave NoneType"),
    (1.0, "gave float"),
    ("good", "gave str"),
    ([0.1, 0.2, 0.3], r"gave an array of shape \(3,\)"),
    (np.zeros((3, 2)), r"gave an array of shape \(3, 2\)"),
    (np.zeros((2, 3, 1)), r"gave an array of shape \(2, 3, 1\)"),
    ([[1], [2, 3]], "gave list"),
  ],
)
def test_a_custom_reward_of_another_shape_is_refused(given, found):
  with pytest.raises(InputError, match=rf"^config\.reward\.custom: {found}, expected an array of shape \(2, 3\)"):
    custom_reward.compute(lambda *_: given, evidence_of(2, 3), [""] * 6, [None, None])


def test_a_custom_reward_is_taken_as_it_is():
  rewards = np.arange(6).reshape(2, 3)
  found = custom_reward.compute(lambda *_: rewards.tolist(), evidence_of(2, 3), [""] * 6, [None, None])
  np.testing.assert_array_equal(found, rewards)
  assert found.dtype == np.float32
  # A process without prompts asks nothing.
  assert custom_reward.compute(None, evidence_of(0, 3), [], []).shape == (0, 3)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{}/none.py:reward", "no such file, expected FILE.py:FUNCTION"),
    ("{}/mine.py", "no such file, expected FILE.py:FUNCTION"),
    ("{}/mine.py:other", "no function other in the file"),
    ("{}/mine.py:number", "no function number in the file"),
    ("{}/wrong.py:reward", "ZeroDivisionError: division by zero"),
  ],
)
def test_a_custom_reward_that_is_not_there(tmp_path, text, said):
  (tmp_path / "mine.py").write_text("number = 1\n\ndef reward(evidence, texts, prompts):\n  return number\n")
  (tmp_path / "wrong.py").write_text("1 / 0\n")
  assert custom_reward.load(f"{tmp_path}/mine.py:reward")(None, None, None) == 1
  with pytest.raises(InputError, match=r"^config\.reward\.custom: [^\n]+$") as error:
    custom_reward.load(text.format(tmp_path))
  assert str(error.value).endswith(said)
