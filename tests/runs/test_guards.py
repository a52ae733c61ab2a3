"""Alarms, against rows made by hand, and what becomes of updates that are not finite."""

import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import types
from rlpr_jax.runs import guards

SETTINGS = configs.default().guards
WELL = {
  "reward/total": 0.5, "rollout/response_length": 40.0, "update/entropy": 0.3, "reward/format": 0.9, "reward/gain": 0.2,
  "rollout/truncated": 0.1, "reward/not_finite_share": 0.0, "answer/empty": 0.0, "answer/length": 1.1,
  "answer/exact": 0.4,
}  # fmt: skip


def rows(count, **changes):
  return [{"step": 0, "held_out/accuracy": 0.1}] + [{"step": i, **WELL, **changes} for i in range(1, count + 1)]


def test_no_alarm_while_all_is_well():
  assert not guards.alarms([], SETTINGS)
  assert not guards.alarms(rows(50), SETTINGS)


@pytest.mark.parametrize(
  ("name", "bad", "fine", "said"),
  [
    ("rollout/response_length", 9.9, 10.1, "responses of 9.9 tokens, under 10 for 5 steps"),
    ("rollout/truncated", 0.51, 0.49, "share of 0.51 of the responses cut at their limit, over 0.5 for 5 steps"),
    ("update/entropy", 0.009, 0.011, "entropy of 0.0090 nats a token, under 0.01"),
    ("update/step_kl", 0.2, 0.05, "steps that move the policy by 0.200 nats a token, over 0.1"),
    ("reward/not_finite_share", 0.2, 0.05, "share of 0.20 of the rewards not finite, over 0.1"),
    ("answer/empty", 0.3, 0.1, "share of 0.30 of the answers empty, over 0.2"),
    ("answer/length", 0.19, 0.21, "answers 0.19 times as long as their references, under 0.2"),
    ("answer/length", 5.1, 4.9, "answers 5.10 times as long as their references, over 5"),
    ("answer/exact", 0.09, 0.11, "share of 0.090 of answers with the reference's text, under 0.1"),
    ("reward/format", 0.19, 0.21, "format rate of 0.19, under 0.2"),
    ("reward/gain", -0.01, 0.01, "gain of -0.010 of reasoning over none, under 0"),
  ],
)
def test_each_sign_of_collapse_after_five_steps_of_it(name, bad, fine, said):
  well = rows(10)
  assert not guards.alarms([*well, *rows(4, **{name: bad})[1:]], SETTINGS)
  ((sign, alarm),) = guards.alarms([*well, *rows(5, **{name: bad})[1:]], SETTINGS).items()
  assert sign[0] == name
  assert said in alarm
  assert not guards.alarms([*well, *rows(5, **{name: fine})[1:]], SETTINGS)
  assert not guards.alarms([*well, *rows(5, **{name: bad})[1:], {"step": 16, **WELL}], SETTINGS)
  unknown = {key: value for key, value in WELL.items() if key != name} | {"rollout/response_length": 40.0}
  assert not guards.alarms([*well, *[unknown] * 5], SETTINGS)  # a step that did not measure it


@pytest.mark.parametrize(("accuracies", "says"), [
  ((0.3, 0.66, 0.55), "a held-out accuracy of 0.550, under 0.560 after a best of 0.660"),
  ((0.3, 0.66, 0.55, 0.6), None),  # it came back
  ((0.3, 0.66, 0.57), None),
  ((0.3,), None),
])  # fmt: skip
def test_held_out_accuracy_far_under_its_best(accuracies, says):
  """With no other sign: as where own answers drift and the reward does not see it."""
  well = [{**row, "held_out/accuracy": x} for row, x in zip(rows(len(accuracies))[1:], accuracies, strict=True)]
  found = guards.alarms([*rows(10), *well, *rows(3)[1:]], SETTINGS)
  assert list(found) == ([("held_out/accuracy", "under")] if says else [])
  assert list(found.values()) == ([says] if says else [])


def minibatch(tokens):
  rows = types.PackedRows.empty(3, 8)
  rows.tokens[0, :2], rows.segment_ids[0, :2] = tokens, 1
  return rows


def losses(*skipped):
  return [{"skipped": np.bool_(x)} for x in skipped]


def test_updates_in_a_row_stop_the_run_and_leave_their_rows(tmp_path, capsys):
  watch = guards.Watch(tmp_path / "failed", SETTINGS, retry_seconds=0.0)
  parts = [minibatch([5, 6]), minibatch([7, 8])]
  assert watch.look(1, rows(1), parts, losses(False, False)) == (False, None)
  assert not (tmp_path / "failed").exists()
  assert watch.look(2, rows(2), parts, losses(False, True)) == (True, None)
  saved = np.load(tmp_path / "failed/step_000002_update_1.npz")
  assert saved["tokens"].tolist() == [[7, 8, 0, 0, 0, 0, 0, 0]]  # rows in use alone
  assert set(saved) == {name for name, field in parts[1]._asdict().items() if field is not None}
  assert "update 1 of step 2 is not finite" in capsys.readouterr().out
  assert watch.look(3, rows(3), parts, losses(True, False)) == (True, None)  # two in a row, then a good one
  trouble, why = watch.look(4, rows(4), parts, losses(True, True, True, True))
  assert (trouble, why) == (True, None)
  trouble, why = watch.look(5, rows(5), parts, losses(True, False))
  assert "5 updates in a row were not finite" in why
  assert "step_000005_update_0.npz" in why


def test_an_alarm_that_takes_the_place_of_another_is_said_too(tmp_path, capsys):
  watch = guards.Watch(tmp_path, SETTINGS, retry_seconds=0.0)
  history = rows(10) + rows(5, **{"reward/format": 0.0})[1:]
  assert watch.look(15, history, [], []) == (True, None)
  history += rows(5, **{"answer/empty": 0.9})[1:]  # and the format is well again
  assert watch.look(20, history, [], []) == (True, None)
  said = capsys.readouterr().out.splitlines()
  assert [line.split(": ")[0] for line in said] == ["alarm at step 15", "alarm at step 20"]
  assert "answers empty" in said[1]


@pytest.mark.parametrize("stop", [False, True])
def test_an_alarm_is_said_once_saves_and_stops_if_told_to(tmp_path, capsys, stop):
  settings = configs.default().guards
  settings.stop = stop
  watch = guards.Watch(tmp_path, settings, retry_seconds=0.0)
  bad = rows(10) + rows(8, **{"reward/format": 0.0})[1:]
  seen = [watch.look(step, bad[: step + 1], [], []) for step in range(11, 19)]
  assert [trouble for trouble, _ in seen] == [False] * 4 + [True] + [False] * 3
  assert [why is not None for _, why in seen] == [False] * 4 + [stop] * 4
  assert capsys.readouterr().out.count("alarm at step 15: a format rate of 0.00") == 1
