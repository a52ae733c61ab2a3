r"""One spelling of mathematical answers, and their parts between separators that stand in no brackets."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from rlpr_jax.grading.texts import DASHES, shown

_CHARACTERS = {
  "√": "\\sqrt ", "∞": "\\infty ", "π": "\\pi ", "\u00d7": "\\cdot ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ",
  "÷": "/", "\u2215": "/", "\u2044": "/", "≤": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "⩾": "\\geq ", "≠": "\\neq ",
  "≈": "\\approx ", "∈": "\\in ", "\u222a": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "±": "\\pm ", "∓": "\\mp ",
  "°": "^\\circ ", "\u2032": "'", "\u2019": "'", "∠": "\\angle ", "△": "\\triangle ", "\u2216": "\\setminus ",
  "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u2115": "\\mathbb{N}", "⟨": "\\langle ", "⟩": "\\rangle ",
  "\u03b1": "\\alpha ", "β": "\\beta ", "\u03b3": "\\gamma ", "δ": "\\delta ", "ε": "\\epsilon ", "θ": "\\theta ",
  "λ": "\\lambda ", "μ": "\\mu ", "\u03bd": "\\nu ", "\u03c1": "\\rho ", "\u03c3": "\\sigma ", "τ": "\\tau ",
  "φ": "\\phi ", "ω": "\\omega ", "ħ": "\\hbar ", "Δ": "\\Delta ", "Ω": "\\Omega ", "Φ": "\\Phi ", "\u2223": "|",
  "\uff0c": ",", "、": ",", "\uff1b": ";",
}  # fmt: skip
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱˣ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙₐₓᵢⱼₖₘ]+")
_ROOT_OF_NUMBER = re.compile(r"\\sqrt\s+(\d+(?:\.\d+)?)")
_SPELLINGS = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\\\\\[[\d.]+ ?(?:pt|ex|em|mm)\]", r"\\\\ "),
    (r"\\[(\[]|\\[)\]](?!\d)", " "),
    (r"\\(?:left|right|m?left|middle|displaystyle|limits|nolimits|[bB]ig+[lrm]?)(?![A-Za-z])\.?", ""),
    (r"(?<!\\)\\!\s*", ""),
    (r"\\text(?:normal|sf|tt|sc|rm|up)(?![A-Za-z])|\\mbox(?![A-Za-z])", r"\\text"),
    (r"\\text\s*\{\s*,?\s*(and|or)\s*\}", r" \1 "),
    (r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?(?:percentage|percent|pct)\b(?:\s*\})?", r"\\%"),
    (r"(?<!\\)\\[,:; ]|~|\\(?:thinspace|enspace|hspace\{[^{}]*\}|,)", " "),
    (r"\\\$|\$", " "),
    (r"(?<=\d)\{\s*,\s*\}(?=\d)", ","),
    (r"\{\s*,\s*\}", ","),
    (r"(?<=\d)\s*\\\s(?=\d)", " "),
    (r"\\(?:q?quad)(?![A-Za-z])", " ; "),
    (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
    (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
    (r"\\(?:lbrack)(?![A-Za-z])", "["),
    (r"\\(?:rbrack)(?![A-Za-z])", "]"),
    (r"\\(?:leqslant|leqq|le)(?![A-Za-z])|<=|=<(?!\s*\\)", r"\\leq "),
    (r"\\(?:geqslant|geqq|ge)(?![A-Za-z])|>=", r"\\geq "),
    (r"\\(?:ne|not\s*=)(?![A-Za-z])|!=|\\not\s*=", r"\\neq "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r":=|==", "="),
    (r"\(\s*\\?(?:text\{)?\s*mod\s*\}?\s*(\w+)\s*\)", r"\\pmod{\1}"),
    (r"(?<=\d) *[xX] *(?=10 *\^)", r"\\cdot "),
    (r"\\(?:simeq|thickapprox|doteq)(?![A-Za-z])|\\sim(?![A-Za-z])|~=", r"\\approx "),
    (r"\\(?:bigcup|sqcup)(?![A-Za-z])", r"\\cup "),
    (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus "),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
    (r"\\(?:Reals|R)(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\\mathbf\{R\}|\\mathbb R(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\\degrees?(?![A-Za-z])|\^\s*\\degree(?![A-Za-z])", r"^\\circ "),
    (r"\b(\d+(?:\.\d+)?|\.\d+)\s*\*\*\s*(?=[-\d({])|\*\*(?=[-\d({])", r"\1^"),
    (r"\\begin\{array\}\s*\{[clr|\s]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\}", r"\\end{pmatrix}"),
    (r"\\begin\{(?:[bBv]?|small)matrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:[bBv]?|small)matrix\}", r"\\end{pmatrix}"),
    (r"\[\s*(?=\\begin\{pmatrix\})|(?<=\\end\{pmatrix\})\s*\]", ""),
    (r"\\\\\s*(?=\\end\{)", " "),
    (r"\\(?:ldots|dots|dotsc|cdots)(?![A-Za-z])|\u2026", "..."),
    (r"\binfinity\b|\binf\b(?!\w)", r"\\infty "),
    (r"\s+", " "),
  )
)
# 0.1\overline{6}, 0.\dot{3}, 0.(3)
_REPEATING = re.compile(
  r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overline)\s*\{(\d+)\}|\\(?:overline|bar|dot) ?(\d)|\((\d+)\))(?!\d)"
)
DIRECTION = re.compile(r"\\(?:mathbf|hat|vec|boldsymbol|widehat|bm)\s*\{\s*(?:\\mathbf\{)?\\?([ijk])(?:math)?\}?\s*\}")
_LAST_MARK = re.compile(r"(?:(?<!\.)\.|[,;:])\s*$")


def normalized(text: str) -> str:
  r"""One spelling of the many that an expression has in LaTeX and in Unicode, without delimiters and spacing.

  >>> normalized("$\\left(\u221a2, x\u00b2\\right)$.")
  '(\\sqrt{2}, x^{2})'
  """
  text = shown(text.translate(DASHES))
  if "\\begin" not in text:
    text = re.sub(r"\s*\n\s*", " ; ", text.strip())
  text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text)
  text = "".join(_vulgar(c) for c in text)
  text = _SUPERSCRIPTS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}".replace("\u2212", "-"), text)
  text = _SUBSCRIPTS.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}".replace("\u2212", "-"), text)
  if any(c in _CHARACTERS for c in text):
    text = "".join(_CHARACTERS.get(c, c) for c in text)
    text = _ROOT_OF_NUMBER.sub(r"\\sqrt{\1}", text)
  if "\\\\begin" in text:
    text = text.replace("\\\\", "\\")
  elif "\\begin" not in text:
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = re.sub(r"\\\\\s*$", "", text).removesuffix("\\")
  text = _unboxed(text)
  for pattern, replacement in _SPELLINGS:
    text = pattern.sub(replacement, text)
  text = DIRECTION.sub(r"\\mathbf{\1}", text)
  text = _REPEATING.sub(_fraction, text.strip())
  text = _LAST_MARK.sub("", text).strip().lstrip("; ")
  while text.startswith("{") and closes_at_end(text):
    text = text[1:-1].strip()
  return text


def _vulgar(c: str) -> str:
  if unicodedata.category(c) != "No" or "\u2044" not in (parts := unicodedata.normalize("NFKC", c)):
    return c
  above, _, below = parts.partition("\u2044")
  return f"\\frac{{{above}}}{{{below}}}"


def _fraction(found: re.Match[str]) -> str:
  """A repeating decimal as a fraction."""
  whole, once, again = found[1] or "0", found[2], found[3] or found[4] or found[5]
  value = Fraction(int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))
  return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _unboxed(text: str) -> str:
  while found := re.search(r"\\f?boxed\s*\{", text):
    depth = 1
    for end in range(found.end(), len(text)):
      depth += (text[end] == "{") - (text[end] == "}")
      if not depth:
        text = text[: found.start()] + text[found.end() : end] + text[end + 1 :]
        break
    else:
      return text
  return text


def closes_at_end(text: str) -> bool:
  """Whether the bracket that a text begins with is closed by its last character.

  >>> closes_at_end("(1, 2)"), closes_at_end("(1) (2)")
  (True, False)
  """
  depth = 0
  for at, (token, _) in _levels(text):
    depth = token
    if depth == 0 and at < len(text) - 1:
      return False
  return depth == 0


_BRACKET = re.compile(r"\\[{}]|[(){}\[\]]|\\(?:langle|rangle)(?![A-Za-z])|\\(?:begin|end)\{[a-z*]+\}")


def _levels(text: str) -> Iterator[tuple[int, tuple[int, str]]]:
  """End of each bracket, how deep the text is behind it, and the bracket."""
  depth = 0
  for found in _BRACKET.finditer(text):
    opens = found[0] in ("(", "[", "{", "\\{", "\\langle") or found[0].startswith("\\begin")
    depth += 1 if opens else -1
    yield found.end() - 1, (depth, found[0])


def split(text: str, pattern: re.Pattern[str]) -> list[tuple[str, str]]:
  """The parts between separators that stand in no brackets, each with the separator before it.

  >>> split("(1, 2), 3", re.compile(","))
  [('', '(1, 2)'), (',', '3')]
  """
  ends = [(-1, 0), *((at, depth) for at, (depth, _) in _levels(text))]
  parts, start, before = [], 0, ""
  index = 0
  for found in pattern.finditer(text):
    while index + 1 < len(ends) and ends[index + 1][0] < found.start():
      index += 1
    if ends[index][1] == 0:
      parts.append((before, text[start : found.start()].strip()))
      start, before = found.end(), found[0].strip()
  parts.append((before, text[start:].strip()))
  return parts


FONTS = re.compile(
  r"\\(?:text(?:rm|bf|it|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname|bm|boldsymbol)(?![A-Za-z])\*? ?"
)


def canonical(text: str) -> str:
  r"""A spelling in which equal texts are told at sight, without fonts, braces around one character and spaces.

  >>> canonical("\\dfrac 12 + x^{2}")
  '\\frac{1}{2}+x^2'
  """
  text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", FONTS.sub("", text))
  text = re.sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", text)
  text = re.sub(r"\\frac ?(\d) ?\{", r"\\frac{\1}{", text)
  text = re.sub(r"(?<=[_^])\s*\{(\w|\\[A-Za-z]+)\}", r"\1", text)
  text = re.sub(r"(?<=\d)\s+(?=\d)", "~", text)  # "4 2" is not 42
  text = re.sub(r"(?<=\\)([A-Za-z]+)\s+(?=[A-Za-z])", r"\1~", text)
  text = re.sub(r"\^\\circ|\s+", "", text)
  text = re.sub(r"^\{([^{}]*)\}$", r"\1", text)
  if re.fullmatch(r"\([A-Za-z]\)", text):  # (C) may be an option
    text = text[1:-1]
  return text.casefold() if len(text) > 2 and text.isalpha() else text
