"""Trains a policy with RLPR: `rlpr train --config=RECIPE --workdir=DIR [--config.field=value ...]`.

    questions -> prompts -> rollouts -> reference probabilities -> rewards -> kept groups -> advantages -> update

A run that was stopped or killed goes on from its last checkpoint when the same command is given again.
"""

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlpr_jax import custom_reward as custom_rewards
from rlpr_jax import entry, processes
from rlpr_jax.custom_reward import CustomReward
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.errors import InputError, setting_names
from rlpr_jax.runs import ACCURACY, metrics, trackers, unfinished
from rlpr_jax.runs.checkpoints import Checkpoints
from rlpr_jax.runs.exports import Exports
from rlpr_jax.runs.guards import Watch
from rlpr_jax.runs.inputs import check_inputs, read_inputs, write_inputs
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.storage import reason
from rlpr_jax.sampling.engine import StoppedError
from rlpr_jax.training import carrying, packing, settings
from rlpr_jax.training.collect import collect
from rlpr_jax.training.held_out import evaluate_run
from rlpr_jax.training.logprobs import LogprobProgram, TextScorer, compute_logprobs
from rlpr_jax.training.old_logprobs import resolve_old_logprobs, step_divergence
from rlpr_jax.training.optimizer import rate_of_step
from rlpr_jax.training.run import Run, digest_inputs, set_up
from rlpr_jax.training.state import abstract_state, adopt_rows, compile_sampling, finish_step, first_state, join, split
from rlpr_jax.types import PackedRows, Params, StepBatch, TrainState

UNTRAINED = "filter/steps_without_training"  # so far


def train(
  config: ConfigDict,
  workdir: pathlib.Path,
  custom_reward: CustomReward | None = None,
  accept_changes: bool = False,
  fresh: bool = False,
) -> None:
  """Runs `config` in `workdir` from its last checkpoint, or from the beginning, until `config.steps` are done.

  Args:
    custom_reward: gives the rewards that are trained on, in the place of what `config.reward` makes of the evidence; as
      `config.reward.custom`, which then holds its name.
    accept_changes: goes on with other data, tokenizer, chat template, weights or custom reward than the run began with.
    fresh: sets aside what an earlier run has written there, and begins anew.
  """
  if custom_reward is not None:
    config = config.copy_and_resolve_references()
    config.reward.custom = f"{custom_reward.__module__}.{custom_reward.__qualname__}"
  with StopRequest() as stop, entry.begin(config, workdir, "train", stop, fresh), setting_names(settings.NAMES):
    if custom_reward is None and config.reward.custom:
      custom_reward = custom_rewards.load(config.reward.custom)
    run = set_up(config, custom_reward)
    saved, inputs = read_inputs(workdir), digest_inputs(run)
    if check_inputs(workdir, saved, inputs, accept_changes):
      unfinished.clear(workdir)
    entry.write_config(config, workdir)
    to_disk = functools.partial(split, carried_limit=carrying.most_groups(config))
    checkpoints = Checkpoints(workdir, config.log, to_disk, join)
    began_with = saved.rows_at(checkpoints.latest() or 0) if saved else inputs.rows
    state = checkpoints.restore(abstract_state(run, len(began_with)))
    earlier = saved.earlier if saved else ()
    if state and began_with != inputs.rows:
      earlier = (*(part for part in earlier if part[0] < state.step), (state.step, began_with))
      state = adopt_rows(run, state, began_with, inputs.rows, workdir)
    writer = metrics.MetricsWriter(
      workdir,
      state.step if state else None,
      config.log.retry_seconds,
      tensorboard=trackers.TENSORBOARD in config.log.trackers,
    )
    checkpoints.know({row["step"]: row[ACCURACY] for row in writer.rows if ACCURACY in row})
    write_inputs(workdir, inputs._replace(earlier=earlier), config.log.retry_seconds)
    exports = Exports(workdir, config)
    followed = config.log.trackers if processes.is_first() else ()
    with trackers.following(workdir, followed, config.log.tracker_seconds):
      try:
        for field, rows in run.dropped_rows.items():
          writer.write_dropped_rows(field, rows)
        if state is None:
          state = first_state(run, workdir, writer, stop)
          if state:
            checkpoints.save(state, writer.value(0, ACCURACY))
        else:
          resume(run, state, workdir, checkpoints, writer, stop)
        if state:
          state = train_steps(run, state, workdir, checkpoints, writer, exports, stop)
      except Exception:
        if jax.process_count() == 1:  # of many the others may be gone, and to finish a checkpoint would wait for them
          checkpoints.close()
        raise
      latest = checkpoints.latest()
      checkpoints.close()
      if processes.is_first():
        exports.finish(latest, given_up=lambda: bool(stop) or latest != config.steps)
      writer.close()
    if state:
      unfinished.clear(workdir)
    if processes.is_first():
      finish(config, workdir, state)


def resume(
  run: Run,
  state: TrainState,
  workdir: pathlib.Path,
  checkpoints: Checkpoints[TrainState],
  writer: metrics.MetricsWriter,
  stop: StopRequest,
) -> None:
  """Begins a run that goes on: programs, and the evaluation that a stop may have cut short."""
  print(f"resumed after step {state.step} of {run.config.steps}", flush=True)
  if state.step < run.config.steps:
    compile_sampling(run, state.params)
  if is_measured(run.config, state.step) and writer.value(state.step, ACCURACY) is None:
    with contextlib.suppress(StoppedError):
      if accuracies := evaluate_run(run, state.params, state.step, workdir, stop):
        writer.amend(state.step, accuracies)
        checkpoints.know({state.step: accuracies[ACCURACY]})


def is_measured(config: ConfigDict, step: int) -> bool:
  """Whether the policy is evaluated after this step."""
  every = config.evaluation.every
  return step == config.steps or (every > 0 and step % every == 0)


def train_steps(
  run: Run,
  state: TrainState,
  workdir: pathlib.Path,
  checkpoints: Checkpoints[TrainState],
  writer: metrics.MetricsWriter,
  exports: Exports,
  stop: StopRequest,
) -> TrainState:
  """The training loop: from `state` to the last step, or to the last one that was whole when `stop` was asked for."""
  config = run.config
  stream = PromptStream(run.prompts, config.seed)
  stream.restore(state.stream)
  watch = Watch(workdir / "failed", config.guards, config.log.retry_seconds)
  progress_start, first = time.perf_counter(), state.step
  while state.step < config.steps:
    started, compiled = time.perf_counter(), metrics.compilations()

    # 1. Sample, score, reward and filter, until enough groups are kept.
    try:
      batch = collect(run, state, stream, stop, keep_rate(writer.rows))
    except StoppedError:
      break

    # 2. Update on them. The checkpoint being written may still be reading the arrays that the update donates.
    checkpoints.wait()
    if processes.is_first():
      exports.look(checkpoints.latest())
    unfinished.clear(workdir)
    updated = update_policy(run, state, batch, stream)
    state = updated.state

    # 3. Measure it and write it down.
    values = batch.metrics | updated.metrics | {"update/learning_rate": rate_of_step(config, state.step)}
    before = writer.rows[-1].get(UNTRAINED, 0) if writer.rows else 0
    values[UNTRAINED] = before + (not batch.groups.num_groups)
    if is_measured(config, state.step):
      with contextlib.suppress(StoppedError):
        values |= evaluate_run(run, state.params, state.step, workdir, stop)
    values["seconds/step"] = time.perf_counter() - started
    values["compilations"] = metrics.compilations() - compiled
    writer.write_rollouts(state.step, batch.rollouts)
    writer.write(state.step, values)

    # 4. Save it, and go on if all is well.
    trouble, why_stop = watch.look(state.step, writer.rows, updated.minibatches, updated.losses)
    stopping, accuracy = processes.any_of(bool(stop)), values.get(ACCURACY)
    measured = accuracy is not None and config.log.keep_best > 0
    due = state.step % config.log.checkpoint_every == 0 or exports.is_due(state.step)
    if state.step == config.steps or stopping or trouble or measured or due:
      checkpoints.save(state, accuracy)
    left = (time.perf_counter() - progress_start) / (state.step - first) * (config.steps - state.step)
    print(progress_line(state.step, config.steps, values, left), flush=True)
    if why_stop:
      checkpoints.wait()
      raise InputError(f"stopped after step {state.step}, which is saved: {why_stop}")
    if stopping:
      return state
  if checkpoints.latest() != state.step:
    checkpoints.save(state)
  return state


class Updated(NamedTuple):
  """Result of a step's updates."""

  state: TrainState
  minibatches: list[PackedRows]
  losses: list[dict[str, np.ndarray]]  # metrics of each optimiser step
  metrics: dict[str, float]  # of the step


def keep_rate(rows: Sequence[Mapping[str, float]]) -> float:
  """Share of the prompts that the last step which drew some has kept; 1 before the first one.

  >>> keep_rate([{"step": 1, "filter/kept": 24, "filter/drawn": 32}, {"step": 2, "filter/kept": 0, "filter/drawn": 0}])
  0.75
  """
  return next((row["filter/kept"] / row["filter/drawn"] for row in reversed(rows) if row.get("filter/drawn")), 1.0)


def update_policy(run: Run, state: TrainState, batch: StepBatch, stream: PromptStream) -> Updated:
  """Takes the optimiser steps of one training step."""
  training, started = run.config.training, time.perf_counter()
  batch, gap = resolve_ratios(run, state, batch)
  minibatches = packing.pack_minibatches(batch.groups, run.packing)
  if training.kl_coefficient:
    initial = training_scorer(run, state.initial)
    minibatches = [
      rows._replace(reference_logprobs=compute_logprobs(initial.program, initial.params, rows)) for rows in minibatches
    ]
  losses = []
  for rows in minibatches * training.epochs_per_step:
    state, loss = run.update(state, rows)
    losses.append(loss)
  losses = jax.device_get(losses)
  divergence = step_divergence(batch.groups, training_scorer(run, state.params))
  padding = [rows.padding(run.packing.micro_batch_rows) for rows in minibatches]
  return Updated(
    state=finish_step(run, state, batch, stream),
    minibatches=minibatches,
    losses=losses,
    metrics=gap
    | {"update/padding": float(np.mean(padding)) if padding else 0.0}
    | ({} if divergence is None else {"update/step_kl": divergence})
    | update_metrics(batch, losses, time.perf_counter() - started),
  )


def resolve_ratios(run: Run, state: TrainState, batch: StepBatch) -> tuple[StepBatch, dict[str, float]]:
  """Gives the batch the log-probabilities that ratios start from; what was carried in keeps those that it has."""
  groups, training = packing.concatenate([batch.groups, batch.carried]), run.config.training
  fresh, gap = resolve_old_logprobs(
    groups.take(slice(batch.carried_in, None)),
    training_scorer(run, state.params),
    training.old_logprobs,
    training.sampler_gap_limit,
    clip=(training.clip_low, training.clip_high),
    cap=training.importance_cap,
  )
  groups, size = packing.concatenate([groups.take(slice(batch.carried_in)), fresh]), batch.groups.num_groups
  batch = batch._replace(groups=groups.take(slice(size)), carried=groups.take(slice(size, None)))
  return batch, {f"sampler_gap/{name}": value for name, value in gap.items()}


def training_scorer(run: Run, params: Params) -> TextScorer:
  """A policy of the run, by its trained parameters, as what says how probable texts are in training."""
  settings = run.update.program.settings
  program = LogprobProgram(
    model=run.policy.model,
    temperature=settings.temperature,
    micro_batch_rows=settings.micro_batch_rows,
    sharding=settings.sharding,
  )
  return TextScorer(program, run.policy.merged_params(params), run.packing.row_length)


def update_metrics(batch: StepBatch, losses: list[dict[str, np.ndarray]], seconds: float) -> dict[str, float]:
  """Means over the step's optimiser steps that were finite, and what the update cost."""
  values = {"seconds/update": seconds, "tokens_per_second/update": int(batch.groups.lengths.sum()) / seconds}
  values["update/skipped"] = sum(bool(loss["skipped"]) for loss in losses)
  sound = [loss for loss in losses if not loss["skipped"]]
  names = sound[0].keys() - {"skipped"} if sound else ()
  return values | {f"update/{name}": float(np.mean([loss[name] for loss in sound])) for name in sorted(names)}


def finish(config: ConfigDict, workdir: pathlib.Path, state: TrainState | None) -> None:
  """Last words: how to go on, or what became of the held-out accuracy, and where the report is."""
  if state is None:
    print("stopped before step 1: what was done is kept, the same command goes on from there", flush=True)
    return
  if state.step < config.steps:
    print(f"stopped after step {state.step} of {config.steps} and saved: the same command goes on from there")
  rows = metrics.read(workdir / "metrics.jsonl")
  if not rows:  # a warm start alone
    return
  accuracy = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
  for step in sorted({min(accuracy), max(accuracy)} if accuracy else ()):
    when = "before RLPR" if step == 0 else "after RLPR"
    print(f"held-out Avg@{config.evaluation.samples} {when} (step {step}): {100 * accuracy[step]:.1f}%")
  from rlpr_jax import report

  try:
    print(f"report: {report.write_report(workdir)}", flush=True)
  except Exception as error:  # whatever it is: the run is done and saved
    print(f"report: cannot be written ({reason(error)}), rlpr report does it later", file=sys.stderr, flush=True)


def progress_line(step: int, steps: int, values: dict[str, float], left: float) -> str:
  """One line a step: reward, what was kept, response length, where the time went, speed, time left."""

  def show(name: str, digits: int) -> str:
    return f"{values[name]:.{digits}f}" if name in values else "-"

  return (
    f"step {step}/{steps}  reward {show('reward/total', 3)}  r {show('reward/reference', 3)}"
    f"  r' {show('reward/baseline', 3)}  kept {values['filter/kept']}/{values['filter/drawn']}"
    f" (trained {values['filter/trained']})  length {show('rollout/response_length', 1)}"
    f"  | sample {show('seconds/rollout', 1)}s score {show('seconds/score', 1)}s update {show('seconds/update', 1)}s"
    f"  {show('tokens_per_second/rollout', 0)} tokens/s, slots {show('rollout/occupancy', 2)} busy"
    f"  | {metrics.duration(left)} left"
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  entry.run(train, argv, __doc__, goes_on=True)


if __name__ == "__main__":
  main()
