"""r': how probable each reference is without reasoning (RLPR, section 3.2). One row for each prompt of the data set."""

from collections.abc import Sequence

import numpy as np

from rlpr_jax import processes, rewards
from rlpr_jax.models import Params
from rlpr_jax.runs import metrics
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt, TrainState


def unknown_baselines(run: Run, rows: int | None = None) -> np.ndarray:
  """float32[N, A] of NaN; `rows` is N if it is not that of the run's prompts."""
  rows = len(run.prompts) if rows is None else rows
  return np.full((rows, run.config.data.max_reference_length), np.nan, np.float32)


def initial_baselines(run: Run, params: Params, stop: StopRequest) -> np.ndarray:
  """Measures every reference's under the initial policy, float32[N, A]; they are kept in the state."""
  return measure_baselines(run, params, run.prompts, stop)


def measure_baselines(
  run: Run, params: Params, all_prompts: Sequence[Prompt], stop: StopRequest | None = None
) -> np.ndarray:
  """Measures the baselines of some prompts, float32[N, A]; NaN where `stop` came first."""
  size, prompts = run.config.rollout.prompts_per_draw, processes.share(all_prompts)
  params, baselines = run.policy.sampling_params(params), unknown_baselines(run, len(prompts))
  progress = metrics.Progress("baselines, prompt")
  for first in range(0, len(prompts), size):
    if stop:
      break
    baselines[first : first + size] = run.engine.baseline(params, prompts[first : first + size])
    progress(min(first + size, len(prompts)), len(prompts))
  return processes.gather(baselines, len(all_prompts))


def renew_baselines(run: Run, state: TrainState, params: Params, prompts: Sequence[Prompt]) -> np.ndarray:
  """Returns the baselines [N, A], those of a draw's prompts measured anew where `reward.baseline_policy` asks for it.

  Args:
    params: of the policy that scores, as the sampler reads them.
  """
  settings = run.config.reward
  if settings.baseline_policy not in ("current", "moving_average"):
    return state.baselines
  rows = [prompt.row for prompt in prompts]
  new = processes.gather(run.engine.baseline(params, processes.share(prompts)), len(prompts))
  if settings.baseline_policy == "moving_average":
    new = np.asarray(rewards.moving_average(state.baselines[rows], new, settings.baseline_rate))
  baselines = state.baselines.copy()  # a checkpoint may still be reading the old ones
  baselines[rows] = new
  return baselines
