"""data/tables.py: files of every format as newer libraries, spreadsheets and people write them."""

import csv
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.data.tables import read_rows
from rlpr_jax.errors import InputError

EXPECTED = [Example(({"role": "user", "content": "q"},), "a", "a", 1)]
ODD = {
  "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
  "uuid": pa.array([uuid.UUID(int=7).bytes], pa.uuid()),
  "dictionary": pa.array(["x"]).dictionary_encode(),
  "view": pa.array(["x"], pa.large_string()),
  "decimal": pa.array([None], pa.decimal128(9, 2)),
  "union": pa.array([b"x"], pa.binary(1)),
}


@pytest.mark.parametrize("kind", ODD)
def test_parquet_with_other_columns_of_any_kind(tmp_path, kind):
  pq.write_table(pa.table({"question": ["q"], "answer": ["a"], "id": ODD[kind]}), tmp_path / "a.parquet")
  assert load_examples(tmp_path / "a.parquet") == EXPECTED
  columns, [(_, row)] = read_rows(tmp_path / "a.parquet", {"answer"})
  assert (columns, row) == (["question", "answer", "id"], {"answer": "a"})


def test_parquet_whose_features_are_of_a_newer_library(tmp_path):
  features = {"question": {"_type": "Value", "dtype": "string"}, "answer": {"_type": "OfNextYear", "of": [{}]}}
  table = pa.table({"question": ["q"], "answer": ["a"]})
  table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
  pq.write_table(table, tmp_path / "a.parquet")
  assert load_examples(tmp_path / "a.parquet") == EXPECTED


def test_parquet_rows_of_several_row_groups_are_numbered_through(tmp_path):
  table = pa.table({"question": [f"q{i}" for i in range(10)], "answer": ["a"] * 10})
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
  assert [(number, row["question"]) for number, row in read_rows(tmp_path / "a.parquet")[1]] == [
    (i + 1, f"q{i}") for i in range(10)
  ]


def test_parquet_values_that_python_has_not(tmp_path):
  table = pa.table({"question": ["q"], "answer": pa.array([2**45], pa.timestamp("s"))})
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet: "):
    load_examples(tmp_path / "a.parquet")


def test_parquet_floats_are_written_as_they_were(tmp_path):
  """0.1 in 32 bits is 0.10000000149011612 in 64."""
  pq.write_table(pa.table({"answer": pa.array([0.1, 2, None], pa.float32())}), tmp_path / "a.parquet")
  assert [row["answer"] for _, row in read_rows(tmp_path / "a.parquet")[1]] == [0.1, 2.0, None]


def test_csv_cells_of_any_size(tmp_path):
  before, long = csv.field_size_limit(), "long " * 50_000
  (tmp_path / "a.csv").write_text(f"question,answer\n{long},a\n")
  assert load_examples(tmp_path / "a.csv")[0].messages[0]["content"] == long
  assert csv.field_size_limit() == before


def test_two_columns_of_one_name(tmp_path):
  (tmp_path / "a.csv").write_text("question,answer,answer\nq,a,b\n")
  with pytest.raises(InputError, match=r"a\.csv: expected columns of different names, found answer 2 times"):
    load_examples(tmp_path / "a.csv")


def test_columns_without_a_name_are_no_two_of_one(tmp_path):
  """Spreadsheets write them behind the last column."""
  (tmp_path / "a.csv").write_text("question,answer,,\nq,a,,\n")
  assert load_examples(tmp_path / "a.csv") == EXPECTED


def test_json_of_any_depth_is_refused_in_one_line(tmp_path):
  (tmp_path / "a.json").write_text("[" * 100_000)
  (tmp_path / "a.jsonl").write_text("[" * 100_000)
  for name in ("a.json", "a.jsonl"):
    with pytest.raises(InputError, match="expected JSON"):
      load_examples(tmp_path / name)
