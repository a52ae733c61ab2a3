r"""Reads one mathematical expression, in LaTeX or plain text.

A reader of our own beside math-verify's, which drops what it does not know (units, letters, all but the first value)
and so calls unequal expressions equal. This one reads all of a text or nothing.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

LIMIT = 1000  # characters of an expression; a longer one is not read
_DEPTH = 40  # of brackets, powers and functions

Node: TypeAlias = tuple[Any, ...]  # kind, then children, names and numbers


class UnreadableError(Exception):
  """The text is no expression that is read here."""


class Convention(NamedTuple):
  """What authors mean differently."""

  tight: bool  # whether 1/2x is 1/(2x) rather than x/2
  decadic: bool  # whether log is that to base 10 rather than e


CONVENTIONS = tuple(Convention(tight, decadic) for tight in (False, True) for decadic in (False, True))


_TOKEN = re.compile(
  r"\s*(?:(\d+(?:\.\d+)?(?:[eE][-+]?\d+(?![\w.]))?|\.\d+)|(\\[A-Za-z]+|[A-Za-z]|\\[{}|\\])|(\S))", re.ASCII
)
_FUNCTIONS = frozenset((
  "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "sinh",
  "cosh", "tanh", "coth", "sech", "csch", "arcsinh", "arccosh", "arctanh", "arsinh", "arcosh", "artanh", "ln", "log",
  "lg", "exp", "sqrt", "max", "min", "gcd", "lcm", "floor", "ceil", "abs", "sgn",
))  # fmt: skip
_PLAIN_WORD = re.compile(rf"(?:{'|'.join(sorted((*_FUNCTIONS, 'pi'), key=len, reverse=True))})(?![A-Za-z])", re.ASCII)
_CALLED = frozenset(("f", "g", "F", "G", "\\phi", "\\Phi", "\\psi", "\\Psi", "\\varphi"))
_GREEK = frozenset((
  "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
  "lambda", "mu", "nu", "xi", "omicron", "rho", "varrho", "sigma", "varsigma", "tau", "upsilon", "phi", "varphi",
  "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega",
  "hbar", "ell", "imath", "jmath", "nabla", "wp", "aleph", "Re", "Im", "triangle", "angle", "prime", "odot", "oplus",
  "star", "ast", "dagger", "perp", "parallel",
))  # fmt: skip
_NAMING = frozenset((
  "text", "textrm", "textbf", "textit", "textnormal", "mathrm", "mathbf", "mathit", "mathsf", "mathcal", "mathbb",
  "mathscr", "mathfrak", "boldsymbol", "bm", "mbox", "operatorname", "vec", "hat", "bar", "overline", "tilde",
  "widehat", "widetilde", "dot", "ddot", "overrightarrow", "underline", "rm",
))  # fmt: skip
_MARKED = frozenset((
  "vec", "hat", "bar", "overline", "tilde", "widehat", "widetilde", "dot", "ddot", "overrightarrow", "mathcal",
  "mathscr",
))  # fmt: skip
_PRODUCT = frozenset(("*", "\\cdot", "\\times", "\\ast", "\\bullet"))
_QUOTIENT = frozenset(("/", "\\div", ":"))
_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_BARS = {"|": "|", "\\vert": "\\vert", "\\lvert": "\\rvert", "\\mid": "\\mid"}


def read(text: str, convention: Convention = CONVENTIONS[0]) -> Node:
  r"""The expression that a whole text is.

  Raises:
    UnreadableError: it is none, or none of those known here.

  >>> read("2x")
  ('*', ('number', Fraction(2, 1), 0), ('name', 'x'))
  """
  return _Reader(text, convention).whole()


class _Reader:
  """Reads by recursive descent; each function leaves `_at` behind what it took."""

  def __init__(self, text: str, convention: Convention):
    if len(text) > LIMIT:
      raise UnreadableError
    self._tokens = list(_tokens(text))
    self._at = 0
    self._depth = 0
    self._bars: list[str] = []  # what closes the absolute values that are open
    self._convention = convention

  def whole(self) -> Node:
    node = self._sum()
    if self._at < len(self._tokens):
      raise UnreadableError
    return node

  def _peek(self) -> str:
    return self._tokens[self._at] if self._at < len(self._tokens) else ""

  def _next(self) -> str:
    if self._at == len(self._tokens):
      raise UnreadableError
    self._at += 1
    return self._tokens[self._at - 1]

  def _expect(self, token: str) -> None:
    if self._next() != token:
      raise UnreadableError

  def _nested(self, function: Callable[[], Node]) -> Node:
    self._depth += 1
    if self._depth > _DEPTH:
      raise UnreadableError
    node = function()
    self._depth -= 1
    return node

  def _sum(self) -> Node:
    terms = [self._signed()]
    while self._peek() in ("+", "-"):
      terms.append(self._signed())
    return terms[0] if len(terms) == 1 else ("+", *terms)

  def _signed(self) -> Node:
    minus = False
    while self._peek() in ("+", "-"):
      minus ^= self._next() == "-"
    term = self._product()
    return ("-", term) if minus else term

  def _product(self) -> Node:
    value = self._juxtaposed()
    while True:
      if self._peek() in _PRODUCT or self._peek() in _QUOTIENT:
        kind = "*" if self._next() in _PRODUCT else "/"
        value = (kind, value, self._operand())
      elif self._starts_factor():  # 1/2 x
        value = ("*", value, self._juxtaposed())
      else:
        return value

  def _operand(self) -> Node:
    if self._peek() in ("+", "-"):
      sign = self._next()
      operand = self._nested(self._operand)
      return ("-", operand) if sign == "-" else operand
    return self._juxtaposed() if self._convention.tight else self._factor()

  def _juxtaposed(self) -> Node:
    """Factors that stand side by side; an integer before a proper fraction is a mixed number."""
    start = self._at
    factors = [self._factor()]
    while self._starts_factor():
      before = factors[-1]
      lone_number = before[0] == "number" and self._at == start + 1
      if lone_number and self._peek()[0].isdigit():
        raise UnreadableError  # 4 2
      factor = self._factor()
      if lone_number and before[2] == 0 and _is_proper(factor):
        factors[-1] = ("+", before, factor)
      else:
        factors.append(factor)
    value = factors[0]
    for factor in factors[1:]:
      value = ("*", value, factor)
    return value

  def _starts_factor(self) -> bool:
    token = self._peek()
    if not token or (self._bars and token == self._bars[-1]):
      return False
    if token in _PRODUCT or token in _QUOTIENT:
      return False
    return token[0].isalnum() or token in _OPENING or token in _BARS or (token[0] == "\\" and _known(token[1:]))

  def _factor(self) -> Node:
    node = self._nested(self._base)
    while True:
      token = self._peek()
      if token == "!":
        self._next()
        node = ("factorial", node)
      elif token in ("\\%", "%"):
        self._next()
        node = ("/", node, _integer(100))
      elif token in ("'", "^"):
        if (marked := self._mark(node)) is not None:
          node = marked
          continue
        self._next()
        exponent = self._nested(self._exponent)
        if self._peek() == "_" and node[0] == "name" and "_" not in node[1]:  # v^2_0
          node = ("name", node[1] + self._subscript())
        node = ("^", node, exponent)
      else:
        return node

  def _mark(self, node: Node) -> Node | None:
    """What a prime, a star or a degree sign behind a factor makes of it; None where there is none of them."""
    if self._peek() == "'":
      self._next()
      mark = "'"
    else:
      rest = self._tokens[self._at + 1 : self._at + 4]
      group = rest[:1] == ["{"] and rest[2:3] == ["}"]
      mark = rest[1] if group else rest[0] if rest else ""
      if mark not in ("\\circ", "\\degree", "\\prime", "*", "\\ast", "\\star", "\\dagger", "+", "-"):
        return None
      if not group and mark in ("+", "-"):  # e^-x
        return None
      self._at += 4 if group else 2
    if mark in ("\\circ", "\\degree"):
      return "degrees", node
    if node[0] != "name":
      raise UnreadableError
    return "name", node[1] + {"\\prime": "'", "\\ast": "*"}.get(mark, mark)

  def _exponent(self) -> Node:
    if self._peek() in ("+", "-"):
      sign = self._next()
      node = self._nested(self._exponent)
      return ("-", node) if sign == "-" else node
    digits = self._peek()[:1] in set("0123456789")
    node = self._number(self._next(), based=False) if digits else self._argument(one_digit=False)
    if self._peek() == "^":  # 2^3^4
      raise UnreadableError
    return node

  def _argument(self, *, one_digit: bool) -> Node:
    r"""Reads a group, or one token, of a number its first digit where so asked: \frac43."""
    token = self._peek()
    if one_digit and token[:1].isdigit() and len(token) > 1 and token.isdigit():
      self._tokens[self._at : self._at + 1] = [token[0], token[1:]]
    return self._nested(self._base)

  def _base(self) -> Node:
    token = self._next()
    if token[-1].isdigit() and token[0] in "0123456789.":
      return self._number(token)
    if token == "{":
      node = self._nested(self._sum)
      if self._peek() == "\\choose":
        self._next()
        node = ("binomial", node, self._nested(self._sum))
      self._expect("}")
      return node
    if token in ("\\lfloor", "\\lceil"):
      node = self._nested(self._sum)
      self._expect(_OPENING[token])
      return "function", "floor" if token == "\\lfloor" else "ceil", node
    if token in _OPENING:
      bars, self._bars = self._bars, []
      node = self._nested(self._sum)
      self._bars = bars
      self._expect(_OPENING[token])
      return node
    if token == "\\begin":
      return self._matrix()
    if token in _BARS:
      self._bars.append(_BARS[token])
      node = self._nested(self._sum)
      self._expect(self._bars.pop())
      return "function", "abs", node
    name = token.removeprefix("\\")
    if name in ("frac", "dfrac", "tfrac", "cfrac"):
      above = self._argument(one_digit=True)
      return "/", above, self._argument(one_digit=True)
    if name in ("binom", "tbinom", "dbinom"):
      above = self._argument(one_digit=True)
      return "binomial", above, self._argument(one_digit=True)
    if name in _FUNCTIONS:
      return self._function(name)
    if token == "\\pi":
      return "constant", "pi"
    if token == "\\infty":
      return "constant", "infinity"
    if token == "e" and self._peek() != "_":
      return "constant", "e"
    if token == "i" and self._peek() != "_":
      return "constant", "i"
    if (len(token) == 1 and token.isalpha()) or (token[0] == "\\" and (name in _GREEK or name in _NAMING)):
      return self._name(token)
    raise UnreadableError

  def _matrix(self) -> Node:
    kind = self._environment()
    if not kind.endswith("matrix") or kind == "vmatrix":
      raise UnreadableError
    rows: list[list[Node]] = [[]]
    bars, self._bars = self._bars, []
    while True:
      rows[-1].append(self._nested(self._sum))
      token = self._next()
      if token == "\\\\":
        if self._peek() == "\\end":
          token = self._next()
        else:
          rows.append([])
      if token == "\\end":
        break
      if token not in ("&", "\\\\"):
        raise UnreadableError
    self._bars = bars
    if self._environment() != kind or len({len(row) for row in rows}) != 1:
      raise UnreadableError
    return ("matrix", len(rows), *(element for row in rows for element in row))

  def _environment(self) -> str:
    self._expect("{")
    letters = []
    while (token := self._next()) != "}":
      letters.append(token)
    return "".join(letters)

  def _number(self, token: str, *, based: bool = True) -> Node:
    if based and self._peek() == "_":  # 204_5 is no 204
      if not token.isdigit():
        raise UnreadableError
      return "name", token + self._subscript()
    mantissa, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
      raise UnreadableError
    decimals = len(mantissa.partition(".")[2].rstrip("0"))
    return "number", Fraction(mantissa) * Fraction(10) ** int(exponent or 0), max(decimals - int(exponent or 0), 0)

  def _name(self, token: str) -> Node:
    name = token
    if token.removeprefix("\\") in _NAMING and len(token) > 1:
      name = self._spelled(token)
      if name in _FUNCTIONS:
        return self._function(name)
      if name.isdigit():
        return _integer(int(name))
      if name in ("e", "i") and token == "\\mathrm" and self._peek() != "_":
        return "constant", name
    if self._peek() == "_":
      name += self._subscript()
    primes = 0
    while self._peek() == "'":
      self._next()
      primes += 1
    name += "'" * primes
    if token in _CALLED and self._peek() == "(":
      return self._call(name)
    if token == "\\Gamma" and self._peek() == "(" and name == token:
      return "function", "gamma", self._nested(self._base)
    return "name", name

  def _spelled(self, token: str) -> str:
    r"""The letters in \mathrm{abc}, with the mark itself where it makes another name of them."""
    if self._peek() == "{":
      self._next()
      letters = []
      depth = 1
      while depth:
        part = self._next()
        depth += (part == "{") - (part == "}")
        letters.append(part.removeprefix("\\") if depth and part not in "{}" else "")
      word = "".join(letters)
    else:
      word = self._next()
    if not word or not re.fullmatch(r"[\w'*\\(){},.^ +-]+", word):
      raise UnreadableError
    return f"{token}{{{word}}}" if token.removeprefix("\\") in _MARKED else word

  def _subscript(self) -> str:
    """A subscript in one spelling: without braces, spaces and fonts."""
    self._expect("_")
    token = self._next()
    parts = [token]
    if token == "{":
      depth = 1
      while depth:
        token = self._next()
        depth += (token == "{") - (token == "}")
        parts.append(token)
    elif token.removeprefix("\\") in _NAMING and token[0] == "\\" and self._peek() == "{":
      parts = []
      while not parts or parts[-1] != "}":
        parts.append(self._next())
    spelled = "".join(part for part in parts if part not in ("{", "}") and part.removeprefix("\\") not in _NAMING)
    if not spelled:
      raise UnreadableError
    return f"_{spelled}"

  def _call(self, name: str) -> Node:
    self._expect("(")
    arguments = [self._nested(self._sum)]
    while self._peek() == ",":
      self._next()
      arguments.append(self._nested(self._sum))
    self._expect(")")
    return ("call", name, *arguments)

  def _function(self, name: str) -> Node:
    if name == "sqrt":
      degree: Node = _integer(2)
      if self._peek() == "[":
        self._next()
        degree = self._nested(self._sum)
        self._expect("]")
      return "root", degree, self._argument(one_digit=True)
    base = None
    power = None
    while self._peek() in ("_", "^"):
      token = self._next()
      if token == "_" and name == "log" and base is None:
        base = self._argument(one_digit=False)
      elif token == "^" and power is None:
        power = self._nested(self._exponent)
      else:
        raise UnreadableError
    if self._peek() in ("(", "[", "{") and name in ("max", "min", "gcd", "lcm"):
      closing = _OPENING[self._next()]
      arguments = [self._nested(self._sum)]
      while self._peek() == ",":
        self._next()
        arguments.append(self._nested(self._sum))
      self._expect(closing)
      node: Node = ("function", name, *arguments)
    else:
      argument = self._function_argument()
      if name == "log":
        base = base or (_integer(10) if self._convention.decadic else ("constant", "e"))
        node = ("log", base, argument)
      elif name == "lg":
        node = ("log", _integer(10), argument)
      elif name == "exp":
        node = ("^", ("constant", "e"), argument)
      else:
        if power == ("-", _integer(1)) and name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"):
          name, power = f"arc{name}", None
        node = ("function", name, argument)
    return node if power is None else ("^", node, power)

  def _function_argument(self) -> Node:
    """What stands in brackets behind a function, or all that stands side by side up to the next function."""
    if self._peek() in ("(", "[", "{") or self._peek() in _BARS:
      return self._nested(self._base)
    minus = self._peek() == "-"
    if minus:
      self._next()
    argument = self._nested(self._factor)
    while self._starts_factor() and not self._starts_function() and self._peek() not in ("(", "["):
      argument = ("*", argument, self._nested(self._factor))
    # \sin \pi / 3, but \sin x / 3 is a third of the sine
    if self._peek() == "/" and not names(argument) and self._tokens[self._at + 1 : self._at + 2] != ["("]:
      self._next()
      argument = ("/", argument, self._nested(self._factor))
    return ("-", argument) if minus else argument

  def _starts_function(self) -> bool:
    name = self._peek().removeprefix("\\")
    return name in _FUNCTIONS and name != "sqrt"


def _tokens(text: str) -> Iterator[str]:
  at = 0
  while at < len(text):
    if text[at].isspace():
      at += 1
      continue
    if (found := _PLAIN_WORD.match(text, at)) and (at == 0 or not text[at - 1].isalpha()) and text[at - 1 : at] != "\\":
      yield f"\\{found[0]}"
      at = found.end()
      continue
    token = _TOKEN.match(text, at)
    if token is None:
      if text[at:].strip():
        raise UnreadableError
      return
    yield token[token.lastindex or 0]
    at = token.end()


def _known(name: str) -> bool:
  return (
    name in _FUNCTIONS
    or name in _GREEK
    or name in _NAMING
    or name in ("begin", "frac", "dfrac", "tfrac", "cfrac", "binom", "tbinom", "dbinom", "pi", "infty")
  )


def _integer(value: int) -> Node:
  return "number", Fraction(value), 0


def _is_proper(node: Node) -> bool:
  """Whether a node is a fraction of two integers that is below 1."""
  if node[0] != "/" or any(part[0] != "number" or part[2] for part in node[1:]):
    return False
  return 0 <= node[1][1] < node[2][1]


def names(node: Node) -> set[str]:
  """The variables of an expression.

  >>> sorted(names(read("a x + f(b)")))
  ['a', 'b', 'x']
  """
  return {part[1] for part in parts(node) if part[0] == "name"}


def parts(node: Node) -> Iterator[Node]:
  """An expression and all that it is made of."""
  yield node
  for child in node[1:]:
    if isinstance(child, tuple):
      yield from parts(child)


def is_rounded(node: Node) -> bool:
  """Whether an expression holds a decimal: 0.5, but not 5.0."""
  return any(part[0] == "number" and part[2] for part in parts(node))
