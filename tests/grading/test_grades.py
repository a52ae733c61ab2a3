r"""What graders say of responses to benchmark questions: every dressing of right answers, wrong ones, hostile ones."""

import random
import time

import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.grading import graders
from rlpr_jax.grading.graders import Grade, grade

CITIES = ("Rome", "Paris", "a dog", "A bigger, better dog", "$x^2$ metres", "None of these", "7.5", "1", "no", "Yes")


def ask(grader, reference, options=(), rtol=0.0, atol=0.0):
  return Question("1", "q", reference, "", grader, tuple(options), 1, rtol, atol)


CHOICE = ask("multiple_choice", "B", CITIES)
BARE_CHOICE = ask("multiple_choice", "B")
FLOAT = ask("number", "2.5", rtol=0.04)
INTEGER = ask("number", "5", atol=0.5)
EXACT = ask("number", "204")
HUGE = ask("number", "4.5e33", rtol=0.01)
SMALL = ask("number", "3e-36", rtol=0.04)
LIST = ask("number", "[0.5, -2.0]", rtol=0.04)
TRUE, FALSE = ask("number", "True"), ask("number", "False")
HALF = ask("math", "\\frac{1}{2}")
LABELLED = ask("text", "(B) quasi-public good.")
CITY = ask("text", "The New York Times")
YES = ask("text", "Yes")

# question, content of <answer>
RIGHT = [
  *((CHOICE, text) for text in ("B", "b", "(B)", "B.", "**B**", "$\\boxed{\\text{B}}$", "[B]", "{B}", "B: Paris")),
  *((CHOICE, text) for text in ("Paris", "paris.", "**B.** Paris", "\\text{B}. Paris", "B - Paris", "Option B")),
  *((CHOICE, text) for text in ("B because it is", "B, since A is not", "B is correct", "The answer is (B).")),
  *((BARE_CHOICE, text) for text in ("B", "(b)", "B. Paris")),
  *((CHOICE, text) for text in ("B. the capital of France", "B. London")),  # the letter decides where the text is none
  (ask("multiple_choice", "J", CITIES), "J"),
  (ask("multiple_choice", "J", CITIES), "yes"),
  (ask("multiple_choice", "C", CITIES), "dog"),
  (ask("multiple_choice", "D", CITIES), "A bigger,  better dog."),
  (ask("multiple_choice", "E", CITIES), "x^2 metres"),
  (ask("multiple_choice", "H", CITIES), "H. 1"),
  *(
    (FLOAT, text) for text in ("2.5", "2.5 m", "$2.50$", "\\frac{5}{2}", "5/2", "2.45", "2.6", "about 2.5 cm.", "x=2.5")
  ),
  *((FLOAT, text) for text in ("2\\frac{1}{2}", "\\sqrt{6.25}", "250\\%", "2.5 \\text{ kg}", "2.5 \\mathrm{~m/s}")),
  *((INTEGER, text) for text in ("5", "5.0", "5.4", "\\frac{10}{2}", "5 \\text{ units}", "\\boxed{5}", "5 apples")),
  *((EXACT, text) for text in ("204", "204.0", "0204", "\\boxed{204}", "204 minutes", "408/2", "2 \\cdot 102")),
  *((HUGE, text) for text in ("4.5e33", "4.5 \\times 10^{33}", "4.52 x 10^33 erg/s", "4.5·10³³", "45e32")),
  *((SMALL, text) for text in ("3e-36", "3.1 \\cdot 10^{-36}")),
  *((LIST, text) for text in ("[0.5, -2.0]", "(0.5,-2)", "\\{-2, \\frac{1}{2}\\}", "x=0.5, y=-2", "0.5 and -2")),
  *((LIST, text) for text in ("\\[ [0.5, -2] \\]", "\\begin{pmatrix} 0.5 \\\\ -2 \\end{pmatrix}", "$(0.51, -2)$")),
  *((TRUE, text) for text in ("True", "true.", "Yes", "yes, it is", "\\text{True}", "The answer is True.")),
  *((FALSE, text) for text in ("False", "no", "\\boxed{\\text{False}}")),
  *((HALF, text) for text in ("\\frac{1}{2}", "\\dfrac12", "$\\frac 12$", "1/2", "0.5", "\\left(\\frac{1}{2}\\right)")),
  *(
    (HALF, text) for text in ("x = \\frac{1}{2}", "The answer is $\\frac{1}{2}$.", "\\frac{2}{4}", "\\[ 0.5 \\]", ".5")
  ),
  (ask("math", "\\frac{2}{3} x"), "\\frac{2x}{3}"),
  (ask("math", "(3,4]"), "\\left(3, 4\\right]"),
  (ask("math", "1,-2"), "-2, 1"),
  (ask("math", "90^\\circ"), "90"),
  (ask("math", "90"), "90^{\\circ}"),
  (ask("math", "10,\\!080"), "10080"),
  (ask("math", "\\$18.90"), "18.9 dollars"),
  (ask("math", "864 \\mbox{ inches}^2"), "864"),
  (ask("math", "\\text{Evelyn}"), "evelyn."),
  (ask("math", "137 \\frac{1}{2}"), "137.5"),
  (ask("math", "y = 2x + 3"), "y=3+2x"),
  (ask("math", "6 - 5i"), "-5i + 6"),
  (ask("math", "x^2y^2"), "y^2x^2"),
  (ask("math", "x^2 e^{-x^2}"), "e^{-x^{2}} x^{2}"),
  (ask("math", "x^2 + 1"), "1 + x**2"),
  (ask("math", "3^n + 2^{n-1}"), "2^{n - 1} + 3^{n}"),
  (ask("math", "(n+1)!"), "(1+n)!"),
  (ask("math", "M*"), "The answer is M*."),
  (ask("math", "\\text{even}"), "The answer is \\text{even}."),
  (ask("math", ".35625"), "the answer is .35625"),
  (ask("math", "\\begin{pmatrix} 1/5 \\\\ 2 \\end{pmatrix}"), "\\begin{pmatrix} \\frac{1}{5} \\\\ 2 \\end{pmatrix}"),
  *((CITY, text) for text in ("The New York Times", "new york times", "New York\u00a0Times.", "N\u200bew  York Times")),
  *(
    (CITY, text)
    for text in ("\\boxed{\\text{New York Times}}", "The answer is the New York Times.", "\uff2eew York times")
  ),
  *((LABELLED, text) for text in ("(B) quasi-public good.", "quasi public good", "B", "(B)", "b. Quasi-public good")),
  *((YES, text) for text in ("Yes", "yes.", "Yes, because it is.", "**Yes**")),
  *((FALSE, text) for text in ("False, because it is not correct", "No, it is not true", "false; no")),
  *((TRUE, text) for text in ("True, since it is not false", "Yes. It is not incorrect")),
  *((ask("number", "5 m"), text) for text in ("5", "5 m", "5m", "5 meters", "5 \\text{ metres}", "5 \\mathrm{~m}")),
  *((ask("number", "50 cm"), text) for text in ("50 centimeters", "50 \\text{ cm}", "the length is 50 cm")),
  *((ask("number", "3 m/s"), text) for text in ("3 m s^{-1}", "3 meters per second", "3 \\text{ m}/\\text{s}")),
  *((ask("number", "9 m^2"), text) for text in ("9 square meters", "9 \\text{ m}^2", "9 metres squared")),
  *((ask("number", "30^\\circ"), text) for text in ("30", "30 degrees", "30°", "30 \\text{ deg}")),
  *((ask("number", "20 °C"), text) for text in ("20 degrees Celsius", "20^\\circ\\mathrm{C}", "20")),
  *((ask("number", "3 boxes"), text) for text in ("3 box", "3 big boxes", "3 units", "3")),
  *((ask("number", "3 cars"), text) for text in ("3", "3 red cars", "3 car", "three = 3 cars")),
  *((ask(kind, "50%"), text) for kind in ("number", "math") for text in ("0.5", "1/2", "50", "50\\%", "50 percent")),
  *((ask(kind, "50\\%"), text) for kind in ("number", "math") for text in ("0.5", "\\frac{1}{2}", "50%")),
  *(
    (ask(kind, "10000"), text)
    for kind in ("number", "math")
    for text in ("10\\,000", "10~000", "10 000", "10\u202f000", "10{,}000", "10\\ 000 \\text{ units}")
  ),
  (EXACT, "it is 204"),
  (ask("number", "1234567.5"), "1 234 567.5"),
  *((ask(kind, "1.5"), text) for kind in ("number", "math") for text in ("1 1/2", "1 \\frac12", "x = 1 1/2")),
  (ask("number", "-1.5"), "-1 1/2 cups"),
  *((ask(kind, "2^{100}"), str(2**100)) for kind in ("number", "math")),
  (ask("number", "2^{100}-1"), str(2**100 - 1)),
  (ask("number", str(2**53 + 1)), f"{2**53 + 1}.0"),
  (ask("number", "20!"), f"{20 * 19}*18!"),
  (ask("number", "4"), "2^{3}\\frac{1}{2}"),
  *((ask("number", "5"), text) for text in ("f(1, 2) = 5", "P(X > 3) = 5", "m + n = 2 + 3 = 5", "5! / 4! = 5", "5=5")),
  *((ask("number", "120"), text) for text in ("5! = 120", "5!=120", "\\sum_{i=1}^n i = 120", "n = 5 m = 120")),
  *((ask("math", text), text) for text in ("2^{2024}", "2014!", "5x - 7y + 11z + 4 = 0", "8m", "2^{2m}", "6xy")),
  (ask("math", "6xy"), "6yx"),
  (ask("math", "2^{2m}"), "4^m"),
  (ask("math", "8m"), "10m - 2m"),
  (ask("math", "\\frac{37}{4} m"), "\\frac{37m}{4}"),
  (ask("math", "\\frac12 m g"), "0.5gm"),
  (ask("math", "15\\mbox{ cm}^2"), "15 cm^2"),
  (ask("math", "15\\mbox{ cm}^2"), "15 \\text{ square centimeters}"),
  (ask("math", "6"), "6 \\text{ kg}"),
  (ask("text", "> } } ]"), ">}}]"),
  (ask("text", "> } } ]"), " > }  } ] "),
  (ask("text", "+"), "+"),
  (ask("text", "(2) 2.6%"), "2.60%"),
  (ask("text", "a and d"), "A and D"),
]
WRONG = [
  *(
    (CHOICE, text) for text in ("A", "Rome", "A. Paris", "B. Rome", "A or B", "B, C", "not B", "Because", "", "Z", "2")
  ),
  *((CHOICE, text) for text in ("\\boxed{A} or \\boxed{B}", "The answer is A", "Paris or Rome", "K", "A bigger dog")),
  *((BARE_CHOICE, text) for text in ("A", "Paris")),
  *((FLOAT, text) for text in ("2.39", "2.61", "-2.5", "25", "2.5x", "2 or 3", "2, 5", "two", "2.5e1", "2.5 + x", "i")),
  *((INTEGER, text) for text in ("4.4", "6", "5 or 6", "5x", "[5]  6", "-5", "fifty", "5e5", "9^{9^{9^9}}", "1/0")),
  *((EXACT, text) for text in ("205", "204.5", "20", "1204", "204i", "20 4", "\\frac{204}{0}")),
  *((HUGE, text) for text in ("4.5", "4.6e33", "4.5e32", "4.5 \\times 10^{-33}", "\\infty")),
  *((SMALL, text) for text in ("0", "3e-35", "3")),
  *((LIST, text) for text in ("[0.5]", "[0.5, 2.0]", "0.5", "[0.5, -2, 1]", "[a, b]", "[]", "[0.5, -2")),
  *((TRUE, text) for text in ("False", "no", "maybe", "True or False", "not true", "1", "")),
  *((FALSE, text) for text in ("True", "yes", "0")),
  *((HALF, text) for text in ("2", "\\frac{1}{3}", "-\\frac{1}{2}", "\\frac{1}{2}x", "1", "half", "\\frac{1}{2", "12")),
  (ask("math", "(3,4]"), "[3,4]"),
  (ask("math", "x+1"), "x-1"),
  (EXACT, "9" * 400 + "%"),
  (EXACT, "9" * 400 + " million"),
  (EXACT, "9" * 200 + "*" + "9" * 200 + "%"),
  (ask("math", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"), "2"),
  (ask("math", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"), "\\hbar P_{0}^{2 / 5} (n-\\frac{2}{5} z)."),
  (ask("math", "2"), "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"),
  (ask("math", "2k"), "2"),
  (ask("math", "\\frac{37}{4} m"), "9.25"),
  (ask("math", "\\text{Evelyn}"), "Briana"),
  (ask("math", "1,-2"), "1,2"),
  (ask("math", "1.39e-10"), "0"),
  *((CITY, text) for text in ("New York", "York New Times", "The Times", "the", "", "New York Times 2")),
  *((LABELLED, text) for text in ("A", "(C)", "(C) quasi-public good", "(B) public good", "good", "")),
  *((YES, text) for text in ("No", "No, yes", "Yesterday", "Maybe yes")),
  *(
    (CHOICE, text)
    for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "B; C", "[B] or [C]", "The answer is B. or C.")
  ),
  *((BARE_CHOICE, text) for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "(B) (C)", "B/C")),
  *((CHOICE, text) for text in ("(B) Paris or (C) a dog", "B. Paris and Rome")),
  *((TRUE, text) for text in ("False, because it is not true", "True, or False", "True, False", "No, it is true")),
  *((FALSE, text) for text in ("True, because it is not false", "not false")),
  *((ask(kind, "5"), text) for kind in ("number", "math") for text in ("5ab", "5 ab", "5xy", "5 x", "5^{2m}")),
  *((ask(kind, "8"), text) for kind in ("number", "math") for text in ("10-2m", "8/\\omega", "8 \\tau")),
  *(
    (ask(kind, "5"), text)
    for kind in ("number", "math")
    for text in ("x >= 5", "x <= 5", "x != 5", "x \\ne 5", "x \\geq 5", "x > 5", "x = 2 or x = 5", "x \u2265 5")
  ),
  *((ask("number", "5"), text) for text in ("x = 2 \\text{ or } x = 5", "x=2\nx=5", "x = 2 \\quad x = 5", "not 5")),
  *((ask("number", "0"), text) for text in ("x^2 - 4 = 0", "5x - 7y = 0")),
  (ask("math", "5x - 7y + 11z + 4 = 0"), "0"),
  (ask("math", "5x - 7y + 11z + 4 = 0"), "x - y = 0"),
  (ask("math", "x + 2y = 5"), "5"),
  *((ask("number", "5 m"), text) for text in ("5 km", "5 s", "5 m^2", "5 m/s", "5 cars", "the length is 5 km")),
  *((ask("number", "50 cm"), text) for text in ("50 m", "50 \\text{ m}", "50 mm")),
  *((ask("number", "3 cars"), text) for text in ("3 trucks", "3 km")),
  (ask("number", "30^\\circ"), "30 radians"),
  (ask("math", "5 \\text{ m}"), "5 \\text{ km}"),
  *((ask("math", "6xy"), text) for text in ("6", "6ab", "6x")),
  *((ask("math", "\\frac12 m g"), text) for text in ("0.5", "\\frac12", "\\frac12 m", "0.5 N s")),
  *((ask("math", "2^{2m}"), text) for text in ("2", "4", "2^{2n}")),
  *((ask("math", "8m"), text) for text in ("10-2m", "8", "8s")),
  *((ask("math", "2^{2024}"), text) for text in ("2^{2025}", "2", "2024", "\\infty")),
  (ask("math", "2014!"), "2015!"),
  *((ask(kind, "2^{100}-1"), "2^{100}") for kind in ("number", "math")),
  (ask("number", str(2**53 + 1)), str(2**53)),
  (ask("number", str(2**53 + 1)), "2^{53}"),
  (ask("number", "25!"), "25! + 1"),
  *((ask(kind, "50%"), text) for kind in ("number", "math") for text in ("0.05", "5000", "1/20", "5%")),
  *((ask("number", "10000"), text) for text in ("10 00", "10 0000", "1 000", "10, 000")),
  (ask("number", "1.5"), "11/2"),
  *((ask("text", "> } } ]"), text) for text in (">", "> } ]", "> } } ] ]", "}", "> } } ].")),
  (ask("text", "+"), "-"),
  (ask("text", "b and d"), "a and d"),
  (ask("text", "-0.5"), "0.5"),
  (ask("text", "5%"), "6%"),
]


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
  """Ten thousand, to every grader: none raises or hangs, and none is right but by saying what is."""
  rng = random.Random(0)
  out_of_reach = (EXACT, HUGE, SMALL, LIST, CITY, YES)  # no order of the pieces says these
  start = time.monotonic()
  for _ in range(10_000):
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
  monkeypatch.setattr(graders._judge, "ask", lambda answer, reference: bool(asked.append(answer)))
  rng = random.Random(1)
  for _ in range(10_000):
    text = hostile(rng)
    for question in (HALF, ask("math", text)):
      assert type(grade(question, text).right) is bool
  assert all(len(text) <= graders.MATH_LIMIT and text.isprintable() for text in asked)
  monkeypatch.undo()
  graders.math("1", "2")
  start = time.monotonic()
  for text in asked[:: len(asked) // 100]:
    grade(HALF, f"<answer> {text} </answer>")
  assert time.monotonic() - start < 60
