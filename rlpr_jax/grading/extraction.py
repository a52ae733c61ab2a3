r"""Finds the answer in a response.

A trained policy writes `<answer>...</answer>`. A base model often does not, and is measured all the same: what it
boxes, says its answer is, or ends on is then taken, in a fixed order, and the path that was taken is reported beside
the score. Every step is linear in the length of the text, and no text makes one raise.
"""

import collections
import re
from typing import NamedTuple

from rlpr_jax import splicing


class Extracted(NamedTuple):
  """The answer of a response and how it was found."""

  answer: str | None  # stripped; None where no path found one
  path: str  # answer_tag, open_answer_tag, boxed, answer_is, letter, last_number or none


_END_OF_THOUGHTS = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\[\\{}]|[{}]")
# "The answer is 42", "Final Answer: 42", "**Answer:** 42"
_ANSWER_IS = re.compile(r"\banswer[*_ ]{0,4}(?:(?:is|are|would be|must be)\b[ *_]{0,4}:?|:|=)[*_]{0,3}", re.IGNORECASE)
_HOPE = re.compile(r"\bI hope (?:it|this) is correct\b", re.IGNORECASE)  # how Minerva's prompt ends a solution
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)")
# A line that holds nothing but a letter, or says which option is right.
_LETTER_LINE = re.compile(
  r"^[ \t*_>#(\[$-]{0,8}(?:(?:the )?(?:option|choice) )?[*_(\[$ ]{0,4}([A-Za-z])[)\]*_.$ \t\r]{0,8}$", re.MULTILINE
)
_OPTION = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)(?: is)?:? [*_(]{0,4}([A-Z])\b(?!')")
# 3/4, -\frac{3}{4}, 1,000.5, 10\,000, 2e-3, 1.5 \times 10^{3}, 25\%
_NUMBER = re.compile(
  r"(?:(?<![\w.)\]}])-[ ]?)?(?:\\[dt]?frac ?\{[^{}]{1,60}\} ?\{[^{}]{1,60}\}|"
  r"(?<![\w.])(?:\d{1,3}(?:(?:,|\\,|~|\{,\})\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?(?!\d)"
  r"(?: ?(?:\\times|\\cdot|\*|\u00d7|x) ?10 ?\^ ?\{?-?\d+\}?)?(?:\\?%)?)"
)


def extract(text: str, grader: str) -> Extracted:
  """Finds the answer that a response gives.

  Thoughts, everything before the first `</think>`, are not searched.

  Args:
    text: the response.
    grader: the question's grader. Lone letters are answers only to `multiple_choice`, the last number only to `math`
      and `number`.

  Returns:
    the content of the first `<answer>`, closed or not; else of the last `\\boxed`; else what "the answer is" is
    followed by; else the last lone letter, or the last number.

  >>> extract("<think>6 * 7</think> <answer> 42 </answer>", "number")
  Extracted(answer='42', path='answer_tag')
  >>> extract("So it is 42 apples.", "number").path
  'last_number'
  """
  text = text.partition(_END_OF_THOUGHTS)[2] if _END_OF_THOUGHTS in text else text
  start = text.find(splicing.OPEN)
  if start >= 0:
    if text.find(splicing.CLOSE, start) >= 0:  # else its regular expression would try every <answer> in vain
      return Extracted(splicing.extract_answer(text), "answer_tag")
    return Extracted(text.rpartition(splicing.OPEN)[2].strip(), "open_answer_tag")
  if (answer := boxed(text)) is not None:
    return Extracted(answer, "boxed")
  if (answer := stated(text, grader)) is not None:
    return Extracted(answer, "answer_is")
  if grader == "multiple_choice":
    if letters := [found for pattern in (_LETTER_LINE, _OPTION) if (found := _last(pattern, text))]:
      return Extracted(max(letters, key=lambda found: found.start(1))[1].upper(), "letter")
  elif grader in ("math", "number") and (found := _last(_NUMBER, text)):
    return Extracted(found[0].replace(" ", ""), "last_number")
  return Extracted(None, "none")


def boxed(text: str) -> str | None:
  r"""The content of the last \boxed{} (or \fbox{}) whose braces balance, of nested ones the outermost, or None.

  >>> boxed(r"So \boxed{\frac{1}{2}}.")
  '\\frac{1}{2}'
  """
  start = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=-1)
  if start < 0:
    return None
  last = None
  opened: list[int] = []  # where the content of each open brace starts, negative for a plain brace
  for token in _BOX.finditer(text, start):
    match token[0]:
      case "}":
        if opened and (begin := opened.pop()) >= 0:
          last = (begin, token.start())
      case "{":
        opened.append(-1)
      case "\\{" | "\\}" | "\\\\":
        pass
      case _:
        opened.append(token.end())
  return None if last is None else text[last[0] : last[1]].strip()


def stated(text: str, grader: str) -> str | None:
  """Finds the text behind the last "the answer is", or None.

  For mathematics that is displayed mathematics, or the rest of the sentence; for options the rest of the line; for text
  the rest of the paragraph.

  >>> stated("Adding up, the answer is **42**. I hope it is correct.", "number")
  '42'
  """
  if (found := _last(_ANSWER_IS, text)) is None:
    return None
  statement = text[found.end() :].lstrip(" \t\r\n*_")
  for begin, end in (("$$", "$$"), ("\\[", "\\]"), ("$", "$"), ("\\(", "\\)")):
    close = statement.find(end, len(begin)) if statement.startswith(begin) else -1
    if grader != "text" and close > 0 and not statement[close + len(end) :].lstrip(" .*\r")[:1].strip("\n"):
      return statement[: close + len(end)]
  statement = statement.split("\n\n" if grader == "text" else "\n", 1)[0]
  if hope := _HOPE.search(statement):
    statement = statement[: hope.start()]
  if grader in ("math", "number") and (stop := _SENTENCE_END.search(statement)):
    statement = statement[: stop.start()]
  statement = unmarked(statement)
  return (statement if grader == "text" else statement.rstrip(".")) or None


def unmarked(text: str) -> str:
  """The text without the bold marks and the whitespace around it; a single star may be a part of it.

  >>> unmarked("**42** "), unmarked("2*")
  ('42', '2*')
  """
  text = text.strip()
  text = text.lstrip("*_ ") if text.startswith(("**", "__")) else text
  return text.rstrip("*_ ") if text.endswith(("**", "__")) else text


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
  return next(iter(collections.deque(pattern.finditer(text), maxlen=1)), None)
