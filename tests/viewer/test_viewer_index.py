"""The viewer's index: it follows files that grow, break off, are replaced, cut and deleted."""

import json

import numpy as np
import pytest

from rlpr_jax.viewer.index import Index
from rlpr_jax.viewer.tail import Tail
from tests.viewer.made_run import SAMPLES, lines, rollouts, write


@pytest.fixture
def path(tmp_path):
  return tmp_path / "some.jsonl"


def contents(tail, most=10**6):
  return [line.content["n"] for line in tail.look(most).lines]


def test_a_file_is_read_as_it_grows_and_each_byte_once(path):
  tail = Tail(path)
  assert contents(tail) == []  # not there yet
  path.write_text('{"n": 1}\n{"n": 2}\n')
  assert contents(tail) == [1, 2]
  assert contents(tail) == []
  with path.open("a") as file:
    file.write('{"n": 3}\n')
  assert contents(tail) == [3]
  assert tail.read_bytes == path.stat().st_size


def test_a_half_written_line_is_read_when_it_is_whole(path):
  tail = Tail(path)
  text = '{"n": 1}\n{"n": 2, "text": "ü'.encode()
  path.write_bytes(text[:-1])  # within a letter
  assert contents(tail) == [1]
  assert contents(tail) == []
  with path.open("ab") as file:
    file.write(text[-1:] + b'"}')
  assert contents(tail) == [2]  # whole, though its newline has not come
  with path.open("ab") as file:
    file.write(b'\n{"n": 3}\n')
  assert contents(tail) == [3]
  assert tail.look(10**6).damaged == 0


def test_lines_lie_where_they_are_said_to(path):
  path.write_bytes(b'\n{"n": 1}\nnonsense\n{"n": 2}\n[3]\n{"n": "\xff"}\n{"n": ')
  news = Tail(path).look(10**6)
  assert [line.content["n"] for line in news.lines] == [1, 2, "\ufffd"]
  assert news.damaged == 2
  content = path.read_bytes()
  for line in news.lines[:2]:
    assert json.loads(content[line.offset : line.offset + line.size]) == line.content


def test_a_file_that_is_replaced_cut_or_deleted_is_read_anew(path, tmp_path):
  tail = Tail(path)
  path.write_text('{"n": 1}\n{"n": 2}\n')
  tail.look(10**6)
  other = tmp_path / "other"
  other.write_text('{"n": 5}\n{"n": 6}\n{"n": 7}\n')
  other.replace(path)
  news = tail.look(10**6)
  assert news.anew
  assert [line.content["n"] for line in news.lines] == [5, 6, 7]
  with path.open("r+") as file:
    file.truncate(9)
  assert contents(tail) == [5]
  path.write_text('{"n": 8}\n{"n": 9}\n')  # longer than what was read, and another
  news = tail.look(10**6)
  assert news.anew
  assert [line.content["n"] for line in news.lines] == [8, 9]
  path.unlink()
  assert tail.look(10**6).anew
  path.write_text('{"n": 1}\n')
  assert contents(tail) == [1]


def test_a_look_reads_no_more_than_it_may(path):
  path.write_text("".join(f'{{"n": {i}}}\n' for i in range(100)))
  tail, found, looks = Tail(path), [], 0
  while True:
    news = tail.look(90)
    found += [line.content["n"] for line in news.lines]
    looks += 1
    assert len(news.lines) <= 10
    if not news.more:
      break
  assert found == list(range(100))
  assert looks >= 10


def ids(index):
  table = index.table()
  return [table.id(place) for place in range(len(table))]


def test_rollouts_have_names_numbers_and_groups(tmp_path):
  index = Index(write(tmp_path / "run") / "rollouts")
  assert index.look() is False
  table = index.table()
  expected = [row for step in (1, 2, 3) for row in rollouts(step)]
  assert ids(index)[:2] == ["step_000001:1", "step_000001:2"]
  assert ids(index)[-1] == "step_000003:12"
  for name in ("step", "row", "length", "reward_reference", "group_std"):
    assert table.columns[name].tolist() == [row[name] for row in expected]
  for name, field in (("kept", "kept"), ("scorable", "scorable")):
    assert table.columns[name].tolist() == [float(row[field]) for row in expected]
  assert table.columns["empty"].tolist() == [float(i % SAMPLES == 1) for i in range(len(expected))]
  assert table.columns["exact"].tolist() == [float(i % SAMPLES == 0) for i in range(len(expected))]
  assert table.columns["answered"].tolist() == [float(i % SAMPLES != 3) for i in range(len(expected))]
  assert table.columns["truncated"].tolist() == [float(i % SAMPLES == 3) for i in range(len(expected))]
  np.testing.assert_allclose(table.columns["gain"], [row["reward_reference"] - 0.3 for row in expected])
  assert np.isnan(table.columns["reward_total"]).tolist() == [i % SAMPLES == 3 for i in range(len(expected))]
  assert table.group.tolist() == [1 + i // SAMPLES for i in range(len(expected))]
  assert [table.sources[i] for i in table.source] == [row["source"] for row in expected]
  assert table.find("step_000002:5") == 16
  for nothing in (
    "",
    "step_000002",
    "step_000002:0",
    "step_000002:13",
    "../config:1",
    "step_000002:x",
    "step_000009:1",
  ):
    assert table.find(nothing) is None
  assert index.read([16])[16]["question"] == expected[16]["question"]


def test_numbers_that_only_some_rollouts_have(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 1, "shadow_x": 0.5}\n')
  (tmp_path / "b.jsonl").write_text('{"step": 2, "huge": 1' + "0" * 400 + "}\n")
  index = Index(tmp_path)
  index.look()
  np.testing.assert_array_equal(index.table().columns["shadow_x"], [np.nan, 0.5, np.nan])
  assert "huge" not in index.table().columns
  assert index.table().group.tolist() == [1, 2, 3]  # without the prompt's row nothing says what belongs together


def test_a_run_that_goes_on_and_one_that_begins_anew(tmp_path):
  directory = write(tmp_path / "run", steps=2) / "rollouts"
  index = Index(directory)
  index.look()
  version = index.version
  index.look()
  assert index.version == version
  (directory / "step_000003.jsonl").write_text(lines(rollouts(3)))
  index.look()
  assert index.version > version
  assert len(index.table()) == 36
  # What a run that goes on after step 1 does: later steps are taken back and come again.
  (directory / "step_000002.jsonl").unlink()
  (directory / "step_000003.jsonl").unlink()
  index.look()
  assert set(index.table().columns["step"]) == {1.0}
  (directory / "step_000002.jsonl").write_text(lines(rollouts(7)))
  index.look()
  assert set(index.table().columns["step"]) == {1.0, 7.0}
  # And --fresh: the whole directory is moved away.
  directory.rename(tmp_path / "earlier.1")
  index.look()
  assert len(index.table()) == 0
  assert index.table().columns == {}


def test_what_is_no_file_of_rollouts_is_left_alone(tmp_path):
  directory = write(tmp_path / "run", steps=1) / "rollouts"
  (directory / "step_000002.jsonl.partial").write_text(lines(rollouts(2)))
  (directory / "step_000003.jsonl").mkdir()
  (directory / "notes.txt").write_text("x")
  index = Index(directory)
  index.look()
  assert index.table().names == ["step_000001"]


def test_the_newest_rollouts_are_read_first(tmp_path):
  directory = write(tmp_path / "run", steps=5) / "rollouts"
  size = (directory / "step_000005.jsonl").stat().st_size
  index = Index(directory)
  assert index.look(size) is True
  assert set(index.table().columns["step"]) == {5.0}
  while index.look(size):
    pass
  assert len(index.table()) == 60
  assert index.read_bytes == sum(file.stat().st_size for file in directory.iterdir())
