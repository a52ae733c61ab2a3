"""The state of a run: before its first step, from step to step, and as a checkpoint holds it."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from rlpr_jax import filtering, processes
from rlpr_jax.config import max_references
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.models import Params
from rlpr_jax.policy import initial_params
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import OnDisk
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.sampling.engine import StoppedError
from rlpr_jax.training import held_out, supervised
from rlpr_jax.training.baselines import measure_baselines, measures_all_before, unknown_baselines
from rlpr_jax.training.optimizer import abstract_opt_state, init_opt_state
from rlpr_jax.training.reward import credits_parts
from rlpr_jax.training.run import Run
from rlpr_jax.types import Groups, StepBatch, TrainState, Unfinished

_OF_GROUPS = "carried", "unfinished"  # fields of a state with more rows or fewer


def abstract_state(run: Run, rows: int | None = None) -> TrainState:
  """A state before step 1 with shapes in the place of parameters and optimiser state, to restore a checkpoint into.

  Args:
    rows: of the data set when the checkpoint was written; None for as many as there are.
  """
  config, policy = run.config, run.policy
  return TrainState(
    step=0,
    params=policy.trained,
    opt_state=abstract_opt_state(run.update.program.optimizer, policy.trained, policy.sharding),
    filter=jax.device_get(filtering.init(run.filter)),
    baselines=unknown_baselines(run, rows),
    initial=policy.trained if keeps_initial(config) else {},
    lagged=policy.trained if config.reward.scorer == "lagged" else {},
    averaged=policy.trained if config.reward.baseline_policy == "averaged_weights" else {},
    carried=Groups.empty(
      prompt_limit=config.data.prompt_limit,
      samples=config.samples_per_prompt,
      response_limit=config.rollout.max_response_length,
      answer_limit=None if config.training.answer_gradient == "none" else config.data.max_reference_length,
      credits_parts=credits_parts(config),
      weighs_tokens=config.training.importance_cap > 0,
    ),
    stream=PromptStream(run.prompts, config.seed).state(),
    unfinished=none_unfinished(config),
  )


def none_unfinished(config: ConfigDict) -> Unfinished | None:
  """No groups that go on, where groups may; None where a draw ends with its last response."""
  if config.rollout.carry == "none":
    return None
  references = max_references(config)
  suffix = (config.data.max_reference_length,) if references is None else (references, config.data.max_reference_length)
  return Unfinished.empty(config.samples_per_prompt, config.rollout.max_response_length, suffix)


def first_state(run: Run, workdir: pathlib.Path, writer: metrics.MetricsWriter, stop: StopRequest) -> TrainState | None:
  """Makes the state before step 1: warm start, the baselines of the initial policy, the first evaluation.

  All three are kept in `workdir` as they go, so that the same call goes on from there.

  Returns:
    the state; None if `stop` was asked for.
  """
  with metrics.announced("making the policy's parameters"):
    params = initial_params(run.config, run.policy)
  demonstrations: list[supervised.Demonstration] = []
  if run.config.warm_start.steps:
    demonstrations, dropped = supervised.load(run.config, run.engine.tokenizer, run.engine.eos_id)
    writer.write_dropped_rows("config.warm_start.path", dropped)
  compile_sampling(run, params)  # a lack of memory shows here
  if demonstrations:
    params = supervised.warm_start(run.config, run.policy, params, demonstrations, workdir, stop)
  baselines = unknown_baselines(run)
  if measures_all_before(run.config) and not processes.any_of(bool(stop)):
    baselines = measure_baselines(run, params, run.prompts, workdir, stop)
  if processes.any_of(bool(stop)):
    return None
  try:
    accuracies = held_out.evaluate_run(run, params, 0, workdir, stop)
  except StoppedError:
    return None
  if accuracies:
    writer.write(0, accuracies)
  return abstract_state(run)._replace(
    params=params,
    opt_state=init_opt_state(run.update.program.optimizer, params, run.policy.sharding),
    baselines=baselines,
    initial=copy_params(params) if keeps_initial(run.config) else {},
    lagged=copy_params(params) if run.config.reward.scorer == "lagged" else {},
    averaged=copy_params(params) if run.config.reward.baseline_policy == "averaged_weights" else {},
  )


def compile_sampling(run: Run, params: Params) -> None:
  """Compiles the programs that sample and score. Those of the updates are compiled when the first is taken."""
  with metrics.announced("compiling the programs that sample and score"):
    run.engine.device.compile_programs(run.policy.sampling_params(params), scoring=True)


def adopt_rows(
  run: Run, state: TrainState, old: Sequence[str], new: Sequence[str], workdir: pathlib.Path
) -> TrainState:
  """Makes a state go on with other rows than it was made with: each keeps its baseline, and the draws begin anew.

  Groups that had begun are given up.

  Args:
    old, new: the rows' digests.
  """
  baselines = unknown_baselines(run)
  places = {digest: row for row, digest in enumerate(old)}
  for row, digest in enumerate(new):
    if digest in places:
      baselines[row] = state.baselines[places[digest]]
  if measures_all_before(run.config):
    unknown = [row for row, digest in enumerate(new) if digest not in places]
    print(f"{len(unknown)} rows are new: their baselines are those of the policy as it is now", flush=True)
    baselines[unknown] = measure_baselines(run, state.params, [run.prompts[row] for row in unknown], workdir)
  return state._replace(
    baselines=baselines,
    stream=PromptStream(run.prompts, run.config.seed).state(),
    unfinished=none_unfinished(run.config),
  )


def finish_step(run: Run, state: TrainState, batch: StepBatch, stream: PromptStream) -> TrainState:
  """Returns the state after a step: beside what the updates changed, all that it leaves to the next."""
  step, settings = state.step + 1, run.config.reward
  due = settings.scorer == "lagged" and step % settings.scorer_every == 0
  return state._replace(
    step=step,
    filter=jax.device_get(filtering.update(state.filter, batch.stds, run.filter)),
    baselines=batch.baselines,
    lagged=copy_params(state.params) if due else state.lagged,
    averaged=average_params(state.averaged, state.params, settings.baseline_rate) if state.averaged else {},
    carried=batch.carried,
    stream=stream.state(),
    unfinished=batch.unfinished,
  )


def keeps_initial(config: ConfigDict) -> bool:
  """Whether the initial policy is needed after the first step."""
  later = config.reward.baseline_policy == "initial" and not measures_all_before(config)
  return config.training.kl_coefficient > 0 or config.reward.scorer == "initial" or later


def copy_params(params: Params) -> Params:
  """A copy that outlives the parameters, which an update donates."""
  return jax.tree.map(jnp.copy, params)


@jax.jit
def average_params(average: Params, params: Params, rate: ArrayLike) -> Params:
  """(1 - rate) * average + rate * params.

  >>> average_params({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, 0.25)["w"].tolist()
  [1.25]
  """
  return jax.tree.map(lambda old, new: old + rate * (new - old), average, params)


def split(state: TrainState, carried_limit: int) -> OnDisk:
  """Takes a state apart as its checkpoint holds it; its groups are padded to `carried_limit`, to have one shape.

  That is `carrying.most_groups` of the config.
  """
  arrays = state._asdict()
  params, host = arrays.pop("params"), {name: arrays.pop(name) for name in ("step", "stream")}

  def padded(groups: Groups | Unfinished) -> Groups | Unfinished:
    missing = carried_limit - groups.num_groups
    return jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), groups)

  of_groups = {name: arrays[name] for name in _OF_GROUPS if arrays[name] is not None}
  arrays |= {name: padded(groups) for name, groups in of_groups.items()}
  arrays = {name: value for name, value in arrays.items() if jax.tree.leaves(value)}
  return OnDisk(params, arrays, host | {name: groups.num_groups for name, groups in of_groups.items()})


def join(params: Params, arrays: dict[str, Any], host: dict[str, Any]) -> TrainState:
  """Puts together the state that `split` took apart."""
  of_groups = {name: arrays[name].take(slice(host[name])) for name in _OF_GROUPS if name in arrays}
  return TrainState(params=params, **{"initial": {}, "lagged": {}, "averaged": {}} | arrays | host | of_groups)
