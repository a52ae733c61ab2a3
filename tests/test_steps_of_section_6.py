"""Thirty steps of `collect` and the filter beside a simulation in plain Python, written from the paper's text alone.

Section 3.3 of arXiv 2506.18254 and its appendix: prompts under the threshold are dropped, draws go on until enough are
kept, what is kept beyond that is carried over; steps 1 to 5 ignore the spread, 6 to 10 collect it, 11 starts beta as
their mean and filters.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from rlpr_jax import config, filtering
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.sampling.engine import Session
from rlpr_jax.training.collect import collect
from rlpr_jax.training.reward import RewardSettings
from rlpr_jax.training.run import Run
from rlpr_jax.types import Groups, Prompt, Rollouts, TrainState

STEPS, SAMPLES = 30, 4


class Case(NamedTuple):
  prompts: int  # of a draw
  needed: int  # a step
  max_draws: int
  scale: float
  alpha: float


class Step(NamedTuple):
  trained: list[int]  # numbers of the prompts, in the order in which they were drawn
  carried: list[int]
  drawn: int  # prompts
  limit: float  # threshold in force, 0 for none
  beta: float | None  # afterwards


def spread(rewards):
  mean = sum(rewards) / len(rewards)
  return math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))


def simulate(rewards, case):
  """The steps; `rewards` has one row a prompt, in the order in which prompts are drawn."""
  steps, carried, number, warm_up, beta = [], [], 0, [], None
  for t in range(1, STEPS + 1):
    if t == 11:
      beta = sum(warm_up) / len(warm_up)
    limit = case.scale * beta if t >= 11 else 0.0
    kept, sigmas = carried, []
    while len(kept) < case.needed and len(sigmas) < case.max_draws * case.prompts:
      for _ in range(case.prompts):
        sigma = spread([float(reward) for reward in rewards[number]])
        assert not math.isclose(sigma, limit, rel_tol=1e-5) or sigma == limit  # else float32 may decide otherwise
        if math.isfinite(sigma) and sigma >= limit:
          kept = [*kept, number]
        sigmas.append(sigma)
        number += 1
    known = [sigma for sigma in sigmas if math.isfinite(sigma)]
    if known:
      sigma_bar = sum(known) / len(known)
      if 6 <= t <= 10:
        warm_up.append(sigma_bar)
      elif t >= 11:
        beta = (1 - case.alpha) * beta + case.alpha * sigma_bar
    carried = kept[case.needed :]
    steps.append(Step(kept[: case.needed], carried, len(sigmas), limit, beta))
  return steps


def make_rewards(case, seed):
  """Groups that spread less and less, as in training; some not at all, some with a reward that is no number."""
  rng = np.random.default_rng(seed)
  count = STEPS * case.max_draws * case.prompts
  widths = rng.gamma(2.0, 0.1, count) * np.linspace(1.5, 0.5, count)
  widths[rng.random(count) < 0.15] = 0
  rewards = (rng.random(count)[:, None] + widths[:, None] * rng.normal(size=(count, SAMPLES))).astype(np.float32)
  for value in (np.nan, np.inf, -np.inf):
    rewards[rng.random(count) < 0.03, rng.integers(SAMPLES)] = value
  return rewards


class Stream(PromptStream):
  """Prompts that are numbers, each drawn once."""

  def __init__(self):
    self.drawn = 0

  def next_batch(self, count):
    first, self.drawn = self.drawn, self.drawn + count
    return [
      (number, Prompt(ids=np.array([number], np.int32), reference="7", source="test", row=number))
      for number in range(first, self.drawn)
    ]

  def state(self):
    return {"drawn": self.drawn}

  def restore(self, state):
    self.drawn = state["drawn"]


class FakeSession(Session):
  """Samples nothing."""

  def __init__(self, samples):
    self.samples = samples

  def tokens_ahead(self):
    return 0

  def run(self, draws, options, ahead):
    count = len(draws) * self.samples
    fields = {name: np.zeros(count, np.int32) for name in Rollouts._fields}
    fields |= {name: np.zeros(count, bool) for name in ("finished", "refused", "scorable", "overlong")}
    fields |= {name: np.zeros((count, 1), np.int32) for name in ("tokens", "reference_tokens")}
    fields |= {name: np.zeros((count, 1), np.float32) for name in ("logprobs", "reference_logps")}
    fields["reference_mask"] = np.zeros((count, 1), bool)
    fields |= {"texts": [""] * count, "seconds": dict.fromkeys(("prefill", "decode", "score"), 0.0)}
    return Rollouts(**fields | {"slot_steps": (0, 0)})


class FakeEngine:
  template = "think"
  response_text = staticmethod(lambda tokens: "")

  def session(self, params, key, samples):
    return FakeSession(samples)


def train(rewards, case):
  """The same steps by the real `collect`, and the state carried from one to the next as train.py does."""
  c = config.default()
  c.training.credit = "response"  # as published
  c.prompts_per_step, c.max_draws, c.samples_per_prompt = case.needed, case.max_draws, SAMPLES
  c.rollout.prompts_per_draw, c.data.prompt_limit, c.log.rollouts = case.prompts, 1, 0
  run = Run(**dict.fromkeys(Run._fields))._replace(
    config=c,
    engine=FakeEngine(),
    policy=SimpleNamespace(sampling_params=lambda params: params),
    key=None,
    filter=filtering.FilterConfig(scale=case.scale, alpha=case.alpha),
    reward=RewardSettings.of(c.reward),
    shadows={},
    custom_reward=lambda evidence, texts, prompts: rewards[[prompt.row for prompt in prompts]],
  )
  nothing = Groups.empty(prompt_limit=1, samples=SAMPLES, response_limit=1)
  state = TrainState(**dict.fromkeys(TrainState._fields))._replace(
    step=0,
    params={},
    filter=filtering.init(run.filter),
    baselines=np.full((len(rewards), 1), np.nan, np.float32),
    carried=nothing,
  )
  stream, steps = Stream(), []
  for t in range(1, STEPS + 1):
    before = stream.drawn
    batch = collect(run, state, stream, StopRequest(), keep_rate=stream.drawn % 7 / 6)  # wrong as often as right
    state = state._replace(step=t, filter=filtering.update(state.filter, batch.stds, run.filter), carried=batch.carried)
    trained, carried = (groups.prompt_tokens[:, 0].tolist() for groups in (batch.groups, batch.carried))
    drawn, limit = stream.drawn - before, batch.metrics["filter/threshold"]
    steps.append(Step(trained, carried, drawn, limit, float(state.filter.average)))
  return steps


CASES = {
  "several draws a step": Case(prompts=6, needed=8, max_draws=4, scale=0.9, alpha=0.3),
  "some steps live off the last": Case(prompts=12, needed=5, max_draws=3, scale=0.5, alpha=0.01),
  "draws run out": Case(prompts=4, needed=10, max_draws=3, scale=1.0, alpha=0.05),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # means of rewards that are no numbers
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_thirty_steps(name, seed):
  case = CASES[name]
  rewards = make_rewards(case, seed)
  expected = simulate(rewards, case)
  found = train(rewards, case)
  for t, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
    assert (t, one.trained) == (t, other.trained)
    assert (t, one.carried) == (t, other.carried)
    assert (t, one.drawn) == (t, other.drawn)
    assert (t, one.limit) == (t, pytest.approx(other.limit, abs=1e-6))
    if t >= 11:
      assert (t, one.beta) == (t, pytest.approx(other.beta, abs=1e-6))

  # What the case is named for has come to pass, and the filter has dropped something.
  draws = {step.drawn // case.prompts for step in expected}
  assert any(step.carried for step in expected) or name == "draws run out"
  match name:
    case "several draws a step":
      assert len(draws) > 1
    case "some steps live off the last":
      assert {0, 1} <= draws
    case _:
      assert any(len(step.trained) < case.needed for step in expected)
  finite = [math.isfinite(spread(group)) for group in rewards.astype(float).tolist()]
  kept = sum(len(step.trained) for step in expected) + len(expected[-1].carried)
  assert kept < sum(finite[: sum(step.drawn for step in expected)])
