"""One step's harvest: draw prompts, sample, score, reward, filter, and draw again until the step has its groups."""

from typing import Any, NamedTuple

import jax
import numpy as np

from rlpr_jax import filtering, grpo, rewards
from rlpr_jax.data.pipeline import Prompt, PromptStream
from rlpr_jax.models import Params
from rlpr_jax.rewards import Rewards
from rlpr_jax.sampling.engine import Rollouts, pad_prompts
from rlpr_jax.training import packing
from rlpr_jax.training.packing import Groups
from rlpr_jax.training.setup import Run
from rlpr_jax.training.state import TrainState

_assess = jax.jit(rewards.assess, static_argnames=("aggregate", "shaping", "format_coefficient"))
_group_advantages = jax.jit(grpo.group_advantages, static_argnames=("normalize",))


class Draw(NamedTuple):
  """Prompts drawn together, and what became of them."""

  prompts: list[Prompt]  # [P]
  rollouts: Rollouts  # [P * G]
  rewards: Rewards  # [P, G]
  advantages: np.ndarray  # float32[P, G]
  stds: np.ndarray  # float32[P]
  keep: np.ndarray  # bool[P]


class Harvest(NamedTuple):
  """What a step trains on, what it leaves to the next, and what it saw."""

  groups: Groups  # kept, at most prompts_per_step
  carried: Groups  # kept beyond that
  stds: np.ndarray  # float32[max_draws * P] spread of every prompt drawn; NaN where nothing was drawn
  values: dict[str, float]  # metrics
  rows: list[dict[str, Any]]  # rollouts for the disk


def collect(run: Run, state: TrainState, stream: PromptStream) -> Harvest:
  """Draws until `prompts_per_step` groups are kept, those carried over included, or `max_draws` draws were made."""
  config = run.config
  params = run.policy.sampling_params(state.params)
  kept, draws = [state.carried], []
  while sum(groups.count for groups in kept) < config.prompts_per_step and len(draws) < config.max_draws:
    draw = draw_once(run, state, params, stream)
    kept.append(to_groups(run, draw))
    draws.append(draw)
  groups = packing.concatenate(kept)
  size = config.prompts_per_step
  # One length whatever was drawn, so that nothing compiles again; the filter leaves NaN out.
  stds = np.full(config.max_draws * config.rollout.prompts_per_draw, np.nan, np.float32)
  for i, draw in enumerate(draws):
    stds[i * len(draw.stds) : (i + 1) * len(draw.stds)] = draw.stds
  return Harvest(
    groups=groups.take(slice(size)),
    carried=groups.take(slice(size, None)),
    stds=stds,
    values=summarize(run, state, draws, groups),
    rows=rollout_rows(run, state.step + 1, draws[0]) if draws else [],
  )


def draw_once(run: Run, state: TrainState, params: Params, stream: PromptStream) -> Draw:
  """The next prompts of the stream, sampled, scored, rewarded and judged by the filter."""
  config = run.config
  numbered = stream.next_batch(config.rollout.prompts_per_draw)
  rollouts = run.engine.rollout(params, numbered, run.key, config.samples_per_prompt)
  parts = reward(run, state, numbered, rollouts)
  advantages, stds = jax.device_get(_group_advantages(parts.total, config.training.advantages))
  refused = rollouts.refused.reshape(stds.size, -1).any(axis=1)
  keep = np.asarray(filtering.keep(state.filter, stds, run.filter)) & ~refused
  return Draw([prompt for _, prompt in numbered], rollouts, parts, advantages, stds, keep)


def reward(run: Run, state: TrainState, numbered: list[tuple[int, Prompt]], rollouts: Rollouts) -> Rewards:
  """Every part of the reward of a draw, as [P, G] arrays; rlpr sections 2 to 5."""
  settings = run.config.reward
  shape = (len(numbered), run.config.samples_per_prompt)
  formats = [rewards.format_score(text, run.engine.template) for text in rollouts.texts]
  repetition = [
    rewards.repetition_penalty(text, settings.repetition_window, settings.repetition_limit) for text in rollouts.texts
  ]
  parts = jax.device_get(
    _assess(
      rollouts.reference_logps.reshape(*shape, -1),
      rollouts.reference_mask.reshape(*shape, -1),
      rollouts.scorable.reshape(shape),
      state.baselines[[prompt.row for _, prompt in numbered]],
      np.array(formats, np.float32).reshape(shape),
      np.array(repetition, np.float32).reshape(shape),
      aggregate=settings.aggregate,
      shaping=settings.shaping,
      format_coefficient=settings.format_coefficient,
    )
  )
  if settings.kind == "random":  # the control: spread as a reward is, and knows nothing
    noise = [np.random.default_rng([run.config.seed, number]).random(shape[1]) for number, _ in numbered]
    parts = parts._replace(total=np.array(noise, np.float32))
  return parts


def to_groups(run: Run, draw: Draw) -> Groups:
  """The groups of a draw that are kept."""
  kept, shape, rollouts = np.flatnonzero(draw.keep), draw.advantages.shape, draw.rollouts
  tokens, lengths = pad_prompts([draw.prompts[p] for p in kept], run.config.data.prompt_limit)
  return Groups(
    tokens,
    lengths,
    rollouts.tokens.reshape(*shape, -1)[kept],
    rollouts.lengths.reshape(shape)[kept],
    rollouts.logprobs.reshape(*shape, -1)[kept],
    draw.advantages[kept],
  )


def summarize(run: Run, state: TrainState, draws: list[Draw], groups: Groups) -> dict[str, float]:
  """Metrics of everything that a step sampled, dropped groups included."""
  values = {
    "filter/threshold": max(float(filtering.threshold(state.filter, run.filter)), 0.0),
    "filter/drawn": sum(len(draw.prompts) for draw in draws),
    "filter/kept": int(sum(draw.keep.sum() for draw in draws)),
    "filter/carried_in": state.carried.count,
    "filter/trained": min(groups.count, run.config.prompts_per_step),
  }
  if not draws:  # what was carried over was enough
    return values
  rollouts = [draw.rollouts for draw in draws]

  def everywhere(field: str) -> np.ndarray:
    return np.concatenate([getattr(part, field) for part in rollouts])

  seconds = {name: sum(part.seconds[name] for part in rollouts) for name in rollouts[0].seconds}
  sampling = seconds["prefill"] + seconds["decode"]
  return values | {
    **{f"reward/{name}": float(np.mean([getattr(draw.rewards, name) for draw in draws])) for name in Rewards._fields},
    "reward/group_std": float(np.mean([draw.stds for draw in draws])),
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


def rollout_rows(run: Run, step: int, draw: Draw) -> list[dict[str, Any]]:
  """The first `log.rollouts` responses of a draw with every part of their reward, as they go to disk."""
  rows = []
  for i in range(min(run.config.log.rollouts, len(draw.rollouts.texts))):
    p, g = divmod(i, run.config.samples_per_prompt)
    prompt, answer = draw.prompts[p], draw.rollouts.reference_mask[i]
    parts = {f"reward_{name}": value for name, value in draw.rewards._asdict().items()}
    rows.append(
      {
        "step": step,
        "row": prompt.row,
        "source": prompt.source,
        "question": prompt.question,
        "reference": prompt.reference,
        "response": draw.rollouts.texts[i],
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
