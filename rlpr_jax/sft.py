"""Supervised steps alone: `rlpr sft --config=RECIPE --workdir=DIR [--config.field=value ...]`.

A base model that never saw the tags learns them from prompts with responses (`config.warm_start`); RLPR then begins at
what `rlpr export` makes of the result. A run that was stopped or killed goes on from its last checkpoint
when the same command is given again.
"""

import pathlib
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from rlpr_jax import entry, processes
from rlpr_jax.errors import InputError, setting_names
from rlpr_jax.policy import initial_params, load_policy
from rlpr_jax.runs import metrics, trackers
from rlpr_jax.runs.checkpoints import Checkpoints
from rlpr_jax.runs.inputs import Inputs, check_inputs, digest_text, model_digests, read_inputs, write_inputs
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.training import supervised
from rlpr_jax.training.optimizer import init_opt_state
from rlpr_jax.training.settings import NAMES, check_lengths, check_rows
from rlpr_jax.training.supervised import SupervisedState


def sft(config: ConfigDict, workdir: pathlib.Path, accept_changes: bool = False, fresh: bool = False) -> None:
  """The supervised steps of `config.warm_start` in `workdir`, from its last checkpoint or from the beginning.

  Args:
    accept_changes: goes on with other demonstrations, tokenizer, chat template or weights than the run began with.
    fresh: sets aside what an earlier run has written there, and begins anew.
  """
  with StopRequest() as stop, entry.begin(config, workdir, "sft", stop, fresh), setting_names(NAMES):
    settings = config.warm_start
    if not settings.steps:
      raise InputError("config.warm_start.steps: 0, expected how many supervised steps to take")
    policy = load_policy(config)
    assert policy.tokenizer is not None
    assert policy.turn_end is not None
    check_rows(config, policy.sharding)
    check_lengths(config, policy.config.max_length)
    demonstrations, dropped = supervised.load(config, policy.tokenizer, policy.turn_end.eos_id)
    rows = [digest_text(str(row)) for row in demonstrations] if settings.path else []
    inputs = Inputs("sft", model_digests(config, policy.tokenizer), rows)
    check_inputs(workdir, read_inputs(workdir), inputs, accept_changes)
    entry.write_config(config, workdir)
    write_inputs(workdir, inputs, config.log.retry_seconds)
    checkpoints = Checkpoints(workdir, config.log, supervised.split, supervised.join)
    state = checkpoints.restore(supervised.abstract_supervised_state(config, policy))
    writer = metrics.MetricsWriter(
      workdir,
      state.step if state else None,
      config.log.retry_seconds,
      unsaved=config.log.checkpoint_every,
      tensorboard=trackers.TENSORBOARD in config.log.trackers,
    )
    writer.write_dropped_rows("config.warm_start.path", dropped)
    followed = config.log.trackers if processes.is_first() else ()
    with trackers.following(workdir, followed, config.log.tracker_seconds):
      if state is None:
        params = initial_params(config, policy)
        state = SupervisedState(0, params, init_opt_state(supervised.optimizer(settings), params, policy.sharding))
      else:
        print(f"resumed after step {state.step} of {settings.steps}", flush=True)
      progress, since = metrics.Progress("supervised, step"), time.perf_counter()
      for state, losses in supervised.steps(config, policy, state, demonstrations):  # noqa: B020
        now, since = time.perf_counter() - since, time.perf_counter()
        values = {"sft/loss": float(losses["answer_loss"]), "sft/grad_norm": float(losses["grad_norm"])}
        writer.write(state.step, values | {"sft/skipped": int(losses["skipped"]), "seconds/step": now})
        stopping = processes.any_of(bool(stop))
        if stopping or state.step == settings.steps or state.step % config.log.checkpoint_every == 0:
          checkpoints.save(state)
          checkpoints.wait()  # before the next step donates the arrays
        progress(state.step, settings.steps, f"loss {values['sft/loss']:.3f}")
        if stopping:
          break
      checkpoints.close()
      writer.close()
    how = "done" if state.step == settings.steps else "stopped and saved: the same command goes on from there"
    print(f"step {state.step} of {settings.steps}, {how}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  entry.run(sft, argv, __doc__, goes_on=True)


if __name__ == "__main__":
  main()
