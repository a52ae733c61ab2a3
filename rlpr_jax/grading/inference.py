"""What a question is graded by, where no more is known of it than its text and its reference answers."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from rlpr_jax.grading import multiple_choice, numbers
from rlpr_jax.grading.question import Question

_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL = re.compile(r"[\d=+*/^<>≤≥()\[\]]")
_ENUMERATION = re.compile(r"[-+\d.,/%\s]+(?:\band\b[-+\d.,/%\s]+)?")  # 6 and 8; 1, 2, 3
_FUNCTION = re.compile(r"\b(?:sin|cos|tan|log|ln|exp|sqrt|min|max|pi)\b")


def as_question(
  key: str, prompt: str, references: Sequence[str], grader: str = "inferred", category: str = "", row: int = 0
) -> Question:
  """A question with one or several reference answers, any of which is right.

  Args:
    grader: `inferred`: of each reference what `infer` finds; `multiple_choice`: of a reference that names no option,
      its text; `math` or `number`.

  >>> as_question("1", "How many students?", ["814 students"]).grader
  'number'
  """

  def form(reference: str) -> Question:
    kind, gold, options = _form(grader, prompt, reference)
    return Question(key, prompt, gold, category, grader=kind, options=options, row=row)

  first, *others = map(form, references)
  return replace(first, alternatives=tuple(others))


def infer(question: str, reference: str) -> tuple[str, str, tuple[str, ...]]:
  """Grader, reference and options of a question that says no more than its text.

  >>> infer("Capital of France? A. Rome B. Paris", "Paris")
  ('multiple_choice', 'B', ('Rome', 'Paris'))
  """
  options = multiple_choice.options_of(question)
  labelled = multiple_choice.split_label(reference)
  label = multiple_choice.label_of(reference, options)
  # Where the text that a reference gives is another option's or none's, the options were not read as they were meant.
  meant = labelled is None or multiple_choice.bare(labelled[1]) == multiple_choice.bare(options.get(label or "", ""))
  if label in options and meant:
    return "multiple_choice", label, tuple(options.values())
  if len(reference) == 1 and "A" <= reference.upper() <= "J":
    return "multiple_choice", reference.upper(), ()
  prose = _FUNCTION.sub("", _COMMAND.sub("", reference))
  if labelled is None and any(c.isalnum() for c in reference) and len(reference) <= numbers.LIMIT:
    if numbers.is_span(reference):
      return "text", reference, ()
    if "=" not in reference and (is_number(reference, letters=True) or numbers.spelled(reference)):
      return "number", reference, ()
    if _ENUMERATION.fullmatch(reference) and numbers.parse_list(reference):
      return "number", reference, ()
    if (_COMMAND.search(reference) or _MATHEMATICAL.search(reference)) and not _WORD.search(prose):
      return "math", reference, ()
  return "text", reference, ()


def is_number(reference: str, *, letters: bool) -> bool:
  """Whether a reference is a number that answers can be compared to.

  Args:
    letters: whether m after a number is metres rather than a variable.

  >>> is_number("5 m", letters=True), is_number("5 m", letters=False)
  (True, False)
  """
  number = numbers.parse(reference)
  if number is None or number.equation or not math.isfinite(number.value):
    return False
  return letters or number.unit is None or number.unit.certain


def _form(grader: str, question: str, reference: str) -> tuple[str, str, tuple[str, ...]]:
  if grader == "inferred":
    return infer(question, reference)
  if grader != "multiple_choice":
    return grader, reference, ()
  options = multiple_choice.options_of(question)
  label = multiple_choice.label_of(reference, options)
  return ("text", reference, ()) if label is None else (grader, label, tuple(options.values()))
