"""Wrong input, trouble of the machine, faults and interruptions: one line each, and the status that belongs to it."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rlpr_jax import __main__ as rlpr
from rlpr_jax import entry, errors, report
from rlpr_jax.data.sources import DroppedRow, read_examples
from rlpr_jax.errors import Ending, InputError, MachineError
from rlpr_jax.evaluation import benchmarks
from rlpr_jax.policy import load_tokenizer
from rlpr_jax.runs import dropped_rows, lock, traces
from rlpr_jax.runs.checkpoints import Checkpoints
from rlpr_jax.runs.metrics import MetricsWriter
from rlpr_jax.runs.storage import write_atomically
from rlpr_jax.training.collect import collect
from tests.tiny_run import ROOT, tiny

DEEP = "[" * 100_000
SHORT = (
  "--config.warm_start.steps=1",
  "--config.evaluation.prompts=0",
  "--config.steps=1",
  "--config.log.retry_seconds=0",
)


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
  """Runs a program here; gives its exit status and what it said on stderr."""
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setattr("tempfile.tempdir", None)

  def run(*words):
    status = 0
    try:
      rlpr.main(["rlpr", *map(str, words)])
    except SystemExit as ended:
      status = ended.code
    return status, capsys.readouterr().err

  return run


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
  """A run of one step."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  with contextlib.suppress(SystemExit):
    rlpr.main(["rlpr", "train", f"--config={recipe}", f"--workdir={workdir}", *SHORT])
  assert (workdir / "report.html").exists()
  return workdir


def put(path, what):
  """Puts something in the place of a file: a directory, a link to nowhere, a file of text."""
  if path.is_dir():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
  if what == "directory":
    path.mkdir()
  elif what == "dangling link":
    path.symlink_to("/nowhere/at/all")
  else:
    path.write_text(what)


# --- What the files of a run may be ---


@pytest.mark.parametrize(
  ("name", "what", "said"),
  [
    ("config.json", "null", "config.json: None, expected the config of a run"),
    ("config.json", DEEP, "config.json: cannot be read as JSON"),
    ("config.json", "directory", "config.json: cannot be read as JSON"),
    ("inputs.json", "null", "inputs.json: expected the inputs of this directory's run"),
    ("inputs.json", DEEP, "inputs.json: expected the inputs of this directory's run"),
    ("inputs.json", "directory", "inputs.json: expected the inputs of this directory's run"),
    ("metrics.jsonl", "directory", "metrics.jsonl: cannot be read"),
    ("rollouts", "x", "rollouts: not a directory"),
    ("rollouts", "dangling link", "rollouts: not a directory"),
    ("checkpoints", "x", "checkpoints: not a directory"),
    ("checkpoints", "dangling link", "checkpoints: not a directory"),
    ("run.lock", "directory", "run.lock: cannot be written"),
  ],
)
def test_something_else_in_the_place_of_a_file_of_a_run(call, recipe, whole, tmp_path, name, what, said):
  workdir = shutil.copytree(whole, tmp_path / "run")
  put(workdir / name, what)
  status, err = call("train", f"--config={recipe}", f"--workdir={workdir}", *SHORT)
  assert (status, err.count("\n")) == (2, 1)
  assert err.startswith("error: ")
  assert said in err
  assert not (workdir / traces.NAME).exists()  # it was foreseen


def test_files_that_nothing_depends_on_may_be_anything(call, recipe, whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "run")
  for name in ("tensorboard", "unfinished", "failed", "damaged_checkpoints"):
    put(workdir / name, "x")
  put(workdir / "rollouts" / "step_notes.jsonl", "directory")
  put(workdir / "report.html", "directory")
  put(workdir / "traces.log", "directory")
  put(workdir / "run.lock", DEEP)
  put(workdir / "dropped_rows.jsonl", f'null\n{DEEP}\n{{"row": 1}}\n')
  status, err = call("train", f"--config={recipe}", f"--workdir={workdir}", *SHORT)
  assert status == 0
  assert [line.partition(": ")[0].rpartition("/")[2] for line in err.splitlines()] == ["tensorboard", "report"]
  assert not (workdir / "dropped_rows.jsonl").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "inputs.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_file_of_a_run_that_cannot_be_written(call, recipe, tmp_path, monkeypatch, name, code):
  def replace(source, target):
    if pathlib.Path(target).name == name:
      raise OSError(code, os.strerror(code))
    honest(source, target)

  honest = os.replace
  monkeypatch.setattr(os, "replace", replace)
  status, err = call("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *SHORT)
  assert status == (errors.MACHINE if code == errno.ENOSPC else errors.USAGE)
  assert f"{name}: cannot be written ({os.strerror(code)}), tried for 0s" in err.splitlines()[-1]


def test_what_is_in_the_way_is_not_waited_for(tmp_path):
  writer = MetricsWriter(tmp_path, None, retry_seconds=3)
  (tmp_path / "rollouts/step_000001.jsonl").mkdir()
  with pytest.raises(InputError, match=r"step_000001\.jsonl: cannot be written \(Is a directory\); the same command"):
    writer.write_rollouts(1, [{"text": "x"}])
  with pytest.raises(InputError, match=r"step_000001\.jsonl: cannot be written \(Is a directory\)"):
    MetricsWriter(tmp_path, 0, retry_seconds=3)


def test_damaged_checkpoints_that_cannot_be_put_aside(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "run")
  put(workdir / "damaged_checkpoints", "x")
  checkpoints = Checkpoints(workdir, tiny().log, split=None, join=None)
  with pytest.raises(InputError, match=r"damaged_checkpoints: cannot be written \(File exists\)"):
    checkpoints._put_aside([InputError("damaged")], [1])
  checkpoints.close()


def test_rows_of_other_fields_stay_beside_damaged_ones(tmp_path):
  path = tmp_path / dropped_rows.FILE
  put(path, f'{DEEP}\n{{"field": "b", "row": 1}}\n[1]\n')
  dropped_rows.write_dropped_rows(tmp_path, "a", [DroppedRow("f", 1, "empty", "x")], retry_seconds=0)
  assert [row["field"] for row in map(json.loads, path.read_text().splitlines())] == ["b", "a"]
  put(path, "directory")
  with pytest.raises(InputError, match="cannot be read"):
    dropped_rows.write_dropped_rows(tmp_path, "a", [], retry_seconds=0)


def test_a_report_of_odd_files(call, whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "run")
  put(workdir / "rollouts" / "step_x.jsonl", "directory")
  with (workdir / "rollouts/step_000001.jsonl").open("a") as file:
    file.write(f'{DEEP}\n{{"question": "\\ud800"}}\n')
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(f"{DEEP}\n")
  assert call("report", f"--workdir={workdir}") == (0, "")
  put(workdir / "report.html", "directory")
  status, err = call("report", f"--workdir={workdir}")
  assert (status, err) == (2, f"error: {workdir}/report.html: cannot be written (Is a directory)\n")
  put(workdir / "config.json", DEEP)
  status, err = call("report", f"--workdir={workdir}")
  assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
  ("code", "status"), [(errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.ENOSPC, 75), (errno.EIO, 75)]
)
def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path, code, status):
  def mkdir(*_, **__):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
  with pytest.raises((InputError, MachineError), match=r"^--workdir: .* cannot be written") as raised:
    entry.open_workdir(tmp_path / "run")
  assert errors.exit_status(raised.value) == status


def test_a_lock_on_a_disk_that_fails(monkeypatch, tmp_path):
  def fail(*_, **__):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(os, "open", fail)
  with pytest.raises(MachineError, match=r"run\.lock: cannot be written"), lock.hold(tmp_path):
    pass


# --- Data and models ---


@pytest.mark.parametrize("column", ["question", "answer", "source", "data_source"])
def test_half_a_surrogate_pair_in_any_column_makes_its_row_useless(tmp_path, column):
  path = tmp_path / "rows.jsonl"
  row = {"question": "q", "answer": "a"}
  path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {column: 'x' + chr(0xD800)})}\n")
  found = read_examples(str(path), max_dropped=0.5)
  assert [(one.row, one.reason) for one in found.dropped] == [(2, f"{column}: half a surrogate pair")]
  with pytest.raises(InputError, match=f"row 2, column {column}: expected text, found a lone surrogate at character 2"):
    read_examples(str(path))


@pytest.mark.parametrize("column", ["unique_id", "problem", "answer", "subject"])
def test_half_a_surrogate_pair_in_a_benchmark(tmp_path, column):
  path = tmp_path / "rows.jsonl"
  row = {"unique_id": "1", "problem": "6*7?", "answer": "42", "subject": "x"}
  path.write_text(json.dumps(row | {column: "x\ud800"}))
  with pytest.raises(InputError, match=f"row 1, column {column}: expected text, found a lone surrogate"):
    benchmarks.load("math500", str(path))


def test_names_of_files_that_are_no_text(tmp_path):
  (tmp_path / "data").mkdir()
  with open(os.fsencode(tmp_path / "data") + b"/a\xff.jsonl", "w") as file:
    file.write('{"question": "q", "answer": "a"}\n')
  with pytest.raises(InputError, match=r"'a\\udcff.jsonl', expected names of files in UTF-8$"):
    read_examples(str(tmp_path / "data"))


def test_half_a_surrogate_pair_is_written_as_json_spells_it(tmp_path):
  text = json.dumps({"a": "é\ud800"}, ensure_ascii=False)
  write_atomically(tmp_path / "file", text)
  assert json.loads((tmp_path / "file").read_text()) == {"a": "é\ud800"}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [DEEP, "null", '{"model": 3, "version": "x", "initializer_range": "many"}'])
def test_files_of_a_tokenizer_that_are_something_else(tmp_path, name, text):
  for other in ("tokenizer.json", "config.json", "tokenizer_config.json"):
    (tmp_path / other).write_text('{"model_type": "llama"}' if other == "config.json" else "{}")
  (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=r"^[^\n]+: no tokenizer \([^\n]+\)$"):
    load_tokenizer(str(tmp_path))


# --- What nobody foresaw ---


def test_a_fault_is_one_line_and_its_traceback_is_kept(call, recipe, whole, tmp_path, monkeypatch):
  workdir = shutil.copytree(whole, tmp_path / "run")

  def broken(*_):
    raise TypeError("cannot\nadd")

  monkeypatch.setattr("rlpr_jax.train.set_up", broken)
  status, err = call("train", f"--config={recipe}", f"--workdir={workdir}", *SHORT)
  file = workdir / traces.NAME
  assert (status, err) == (1, f"error: TypeError: cannot add; the traceback is in {file}\n")
  assert "in broken\n" in file.read_text()


def test_a_traceback_that_has_no_directory(call, tmp_path, monkeypatch):
  def broken(_):
    raise KeyError("x")

  monkeypatch.setattr(report, "write_report", broken)
  status, err = call("report", f"--workdir={tmp_path / 'nowhere'}")
  assert (status, err.count("\n")) == (1, 1)
  file = pathlib.Path(err.rstrip("\n").partition("the traceback is in ")[2])
  assert "in broken\n" in file.read_text()
  monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
  status, err = call("report", f"--workdir={tmp_path / 'nowhere'}")
  assert status == 1
  assert err.startswith("Traceback (most recent call last):\n")
  assert err.endswith("\nerror: KeyError: 'x'\n")


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (InputError("a: b"), 2, "error: a: b\n"),
    (MachineError("a: b"), 75, "error: a: b\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (OSError(errno.ENOSPC, "No space left on device", "f"), 75, "error: f: No space left on device; the traceback is"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "f"), 2, "error: f: Is a directory; the traceback is"),
    (TimeoutError(), 75, "error: TimeoutError; the traceback is"),
    (MemoryError(), 75, "error: MemoryError; the traceback is"),
    (RuntimeError("a\n b"), 1, "error: RuntimeError: a b; the traceback is"),
  ],
)
def test_statuses(capsys, tmp_path, error, status, said):
  ending = Ending()
  ending.keep = lambda trace: traces.keep(tmp_path, trace)
  assert ending.say(error) == status
  err = capsys.readouterr().err
  assert err.startswith(said)
  assert err.count("\n") == 1
  assert (tmp_path / traces.NAME).exists() == ("the traceback is in" in err)


def test_a_hub_that_cannot_be_reached_and_one_that_refuses():
  class RefusedError(Exception):
    def __init__(self, status_code):
      self.response = type("Response", (), {"status_code": status_code})

  def behind(cause):
    try:
      raise FileNotFoundError("no snapshot") from cause
    except FileNotFoundError as error:
      return error

  assert errors.is_of_network(behind(ConnectionResetError()))
  assert errors.is_of_network(behind(RefusedError(503)))
  assert not errors.is_of_network(behind(RefusedError(404)))
  assert not errors.is_of_network(behind(ValueError("no such name")))


# --- Interruptions ---


def interrupted(*command, after):
  """Starts a program of this package and sends Ctrl-C; its status and what it said on stderr."""
  # What a shell runs in the background, these tests perhaps, ignores SIGINT, and its children would with it.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    process = subprocess.Popen(
      command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
  finally:
    signal.signal(signal.SIGINT, before)
  wait_until = after(process)
  while process.poll() is None and not wait_until():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  return process.returncode, err


def has_loaded(library):
  """Until a process has a shared library of some package."""

  def look(process):
    def loaded():
      with contextlib.suppress(OSError):
        return library in pathlib.Path(f"/proc/{process.pid}/maps").read_text()
      return False

    return loaded

  return look


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("library", ["numpy/_core", "libjax_common"])
def test_an_interruption_of_imports_is_one_line(library):
  """They swallow a KeyboardInterrupt, or make an ImportError of it."""
  command = (sys.executable, "-m", "rlpr_jax.train", "--config=nowhere", "--workdir=none")
  assert interrupted(*command, after=has_loaded(library)) == (130, "interrupted\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_interruption_of_imports_by_the_command():
  code = "import sys; from rlpr_jax.__main__ import main; main(['rlpr', 'export'])"
  assert interrupted(sys.executable, "-c", code, after=has_loaded("numpy/_core")) == (130, "interrupted\n")


def test_importing_the_package_leaves_signals_alone():
  code = (
    "import signal; before = signal.getsignal(signal.SIGINT); import rlpr_jax.train;"
    "assert signal.getsignal(signal.SIGINT) is before"
  )
  subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_second_interruption_of_a_run_leaves_it_as_it_is_on_disk(call, recipe, whole, tmp_path, monkeypatch):
  workdir = shutil.copytree(whole, tmp_path / "run")
  before = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
  metrics = (workdir / "metrics.jsonl").read_bytes()

  def sample(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return collect(*arguments)

  monkeypatch.setattr("rlpr_jax.train.collect", sample)
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    status, err = call("train", f"--config={recipe}", f"--workdir={workdir}", *SHORT, "--config.steps=2")
  finally:
    signal.signal(signal.SIGINT, previous)
  assert (status, err) == (130, "interrupted\n")
  assert {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()} == before
  assert (workdir / "metrics.jsonl").read_bytes() == metrics
  assert not (workdir / lock.NAME).exists()
