"""The method's variants, each as a whole run of the training program.

First each by itself, for two steps of a tiny policy: what metrics, rollouts and checkpoints say is held against what
the variant is, computed anew from the texts and the weights on disk. Then, slowly, many at once: they run, write what
they measured, and go on from a checkpoint as if whole.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from rlpr_jax import export, huggingface, models, report, sft
from rlpr_jax import train as training_program
from rlpr_jax.config import default
from rlpr_jax.data import builtin
from rlpr_jax.policy import Policy, load_policy
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.sampling.engine import Session
from rlpr_jax.training import optimizer
from rlpr_jax.training.run import set_up
from tests.tiny_run import final_state, rows, timeless, tiny

# The policy thinks of one number or the other and answers it, now and then twice or not at all. To d it is never right.
REFERENCES = {"a": "12", "b": "21", "c": "12", "d": "33"}
RESPONSES = (
  *("<think>1</think><answer> 12 </answer>", "<think>2</think><answer> 21 </answer>") * 3,
  "<think>2</think><answer> 2121 </answer>",
  "<think>12</think>",
)
PROMPTS, SAMPLES, LONGEST = len(REFERENCES), 4, 12
EACH_STEP = {"log.checkpoint_every": 1}  # of a run whose checkpoints between the first and the last are read
# Only the dual clip is within reach. It changes nothing in a first pass, so that all who take it can share a program.
DUAL_CLIP = {"training.dual_clip": 1.001, "training.clip_low": 1.0, "training.clip_high": 1e6}
cached_optimizer = functools.cache(optimizer.clipped_optimizer)  # one object: variants share the update's program


class Variant(NamedTuple):
  """A finished run and what it wrote."""

  config: ConfigDict
  workdir: pathlib.Path
  metrics: dict[int, dict[str, float]]  # by step, from 1
  rollouts: dict[int, list[dict[str, Any]]]  # by step; every response that was drawn, a question's together

  def column(self, step: int, name: str) -> np.ndarray:
    """[P, G] of a step's rollouts."""
    return np.array([row[name] for row in self.rollouts[step]]).reshape(PROMPTS, SAMPLES)

  def right(self, step: int) -> np.ndarray:
    """[P, G] 1.0 where the answer is the reference."""
    answers = [re.findall("<answer>(.*?)</answer>", text) for text in self.column(step, "response").flat]
    answers = np.array([found[0].strip() if found else "" for found in answers]).reshape(PROMPTS, SAMPLES)
    return (answers == self.column(step, "reference")).astype(float)

  def of_reference(self, step: int) -> np.ndarray:
    """[P, G] the reward of the method itself, put together from its parts."""
    debiased, formats, repetition = (self.column(step, f"reward_{x}") for x in ("debiased", "format", "repetition"))
    return 0.9 * debiased + 0.1 * formats + repetition

  def policy(self, step: int) -> tuple[Policy, models.Params]:
    """The model and all parameters of the checkpoint after a step."""
    policy = load_policy(self.config)
    return policy, policy.merged_params(restore_params(self.workdir, step, policy.trained)[1])


def small(model: pathlib.Path) -> ConfigDict:
  """Two steps of a model, each on every question."""
  c = default()
  c.compilation_cache = ""
  c.steps = 2
  c.prompts_per_step = c.rollout.prompts_per_draw = PROMPTS
  c.samples_per_prompt = SAMPLES
  c.max_draws = 1
  c.model.path = str(model)
  c.data.path = str(model.parent / "questions.jsonl")
  c.data.instruction = ""
  c.data.prompt_limit = 4
  c.data.max_reference_length = 8
  c.rollout.max_response_length = LONGEST
  c.rollout.slots = 12
  c.rollout.decode_steps = 4
  c.rollout.prefill_prompts = 2
  c.rollout.score_rows = 4
  c.reward.verifier = "exact"
  c.filter.kind = "off"
  c.training.minibatches = 1
  c.training.micro_batch_rows = 4
  c.training.row_length = 24  # of all variants, also those whose rows end with a reference
  c.training.aggregate = "seq_mean_token_sum"  # tokens weigh the same in all
  c.training.entropy_coefficient = 0.0
  c.training.learning_rate = 2e-3
  c.training.credit = "response"  # one advantage a response, as it is computed by hand here
  c.evaluation.prompts = 0
  c.log.rollouts = PROMPTS * SAMPLES
  c.log.keep_checkpoints = 10
  return c


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
  """A pretrained model of one layer that has learnt the responses, to any question."""
  directory = tmp_path_factory.mktemp("variants")
  for name, lines in (
    ("questions", [{"question": text, "answer": reference} for text, reference in REFERENCES.items()]),
    ("demonstrations", [{"prompt": text, "response": response} for text in REFERENCES for response in RESPONSES]),
  ):
    (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  tokenizer = builtin.tokenizer()
  shape = models.ModelConfig(len(tokenizer), 16, 32, 1, 2, 2, 8, qk_norm=True, max_length=32)
  huggingface.save_pretrained(directory / "random", shape, models.init_params(shape, 0), tokenizer)
  c = small(directory / "random")
  c.warm_start.path = str(directory / "demonstrations.jsonl")
  c.warm_start.steps, c.warm_start.batch_size, c.log.checkpoint_every = 60, 16, 60
  c.warm_start.optimizer, c.warm_start.adam_learning_rate = "adam", 0.02
  sft.sft(c, directory / "sft")
  export.export(directory / "sft", directory / "base", None, "float32", adapter=False)
  return directory / "base"


@pytest.fixture(scope="module")
def train(base, tmp_path_factory) -> Callable[[dict[str, Any]], Variant]:
  """Trains with some fields of the config otherwise; the same fields once."""
  finished: dict[str, Variant] = {}

  def run(fields: dict[str, Any]) -> Variant:
    name = str(sorted(fields.items()))
    if name not in finished:
      c, workdir = small(base), tmp_path_factory.mktemp("variant")
      c.update_from_flattened_dict(fields)
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda workdir: workdir)  # takes longer than the steps
        patch.setattr(optimizer, "clipped_optimizer", cached_optimizer)
        training_program.train(c, workdir)
      metrics = {row["step"]: row for row in rows(workdir)}
      texts = {step: (workdir / f"rollouts/step_{step:06d}.jsonl").read_text() for step in metrics}
      rollouts = {step: [json.loads(line) for line in text.splitlines()] for step, text in texts.items()}
      finished[name] = Variant(c, workdir, metrics, rollouts)
    return finished[name]

  return run


@pytest.fixture(scope="module")
def plain(train) -> Variant:
  """The method itself, for three steps."""
  return train({"steps": 3} | EACH_STEP)


@functools.partial(jax.jit, static_argnames=("model",))
def next_logprobs(model: nnx.GraphDef, params: models.Params, tokens: jax.Array) -> jax.Array:
  """Log-probabilities [B, T - 1] of each token but the first after those before it."""
  decoder = nnx.merge(model, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  logps = jax.nn.log_softmax(decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens))))
  return jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


def logprobs(of: tuple[Policy, models.Params], texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
  """Of each pair, the log-probabilities of the second text's tokens after the first."""
  policy, params = of
  before, after = ([policy.tokenizer.encode(pair[i], add_special_tokens=False) for pair in texts] for i in (0, 1))
  tokens = np.zeros((PROMPTS * SAMPLES, 24), np.int32)
  for row, ids in enumerate(zip(before, after, strict=True)):
    tokens[row, : sum(map(len, ids))] = np.concatenate(ids)
  found = np.asarray(next_logprobs(policy.model, params, tokens))
  return [found[i, len(one) - 1 :][: len(other)] for i, (one, other) in enumerate(zip(before, after, strict=True))]


def sampled(rollout: dict[str, Any]) -> tuple[str, str]:
  """The prompt, and what was sampled after it."""
  return f"<q>{rollout['question']}<a>", rollout["response"] + "<end>" * (rollout["finish"] == "eos")


def spliced(rollout: dict[str, Any]) -> tuple[str, str]:
  """The prompt and the response up to its answer, and the reference."""
  kept, tag, rest = rollout["response"].partition("<answer>")
  space = re.match(r"\s*", rest)[0] or " "
  return f"<q>{rollout['question']}<a>{kept}{tag}{space}", rollout["reference"]


def unreasoned(prefix: str) -> list[tuple[str, str]]:
  """The prompts with a prefix, and their references."""
  return [(f"<q>{question}<a>{prefix}", reference) for question, reference in REFERENCES.items()]


def assert_normalized(variant: Variant, step: int, scale: Callable[[np.ndarray], np.ndarray]) -> None:
  """Advantages are how far the totals are from their groups' means, on a scale that the groups' spreads give."""
  totals = variant.column(step, "reward_total")
  spreads = totals.std(axis=1, ddof=1, keepdims=True)
  np.testing.assert_allclose(variant.column(step, "group_std"), spreads + np.zeros(SAMPLES), atol=1e-6)
  found = variant.column(step, "advantage") * scale(spreads)
  np.testing.assert_allclose(found, totals - totals.mean(axis=1, keepdims=True), atol=2e-6)
  assert np.abs(found).max() > 0.01


def by_std(spreads: np.ndarray) -> np.ndarray:
  """The scale of GRPO."""
  return spreads + 1e-6


def policy_loss(variant: Variant, step: int) -> float:
  """Loss of a step whose ratios are all 1: -advantage for each token that was sampled and is trained."""
  tokens = variant.column(step, "length")
  if variant.config.training.answer_gradient != "none":  # what stands before the reference
    before = [row["response"].partition("<answer>")[0] for row in variant.rollouts[step]]
    cut = np.array([len(builtin.tokenizer().encode(text)) for text in before]).reshape(tokens.shape)
    tokens = np.where(variant.column(step, "scorable"), cut, tokens)
  kept = variant.column(step, "kept")
  return -(kept * tokens * variant.column(step, "advantage")).sum() / (kept.sum() * LONGEST)


def assert_same_tree(one: models.Params, other: models.Params) -> None:
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_method_itself_has_no_variants_terms(plain):
  for step, row in plain.metrics.items():
    assert all(np.isfinite(value) for value in row.values())
    assert not row.keys() & {"update/kl", "update/answer_loss"}
    assert row["sampler_gap/recomputed"] == 0
    assert row["update/loss"] == pytest.approx(policy_loss(plain, step), abs=1e-5)
    np.testing.assert_allclose(plain.column(step, "reward_total"), plain.of_reference(step), atol=1e-6)
    assert_normalized(plain, step, by_std)
  for of_step in (plain.right, lambda step: plain.column(step, "scorable")):
    assert len(np.unique([of_step(step) for step in plain.metrics])) == 2, "all alike: what follows would show little"
  state = final_state(plain.workdir, plain.config)
  assert (state.initial, state.lagged) == ({}, {})
  for before, after in zip(jax.tree.leaves(plain.policy(0)[1]), jax.tree.leaves(state.params), strict=True):
    assert np.abs(before - after).max() > 1e-4


@pytest.mark.parametrize(
  ("fields", "scored_by"),
  [
    ({}, (0, 1, 2)),
    ({"reward.scorer": "initial"}, (0, 0, 0)),
    ({"reward.scorer": "lagged", "reward.scorer_every": 2}, (0, 0, 2)),
  ],
  ids=["policy", "initial", "lagged"],
)
def test_references_are_scored_by_the_policy_of_the_step_that_the_scorer_is_from(train, fields, scored_by):
  variant = train({"steps": 3} | EACH_STEP | fields)
  policies = [variant.policy(step) for step in range(4)]
  for step, scorer in enumerate(scored_by, 1):
    scorable = [row for row in variant.rollouts[step] if row["scorable"]]
    found = np.array([row["reference_probs"] for row in scorable])
    by_each = [np.exp(logprobs(policy, list(map(spliced, scorable)))) for policy in policies]
    np.testing.assert_allclose(found, by_each[scorer], atol=1e-5)
    assert all(np.abs(found - by_each[other]).max() > 1e-4 for other in range(4) if other != scorer)
    np.testing.assert_allclose([row["reward_reference"] for row in scorable], found.mean(axis=1), atol=1e-6)
  state = final_state(variant.workdir, variant.config)
  for copy, kind in ((state.initial, "initial"), (state.lagged, "lagged")):
    assert_same_tree(copy, policies[scored_by[-1]][1] if variant.config.reward.scorer == kind else {})


@pytest.mark.parametrize(
  ("fields", "prefix", "shares"),  # shares of the policies after steps 0 and 1 in the baselines of steps 1 and 2
  [
    ({"steps": 3}, " ", [(1, 0), (1, 0)]),
    ({"reward.baseline_prefix": "tagged"}, "<answer> ", [(1, 0), (1, 0)]),
    ({"reward.baseline_policy": "current"}, " ", [(1, 0), (0, 1)]),
    ({"reward.baseline_policy": "moving_average", "reward.baseline_rate": 0.25}, " ", [(1, 0), (0.75, 0.25)]),
  ],
  ids=["initial", "tagged", "current", "moving_average"],
)
def test_baselines_are_of_the_policy_and_the_prefix_that_are_named(train, fields, prefix, shares):
  variant = train(EACH_STEP | fields)
  first, second = (np.exp(logprobs(variant.policy(step), unreasoned(prefix))).mean(axis=1) for step in (0, 1))
  assert np.abs(first - second).max() > 1e-4
  for step, (one, other) in enumerate(shares, 1):
    expected = (one * first + other * second)[variant.column(step, "row")]
    np.testing.assert_allclose(variant.column(step, "reward_baseline"), expected, atol=1e-5)
    gain = variant.column(step, "reward_reference") - expected
    np.testing.assert_allclose(variant.column(step, "reward_debiased"), np.clip(gain, 0, 1), atol=1e-5)
  saved = final_state(variant.workdir, variant.config).baselines
  np.testing.assert_allclose(np.nanmean(np.exp(saved), axis=1), one * first + other * second, atol=1e-5)


@pytest.mark.slow
def test_a_baseline_by_an_average_of_the_policys_weights(train):
  fields = {"steps": 3, "reward.baseline_policy": "averaged_weights", "reward.baseline_rate": 0.25}
  variant = train(EACH_STEP | fields)
  policies = [variant.policy(step) for step in range(4)]
  averaged = policies[0][1]
  for step in (1, 2, 3):
    found = np.exp(logprobs((policies[0][0], averaged), unreasoned(" "))).mean(axis=1)
    np.testing.assert_allclose(variant.column(step, "reward_baseline"), found[variant.column(step, "row")], atol=1e-5)
    averaged = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, averaged, policies[step][1])
  saved = final_state(variant.workdir, variant.config).averaged
  for ours, theirs in zip(jax.tree.leaves(saved), jax.tree.leaves(averaged), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert np.abs(np.exp(logprobs(policies[2], unreasoned(" "))).mean(axis=1) - found).max() > 1e-4


def test_rule_rewards_right_answers_alone(train):
  variant = train({"reward.kind": "rule"})
  for step in (1, 2):
    np.testing.assert_array_equal(variant.column(step, "reward_total"), variant.right(step))
    assert variant.metrics[step]["reward/total"] == pytest.approx(variant.right(step).mean())
    assert_normalized(variant, step, by_std)


def test_mixture_weighs_reference_and_rule(train):
  variant = train({"reward.kind": "mixture", "reward.rule_weight": 0.3})
  for step in (1, 2):
    expected = 0.7 * variant.of_reference(step) + 0.3 * variant.right(step)
    np.testing.assert_allclose(variant.column(step, "reward_total"), expected, atol=1e-6)
    assert_normalized(variant, step, by_std)


def test_separate_mixture_normalizes_each_half_by_itself(train):
  joint = train({"reward.kind": "mixture", "reward.rule_weight": 0.3})
  variant = train({"reward.kind": "mixture", "reward.rule_weight": 0.3, "reward.normalization": "separate"})
  halves = [variant.of_reference(1), variant.right(1)]
  spreads = [half.std(axis=1, ddof=1, keepdims=True) for half in halves]
  parts = [(x - x.mean(axis=1, keepdims=True)) / (s + 1e-6) for x, s in zip(halves, spreads, strict=True)]
  compared = spreads[0][:, 0] > 1e-3  # of others rounding decides
  assert compared.sum() > 1
  expected = (0.7 * parts[0] + 0.3 * parts[1])[compared]
  np.testing.assert_allclose(variant.column(1, "advantage")[compared], expected, atol=1e-3)
  for name in ("reward_total", "group_std"):  # what is normalised is the same
    np.testing.assert_allclose(variant.column(1, name), joint.column(1, name), atol=1e-6)
  assert np.abs(variant.column(1, "advantage") - joint.column(1, "advantage")).max() > 0.01


@pytest.fixture(scope="module")
def shadowed(train) -> Variant:
  shadows = (
    "bare: baseline_policy=none", "product: aggregate=product", "strict: format_coefficient=-1, shaping=identity",
    "short: answer_length_coefficient=0.2", "rule: kind=rule", "half: kind=mixture", "random: kind=random",
  )  # fmt: skip
  return train({"steps": 3, "reward.shadow": shadows})


def test_random_rewards_do_not_depend_on_the_responses(train, shadowed):
  """Steps of two runs whose policies have parted: other responses, the same rewards."""
  variant, steps = train({"steps": 3, "reward.kind": "random"}), (1, 2, 3)
  assert any((variant.column(step, "response") != shadowed.column(step, "response")).any() for step in steps)
  for step in steps:
    np.testing.assert_array_equal(variant.column(step, "reward_total"), shadowed.column(step, "shadow_random"))
    assert_normalized(variant, step, by_std)
  noise = np.concatenate([variant.column(step, "reward_total") for step in steps])
  assert len(set(noise.flat)) == noise.size
  assert 0 <= noise.min() < noise.max() < 1


def test_shadow_rewards_are_measured_and_not_trained_on(plain, shadowed):
  measured = [{k: v for k, v in row.items() if not k.startswith("shadow/")} for row in timeless(shadowed.workdir)]
  assert measured == timeless(plain.workdir)
  assert_same_tree(shadowed.policy(3)[1], plain.policy(3)[1])
  without = [np.exp(sum(x)) for x in logprobs(shadowed.policy(0), unreasoned(" "))]
  apart = dict.fromkeys(("bare", "product", "strict", "short", "rule", "half"), 0.0)
  for step in (1, 2, 3):
    reference, baseline, formats = (shadowed.column(step, f"reward_{x}") for x in ("reference", "baseline", "format"))
    repetition = shadowed.column(step, "reward_repetition")
    products = [np.prod(row["reference_probs"]) * row["scorable"] for row in shadowed.rollouts[step]]
    products = np.reshape(products, (PROMPTS, SAMPLES)) - np.array(without)[shadowed.column(step, "row")]
    answers = [re.findall("<answer>(.*?)</answer>", text) for text in shadowed.column(step, "response").flat]
    over = np.reshape([max(0, len(x[0].strip()) - 2) / 2 if x else 0 for x in answers], (PROMPTS, SAMPLES))
    expected = {
      "bare": 0.9 * np.clip(reference, 0, 1) + 0.1 * formats + repetition,
      "product": 0.9 * np.clip(products, 0, 1) + 0.1 * formats + repetition,
      "strict": np.where(formats == 1, reference - baseline, -1) + repetition,
      "short": shadowed.of_reference(step) - 0.2 * np.minimum(over, 1),
      "rule": shadowed.right(step),
      "half": (shadowed.of_reference(step) + shadowed.right(step)) / 2,
    }
    for name, values in expected.items():
      np.testing.assert_allclose(shadowed.column(step, f"shadow_{name}"), values, atol=1e-5, err_msg=name)
      assert shadowed.metrics[step][f"shadow/{name}/total"] == pytest.approx(values.mean(), abs=1e-5)
      apart[name] = max(apart[name], np.abs(values - shadowed.column(step, "reward_total")).max())
  assert min(apart.values()) > 1e-3, f"a shadow is the reward itself: {apart}"


def likelihoods(of: tuple[Policy, models.Params], places: Sequence[str], ends: Sequence[str]) -> np.ndarray:
  """[P, G] log-probability of a text for each response, behind its reasoning."""
  return np.array([x.sum() for x in logprobs(of, list(zip(places, ends, strict=True)))]).reshape(PROMPTS, SAMPLES)


def test_own_answers_are_judged_by_the_reasoning_that_leads_to_them(train):
  """CER, alone, mixed with the method's reward and as a shadow, against whole passes over each pair's text."""
  shadow = ("all: conditional_weight=1", "half: conditional_weight=0.5", "rule: conditional_weight=1, kind=mixture")
  variant = train(EACH_STEP | {"reward.conditional_weight": 1.0, "reward.shadow": shadow})
  for step in (1, 2):
    policy, drawn = variant.policy(step - 1), variant.rollouts[step]
    places = [spliced(row)[0] for row in drawn]
    answers = [re.findall("<answer>(.*?</answer>)", row["response"]) for row in drawn]
    answers = [
      found[0].lstrip() if row["scorable"] and found else "" for row, found in zip(drawn, answers, strict=True)
    ]
    answers = [answer if len(answer) < len("2121 </answer>") else "" for answer in answers]  # more than references may
    references = [f"{row['reference']} </answer>" for row in drawn]

    p, scorable = likelihoods(policy, places, references), variant.column(step, "scorable")
    own = np.array(answers).reshape(PROMPTS, SAMPLES)
    expected = np.zeros((PROMPTS, SAMPLES))
    for j in range(SAMPLES):  # the answer of the j-th response of each group, behind all of its reasonings
      q = likelihoods(policy, places, np.repeat(own[:, j], SAMPLES).tolist())
      weights = scorable * np.exp(q)
      expected[:, j] = np.where(own[:, j] != "", (weights * np.exp(p)).sum(1) / np.maximum(weights.sum(1), 1e-30), 0)
    formats, repetition = variant.column(step, "reward_format"), variant.column(step, "reward_repetition")
    np.testing.assert_allclose(variant.column(step, "reward_conditional"), expected, atol=1e-5)
    total = 0.9 * expected + 0.1 * formats + repetition
    half = 0.45 * (expected + variant.column(step, "reward_debiased")) + 0.1 * formats + repetition
    np.testing.assert_allclose(variant.column(step, "reward_total"), total, atol=1e-5)
    np.testing.assert_allclose(variant.column(step, "shadow_all"), total, atol=1e-5)
    np.testing.assert_allclose(variant.column(step, "shadow_half"), half, atol=1e-5)
    np.testing.assert_allclose(variant.column(step, "shadow_rule"), (total + variant.right(step)) / 2, atol=1e-5)
    assert np.unique(expected.round(6)).size > 4
    assert variant.metrics[step]["seconds/exchange"] > 0
    assert_normalized(variant, step, by_std)


def test_a_reward_of_ones_own_is_trained_on(train, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "import numpy as np\n"
    "def reward(evidence, texts, prompts):\n"
    "  return ord(prompts[0].question) - np.reshape([len(text) for text in texts], evidence.formats.shape)\n"
  )
  variant = train({"reward.custom": f"{file}:reward"})
  for step in (1, 2):
    lengths = np.vectorize(len)(variant.column(step, "response"))
    first = ord(variant.rollouts[step][0]["question"])
    np.testing.assert_array_equal(variant.column(step, "reward_total"), first - lengths)
    assert_normalized(variant, step, by_std)


@pytest.mark.parametrize(
  ("advantages", "scale"), [("none", np.ones_like), ("leave_one_out", lambda x: np.full_like(x, 3 / 4))]
)
def test_advantages_are_on_the_scale_that_is_named(train, advantages, scale):
  variant = train({"training.advantages": advantages})
  for step in (1, 2):
    assert_normalized(variant, step, scale)
    assert variant.metrics[step]["update/loss"] == pytest.approx(policy_loss(variant, step), abs=1e-5)


@pytest.mark.parametrize("kind", ["accuracy", "ema", "fixed", "share"])
def test_groups_that_the_filter_drops_are_not_trained_on(train, kind):
  of_ema = {"filter.collect_from": 1, "filter.start": 2, "filter.scale": 0.5}
  variant = train({"filter.kind": kind, "filter.threshold": 0.2, "filter.share": 0.5} | of_ema)
  spreads = {step: variant.column(step, "reward_total").std(axis=1, ddof=1) for step in (1, 2)}
  threshold = {
    "accuracy": {1: 0.0, 2: 0.0}, "share": {1: 0.0, 2: 0.0},
    "fixed": {1: 0.2, 2: 0.2}, "ema": {1: 0.0, 2: spreads[1].mean() / 2},
  }[kind]  # fmt: skip
  decisions = set()
  for step, row in variant.metrics.items():
    if kind == "accuracy":
      share = variant.right(step).mean(axis=1)
      keep = (share > 0) & (share < 1)
    elif kind == "share":  # the largest, until they have half of all
      largest = np.sort(spreads[step])[::-1]
      needed = 1 + int(np.argmax(np.cumsum(largest) >= largest.sum() / 2 - 0.01))
      keep = spreads[step] >= largest[needed - 1]
    else:
      keep = spreads[step] >= threshold[step]
    decisions |= set(keep)
    np.testing.assert_array_equal(variant.column(step, "kept"), np.repeat(keep[:, None], SAMPLES, axis=1))
    assert row["filter/kept"] == row["filter/trained"] == keep.sum()
    assert row["filter/threshold"] == pytest.approx(threshold[step], abs=1e-6)
    if keep.any():
      assert row["update/loss"] == pytest.approx(policy_loss(variant, step), abs=1e-5)
  assert decisions == {True, False}


VERIFREE = {"training.answer_gradient": "verifree", "training.answer_coefficient": 0.5}


def test_verifree_raises_references_by_their_rewards(train):
  variant = train(DUAL_CLIP | VERIFREE)
  for step in (1, 2):
    likelihoods = [np.log(row["reference_probs"]).sum() for row in variant.rollouts[step]]
    weights = 0.5 * variant.column(step, "reward_debiased").reshape(-1)
    expected = -(weights * likelihoods).sum() / (len(likelihoods) * LONGEST)
    assert variant.metrics[step]["update/answer_loss"] == pytest.approx(expected, rel=1e-3)
    assert variant.metrics[step]["update/loss"] == pytest.approx(policy_loss(variant, step), abs=1e-5)
    assert_normalized(variant, step, by_std)


@pytest.mark.parametrize(
  ("fields", "weigh"),  # of the reference's probabilities p, -log p weighs in the loss
  [
    ({"training.answer_gradient": "reward"}, lambda p: p / len(p)),
    (
      {"training.answer_gradient": "reward", "reward.aggregate": "geometric_mean"},
      lambda p: np.full(len(p), np.prod(p) ** (1 / len(p)) / len(p)),
    ),
    ({"training.answer_gradient": "likelihood", "training.answer_coefficient": 0.3}, lambda p: np.full(len(p), 0.3)),
  ],
  ids=["mean", "geometric", "likelihood"],
)
def test_the_reward_is_climbed_through_the_reference(train, fields, weigh):
  variant = train(DUAL_CLIP | fields)
  for step in (1, 2):
    probs = [np.array(row["reference_probs"]) for row in variant.rollouts[step] if row["scorable"]]
    expected = -sum((weigh(p) * np.log(p)).sum() for p in probs) / (PROMPTS * SAMPLES * LONGEST)
    assert variant.metrics[step]["update/answer_loss"] == pytest.approx(expected, rel=1e-3)
    assert variant.metrics[step]["update/loss"] == pytest.approx(policy_loss(variant, step), abs=1e-5)


@pytest.mark.slow
def test_responses_that_were_cut_are_left_out_of_the_loss(train):
  """The others and their groups stay as they were: what is left out has an advantage, and no token in the loss."""
  limit = {"rollout.max_response_length": LONGEST - 3}
  variant = train(limit | {"training.truncated": "left_out"})
  trained = train(limit)
  assert variant.rollouts[1] == trained.rollouts[1]
  cut = variant.column(1, "finish") == "length"
  assert 0 < cut.sum() < cut.size
  advantages, lengths = variant.column(1, "advantage"), variant.column(1, "length")
  sequences = {"left out": cut.size - cut.sum(), "trained": cut.size}
  for name, of, inside in (("left out", variant, ~cut), ("trained", trained, np.ones_like(cut))):
    expected = -(inside * lengths * advantages).sum() / (sequences[name] * (LONGEST - 3))
    assert of.metrics[1]["update/loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_ratios_of_whole_sequences_are_those_of_their_tokens_in_the_mean(train):
  fields = {"training.epochs_per_step": 2, "training.clip_low": 1.0, "training.clip_high": 1e6}
  tokens, sequences = train(fields), train(fields | {"training.ratio": "sequence"})
  assert sequences.rollouts[1] == tokens.rollouts[1]
  worst = [variant.metrics[1]["update/ratio_worst"] for variant in (sequences, tokens)]
  assert 1e-4 < worst[0] < worst[1]


def test_jepo_climbs_the_bound_of_the_group(train):
  variant = train(DUAL_CLIP | {"training.answer_gradient": "jepo"})
  for step in (1, 2):
    likelihoods = np.array([np.prod(row["reference_probs"]) for row in variant.rollouts[step]]).reshape(-1, SAMPLES)
    scorable, formats = variant.column(step, "scorable"), variant.column(step, "reward_format")
    weights, advantages = np.zeros((2, PROMPTS, SAMPLES))
    for p, valid in enumerate(scorable):
      total, count = likelihoods[p, valid].sum(), valid.sum()
      weights[p, valid] = SAMPLES * likelihoods[p, valid] / total
      if count > 1:
        without = (total - likelihoods[p, valid]) / (count - 1)
        advantages[p, valid] = SAMPLES * np.log(total / count / without)
    advantages += 0.1 * (formats - formats.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(variant.column(step, "advantage"), advantages, atol=1e-3)
    expected = -(weights * np.log(likelihoods)).sum() / (likelihoods.size * LONGEST)
    assert variant.metrics[step]["update/answer_loss"] == pytest.approx(expected, rel=1e-3)
    assert variant.metrics[step]["update/loss"] == pytest.approx(policy_loss(variant, step), abs=1e-4)


@pytest.mark.slow
def test_truncated_loss_caps_the_weight_of_every_token(train, plain):
  """Where all ratios are 1 a cap of a half halves the gradient of the clipped loss."""
  variant = train({"training.loss": "truncated", "training.ratio_cap": 0.5})
  assert variant.rollouts[1] == plain.rollouts[1]
  found, clipped = variant.metrics[1], plain.metrics[1]
  assert found["update/grad_norm"] == pytest.approx(clipped["update/grad_norm"] / 2, rel=1e-4)
  assert (found["update/clip_fraction"], clipped["update/clip_fraction"]) == (1, 0)
  assert found["update/ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_dual_clip_is_another_clip_in_the_second_pass(train):
  variant = train(DUAL_CLIP | VERIFREE | {"training.epochs_per_step": 2})
  assert 0 < variant.metrics[1]["update/clip_fraction"] < 0.5
  assert variant.metrics[1]["update/ratio_worst"] > 0.001
  once = train(DUAL_CLIP | VERIFREE)
  assert (once.metrics[1]["update/clip_fraction"], once.rollouts[1]) == (0, variant.rollouts[1])


ADAPTERS = {"lora.rank": 2, "lora.base_dtype": "float32", "lora.targets": "query,value"}


@pytest.mark.parametrize("fields", [{}, pytest.param(ADAPTERS, marks=pytest.mark.slow)], ids=["whole", "lora"])
def test_kl_is_measured_from_the_initial_policy(train, plain, fields):
  variant = train(EACH_STEP | {"training.kl_coefficient": 3.0} | fields)
  assert variant.metrics[1]["update/kl"] == pytest.approx(0, abs=1e-9)
  if not fields:  # nothing pulls yet
    assert variant.metrics[1]["update/grad_norm"] == pytest.approx(plain.metrics[1]["update/grad_norm"], rel=1e-3)
    assert variant.metrics[2]["update/grad_norm"] != pytest.approx(plain.metrics[2]["update/grad_norm"], rel=1e-2)
  texts = list(map(sampled, variant.rollouts[2]))
  before, now = (np.concatenate(logprobs(variant.policy(step), texts)) for step in (0, 1))
  assert now.size == variant.column(2, "length").sum()
  expected = np.mean(np.exp(before - now) - (before - now) - 1)
  assert expected > 1e-5
  assert variant.metrics[2]["update/kl"] == pytest.approx(expected, rel=1e-2)
  policy = load_policy(variant.config)
  initial = final_state(variant.workdir, variant.config).initial
  assert_same_tree(initial, restore_params(variant.workdir, 0, policy.trained)[1])


def test_lora_trains_adapters_beside_a_base_that_stays(train, plain, base, tmp_path):
  variant = train(EACH_STEP | {"training.kl_coefficient": 3.0} | ADAPTERS)
  np.testing.assert_array_equal(variant.column(1, "response"), plain.column(1, "response"))  # they begin as nothing
  np.testing.assert_allclose(variant.column(1, "reward_total"), plain.column(1, "reward_total"), atol=1e-5)
  policy = load_policy(variant.config)
  begun, trained = (restore_params(variant.workdir, step, policy.trained)[1] for step in (0, 2))
  names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
  assert names == {"lora_a", "lora_b"}
  assert_same_tree(models.adapters(variant.policy(2)[1]), trained)
  for before, after in zip(jax.tree.leaves(begun), jax.tree.leaves(trained), strict=True):
    assert np.abs(before - after).max() > 1e-4
  scorable = [row for row in variant.rollouts[2] if row["scorable"]]
  expected = np.exp(logprobs(variant.policy(1), list(map(spliced, scorable))))
  np.testing.assert_allclose([row["reference_probs"] for row in scorable], expected, atol=1e-5)
  export.export(variant.workdir, tmp_path / "merged", 2, "float32", adapter=False)
  before, after = (huggingface.load_pretrained(str(path))[1] for path in (base, tmp_path / "merged"))
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  for path, has_changed in jax.tree_util.tree_leaves_with_path(changed):
    keys = [key.key for key in path]
    assert has_changed == (keys[-1] == "weight" and bool({"query", "value"} & set(keys))), keys


@pytest.mark.parametrize(
  ("choice", "limit", "recomputed"),
  [("sampler", 0.01, False), ("trainer", 0.1, True), ("auto", 0.01, True), ("auto", 1.0, False)],
)
def test_ratios_start_from_the_log_probabilities_that_are_named(train, monkeypatch, choice, limit, recomputed):
  """Of a sampler that finds each of its tokens likelier than it is by two fifths: outside of the clip range."""
  honest = Session.run

  def run(*args, **settings):
    rollouts = honest(*args, **settings)
    return rollouts._replace(logprobs=rollouts.logprobs + np.float32(np.log(1.4)))

  monkeypatch.setattr(Session, "run", run)
  variant = train({"training.old_logprobs": choice, "training.sampler_gap_limit": limit})
  for row in variant.metrics.values():
    assert row["sampler_gap/mean"] == pytest.approx(1 - 1 / 1.4, abs=1e-4)
    assert row["sampler_gap/outside"] == 1
    assert row["sampler_gap/recomputed"] == recomputed
    assert row["update/ratio_mean"] == pytest.approx(1 if recomputed else 1 / 1.4, abs=1e-4)


@pytest.mark.parametrize(
  "name", ["muon", pytest.param("adafactor", marks=pytest.mark.slow), pytest.param("sgd", marks=pytest.mark.slow)]
)
def test_another_optimizer_takes_other_steps_from_the_same_gradients(train, plain, name):
  variant = train({"training.optimizer": name})
  first, others = plain.metrics[1], variant.metrics[1]
  assert others["update/grad_norm"] == pytest.approx(first["update/grad_norm"], rel=1e-4)
  assert not others["update/skipped"]
  (_, params), (_, adamw), (_, before) = variant.policy(2), plain.policy(2), plain.policy(0)
  for leaf, usual, start in zip(*map(jax.tree.leaves, (params, adamw, before)), strict=True):
    assert np.isfinite(leaf).all()
    assert np.any(leaf != start)
    assert np.any(leaf != usual)


# --- many at once ---

VARIANTS = {
  "many": {
    "reward.kind": "mixture", "reward.verifier": "exact", "reward.normalization": "separate",
    "reward.scorer": "lagged", "reward.scorer_every": 2, "reward.baseline_policy": "moving_average",
    "reward.token_weights": "base", "reward.answer_length_coefficient": 0.2,
    "reward.shadow": ("product: aggregate=product", "bare: baseline_policy=none", "rule: kind=rule"),
    "training.answer_gradient": "verifree", "training.kl_coefficient": 0.1, "training.epochs_per_step": 2,
    "evaluation.top_k": 5, "evaluation.min_p": 0.01, "evaluation.stop": ("</think>",),
    "training.dual_clip": 3.0, "filter.source_scales": (("addition", 0.1), ("letters", 2.0)),
  },
  "others": {
    "reward.scorer": "initial", "reward.verifier": "exact", "reward.baseline_policy": "current",
    "reward.token_weights": "spread", "reward.shaping": "rank", "training.answer_gradient": "jepo",
    "training.loss": "truncated", "training.advantages": "leave_one_out", "evaluation.temperature": 0.0,
  },
  "credit": {"training.credit": "parts", "reward.verifier": "exact", "reward.kind": "mixture"},
  "published": {
    "reward.conditional_weight": 0.5, "reward.conditional_pairs": 2, "reward.baseline_policy": "averaged_weights",
    "reward.aggregate": "weighted_sum", "reward.token_weights": "surprise", "reward.shaping": "positive",
    "reward.length_difference_coefficient": 0.1, "reward.overlong_coefficient": 0.5, "reward.overlong_buffer": 8,
    "reward.concentration_coefficient": 0.1, "training.answer_gradient": "reward", "training.answer_coefficient": 0.1,
    "training.ratio": "sequence", "training.truncated": "left_out", "filter.kind": "share",
    "reward.shadow": ("logs: aggregate=mean_logprob, token_weights=logprob_spread, shaping=identity",),
  },
}  # fmt: skip


def config(name):
  c = tiny()
  c.steps = 4
  with c.ignore_type():
    c.update_from_flattened_dict(VARIANTS[name])
  return c


@pytest.fixture(
  scope="module",
  params=["many", *(pytest.param(name, marks=pytest.mark.slow) for name in ("others", "credit", "published"))],
)
def run(request, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param)
  training_program.train(config(request.param), workdir)
  return request.param, workdir


@pytest.mark.slow
def test_everything_measured_is_finite(run):
  name, workdir = run
  steps = rows(workdir)
  assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
  assert all(np.isfinite(value) for row in steps for value in row.values())
  assert any(row.get("update/answer_loss", 0) > 0 for row in steps) == (name != "credit")
  assert steps[4]["compilations"] == 0
  if name == "many":
    assert steps[0]["held_out/format"] == 0  # evaluation stops before the answer
    assert any(row.get("update/kl", 0) > 1e-6 for row in steps)
    assert {f"shadow/{shadow}/total" for shadow in ("product", "bare", "rule")} <= set(steps[1])
    rollout = json.loads((workdir / "rollouts/step_000002.jsonl").read_text().splitlines()[0])
    assert {"shadow_product", "shadow_bare", "shadow_rule"} <= set(rollout)
    assert rollout["shadow_rule"] in (0.0, 1.0)


@pytest.mark.slow
def test_a_run_in_two_halves_is_the_whole_one(run, tmp_path):
  """Frozen, lagged and averaged copies, moving baselines and carried answers are in the checkpoint."""
  name, workdir = run
  half = config(name)
  half.steps = 1
  training_program.train(half, tmp_path)
  training_program.train(config(name), tmp_path)

  def without_evaluations(steps):
    return [{k: v for k, v in row.items() if not k.startswith("held_out")} for row in steps]

  assert without_evaluations(timeless(tmp_path)) == without_evaluations(timeless(workdir))
  found, expected = final_state(tmp_path, config(name)), final_state(workdir, config(name))
  for field in ("params", "initial", "lagged", "averaged", "baselines", "carried"):
    for ours, theirs in zip(
      jax.tree.leaves(getattr(found, field)), jax.tree.leaves(getattr(expected, field)), strict=True
    ):
      np.testing.assert_array_equal(ours, theirs)
  assert bool(jax.tree.leaves(expected.initial)) == (name in ("many", "others"))  # for the KL term, or as scorer
  if name == "many":  # two steps in four copy the policy
    assert all(
      np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(expected.lagged), jax.tree.leaves(expected.params), strict=True)
    )


@pytest.mark.slow
def test_initial_baselines_stay_and_current_ones_follow_the_policy(tmp_path):
  """A prompt's current baseline is the engine's own call on the newest policy that drew it."""
  c = config("others")
  c.steps, c.data.count, c.rollout.prompts_per_draw, c.max_draws = 1, 3, 3, 1
  training_program.train(c, tmp_path / "current")
  run = set_up(c)
  state = final_state(tmp_path / "current", c)
  known = np.isfinite(state.baselines).any(axis=1)
  assert known.all()
  # With a frozen scorer the baselines are the frozen policy's.
  expected = run.engine.baseline(run.policy.sampling_params(state.initial), run.prompts)
  np.testing.assert_allclose(state.baselines, expected, atol=1e-5)
