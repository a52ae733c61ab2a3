"""Collects what a step trains on: draw prompts, sample, score, reward, filter, until the step has its groups."""

import contextlib
import dataclasses
import time
from typing import Any, TypeVar

import jax
import numpy as np

from rlpr_jax import custom_reward, filtering, grpo, processes, rewards
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.models import Params
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.records import rollout_metrics, rollout_rows
from rlpr_jax.sampling.engine import Draws, SampleOptions, Session, StoppedError
from rlpr_jax.sampling.shapes import pad_prompts
from rlpr_jax.training import carrying, packing
from rlpr_jax.training.baselines import prompts_to_measure, renew_baselines, scorer_measures
from rlpr_jax.training.exchange import exchange_answers
from rlpr_jax.training.logprobs import LogprobProgram, TextScorer
from rlpr_jax.training.reward import (
  compute_rewards,
  credit_of_answer,
  credits_parts,
  gather_evidence,
  looks_at_answers,
  unalign,
  weigh_tokens,
)
from rlpr_jax.training.run import Run
from rlpr_jax.training.scorer import score_again
from rlpr_jax.training.settings import text_row_length
from rlpr_jax.types import (
  Advantages,
  AnswerCredit,
  Answers,
  AnyArray,
  Evidence,
  ExchangedAnswers,
  Groups,
  Rewards,
  RolloutBatch,
  Rollouts,
  StepBatch,
  TrainState,
)

T = TypeVar("T")
_group_advantages = jax.jit(grpo.group_advantages, static_argnames=("normalize",))
_separate_advantages = jax.jit(grpo.separate_advantages, static_argnames=("normalize",))
_group_bound = jax.jit(grpo.group_bound)
_answer_gradient = jax.jit(rewards.answer_gradient, static_argnames=("kind",))


def collect(run: Run, state: TrainState, stream: PromptStream, stop: StopRequest, keep_rate: float = 1.0) -> StepBatch:
  """Draws until `prompts_per_step` groups are kept, those carried over included, or `max_draws` draws were made.

  Where another draw is likely to be needed, its prompts begin in slots that the one before it leaves free. Nothing but
  time depends on it: if it turns out not to be needed, it is given up, and its prompts come first in the next step.
  Under `rollout.carry=partial` groups that have not ended go on in the next draw instead.

  Args:
    keep_rate: share of the prompts that is expected to be kept, until this step has seen some.

  Raises:
    StoppedError: `stop` was asked for; nothing has changed but the stream.
  """
  config = run.config
  params = run.policy.sampling_params(state.params)
  session = run.engine.session(params, run.key, config.samples_per_prompt)
  batches: list[RolloutBatch] = []
  kept, size, each = [state.carried], config.prompts_per_step, config.rollout.prompts_per_draw
  ahead: Draws = []
  position: dict[str, Any] = {}  # of the stream before those
  unfinished = state.unfinished
  while (have := sum(groups.num_groups for groups in kept)) < size and len(batches) < config.max_draws:
    numbered = ahead or stream.next_batch(each)
    if unfinished is not None:
      numbered = carrying.with_begun(config, unfinished, run.prompts, numbered)
    if batches:
      keep_rate = float(np.mean([batch.keep.mean() for batch in batches if batch.prompts] or [0.0]))
    ahead = []
    if unfinished is None and have + keep_rate * each < size and len(batches) + 1 < config.max_draws:
      position = stream.state()
      ahead = stream.next_batch(each)
    batch = draw(run, state, params, session, numbered, ahead, stop)
    unfinished = batch.unfinished
    state = state._replace(baselines=batch.baselines, unfinished=unfinished)
    kept.append(kept_groups(run, batch))
    batches.append(batch)
  wasted = session.tokens_ahead() if ahead else 0
  if ahead:
    stream.restore(position)
  groups = packing.concatenate(kept)
  # One length whatever was drawn, so that nothing compiles again; the filter leaves NaN out.
  stds = np.full(config.max_draws * carrying.most_groups(config), np.nan, np.float32)
  seen = np.concatenate([np.zeros(0, np.float32), *(batch.advantages.stds for batch in batches)])
  stds[: seen.size] = seen
  filter_metrics = {
    "filter/threshold": max(float(filtering.threshold(state.filter, run.filter)), 0.0),
    "filter/drawn": seen.size,
    "filter/kept": int(sum(batch.keep.sum() for batch in batches)),
    "filter/carried_in": state.carried.num_groups,
    "filter/trained": min(groups.num_groups, size),
  }
  waiting = {} if unfinished is None else {"rollout/unfinished_groups": unfinished.num_groups}
  return StepBatch(
    groups=groups.take(slice(size)),
    carried=groups.take(slice(size, None)),
    carried_in=state.carried.num_groups,
    stds=stds,
    baselines=state.baselines,
    metrics=filter_metrics
    | rollout_metrics(config, batches)
    | ({"rollout/wasted_tokens": wasted} if batches else {})
    | waiting,
    rollouts=rollout_rows(batches[0], state.step + 1, config.log.rollouts, run.engine) if batches else [],
    unfinished=unfinished,
  )


def draw(
  run: Run, state: TrainState, params: Params, session: Session, numbered: Draws, ahead: Draws, stop: StopRequest
) -> RolloutBatch:
  """Samples, scores and rewards responses to some prompts, and says which groups to keep.

  Args:
    state: its unfinished groups, if it has any, are among the prompts.
    params: as the sampler reads them.
    ahead: the prompts that come next, if they are known.

  Raises:
    StoppedError: on every process, if `stop` was asked for on one.
  """
  config, samples = run.config, run.config.samples_per_prompt

  # 1. Sample: every process draws the same prompts, and samples its share of them.
  prompts = [prompt for _, prompt in numbered]
  my_numbered, my_prompts = processes.share(numbered), processes.share(prompts)
  rollouts = None
  with contextlib.suppress(StoppedError):
    options = SampleOptions(interrupted=stop.__bool__)
    if state.unfinished is not None:
      limits = carrying.limits(config, state.unfinished, numbered)
      beginnings = carrying.beginnings(state.unfinished, numbered)
      options = dataclasses.replace(
        options,
        limits=[limit for of_prompt in processes.share(limits.tolist()) for limit in of_prompt],
        beginnings=[beginning for of_prompt in processes.share(beginnings) for beginning in of_prompt],
      )
    rollouts = session.run(my_numbered, options, processes.share(ahead))
  if processes.any_of(rollouts is None) or rollouts is None:
    raise StoppedError
  if state.unfinished is not None:
    rollouts = carrying.with_scores(rollouts, state.unfinished, my_numbered)

  # 2. Score the references by another policy than the one that sampled, if the config says so; measure r'.
  scorer_params, measured = params, None
  unknown = prompts_to_measure(run, state, [prompt for prompt in prompts if prompt is not carrying.NOBODY])
  if config.reward.scorer != "policy":
    scorer_params = run.policy.sampling_params(state.initial if config.reward.scorer == "initial" else state.lagged)
    rows = {prompt.row for prompt in unknown} if scorer_measures(config) else set()
    suffixes = run.engine.baseline_suffixes((i, prompt) for i, prompt in enumerate(my_prompts) if prompt.row in rows)
    rollouts, alone = score_again(reference_scorer(run, scorer_params), my_prompts, rollouts, suffixes)
    if rows:
      of_all = processes.gather(run.engine.baselines(alone, len(my_prompts)), len(prompts))
      measured = of_all[[prompt.row in rows for prompt in prompts]]
  baselines = renew_baselines(run, state, scorer_params, unknown, measured)

  started = time.perf_counter()
  exchanged = exchange(run, scorer_params, my_numbered, rollouts)
  if exchanged is not None:
    rollouts = rollouts._replace(seconds=rollouts.seconds | {"exchange": time.perf_counter() - started})

  # 3. Gather the evidence: from here on every process knows of all responses, and decides alike.
  known = baselines[[prompt.row for prompt in my_prompts]]
  evidence = gather_evidence(config, my_numbered, rollouts, known, exchanged)
  custom = None
  if run.custom_reward is not None:
    custom = custom_reward.compute(run.custom_reward, evidence, rollouts.texts, my_prompts)
  evidence, custom = processes.gather((evidence, custom), len(prompts))
  rollouts = gather_rollouts(rollouts, len(prompts), samples)

  # 4. Reward, compare within groups, and keep the groups that spread.
  parts = jax.device_get(compute_rewards(evidence, run.reward))
  if custom is not None:
    parts = parts._replace(total=custom)
  advantages = compute_advantages(run, evidence, parts)
  # A refused prompt has no spread: it is not kept, and no part of the filter's average. Nor has one that goes on.
  refused = rollouts.refused.reshape(len(prompts), -1).any(axis=1)
  ended, unfinished, ages = np.ones(len(prompts), bool), None, None
  if state.unfinished is not None:
    ended, unfinished, ages = carrying.part(config, state.unfinished, numbered, rollouts, state.step)
  advantages = advantages._replace(stds=np.where(refused | ~ended, np.nan, advantages.stds))
  source_scales = dict(config.filter.source_scales)
  scales = np.array([source_scales.get(prompt.source, run.filter.scale) for prompt in prompts], np.float32)
  keep = filtering.keep(state.filter, advantages.stds, run.filter, correct=evidence.verified, scales=scales)
  batch = RolloutBatch(
    prompts=prompts,
    rollouts=rollouts,
    evidence=evidence,
    rewards=parts,
    shadows={name: jax.device_get(compute_rewards(evidence, shadow)) for name, shadow in run.shadows.items()},
    advantages=advantages,
    keep=np.asarray(keep),
    baselines=baselines,
    ages=None if ages is None else ages.reshape(rollouts.tokens.shape),
    unfinished=unfinished,
  )
  return batch if ended.all() else take_groups(batch, ended)


def take_groups(batch: RolloutBatch, which: np.ndarray) -> RolloutBatch:
  """A batch of some of the groups; `which` is a mask over its prompts. Programs have seen all: their shapes stay."""
  responses = np.repeat(which, batch.advantages.advantages.shape[1])
  arrays = {name: x[responses] for name, x in batch.rollouts._asdict().items() if isinstance(x, np.ndarray)}

  def taken(tree: T) -> T:
    return jax.tree.map(lambda x: np.asarray(x)[which], tree)

  return batch._replace(
    prompts=[prompt for prompt, is_taken in zip(batch.prompts, which, strict=True) if is_taken],
    rollouts=batch.rollouts._replace(**arrays),
    evidence=taken(batch.evidence),
    rewards=taken(batch.rewards),
    shadows=taken(batch.shadows),
    advantages=taken(batch.advantages),
    keep=batch.keep[which],
    ages=None if batch.ages is None else batch.ages[responses],
  )


def reference_scorer(run: Run, params: Params) -> TextScorer:
  """A policy that scores references on this process's devices; `params` as the sampler reads them."""
  config, policy = run.config, run.policy
  program = LogprobProgram(
    model=policy.sampler,
    temperature=config.reward.score_temperature,
    micro_batch_rows=config.rollout.score_rows,
    sharding=policy.sampling.sharding,
  )
  return TextScorer(program, params, text_row_length(config))


def exchange(run: Run, params: Params, numbered: Draws, rollouts: Rollouts) -> ExchangedAnswers | None:
  """Measures the group's own answers behind each other's reasoning; None if no reward of the run asks for it."""
  if not looks_at_answers(run.config):
    return None
  scorer, most = reference_scorer(run, params), run.config.reward.conditional_pairs
  return exchange_answers(scorer, run.engine, numbered, rollouts, most, run.config.seed)


def gather_rollouts(rollouts: Rollouts, prompts: int, samples: int) -> Rollouts:
  """Gathers the rollouts of all processes; texts and seconds stay those of this one's share."""
  arrays = {name: x for name, x in rollouts._asdict().items() if isinstance(x, np.ndarray)}
  groups = {name: x.reshape(len(x) // samples, samples, *x.shape[1:]) for name, x in arrays.items()}
  gathered = processes.gather(groups, prompts)
  return rollouts._replace(**{name: x.reshape(prompts * samples, *x.shape[2:]) for name, x in gathered.items()})


def compute_advantages(run: Run, evidence: Evidence, parts: Rewards) -> Advantages:
  """Compares the responses of each group, and weighs the gradient through the reference answer if there is one."""
  settings, normalize = run.config.reward, run.config.training.advantages
  if run.custom_reward is None and settings.kind == "mixture" and settings.normalization == "separate":
    reference = compute_rewards(evidence, dataclasses.replace(run.reward, kind="reference")).total
    weights = [1 - settings.rule_weight, settings.rule_weight]
    advantages, stds = _separate_advantages([reference, evidence.verified], weights, normalize=normalize)
  else:
    advantages, stds = _group_advantages(parts.total, normalize)
  answer_weights: AnyArray | None = None
  match kind := run.config.training.answer_gradient:
    case "verifree":
      answer_weights = grpo.verifree_weights(np.maximum(parts.debiased, 0))[..., None]  # never away from the reference
    case "reward" | "likelihood":
      aggregate = settings.aggregate if kind == "reward" else "log_probability"
      of_tokens = weigh_tokens(evidence, settings.token_weights)
      answer_weights = _answer_gradient(evidence.logps, evidence.mask, aggregate, of_tokens)
    case "jepo":
      likelihoods = np.where(evidence.mask, evidence.logps, 0.0).sum(axis=-1)
      _, gain, shares = _group_bound(likelihoods, evidence.scorable)
      # Sums over the group, where everything else is a mean over its responses. What is not the bound stays a reward.
      size = evidence.scorable.shape[1]
      others = rewards.combine(0.0, evidence.formats, settings.format_coefficient, parts.repetition + parts.length)
      advantages = size * gain + _group_advantages(others, "none")[0]
      answer_weights = (size * shares)[..., None]
  if answer_weights is not None:
    answer_weights = np.where(evidence.mask, answer_weights, 0.0) * run.config.training.answer_coefficient
    answer_weights = np.asarray(answer_weights, np.float32)
  of_answer = None
  if credits_parts(run.config):
    of_answer, _ = _group_advantages(parts.total, normalize, part=credit_of_answer(evidence, parts, run.reward))
  return jax.device_get(Advantages(advantages, stds, answer_weights, of_answer))


def kept_groups(run: Run, batch: RolloutBatch) -> Groups:
  """Takes the groups of a batch that are kept, without what only rewards and metrics ask for."""
  kept, rollouts = np.flatnonzero(batch.keep), batch.rollouts
  shape = batch.advantages.advantages.shape
  tokens, lengths = pad_prompts([batch.prompts[p] for p in kept], run.config.data.prompt_limit)

  def grouped(x: np.ndarray) -> np.ndarray:
    return x.reshape(*shape, *x.shape[1:])[kept]

  answers = None
  if batch.advantages.answer_weights is not None:
    mask = grouped(rollouts.reference_mask)
    answers = Answers(
      weights=unalign(batch.advantages.answer_weights[kept], mask),
      starts=grouped(rollouts.reference_starts),
      tokens=grouped(rollouts.reference_tokens),
      mask=mask,
    )
  credit = None
  if batch.advantages.of_answer is not None:
    starts = np.where(rollouts.scorable, rollouts.reference_starts, rollouts.lengths)
    credit = AnswerCredit(grouped(starts.astype(np.int32)), batch.advantages.of_answer[kept])
  trained = rollouts.lengths
  if run.config.training.truncated == "left_out":
    trained = np.where(rollouts.finished, trained, 0)
  return Groups(
    prompt_tokens=tokens,
    prompt_lengths=lengths,
    tokens=grouped(rollouts.tokens),
    lengths=grouped(trained.astype(np.int32)),
    logprobs=grouped(rollouts.logprobs),
    advantages=batch.advantages.advantages[kept],
    answers=answers,
    credit=credit,
    importance=np.ones_like(grouped(rollouts.logprobs)) if run.config.training.importance_cap else None,
  )
