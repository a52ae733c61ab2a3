"""By what a question is graded where its text and its references are all that is known."""

import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders
from rlpr_jax.grading.inference import as_question, infer

CITIES = "Capital of France? A. Rome B. Paris"
GAP = "ann 17 cats, bob 31. who has more?"


@pytest.mark.parametrize(
  ("question", "reference", "expected"),
  [
    (CITIES, "B", ("multiple_choice", "B", ("Rome", "Paris"))),
    (CITIES, "Paris", ("multiple_choice", "B", ("Rome", "Paris"))),
    (CITIES, "Oslo", ("text", "Oslo", ())),
    ("Which?", "c", ("multiple_choice", "C", ())),
    ("How many?", "814 students", ("number", "814 students", ())),
    ("How far?", "5 m", ("number", "5 m", ())),
    ("Solve.", "x = 3", ("math", "x = 3", ())),
    ("Simplify.", r"\frac{1}{2} x", ("math", r"\frac{1}{2} x", ())),
    ("Who?", "Jane Austen", ("text", "Jane Austen", ())),
  ],
)
def test_what_a_reference_is(question, reference, expected):
  assert infer(question, reference) == expected


def test_each_reference_is_a_form_of_its_own():
  forms = as_question("7", "How many?", ["12", "a dozen"], category="count", row=3).forms
  assert [(form.grader, form.reference, form.category, form.row) for form in forms] == [
    ("number", "12", "count", 3),
    ("text", "a dozen", "count", 3),
  ]
  (form,) = as_question("7", CITIES, ["Oslo"], "multiple_choice").forms
  assert form.grader == "text"


# (kind, answer, references, question, right)
HELD_OUT = [
  ("number", "814", ("814 students",), "", True),
  ("number", "814 students", ("814 students",), "", True),
  ("number", "815", ("814 students",), "", False),
  ("number", "814", ("3", "814"), "", True),
  ("number", "Austen", ("Austen",), "", False),
  ("exact", "814", ("814 students",), "", False),
  ("exact", "814  Students", ("814 students",), "", True),
  ("builtin", "814", ("814 students",), "", False),
  ("builtin", "ann trails bob by 14", ("bob leads ann by 14",), GAP, True),
  ("exact", "ann trails bob by 14", ("bob leads ann by 14",), GAP, False),
  ("multiple_choice", "B", ("Paris",), CITIES, True),
  ("multiple_choice", "the answer is B", ("Paris",), CITIES, True),
  ("multiple_choice", "A", ("Paris",), CITIES, False),
  ("multiple_choice", "Oslo", ("Oslo",), CITIES, True),
  ("multiple_choice", "Bergen", ("Oslo",), CITIES, False),
  ("math", r"\frac{1}{2}", ("0.5",), "", True),
  ("math", r"\frac{1}{3}", ("0.5",), "", False),
  ("inferred", "814", ("814 students",), "", True),
  ("inferred", "(B)", ("Paris",), CITIES, True),
  ("inferred", "the Jane Austen", ("Jane Austen",), "", True),
  ("inferred", "Emma", ("Jane Austen",), "", False),
]


@pytest.mark.parametrize(("kind", "answer", "references", "question", "right"), HELD_OUT)
def test_held_out_answers(kind, answer, references, question, right):
  text = f"<think></think><answer> {answer} </answer>"
  assert graders.is_right(kind, text, references, question) is right
  assert graders.is_right(kind, "", references, question) is False
  if kind not in ("exact", "builtin"):  # as an evaluation grades
    assert graders.grade(as_question("", question, references, kind), text).right is right


def test_an_unknown_verifier_is_named():
  with pytest.raises(InputError, match="'numbers'"):
    graders.is_right("numbers", "<answer>1</answer>", ["1"])
