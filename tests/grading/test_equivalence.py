r"""Mathematical equivalence against other people's test suites, changed references and properties it must have."""

import random
import re
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpr_jax.grading import equivalence, expressions, graders, latex, mathverify, numbers
from rlpr_jax.grading.equivalence import equal
from rlpr_jax.grading.question import Question
from rlpr_jax.grading.spelling import normalized
from tests.grading.equivalence_suites import DISAGREEMENTS, SUITES
from tools.changed_answers import changes

# Of how many verdicts ours must be the same; `DISAGREEMENTS` says why each other one is not.
AGREEMENT = {
  "Math-Verify": 0.947,
  "NeMo-Skills": 0.96,
  "MARIO": 0.90,
  "Qwen2.5-Math": 1.0,
  "MATH": 0.87,
  "OlympiadBench": 1.0,
}


def is_right(answer, reference):
  """The verdict on the content of an answer tag."""
  question = Question("1", "q", reference, "", grader="math")
  return graders.grade(question, f"<answer> {answer} </answer>").right


def is_right_response(response, reference):
  """The verdict on a sentence as a whole response, or on the content of its answer tag."""
  reference = reference.removeprefix("$").removesuffix("$")
  if re.search(r"[A-Za-z]{2,} [a-z]{2,}[ .]|boxed", response):
    return graders.grade(Question("1", "q", reference, "", grader="math"), response).right
  return is_right(response, reference)


@pytest.mark.parametrize("suite", SUITES)
def test_suites_of_others(suite):
  """Every verdict is that of the suite but for those that are explained, and of those none is explained in vain."""
  cases = SUITES[suite]
  others = {
    (answer, reference) for answer, reference, verdict in cases if is_right_response(answer, reference) is not verdict
  }
  assert others == set(DISAGREEMENTS.get(suite, {}))
  agreed = sum((answer, reference) not in others for answer, reference, _ in cases)
  assert agreed / len(cases) >= AGREEMENT[suite]


# What one side writes, and the other.
SAME = [
  # working before the last value, which a reference has in other words or not at all
  ("x = 1 + 4 = 5", "x = 2 + 3 = 5"),
  ("\\sqrt{2} \\approx 1.41", "\\sqrt{2} \\approx 1.414"),
  ("2 + 3 = 5", "5"),
  ("x = 2 + 3 = 5", "5"),
  ("x = 1\\frac{1}{2} = 1.5", "1.5"),
  ("x = 30 \\text{ cm} = 0.3 m", "0.3 m"),
  ("\\frac{22}{7} \\approx 3.14", "\\frac{22}{7}"),
  ("\\frac{2}{3} \\approx 0.66", "\\frac{2}{3}"),
  ("E = 6.63 \\times 10^{-34} \\approx 6.6 \\times 10^{-34}", "6.63 \\times 10^{-34}"),
  ("I(0) \\cdot e^{-t/(RC)}", "I(0) e^{-\\frac{t}{R C}}"),
  ("b v + m \\frac{d v}{d t} = f", "m \\frac{d v}{d t} + b v = f"),
  ("\\frac{d}{dx} x^2", "2x"),
  # a limit and a sum
  ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1"),
  ("\\sum_{k=1}^{10} k", "55"),
  ("\\sum_{k=1}^{5} 2", "10"),
  # a comma
  ("0,245", "0.245"),
  ("+0,245", "0,245"),
  ("\\sqrt2 \\approx 1.414", "\\sqrt{2}"),
  ("\\sqrt2 \\approx 1.414", "1.414"),
  ("a_n = 2n+1", "a_{n}=2n+1"),
  ("2n+1", "a_n = 2n+1"),
  ("v_{0} = 5 \\text{ m/s}", "v_0 = 5 m/s"),
  # complex numbers
  ("3+4i", "4i+3"),
  ("(1+i)^2", "2i"),
  ("\\frac{1}{1+i}", "\\frac{1-i}{2}"),
  ("e^{i\\pi/2}", "i"),
  ("\\cos x + i\\sin x", "e^{ix}"),
  ("|3+4i|", "5"),
  # degrees
  ("\\sin 30^\\circ", "\\frac{1}{2}"),
  ("\\sin(30°)", "0.5"),
  ("\\cos 60^{\\circ}", "1/2"),
  ("2\\sin 60^\\circ", "\\sqrt3"),
  ("60 degrees", "60^{\\circ}"),
  # characters
  ("2√3", "2\\sqrt{3}"),
  ("√(x+1)", "\\sqrt{x+1}"),
  ("x²+1", "x^2+1"),
  ("[0, ∞)", "[0, \\infty)"),
  ("x ≥ 5", "x \\geq 5"),
  ("3½", "3.5"),
  ("x₁ + x₂", "x_1+x_2"),
  ("2\u00d710³", "2000"),
  # repeating decimals
  ("0.\\overline{3}", "\\frac{1}{3}"),
  ("0.1\\overline{6}", "1/6"),
  ("0.\\dot{3}", "1/3"),
  ("2.\\overline{45}", "\\frac{27}{11}"),
  ("0.(3)", "1/3"),
  # vectors and matrices
  ("(1,2,3)", "\\begin{pmatrix}1\\\\2\\\\3\\end{pmatrix}"),
  ("\\langle 1,2,3\\rangle", "(1,2,3)"),
  ("3\\mathbf{i}+4\\mathbf{j}", "\\langle 3,4\\rangle"),
  ("\\hat{i} - 2\\hat{k}", "(1,0,-2)"),
  ("2\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\4\\end{pmatrix}"),
  # units
  ("5 cm", "0.05 m"),
  ("0.05 m", "5 cm"),
  ("72 km/h", "20 m/s"),
  ("500 mL", "0.5 L"),
  ("1 m^2", "10000 cm^2"),
  ("3 hours", "180 minutes"),
  ("3.6 kJ", "3600 J"),
  ("2x \\text{ cm}", "2x"),
  # lists and sets
  ("x = 2 \\text{ or } x = 3", "3, 2"),
  ("x \\in \\{2,3\\}", "2,3"),
  ("x=1, y=2", "(1,2)"),
  ("(x, y) = (1, 2)", "(1,2)"),
  ("\\begin{cases} x=1 \\\\ y=2 \\end{cases}", "x=1, y=2"),
  ("100,200,300", "100, 200, 300"),
  ("100,200,300", "100200300"),
  # inequalities and intervals
  ("-2 \\le x \\le 7", "[-2,7]"),
  ("(5,\\infty)", "x>5"),
  ("x<1 \\text{ or } x>2", "(-\\infty,1)\\cup(2,\\infty)"),
  ("\\mathbb{R}\\setminus\\{2\\}", "x \\ne 2"),
  # equations
  ("y = 1/x", "xy = 1"),
  ("\\frac{x^2}{4}+\\frac{y^2}{9}=1", "9x^2+4y^2=36"),
  ("(x-2)^2+(y+3)^2=16", "x^2-4x+y^2+6y-3=0"),
  ("y=x^2", "f(x)=x^2"),
  # functions
  ("\\ln 2 + \\ln 3", "\\ln 6"),
  ("\\log 100", "2"),
  ("\\tan^{-1} 1", "\\pi/4"),
  ("\\binom{5}{2}", "10"),
  ("\\sqrt[3]{-8}", "-2"),
  ("(-1)^n", "\\cos(n\\pi)"),
  # what math-verify is asked
  ("\\int_0^1 x^2 dx", "\\frac13"),
  ("\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}"),
  ("\\lim_{x\\to 0} \\frac{\\sin x}{x}", "1"),
]
OTHER = [
  # working with another number
  ("x = 2 + 4 = 5", "x = 2 + 3 = 5"),
  ("f(2) = 4 - 2 = 3", "f(2) = 4 - 1 = 3"),
  ("\\sqrt{2} \\approx 1.424", "\\sqrt{2} \\approx 1.414"),
  ("\\sqrt{2} \\approx 1.415", "\\sqrt{2} \\approx 1.414"),
  ("-0,245", "0,245"),
  (
    "t_y = \\frac{a}{b} t_x = \\frac{-9.6}{0.4} \\cdot 0.15 = -0.225",
    "t_y = \\frac{a}{b} t_x = \\frac{-0.6}{0.4} \\cdot 0.15 = -0.225",
  ),
  # functions that only have a name
  ("c(0)", "I(0)"),
  ("I(0) e^{-\\frac{t}{R b}}", "I(0) e^{-\\frac{t}{R C}}"),
  ("m \\frac{d v}{d w} + b v = f", "m \\frac{d v}{d t} + b v = f"),
  # of terms that only have a name
  ("\\lim_{n \\to 0} a_n = 2", "\\lim_{n \\to \\infty} a_n = 2"),
  ("\\lim_{k \\to \\infty} a_n", "\\lim_{n \\to \\infty} a_n"),
  ("\\sum_{j=1}^{n} a_{k}", "\\sum_{k=1}^{n} a_{k}"),
  ("x^2+1=0", "x^2+3=0"),  # no real solution
  ("I = \\frac{V}{12}", "I = \\frac{V}{13}"),
  ("v_0 = 20", "v_1 = 20"),
  ("5 = 2 + 3", "6 = 2 + 3"),
  ("\\lim_{n \\to \\infty} a_n = 2", "\\lim_{n \\to \\infty} a_n = 3"),
  ("\\frac{dy}{dx} = 2x", "\\frac{dy}{dx} = 3x"),
  ("\\frac{dy}{dx} = 2x", "y = 2x^2"),
  ("30 mph, 40 mph", "30 mph, 50 mph"),
  ("\\neq 5", "5"),
  ("x \\neq 5", "x = 5"),
  ("x \\neq 5", "w \\neq 5"),
  ("0,245", "245"),
  ("\\sin x=1/2", "\\cos x=1/2"),
  ("1, 2", "1, 2, 3"),
  ("1, 1, 2", "1, 2, 2"),
  ("2 or 3", "2"),
  ("x=2\nx=3", "x=3"),
  ("\\ln|x|", "\\ln|x| + 1"),
  ("|x|", "x"),
  ("\\sqrt{x^2}", "x"),
  ("X + 1", "x + 1"),
  ("5 cm", "5 m"),
  ("5 cm", "0.05 kg"),
  ("204_5", "204"),
  ("\\frac{355}{113}", "\\pi"),
  ("2^{100}", "2^{100} + 1"),
  ("12345678901234567", "12345678901234568"),
  ("16386.20", "16386.21"),
  ("1.39e-40", "2e-40"),
  ("\\sum_{k=1}^{n} k", "\\frac{n(n+2)}{2}"),
  ("\\int_0^1 x^2 dx", "\\frac12"),
  ("either $5$ or $6$", "6"),
  ("9^{9^{9^{9}}}", "9^{9^{9^{9}}} + 1"),
]


def test_equal_pairs():
  assert [pair for pair in SAME if not is_right(*pair)] == []


def test_different_pairs():
  assert [pair for pair in OTHER if is_right(*pair) or is_right(*pair[::-1])] == []


@pytest.mark.parametrize("answer", ["It is not $5$", "never $5$", "$6$ is right, $5$ is wrong"])
def test_sentences_that_deny_it(answer):
  assert not equal(answer, "5")


def test_powers_of_ten():
  """Every eleventh mantissa of three digits, and powers beyond what floats hold exactly."""
  for mantissa in range(100, 1000, 11):
    for power in (3, 15, 16, 23, 33, -34):
      short, long = f"{mantissa / 100:.2f}e{power}", f"{mantissa / 100:.2f} \\times 10^{{{power}}}"
      assert equal(short, long), (short, long)
      assert equal(long, short), (short, long)
      assert not equal(short, f"{(mantissa + 1) / 100:.2f} \\times 10^{{{power}}}"), short


REFERENCES = [
  *("x^2 + 1 = 0", "y = 2x + 3", "2x + 3y = 7", "x^2 + y^2 = 25", "\\frac{x^2}{4} + \\frac{y^2}{9} = 1", "x = -3"),
  *(
    "34x+45y-20z+100=0",
    "a_{n} = 3^n - 2",
    "I = \\frac{V}{12}",
    "I = 3 \\cos t",
    "I_{\\max} = \\frac{q_0}{\\sqrt{2LC}}",
  ),
  *("v_0 = 20", "E = 3 m c^2", "f(x) = x^2 - 4x + 1", "g(x) = \\sin 2x", "\\sin x = \\frac{1}{2}", "\\log_2 x = 3"),
  *("|x - 3| = 4", "x^3 - 2x^2 + 1 = 0", "5 = 2 + 3", "\\lim_{n \\to \\infty} a_n = 2", "\\frac{dy}{dx} = 3y + 1"),
  *("y'' + 4y = 0", "f'(x) = 6x + 2", "\\frac{\\partial u}{\\partial t} = 4 \\frac{\\partial^2 u}{\\partial x^2}"),
  *("xy = 12", "y^2 = 8x", "(x - 2)^2 + (y + 3)^2 = 16", "z = 3 + 4i", "P(A) = 0.25", "P(X > 3) = \\frac{7}{16}"),
  *("\\angle ABC = 60^\\circ", "V = \\frac{4}{3} \\pi r^3", "x \\neq 5", "x > 5", "x \\leq 2", "3x + 1 < 7"),
  *("-2 \\le x \\le 7", "x + y \\geq 10", "f(2) < f(1) < f(4)", "x \\equiv 3 \\pmod{7}", "a + b = 12", "y = C e^{3x}"),
  *("t = 0.125 s", "w = 100,000", "(x,y) = (3, 4)", "x = 1, y = 2, z = 3", "x = 2 or x = 3", "a = 3, b = -1"),
  *("1,-2", "2, 3, 5, 7, 11", "n=1, 2, 3", "30 mph, 40 mph", "5 m, 12 m, 13 m", "3 cm and 4 cm", "19, 46, and 82"),
  *("7, -2, \\text{ and } -5", ".1, 4.0", "\\frac{1}{2}, \\frac{3}{4}", "\\sqrt{2}, -\\sqrt{2}", "\\pm 2021"),
  *("3 \\pm 2\\sqrt{2}", "\\{1, 2, 3\\}", "\\{1\\pm\\sqrt{5},-2\\}", "(3, -4, 12)", "[0, 1)", "(-\\infty, 3]"),
  *("(2, 12) \\cup (12, 102)", "\\{-1\\} \\cup [0, 7)", "\\mathbb{R} \\setminus \\{-1, 4\\}", "(2,1),(3,1)"),
  *("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 5 \\\\ -7 \\end{pmatrix}", "100, 200, 300"),
  *("\\langle 1, 2, 3 \\rangle", "3\\mathbf{i} + 4\\mathbf{j}", "12:30", "2:3", "3:4:5", "$5, $10", "10\\%, 20\\%"),
  *("5 \\text{ apples}, 6 \\text{ pears}", "(3, \\frac{\\pi}{2})", "60^\\circ, 120^\\circ", "5 cm", "12 m/s"),
  *("9.8 m/s^2", "30^\\circ", "25 \\%", "$18.90", "15\\mbox{ cm}^2", "6 \\text{ hours}", "6.02e23", "1.6e-19 C"),
  *("1.25 million", "2 \\frac{1}{2} cups", "1 1/2 hours", "0.64 N", "16386.20", "12345678", "-\\frac{7}{3}"),
  *("\\frac{3\\sqrt{3}}{4}", "\\sqrt[3]{5}", "11z^7(11z^7+5)", "\\frac{8-7x}{6}", "(2x+3)(2x-1)(2x+1)", "\\sin(2x)"),
  *(
    "3e^{2t}",
    "\\ln 2",
    "\\log_2 8",
    "2^{100}",
    "\\binom{7}{3}",
    "4210_7",
    "6 - 5i",
    "x_1 + 2x_2",
    "\\lfloor 3x \\rfloor",
  ),
  *("0.1\\overline{6}", "\\frac{37}{4} m", "x^2 y^3", "\\sum_{k=1}^{10} k^2", "\\arcsin \\frac{1}{3}", "Q3", "Room 12"),
]


def test_changed_references():
  """Each reference is right as it stands; of all changes of one thing none is accepted."""
  rng = random.Random(0)
  assert [reference for reference in REFERENCES if not is_right(reference, reference)] == []
  changed = [(text, reference) for reference in REFERENCES for _, text in changes(reference, rng)]
  assert len(changed) > 500
  assert [pair for pair in changed if is_right(*pair)] == []


# --- properties ---

LETTERS = st.sampled_from("abxy")
LEAVES = st.one_of(st.integers(1, 99).map(str), LETTERS)


def _compound(inner):
  return st.one_of(
    st.tuples(inner, inner).map(lambda pair: f"({pair[0]} + {pair[1]})"),
    st.tuples(inner, inner).map(lambda pair: f"({pair[0]} - {pair[1]})"),
    st.tuples(inner, inner).map(lambda pair: f"{pair[0]} \\cdot {pair[1]}"),
    st.tuples(inner, inner).map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"),
    inner.map(lambda text: f"({text})^2"),
    inner.map(lambda text: f"\\sqrt{{{text}}}"),
    inner.map(lambda text: f"\\sin({text})"),
  )


EXPRESSIONS = st.recursive(LEAVES, _compound, max_leaves=6)


@settings(max_examples=30, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_a_verdict_is_symmetric(left, right):
  assert bool(equal(left, right)) == bool(equal(right, left))


@settings(max_examples=30, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_sums_and_products_may_be_written_either_way(left, right):
  """Wherever they have a value at all."""
  try:
    if not expressions.same(*(latex.read(f"{left} + {right}") for _ in range(2))):
      return
  except latex.UnreadableError:
    return
  assert equal(f"{left} + {right}", f"{right} + {left}")
  assert equal(f"({left}) \\cdot ({right})", f"({right}) ({left})")


@settings(max_examples=30, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9), st.integers(1, 9))
def test_products_are_expanded(a, b, c, d):
  product, expanded = f"({c}x + {a})({d}x + {b})", f"{c * d}x^2 + {c * b + a * d}x + {a * b}"
  assert equal(product, expanded)
  assert not equal(product, f"{c * d}x^2 + {c * b + a * d}x + {a * b + 1}")
  assert equal(f"{product} = 0", f"{expanded} = 0")
  assert not equal(f"{product} = 0", f"{expanded} = 1")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=6), st.randoms())
def test_lists_have_no_order_but_all_their_items(items, rng):
  shuffled = rng.sample(items, len(items))
  assert equal(", ".join(map(str, shuffled)), ", ".join(map(str, items)))
  assert not equal(", ".join(map(str, [*items, 77])), ", ".join(map(str, items)))
  changed = [*items[:-1], items[-1] + 1]
  assert bool(equal(", ".join(map(str, changed)), ", ".join(map(str, items)))) == (sorted(changed) == sorted(items))


@settings(max_examples=30, deadline=None)
@example(999_999_999_999_999_916_663_579_392_414, 0, 1)
@example(10**99, 0, 1)
@given(st.integers(1, 10**30), st.integers(0, 29), st.integers(1, 9))
def test_a_digit_of_a_number_counts(number, place, step):
  changed = number + step * 10**place
  assert not equal(str(number), str(changed))
  assert not equal(f"{number}x", f"{changed}x")
  assert not equal(f"y = {number}x + z", f"y = {changed}x + z")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789abxyz+-*/^_=<>.,;:()[]{}|\\$ \n!'%√²∞°", max_size=40))
def test_any_text_has_a_verdict(text):
  assert isinstance(equal(text, "\\frac{1}{2}"), str)
  assert isinstance(equal("x = 2", text), str)
  if text.strip():
    assert equal(text, text)


# --- one spelling, names, units ---


@pytest.mark.parametrize(
  "piece",
  [
    "1",
    "a",
    "ab ",
    "\\frac",
    "\\frac{1}",
    "(",
    "f(",
    "{",
    "x_",
    "1,",
    "1.",
    "-",
    "\\alpha",
    "\\text{ab ",
    "$a$ ",
    "= ",
    "1 ",
  ],
)
def test_no_text_takes_a_time_that_doubles_with_its_length(piece):
  """A pattern that can take the same characters in several ways would never be done with these."""
  long = piece * (240 // len(piece))
  for text in (long, f"{long}!", f"{long}= x", f"x = {long}(1"):
    assert not equal(text, "x = 1 = 2")
    assert not equal(text, "f(x) = ab")


def test_spelling():
  assert normalized("\\[ \\left( \\dfrac{1}{2} , x \\right) . \\]") == "( \\dfrac{1}{2} , x )"
  assert normalized("0.1\\overline{6}") == "\\frac{1}{6}"
  assert normalized("{x_{1}}") == "x_{1}"
  assert normalized("\\\\frac{1}{2}") == "\\frac{1}{2}"


@pytest.mark.parametrize(
  "name", ["x", "a_{n}", "I_{\\max}", "f(x)", "f(2)", "P(A|B)", "\\Delta p", "ABC", "Area", "y'"]
)
def test_names(name):
  assert equivalence.is_name(name)


@pytest.mark.parametrize("text", ["2x", "m + n", "x^2", "f(x) + 1", "\\frac{1}{2}", "", "3"])
def test_no_names(text):
  assert not equivalence.is_name(text)


@pytest.mark.parametrize(
  ("one", "other", "same"),
  [("5 cm", "50 mm", True), ("2 h", "7200 s", False), ("36 km/h", "10 m/s", True), ("1 kWh", "3.6 MJ", True),
   ("1 m", "1 s", False), ("20 °C", "293 K", False), ("3 dollars", "300 cents", True)],
)  # fmt: skip
def test_conversions(one, other, same):
  """A lone h is no hour, and temperatures have no common zero."""
  left, right = numbers.parse(one), numbers.parse(other)
  assert bool(left and right and numbers.same(left, right)) is same


# --- math-verify ---

SLOW = [
  ("\\int_0^1 x^3 dx", "\\frac14", True),
  ("\\int_0^1 x^3 dx", "\\frac15", False),
  ("\\sum_{k=1}^{n} k^2", "\\frac{n(n+1)(2n+1)}{6}", True),
  ("\\sum_{k=1}^{n} k^2", "\\frac{n(n+1)(2n+3)}{6}", False),
  ("\\lim_{x \\to 0} \\frac{\\sin 3x}{x}", "3", True),
  ("\\lim_{x \\to 0} \\frac{\\sin 3x}{x}", "2", False),
  ("\\frac{d}{dx} x^3", "3x^2", True),
  ("\\frac{d}{dx} x^3", "3x^3", False),
]


def test_verdicts_do_not_depend_on_what_was_asked_before():
  """A process that has seen nothing says what one says that has seen all, in any order."""
  rng = random.Random(0)
  for _ in range(2):
    process = mathverify.MathProcess()
    for answer, reference, verdict in rng.sample(SLOW, len(SLOW)):
      assert process.ask(answer, reference) is verdict, (answer, reference)
    assert process.timeouts == 0


@pytest.mark.parametrize(
  ("replies", "equal_at_last", "late"), [(["late", "equal"], True, 0), (["late", "late"], False, 1)]
)
def test_a_pair_that_is_late_is_asked_again(monkeypatch, replies, equal_at_last, late):
  process = mathverify.MathProcess()
  said = iter(replies)
  monkeypatch.setattr(process, "_ask", lambda answer, reference: next(said))
  assert process.ask("x", "y") is equal_at_last
  assert process.timeouts == late


def test_own_reader_needs_no_process(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError(args)

  monkeypatch.setattr(subprocess, "Popen", refuse)
  assert equal("(x+1)^2", "x^2+2x+1")
  assert not equal("(x+1)^2", "x^2+2x+2")
