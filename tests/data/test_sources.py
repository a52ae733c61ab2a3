"""data/sources.py on files written here, good and bad."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.errors import InputError

SYSTEM = {"role": "system", "content": "Think first."}
USER = {"role": "user", "content": "What is 6 * 7?"}


def user(text):
  return ({"role": "user", "content": text},)


def write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def write_parquet(path, **columns):
  pq.write_table(pa.table(columns), path)
  return path


def write_verl(path, prompts, truths):
  return write_parquet(
    path,
    data_source=["web"] * len(prompts),
    prompt=prompts,
    ability=["physics"] * len(prompts),
    reward_model=[{"style": "rule", "ground_truth": truth} for truth in truths],
    extra_info=[{"index": i} for i in range(len(prompts))],
  )


def test_verl_parquet(tmp_path):
  path = write_verl(tmp_path / "train.parquet", [[SYSTEM, USER], [{"role": "user", "content": "Why?"}]], ["42", " so "])
  assert load_examples(path) == [
    Example((SYSTEM, USER), "42", "web", 1),
    Example(user("Why?"), "so", "web", 2),
  ]


@pytest.mark.parametrize("question", ["question", "prompt", "problem"])
@pytest.mark.parametrize("answer", ["answer", "reference", "reference_answer", "ground_truth"])
def test_plain_columns(tmp_path, question, answer):
  rows = [{question: "1 + 1?", answer: " 2\n"}, {question: "  Who? ", answer: "Ada"}]
  expected = [Example(user("1 + 1?"), "2", "file", 1), Example(user("  Who? "), "Ada", "file", 2)]
  assert load_examples(write_jsonl(tmp_path / "file.jsonl", rows)) == expected
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  assert load_examples(write_parquet(tmp_path / "file.parquet", **columns)) == expected
  (tmp_path / "file.csv").write_text(f'{question},{answer}\n1 + 1?,2\n"  Who? ","Ada\n"\n')
  assert load_examples(tmp_path / "file.csv") == expected


@pytest.mark.parametrize("source", ["source", "data_source", "domain", "category"])
def test_source_column(tmp_path, source):
  rows = [{"question": "q", "answer": "a", source: "law"}, {"question": "q", "answer": "a", source: None}]
  assert [e.source for e in load_examples(write_jsonl(tmp_path / "mixed.jsonl", rows))] == ["law", "mixed"]


def test_csv_text_stays_as_written(tmp_path):
  answers = ["42", "007", "1.50", "1e3", "NA", "null", "None", "True", "1981-03-12", "x, y", 'say "so"', "two\nlines"]
  lines = [f'q,"{answer.replace(chr(34), chr(34) * 2)}"' for answer in answers]
  (tmp_path / "a.csv").write_text("question,answer\n" + "\n".join(lines) + "\n\n", encoding="utf-8-sig")
  examples = load_examples(tmp_path / "a.csv")
  assert [e.reference for e in examples] == answers
  assert [e.row for e in examples] == list(range(1, len(answers) + 1))


def test_jsonl_text_stays_as_written(tmp_path):
  answers = ["42", "007", "1981-03-12", "null", "a\u2028b", "👩‍👩‍👧"]
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": answer} for answer in answers])
  assert [e.reference for e in load_examples(path)] == answers


def test_jsonl_rows_are_lines(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n\n{"question": "r", "answer": "b"}')
  assert [e.row for e in load_examples(tmp_path / "a.jsonl")] == [1, 3]


def test_split(tmp_path):
  (tmp_path / "a.csv").write_text("prompt,reference,split\np,1,train\nq,,test\nr,3,train\n")
  assert [(e.reference, e.row) for e in load_examples(tmp_path / "a.csv", "train")] == [("1", 1), ("3", 3)]
  with pytest.raises(InputError, match=r"a\.csv: expected rows with dev in column split, found only test, train"):
    load_examples(tmp_path / "a.csv", "dev")


def test_split_of_a_file_without_that_column(tmp_path):
  assert len(load_examples(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}]), "train")) == 1


def fails(path, *parts):
  """Loading `path` fails in one line that names the path and holds every part."""
  with pytest.raises(InputError) as caught:
    load_examples(path)
  message = str(caught.value)
  assert message.startswith(f"{path}: ")
  assert "\n" not in message
  for part in parts:
    assert part in message


def test_no_such_file(tmp_path):
  fails(tmp_path / "none.csv", "expected a file, found none")
  (tmp_path / "folder.csv").mkdir()
  fails(tmp_path / "folder.csv", "expected a file, found a directory")
  (tmp_path / "a.xlsx").touch()
  fails(tmp_path / "a.xlsx", "*.parquet, *.jsonl, *.csv")


def test_unreadable_parquet(tmp_path, capfd):
  path = tmp_path / "a.parquet"
  for content in (b"", b"question,answer\nq,a\n"):
    path.write_bytes(content)
    fails(path, "cannot be read as parquet")
  whole = write_parquet(path, question=["why " * 99] * 999, answer=["so"] * 999).read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  fails(path, "cannot be read as parquet")
  path.write_bytes(whole[:50] + bytes(200) + whole[250:])
  fails(path, "cannot be read as parquet")
  assert capfd.readouterr() == ("", "")  # the error is the one line there is


def test_unreadable_text(tmp_path):
  for suffix in ("csv", "jsonl"):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"question,answer\nq,\xff\n")
    fails(path, f"cannot be read as {suffix}", "utf-8")


@pytest.mark.parametrize("content", ["", "\n", "question,answer\n"])
def test_no_rows_in_text(tmp_path, content):
  (tmp_path / "a.csv").write_text(content)
  fails(tmp_path / "a.csv", "expected at least one row, found none")
  (tmp_path / "a.jsonl").write_text("\n" if content else "")
  fails(tmp_path / "a.jsonl", "expected at least one row, found none")


def test_no_rows_in_parquet(tmp_path):
  path = write_parquet(tmp_path / "a.parquet", question=pa.array([], pa.string()), answer=pa.array([], pa.string()))
  fails(path, "expected at least one row, found none")


def test_missing_columns(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"task": "q", "answer": "a"}, {"title": "t"}])
  fails(path, "expected a column question or prompt or problem", "found only task, answer, title")
  (tmp_path / "a.csv").write_text("question,solution\nq,a\n")
  fails(tmp_path / "a.csv", "expected a column answer or reference or", "found only question, solution")
  path = write_parquet(tmp_path / "a.parquet", question=["q"], reward_model=[{"ground_truth": "a"}])
  fails(path, "expected a column prompt,", "found only question, reward_model")


@pytest.mark.parametrize("value", ["", "  \n", None, 42, 4.5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_cell_that_is_not_text(tmp_path, column, value):
  good = {"question": "q", "answer": "a"}
  path = write_jsonl(tmp_path / "a.jsonl", [good, {**good, column: value}])
  fails(path, f"row 2, column {column}: expected non-empty text, found {value!r}")


def test_a_cell_that_is_missing(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])
  fails(path, "row 2, column answer: expected non-empty text, found None")


def test_a_long_cell_is_not_printed_whole(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": list(range(10_000)), "answer": "a"}])
  with pytest.raises(InputError) as caught:
    load_examples(path)
  assert len(str(caught.value)) < len(str(path)) + 150


def test_numbers_in_parquet_are_not_text(tmp_path):
  fails(write_parquet(tmp_path / "a.parquet", question=["q"], answer=[42]), "row 1, column answer", "found 42")


def test_half_a_surrogate_pair(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "ab\\ud83d"}\n')
  fails(tmp_path / "a.jsonl", "row 1, column answer: expected text, found a lone surrogate at character 3")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"question": "q", "answer": }', "row 2: expected JSON, found Expecting value"),
    ('{"question": "q", "answer": "a"', "row 2: expected JSON, found"),
    ('["q", "a"]', "row 2: expected a JSON object, found ['q', 'a']"),
    ("null", "row 2: expected a JSON object, found None"),
  ],
)
def test_a_line_that_is_not_an_object(tmp_path, line, message):
  (tmp_path / "a.jsonl").write_text(f'{{"question": "q", "answer": "a"}}\n{line}\n')
  fails(tmp_path / "a.jsonl", message)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("q,a,b", "row 2: expected 2 fields, found 3"),
    ("q", "row 2: expected 2 fields, found 1"),
    ('"q,a\nq,a', "row 2: expected CSV, found unexpected end of data"),
    ("q,", "row 2, column answer: expected non-empty text, found ''"),
  ],
)
def test_a_csv_row_that_is_wrong(tmp_path, line, message):
  (tmp_path / "a.csv").write_text(f"question,answer\nq,a\n{line}\n")
  fails(tmp_path / "a.csv", message)


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ([], "found roles []"),
    (None, "found None"),
    ([SYSTEM], "found roles ['system']"),
    ([{"role": "human", "content": "q"}], "found roles ['human']"),
    ([{"role": None, "content": "q"}, USER], "found roles [None, 'user']"),
    ([SYSTEM, {"role": "user", "content": " "}], "message 2: expected non-empty text, found ' '"),
    ([{"role": "user", "content": None}], "message 1: expected non-empty text, found None"),
  ],
)
def test_a_verl_prompt_that_is_wrong(tmp_path, prompt, message):
  path = write_verl(tmp_path / "a.parquet", [[SYSTEM, USER], prompt], ["42", "42"])
  fails(path, "row 2, column prompt", message)


def test_a_verl_prompt_that_is_text(tmp_path):
  path = write_verl(tmp_path / "a.parquet", ["What is 6 * 7?"], ["42"])
  fails(path, "row 1, column prompt: expected a list of messages {role, content}", "found 'What is 6 * 7?'")


def test_a_verl_answer_that_is_wrong(tmp_path):
  path = write_verl(tmp_path / "a.parquet", [[USER], [USER]], ["42", " "])
  fails(path, "row 2, column reward_model.ground_truth: expected non-empty text, found ' '")
  fails(write_verl(path, [[USER]], [42]), "row 1, column reward_model.ground_truth", "found 42")
  fails(write_parquet(path, prompt=[[USER]], reward_model=["42"]), "row 1, column reward_model: expected {style,")


def test_nothing_is_left_in_the_home_directory(tmp_path):
  """In a process of its own: `datasets` reads HOME as it is imported."""
  home, path = tmp_path / "home", write_parquet(tmp_path / "a.parquet", question=["q"], answer=["a"])
  home.mkdir()
  code = "import sys; from rlpr_jax.data.sources import load_examples; print(len(load_examples(sys.argv[1])))"
  kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
  done = subprocess.run(
    [sys.executable, "-c", code, path], env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=True
  )
  assert (done.stdout, done.stderr) == ("1\n", "")
  assert list(home.rglob("*")) == []
