"""One step's harvest: draw prompts, sample, score, reward, filter, and draw again until the step has its groups."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlpr_jax import filtering, grpo, processes, rewards
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.models import Params
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.sampling.batches import pad_prompts
from rlpr_jax.sampling.engine import StoppedError
from rlpr_jax.training import packing
from rlpr_jax.training.reward import assess, auc, custom_rewards, gather_evidence, group_auc, within_group_correlation
from rlpr_jax.training.run import Run, baseline_logps, scorer_params
from rlpr_jax.training.scorer import score_again
from rlpr_jax.types import Answers, Evidence, Groups, Prompt, Rewards, RolloutBatch, Rollouts, StepBatch, TrainState

_group_advantages = jax.jit(grpo.group_advantages, static_argnames=("normalize",))
_separate_advantages = jax.jit(grpo.separate_advantages, static_argnames=("normalize",))
_group_bound = jax.jit(grpo.group_bound)


def collect(run: Run, state: TrainState, stream: PromptStream, stop: StopRequest) -> StepBatch:
  """Draws until `prompts_per_step` groups are kept, those carried over included, or `max_draws` draws were made.

  Raises:
    StoppedError: `stop` was asked for; nothing has changed but the stream.
  """
  config = run.config
  params = run.policy.sampling_params(state.params)
  kept, draws = [state.carried], []
  while sum(groups.num_groups for groups in kept) < config.prompts_per_step and len(draws) < config.max_draws:
    draw, baselines = draw_once(run, state, params, stream, stop)
    state = state._replace(baselines=baselines)
    kept.append(to_groups(run, draw))
    draws.append(draw)
  groups = packing.concatenate(kept)
  size = config.prompts_per_step
  # One length whatever was drawn, so that nothing compiles again; the filter leaves NaN out.
  stds = np.full(config.max_draws * config.rollout.prompts_per_draw, np.nan, np.float32)
  for i, draw in enumerate(draws):
    stds[i * len(draw.stds) : (i + 1) * len(draw.stds)] = draw.stds
  return StepBatch(
    groups=groups.take(slice(size)),
    carried=groups.take(slice(size, None)),
    stds=stds,
    baselines=state.baselines,
    values=summarize(run, state, draws, groups),
    rows=rollout_rows(run, state.step + 1, draws[0]) if draws else [],
  )


def draw_once(
  run: Run, state: TrainState, params: Params, stream: PromptStream, stop: StopRequest
) -> tuple[RolloutBatch, np.ndarray]:
  """The next prompts of the stream, sampled, scored, rewarded and judged by the filter; and the baselines after it.

  Each process samples its share of the prompts. From `gather` on all know of all, and decide alike.
  """
  config = run.config
  numbered = stream.next_batch(config.rollout.prompts_per_draw)
  mine, prompts = processes.share(numbered), [prompt for _, prompt in numbered]
  rollouts = None
  with contextlib.suppress(StoppedError):
    rollouts = run.engine.rollout(params, mine, run.key, config.samples_per_prompt, stop.__bool__)
  if processes.any_of(rollouts is None):
    raise StoppedError
  my_prompts = processes.share(prompts)
  if config.reward.scorer != "policy":
    rollouts = score_again(run, scorer_params(run, state), my_prompts, rollouts)
  baselines = newest_baselines(run, state, params, prompts)
  evidence = gather_evidence(config, mine, rollouts, baselines[[prompt.row for prompt in my_prompts]])
  custom = None
  if run.custom_reward is not None:
    custom = custom_rewards(run.custom_reward, evidence, rollouts.texts, my_prompts)
  evidence, custom = processes.gather((evidence, custom), len(prompts))
  rollouts = gather_rollouts(rollouts, len(prompts), config.samples_per_prompt)
  parts = jax.device_get(assess(evidence, run.reward))
  if custom is not None:
    parts = parts._replace(total=custom)
  shadows = {name: jax.device_get(assess(evidence, settings)) for name, settings in run.shadows.items()}
  advantages, stds, answer_weights = judge(run, evidence, parts)
  # A refused prompt has no spread: it is not kept, and no part of the filter's average.
  stds = np.where(rollouts.refused.reshape(stds.size, -1).any(axis=1), np.nan, stds)
  scales = [dict(config.filter.source_scales).get(prompt.source, run.filter.scale) for prompt in prompts]
  keep = filtering.keep(state.filter, stds, run.filter, correct=evidence.verified, scales=np.array(scales, np.float32))
  return RolloutBatch(
    prompts, rollouts, evidence, parts, shadows, advantages, answer_weights, stds, np.asarray(keep)
  ), baselines


def gather_rollouts(rollouts: Rollouts, prompts: int, samples: int) -> Rollouts:
  """The rollouts of all processes; texts and seconds stay those of this one's share."""
  arrays = {name: x for name, x in rollouts._asdict().items() if isinstance(x, np.ndarray)}
  groups = {name: x.reshape(len(x) // samples, samples, *x.shape[1:]) for name, x in arrays.items()}
  gathered = processes.gather(groups, prompts)
  return rollouts._replace(**{name: x.reshape(prompts * samples, *x.shape[2:]) for name, x in gathered.items()})


def newest_baselines(run: Run, state: TrainState, params: Params, prompts: Sequence[Prompt]) -> np.ndarray:
  """Log-probabilities [N, A] of all references without reasoning; those of the draw measured anew where asked for."""
  settings = run.config.reward
  if settings.baseline_policy not in ("current", "moving_average"):
    return state.baselines
  scorer = params if settings.scorer == "policy" else run.policy.sampling_params(scorer_params(run, state))
  rows = [prompt.row for prompt in prompts]
  new = processes.gather(baseline_logps(run, scorer, processes.share(prompts)), len(prompts))
  if settings.baseline_policy == "moving_average":
    new = np.asarray(rewards.moving_average(state.baselines[rows], new, settings.baseline_rate))
  baselines = state.baselines.copy()  # a checkpoint may still be reading the old ones
  baselines[rows] = new
  return baselines


def judge(run: Run, evidence: Evidence, parts: Rewards) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Advantages [P, G], spreads [P], and the weights [P, G] of the gradient through the reference answer."""
  settings, normalize = run.config.reward, run.config.training.advantages
  if settings.kind == "mixture" and settings.normalization == "separate":
    halves = [assess(evidence, dataclasses.replace(run.reward, kind="reference")).total, evidence.verified]
    weights = [1 - settings.rule_weight, settings.rule_weight]
    advantages, stds = _separate_advantages(halves, weights, normalize=normalize)
  else:
    advantages, stds = _group_advantages(parts.total, normalize)
  answer_weights = np.zeros_like(parts.total)
  match run.config.training.answer_gradient:
    case "verifree":
      answer_weights = grpo.verifree_weights(np.maximum(parts.debiased, 0))  # never away from the reference
    case "jepo":
      likelihoods = np.where(evidence.mask, evidence.logps, 0.0).sum(axis=-1)
      _, gain, shares = _group_bound(likelihoods, evidence.scorable)
      # Sums over the group, where everything else is a mean over its responses. What is not the bound stays a reward.
      size = evidence.scorable.shape[1]
      rest = rewards.combine(0.0, evidence.formats, settings.format_coefficient, parts.repetition + parts.length)
      advantages = size * gain + _group_advantages(rest, "none")[0]
      answer_weights = size * shares
  answer_weights = np.where(evidence.scorable, answer_weights, 0.0) * run.config.training.answer_coefficient
  return jax.device_get((advantages, stds, answer_weights.astype(np.float32)))


def to_groups(run: Run, draw: RolloutBatch) -> Groups:
  """The groups of a draw that are kept."""
  kept, shape, rollouts = np.flatnonzero(draw.keep), draw.advantages.shape, draw.rollouts
  tokens, lengths = pad_prompts([draw.prompts[p] for p in kept], run.config.data.prompt_limit)

  def grouped(x: np.ndarray) -> np.ndarray:
    return x.reshape(*shape, *x.shape[1:])[kept]

  answers = None
  if run.config.training.answer_gradient != "none":
    answers = Answers(
      draw.answer_weights[kept],
      grouped(rollouts.reference_starts),
      grouped(rollouts.reference_tokens),
      grouped(rollouts.reference_mask),
    )
  return Groups(
    tokens,
    lengths,
    grouped(rollouts.tokens),
    grouped(rollouts.lengths),
    grouped(rollouts.logprobs),
    draw.advantages[kept],
    answers,
  )


def summarize(run: Run, state: TrainState, draws: list[RolloutBatch], groups: Groups) -> dict[str, float]:
  """Metrics of everything that a step sampled, dropped groups included."""
  values = {
    "filter/threshold": max(float(filtering.threshold(state.filter, run.filter)), 0.0),
    "filter/drawn": sum(len(draw.prompts) for draw in draws),
    "filter/kept": int(sum(draw.keep.sum() for draw in draws)),
    "filter/carried_in": state.carried.num_groups,
    "filter/trained": min(groups.num_groups, run.config.prompts_per_step),
  }
  if not draws:  # what was carried over was enough
    return values
  rollouts = [draw.rollouts for draw in draws]

  def everywhere(field: str) -> np.ndarray:
    return np.concatenate([getattr(part, field) for part in rollouts])

  seconds = {name: sum(part.seconds[name] for part in rollouts) for name in rollouts[0].seconds}
  sampling = seconds["prefill"] + seconds["decode"]
  return values | {
    **{f"reward/{name}": finite_mean([getattr(draw.rewards, name) for draw in draws]) for name in Rewards._fields},
    "reward/gain": finite_mean([draw.rewards.reference for draw in draws])
    - finite_mean([draw.rewards.baseline for draw in draws]),
    "reward/group_std": finite_mean([draw.stds for draw in draws]),
    "reward/not_finite": int(sum((~np.isfinite(draw.rewards.total)).sum() for draw in draws)),
    **compare(draws, verifies=run.config.reward.verifier != "none"),
    "rollout/response_length": float(np.mean(everywhere("lengths"))),
    "rollout/truncated": float(np.mean(~everywhere("finished"))),
    "rollout/scorable": float(np.mean(everywhere("scorable"))),
    "rollout/overlong_references": int(everywhere("overlong").sum()),
    "rollout/refused_prompts": int(everywhere("refused").sum()) // run.config.samples_per_prompt,
    "seconds/rollout": sampling,
    "seconds/prefill": seconds["prefill"],
    "seconds/score": seconds["score"],
    "tokens_per_second/rollout": int(everywhere("lengths").sum()) / max(sampling, 1e-9),
  }


def finite_mean(parts: Sequence[np.ndarray]) -> float:
  """Mean of what is finite; 0 if nothing is."""
  values = np.concatenate([np.ravel(part) for part in parts])
  return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else 0.0


def aucs(name: str, scores: np.ndarray, right: np.ndarray) -> dict[str, float | None]:
  """Does the reward tell right responses from wrong ones: of all prompts, and of the same prompt?"""
  return {f"{name}/auc": auc(scores, right), f"{name}/group_auc": group_auc(scores, right)}


def compare(draws: list[RolloutBatch], verifies: bool) -> dict[str, float]:
  """Each shadow reward beside the one that is trained on, and both against the verifier, if there is one."""

  def everywhere(pick: Callable[[RolloutBatch], np.ndarray]) -> np.ndarray:
    return np.concatenate([pick(draw) for draw in draws])

  total, right = everywhere(lambda draw: draw.rewards.total), everywhere(lambda draw: draw.evidence.verified)
  values = {}
  if verifies:
    values = {"reward/verified": float(right.mean())} | aucs("reward", total, right)
  for name in draws[0].shadows:
    shadow = everywhere(lambda draw, name=name: draw.shadows[name].total)
    values |= {
      f"shadow/{name}/total": finite_mean([shadow]),
      f"shadow/{name}/group_std": finite_mean([np.std(shadow, axis=1, ddof=1)]) if shadow.shape[1] > 1 else 1.0,
      f"shadow/{name}/correlation": within_group_correlation(total, shadow),
    } | aucs(f"shadow/{name}", shadow, right)
  return {name: value for name, value in values.items() if value is not None}


def rollout_rows(run: Run, step: int, draw: RolloutBatch) -> list[dict[str, Any]]:
  """The first `log.rollouts` responses of a draw with every part of their reward, as they go to disk."""
  rows = []
  for i in range(min(run.config.log.rollouts, len(draw.rollouts.lengths))):
    p, g = divmod(i, run.config.samples_per_prompt)
    prompt, answer = draw.prompts[p], draw.rollouts.reference_mask[i]
    parts = {f"reward_{name}": value for name, value in draw.rewards._asdict().items()}
    parts |= {f"shadow_{name}": shadow.total for name, shadow in draw.shadows.items()}
    rows.append(
      {
        "step": step,
        "row": prompt.row,
        "source": prompt.source,
        "question": prompt.question,
        "reference": prompt.reference,
        "response": run.engine.response_text(draw.rollouts.tokens[i, : draw.rollouts.lengths[i]].tolist()),
        "finish": "eos" if draw.rollouts.finished[i] else "length",
        "length": int(draw.rollouts.lengths[i]),
        "scorable": bool(draw.rollouts.scorable[i]),
        "reference_tokens": [run.engine.tokenizer.decode([t]) for t in draw.rollouts.reference_tokens[i][answer]],
        "reference_probs": np.exp(draw.rollouts.reference_logps[i][answer]).tolist(),
        **{name: float(value[p] if value.ndim == 1 else value[p, g]) for name, value in parts.items()},
        "advantage": float(draw.advantages[p, g]),
        "group_std": float(draw.stds[p]),
        "kept": bool(draw.keep[p]),
      }
    )
  return rows
