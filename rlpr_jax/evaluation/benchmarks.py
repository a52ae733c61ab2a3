r"""Benchmarks: which there are, and how the rows of each become questions.

RLPR (https://arxiv.org/abs/2506.18254) evaluates on seven; the k of its Avg@k is `Benchmark.samples`. Rows come from
the Hugging Face hub, or from a local file in the same columns.
"""

import math
import random
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlpr_jax.data import sources, tables
from rlpr_jax.errors import InputError, MachineError, is_of_network
from rlpr_jax.grading import extraction, multiple_choice, numbers
from rlpr_jax.grading.inference import as_question, infer, is_number
from rlpr_jax.grading.question import Question


class Row(NamedTuple):
  """A data row and where it stands, for messages."""

  values: dict[str, Any]
  file: str
  number: int  # 1-based

  def where(self, column: str) -> str:
    return f"{self.file}: row {self.number}, column {column}"

  def text(self, *columns: str) -> str:
    """The text of the first of these columns that the row has, stripped; a number as it is written."""
    column = next((name for name in columns if self.values.get(name) is not None), columns[0])
    value = self.values.get(column)
    value = str(value) if isinstance(value, int | float) else value
    if not isinstance(value, str) or not value.strip():
      raise InputError(f"{self.where(column)}: expected non-empty text, found {reprlib.repr(value)}")
    return self._stripped(column, value)

  def optional(self, *columns: str) -> str:
    """The text, or "" where no column has one."""
    found = ((name, str(value)) for name in columns if (value := self.values.get(name)) is not None)
    return next((self._stripped(name, text) for name, text in found), "")

  def key(self, *columns: str) -> str:
    """The row's own id, or its number."""
    return self.optional(*columns) or str(self.number)

  def texts(self, column: str) -> tuple[str, ...]:
    """A list of texts, not empty."""
    value = self.values.get(column)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
      raise InputError(f"{self.where(column)}: expected a list of texts, found {reprlib.repr(value)}")
    return tuple(self._stripped(column, v) for v in value)

  def _stripped(self, column: str, text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):  # JSON can spell half a pair, which nothing takes
      raise InputError(f"{self.where(column)}: expected text, found a lone surrogate")
    return text.strip()


@dataclass(frozen=True)
class Benchmark:
  """A benchmark, where its rows are, and how they are read."""

  name: str
  hub: str  # dataset on the hub
  subset: str  # configuration of it, "" for the only one
  split: str
  samples: int  # responses to each question, of which the accuracy is the mean
  free_form: bool  # whether the paper also asks a model to judge
  to_question: Callable[[Row], Question | str]  # a text says why a row is left out


def load(
  name: str, path: str = "", split: str = "", limit: int = 0, seed: int = 0, subset: str = ""
) -> tuple[list[Question], dict[str, int]]:
  """Reads the questions of a benchmark, in the order of their rows.

  Args:
    name: one of BENCHMARKS, or `own` for a file of one's own in a layout of `sources.load_examples`.
    path: a .jsonl, .json (a list of objects), .csv or .parquet file; "" for the hub.
    split: instead of the benchmark's own. In a file it tells rows apart only where there is a column `split`.
    limit: how many questions are kept, drawn with `seed`; 0 for all.
    subset: the hub's configuration instead of the benchmark's own, such as a task of BIG-Bench Hard.

  Returns:
    the questions, and how many rows were left out for which reason.

  Raises:
    InputError: the benchmark is unknown, its rows cannot be had, or one is not as expected.
  """
  if limit < 0:
    raise InputError(f"limit {limit}: expected 0 for all questions, or how many")
  dropped: Counter[str] = Counter()
  if name == "own":
    if not path:
      raise InputError("benchmark own: expected a file, found none")
    questions = [_own(example, path) for example in sources.load_examples(path, split or None)]
  elif name in BENCHMARKS:
    questions = []
    for row in _rows(BENCHMARKS[name], path, split, subset):
      question = BENCHMARKS[name].to_question(row)
      if isinstance(question, str):
        dropped[question] += 1
      else:
        questions.append(question)
    _check_ids(questions, path or BENCHMARKS[name].hub)
  else:
    raise InputError(f"benchmark {name!r}: expected one of {', '.join(BENCHMARKS)}, own")
  if not questions:
    reasons = ", ".join(dropped) or "there are no rows"
    raise InputError(f"{path or BENCHMARKS[name].hub}: expected at least one question, found none ({reasons})")
  if 0 < limit < len(questions):
    kept = sorted(random.Random(seed).sample(range(len(questions)), limit))
    questions = [questions[i] for i in kept]
  return questions, dict(dropped)


def _rows(benchmark: Benchmark, path: str, split: str, subset: str) -> list[Row]:
  if path:
    columns, rows = tables.read_rows(Path(path))
    if sources.SPLIT in columns:
      rows = [(number, row) for number, row in rows if row.get(sources.SPLIT) == (split or benchmark.split)]
    return [Row(values, path, number) for number, values in rows]
  import datasets  # takes two seconds, pandas with it

  try:
    table = datasets.load_dataset(benchmark.hub, subset or benchmark.subset or None, split=split or benchmark.split)
  except Exception as error:  # the hub's client raises whatever its libraries do, and many kinds of its own
    reason = " ".join(str(error).split())[:200]
    kind = MachineError if is_of_network(error) else InputError
    raise kind(
      f"dataset {benchmark.hub}: cannot be loaded from the hub, expected that, or a local file of its rows given as"
      f" path: {type(error).__name__}: {reason}"
    ) from None
  return [Row(values, benchmark.hub, number) for number, values in enumerate(tables.plain_rows(table), 1)]


def _check_ids(questions: list[Question], file: str) -> None:
  seen: dict[str, int] = {}
  for question in questions:
    if question.id in seen:
      raise InputError(
        f"{file}: row {question.row}: expected an id of its own, found that of row {seen[question.id]}: {question.id}"
      )
    seen[question.id] = question.row


# ---- rows of each benchmark ----


def _math500(row: Row) -> Question:
  return Question(
    id=row.key("unique_id"),
    prompt=row.text("problem"),
    reference=row.text("answer"),
    category=row.optional("subject"),
    grader="math",
    row=row.number,
  )


def _aime(row: Row) -> Question:
  answer = row.text("answer")
  if not answer.isdecimal() or len(answer.lstrip("0")) > 3:
    raise InputError(f"{row.where('answer')}: expected an integer from 0 to 999, found {reprlib.repr(answer)}")
  # "025" on the answer sheet is 25.
  return Question(
    row.key("id"), row.text("problem", "question"), str(int(answer)), "AIME 2024", grader="number", row=row.number
  )


def _mmlu_pro(row: Row) -> Question:
  options, answer = row.texts("options"), row.text("answer")
  letters = [multiple_choice.letter(i) for i in range(len(options))]
  if answer not in letters:
    raise InputError(f"{row.where('answer')}: expected one of {', '.join(letters)}, found {reprlib.repr(answer)}")
  category = row.optional("category")
  return _choice(row, row.key("question_id"), row.text("question"), options, answer=answer, category=category)


def _gpqa(row: Row) -> Question:
  """The right option comes first in the file, so options are shuffled, by the record's id alone."""
  key = row.text("Record ID")
  right = row.text("Correct Answer")
  options = [right, *(row.text(f"Incorrect Answer {i}") for i in (1, 2, 3))]
  random.Random(key).shuffle(options)
  category = row.optional("Subdomain", "High-level domain")
  answer = multiple_choice.letter(options.index(right))
  return _choice(row, key, row.text("Question"), tuple(options), answer=answer, category=category)


def _choice(row: Row, key: str, question: str, options: tuple[str, ...], answer: str, category: str) -> Question:
  lines = [question, *(f"{multiple_choice.letter(i)}. {option}" for i, option in enumerate(options))]
  return Question(key, "\n".join(lines), answer, category, grader="multiple_choice", options=options, row=row.number)


# TheoremQA's own rules (https://github.com/TIGER-AI-Lab/TheoremQA, utils.py): a number that should be an integer is
# rounded, others may be off by 4% of the reference; lists are compared item by item once both are sorted.
_THEOREMQA = {
  "integer": ("number", 0.0, True),
  "float": ("number", 0.04, False),
  "list of integer": ("number", 0.0, True),
  "list of float": ("number", 0.04, False),
  "bool": ("number", 0.0, False),
  "option": ("multiple_choice", 0.0, False),
}


def _theoremqa(row: Row) -> Question | str:
  if row.values.get("Picture"):
    return "picture"
  kind = row.text("Answer_type")
  if kind not in _THEOREMQA:
    raise InputError(f"{row.where('Answer_type')}: expected one of {', '.join(_THEOREMQA)}, found {reprlib.repr(kind)}")
  grader, rtol, rounded = _THEOREMQA[kind]
  question, options = row.text("Question"), ()
  answer = row.values.get("Answer")
  answer = str(answer) if isinstance(answer, list) else row.text("Answer")
  where = f"{row.where('Answer')}: expected {kind}, found {reprlib.repr(answer)}"
  if kind == "option":
    if (label := multiple_choice.label_of(answer, {})) is None:
      raise InputError(where)
    options, answer = tuple(multiple_choice.options_of(question).values()), label
  elif kind == "bool":
    if answer not in ("True", "False"):
      raise InputError(where)
  elif not (_are_finite(answer) if kind.startswith("list") else _is_finite(answer)):
    raise InputError(where)
  category = row.optional("field", "subfield")
  return Question(
    row.key("id"),
    question,
    answer,
    category,
    grader=grader,
    options=options,
    row=row.number,
    rtol=rtol,
    rounded=rounded,
  )


# Minerva's numbers are rounded to the digits that a problem asks for. Its own check of OCWCourses has a threshold of 1%
# (https://arxiv.org/abs/2206.14858, appendix on the evaluation).
_MINERVA_RTOL = 0.01


def _minerva(row: Row) -> Question:
  if row.values.get("solution") is None:
    column, reference = "answer", row.text("answer")
  else:
    column, reference = "solution", extraction.boxed(row.text("solution"))
  if not reference:
    raise InputError(f"{row.where(column)}: expected a \\boxed{{}} answer, found none")
  grader = "number" if is_number(reference, letters=False) else "math"  # units stand outside the box
  question = row.text("problem", "question")
  return Question(
    row.key("idx"), question, reference, row.optional("type"), grader=grader, row=row.number,
    rtol=_MINERVA_RTOL if grader == "number" else 0.0,
  )  # fmt: skip


def _webinstruct(row: Row) -> Question:
  question, reference = row.text("question", "prompt"), row.text("answer", "reference")
  grader, reference, options = infer(question, reference)
  if row.optional("answer_type") == "String" and grader != "multiple_choice":
    grader = "text"
  category = row.optional("category")
  return Question(row.key("id"), question, reference, category, grader=grader, options=options, row=row.number)


def _gsm8k(row: Row) -> Question:
  answer = row.text("answer")
  _, mark, reference = answer.rpartition("####")
  if not mark or not _is_finite(reference):
    raise InputError(f"{row.where('answer')}: expected a number after ####, found {reprlib.repr(answer)}")
  return Question(row.key("id"), row.text("question"), reference.strip(), category="", grader="number", row=row.number)


def _olympiadbench(row: Row) -> Question:
  reference = ", ".join(answer.strip("$ ") for answer in row.texts("final_answer"))
  error = row.optional("error")
  # Its own judge allows 1e-8, or the row's `error`, which is absolute (https://github.com/OpenBMB/OlympiadBench).
  tolerance = numbers.parse(error)
  if error and tolerance is None:
    raise InputError(f"{row.where('error')}: expected a number or nothing, found {reprlib.repr(error)}")
  grader = "number" if is_number(reference, letters=False) else "math"
  return Question(
    row.key("id"), row.text("question"), reference, row.optional("subfield"), grader=grader, row=row.number,
    atol=tolerance.value if tolerance and grader == "number" else 0.0,
  )  # fmt: skip


def _bbh(row: Row) -> Question:
  question = row.text("input")
  grader, reference, options = infer(question, row.text("target"))
  return Question(row.key("id"), question, reference, "", grader=grader, options=options, row=row.number)


def _own(example: sources.Example, path: str) -> Question:
  question = [message["content"] for message in example.messages if message["role"] == "user"][-1]
  references = (example.reference, *example.other_references)
  return as_question(f"{Path(path).stem}/{example.row}", question, references, category=example.source, row=example.row)


# ---- numbers ----


def _is_finite(reference: str) -> bool:
  number = numbers.parse(reference)
  return number is not None and math.isfinite(number.value)


def _are_finite(reference: str) -> bool:
  values = numbers.parse_list(reference)
  return values is not None and all(map(math.isfinite, values))


# k and the questions are the paper's. It takes 1000 questions of MMLU-Pro at random: `limit`.
# It does not use the last three; their k is ours.
BENCHMARKS: dict[str, Benchmark] = {
  benchmark.name: benchmark
  for benchmark in (
    Benchmark("math500", "HuggingFaceH4/MATH-500", "", "test", 2, False, _math500),
    Benchmark("aime24", "HuggingFaceH4/aime_2024", "", "train", 16, False, _aime),
    Benchmark("mmlu_pro", "TIGER-Lab/MMLU-Pro", "", "test", 2, False, _mmlu_pro),
    Benchmark("gpqa_diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", 4, False, _gpqa),
    Benchmark("theoremqa", "TIGER-Lab/TheoremQA", "", "test", 2, True, _theoremqa),
    Benchmark("minerva", "math-ai/minervamath", "", "test", 4, True, _minerva),
    Benchmark("webinstruct", "TIGER-Lab/WebInstruct-verified", "", "validation", 2, True, _webinstruct),
    Benchmark("gsm8k", "openai/gsm8k", "main", "test", 1, False, _gsm8k),
    Benchmark("olympiadbench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 2, False, _olympiadbench),
    Benchmark("bbh", "lukaemon/bbh", "boolean_expressions", "test", 1, False, _bbh),
  )
}
