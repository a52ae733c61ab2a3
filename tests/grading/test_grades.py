r"""What graders say of responses to benchmark questions: every dressing of right answers, wrong ones, hostile ones."""

import random
import time

import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders, mathverify
from rlpr_jax.grading.graders import Grade, grade
from tests.grading.pairs import (
  BARE_CHOICE,
  CHOICE,
  CITY,
  EXACT,
  FLOAT,
  HALF,
  HUGE,
  INTEGER,
  LABELLED,
  LIST,
  RIGHT,
  SMALL,
  TRUE,
  WRONG,
  YES,
  ask,
)


@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, True), (WRONG, False)])
def test_contents_of_answers(pairs, right):
  """All at once, so that a failure shows every pair that is graded otherwise."""
  missed = []
  for question, text in pairs:
    found = grade(question, f"<think> hm </think> <answer> {text} </answer>")
    assert type(found.right) is bool
    if found.right is not right:
      missed.append((question.grader, question.reference, text, found.why))
  assert missed == []


# The same answers where there is no <answer>.
@pytest.mark.parametrize(
  "dressing",
  [
    "<think> 12 </think> <answer> {}",
    "First 12.\nSo $\\boxed{{{}}}$.",
    "First 12.\nThe answer is {}.",
    "The final answer is: ${}$. I hope it is correct.",
    "**Answer:** {}\n",
    "{}",
  ],
)
def test_dressings(dressing):
  pairs = [
    (CHOICE, "B", "C"),
    (BARE_CHOICE, "B", "C"),
    (FLOAT, "2.5", "3.5"),
    (EXACT, "204", "205"),
    (HUGE, "4.5 \\times 10^{33}", "4.5 \\times 10^{32}"),
    (HALF, "\\frac{1}{2}", "\\frac{1}{3}"),
  ]
  if dressing != "{}":
    pairs += [(CITY, "New York Times", "New York Post"), (LABELLED, "quasi-public good", "public good")]
    pairs += [(TRUE, "True", "False"), (LIST, "[0.5, -2]", "[0.5, 2]"), (CHOICE, "Paris", "Rome")]
  for question, right, wrong in pairs:
    assert grade(question, dressing.format(right)).right, (question, right)
    assert not grade(question, dressing.format(wrong)).right, (question, wrong)


def test_why():
  assert grade(CHOICE, "<answer> B </answer>") == Grade(True, "B", "answer_tag", "same letter")
  assert grade(CHOICE, "The answer is Paris.") == Grade(True, "Paris", "answer_is", "text of option B")
  assert grade(CHOICE, "no idea") == Grade(False, None, "none", "no answer")
  assert grade(CHOICE, "<answer> A") == Grade(False, "A", "open_answer_tag", "differs")
  assert grade(FLOAT, "\\boxed{2.51}") == Grade(True, "2.51", "boxed", "within 4%")
  assert grade(FLOAT, "it is 2.50").why == "equal number"
  assert grade(INTEGER, "it is 5.2") == Grade(True, "5.2", "last_number", "within 0.5")
  assert grade(HALF, "\\boxed{\\dfrac{1}{2}}").why == "same expression"
  assert grade(HALF, "\\boxed{0.5}").why == "equal number"
  assert grade(ask("math", "x+1"), "\\boxed{1+x}").why == "equal expression"
  assert grade(TRUE, "<answer> yes </answer>").why == "same truth"
  assert grade(CITY, "<answer> new york times </answer>").why == "same text"
  assert grade(CITY, f"<answer> {'x' * 20_000} </answer>").why == "too long"
  assert grade(CITY, "<answer></answer>") == Grade(False, None, "answer_tag", "no answer")


def test_thoughts_are_not_graded():
  assert not grade(EXACT, "<think> the answer is 204 </think> I do not know").right
  assert grade(EXACT, "<think> the answer is 205 </think> The answer is 204").right


def test_unknown_grader():
  with pytest.raises(InputError, match="question 1: expected a grader multiple_choice or math"):
    grade(ask("judge", "2"), "<answer> 2 </answer>")


PIECES = (
  "<answer>", "</answer>", "<think>", "</think>", "<answer", "{", "}", "{{{{", "}}}}", "\\boxed{", "\\frac{1}{",
  "\\sqrt{", "\\left(", "\\right)", "\\text{", "^{", "_", "9^{9^{9^9}}", "9" * 40, "1e999999", "-", "+", "*", "/", "!",
  "(10^9)!", "$", "$$", "\\[", "\\]", "\\\\", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\u200b", "\u200d", "\ufeff",
  "\u202e", "\ud800", "\udfff", "\x00", "\x1b[2J", "\x7f", "\u2028", "\n", "\r", "\t", " ", "½", "²", "①", "٤", "日本",
  "é", "ß", "The answer is ", "Answer: ", "option ", "A", "B", "(B)", "or", "and", "not", "Paris", "True", "no", "None",
  "[", "]", "1,000", "0.5", "2", "x", "=", "≈", "%", "\\%", "\\infty", "\\pm", "nan", "inf", "e", "i", "\\pi", ",", ";",
  ".", "#", "'", '"]\n["', "__import__('os')", "\\def\\x{\\x\\x}\\x", "\\overline{", "\\cup", "|", "~", "<", ">", "**",
)  # fmt: skip


def hostile(rng):
  """Mostly a few pieces in any order; now and then one repeated a thousand times, or nested deeply."""
  kind = rng.random()
  if kind < 0.01:
    return rng.choice(PIECES) * rng.choice((100, 1000, 5000))
  if kind < 0.02:
    depth = rng.choice((10, 200, 3000))
    return rng.choice(("\\frac{1}{", "{", "\\sqrt{", "(", "2^{")) * depth + "1" + "}" * depth
  text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 24)))
  return f"<answer>{text}</answer>" if kind < 0.5 else text


def test_hostile_texts():
  """Three thousand, to every grader: none raises or hangs, and none is right but by saying what is."""
  rng = random.Random(0)
  out_of_reach = (EXACT, HUGE, SMALL, LIST, CITY, YES)  # no order of the pieces says these
  start = time.monotonic()
  for _ in range(3_000):
    text = hostile(rng)
    for question in out_of_reach:
      assert not grade(question, text).right, (question, text)
    assert not grade(CHOICE, text).right or "B" in text or "Paris" in text, text
    assert not grade(LABELLED, text).right or "B" in text, text
    assert not grade(TRUE, text).right or "True" in text, text
    assert not grade(FLOAT, text).right or "2" in text, text
    for question in (ask("text", text), ask("number", text), ask("multiple_choice", text, (text, text))):
      found = grade(question, text)
      assert found.answer or not found.right, text
  assert time.monotonic() - start < 120


def test_hostile_mathematics(monkeypatch):
  """What reaches math-verify is short, printable and without towers of powers, so that it is seldom killed."""
  asked = []
  monkeypatch.setattr(mathverify.process, "ask", lambda answer, reference: bool(asked.append(answer)))
  rng = random.Random(1)
  for _ in range(3_000):
    text = hostile(rng)
    for question in (HALF, ask("math", text)):
      assert type(grade(question, text).right) is bool
  assert all(len(text) <= mathverify.LIMIT and text.isprintable() for text in asked)
  monkeypatch.undo()
  graders.math("1", "2")
  start = time.monotonic()
  for text in asked[:: max(len(asked) // 100, 1)]:
    grade(HALF, f"<answer> {text} </answer>")
  assert time.monotonic() - start < 60
