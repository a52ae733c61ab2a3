"""data/files.py: names of files, directories and data sets of a hub that is served here, with splits and weights."""

import io
import json
import pathlib

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpr_jax.data import files
from rlpr_jax.data.sources import load_examples, read_demonstrations, read_examples
from rlpr_jax.errors import InputError
from tests.hub_server import HubServer, reach


def jsonl(*answers):
  return "".join(json.dumps({"question": f"{answer}?", "answer": answer}) + "\n" for answer in answers).encode()


def parquet(*answers):
  """verl's layout."""
  sink = io.BytesIO()
  prompts = [[{"role": "user", "content": f"{answer}?"}] for answer in answers]
  pq.write_table(pa.table({"prompt": prompts, "reward_model": [{"ground_truth": a} for a in answers]}), sink)
  return sink.getvalue()


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/a-*
  - split: test
    path: [main/b.jsonl]
- config_name: hard
  data_files: hard/*.jsonl
---
# Sums
"""
REPOSITORIES = {
  "openbmb/RLPR-Train-Dataset": {
    "main": {"README.md": b"# RLPR", "rlpr_train.parquet": parquet("42", "so"), "load.py": b"1 / 0"},
  },
  "org/sums": {
    "main": {
      "data/train-00000-of-00002.parquet": parquet("1"),
      "data/train-00001-of-00002.parquet": parquet("2"),
      "data/test-00000-of-00001.parquet": parquet("3"),
      "dataset_infos.json": b"{}",
    },
    "v0": {"train.jsonl": jsonl("old")},
  },
  "org/column": {"main": {"rows.csv": b"question,answer,split\np,1,train\nq,2,test\n"}},
  "org/card": {
    "main": {
      "README.md": CARD.encode(),
      "main/a-0.jsonl": jsonl("a"),
      "main/b.jsonl": jsonl("b"),
      "hard/c.jsonl": jsonl("c"),
      "other/d.jsonl": jsonl("d"),
    },
  },
  "org/odd-card": {"main": {"README.md": b"---\nconfigs: [7, {}]\n---\n", "x.jsonl": jsonl("x")}},
  "org/empty": {"main": {"README.md": b"# Nothing", "model.bin": b"x"}},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub here, with a cache of its own; the working directory is empty."""
  with HubServer(REPOSITORIES) as server:
    reach(server, monkeypatch, tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server


def answers(path, split=None):
  return [example.reference for example in read_examples(path, split).items]


@pytest.mark.parametrize(
  ("path", "split", "expected"),
  [
    ("openbmb/RLPR-Train-Dataset", None, ["42", "so"]),
    ("org/sums:train", None, ["1", "2"]),
    ("org/sums", "train", ["1", "2"]),
    ("org/sums:test", "train", ["3"]),
    ("org/sums@v0", None, ["old"]),
    ("org/sums@v0:train", None, ["old"]),
    ("org/column:test", None, ["2"]),
    ("org/column", "train", ["1"]),
    ("org/column", None, ["1", "2"]),
    ("org/card/main:train", None, ["a"]),
    ("org/card/main:test", None, ["b"]),
    ("org/card/hard", None, ["c"]),
    ("org/card/other", None, ["d"]),
    ("org/odd-card", None, ["x"]),
    ("org/sums:test,org/card/hard", None, ["3", "c"]),
  ],
)
def test_data_sets_of_the_hub(hub, path, split, expected):
  assert answers(path, split) == expected


def test_only_files_that_are_read_are_fetched(hub):
  answers("org/sums:train")
  answers("openbmb/RLPR-Train-Dataset")
  assert sorted(name for name in hub.fetched if name != "README.md") == [
    "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "rlpr_train.parquet",
  ]  # fmt: skip


def test_rows_of_the_hub_are_named_by_the_data_set(hub):
  read = read_examples("org/column:train")
  assert [(e.source, e.row) for e in read.items] == [("column", 1)]
  hub.repositories = {"org/bad": {"main": {"rows.csv": b"question,answer\np,\n"}}}
  with pytest.raises(InputError, match=r"first org/bad/rows\.csv: row 1, column answer: expected non-empty text"):
    read_examples("org/bad")


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("org/none", "org/none: no such file or directory, and no data set of the hub either: "),
    ("org/sums@v9", "org/sums@v9: no such file or directory, and no data set of the hub either: "),
    ("org/sums", "org/sums: has splits test, train; expected one of them, as in org/sums:train"),
    ("org/card", "org/card: has configurations hard, main; expected one of them, as in org/card/hard"),
    ("org/card/main", "org/card/main: has splits test, train; expected one of them, as in org/card/main:train"),
    ("org/card/none", "org/card/none: expected files named *.parquet, *.jsonl, *.csv, *.json, found none"),
    ("org/empty", "org/empty: expected files named *.parquet, *.jsonl, *.csv, *.json, found none"),
    ("org/column:dev", "org/column:dev: expected rows with dev in column split, found only test, train"),
    ("org/sums@v0:dev", "org/sums/train.jsonl: expected a column split with dev in it, found only question, answer"),
  ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, path, message):
  with pytest.raises(InputError) as caught:
    read_examples(path)
  assert str(caught.value).startswith(message)
  assert "\n" not in str(caught.value)


def test_without_the_hub_its_cache_will_do(hub, monkeypatch):
  assert answers("org/sums:train") == ["1", "2"]
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  assert answers("org/sums:train") == ["1", "2"]
  with pytest.raises(InputError, match="org/column: no such file or directory, and no data set of the hub either"):
    answers("org/column")


def test_what_is_here_goes_before_the_hub(hub):
  pathlib.Path("org/sums").mkdir(parents=True)
  pathlib.Path("org/sums/mine.jsonl").write_bytes(jsonl("mine"))
  assert answers("org/sums") == ["mine"]


def test_demonstrations_of_the_hub(hub):
  hub.repositories = {"org/told": {"main": {"train.jsonl": b'{"prompt": "1 + 1?", "response": "2"}\n'}}}
  [(example, response)] = read_demonstrations("org/told:train").items
  assert (example.messages[0]["content"], response) == ("1 + 1?", "2")


# ---- directories ----


def test_a_directory_is_read_by_name(tmp_path):
  (tmp_path / "b.parquet").write_bytes(parquet("2"))
  (tmp_path / "a.jsonl").write_bytes(jsonl("1"))
  (tmp_path / "c.csv").write_text("question,answer\nq,3\n")
  (tmp_path / "d.json").write_text('[{"question": "q", "answer": "4"}]')
  (tmp_path / "notes.txt").write_text("no rows")
  (tmp_path / ".hidden").mkdir()
  (tmp_path / ".hidden" / "a.jsonl").write_bytes(jsonl("5"))
  examples = read_examples(str(tmp_path)).items
  assert [e.reference for e in examples] == ["1", "2", "3", "4"]
  assert [(e.source, e.row) for e in examples] == [(stem, 1) for stem in "abcd"]


def test_shards_are_one_source(tmp_path):
  for i in range(2):
    (tmp_path / f"web-0000{i}-of-00002.parquet").write_bytes(parquet(str(i)))
  assert [(e.reference, e.source) for e in read_examples(str(tmp_path)).items] == [("0", "web"), ("1", "web")]


def test_a_directory_with_splits(tmp_path):
  """To train on the test set in silence is what no one wants."""
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "a.jsonl").write_bytes(jsonl("1"))
  (tmp_path / "dev.jsonl").write_bytes(jsonl("2"))
  assert answers(f"{tmp_path}:train") == answers(str(tmp_path), "train") == ["1"]
  assert answers(f"{tmp_path}:dev") == answers(f"{tmp_path}:validation") == ["2"]
  with pytest.raises(InputError, match=r": has splits train, validation; expected one of them, as in .*:validation"):
    answers(str(tmp_path))


def test_a_directory_whose_card_is_of_other_files(tmp_path):
  (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: other/*\n---\n")
  (tmp_path / "a.jsonl").write_bytes(jsonl("1"))
  assert answers(str(tmp_path)) == ["1"]


def test_a_directory_without_rows(tmp_path):
  (tmp_path / "notes.txt").write_text("no rows")
  with pytest.raises(InputError, match=r"expected files named \*\.parquet, .* found none"):
    answers(str(tmp_path))


# ---- several with weights ----


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a.jsonl", ("a.jsonl", None, 1.0)),
    ("a.jsonl:2", ("a.jsonl", None, 2.0)),
    ("a.jsonl:train:0.5", ("a.jsonl", "train", 0.5)),
    ("org/name@v1:test", ("org/name@v1", "test", 1.0)),
  ],
)
def test_parse(text, expected):
  assert files.parse(text) == expected


@pytest.mark.parametrize("text", [":2", "a.jsonl:", "a.jsonl:train:2:3", "a.jsonl::2", "gs://bucket/a.jsonl", ""])
def test_what_no_one_can_mean(text):
  with pytest.raises(InputError, match=r"expected PATH, PATH:SPLIT, PATH:WEIGHT or PATH:SPLIT:WEIGHT, several with"):
    files.find(text)


@pytest.mark.parametrize("name", ["a b", "name", "/no/such/directory", "a.txt:2"])
def test_what_is_neither_here_nor_a_name_on_the_hub(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"^[^:]*: no such file or directory, expected one, or org/name of the Hugging"):
    files.find(name)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_cannot_be(tmp_path, weight):
  (tmp_path / "a.jsonl").write_bytes(jsonl("1"))
  with pytest.raises(InputError, match=rf"weight {weight}, expected more than 0"):
    read_examples(f"{tmp_path}/a.jsonl:{weight}")


def test_several_with_weights(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.jsonl").write_bytes(jsonl(name, f"{name}2"))
  a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
  read = read_examples(f"{a}:1, {b}:0.5").items
  assert [(e.reference, e.weight) for e in read] == [("a", 2.0), ("a2", 2.0), ("b", 1.0), ("b2", 1.0)]
  assert {e.weight for e in read_examples(f"{a}:7").items} == {1.0}


def test_names_with_commas_and_colons(tmp_path):
  path = tmp_path / "a:1,b.jsonl"
  path.write_bytes(jsonl("1"))
  assert answers(str(path)) == ["1"]
  other = tmp_path / "c:d.jsonl"
  other.write_bytes(jsonl("2"))
  assert [(e.reference, e.weight) for e in read_examples(f"{other}:3").items] == [("2", 1.0)]
  assert [e.reference for e in load_examples(path)] == ["1"]
