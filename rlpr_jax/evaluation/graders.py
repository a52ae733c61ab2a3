"""Rule verifiers: whether an answer is right, told from texts alone.

No text makes them raise or hang: what cannot be understood is wrong. They serve evaluation, rewards by rule and the
measuring of other rewards; RLPR itself needs none of them.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import threading

from rlpr_jax import splicing
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError

VERIFIERS = ("exact", "multiple_choice", "math", "builtin")
MATH_LIMIT = 1000  # characters of an expression; a longer one is wrong


def verify(kind: str, response_text: str, reference: str, question: str = "") -> bool:
  """Whether the content of a response's `<answer>` is right; a response without one is wrong.

  Args:
    kind: `exact`: the reference, but for case and runs of whitespace; `multiple_choice`: the same option; `math`: an
      equal expression; `builtin`: the same content for a built-in sentence question, `exact` for all else.
    question: text of the question, which lists the options, or is a built-in one.
  """
  if kind not in VERIFIERS:
    raise InputError(f"verifier {kind!r}: expected one of {', '.join(VERIFIERS)}")
  answer = splicing.extract_answer(response_text)
  if answer is None:
    return False
  match kind:
    case "multiple_choice":
      return multiple_choice(answer, reference, question)
    case "math":
      return math(answer, reference)
    case "builtin" if (right := builtin.grade(question, answer)) is not None:
      return right
  return exact(answer, reference)


def exact(answer: str, reference: str) -> bool:
  """Whether two texts are the same but for case and runs of whitespace."""
  return _plain(answer) == _plain(reference)


def multiple_choice(answer: str, reference: str, question: str = "") -> bool:
  """Whether an answer names the option that the reference names.

  Both may be a letter ("B", "(B)", "B.", "B. Paris", "the answer is B", "\\boxed{B}") or the text of an option that the
  question lists ("A. Rome B. Paris", in one line or many). An answer that names several options is wrong. A reference
  that names none is compared as by `exact`.
  """
  options = _options(question)
  label = _label(reference, options)
  return exact(answer, reference) if label is None else _label(answer, options) == label


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
  return _judge.ask(answer, reference)


def _plain(text: str) -> str:
  return " ".join(text.lower().split())


# --- multiple choice ---

_MARK = re.compile(r"(?:(?<=\s)|^)\(?([A-Za-z])[.):](?=\s)", re.MULTILINE)
_WRAPPED = re.compile(  # braces may nest once
  r"\\(?:boxed|text|textbf|mathrm|mathbf) ?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\$([^$]*)\$|\*\*([^*]*)\*\*|\\\((.*)\\\)"
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:,]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\) ?|([A-Za-z])[.):] )(.*)")
# A letter in a sentence: a small one, which may be the article "a", only where the sentence or a bracket ends; none
# that another one follows ("A or B").
_NAMED = (
  r"(?:\\boxed\{|\\text\{|[*($ ]){0,6}+([A-Z]|[a-z](?=[).,;:}*$]|$))(?![A-Za-z'])(?!\)? ?(?:or|and|,|/|&) ?\(?[A-Z]\b)"
)
_PHRASES = tuple(
  re.compile(lead + _NAMED)
  for lead in (
    r"\\boxed ?(?=\{)\{",
    "(?i:answer)(?i: is| would be| must be)? ?[:=]?",
    "(?i:option|choice)(?i: is)? ?:?",
  )
)


def _options(question: str) -> dict[str, str]:
  """Letter -> text of the options that a question lists: the last run of marks A, B, ... of two or more."""
  run, best = [], []
  for mark in _MARK.finditer(question):
    letter = mark[1].upper()
    if letter == "A":
      run = [mark]
    elif run and ord(letter) == ord(run[-1][1].upper()) + 1:
      run.append(mark)
    best = run if len(run) > 1 else best
  ends = [mark.start() for mark in best[1:]] + [len(question)]
  texts = [question[mark.end() : end].strip() for mark, end in zip(best, ends, strict=True)] if best else []
  if texts:
    texts[-1] = texts[-1].partition("\n")[0]
  return {mark[1].upper(): _bare(text) for mark, text in zip(best, texts, strict=True)}


def _label(text: str, options: dict[str, str]) -> str | None:
  """The letter of the one option that a text names, or None."""
  text = _unwrap(text)
  if letter := _LETTER.fullmatch(text):
    return letter[1].upper()
  same = [label for label, option in options.items() if option == _bare(text)]
  if same:
    return same[0] if len(same) == 1 else None
  if found := _LETTER_AND_TEXT.fullmatch(text):
    label, rest = (found[1] or found[2]).upper(), _bare(found[3])
    return None if rest in {option for other, option in options.items() if other != label} else label
  for phrase in _PHRASES:
    labels = {found[1].upper() for found in phrase.finditer(text)}
    if labels:
      return labels.pop() if len(labels) == 1 else None
  return None


def _unwrap(text: str) -> str:
  """The text without the markup around the whole of it."""
  text = " ".join(text.split())
  for _ in range(4):
    found = _WRAPPED.fullmatch(text)
    if not found:
      break
    text = next(inner for inner in found.groups() if inner is not None).strip()
  return text


def _bare(text: str) -> str:
  return _plain(_unwrap(text)).rstrip(".;,")


# --- mathematics ---


class _Judge:
  """The process in which math-verify works, started when it is first needed and again after each time it was killed."""

  def __init__(self):
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None

  def ask(self, answer: str, reference: str) -> bool:
    with self._lock:
      if self._process is None:
        self._process = self._start()
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

  def _start(self) -> subprocess.Popen:
    if importlib.util.find_spec("math_verify") is None:
      raise InputError("verifier math: math-verify is not installed, expected `pip install math-verify==0.9.0`")
    # Its source and no module: it imports neither JAX nor this package. A session of its own, so that an interrupt from
    # the keyboard leaves it alone; it ends when its input does.
    process = subprocess.Popen(
      [sys.executable, "-P", "-c", f"{inspect.getsource(_judge_pairs)}\n_judge_pairs()"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    if process.stdout.readline() != "ready\n":
      process.communicate()
      raise RuntimeError(f"math-verify did not start: exit status {process.returncode}, see above")
    return process


_judge = _Judge()


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

  def stop(*_):
    raise TooSlow

  def limit(seconds: float) -> None:
    """Of computing: first comes an exception and, where that has to wait for C code, the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.5 * seconds)

  def read(text: str) -> list:
    """An expression without delimiters is LaTeX, unless words show that it is a sentence or has a unit."""
    if re.search(r"\$|\\boxed|\\\(|\\\[", text):
      return parse(text, parsing_timeout=None)
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)\b", r" \\cdot 10^{\1}", text)  # 1.5e3
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])", r"\\\1", text)
    words = re.findall(r"(?<![\\A-Za-z{])[A-Za-z]{3,}", text)
    sentence = "\\" not in text and (len(words) > 1 or re.fullmatch(r"\s*[-+]?[\d.,/]+\s+[A-Za-z]{3,}[\s.]*", text))
    return (not sentence and parse(f"${text}$", parsing_timeout=None)) or parse(text, parsing_timeout=None)

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
  answers, sys.stdout, sys.stderr = sys.stdout, None, None  # what prints goes nowhere
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
