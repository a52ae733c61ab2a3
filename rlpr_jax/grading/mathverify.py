"""math-verify, asked of what our own reader does not know: sums, products, integrals, limits and derivatives.

It works in a process of its own, since sympy may compute for hours, or eat the memory, where no exception and no signal
handler of Python can end it. What it calls equal is confirmed there: both sides must also have the same variables and
the same values at some points.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import threading

from rlpr_jax.errors import InputError

LIMIT = 1000  # characters of an expression; a longer one is wrong


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
    self.timeouts = 0  # pairs that took too long, also in a second try

  def ask(self, answer: str, reference: str) -> bool:
    """Whether two expressions are equal; one that takes too long, or is not understood, is not."""
    if _is_hopeless(answer) or _is_hopeless(reference):
      return False
    with self._lock:
      verdict = self._ask(answer, reference)
      if verdict == "late":  # what it learnt of the grammar is kept, so that a second try is faster
        verdict = self._ask(answer, reference)
      self.timeouts += verdict in ("late", "killed")
      return verdict == "equal"

  def _ask(self, answer: str, reference: str) -> str:
    if self._process is None:
      self._process = self._start()
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    try:
      self._process.stdin.write(f"{json.dumps([answer, reference])}\n")
      self._process.stdin.flush()
      verdict = self._process.stdout.readline().strip()
    except BrokenPipeError:
      verdict = ""
    if not verdict:  # killed by its timer
      self._process.kill()
      self._process.communicate()
      self._process = None
    return verdict or "killed"

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


process = MathProcess()

# Towers of powers, powers and factorials of large numbers, words without end.
_ENDLESS = re.compile(
  r"\^ ?[{(]? ?\d+ ?\^ ?[{(]? ?\d|\^ ?[{(]? ?\d{4,}|\^ ?[{(]? ?\d+ ?[)}]{0,2} ?!|\d{4,}\)? ?!|\w{60,}"
)


def _is_hopeless(text: str) -> bool:
  """Whether math-verify would not read a text, or not come to an end of it."""
  if len(text) > LIMIT or not any(c.isalnum() for c in text) or not text.isprintable():
    return True
  plain_braces = re.sub(r"\\[{}]", "", text)
  depth = deepest = 0
  for c in plain_braces:
    depth += (c == "{") - (c == "}")
    deepest = max(deepest, depth)
    if depth < 0:
      return True
  return bool(depth) or deepest > 12 or bool(_ENDLESS.search(text)) or text.count("^") > 40


def _judge_pairs() -> None:
  """Reads a JSON pair of answer and reference a line, writes its verdict. Uses nothing of this module."""
  import json
  import logging
  import re
  import signal
  import sys

  from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
  from math_verify import LatexExtractionConfig, parse, verify
  from sympy import Expr, N, Symbol  # type: ignore[import-untyped]

  class TooSlow(BaseException):  # no `except Exception` on the way swallows it
    pass

  def stop(*_: object) -> None:
    raise TooSlow

  def limit(seconds: float) -> None:
    """Of computing: first comes an exception and, where that has to wait for C code, the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.5 * seconds)

  # Nothing is dropped as a unit, and nothing is taken out of a text that is not read as a whole.
  as_it_stands = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
  )
  config = (LatexExtractionConfig(normalization_config=as_it_stands),)

  def read(text: str) -> Expr | None:
    found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found and isinstance(found[0], Expr) else None

  def letters(text: str, bound: set[str]) -> set[str]:
    """The variables in a text: math-verify takes X for x."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text))) - bound - {"d", "e"}

  def confirmed(texts: list[str], sides: list[Expr]) -> bool:
    """Whether both sides have the same variables, and the same values wherever these are whole numbers."""
    bound = {str(s) for side in sides for s in side.atoms(Symbol) - side.free_symbols}
    variables = sorted(set.union(*(side.free_symbols for side in sides)), key=str)
    if letters(texts[0], bound) != letters(texts[1], bound):
      return False
    for start in (2, 3, 5) if variables else (2,):
      point = {name: start + 2 * index for index, name in enumerate(variables)}
      values = [complex(N(side.subs(point).doit(), 20)) for side in sides]
      if not abs(values[0] - values[1]) <= 1e-9 * max(map(abs, values)):  # also where one is not a number
        return False
    return True

  logging.disable()
  signal.signal(signal.SIGPROF, stop)
  for text in ("x + 2", r"\frac{\sqrt{8}}{3} + \pi", r"\int_0^1 x dx", r"\sum_{k=1}^{n} k", r"\lim_{x \to 0} \sin(x)"):
    verify(read(text), read(f"2 {text}"), timeout_seconds=None)  # loads what takes long the first time
  answers = sys.stdout
  sys.stdout = sys.stderr = None  # what prints goes nowhere
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    texts = json.loads(line)
    try:
      limit(1.0)
      sides = [read(text) for text in texts]
      known = [side for side in sides if side is not None]
      equal = len(known) == 2 and verify(known[1], known[0], timeout_seconds=None) and confirmed(texts, known)
      verdict = "equal" if equal else "different"
    except TooSlow:
      verdict = "late"
    except Exception:  # unparsable, incomparable, too deep
      verdict = "different"
    limit(0)
    print(verdict, file=answers, flush=True)
