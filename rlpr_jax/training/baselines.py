"""r': how probable each reference is without reasoning (RLPR, section 3.2). One row for each prompt of the data set."""

import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from rlpr_jax import config as configs
from rlpr_jax import processes, rewards
from rlpr_jax.models import Params
from rlpr_jax.runs import metrics
from rlpr_jax.runs.inputs import digest_rows
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.unfinished import KeptRows
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt, TrainState


def unknown_baselines(run: Run, rows: int | None = None) -> np.ndarray:
  """float32[N, *M, A] of NaN; `rows` is N if it is not that of the run's prompts."""
  rows, several = len(run.prompts) if rows is None else rows, configs.max_references(run.config)
  axis = () if several is None else (several,)
  return np.full((rows, *axis, run.config.data.max_reference_length), np.nan, np.float32)


def measures_all_before(config: ConfigDict) -> bool:
  """Whether the baselines of all prompts are measured before step 1."""
  return bool(config.reward.baseline_policy == "initial" and config.reward.baseline_when == "before")


def measure_baselines(
  run: Run, params: Params, prompts: Sequence[Prompt], workdir: pathlib.Path, stop: StopRequest | None = None
) -> np.ndarray:
  """Measures the baselines of some prompts, float32[N, *M, A]; NaN where `stop` came first.

  Those that were measured by a run that was stopped in this are taken from `workdir`, and the others kept there.
  """
  kept = KeptRows(workdir, "baselines", of=str(digest_rows(prompts)))
  baselines = unknown_baselines(run, len(prompts))
  for place, row in kept.rows.items():
    baselines[place] = row.reshape(baselines.shape[1:])
  places = [place for place in range(len(prompts)) if place not in kept.rows]
  size, mine = run.config.rollout.prompts_per_draw, processes.share(places)
  params, new = run.policy.sampling_params(params), unknown_baselines(run, len(mine))
  progress = metrics.Progress("baselines, prompt")
  for first in range(0, len(mine), size):
    if stop:
      break
    part = mine[first : first + size]
    measured = run.engine.baseline(params, [prompts[place] for place in part])
    new[first : first + size] = measured
    kept.add(dict(zip(part, measured.reshape(len(part), -1), strict=True)), seconds=1)
    progress(first + len(part), len(mine))
  kept.write()
  baselines[places] = processes.gather(new, len(places))
  return baselines


def prompts_to_measure(run: Run, state: TrainState, prompts: Sequence[Prompt]) -> list[Prompt]:
  """Those of a draw whose baselines are unknown, or that the config wants anew."""
  policy = run.config.reward.baseline_policy
  if policy == "none" or measures_all_before(run.config):
    return []
  return [prompt for prompt in prompts if policy != "initial" or np.isnan(state.baselines[prompt.row]).all()]


def scorer_measures(config: ConfigDict) -> bool:
  """Whether r' is the scorer's, and it reads whole texts: then r' is one more text behind the prompt."""
  scorer, policy = config.reward.scorer, config.reward.baseline_policy
  return bool(scorer != "policy" and (policy in ("current", "moving_average") or policy == scorer == "initial"))


def renew_baselines(
  run: Run, state: TrainState, params: Params, prompts: Sequence[Prompt], measured: np.ndarray | None = None
) -> np.ndarray:
  """Returns the baselines [N, *M, A], with those of a draw's prompts that are unknown or that the config wants anew.

  Args:
    params: of the policy that scores, as the sampler reads them.
    prompts: those of `prompts_to_measure`.
    measured: their baselines where they are known by now, [N, *M, A]; on every process.
  """
  settings = run.config.reward
  if not prompts:
    return state.baselines
  if settings.baseline_policy == "initial":
    params = run.policy.sampling_params(state.initial)
  elif settings.baseline_policy == "averaged_weights":
    params = run.policy.sampling_params(state.averaged)
  rows = [prompt.row for prompt in prompts]
  new = measured
  if new is None:
    new = processes.gather(run.engine.baseline(params, processes.share(prompts)), len(prompts))
  if settings.baseline_policy == "moving_average":
    new = np.asarray(rewards.moving_average(state.baselines[rows], new, settings.baseline_rate))
  baselines = state.baselines.copy()  # a checkpoint may still be reading the old ones
  baselines[rows] = new
  return baselines
