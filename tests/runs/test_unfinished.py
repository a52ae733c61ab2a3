"""Work that is kept as it goes."""

import numpy as np

from rlpr_jax.runs import unfinished
from rlpr_jax.runs.unfinished import KeptRows


def test_rows_of_every_process_up_to_a_record_that_was_broken_off(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  KeptRows(tmp_path, "r", of="a").add({5: np.array([5, np.nan], np.float32)})
  monkeypatch.undo()
  kept = KeptRows(tmp_path, "r", of="a")
  kept.add({1: np.array([1, 2], np.float32), 2: np.array([2, 3], np.float32)})
  kept.add({3: np.array([3, 4], np.float32)})
  (path,) = unfinished.directory(tmp_path).glob("*-0.rows")
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    expected = {5} | ({1, 2} if length >= 36 else set())  # 12 bytes of head, and two rows of a place and two numbers
    assert KeptRows(tmp_path, "r", of="a").rows.keys() == expected
  path.write_bytes(whole)
  rows = KeptRows(tmp_path, "r", of="a").rows
  assert {place: row.tolist() for place, row in rows.items() if place < 5} == {1: [1, 2], 2: [2, 3], 3: [3, 4]}
  assert np.isnan(rows[5][1])
  path.write_bytes(whole[:20] + b"x" + whole[21:])
  assert KeptRows(tmp_path, "r", of="a").rows.keys() == {5}


def test_rows_of_other_work_are_not_taken(tmp_path):
  KeptRows(tmp_path, "r", of="model A").add({1: np.zeros(1, np.float32)})
  assert not KeptRows(tmp_path, "r", of="model B").rows
  unfinished.clear(tmp_path)
  assert not KeptRows(tmp_path, "r", of="model A").rows


def test_a_disk_that_cannot_be_written_is_said_once(tmp_path, capsys):
  """Rows are kept once it can be again."""
  (tmp_path / "unfinished").touch()
  kept = KeptRows(tmp_path, "r", of="a")
  kept.add({1: np.zeros(1, np.float32)})
  kept.add({2: np.zeros(1, np.float32)})
  assert capsys.readouterr().err.count("going on without it") == 1
  (tmp_path / "unfinished").unlink()
  kept.add({3: np.zeros(1, np.float32)})
  assert KeptRows(tmp_path, "r", of="a").rows.keys() == {1, 2, 3}
