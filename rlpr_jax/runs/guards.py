"""Signs in the metrics of long runs that go wrong; and batches that are not finite, kept for a look at them."""

import functools
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlpr_jax import processes
from rlpr_jax.runs import ACCURACY
from rlpr_jax.runs.storage import persist, write_atomically


def alarms(rows: Sequence[Mapping[str, float]], settings: ConfigDict) -> dict[tuple[str, str], str]:
  """Finds what was wrong in each of the last `patience` steps, and a held-out accuracy far under the run's best.

  These are the signs of a policy that collapses; of one whose answers alone drift, the last may be the only one.

  Args:
    rows: metrics of the run's steps so far, in order.
    settings: `config.guards`.

  Returns:
    a line for each sign, by the metric that shows it and the side on which it is.
  """
  steps = [row for row in rows if "reward/total" in row]
  recent = steps[-settings.patience :]
  if len(recent) < settings.patience:
    return {}

  def usual(name: str) -> float:
    return float(np.mean([row.get(name, 0.0) for row in steps[: settings.patience]]))

  signs = (
    (
      "rollout/response_length",
      settings.min_length_share * usual("rollout/response_length"),
      math.inf,
      "responses of {:.1f} tokens",
    ),
    ("rollout/truncated", 0, settings.max_truncated, "a share of {:.2f} of the responses cut at their limit"),
    ("update/entropy", settings.min_entropy, math.inf, "an entropy of {:.4f} nats a token"),
    ("update/step_kl", 0, settings.max_step_kl, "steps that move the policy by {:.3f} nats a token"),
    ("filter/trained", 1, math.inf, "{:.0f} groups that could be trained on"),
    ("reward/not_finite_share", 0, settings.max_not_finite, "a share of {:.2f} of the rewards not finite"),
    ("answer/empty", 0, settings.max_empty_answers, "a share of {:.2f} of the answers empty"),
    (
      "answer/length",
      settings.min_answer_length,
      settings.max_answer_length,
      "answers {:.2f} times as long as their references",
    ),
    (
      "answer/exact",
      settings.min_exact_share * usual("answer/exact"),
      math.inf,
      "a share of {:.3f} of answers with the reference's text",
    ),
    ("reward/format", settings.min_format, math.inf, "a format rate of {:.2f}"),
    ("reward/gain", settings.min_gain, math.inf, "a gain of {:.3f} of reasoning over none"),
  )
  raised = {}
  for name, least, most, text in signs:
    values = [row[name] for row in recent if name in row]
    if len(values) == len(recent) and all(value < least for value in values):
      raised[name, "under"] = f"{text.format(values[-1])}, under {least:.4g} for {settings.patience} steps"
    if len(values) == len(recent) and all(value > most for value in values):
      raised[name, "over"] = f"{text.format(values[-1])}, over {most:.4g} for {settings.patience} steps"
  accuracies = [row[ACCURACY] for row in rows if ACCURACY in row]
  best = max(accuracies, default=0.0)
  least = best - settings.max_accuracy_lost
  if accuracies and accuracies[-1] < least:
    raised[ACCURACY, "under"] = (
      f"a held-out accuracy of {accuracies[-1]:.3f}, under {least:.3f} after a best of {best:.3f}"
    )
  return raised


class Watch:
  """Counts updates that were left out, raises alarms, and says when a run is to stop."""

  def __init__(self, directory: pathlib.Path, settings: ConfigDict, retry_seconds: float):
    """`directory`: where minibatches that were not finite are written."""
    self.settings = settings
    self._directory, self._retry_seconds = directory, retry_seconds
    self._skipped = 0  # updates in a row
    self._raised: set[tuple[str, str]] = set()  # signs that were there at the step before

  def look(
    self,
    step: int,
    rows: Sequence[Mapping[str, float]],
    minibatches: Sequence[Any],
    losses: Sequence[Mapping[str, np.ndarray]],
  ) -> tuple[bool, str | None]:
    """Looks at a step.

    Args:
      rows: metrics of the run's steps so far.
      minibatches: the step's packed rows, which were gone through as often as it takes for `losses`, in order.
      losses: metrics of each update.

    Returns:
      whether something has gone wrong that had not before, and why the run is to stop, if it is.
    """
    paths, most = [], 0
    for i, loss in enumerate(losses):
      self._skipped = self._skipped + 1 if loss["skipped"] else 0
      most = max(most, self._skipped)
      if loss["skipped"]:
        path = self._directory / f"step_{step:06d}_update_{i}.npz"
        paths.append(path)
        print(f"update {i} of step {step} is not finite and left out: its rows are in {path}", flush=True)
        if processes.is_first():
          persist(functools.partial(dump, path, minibatches[i % len(minibatches)]), path, self._retry_seconds)
    raised = alarms(rows, self.settings)
    new = raised.keys() - self._raised
    for sign, alarm in raised.items():
      if sign in new:
        print(f"alarm at step {step}: {alarm}", flush=True)
    trouble, self._raised = bool(paths) or bool(new), set(raised)
    if most >= self.settings.max_skipped:
      return trouble, f"{most} updates in a row were not finite, the last one's rows are in {paths[-1]}"
    return trouble, f"alarm: {next(iter(raised.values()))}" if raised and self.settings.stop else None


def dump(path: pathlib.Path, rows: Any) -> None:
  """Writes a minibatch as an .npz with the fields of a named tuple of rows, those of the rows in use."""
  used = np.any(rows.segment_ids > 0, axis=1)
  content = io.BytesIO()
  fields: dict[str, Any] = {field: x[used] for field, x in rows._asdict().items() if isinstance(x, np.ndarray)}
  np.savez_compressed(content, **fields)
  path.parent.mkdir(exist_ok=True)
  write_atomically(path, content.getvalue())
