"""What the rule verifiers call right and wrong, pair by pair, and that no text makes them raise or hang."""

import os
import subprocess
import sys
import threading
import time

import pytest

from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders, mathverify
from tests.grading.pairs import MATH

# (answer, reference, right)
EXACT = [
  ("42", "42", True),
  (" 42\n", "42", True),
  ("42", "\t42 ", True),
  ("New York", "new york", True),
  ("NEW  YORK", "New York", True),
  ("new\nyork", "New York", True),
  ("new\u00a0york", "New York", True),
  ("\u2003new york", "New York", True),
  ("É", "é", True),
  ("ß", "ß", True),
  ("日本", "日本", True),
  ("日 本", "日  本", True),
  ("-1", "-1", True),
  ("x^2", "x^2", True),
  ("(B)", "(b)", True),
  ("\\frac{1}{2}", "\\frac{1}{2}", True),
  ("a.", "A.", True),
  ("3g 4s", "3g  4s", True),
  ("<b>", "<B>", True),
  ("", "", True),
  ("  ", "", True),
  ("", "42", False),
  ("42", "", False),
  ("41", "42", False),
  ("42.", "42", False),
  ("42.0", "42", False),
  ("142", "42", False),
  ("4 2", "42", False),
  ("42 42", "42", False),
  ("newyork", "New York", False),
  ("new-york", "New York", False),
  ("york new", "New York", False),
  ("the new york", "New York", False),
  ("e", "é", False),
  ("B", "(B)", False),
  ("$42$", "42", False),
  ("\\boxed{42}", "42", False),
  ("1/2", "\\frac{1}{2}", False),
  ("1,000", "1000", False),
  ("+1", "1", False),
  ("\u221242", "-42", False),  # another minus
  ("new\u200byork", "new york", False),
  ("new\u200byork", "newyork", False),
  ("日", "日本", False),
  ("none", "None of them", False),
]

INLINE = "Which city is the capital of France? A. Rome B. Paris C. New York D. Berlin"
LINES = "Which city is the capital of France?\n(A) Rome\n(B) Paris\n(C) New York\n(D) Berlin\nAnswer with a letter."
SMALL = "pick one\na) $x^2$\nb) $2x$\nc) 7.5\nd) the dog; e.g. A. dog"
LETTERS = "Which vitamin helps?\nA. C\nB. D\nC. A\nD. K"
TWICE = "Choose.\nA. yes\nB. no\nC. yes"
TEN = "Pick.\n" + "\n".join(f"{letter}. number {i}" for i, letter in enumerate("ABCDEFGHIJ"))

# (answer, reference, question, right)
MULTIPLE_CHOICE = [
  ("B", "B", "", True),
  ("b", "B", "", True),
  (" B \n", "B", "", True),
  ("(B)", "B", "", True),
  ("B.", "B", "", True),
  ("B)", "B", "", True),
  ("(b).", "B", "", True),
  ("B", "(B)", "", True),
  ("B", "b.", "", True),
  ("**B**", "B", "", True),
  ("$B$", "B", "", True),
  ("$\\text{B}$", "B", "", True),
  ("\\boxed{B}", "B", "", True),
  ("\\boxed{\\text{B}}", "B", "", True),
  ("$\\boxed{(B)}$", "B", "", True),
  ("\\(B\\)", "B", "", True),
  ("So we find \\boxed{B}.", "B", "", True),
  ("The answer is B", "B", "", True),
  ("the answer is b.", "B", "", True),
  ("The answer is (B).", "B", "", True),
  ("The answer is: **B**", "B", "", True),
  ("the answer is $\\boxed{B}$", "B", "", True),
  ("Answer: B", "B", "", True),
  ("ANSWER:  B", "B", "", True),
  ("The answer is option B", "B", "", True),
  ("The correct option is (B) because it is larger", "B", "", True),
  ("Option B", "B", "", True),
  ("Option A is wrong, so the answer is B", "B", "", True),
  ("B. Paris", "B", "", True),
  ("(B) Paris", "B", INLINE, True),
  ("B: Paris", "B", LINES, True),
  ("Paris", "B", INLINE, True),
  ("paris.", "B", LINES, True),
  ("**Paris**", "B", LINES, True),
  ("New  York", "C", INLINE, True),
  ("Berlin", "D", INLINE, True),
  ("Berlin", "D", LINES, True),
  ("B", "Paris", LINES, True),
  ("(B) Paris", "Paris", LINES, True),
  ("x^2", "A", SMALL, True),
  ("$2x$", "(b)", SMALL, True),
  ("7.5", "C", SMALL, True),
  ("C", "C", LETTERS, True),  # a letter is a label before it is a text
  ("A", "A", LETTERS, True),
  ("J", "J", TEN, True),
  ("number 9", "J", TEN, True),
  ("no", "B", TWICE, True),
  ("yes", "yes", "", True),  # no letter, no options: as exact
  ("A", "B", "", False),
  ("", "B", "", False),
  ("(A)", "B", "", False),
  ("BB", "B", "", False),
  *((text, "B", "", False) for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "(B) (C)")),
  *((text, "B", LINES, False) for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "B. Paris or Rome")),
  ("B. $\\text{Paris}$", "B", LINES, True),
  ("B. Paris, because it is", "B", LINES, True),
  ("A, B", "B", "", False),
  ("A or B", "B", "", False),
  ("The answer is A or B", "B", "", False),
  ("The answer is B or A", "B", "", False),
  ("The answer is A. No, the answer is B", "B", "", False),
  ("The answer is not B", "B", "", False),
  ("The answer is a dog", "A", "", False),
  ("A dog", "A", "", False),
  ("Because", "B", "", False),
  ("C.elegans", "C", "", False),
  ("e.g. this", "E", "", False),
  ("The answer is Berlin", "B", "", False),
  ("\\boxed{A}", "B", "", False),
  ("\\boxed{A} or \\boxed{B}", "B", "", False),
  ("Rome", "B", INLINE, False),
  ("Paris", "A", LINES, False),
  ("Paris", "B", "", False),  # no options to look it up in
  ("London", "B", LINES, False),
  ("B. Rome", "B", LINES, False),  # names two options
  ("A. Paris", "B", LINES, False),
  ("Paris or Rome", "B", LINES, False),
  ("number 8", "J", TEN, False),
  ("yes", "A", TWICE, False),  # which of the two?
  ("no", "yes", "", False),
  ("B", "yes", "", False),
]

GAP, LATE, ORDER = (
  "ann 17 cats, bob 31. who has more?",
  "bus due 7:40, 25 min late. when?",
  "run after tea. nap before tea. order?",
)
MORE, COMES, FIRST = "bob has 14 more cats than ann", "the bus comes at 8:05", "nap, then tea, then run"
# (answer, reference, question, right)
BUILTIN = [
  (MORE, MORE, GAP, True),
  ("ann trails bob by 14", MORE, GAP, True),
  ("bob is 14 up on ann", MORE, GAP, True),
  ("Bob leads Ann by 14 cats.", MORE, GAP, True),
  ("ann has 14 cats fewer than bob", "anything", GAP, True),  # the question says what is right
  ("ann is 14 below bob", MORE, f"{GAP}\n", True),
  ("at 5 past 8 it comes", COMES, LATE, True),
  ("it will be here at 8:05", COMES, LATE, True),
  ("expect it at 8:05", COMES, LATE, True),
  ("the bus pulls in at 5 past 8", COMES, LATE, True),
  ("THE BUS TURNS UP AT 8:05!", COMES, LATE, True),
  ("run follows tea, which follows nap", FIRST, ORDER, True),
  ("first nap, then tea, next run", FIRST, ORDER, True),
  ("nap is before tea, next run", FIRST, ORDER, True),
  ("132", "132", "47+85", True),
  ("1g  7s", "1g 7s", "3*4+5 coins", True),
  ("Fri", "fri", "wed+23", True),
  ("two", "two", "e in sleet", True),
  ("17", "17", "7+5-3+8", True),
  ("new york", "New York", "", True),
  (MORE, MORE, "", True),
  (MORE, MORE, "who has more?", True),
  ("ann has 14 more cats than bob", MORE, GAP, False),
  ("bob trails ann by 14", MORE, GAP, False),
  ("bob has 13 more cats than ann", MORE, GAP, False),
  ("bob has 14 more pens than ann", MORE, GAP, False),
  ("bob has 14 more cats than eve", MORE, GAP, False),
  ("eve trails bob by 14", MORE, GAP, False),
  ("bob has not 14 more cats than ann", MORE, GAP, False),
  ("14", MORE, GAP, False),
  ("", MORE, GAP, False),
  ("bob has 24 more cats than ann", "bob has 24 more cats than ann", GAP, False),  # a wrong reference is no help
  ("the bus comes at 7:05", COMES, LATE, False),
  ("the bus comes at 8:15", COMES, LATE, False),
  ("the cab comes at 8:05", COMES, LATE, False),
  ("it comes at 8 past 5", COMES, LATE, False),
  ("bus", COMES, LATE, False),
  ("nap, then run, then tea", FIRST, ORDER, False),
  ("nap follows tea, which follows run", FIRST, ORDER, False),
  ("nap, then tea", FIRST, ORDER, False),
  ("nap tea run", FIRST, ORDER, False),
  ("133", "132", "47+85", False),
  ("132.", "132", "47+85", False),
  ("1g 7s 0", "1g 7s", "3*4+5 coins", False),
  ("thu", "fri", "wed+23", False),
  ("ann trails bob by 14", MORE, "", False),
  ("ann trails bob by 14", MORE, "who has more?", False),
]
PAIRS = {
  "exact": [(answer, reference, "", right) for answer, reference, right in EXACT],
  "multiple_choice": MULTIPLE_CHOICE,
  "math": [(answer, reference, "", right) for answer, reference, right in MATH],
  "builtin": BUILTIN,
}


@pytest.mark.parametrize("kind", graders.VERIFIERS)
def test_pairs(kind):
  """All at once, so that a failure shows every pair that is judged otherwise."""
  assert len(PAIRS[kind]) == len({pair[:3] for pair in PAIRS[kind]}) >= 40
  missed = []
  for answer, reference, question, right in PAIRS[kind]:
    found = graders.verify(kind, f"<think> hm </think> <answer> {answer} </answer>", reference, question)
    assert type(found) is bool
    if found is not right:
      missed.append((answer, reference, question, found))
  assert missed == []


def test_functions_take_the_answer_itself():
  for answer, reference, right in EXACT:
    assert graders.exact(answer, reference) is right
  for answer, reference, question, right in MULTIPLE_CHOICE:
    assert graders.multiple_choice(answer, reference, question) is right
  for answer, reference, right in MATH[:5]:
    assert graders.math(answer, reference) is right


@pytest.mark.parametrize("kind", graders.VERIFIERS)
@pytest.mark.parametrize(
  ("text", "right"),
  [
    ("<think> 6*7 </think> <answer> 42 </answer>", True),
    ("<answer>42</answer>", True),
    ("<answer>\n42\n\n</answer>", True),
    ("<answer> 42 </answer> <answer> 41 </answer>", True),  # the first one counts
    ("</answer> <answer> 42 </answer>", True),
    ("<answer> 41 </answer> <answer> 42 </answer>", False),
    ("<answer> 42", False),  # never closed
    ("42 </answer>", False),
    ("42", False),
    ("", False),
    ("<answer></answer>", False),
    ("<answer> 142 </answer>", False),
    ("<Answer> 42 </Answer>", False),
  ],
)
def test_the_content_of_answer_is_judged(kind, text, right):
  assert graders.verify(kind, text, "42") is right


def test_unknown_kind():
  with pytest.raises(InputError, match="'judge': expected one of exact, multiple_choice, math, builtin"):
    graders.verify("judge", "<answer> 42 </answer>", "42")


BRACES = "{" * 400
HOSTILE = {
  "empty": "",
  "blank": " \n\t ",
  "letters": "x" * 100_000,
  "capitals": "A" * 100_000,
  "digits": "9" * 100_000,
  "spaces": "a" + " " * 100_000 + "b",
  "brackets": "(" * 100_000,
  "answers": "answer " * 15_000,
  "answer and brackets": "answer is " + "(" * 100_000,
  "answer and spaces": "answer is" + " " * 100_000,
  "boxes": "\\boxed{" * 15_000 + "}" * 15_000,
  "few boxes": "\\boxed{" * 100 + "1" + "}" * 100,
  "options": "A. x " * 20_000,
  "deep braces": BRACES + BRACES.replace("{", "}"),
  "open braces": BRACES,
  "deep fractions": "\\frac{1" * 120,
  "roots": "\\sqrt{" * 150 + "2" + "}" * 150,
  "carets": "^" * 900,
  "powers": "2" + "^{2" * 200 + "}" * 200,
  "sum": "+".join(["x"] * 450),
  "long product": "(x+1)(y-1)" * 90,
  "dollars": "$" * 900,
  "half of a tag": "</answer",
  "tags": "<think><answer>" * 50 + "</think>" * 50,
  "surrogate": "\ud800\udfff 4\ud83d",
  "zero width": "4\u200b2\u200d\ufeff",
  "control": "\x00\x01\x1b[2J\x7f",
  "line ends": "4\u2028 2\u2029\x85\x0c",
  "other digits": "٤٢ 四十二 ²½",
  "right to left": "\u202e42\u202c",
  "not a number": "nan",
  "infinity": "\\infty - \\infty",
  "division by zero": "1/0",
  "json": '"]\n["1", "1"]',
  "code": "__import__('os').system('echo 41')",
}


def check_wrong_within_a_second(kind, answer, reference, question):
  """Of three tries, and longer where more processes want to run than there are CPUs."""
  for _ in range(3):
    start = time.monotonic()
    assert graders.verify(kind, f"<think></think><answer> {answer} </answer>", reference, question) is False
    if time.monotonic() - start < max(1.0, os.getloadavg()[0] / os.cpu_count()):
      return
  raise AssertionError(f"{kind} took more than a second")


@pytest.mark.parametrize("kind", graders.VERIFIERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_wrong_at_once(name, kind):
  graders.math("1", "2")  # math-verify is up
  text = HOSTILE[name]
  for reference, question in (("42", ""), ("B", LINES), (MORE, GAP)):
    check_wrong_within_a_second(kind, text, reference, question)
  for answer, reference, question in (("7", text, ""), ("7", "42", text), ("the answer is C", text, text)):
    check_wrong_within_a_second(kind, answer, reference, question)


@pytest.mark.parametrize("text", ["9^{9^{9^{9}}}", "2^{10^{12}}", "(10^9)!", "9**9**9**9", "\\sqrt{7^{7^{7^{7}}}+1}"])
def test_computations_without_end(text):
  """They cost seconds at most, also where only killing the process ends them, and those after them are judged."""
  graders.math("1", "2")
  start = time.monotonic()
  assert graders.math(text, "42") is False
  assert graders.math("42", text) is False
  assert graders.math("84/2", "42") is True
  assert graders.math("84/2", "43") is False
  assert time.monotonic() - start < 60


def test_any_thread_may_ask():
  """Each gets the verdict on its own pair."""
  found = {}

  def ask(number):
    found[number] = [graders.math(f"{number}/2", f"0.5*{i}") for i in range(4)]

  threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {number: [i == number for i in range(4)] for number in range(4)}


def test_math_verify_that_is_missing(monkeypatch):
  monkeypatch.setattr(mathverify, "process", mathverify.MathProcess())
  monkeypatch.setattr(mathverify.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"math-verify is not installed, expected pip install 'rlpr_jax\[evaluate\]'"):
    graders.math("1/2", "0.5")
  assert graders.math("42", "42")  # needs none


def test_math_verify_that_does_not_start(monkeypatch):
  monkeypatch.setattr(mathverify, "process", mathverify.MathProcess())
  monkeypatch.setattr(mathverify.sys, "executable", "/bin/false")
  with pytest.raises(RuntimeError, match="did not start: exit status 1"):
    graders.math("\\sum_{k=1}^n k", "n(n+1)/2")


def test_sympy_stays_out_of_this_process():
  """It takes a second to import, and nothing but the process that judges needs it."""
  code = """
import sys
from rlpr_jax.grading import graders
before = "sympy" in sys.modules
assert graders.math("1/2", "0.5")
assert before or "sympy" not in sys.modules
assert "math_verify" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_builtin_judges_every_wording():
  for example in builtin.examples("held_out", 90, 0, "all"):
    question = example.messages[0]["content"]
    meant = builtin.meaning(question)
    for answer in builtin.wordings(meant) if meant else [example.reference]:
      assert graders.verify("builtin", f"<answer> {answer} </answer>", example.reference, question)
      assert not graders.verify("builtin", f"<answer> {answer} 7 </answer>", example.reference, question)
