"""How the rows of each benchmark become questions, from made-up rows in its columns, and what malformed rows raise."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpr_jax.errors import InputError, MachineError
from rlpr_jax.evaluation.benchmarks import BENCHMARKS, Question, load
from rlpr_jax.grading import graders
from rlpr_jax.grading.question import GRADERS

OPTIONS = ["iron", "gold", "tin", "lead", "zinc", "neon", "argon", "helium", "xenon", "radon"]
MATH = {"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1}
GPQA = {
  "Record ID": "rec1",
  "Question": "Which one floats?",
  "Correct Answer": "cork\n",
  "Incorrect Answer 1": "lead",
  "Incorrect Answer 2": "iron",
  "Incorrect Answer 3": "gold",
  "Subdomain": "Mechanics",
  "High-level domain": "Physics",
}
THEOREM = {"Question": "What is it?", "Picture": None, "id": "me/one.json", "subfield": "Logic", "field": "Math"}
OLYMPIAD = {"id": 7, "question": "Find $x$.", "subfield": "Algebra", "unit": None, "is_multiple_answer": False}

# benchmark, row, what the question has
ROWS = [
  (
    "math500",
    {**MATH, "unique_id": "test/algebra/1.json"},
    {
      "id": "test/algebra/1.json",
      "prompt": "1+1?",
      "reference": "2",
      "category": "Algebra",
      "grader": "math",
      "options": (),
      "row": 1,
    },
  ),
  ("aime24", {"id": 60, "problem": "p", "answer": "025"}, {"id": "60", "reference": "25", "grader": "number"}),
  (
    "mmlu_pro",
    {"question_id": 9, "question": "Which is a gas?", "options": OPTIONS, "answer": "J", "category": "chemistry"},
    {
      "id": "9",
      "reference": "J",
      "grader": "multiple_choice",
      "options": tuple(OPTIONS),
      "category": "chemistry",
      "prompt": "Which is a gas?\n" + "\n".join(f"{x}. {o}" for x, o in zip("ABCDEFGHIJ", OPTIONS, strict=True)),
    },
  ),
  ("gpqa_diamond", GPQA, {"id": "rec1", "grader": "multiple_choice", "category": "Mechanics"}),
  (
    "theoremqa",
    {**THEOREM, "Answer": 4, "Answer_type": "integer"},
    {"id": "me/one.json", "reference": "4", "grader": "number", "rounded": True, "rtol": 0.0, "category": "Math"},
  ),
  ("theoremqa", {**THEOREM, "Answer": 0.5, "Answer_type": "float"}, {"reference": "0.5", "rtol": 0.04, "atol": 0.0}),
  ("theoremqa", {**THEOREM, "Answer": True, "Answer_type": "bool"}, {"reference": "True", "grader": "number"}),
  (
    "theoremqa",
    {**THEOREM, "Answer": [1, 2], "Answer_type": "list of integer"},
    {"reference": "[1, 2]", "rounded": True},
  ),
  ("theoremqa", {**THEOREM, "Answer": "[0.5]", "Answer_type": "list of float"}, {"reference": "[0.5]", "rtol": 0.04}),
  (
    "theoremqa",
    {**THEOREM, "Question": "Which? (a) one. (b) two. (c) both.", "Answer": "(b)", "Answer_type": "option"},
    {"reference": "B", "grader": "multiple_choice", "options": ("one.", "two.", "both.")},
  ),
  (
    "minerva",
    {"problem": "p", "solution": "first \\boxed{1}, then \\boxed{4.5e33} erg", "type": "Astronomy", "idx": 3},
    {"id": "3", "reference": "4.5e33", "grader": "number", "rtol": 0.01, "category": "Astronomy"},
  ),
  ("minerva", {"question": "p", "answer": "e^{-t} u(t)"}, {"id": "1", "grader": "math", "reference": "e^{-t} u(t)"}),
  (
    "webinstruct",
    {"id": 5, "question": "How many?", "answer": "3 cars", "answer_type": "Integer", "category": "Economics"},
    {"id": "5", "reference": "3 cars", "grader": "number", "category": "Economics"},
  ),
  (
    "webinstruct",
    {"question": "Pick.\na) cash\nb) debt", "answer": "(B) debt", "answer_type": "Multiple Choice"},
    {"reference": "B", "grader": "multiple_choice", "options": ("cash", "debt")},
  ),
  ("webinstruct", {"question": "q", "answer": "x = 2y", "answer_type": "Expression"}, {"grader": "math"}),
  ("webinstruct", {"question": "q", "answer": "1984", "answer_type": "String"}, {"grader": "text"}),
  ("gsm8k", {"question": "q", "answer": "2+2=4\n#### 1,004"}, {"reference": "1,004", "grader": "number", "id": "1"}),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["$\\frac{1}{2}$"]}, {"reference": "\\frac{1}{2}", "id": "7"}),
  (
    "olympiadbench",
    {**OLYMPIAD, "final_answer": ["3.14"], "error": "1e-2"},
    {"reference": "3.14", "grader": "number", "atol": 0.01, "category": "Algebra"},
  ),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["1", "$x$"]}, {"reference": "1, x", "grader": "math"}),
  (
    "bbh",
    {"input": "Which?\nOptions:\n(A) red\n(B) blue", "target": "(B)"},
    {"grader": "multiple_choice", "reference": "B"},
  ),
  ("bbh", {"input": "not ( True ) is", "target": "False"}, {"grader": "text", "reference": "False"}),
]


def write(path, rows):
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif path.suffix == ".json":
    path.write_text(json.dumps(rows))
  elif path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  else:
    with path.open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  return str(path)


def fails(part, *args, kind=InputError, **kwargs):
  with pytest.raises(kind) as caught:
    load(*args, **kwargs)
  assert "\n" not in str(caught.value)
  assert part in str(caught.value)


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_rows(tmp_path, name, row, expected):
  (question,), dropped = load(name, write(tmp_path / "rows.jsonl", [row]))
  assert dropped == {}
  assert {field: getattr(question, field) for field in expected} == expected
  assert question.grader in GRADERS
  assert graders.grade(question, f"<answer> {question.reference} </answer>").right


def test_every_benchmark_is_tried():
  assert {name for name, _, _ in ROWS} == set(BENCHMARKS)
  assert all(name == benchmark.name and benchmark.samples >= 1 for name, benchmark in BENCHMARKS.items())
  assert {name: b.samples for name, b in BENCHMARKS.items() if name in ("aime24", "minerva", "gpqa_diamond")} == {
    "aime24": 16,
    "minerva": 4,
    "gpqa_diamond": 4,
  }


# benchmark, row, grader, what is right, what is wrong
HARD = [
  ("math500", {**MATH, "answer": "2^{2024}"}, "math", ["2^{2024}"], ["2^{2025}", "2", "2024", "\\infty"]),
  ("math500", {**MATH, "answer": "6xy"}, "math", ["6xy", "6yx"], ["6", "6ab"]),
  ("math500", {**MATH, "answer": "50\\%"}, "math", ["50%", "0.5", "\\frac12"], ["5", "0.05"]),
  ("math500", {**MATH, "answer": "10,\\!080"}, "math", ["10\\,080", "10 080", "10080"], ["10", "80"]),
  ("aime24", {"problem": "p", "answer": "007"}, "number", ["7", "007", "m+n = 7"], ["70", "7xy", "x >= 7", "8-m"]),
  ("mmlu_pro", {"question": "q", "options": OPTIONS, "answer": "B"}, "multiple_choice", ["B. gold"], ["(B) or (C)"]),
  ("theoremqa", {**THEOREM, "Answer": False, "Answer_type": "bool"}, "number", ["No, it is not true"], ["Yes", "not"]),
  (
    "theoremqa",
    {**THEOREM, "Answer": 5, "Answer_type": "integer"},
    "number",
    ["5.0 m", "4.8"],
    ["5ab", "x <= 5", "5.5", "less than 5"],
  ),
  ("minerva", {"problem": "p", "answer": "\\frac{37}{4} m"}, "math", ["9.25m", "\\frac{37m}{4}"], ["9.25", "9.25 s"]),
  ("minerva", {"problem": "p", "answer": "41.8^\\circ"}, "number", ["42", "41.8°"], ["43", "41.8 radians"]),
  ("minerva", {"problem": "p", "answer": "x' + r y - c = 0"}, "math", ["x' + r y - c = 0"], ["0", "y = 0"]),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["$\\frac12 m$"]}, "math", ["m/2", "0.5m"], ["0.5", "\\frac12"]),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["2014!"]}, "math", ["2014!"], ["2014", "2015!"]),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["2^{100}-1"]}, "number", [str(2**100 - 1)], ["2^{100}"]),
  ("webinstruct", {"question": "q", "answer": "5 m"}, "number", ["5", "5 meters"], ["5 km", "5 s"]),
  ("webinstruct", {"question": "q", "answer": "2^{2024}"}, "math", ["2^{2024}"], ["2^{2023}"]),
  ("webinstruct", {"question": "q", "answer": "0.5DWL"}, "text", ["0.5DWL", "0.5 dwl"], ["0.5", "DWL"]),
  ("gsm8k", {"question": "q", "answer": "#### 1,004"}, "number", ["$1 004", "1004 dollars"], ["1", "4"]),
  ("bbh", {"input": "Close: [ < { {", "target": "> } } ]"}, "text", ["> } } ]", ">}}]"], [">", "> } ]"]),
]


@pytest.mark.parametrize(("name", "row", "grader", "right", "wrong"), HARD)
def test_hard_rows(tmp_path, name, row, grader, right, wrong):
  (question,), _ = load(name, write(tmp_path / "rows.jsonl", [row]))
  assert question.grader == grader
  assert [text for text in right if not graders.grade(question, f"<answer> {text} </answer>").right] == []
  assert [text for text in wrong if graders.grade(question, f"<answer> {text} </answer>").right] == []


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_other_kinds_of_files(tmp_path, suffix):
  rows = [{**MATH, "answer": str(i), "unique_id": f"id{i}"} for i in range(3)]
  questions, _ = load("math500", write(tmp_path / f"rows{suffix}", rows))
  assert [(q.id, q.reference, q.row) for q in questions] == [("id0", "0", 1), ("id1", "1", 2), ("id2", "2", 3)]


def test_lists_in_parquet(tmp_path):
  row = {"question_id": 9, "question": "q", "options": OPTIONS, "answer": "C"}
  (question,), _ = load("mmlu_pro", write(tmp_path / "rows.parquet", [row]))
  assert question.options == tuple(OPTIONS)


def test_pictures_are_dropped_and_counted(tmp_path):
  row = {**THEOREM, "Answer": 4, "Answer_type": "integer"}
  rows = [{**row, "id": "a", "Picture": "images/a.png"}, {**row, "id": "b"}, {**row, "id": "c", "Picture": "c.png"}]
  (question,), dropped = load("theoremqa", write(tmp_path / "rows.json", rows))
  assert question.row == 2
  assert dropped == {"picture": 2}
  fails("expected at least one question, found none (picture)", "theoremqa", write(tmp_path / "rows.json", rows[:1]))


def test_gpqa_options_are_shuffled_by_the_record_alone(tmp_path):
  rows = [{**GPQA, "Record ID": f"rec{i}"} for i in range(40)]
  questions, _ = load("gpqa_diamond", write(tmp_path / "rows.jsonl", rows))
  backwards, _ = load("gpqa_diamond", write(tmp_path / "rows.jsonl", rows[::-1]))
  assert {q.id: q.options for q in questions} == {q.id: q.options for q in backwards}
  assert all(q.options[ord(q.reference) - ord("A")] == "cork" for q in questions)
  assert {q.reference for q in questions} == set("ABCD")


def test_split(tmp_path):
  rows = [{"prompt": f"q{i}", "reference": "gold", "split": split} for i, split in enumerate(["train", "validation"])]
  path = write(tmp_path / "rows.csv", rows)
  assert [q.prompt for q in load("webinstruct", path)[0]] == ["q1"]
  assert [q.prompt for q in load("webinstruct", path, split="train")[0]] == ["q0"]
  assert [q.prompt for q in load("own", path)[0]] == ["q0", "q1"]
  assert [q.prompt for q in load("own", path, split="train")[0]] == ["q0"]
  fails("expected at least one question, found none", "webinstruct", path, split="test")


def test_limit(tmp_path):
  rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(50)]
  path = write(tmp_path / "rows.jsonl", rows)
  everything, _ = load("gsm8k", path)
  some, _ = load("gsm8k", path, limit=10)
  assert len(everything) == 50
  assert len(some) == 10
  assert [q.row for q in some] == sorted(q.row for q in some)
  assert some == load("gsm8k", path, limit=10)[0] != load("gsm8k", path, limit=10, seed=1)[0]
  assert load("gsm8k", path, limit=80)[0] == everything
  fails("limit -1", "gsm8k", path, limit=-1)


# reference, question, grader
OWN = [
  ("12", "q", "number"),
  ("$1,200.50", "q", "number"),
  ("13.02%", "q", "number"),
  ("7 cars", "q", "number"),
  ("3/8 of one surfboard", "q", "number"),
  ("0.80 pounds per dollar", "q", "number"),
  ("2014!", "q", "math"),
  ("\\frac{\\pi}{2}", "q", "number"),
  ("Q = 118 - 5p", "q", "math"),
  ("(20, 20)", "q", "math"),
  ("\\sqrt{x}", "q", "math"),
  ("New York", "q", "text"),
  ("True", "q", "text"),
  ("(ii) 2.5", "q", "text"),
  ("increase by 5 units", "q", "text"),
  ("B", "q", "multiple_choice"),
  ("b", "Pick.\nA. up\nB. down", "multiple_choice"),
  ("(A) up", "Pick.\nA. up\nB. down", "multiple_choice"),
  ("down", "Pick.\nA. up\nB. down", "multiple_choice"),
  ("(A) down", "Pick.\nA. up\nB. down", "text"),  # says two things
  ("(E) none of these", "Pick.\nA. up\nB. down", "text"),
]


def test_own_questions(tmp_path):
  rows = [{"question": question, "answer": reference, "category": "mine"} for reference, question, _ in OWN]
  questions, dropped = load("own", write(tmp_path / "mine.jsonl", rows))
  assert [(row[0], q.grader) for row, q in zip(OWN, questions, strict=True)] == [(row[0], row[2]) for row in OWN]
  assert dropped == {}
  assert questions[0] == Question("mine/1", "q", "12", "mine", "number", (), 1)
  for (reference, _, _), question in zip(OWN, questions, strict=True):
    assert graders.grade(question, f"<answer> {reference} </answer>").right


def test_own_questions_with_several_answers(tmp_path):
  """Each is graded as what it is; a response is right by any of them."""
  rows = [{"question": "Half of one?", "answer": ["1/2", "one half", "(A) 0.50"]}, {"question": "q", "answer": ["7"]}]
  (half, seven), _ = load("own", write(tmp_path / "mine.jsonl", rows))
  assert [form.grader for form in half.forms] == ["number", "text", "text"]
  assert (half.gold, seven.gold, seven.alternatives) == ("1/2 or one half or (A) 0.50", "7", ())
  for answer, why in (("0.5", "equal number"), ("One half.", "same text"), ("(A)", "same letter")):
    grade = graders.grade(half, f"<answer> {answer} </answer>")
    assert (grade.right, grade.why) == (True, why)
  assert graders.grade(half, "<answer> 2 </answer>") == graders.grade(half.alternatives[1], "<answer> 2 </answer>")
  assert not graders.grade(half, "<answer> 2 </answer>").right


def test_own_chat_messages(tmp_path):
  prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "six times seven?"}]
  rows = [{"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": "42"}}]
  (question,), _ = load("own", write(tmp_path / "mine.parquet", rows))
  assert question.prompt == "six times seven?"
  assert question.grader == "number"


MALFORMED = [
  ("math500", {**MATH, "answer": None}, "row 2, column answer: expected non-empty text, found None"),
  ("math500", {"solution": "s", "answer": "2"}, "row 2, column problem: expected non-empty text"),
  ("math500", {**MATH, "answer": ["2"]}, "row 2, column answer: expected non-empty text, found ['2']"),
  ("math500", {**MATH, "problem": "a\ud800"}, "row 2, column problem: expected text, found a lone surrogate"),
  ("aime24", {"problem": "p", "answer": "ten"}, "row 2, column answer: expected an integer from 0 to 999"),
  *(
    ("aime24", {"problem": "p", "answer": answer}, "row 2, column answer: expected an integer from 0 to 999, found")
    for answer in ("1000", "12345678901234567890", -1, 2.5)
  ),
  ("mmlu_pro", {"question": "q", "options": "iron", "answer": "A"}, "row 2, column options: expected a list of texts"),
  ("mmlu_pro", {"question": "q", "options": ["a", "b"], "answer": "C"}, "column answer: expected one of A, B, found"),
  ("gpqa_diamond", {**GPQA, "Incorrect Answer 2": ""}, "row 2, column Incorrect Answer 2: expected non-empty"),
  ("theoremqa", {**THEOREM, "Answer": 1, "Answer_type": "set"}, "column Answer_type: expected one of integer, float"),
  ("theoremqa", {**THEOREM, "Answer": "x", "Answer_type": "float"}, "row 2, column Answer: expected float, found 'x'"),
  ("theoremqa", {**THEOREM, "Answer": "2^{2024}", "Answer_type": "integer"}, "column Answer: expected integer, found"),
  ("gsm8k", {"question": "q", "answer": f"#### {'9' * 400}"}, "row 2, column answer: expected a number after ####"),
  ("theoremqa", {**THEOREM, "Answer": "[1, 2^{2024}]", "Answer_type": "list of integer"}, "expected list of integer"),
  ("theoremqa", {**THEOREM, "Answer": "maybe", "Answer_type": "bool"}, "expected bool, found 'maybe'"),
  ("theoremqa", {**THEOREM, "Answer": "all", "Answer_type": "option"}, "expected option, found 'all'"),
  ("theoremqa", {**THEOREM, "Answer": ["x"], "Answer_type": "list of float"}, "expected list of float"),
  ("minerva", {"problem": "p", "solution": "It is 4."}, "row 2, column solution: expected a \\boxed{} answer"),
  ("gsm8k", {"question": "q", "answer": "4"}, "row 2, column answer: expected a number after ####, found '4'"),
  ("gsm8k", {"question": "q", "answer": "#### four"}, "row 2, column answer: expected a number after ####"),
  ("olympiadbench", {**OLYMPIAD, "final_answer": "3"}, "row 2, column final_answer: expected a list of texts"),
  ("olympiadbench", {**OLYMPIAD, "final_answer": ["3"], "error": "bit"}, "row 2, column error: expected a number or"),
  ("webinstruct", {"question": "q", "answer": " "}, "row 2, column answer: expected non-empty text"),
  ("bbh", {"input": "q"}, "row 2, column target: expected non-empty text"),
]


@pytest.mark.parametrize(("name", "row", "part"), MALFORMED)
def test_malformed_rows(tmp_path, name, row, part):
  good = {**next(row for other, row, _ in ROWS if other == name)}
  good |= {key: "other" for key in ("id", "Record ID") if key in good}
  path = write(tmp_path / "rows.jsonl", [good, row])
  fails(f"{path}: ", name, path)
  fails(part, name, path)


def test_ids_are_unique(tmp_path):
  row = {**MATH, "unique_id": "same"}
  fails(
    "row 2: expected an id of its own, found that of row 1: same",
    "math500",
    write(tmp_path / "a.jsonl", [row, row]),
  )


def test_what_cannot_be_loaded(tmp_path):
  fails("benchmark 'mmlu': expected one of math500, aime24", "mmlu")
  fails("benchmark own: expected a file", "own")
  fails("expected a file, found none", "math500", str(tmp_path / "none.jsonl"))
  (tmp_path / "a.json").write_text("{")
  fails("a.json: expected JSON", "theoremqa", str(tmp_path / "a.json"))
  (tmp_path / "a.json").write_text("{}")
  fails("a.json: expected a JSON list of objects", "theoremqa", str(tmp_path / "a.json"))
  (tmp_path / "a.json").write_text("[1]")
  fails("a.json: row 1: expected a JSON object, found 1", "theoremqa", str(tmp_path / "a.json"))
  (tmp_path / "a.jsonl").write_text("")
  fails("expected at least one question, found none (there are no rows)", "theoremqa", str(tmp_path / "a.jsonl"))


# Dataset, configuration and split on the hub.
HUB = {
  "math500": ("HuggingFaceH4/MATH-500", None, "test"),
  "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
  "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None, "test"),
  "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
  "theoremqa": ("TIGER-Lab/TheoremQA", None, "test"),
  "minerva": ("math-ai/minervamath", None, "test"),
  "webinstruct": ("TIGER-Lab/WebInstruct-verified", None, "validation"),
  "gsm8k": ("openai/gsm8k", "main", "test"),
  "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
  "bbh": ("lukaemon/bbh", "boolean_expressions", "test"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub(monkeypatch, tmp_path, name):
  """Which rows are asked for, and that they become the questions that they become from a file."""
  asked = []
  row = next(row for other, row, _ in ROWS if other == name)

  def load_dataset(path, name, split):
    asked.append((path, name, split))
    return datasets.Dataset.from_list([row])

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  assert load(name) == load(name, write(tmp_path / "rows.jsonl", [row]))
  load(name, split="other", subset="mine")
  assert asked == [HUB[name], (HUB[name][0], "mine", "other")]


def test_pictures_from_the_hub(monkeypatch):
  def load_dataset(*_, **__):
    table = datasets.Dataset.from_list([{**GPQA, "Picture": {"bytes": b"no image", "path": None}}])
    return table.cast_column("Picture", datasets.Image())

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  (question,), _ = load("gpqa_diamond")
  assert question.id == "rec1"


def test_the_hub_out_of_reach(monkeypatch):
  def load_dataset(*_, **__):
    raise ConnectionError("no\nnetwork")

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  fails("dataset HuggingFaceH4/MATH-500: cannot be loaded from the hub", "math500", kind=MachineError)
  fails("a local file of its rows given as path: ConnectionError: no network", "math500", kind=MachineError)


def measured(directory):
  """What the tool that measures the graders prints."""
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, root / "tools" / "grade_benchmarks.py", f"--data={directory}"],
    env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]


def test_the_tool_that_measures_the_graders(tmp_path):
  """On made-up files: a table with a row for each benchmark, every gold answer right and every other one wrong."""
  write(tmp_path / "gsm8k_sample.jsonl", [{"question": "q", "answer": f"#### {i}{i + 1}"} for i in range(20)])
  rows = [{"question_id": i, "question": "q", "options": OPTIONS, "answer": "ABCDEFGHIJ"[i]} for i in range(10)]
  write(tmp_path / "mmlu_pro.json", rows)
  write(tmp_path / "notes.csv", [{"a": "b"}])
  table = measured(tmp_path)
  assert [row[0] for row in table] == ["benchmark", "---", "gsm8k", "mmlu_pro"]
  assert [row[1] for row in table[2:]] == ["20", "10"]
  assert all(int(row[3]) >= 5 and row[5] == "100.00%" and row[7] == "0.00%" for row in table[2:])


def test_the_tool_knows_tolerances_and_labels_without_options(tmp_path):
  """What another row says is not wrong within the tolerance; a label may be none of the options that were read."""
  kinds = [(1.0, "float"), (1.02, "float"), ("[1, 2]", "list of float"), ("[1.01, 2]", "list of float")]
  rows = [{**THEOREM, "id": str(i), "Answer": str(gold), "Answer_type": kind} for i, (gold, kind) in enumerate(kinds)]
  listed = {**THEOREM, "Question": "Which? (a) one. (b) two.", "Answer_type": "option"}
  rows += [{**listed, "id": "d", "Answer": "(d)"}, {**listed, "id": "a", "Answer": "(a)"}]
  write(tmp_path / "theoremqa.json", rows)
  row = measured(tmp_path)[2]
  assert (row[0], row[1], row[5], row[7]) == ("theoremqa", "6", "100.00%", "0.00%")
