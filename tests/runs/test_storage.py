"""Disks that fail: a real one that is full where this machine lets one be mounted, and errors by hand."""

import contextlib
import errno
import json
import pathlib
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax.errors import InputError, MachineError
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import Checkpoints, OnDisk, checksums
from rlpr_jax.runs.storage import append, persist, write_atomically


def failing(times, code=errno.ENOSPC):
  calls = []

  def write():
    calls.append(1)
    if len(calls) <= times:
      raise OSError(code, "No space left on device")
    return len(calls)

  return write


def test_what_fails_is_tried_again_and_said(tmp_path, capsys):
  assert persist(failing(2), tmp_path / "file", seconds=30) == 3
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 2
  assert said[0].startswith(f"{tmp_path / 'file'}: No space left on device, trying again in ")


def test_what_goes_on_failing_is_one_line(tmp_path):
  start = time.monotonic()
  with pytest.raises(MachineError, match=r"file: cannot be written \(No space left on device\), tried for 1s; .* on"):
    persist(failing(10**9), tmp_path / "file", seconds=1)
  assert time.monotonic() - start < 10


def test_other_errors_are_not_hidden(tmp_path):
  with pytest.raises(ZeroDivisionError):
    persist(lambda: 1 // 0, tmp_path, seconds=30)


def test_half_a_line_is_taken_back(tmp_path):
  path = tmp_path / "metrics.jsonl"
  append(path, '{"step": 1}')
  with path.open("a") as file:
    file.write('{"step": 2, "los')
  append(path, '{"step": 2}')
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_write_atomically_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  write_atomically(path, "old")

  def broken(*_):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr("os.fsync", broken)
  with pytest.raises(OSError, match="Input"):
    write_atomically(path, b"new")
  assert path.read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
  """A file system of one megabyte."""
  mount = tmp_path / "disk"
  mount.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
    pytest.skip("no file system can be mounted here")
  yield mount
  subprocess.run(["umount", "-l", mount], check=True)


def free_later(path: pathlib.Path, seconds: float) -> None:
  threading.Timer(seconds, path.unlink).start()


def fill(disk: pathlib.Path) -> pathlib.Path:
  ballast = disk / "ballast"
  with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
    while True:
      file.write(bytes(4096))
  return ballast


def test_metrics_wait_for_a_full_disk(small_disk):
  writer = metrics.MetricsWriter(small_disk, -1, retry_seconds=60)
  writer.write(1, {"x": 0.5})
  free_later(fill(small_disk), 2)
  for step in range(2, 200):
    writer.write(step, {f"a/long/name/{i}": 0.25 for i in range(20)})
  writer.write_rollouts(1, [{"text": "x"}])
  writer.close()
  rows = metrics.read(small_disk / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 200))


class State(tuple):
  """(step, parameters)."""


def open_checkpoints(workdir, **changes):
  log = configs.default().log
  log.retry_seconds = 60.0
  log.update(changes)
  return Checkpoints(
    workdir, log, lambda state: OnDisk(state[1], {"more": state[1]}, {"step": state[0]}),
    lambda params, arrays, host: State((host["step"], params)),
  )  # fmt: skip


def params(value):
  return {"w": np.random.default_rng(0).normal(value, size=(100, 100)).astype(np.float32)}  # hard to compress


def test_checkpoints_wait_for_a_full_disk(small_disk):
  checkpoints = open_checkpoints(small_disk, keep_checkpoints=1)
  checkpoints.save(State((1, params(1.0))))
  checkpoints.wait()
  free_later(fill(small_disk), 3)
  checkpoints.save(State((2, params(2.0))))
  checkpoints.wait()
  checkpoints.close()
  step, found = open_checkpoints(small_disk).restore(State((0, params(0.0))))
  assert step == 2
  np.testing.assert_array_equal(found["w"], params(2.0)["w"])


def test_a_disk_that_stays_full_stops_the_run_and_leaves_the_checkpoint_before(small_disk):
  checkpoints = open_checkpoints(small_disk, retry_seconds=1.0)
  checkpoints.save(State((1, params(1.0))))
  checkpoints.wait()
  ballast = fill(small_disk)
  with pytest.raises(MachineError, match="checkpoints/2: cannot be written"):  # noqa: PT012
    checkpoints.save(State((2, params(2.0))))
    checkpoints.wait()
  ballast.unlink()
  step, found = open_checkpoints(small_disk).restore(State((0, params(0.0))))
  assert step == 1
  np.testing.assert_array_equal(found["w"], params(1.0)["w"])


def saved(workdir, steps, place=np.asarray):
  checkpoints = open_checkpoints(workdir, keep_checkpoints=10)
  for step in range(1, steps + 1):
    checkpoints.save(State((step, jax.tree.map(place, params(float(step))))))
  checkpoints.close()


def data_files(directory):
  return sorted((path for path in directory.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])  # orbax reads these in two ways
@pytest.mark.parametrize("part", ["d", "ocdbt.process_0/d"])  # of the database: its index, and the arrays
@pytest.mark.parametrize(
  "how", ["truncated", *(pytest.param(how, marks=pytest.mark.slow) for how in ("emptied", "removed", "garbage"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, how, part, place):
  saved(tmp_path, 3, place)
  for path in data_files(tmp_path / "checkpoints/3/params" / part)[:1]:
    content = path.read_bytes()
    if how == "removed":
      path.unlink()
    else:
      path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "garbage": bytes(len(content))}[how])
  checkpoints = open_checkpoints(tmp_path)
  step, found = checkpoints.restore(State((0, jax.tree.map(place, params(0.0)))))
  assert step == 2
  np.testing.assert_array_equal(found["w"], params(2.0)["w"])
  err = capsys.readouterr().err
  assert "checkpoints/3: cannot be read" in err
  assert "put aside" in err
  assert (tmp_path / "damaged_checkpoints/3").is_dir()
  checkpoints.save(State((3, params(3.5))))  # its place is free
  checkpoints.close()
  assert open_checkpoints(tmp_path).restore(State((0, params(0.0))))[0] == 3


@pytest.mark.parametrize("shape", [(100, 50), (100,), (100, 100, 1)])
def test_a_checkpoint_of_other_shapes_is_one_line(tmp_path, shape):
  """As of a version whose arrays had them. How many rows there are is for the data to say."""
  saved(tmp_path, 1)
  checkpoints = open_checkpoints(tmp_path)
  with pytest.raises(
    InputError, match=r"checkpoints/1: .*\['w'\] of shape \(100, 100\), expected \('rows'.*another version"
  ):
    checkpoints.restore(State((0, {"w": np.zeros(shape, np.float32)})))
  assert checkpoints.restore(State((0, {"w": np.zeros((7, 100), np.float32)})))[0] == 1
  checkpoints.close()


def test_checksums_are_of_every_bit():
  w = params(1.0)["w"]
  tree = {"w": w, "n": np.arange(3, dtype=np.int32), "flag": np.array([True, False]), "half": w[0].astype("bfloat16")}
  expected = checksums(tree)
  assert expected == checksums(jax.tree.map(jnp.asarray, tree))
  assert expected[3] == murmur_sum(w.view(np.uint32).reshape(-1).tolist())
  assert expected[2] == murmur_sum([0, 1, 2])
  for place in (0, 5000, 9999):
    other = w.copy()
    other.view(np.uint32).reshape(-1)[place] ^= 1
    assert checksums({**tree, "w": other}) != expected
  other = w.copy()
  other[:10] = 0  # a part of the file is missing
  assert checksums({**tree, "w": other}) != expected
  other = np.zeros((512, 512), np.float32)
  other[0, 0], other[256, 0] = 1.0, 2.0  # bits and distance are multiples of large powers of two
  swapped = other.copy()
  swapped[0, 0], swapped[256, 0] = 2.0, 1.0
  assert checksums(other) != checksums(swapped)


def murmur_sum(numbers):
  """The sum by its definition, in Python's own integers."""

  def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)

  return sum(mix(number ^ mix(place)) for place, number in enumerate(numbers)) % 2**32


def change_host(directory, **changes):
  path = next((directory / "host").glob("metadata*"))
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", [{"step": 2}, {"next": 5}, {"sums": [1, 2]}])
def test_metadata_that_are_not_those_that_were_saved(tmp_path, capsys, changes):
  saved(tmp_path, 3)
  change_host(tmp_path / "checkpoints/3", **changes)
  assert open_checkpoints(tmp_path).restore(State((0, params(0.0))))[0] == 2
  assert "checkpoints/3: cannot be read (its metadata is not what was saved)" in capsys.readouterr().err


def test_checkpoints_of_an_older_version_are_read(tmp_path):
  """They have plain sums of bits and no digest."""
  saved(tmp_path, 1)
  path = next((tmp_path / "checkpoints/1/host").glob("metadata*"))
  sums = [int(np.sum(params(1.0)["w"].view(np.uint32), dtype=np.uint64) % 2**32)] * 2
  path.write_text(json.dumps({"step": 1, "checksums": sums}))
  assert open_checkpoints(tmp_path).restore(State((0, params(0.0))))[0] == 1
  path.write_text(json.dumps({"step": 1, "checksums": [sums[0], sums[1] ^ 1]}))
  with pytest.raises(InputError, match="the arrays are not those that were saved"):
    open_checkpoints(tmp_path).restore(State((0, params(0.0))))


@pytest.mark.parametrize(
  ("part", "why"),
  [
    ("", "it is the checkpoint of step 1"),
    # A file that can be read, and holds other numbers.
    ("params", "the arrays are not those that were saved"),
  ],
)
def test_what_is_of_another_checkpoint(tmp_path, capsys, part, why):
  saved(tmp_path, 3)
  shutil.rmtree(tmp_path / "checkpoints/3" / part)
  shutil.copytree(tmp_path / "checkpoints/1" / part, tmp_path / "checkpoints/3" / part)
  assert open_checkpoints(tmp_path).restore(State((0, params(0.0))))[0] == 2
  assert f"checkpoints/3: cannot be read ({why})" in capsys.readouterr().err


def test_no_checkpoint_is_put_aside_if_none_can_be_read(tmp_path):
  saved(tmp_path, 2)
  wrong = State((0, {"w": np.zeros((3, 3), np.float32), "x": np.zeros(2, np.float32)}))
  with pytest.raises(InputError, match="checkpoints/2: cannot be read"):
    open_checkpoints(tmp_path).restore(wrong)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["1", "2"]


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(State((1, params(1.0))))
  for bad in (np.nan, np.inf):
    other = params(2.0)
    other["w"][3, 4] = bad
    with pytest.raises(
      InputError, match=r"step 2 are not finite and not saved, the one before it, of step 1, is whole"
    ):
      checkpoints.save(State((2, other)))
  checkpoints.close()
  step, found = open_checkpoints(tmp_path).restore(State((0, params(0.0))))
  assert step == 1
  np.testing.assert_array_equal(found["w"], params(1.0)["w"])


def test_the_newest_and_the_best_are_kept(tmp_path):
  checkpoints = open_checkpoints(tmp_path, keep_checkpoints=2, keep_best=1)
  for step, accuracy in enumerate([0.1, None, 0.7, None, 0.3, None, 0.2, None]):
    checkpoints.save(State((step, params(step))), accuracy)
  checkpoints.close()
  kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
  assert kept == [2, 6, 7]
  again = open_checkpoints(tmp_path, keep_checkpoints=2, keep_best=1)  # the accuracies are on disk too
  for step, accuracy in ((8, None), (9, 0.5), (10, None)):
    again.save(State((step, params(step))), accuracy)
  again.close()
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [2, 9, 10]


def test_an_accuracy_that_is_measured_after_a_checkpoint_was_saved_counts(tmp_path):
  """As of the evaluation that a stop cut short, and the next start makes up for."""
  checkpoints = open_checkpoints(tmp_path, keep_checkpoints=1, keep_best=1)
  checkpoints.save(State((1, params(1))), 0.2)
  checkpoints.save(State((2, params(2))))
  checkpoints.close()
  again = open_checkpoints(tmp_path, keep_checkpoints=1, keep_best=1)
  again.know({1: 0.2, 2: 0.9})
  for step, accuracy in ((3, 0.5), (4, None)):
    again.save(State((step, params(step))), accuracy)
  again.close()
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [2, 4]
