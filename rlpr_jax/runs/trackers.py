"""Trackers: a run's config, metrics and rollouts in TensorBoard, Weights & Biases, trackio and MLflow while it goes.

TensorBoard's files are small and on the run's own disk: the run writes them. Each of the others has a process beside
the run, `python -m rlpr_jax.runs.trackers NAME WORKDIR`, which reads config.json, metrics.jsonl and rollouts/ as they
are written. One that fails, hangs or dies costs the run nothing, and what it missed is on the disk: it is sent when the
tracker is back, or when the run goes on.
"""

import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rlpr_jax import config as configs
from rlpr_jax.errors import InputError
from rlpr_jax.runs import ACCURACY
from rlpr_jax.runs.storage import reason, write_atomically

Json = dict[str, Any]
TENSORBOARD = "tensorboard"
PACKAGES = {TENSORBOARD: "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}  # by the names
DIRECTORY = "trackers"  # in the run's: what was sent, logs of the trackers' processes, files of wandb
_LOOK = 1.0  # seconds between two looks at what the run has written
_LONGEST_PAUSE = 300.0  # seconds between two tries of a tracker that fails
_CELL = 1000  # characters of a text in TensorBoard, which keeps all of it in its files of events
_ROWS = 8  # rollouts of a step there


def check(names: Sequence[str]) -> None:
  """Checks that the packages of trackers are installed, without importing them.

  Raises:
    InputError: one of them is not.

  >>> check(["tensorboard"])
  """
  for name in names:
    spec = importlib.util.find_spec(PACKAGES[name])
    if spec is None or spec.origin is None:  # a directory of that name, as wandb leaves one, is no package
      raise InputError(
        f"config.log.trackers: {name}: not installed, expected the extra: pip install 'rlpr_jax[{name}]'"
      )


class About(NamedTuple):
  """What a tracker is told of a run."""

  key: str  # as no other run has it; the same when the run goes on
  name: str
  project: str
  config: Json
  directory: pathlib.Path  # for files of the tracker's own


class Tracker(Protocol):
  """Takes what a run writes. Made with an `About`; whatever goes wrong is raised."""

  place: str  # where to look at the run

  def log(self, step: int, values: Mapping[str, float], rollouts: Sequence[Json]) -> None:
    """Takes a step's metrics and samples of its rollouts, with the parts of their rewards; a step may come twice."""

  def finish(self, summary: Mapping[str, float], failed: bool) -> None:
    """Ends; returns when all is where it is to be."""


# --- Trackers ---


class TensorBoard:
  """Files of events: metrics as scalars; the config and some rollouts as texts. Never raises, never waits.

  Trouble with the files is said once. Where they are deleted, the metrics are there again with the next step.
  """

  def __init__(self, workdir: pathlib.Path, rows: Sequence[Mapping[str, float]], after: int):
    """
    Args:
      rows: all metrics of the run, with their steps, to which the caller adds.
      after: step after which what older files hold is not valid.
    """
    self._directory, self._config = workdir / TENSORBOARD, workdir / "config.json"
    self._rows, self._after = rows, after
    self._writer: Any = None  # of the file, once something is written
    self._lost = False  # what was written is gone, or was never

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._write([{"step": step, **values}])

  def log_rollouts(self, step: int, rows: Sequence[Json]) -> None:
    columns, cells = table([{name: shorten(value) for name, value in row.items()} for row in rows[:_ROWS]])
    self._write([], _text_event(step, "rollouts", markdown(columns, cells)))

  def open(self) -> None:
    """Hides what older files hold of steps that are taken again."""
    self._write([])

  def close(self) -> None:
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.close()

  def _write(self, rows: Sequence[Mapping[str, float]], *events: Any) -> None:
    try:
      if self._writer is None or not any(self._directory.glob("events.*")):
        rows = self._open(rows)
      for event in (*map(_scalars_event, rows), *events):
        self._writer.write_event(event)
      self._writer.flush()
      self._lost = False
    except OSError as error:
      if not self._lost:
        print(f"{self._directory}: {reason(error)}, going on without it", file=sys.stderr, flush=True)
      self._writer, self._lost = None, True  # a record may be broken off: go on in another file

  def _open(self, rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Opens a file that hides events of later steps in older files; returns the rows that belong there."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2  # with it comes torch, where that is installed

    again = self._writer is not None or self._lost
    self._directory.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(self._directory / "events"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    step = 0 if again else self._after + 1
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))
    if self._config.exists():
      self._writer.write_event(_text_event(step, "config", f"```\n{self._config.read_text()}\n```"))
    return self._rows if again else rows


def _scalars_event(row: Mapping[str, float]) -> Any:
  from tensorboardX.proto import event_pb2, summary_pb2

  scalars = [summary_pb2.Summary.Value(tag=name, simple_value=x) for name, x in row.items() if name != "step"]
  return event_pb2.Event(wall_time=time.time(), step=row["step"], summary=summary_pb2.Summary(value=scalars))


def _text_event(step: int, name: str, text: str) -> Any:
  from tensorboardX.proto import event_pb2
  from tensorboardX.summary import text as text_summary

  return event_pb2.Event(wall_time=time.time(), step=step, summary=text_summary(name, text))


class Wandb:
  """Weights & Biases. What is not said here says its own environment: WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY, ..."""

  def __init__(self, about: About):
    import wandb

    of_sweep = "WANDB_RUN_ID" in os.environ  # an agent of a sweep has made the run
    self._table = functools.partial(wandb.Table, allow_mixed_types=True)
    self._run = wandb.init(
      project=about.project,
      id=None if of_sweep else about.key,
      name=about.name,
      config=about.config,
      dir=about.directory,
      resume="allow",
      settings=wandb.Settings(console="off", x_stats_pid=os.getppid()),  # the machine's figures are those of the run
    )
    # Not wandb's own count, which never goes back and would drop what comes late of a step.
    self._run.define_metric("step", hidden=True)
    self._run.define_metric("*", step_metric="step")
    self.place = self._run.url or str(about.directory / "wandb")

  def log(self, step: int, values: Mapping[str, float], rollouts: Sequence[Json]) -> None:
    columns, cells = table(rollouts)
    tables = {"rollouts": self._table(columns=columns, data=cells)} if rollouts else {}
    self._run.log({"step": step, **values, **tables})

  def finish(self, summary: Mapping[str, float], failed: bool) -> None:
    self._run.summary.update(dict(summary))
    self._run.finish(exit_code=int(failed))


class Trackio:
  """trackio: on this machine, or where its own environment says (TRACKIO_SPACE_ID, TRACKIO_DIR, ...)."""

  def __init__(self, about: About):
    import trackio

    name = f"{about.name}-{about.key}"  # it knows runs by their names
    self._trackio, self._last = trackio, 0
    trackio.init(about.project, name=name, config=about.config, resume="allow", embed=False)
    self.place = f"trackio show --project {about.project}"

  def log(self, step: int, values: Mapping[str, float], rollouts: Sequence[Json]) -> None:
    columns, cells = table(rollouts)
    tables = {"rollouts": self._trackio.Table(columns=columns, data=cells)} if rollouts else {}
    self._trackio.log({**values, **tables}, step=step)
    self._last = step

  def finish(self, summary: Mapping[str, float], failed: bool) -> None:
    del failed
    if summary:
      self._trackio.log({f"summary/{name}": value for name, value in summary.items()}, step=self._last)
    self._trackio.finish()


class Mlflow:
  """MLflow: the server or store that its own environment says (MLFLOW_TRACKING_URI), else its default."""

  def __init__(self, about: About):
    import mlflow

    self._client = mlflow.MlflowClient()
    found = self._client.get_experiment_by_name(about.project)
    experiment = found.experiment_id if found else self._client.create_experiment(about.project)
    runs = self._client.search_runs([experiment], f"tags.rlpr_jax = '{about.key}'", max_results=1)
    run = runs[0] if runs else self._client.create_run(experiment, run_name=about.name, tags={"rlpr_jax": about.key})
    self._id, self._to_metric = run.info.run_id, mlflow.entities.Metric
    self._client.update_run(self._id, status="RUNNING")
    given = {name: str(value)[:6000] for name, value in configs.flatten(about.config).items()}
    known = run.data.params
    self._log_params({name: value for name, value in given.items() if name not in known})
    for name, value in given.items():  # a parameter has one value for ever, and a run that goes on may have more steps
      if known.get(name, value) != value:
        self._client.set_tag(self._id, f"now.{name}", value)
    self.place = mlflow.get_tracking_uri()

  def _log_params(self, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for begin in range(0, len(entities), 100):  # the most of a request
      self._client.log_batch(self._id, params=entities[begin : begin + 100])

  def log(self, step: int, values: Mapping[str, float], rollouts: Sequence[Json]) -> None:
    now = int(1000 * time.time())
    allowed = {re.sub(r"[^\w\-./ :]", "_", name): float(value) for name, value in values.items()}
    self._client.log_batch(self._id, [self._to_metric(name, value, now, step) for name, value in allowed.items()])
    if rollouts:
      columns, cells = table(rollouts)
      rows = {"columns": columns, "data": cells}  # as its own page shows a table
      self._client.log_text(self._id, json.dumps(rows), f"rollouts/step_{step:06d}.json")

  def finish(self, summary: Mapping[str, float], failed: bool) -> None:
    for name, value in summary.items():
      self._client.log_metric(self._id, f"summary/{name}", value)
    self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_TRACKERS: dict[str, Callable[[About], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


# --- What is sent ---


def table(rows: Sequence[Json]) -> tuple[list[str], list[list[Any]]]:
  """Columns and cells of rows that need not have the same names; lists are spelt as JSON.

  >>> table([{"reward_total": 0.5}, {"reward_total": 1.0, "references": ["8", "eight"]}])
  (['reward_total', 'references'], [[0.5, None], [1.0, '["8", "eight"]']])
  """
  columns = list(dict.fromkeys(name for row in rows for name in row))

  def cell(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    # Half a surrogate pair, which somebody's data may hold, is no text to the trackers.
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else text

  return columns, [[cell(row.get(name)) for name in columns] for row in rows]


def shorten(value: Any) -> Any:
  """A text without its middle where it is long; anything else as it is."""
  if not isinstance(value, str) or len(value) <= _CELL:
    return value
  return f"{value[: _CELL // 2]} … {value[-_CELL // 2 :]}"


def markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
  """A table in Markdown, whatever its texts hold.

  >>> print(markdown(["text", "reward"], [["a|b\\nc", 0.51234]]))
  | text | reward |
  |---|---|
  | a&#124;b c | 0.5123 |
  """

  def show(cell: Any) -> str:
    if isinstance(cell, float):
      return f"{cell:.4g}"
    text = str("" if cell is None else cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return " ".join(text.split())

  lines = [columns, *cells]
  shown = [f"| {' | '.join(map(show, line))} |" for line in lines]
  return "\n".join([shown[0], "|" + "---|" * len(columns), *shown[1:]])


def summarize(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
  """What a run came to: its steps, their seconds, and the held-out accuracy before, after and at its best.

  >>> summarize({0: {"held_out/accuracy": 0.25}, 9: {"seconds/step": 3.0, "held_out/accuracy": 0.5}})
  {'steps': 9, 'seconds': 3.0, 'accuracy_first': 0.25, 'accuracy_last': 0.5, 'accuracy_best': 0.5}
  """
  if not rows:
    return {}
  summary = {"steps": max(rows), "seconds": sum(row.get("seconds/step", 0.0) for row in rows.values())}
  accuracies = [rows[step][ACCURACY] for step in sorted(rows) if ACCURACY in rows[step]]
  if accuracies:
    summary |= {"accuracy_first": accuracies[0], "accuracy_last": accuracies[-1], "accuracy_best": max(accuracies)}
  return summary


# --- The process beside the run ---


class Sent(NamedTuple):
  """How far a tracker is, in WORKDIR/trackers/NAME.json."""

  key: str  # of the run, there
  step: int  # the last one that it has
  names: list[str]  # of the metrics that it has of that one: an evaluation may come later


class Follower:
  """Sends what a run has written since the last time to one tracker, in order.

  Steps that were sent are not sent again, though a run that was killed may take them again: they are the same.
  """

  def __init__(self, workdir: pathlib.Path, name: str, create: Callable[[About], Tracker]):
    self._workdir, self._create = workdir, create
    self._directory = workdir / DIRECTORY
    self._file, self._metrics = self._directory / f"{name}.json", _Lines(workdir / "metrics.jsonl")
    self._tracker: Tracker | None = None
    self._rows: dict[int, Json] = {}  # all that were read
    self._sent = self._read_sent()

  def look(self) -> str | None:
    """Sends what is new.

    Returns:
      where the run can be seen, if the tracker was just begun.
    """
    place = None
    if self._tracker is None:
      config = configs.read(self._workdir / "config.json")
      about = About(
        key=self._sent.key,
        name=self._workdir.resolve().name,
        project=config.log.project,
        config=json.loads(configs.to_json(config)),
        directory=self._directory.resolve(),
      )
      self._tracker = self._create(about)
      place = self._tracker.place
    for row in self._metrics.read():
      step = row.pop("step")
      self._rows[step] = row
    for step in sorted(step for step in self._rows if step >= self._sent.step):
      known = self._sent.names if step == self._sent.step else ()
      new = {name: value for name, value in self._rows[step].items() if name not in known}
      if new or step > self._sent.step:
        self._tracker.log(step, new, () if step == self._sent.step else self._read_rollouts(step))
        self._write_sent(Sent(self._sent.key, step, list(self._rows[step])))
    return place

  def finish(self, failed: bool) -> None:
    """Sends the rest and ends."""
    self.look()
    assert self._tracker is not None
    self._tracker.finish(summarize(self._rows), failed)

  def drop(self) -> None:
    """Gives up a tracker that failed; the next look begins it anew."""
    self._tracker = None

  def _read_rollouts(self, step: int) -> list[Json]:
    return _Lines(self._workdir / "rollouts" / f"step_{step:06d}.jsonl").read()

  def _read_sent(self) -> Sent:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      return Sent(**json.loads(self._file.read_text()))
    sent = Sent(uuid.uuid4().hex[:12], -1, [])
    self._write_sent(sent)  # before anything is begun by this key
    return sent

  def _write_sent(self, sent: Sent) -> None:
    self._sent = sent
    self._directory.mkdir(exist_ok=True)
    write_atomically(self._file, json.dumps(sent._asdict()))


class _Lines:
  """The objects of a file of JSON lines, as they come; all of them again where it was written anew."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._end, self._last = 0, b""  # bytes that were read, and the last line of them

  def read(self) -> list[Json]:
    """Those of whole lines that were not read before, with a step; what else there is is left out."""
    try:
      with self._path.open("rb") as file:
        file.seek(self._end - len(self._last))
        if file.read(len(self._last)) != self._last:
          self._end, self._last = 0, b""
          file.seek(0)
        text = file.read()
    except FileNotFoundError:
      return []
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    self._end, self._last = self._end + sum(map(len, lines)), lines[-1] if lines else self._last
    rows = []
    for line in lines:
      with contextlib.suppress(ValueError, RecursionError):
        rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def follow(follower: Follower, wait: Callable[[float], str | None], say: Callable[[str], None]) -> None:
  """Follows a run to its end. A tracker that fails is said once, and tried again after longer and longer pauses.

  Args:
    wait: waits for so many seconds at most; returns None while the run goes on, "done" if it ended well.
    say: shows a line.
  """
  pause, failing, ended = 0.0, False, None
  while ended is None:
    ended = wait(pause)
    try:
      if ended is not None:
        follower.finish(failed=ended != "done")
      elif place := follower.look():
        say(place)
      pause, failing = _LOOK, False
    except (Exception, SystemExit) as error:  # of libraries: whatever it is
      traceback.print_exc()
      if not failing:
        going_on = "the run goes on without it, and it is tried again"
        say(f"{reason(error)}; {going_on if ended is None else 'the same command sends the rest'}")
      follower.drop()
      pause, failing = min(max(2 * pause, _LOOK), _LONGEST_PAUSE), True


def main() -> None:
  """The process of one tracker: its name and the run's directory are the arguments."""
  name, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
  limit = configs.read(workdir / "config.json").log.tracker_seconds
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when the run does
    signal.signal(number, signal.SIG_IGN)
  screen, path = os.dup(2), workdir / DIRECTORY / f"{name}.log"
  log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  os.dup2(log, 1)  # what the libraries print, and programs that they start
  os.dup2(log, 2)

  def say(line: str) -> None:
    with contextlib.suppress(OSError):
      os.write(screen, f"{name}: {line}\n".encode(errors="backslashreplace"))

  def wait(seconds: float) -> str | None:
    if not select.select([0], [], [], seconds)[0]:
      return None
    word = os.read(0, 100).decode()
    timer = threading.Timer(limit, os._exit, [1])  # where nobody is there to end this process
    timer.daemon = True
    timer.start()
    return word

  with contextlib.suppress(OSError):  # a disk without locks
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)  # that of a run that was killed may still be sending
  follow(Follower(workdir, name, _TRACKERS[name]), wait, say)
  os._exit(0)  # threads and exit handlers of the libraries have nothing left to do


# --- The run's side ---


@contextlib.contextmanager
def following(workdir: pathlib.Path, names: Sequence[str], seconds: float) -> Iterator[None]:
  """Around a run's steps: a process for each tracker but TensorBoard follows it. Never raises, of itself.

  Args:
    workdir: of the run; its config.json is there.
    seconds: how long the trackers are waited for at the end. After an error they end by themselves.
  """
  started = {name: child for name in names if name != TENSORBOARD and (child := _start(name, workdir))}
  try:
    yield
  except BaseException:
    for child in started.values():
      _tell(child, "")
    raise
  for child in started.values():
    _tell(child, "done")
  deadline = time.monotonic() + seconds
  for name, child in started.items():
    try:
      status = child.wait(max(deadline - time.monotonic(), 0))
      trouble = f"ended with status {status}, {workdir / DIRECTORY / name}.log may say why" if status else ""
    except subprocess.TimeoutExpired:
      child.kill()
      child.wait()
      trouble = f"not ready {seconds:.0f} s after the run, and ended"
    if trouble:
      print(f"{name}: {trouble}; the same command sends the rest", file=sys.stderr, flush=True)


def _start(name: str, workdir: pathlib.Path) -> subprocess.Popen[bytes] | None:
  command = [sys.executable, "-m", "rlpr_jax.runs.trackers", name, str(workdir)]
  try:
    (workdir / DIRECTORY).mkdir(exist_ok=True)
    return subprocess.Popen(command, stdin=subprocess.PIPE)
  except OSError as error:
    print(f"{name}: {reason(error)}, going on without it", file=sys.stderr, flush=True)
    return None


def _tell(child: subprocess.Popen[bytes], word: str) -> None:
  assert child.stdin is not None
  with contextlib.suppress(OSError):  # it is gone
    child.stdin.write(word.encode())
    child.stdin.close()


if __name__ == "__main__":
  main()
