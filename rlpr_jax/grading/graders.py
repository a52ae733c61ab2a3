r"""Graders: whether an answer is right, told from texts alone.

`verify` judges the content of `<answer>`, for rewards by rule and the measuring of other rewards; RLPR itself needs
none. `grade` judges a response to a benchmark's question by that benchmark's rules, and says why. Whether an answer
names an option, or is an equal expression, is asked of the same functions by both. `is_right` judges a response to a
held-out question of a policy in training, by the one or the other.

No text makes them raise or hang: what cannot be understood is wrong.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import NamedTuple

from rlpr_jax import splicing
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.grading import extraction, numbers
from rlpr_jax.grading.inference import as_question
from rlpr_jax.grading.multiple_choice import label_of, letter, options_of, split_label, unwrap
from rlpr_jax.grading.question import Question
from rlpr_jax.grading.texts import DASHES, compatible, hidden, plain, shown

VERIFIERS = ("exact", "multiple_choice", "math", "builtin")
HELD_OUT_VERIFIERS = ("exact", "multiple_choice", "math", "number", "inferred", "builtin")
MATH_LIMIT = 1000  # characters of an expression; a longer one is wrong
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
  """Whether two mathematical expressions are equal, in LaTeX or plain text, as math-verify tells.

  It works in a process of its own, since sympy may compute for hours, or eat the memory, where no exception and no
  signal handler of Python can end it: 9^{9^{9^9}}. What takes half a second is wrong.

  Raises:
    InputError: math-verify is not installed.
  """
  if exact(answer, reference):
    return True
  if not answer.strip() or max(len(answer), len(reference)) > MATH_LIMIT:
    return False
  return math_process.ask(answer, reference)


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
  answer, path = extraction.extract(text, question.grader)
  if not answer:
    return Grade(False, None, path, "no answer")
  if len(answer) > ANSWER_LIMIT:
    return Grade(False, answer, path, "too long")
  why = graders[question.grader](answer, question)
  return Grade(bool(why), answer, path, why or "differs")


# "B because it is larger", but not "B, C".
_REASONED = re.compile(r"[(\s]{0,4}([A-Z])\)?(?:[,;](?! ?\(?[A-Z]\b)| (?:because|since|as|which|is)\b)")
_FIRST_LETTER = re.compile(
  r"\s*(?:[\[{<]|\\(?:text|mathrm|textbf|mathbf)\{)\(?([A-Za-z])\)?[\]}>]|\s*([A-Z])(?= [-:] )"
)


# Each of these four says why an answer is right, or "" where it is not.


def _grade_choice(answer: str, question: Question) -> str:
  return _judge_choice(answer, question.reference, {letter(i): option for i, option in enumerate(question.options)})


def _judge_choice(answer: str, reference: str, options: dict[str, str]) -> str:
  """Why an answer names the option whose letter is the reference, or "" where it does not."""
  label = label_of(answer, options)
  if label is None:
    plainer = answer.replace("**", "").replace("__", "").translate(DASHES)
    if first := _FIRST_LETTER.match(plainer):
      plainer = f"({first[1] or first[2]}) {plainer[first.end() :].lstrip(' .:-')}".strip()
    label = label_of(plainer, options)
    if label is None and (found := _REASONED.match(plainer)):
      label = found[1]
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
  ours, theirs = numbers.parse(answer), numbers.parse(reference)
  return "equal number" if ours and theirs and _same_number(ours, theirs) else ""


def _grade_number(answer: str, question: Question) -> str:
  if question.reference in ("True", "False"):
    core = _core(answer, "number").lower()[:200]
    if (leading := _LEADING_TRUTH.match(core)) and leading[1] in _TRUTH:
      return "same truth" if _TRUTH[leading[1]] == (question.reference == "True") else ""
    words = re.findall(r"[a-z]+", core)
    said = {_TRUTH[word] for word in words if word in _TRUTH}
    return "same truth" if said == {question.reference == "True"} and "not" not in words else ""
  if question.reference.startswith("["):
    values, items = numbers.parse_list(_core(answer, "number")), numbers.parse_list(question.reference)
    if values is None or items is None or len(values) != len(items):
      return ""
    pairs = zip(sorted(values), sorted(items), strict=True)
    right = all(numbers.equal(value, item, question.rtol, question.atol) for value, item in pairs)
    return _tolerance(question, "equal items") if right else ""
  theirs = numbers.parse(question.reference)
  core = _core(answer, "number")
  ours = numbers.parse(core) or numbers.lone(core)
  if ours and theirs and _same_number(ours, theirs, question.rtol, question.atol):
    return "equal number" if _same_number(ours, theirs) else _tolerance(question, "equal number")
  return ""


def _grade_math(answer: str, question: Question) -> str:
  return _judge_expression(answer, question.reference)


def _judge_expression(answer: str, reference: str) -> str:
  """Why two are equal, as text, as numbers or as mathematics, or "" where they are not."""
  if answer.split() == reference.split() != []:
    return "same expression"  # of any length
  reference, answer = shown(reference), re.sub(r"\*\*(?=[-\d({])", "^", _core(shown(answer), "math"))
  if (same := _latex(reference)) and _latex(answer) == same:
    return "same expression"
  ours, theirs = numbers.parse(answer), numbers.parse(reference)
  if theirs and theirs.equation:
    theirs = None
  if ours and theirs and isfinite(ours.value) and isfinite(theirs.value):
    units = [number.unit for number in (ours, theirs) if number.unit]
    # Letters that may be variables are for math-verify, unless both sides have the same ones.
    if all(unit.certain for unit in units) or (len(units) == 2 and units[0].same(units[1])):
      return "equal number" if _same_number(ours, theirs) else ""
  # Of what math-verify cannot parse it takes a number out: 2 would be equal to \hbar \omega (v + 1 / 2).
  for number, other in ((ours, reference), (theirs, answer)):
    if number and not number.unit and "=" not in other and _VARIABLE.search(_COMMAND.sub(" ", other)):
      return ""
  # What is left is for math-verify, which is slow, and slower to start again once it had to be killed.
  if _is_hopeless(answer) or _is_hopeless(reference):
    return ""
  if any(_UNIT_LETTERS.search(text) for text in (answer, reference)) and not _RELATION.search(answer + reference):
    answer, reference = f"{answer} + 1", f"{reference} + 1"  # it drops letters at the end that name units
  return "equal expression" if math(answer, reference) else ""


_TRUTH = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}
# "False, because it is not true", but not "True, or false".
_LEADING_TRUTH = re.compile(
  r"\W*([a-z]+)(?:[,.;:!]|(?= (?:because|since|as)\b))(?!\W*(?:or|true|yes|correct|false|no|incorrect)\b)(?=\W*[a-z])"
)
_COMMAND = re.compile(r"\\(?:text|mbox|mathrm) ?\{[^{}]*\}|\\[A-Za-z]+")
# x; 5ab; 5 ab
_VARIABLE = re.compile(
  r"(?<![A-Za-z])[a-df-zA-Z](?![A-Za-z])|(?<=\d)[A-Za-z]{2,3}(?![A-Za-z])|"
  r"(?<=\d )(?!is|in|by|as|to|if|at)[A-Za-z]{2}(?![A-Za-z])"
)
_UNIT_LETTERS = re.compile(r"[\d}] ?[A-Za-z](?: ?[A-Za-z])?$")
_RELATION = re.compile(r"[=<>,]|\\(?:[lg]eq?|neq?|in|cup|cap|text)(?![A-Za-z])")
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
  return inner if grader == "text" else inner.rstrip(". ")


def _same_number(ours: numbers.Number, theirs: numbers.Number, rtol: float = 0.0, atol: float = 0.0) -> bool:
  """Whether two are equal within the tolerances, in the same units where both have some.

  5% is also 0.05 where only one of them has a percent sign.
  """
  if ours.unit and theirs.unit and not ours.unit.same(theirs.unit):
    return False
  values = [ours.value]
  if ours.percent != theirs.percent:
    values.append(ours.value / 100 if ours.percent else ours.value * 100)
  return any(numbers.equal(value, theirs.value, rtol, atol) for value in values)


def _tolerance(question: Question, exact_words: str) -> str:
  if question.rtol:
    return f"within {question.rtol:.0%}"
  return f"within {question.atol:g}" if question.atol else exact_words


_TOKENS = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?|[^\W\d_]+|\d+|[-+*/^=<>%]")
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|left|right)(?![A-Za-z])|[$*_{}\\]")


def _same_text(answer: str, reference: str) -> bool:
  """Whether two texts have the same words, numbers and signs, in the same order.

  Where the reference has neither letters nor digits, as "> } ]", every character counts but whitespace.
  """
  if not any(c.isalnum() for c in reference):
    return bool(reference) and "".join(answer.split()) == "".join(reference.split())
  return _words(answer) == _words(reference) != []


def _words(text: str) -> list[str]:
  """Words in compatibility form, without case, articles, markup and punctuation; numbers without commas."""
  text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", _MARKUP.sub(" ", compatible(text).casefold()))
  tokens = [t.replace(",", "") if t[-1].isdigit() else t for t in _TOKENS.findall(text)] or text.split()
  return [
    token
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False)
    # "a" may also name an option: "a and d".
    if token not in ("the", "an") and not (token == "a" and len(following) > 1 and following not in ("and", "or"))
  ]


_SPELLINGS = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"[.]\s*$", ""),
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\[!,;:()\[\] ]|\$|~|\\\$", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac ?(\d) ?\{", r"\\frac{\1}{"),
    (r"\\(?:text(?:rm|bf|it)?|mbox|mathrm|mathbf|operatorname)(?![A-Za-z])\*?", ""),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])|°", ""),
    (r"\\(le|ge|ne)(?![A-Za-z])", r"\\\1q"),
    (r"(?<=[_^])\{(\w)\}", r"\1"),
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"(?<=\d)\s+(?=\d)", "~"),  # "4 2" is not 42
    (r"\s+", ""),
  )
)


def _latex(text: str) -> str:
  """One spelling of the many that an expression has in LaTeX; a word alone without case."""
  if len(text) > MATH_LIMIT:
    return ""
  for pattern, replacement in _SPELLINGS:
    text = pattern.sub(replacement, text)
  return text.lower() if len(text) > 2 and text.isalpha() else text


def _is_hopeless(text: str) -> bool:
  """Whether math-verify would not read a text, or not come to an end of it."""
  if len(text) > MATH_LIMIT or not any(c.isalnum() for c in text) or not text.isprintable():
    return True
  plain_braces = re.sub(r"\\[{}]", "", text)
  depth = deepest = 0
  for c in plain_braces:
    depth += (c == "{") - (c == "}")
    deepest = max(deepest, depth)
    if depth < 0:
      return True
  if depth or deepest > 12:
    return True
  # Towers of powers, powers and factorials of large numbers, words without end.
  return bool(_ENDLESS.search(text)) or text.count("^") > 40


_ENDLESS = re.compile(
  r"\^ ?[{(]? ?\d+ ?\^ ?[{(]? ?\d|\^ ?[{(]? ?\d{4,}|\^ ?[{(]? ?\d+ ?[)}]{0,2} ?!|\d{4,}\)? ?!|\w{60,}"
)


# --- mathematics ---


def check_installed() -> None:
  """Makes sure that mathematics can be graded.

  Raises:
    InputError: math-verify is not installed.
  """
  if importlib.util.find_spec("math_verify") is None:
    raise InputError("verifier math: math-verify is not installed, expected pip install 'rlpr_jax[evaluate]'")


class MathProcess:
  """The process in which math-verify works, started when it is first needed and again after each time it was killed."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[str] | None = None

  def ask(self, answer: str, reference: str) -> bool:
    with self._lock:
      if self._process is None:
        self._process = self._start()
      assert self._process.stdin is not None
      assert self._process.stdout is not None
      try:
        self._process.stdin.write(f"{json.dumps([answer, reference])}\n")
        self._process.stdin.flush()
        verdict = self._process.stdout.readline()
      except BrokenPipeError:
        verdict = ""
      if not verdict:  # killed by its timer
        self._process.kill()
        self._process.communicate()
        self._process = None
      return verdict == "true\n"

  def _start(self) -> subprocess.Popen[str]:
    check_installed()
    # Its source and no module: it imports neither JAX nor this package. A session of its own, so that an interrupt from
    # the keyboard leaves it alone; it ends when its input does.
    process = subprocess.Popen(
      [sys.executable, "-P", "-c", f"{inspect.getsource(_judge_pairs)}\n_judge_pairs()"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
      process.communicate()
      raise RuntimeError(f"math-verify did not start: exit status {process.returncode}, see above")
    return process


math_process = MathProcess()


def _judge_pairs() -> None:
  """Reads a JSON pair of answer and reference a line, writes true or false for each. Uses nothing of this module."""
  import json
  import logging
  import re
  import signal
  import sys

  from math_verify import parse, verify

  class TooSlow(BaseException):  # no `except Exception` on the way swallows it
    pass

  def stop(*_: object) -> None:
    raise TooSlow

  def limit(seconds: float) -> None:
    """Of computing: first comes an exception and, where that has to wait for C code, the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.5 * seconds)

  def read(text: str) -> list[object]:
    """An expression without delimiters is LaTeX, unless words show that it is a sentence or has a unit."""
    if re.search(r"\$|\\boxed|\\\(|\\\[", text):
      return parse(text, parsing_timeout=None)
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)\b", r" \\cdot 10^{\1}", text)  # 1.5e3
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])", r"\\\1", text)
    words = re.findall(r"(?<![\\A-Za-z{])[A-Za-z]{3,}", text)
    sentence = "\\" not in text and (len(words) > 1 or re.fullmatch(r"\s*[-+]?[\d.,/]+\s+[A-Za-z]{3,}[\s.]*", text))
    found = (not sentence and parse(f"${text}$", parsing_timeout=None)) or parse(text, parsing_timeout=None)
    # Of what it cannot parse it takes a number out: an integer is not all of (n + 1/2) x - 3 y.
    numerals = re.findall(r"\d+", re.sub(r"\^ ?\{? ?-?\d+", "", text))
    variables = re.search(r"(?<![\\A-Za-z])[a-df-hj-zA-Z](?![A-Za-z])", re.sub(r"\\[A-Za-z]+", " ", text))
    rest = "=" not in text and len(numerals) > 1 and variables
    return [] if rest and found and getattr(found[0], "is_Integer", False) else found

  logging.disable()
  signal.signal(signal.SIGPROF, stop)
  for text in (
    "x = 2",
    r"\frac{\sqrt{8}}{3} + \pi",
    r"(1, 2]",
    r"\{1, 2\}",
    r"\sin(x)^2",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
  ):
    verify(read(text), read(f"2 {text}"), timeout_seconds=None)  # loads what takes long the first time
  answers = sys.stdout
  sys.stdout = sys.stderr = None  # what prints goes nowhere
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    answer, reference = json.loads(line)
    try:
      limit(0.4)
      equal = bool(verify(read(reference), read(answer), timeout_seconds=None))
    except (Exception, TooSlow):  # unparsable, incomparable, too deep, too slow
      equal = False
    limit(0)
    print(json.dumps(equal), file=answers, flush=True)
