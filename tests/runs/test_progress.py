"""What is shown of long work: a bar on a terminal, lines elsewhere."""

import io
import re
import sys

import pytest

from rlpr_jax.runs import metrics


class Screen(io.StringIO):
  """A terminal of 100 columns, as far as programs ask."""

  def isatty(self):
    return True


@pytest.fixture
def seconds(monkeypatch):
  """A clock that is moved by hand."""
  clock = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
  return clock


def test_lines_come_every_15_seconds_and_at_the_end(seconds, capsys):
  progress = metrics.Progress("rated")
  for done in range(1, 5):
    seconds[0] += 10
    progress(done, 4, "two of [them]")
  assert capsys.readouterr().out.splitlines() == [
    "rated 2/4  two of [them]  20s left",
    "rated 4/4  two of [them]  in 40s",
  ]


def test_a_terminal_has_a_bar(seconds, monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  monkeypatch.setattr(sys, "stdout", screen := Screen())
  progress = metrics.Progress("rated")
  for done in range(1, 5):
    seconds[0] += 10
    progress(done, 4, "two of [them]")
  print("next")
  text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
  frames = [frame for frame in re.split(r"[\r\n]+", text) if frame.strip()]
  assert [" ".join(re.sub("[━╸╺]+", "|", frame).split()) for frame in dict.fromkeys(map(str.strip, frames))][-5:] == [
    *(f"rated | {done}/4 two of [them] {left}" for done, left in ((1, "30s left"), (2, "20s left"), (3, "10s left"))),
    "rated | 4/4 two of [them] in 40s",
    "next",
  ]
  assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_the_cursor_stays_where_work_is_given_up(seconds, monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setattr(sys, "stdout", screen := Screen())
  metrics.Progress("rated")(1, 4)
  metrics.Progress("graded")(1, 1)  # another one afterwards
  assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")
  assert "1/1" in screen.getvalue()
