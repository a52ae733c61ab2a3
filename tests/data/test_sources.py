"""data/sources.py on files written here, good and bad."""

import csv
import decimal
import json
import math
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpr_jax.data.sources import Example, count_reasons, load_examples, read_demonstrations, read_examples
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
@pytest.mark.parametrize("answer", ["answer", "reference", "reference_answer", "ground_truth", "solution"])
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
  (tmp_path / "a.csv").write_text("question,grade\nq,a\n")
  fails(tmp_path / "a.csv", "expected a column answer or reference or", "found only question, grade")
  path = write_parquet(tmp_path / "a.parquet", question=["q"], reward_model=[{"ground_truth": "a"}])
  fails(path, "expected a column prompt,", "found only question, reward_model")


EMPTY = ["", "  \n", None, "\u200b", "\ufeff \u2060", "\u200d\u00ad\u3164"]


@pytest.mark.parametrize("value", [*EMPTY, {"a": "b"}])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_cell_that_is_not_text(tmp_path, column, value):
  good = {"question": "q", "answer": "a"}
  path = write_jsonl(tmp_path / "a.jsonl", [good, {**good, column: value}])
  fails(path, f"row 2, column {column}: expected non-empty text, found {value!r}")


@pytest.mark.parametrize("value", [42, 4.5, True])
def test_a_number_is_no_question(tmp_path, value):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": value, "answer": "a"}])
  fails(path, f"row 1, column question: expected non-empty text, found {value!r}")


def test_text_with_something_to_see_is_not_empty(tmp_path):
  answers = ["\ufeffx", "a\u200b", "👩‍👩‍👧", ".", "\ue000"]
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": answer} for answer in answers])
  assert [e.reference for e in load_examples(path)] == answers


NUMBERS = {3: "3", 2.0: "2.0", -0.25: "-0.25", 10**30: str(10**30)}


@pytest.mark.parametrize(("value", "text"), [*NUMBERS.items(), (True, "True"), (False, "False"), (0, "0")])
def test_numbers_and_booleans_are_answers(tmp_path, value, text):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": value}])
  assert load_examples(path)[0].reference == text
  path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": [USER], "reward_model": {"ground_truth": value}}])
  assert load_examples(path)[0].reference == text


def test_numbers_in_parquet_are_answers(tmp_path):
  for values in ([3, 4], [2.0, 0.1], [True, False], [decimal.Decimal("1.50"), decimal.Decimal("2.00")]):
    path = write_parquet(tmp_path / "a.parquet", question=["q", "q"], answer=values)
    assert [e.reference for e in load_examples(path)] == [str(value) for value in values]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_answer(tmp_path, value):
  fails(write_parquet(tmp_path / "a.parquet", question=["q"], answer=[value]), "row 1, column answer", f"found {value}")


def test_several_references(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": [" 1/2", 0.5, "half"]}])
  [example] = load_examples(path)
  assert (example.reference, example.other_references) == ("1/2", ("0.5", "half"))
  fails(write_jsonl(path, [{"question": "q", "answer": []}]), "row 1, column answer: expected non-empty text, found []")
  fails(write_jsonl(path, [{"question": "q", "answer": ["a", ""]}]), "row 1, column answer, reference 2: expected non-")


def test_a_reference_that_closes_the_answer(tmp_path):
  """What stands behind the tag would be scored as if it were no part of the answer."""
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "42 </answer> so"}])
  fails(path, "row 1, column answer: expected an answer without </answer>, found '42 </answer> so'")


@pytest.mark.parametrize("column", ["prompt", "messages", "question"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_chat_beside_an_answer(tmp_path, column, as_text):
  chat = [SYSTEM, USER]
  path = write_jsonl(tmp_path / "a.jsonl", [{column: json.dumps(chat) if as_text else chat, "answer": "42"}])
  assert load_examples(path) == [Example((SYSTEM, USER), "42", "a", 1)]


def test_a_response_in_messages_is_no_part_of_the_question(tmp_path):
  """As in sets for supervised training: it would give the answer away."""
  path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, {"role": "assistant", "content": "42"}], "answer": 42}])
  assert load_examples(path) == [Example((USER,), "42", "a", 1)]


def test_verl_as_json_text(tmp_path):
  """As CSV files and tables of strings hold it."""
  chat, truth = json.dumps([SYSTEM, USER]), json.dumps({"style": "rule", "ground_truth": "42"})
  with (tmp_path / "a.csv").open("w", newline="") as file:
    csv.writer(file).writerows([["prompt", "reward_model"], [chat, truth]])
  assert load_examples(tmp_path / "a.csv") == [Example((SYSTEM, USER), "42", "a", 1)]


@pytest.mark.parametrize("text", ["[1, 2] has which sum?", "[1, 2]", '[{"a": 1}]', "{", '{"a": 1}'])
def test_text_that_looks_like_json_is_a_question(tmp_path, text):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": text, "answer": "a"}])
  assert load_examples(path) == [Example(user(text), "a", "a", 1)]


# ---- rows that are dropped ----


def bad_rows(path, bad, good):
  """A file of rows without an answer among good ones."""
  rows = [{"question": "q", "answer": "a"}] * good
  for row in bad:
    rows.insert(row - 1, {"question": "q", "answer": ""})
  return write_jsonl(path, rows)


def test_bad_rows_are_dropped_and_named(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"question": f"{i}", "answer": "a"}) for i in range(40)]
  lines[3], lines[7], lines[5] = "{", '{"question": "q"}', '["q", "a"]'
  lines[9] = '{"question": "q", "answer": "\\u200b"}'
  path.write_text("\n".join(lines))
  read = read_examples(str(path), max_dropped=0.1)
  assert len(read.items) == 36
  assert [(row.file, row.row, row.reason) for row in read.dropped] == [
    (str(path), 4, "not JSON"),
    (str(path), 6, "not a JSON object"),
    (str(path), 8, "answer: empty"),
    (str(path), 10, "answer: empty"),
  ]
  assert read.dropped[2].detail == "column answer: expected non-empty text, found None"
  assert count_reasons(read.dropped) == {"answer: empty": 2, "not JSON": 1, "not a JSON object": 1}
  assert next(iter(count_reasons(read.dropped))) == "answer: empty"


def test_examples_say_where_they_stand(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}] * 2)
  assert [example.origin for example in load_examples(path)] == [f"{path}: row 1", f"{path}: row 2"]


def test_the_largest_share_is_one_that_passes(tmp_path):
  path = bad_rows(tmp_path / "a.jsonl", [5], 19)
  assert len(read_examples(str(path), max_dropped=0.05).items) == 19
  with pytest.raises(InputError) as caught:
    read_examples(str(path), max_dropped=0.049)
  assert str(caught.value) == (
    f"{path}: 1 of 20 rows cannot be used, expected at most 4.9% (max_dropped); 1 of them: answer: empty, first {path}:"
    " row 5, column answer: expected non-empty text, found ''"
  )


def test_the_most_frequent_reason_is_named_with_its_first_row(tmp_path):
  (tmp_path / "a.csv").write_text("question,answer\nq\nq,a\nq,\nq,</answer>\nq,\n")
  with pytest.raises(
    InputError, match=r"4 of 5 rows .*; 2 of them: answer: empty, first .*a\.csv: row 3, column answer"
  ):
    read_examples(str(tmp_path / "a.csv"), max_dropped=0.5)


def test_no_row_that_can_be_used_is_refused_whatever_the_share(tmp_path):
  with pytest.raises(InputError, match="none of 1 rows can be used; 1 of them: answer: empty, first"):
    read_examples(str(bad_rows(tmp_path / "a.jsonl", [1], 0)), max_dropped=1.0)


def test_rows_of_another_split_are_not_looked_at(tmp_path):
  (tmp_path / "a.csv").write_text("prompt,reference,split\np,1,train\nq,,test\n")
  assert read_examples(str(tmp_path / "a.csv"), "train").dropped == []


def test_demonstrations_are_dropped_in_the_same_way(tmp_path):
  rows = [{"prompt": "q", "response": "a"}] * 3 + [{"prompt": "q", "response": "\u200b"}]
  read = read_demonstrations(str(write_jsonl(tmp_path / "a.jsonl", rows)), max_dropped=0.25)
  assert (len(read.items), [row.reason for row in read.dropped]) == (3, ["response: empty"])


def test_a_cell_that_is_missing(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])
  fails(path, "row 2, column answer: expected non-empty text, found None")


def test_a_long_cell_is_not_printed_whole(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [{"question": list(range(10_000)), "answer": "a"}])
  with pytest.raises(InputError) as caught:
    load_examples(path)
  assert len(str(caught.value)) < len(str(path)) + 150


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
  fails(write_verl(path, [[USER]], [{"a": 1}]), "row 1, column reward_model.ground_truth", "found {'a': 1}")
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
