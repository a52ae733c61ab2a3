r"""Graders: whether an answer is right, told from texts alone.

`verify` judges the content of `<answer>`, for rewards by rule and the measuring of other rewards; RLPR itself needs
none. `grade` judges a response to a benchmark's question by that benchmark's rules, and says why. Whether an answer
names an option, or is an equal expression, is asked of the same functions by both. `is_right` judges a response to a
held-out question of a policy in training, by the one or the other.

No text makes them raise or hang: what cannot be understood is wrong.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import NamedTuple

from rlpr_jax import splicing
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.grading import equivalence, extraction, numbers
from rlpr_jax.grading.inference import as_question
from rlpr_jax.grading.multiple_choice import label_of, letter, options_of, split_label, unwrap
from rlpr_jax.grading.question import Question
from rlpr_jax.grading.texts import DASHES, compatible, hidden, plain, shown

VERIFIERS = ("exact", "multiple_choice", "math", "builtin")
HELD_OUT_VERIFIERS = ("exact", "multiple_choice", "math", "number", "inferred", "builtin")
ANSWER_LIMIT = 10_000  # characters of an answer that is more than compared; a longer one is wrong


def verify(kind: str, response_text: str, reference: str, question: str = "") -> bool:
  """Whether the content of a response's `<answer>` is right; a response without one is wrong.

  Args:
    kind: `exact`: the reference, but for case and runs of whitespace; `multiple_choice`: the same option; `math`: an
      equal expression or number; `builtin`: the same content for a built-in question with many wordings, else `exact`.
    question: text of the question, which lists the options, or is a built-in one.

  >>> verify("exact", "<think>6 * 7</think> <answer>42</answer>", "42"), verify("exact", "42", "42")
  (True, False)
  """
  if kind not in VERIFIERS:
    raise InputError(f"verifier {kind!r}: expected one of {', '.join(VERIFIERS)}")
  # The tags alone say what the answer is, as where the reference is spliced in: a reward that also took what stands
  # outside of them would teach to leave them out. `grade` must read models that never learnt them (`extraction`).
  answer = splicing.extract_answer(response_text)
  if answer is None:
    return False
  match kind:
    case "multiple_choice":
      return multiple_choice(answer, reference, question)
    case "math":
      # `grade` looks through what cannot be seen; a reward that did would leave a policy free to write it.
      readable = len(answer) <= ANSWER_LIMIT and hidden(answer) <= hidden(reference)
      return readable and bool(_judge_expression(answer, reference))
    case "builtin" if (right := builtin.grade(question, answer)) is not None:
      return right
  return exact(answer, reference)


def verify_any(kind: str, response_text: str, references: Iterable[str], question: str = "") -> bool:
  """`verify` of several references, any of which is right.

  >>> verify_any("exact", "<answer>Peking</answer>", ("Beijing", "Peking"))
  True
  """
  return any(verify(kind, response_text, reference, question) for reference in references)


def exact(answer: str, reference: str) -> bool:
  """Whether two texts are the same but for case and runs of whitespace.

  >>> exact("New  york", "New York"), exact("the Rome", "Rome")
  (True, False)
  """
  # On purpose stricter than `grade` of a text (`_same_text`): articles, punctuation and markup that a reward does not
  # see are what a policy would learn to add.
  return plain(answer) == plain(reference)


def multiple_choice(answer: str, reference: str, question: str = "") -> bool:
  """Whether an answer names the option that the reference names.

  Both may be a letter ("B", "(B)", "B.", "B. Paris", "the answer is B", "\\boxed{B}") or the text of an option that the
  question lists ("A. Rome B. Paris", in one line or many). An answer that names several options is wrong. A reference
  that names none is compared as by `exact`.

  >>> multiple_choice("(B)", "Paris", "Capital of France? A. Rome B. Paris")
  True
  """
  options = options_of(question)
  label = label_of(reference, options)
  if label is None:
    return exact(answer, reference)
  return len(answer) <= ANSWER_LIMIT and bool(_judge_choice(answer, label, options))


def math(answer: str, reference: str) -> bool:
  r"""Whether two mathematical expressions are equal, in LaTeX or plain text.

  Raises:
    InputError: math-verify is not installed.

  >>> math("\\frac{1}{2}", "0.5"), math("x + 1", "x - 1")
  (True, False)
  """
  return exact(answer, reference) or bool(_judge_expression(answer, reference))


# --- benchmarks ---


class Grade(NamedTuple):
  """A grader's verdict on a response."""

  right: bool
  answer: str | None  # what was graded; None where the response gives none
  path: str  # how the answer was found, see `extraction.Extracted`
  why: str  # "same letter", "equal expression", "within 4%", "differs", ...


def grade(question: Question, text: str) -> Grade:
  """Whether a response answers a question right, by any of its gold answers.

  Raises:
    InputError: the question's grader is unknown, or it is mathematics and math-verify is not installed.

  >>> question = Question(id="1", prompt="6 * 7?", reference="42", category="", grader="number")
  >>> grade(question, "<answer>42.0</answer>")
  Grade(right=True, answer='42.0', path='answer_tag', why='equal number')
  """
  grades = (_grade_form(form, text) for form in question.forms)
  first = next(grades)
  return first if first.right else next((grade for grade in grades if grade.right), first)


def is_right(kind: str, text: str, references: Sequence[str], question: str = "") -> bool:
  """Whether a response to a held-out question is right, by any of its references.

  Args:
    kind: `exact` and `builtin` judge the content of `<answer>` as `verify` does; `multiple_choice`, `math`, `number`
      and `inferred` (by what each reference is) judge as `grade` does, so as an evaluation of the same rows would.
    question: text of the question, which lists the options, or is a built-in one.

  Raises:
    InputError: it is mathematics and math-verify is not installed.

  >>> text = "<think></think><answer> 814 </answer>"
  >>> is_right("number", text, ["814 students"]), is_right("exact", text, ["814 students"])
  (True, False)
  """
  if kind in ("exact", "builtin"):
    return verify_any(kind, text, references, question)
  return grade(as_question("", question, references, kind), text).right


def _grade_form(question: Question, text: str) -> Grade:
  graders = {"multiple_choice": _grade_choice, "math": _grade_math, "number": _grade_number, "text": _grade_text}
  if question.grader not in graders:
    raise InputError(f"question {question.id}: expected a grader {' or '.join(graders)}, found {question.grader!r}")
  options = {letter(i): option for i, option in enumerate(question.options)}
  answer, path = extraction.extract(text, question.grader, options)
  if not answer:
    return Grade(False, None, path, "no answer")
  if len(answer) > ANSWER_LIMIT:
    return Grade(False, answer, path, "too long")
  why = graders[question.grader](answer, question)
  return Grade(bool(why), answer, path, why or "differs")


# Each of these four says why an answer is right, or "" where it is not.


def _grade_choice(answer: str, question: Question) -> str:
  return _judge_choice(answer, question.reference, {letter(i): option for i, option in enumerate(question.options)})


def _judge_choice(answer: str, reference: str, options: dict[str, str]) -> str:
  """Why an answer names the option whose letter is the reference, or "" where it does not."""
  label = label_of(answer, options)
  if label is None:  # the mark may be within the text: **B.** Paris
    label = label_of(answer.replace("**", "").replace("__", "").translate(DASHES), options)
  same = [key for key, option in options.items() if _same_text(answer, option)]
  if label is None and len(same) == 1 and not split_label(answer):  # which would name another option by its letter
    label = same[0]
  if label != reference:
    return ""
  return f"text of option {label}" if label in same and len(unwrap(answer)) > len("(A).") else "same letter"


def _grade_text(answer: str, question: Question) -> str:
  core = _core(answer, "text")
  return _judge_text(answer, question.reference) or (_judge_text(core, question.reference) if core != answer else "")


def _judge_text(answer: str, reference: str) -> str:
  if _differ_in_currency(answer, reference):
    return ""
  if _same_text(answer, reference):
    return "same text"
  labelled, given = split_label(reference), split_label(answer)
  if labelled:  # "(B) Paris": the label alone, the text alone, or both
    label, reference = labelled
    bare = unwrap(answer).rstrip(".").lower()
    if bare == f"({label})".lower() or (label.isalpha() and bare == label.lower()):
      return "same letter"
    if given and given[0].lower() == label.lower():
      answer = given[1]
    if _same_text(answer, reference):
      return "same text"
  if plain(reference) in _TRUTH:  # "Yes, because ..."
    first = re.match(r"\W*([A-Za-z]+)(?=[,.;:!]|\s*$)", answer)
    if first and first[1].lower() == plain(reference):
      return "same text"
  if numbers.is_span(answer) or numbers.is_span(reference):  # 10-20 is not -10
    return ""
  ours, theirs = _number(answer), _number(reference)
  return "equal number" if ours and theirs and numbers.same(ours, theirs) else ""


def _number(text: str) -> numbers.Number | None:
  return numbers.parse(text) or numbers.spelled(text)


def _differ_in_currency(answer: str, reference: str) -> bool:
  ours, theirs = numbers.currencies(answer), numbers.currencies(reference)
  return bool(ours and theirs) and ours != theirs


def _grade_number(answer: str, question: Question) -> str:
  if question.reference in ("True", "False"):
    core = _core(answer, "number").lower()[:200]
    if (leading := _LEADING_TRUTH.match(core)) and leading[1] in _TRUTH:
      return "same truth" if _TRUTH[leading[1]] == (question.reference == "True") else ""
    words = re.findall(r"[a-z]+", core)
    said = {_TRUTH[word] for word in words if word in _TRUTH}
    return "same truth" if said == {question.reference == "True"} and "not" not in words else ""
  core = _core(answer, "number")
  if _differ_in_currency(core, question.reference):
    return ""
  theirs = _number(question.reference)
  items = numbers.parse_list(question.reference) if theirs is None else numbers.grouped_list(question.reference)
  values = numbers.parse_list(core) if items else None
  if items and values and len(values) == len(items):
    pairs = zip(sorted(values), sorted(items), strict=True)
    if all(_is_near(value, item, question) for value, item in pairs):
      return _tolerance(question, "equal items")
  if theirs is None:
    return ""
  reason = _REASON.search(core)
  claim = core[: reason.start()] if reason and _number(core[: reason.start()]) else core  # "5, since x = 4" is 5
  ours = _number(claim) or numbers.lone(claim)
  if ours is None or not _same_number(ours, theirs, question):
    return ""
  return "equal number" if _same_number(ours, theirs) else _tolerance(question, "equal number")


def _grade_math(answer: str, question: Question) -> str:
  return _judge_expression(answer, question.reference)


def _judge_expression(answer: str, reference: str) -> str:
  """Why two are equal, as text, as numbers or as mathematics, or "" where they are not."""
  if unicodedata.normalize("NFC", answer).split() == unicodedata.normalize("NFC", reference).split() != []:
    return "same expression"  # of any length
  return equivalence.equal(_core(shown(answer), "math"), reference)


_REASON = re.compile(r"[,;.(]{0,2} ?\b(?:because|since|as|which|where|due to)\b", re.IGNORECASE)
_TRUTH = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}
# "False, because it is not true", but not "True, or false".
_LEADING_TRUTH = re.compile(
  r"\W*([a-z]+)(?:[,.;:!]|(?= (?:because|since|as)\b))(?!\W*(?:or|true|yes|correct|false|no|incorrect)\b)(?=\W*[a-z])"
)
# "So, the final answer is" where an answer begins.
_LEAD = re.compile(r"\W{0,4}(?:\w{1,9},? ){0,4}answer(?: is|:)[: ]{0,3}\s*", re.IGNORECASE)
_DISPLAYED = re.compile(r"\s*(?:\\\[(.*)\\\]|\\\((.*)\\\)|\$\$(.*)\$\$|\$([^$]*)\$)[\s.]*", re.DOTALL)


def _core(answer: str, grader: str) -> str:
  r"""The expression in an answer: what is boxed in it, or what it says that the answer is; else all of it."""
  if (inner := extraction.boxed(answer)) is None:
    lead = _LEAD.match(answer)
    inner = answer[lead.end() :] if lead else extraction.stated(answer, grader) or answer
  if displayed := _DISPLAYED.fullmatch(inner):
    inner = next(part for part in displayed.groups() if part is not None)
  inner = extraction.unmarked(inner)
  return inner if grader == "text" or inner.endswith("..") else inner.rstrip(". ")


def _same_number(ours: numbers.Number, theirs: numbers.Number, question: Question | None = None) -> bool:
  """Whether two are equal, within a question's tolerances where one is given."""
  if question is None:
    return numbers.same(ours, theirs)
  return numbers.same(ours._replace(value=rounded(ours.value, question)), theirs, question.rtol, question.atol)


def _is_near(value: float, reference: float, question: Question) -> bool:
  return numbers.equal(rounded(value, question), reference, question.rtol, question.atol)


def rounded(value: float, question: Question) -> float:
  """A number as the question's grader takes it: to the nearest integer where its reference is one (TheoremQA)."""
  return round(value) if question.rounded and isfinite(value) else value


def _tolerance(question: Question, exact_words: str) -> str:
  if question.rounded:
    return "rounded"
  if question.rtol:
    return f"within {question.rtol:.0%}"
  return f"within {question.atol:g}" if question.atol else exact_words


_TOKENS = re.compile(
  r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?|[^\W\d_]+#?|\d+|[-+*/^=<>%±¬\u00d7÷&@\u2190-\u22ff]"
)
# From 10 to 20, between 10 and 20: 10-20.
_RANGES = tuple(
  re.compile(pattern)
  for pattern in (
    r"\bbetween (\S{1,20}) and (?=[$€£¥]?\.?\d)",
    r"(?:\bfrom )?(?<![\w.])([$€£¥]?\d[\d.,]{0,20}%?) to (?=[$€£¥]?\.?\d)",
  )
)
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|left|right)(?![A-Za-z])|[$*_{}\\]")


def _same_text(answer: str, reference: str) -> bool:
  """Whether two texts have the same words, numbers and signs, in the same order.

  Where the reference has neither letters nor digits, as "> } ]", every character counts but whitespace and the full
  stop of the sentence.
  """
  if not any(c.isalnum() for c in reference):
    marks, expected = ("".join(text.split()) for text in (answer, reference))
    return bool(expected) and expected in (marks, marks.removesuffix("."))
  return _words(answer) == _words(reference) != []


def _words(text: str) -> list[str]:
  """Words in compatibility form, without case, articles, markup and punctuation; numbers without commas."""
  text = compatible(text).casefold()
  for pattern in _RANGES:
    text = pattern.sub(r"\1 - ", text)
  text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", _MARKUP.sub(" ", text))
  tokens = [t.replace(",", "") if t[-1].isdigit() else t for t in _TOKENS.findall(text)] or text.split()
  return [
    token
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False)
    # "a" may also name an option: "a and d".
    if token not in ("the", "an") and not (token == "a" and len(following) > 1 and following not in ("and", "or"))
  ]
