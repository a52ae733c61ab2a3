"""What rewards by rule and grades of benchmarks say of the same answer: the same, where both ask the same thing."""

import pytest

from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.grading import graders
from rlpr_jax.grading.multiple_choice import letter
from tests.grading import pairs

CITIES = ("Rome", "Paris", "a dog", "x^2", "The Hague")
# (answer, reference, options, right)
CHOICES = [
  *((answer, "B", CITIES, True) for answer in ("B", "(b)", "[B]", "{B}", "**B.** Paris", "B - Paris", "Paris!")),
  *((answer, "B", CITIES, True) for answer in ("B \u2014 Paris", "B because it is", "B, since A is not", "\\text{B}.")),
  *((answer, "C", CITIES, True) for answer in ("dog", "the dog", "A dog", "C")),
  *((answer, "E", CITIES, True) for answer in ("hague", "the \u200bhague", "THE HAGUE.")),
  *((answer, "B", CITIES, False) for answer in ("A", "Rome", "A because it is", "B, C", "[B] or [C]", "not B", "")),
  *((answer, "A", CITIES, False) for answer in ("a dog", "A dog", "B - Paris", "[B]", "Paris or Rome")),
]
# (answer, reference, right)
EXPRESSIONS = [
  ("\u22123", "-3", True),  # another minus
  ("x\u22121", "x-1", True),
  ("\\frac{1}{2}", "\\frac{1}{2}\u200b", True),
  ("1 + x**2", "x^2 + 1", True),
  ("10 000", "10000", True),
  ("10\u202f000", "10000", True),
  ("1 1/2", "1.5", True),
  ("The answer is \\boxed{4}.", "4", True),
  ("$\\dfrac12$", "\\frac{1}{2}", True),
  ("18.9 dollars", "\\$18.90", True),
  ("5 m", "5 \\text{ m}", True),
  ("No solution", "no solution", True),
  ("Jose\u0301", "Jos\u00e9", True),
  ("{" * 2000, "{" * 2000, True),  # the same text, however little of it can be read
  ("3", "-3", False),
  ("4 2", "42", False),
  ("20\n4", "204", False),
  ("x+1", "x\u22121", False),
  ("5 km", "5 \\text{ m}", False),
  ("5ab", "5", False),
  ("9.25", "\\frac{37}{4} m", False),
  ("10-2m", "8", False),
  ("\\boxed{4} or \\boxed{5}", "4", False),
  ("1" * 2000, "1", False),
  ("", "1", False),
  ("\u200b", "1", False),
]


def tagged(answer):
  return f"<think> hm </think> <answer> {answer} </answer>"


def listed(options):
  return "\n".join(("Which one?", *(f"{letter(i)}. {option}" for i, option in enumerate(options))))


def choice(reference, options):
  return Question("1", listed(options), reference, "", "multiple_choice", options, 1)


def of_grades(grader):
  """The pairs with which the grades of benchmarks are tested."""
  for cases, right in ((pairs.RIGHT, True), (pairs.WRONG, False)):
    yield from ((question, answer, right) for question, answer in cases if question.grader == grader)


def missed(cases, kind):
  """Cases that one of the two judges otherwise, with what either says."""
  found = []
  for question, answer, right in cases:
    verified = graders.verify(kind, tagged(answer), question.reference, listed(question.options))
    graded = graders.grade(question, tagged(answer)).right
    if not verified == graded == right:
      found.append((answer, question.reference, f"verify {verified}", f"grade {graded}"))
  return found


def test_both_read_the_same_option():
  cases = [(choice(reference, options), answer, right) for answer, reference, options, right in CHOICES]
  assert missed([*cases, *of_grades("multiple_choice")], "multiple_choice") == []


def test_both_read_the_same_expression():
  expressions = [*EXPRESSIONS, *pairs.MATH]
  cases = [(Question("1", "", reference, "", "math", (), 1), answer, right) for answer, reference, right in expressions]
  assert missed([*cases, *of_grades("math")], "math") == []


@pytest.mark.parametrize(
  ("answer", "reference"),
  [
    ("NEW  YORK", "New York"),
    ("Jose\u0301", "Jos\u00e9"),
    ("stra\u00dfe", "STRASSE"),
    ("new\u00a0york", "New York"),
    ("\u00c5ngstr\u00f6m", "\u212bngstro\u0308m"),
  ],
)
def test_what_is_exact_is_the_same_text(answer, reference):
  question = Question("1", "", reference, "", "text", (), 1)
  assert graders.verify("exact", tagged(answer), reference)
  assert graders.grade(question, tagged(answer)).why == "same text"


def test_rewards_are_stricter_on_purpose():
  question = Question("1", "", "42", "", "math", (), 1)
  assert graders.grade(question, tagged("4\u200b2")).right
  assert not graders.verify("math", tagged("4\u200b2"), "42")
  for text in ("\\boxed{42}", "The answer is 42", "<answer> 42"):
    assert graders.grade(question, text).right
    assert not graders.verify("math", text, "42")
  question = Question("1", "", "New York", "", "text", (), 1)
  for answer in ("the New York", "New York.", "**New York**", "New\u200b York", "New-York"):
    assert graders.grade(question, tagged(answer)).right
    assert not graders.verify("exact", tagged(answer), "New York")
