r"""Finds the answer in a response.

A trained policy writes `<answer>...</answer>`. A base model often does not, and is measured all the same: what it
boxes, says its answer is, or ends on is then taken, in a fixed order, and the path that was taken is reported beside
the score. Every step is linear in the length of the text, and no text makes one raise.
"""

import collections
import re
from collections.abc import Mapping
from typing import NamedTuple

from rlpr_jax import splicing
from rlpr_jax.grading.multiple_choice import label_of


class Extracted(NamedTuple):
  """The answer of a response and how it was found."""

  answer: str | None  # stripped; None where no path found one
  path: str  # answer_tag, open_answer_tag, boxed, answer_is, letter, last_mathematics, last_number or none


_END_OF_THOUGHTS = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\[\\{}]|[{}]")
# What may stand between the boxes of a list: $\boxed{1}$ and $x_2 = \boxed{2}$.
_BETWEEN_BOXES = re.compile(
  r"(?:[\s$,;&]|\\[()\[\],; ]|\\q?quad(?![A-Za-z])|\\text ?\{[^{}]{0,12}\}|\b(?:and|or)\b|[A-Za-z](?:_\{?\w\}?)? ?=)*+"
)
_BETWEEN_LIMIT = 60  # characters

# A line that no longer answers: the next question of a few-shot prompt, which base models go on with, or another turn.
_ASKS = (
  r"(?:question|problem|exercise|instruction|q|human|user|frage|aufgabe|pregunta|pergunta|domanda|вопрос|задача|swali"
  r"|问题|問題|题目|質問|질문|문제|السؤال|প্রশ্ন|प्रश्न|คำถาม|ప్రశ్న)"
)
_NEXT_QUESTION = re.compile(
  rf"^[*_#> \t]{{0,10}}{_ASKS}[*_ \t]{{0,4}}(?:\d{{1,4}}[*_ \t]{{0,4}}(?:[:\uff1a.)]|$)|[:\uff1a])|"
  rf"^[ \t]{{0,4}}#{{1,6}}[*_ \t]{{1,4}}{_ASKS}[*_ \t]{{0,4}}$|"
  r"^[ \t]{0,4}(?:\[INST\]|<\|user\|>|(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)[ \t]{0,2}user\b)",
  re.MULTILINE | re.IGNORECASE,
)

# 18; $1,080; -5.; 18 eggs: all of a line, as GSM8K's solutions end. A heading "#### 1. Add them" is none.
_NUMBER_ALONE = (
  r"(?=[-+]?[$€£¥]?[-+]?(?:\d(?:[\d,./]{0,40}\d)?|\.\d+)%?(?:[ \t]{1,3}[a-z°/]{1,20}){0,3}[ \t]{0,9}\.?[ \t\r]{0,9}$)"
)
# The ways in which MGSM's examples and simple-evals' prompts say "answer" in other languages.
_SAID_ELSEWHERE = (
  r"\b(?:Antwort|Respuesta|Réponse|Risposta|Resposta|Ответ|Jawaban|Jibu|Idahun|Ìdáhùn|Idáhùn|Àdáhùn|Àmọ̀nà|Ànúgọ|Àṣàyàn)"
  r"(?:[*_ ]{0,4}[:\uff1a]|[ ]{1,2}(?:ist|lautet|es|est|è|é|adalah|ni|[-—\u2013])(?=\s)[ ]?:?)",
  r"(?:答案|答え|回答|解答|答复|答曰|答)[*_ ]{0,4}(?:[:\uff1a]|[是为為は][:\uff1a]?)",
  r"(?:정답|답변|답)(?:[*_ ]{0,4}[:\uff1a]|[은는])",
  r"(?:الإجابة|إجابة|الجواب)(?: (?:الن\u0647ائية|الصحيحة|الن\u0647ائي|الصحيح)){0,2}(?:[*_ ]{0,4}:| \u0647[يو][ ]?:?)",  # noqa: RUF001 Arabic
  r"উত্তর(?:[*_ ]{0,4}[:\uff1a]|ঃ| হল)",
  r"उत्तर(?:[*_ ]{0,4}[:\uff1a]| है)",
  r"คำตอบ(?:[*_ ]{0,4}[:\uff1a]|คือ)",
  r"సమాధానం[*_ ]{0,4}[:\uff1a]",
)
# "The answer is 42", "Final Answer: 42", "**Answer:** 42", "the answer to it should be 42"; GSM8K's "#### 42", "A: 42".
_ANSWER_IS = re.compile(
  r"(?:\banswers?(?: to [^.:=\n]{1,60}?)?[*_ ]{0,4}"
  r"(?:(?:is|are|would be|must be|should be|will be)\b[ *_]{0,4}[:\uff1a]?|[:\uff1a=])|"
  r"^[#*_ ]{0,8}(?:final )?answer[*_ ]{0,4}$|"
  rf"^(?P<alone>####|(?-i:A):)[ \t]?{_NUMBER_ALONE}|{'|'.join(_SAID_ELSEWHERE)})[*_]{{0,3}}",
  re.IGNORECASE | re.MULTILINE,
)
_STATEMENTS = 50  # the last of a response, which are looked at; a model may repeat itself without end
_STATEMENT_LIMIT = 20_000  # characters
_HOPE = re.compile(r"\bI hope (?:it|this) is correct\b", re.IGNORECASE)  # how Minerva's prompt ends a solution
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)|[。।]|(?:です|입니다)(?=[\s.。]*$)")
_SENTENCE_BREAK = re.compile(r"[.!?](?=\s)|[\n。।]")
# "This answer is correct": what is said of an answer and is none.
_ASSESSED = re.compile(
  r"(?:(?:also|indeed|now|clearly|not)[ ,]{1,2}){0,2}(?:correct|right|wrong|incorrect|accurate|reasonable|verified"
  r"|confirmed|consistent|plausible|sensible|obvious|clear|checked|supported|unreasonable|inaccurate)\b",
  re.IGNORECASE,
)
_ASSESSED_OF_ITS_OWN = re.compile(r"(?:not )?(?:valid|invalid|true|false|good|fine|sound)\b", re.IGNORECASE)
_OWN = re.compile(r"\b(?:this|that|these|those|my|our|your|above|previous)(?: (?!the\b)\w{1,12})? $", re.IGNORECASE)
# "The answer is found by ...", "the answer is not 5"
_NO_VALUE = re.compile(
  r"(?:not|never|(?:found|obtained|given|derived|calculated|computed|determined) (?:by|as|from|in|using))\b",
  re.IGNORECASE,
)
# A line that holds nothing but a letter, or says which option is right.
_LETTER_LINE = re.compile(
  r"^[ \t*_>#(\[$-]{0,8}(?:(?:the )?(?:option|choice) )?[*_(\[$ ]{0,4}([A-Za-z])[)\]*_.$ \t\r]{0,8}$", re.MULTILINE
)
_OPTION = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)(?: is)?:? [*_(]{0,4}([A-Z])\b(?!')")
# 3/4, -\frac{3}{4}, 1,000.5, 10\,000, 2e-3, 1.5 \times 10^{3}, 25\%
# $(7, 6)$ at the end of a text; not the dollars of "It costs $5, not 6$".
_LAST_MATHEMATICS = re.compile(r"(?<![\\$])\$([^$]{1,400})(?<!\\)\$[ \t]{0,9}\.?\s{0,9}\Z")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_NUMBER = re.compile(
  r"(?:(?<![\w.)\]}])-[ ]?)?(?:\\[dt]?frac ?\{[^{}]{1,60}\} ?\{[^{}]{1,60}\}|"
  r"(?<![\w.])(?:\d{1,3}(?:(?:,|\\,|~|\{,\})\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?(?!\d)"
  r"(?: ?(?:\\times|\\cdot|\*|\u00d7|x) ?10 ?\^ ?\{?-?\d+\}?)?(?:\\?%)?)"
)


def extract(text: str, grader: str, options: Mapping[str, str] | None = None) -> Extracted:
  """Finds the answer that a response gives.

  Thoughts, everything before the first `</think>`, are not searched; nor is what comes after the answer once the model
  asks itself the next question.

  Args:
    text: the response.
    grader: the question's grader. Lone letters are answers only to `multiple_choice`, the last number only to `math`
      and `number`.
    options: letter -> text of a question of multiple choice; None where they are not known.

  Returns:
    the content of the first `<answer>`, closed or not; else of the last `\\boxed`, of several in a row all; else what
    "the answer is" is followed by; else the last lone letter, the mathematics on which the text ends, or the last
    number. Of multiple choice the first that names an option, so that a box of working does not hide the letter.

  >>> extract("<think>6 * 7</think> <answer> 42 </answer>", "number")
  Extracted(answer='42', path='answer_tag')
  >>> extract("So it is 42 apples.", "number").path
  'last_number'
  """
  text = text.partition(_END_OF_THOUGHTS)[2] if _END_OF_THOUGHTS in text else text
  start = text.find(splicing.OPEN)
  # Without the closing tag its regular expression would try every <answer> in vain.
  if start >= 0 and text.find(splicing.CLOSE, start) >= 0:
    return Extracted(splicing.extract_answer(text), "answer_tag")
  text = _until_next_question(text, grader, dict(options or {}))
  if splicing.OPEN in text:
    return Extracted(text.rpartition(splicing.OPEN)[2].strip(), "open_answer_tag")
  return _extract_untagged(text, grader, dict(options or {}))


def _until_next_question(text: str, grader: str, options: dict[str, str]) -> str:
  """The text up to the next question; one that it begins with, or after a line without an answer, repeats the first."""
  marks = _NEXT_QUESTION.finditer(text)
  if not (mark := next(marks, None)):
    return text
  before = text[: mark.start()].strip()
  is_lead = "\n" not in before and splicing.OPEN not in before
  if is_lead and (not before or _extract_untagged(before, grader, options).answer is None):
    mark = next(marks, None)
  return text[: mark.start()] if mark else text


def _extract_untagged(text: str, grader: str, options: dict[str, str]) -> Extracted:
  found = [Extracted(boxed(text), "boxed"), Extracted(stated(text, grader, options), "answer_is")]
  if grader == "multiple_choice":
    letters = [letter for pattern in (_LETTER_LINE, _OPTION) if (letter := _last(pattern, text))]
    letter = max(letters, key=lambda letter: letter.start(1), default=None)
    ends_with_it = letter is not None and not text[letter.end() :].strip()
    lettered = Extracted(letter[1].upper() if letter else None, "letter")
    named = [one for one in found if one.answer and label_of(one.answer, options)]
    found = [*named, *([lettered] if ends_with_it else []), *found, lettered]
  elif grader in ("math", "number"):
    if grader == "math" and (last := _LAST_MATHEMATICS.search(text)) and not _WORD.search(last[1]):
      found.append(Extracted(last[1].strip(), "last_mathematics"))
    meant = (one for one in _NUMBER.finditer(text) if not text.endswith("not ", 0, one.start()))
    number = next(iter(collections.deque(meant, maxlen=1)), None)
    found.append(Extracted(number[0].replace(" ", "") if number else None, "last_number"))
  return next((one for one in found if one.answer is not None), Extracted(None, "none"))


def boxed(text: str) -> str | None:
  r"""The content of the last \boxed{} (or \fbox{}) whose braces balance, of nested ones the outermost, or None.

  Boxes that follow each other with no more than "and", "or" or a comma between them are a list.

  >>> boxed(r"So \boxed{\frac{1}{2}}.")
  '\\frac{1}{2}'
  >>> boxed(r"$\boxed{3}$ and $\boxed{5}$")
  '3, 5'
  """
  start = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=-1)
  if start < 0:
    return None
  boxes: list[tuple[int, int, int]] = []  # where each outermost one, its content and the content's end are
  opened: list[tuple[int, int]] = []  # of each open brace where it and its content start, negative for a plain brace
  for token in _BOX.finditer(text, start):
    match token[0]:
      case "}":
        if opened and (begin := opened.pop())[0] >= 0:
          while boxes and boxes[-1][0] > begin[0]:
            boxes.pop()
          boxes.append((*begin, token.start()))
      case "{":
        opened.append((-1, -1))
      case "\\{" | "\\}" | "\\\\":
        pass
      case _:
        opened.append((token.start(), token.end()))
  contents: list[str] = []
  for i in range(len(boxes) - 1, -1, -1):
    if contents:
      between = text[boxes[i][2] + 1 : boxes[i + 1][0]]
      if len(between) > _BETWEEN_LIMIT or not _BETWEEN_BOXES.fullmatch(between):
        break
    contents.append(text[boxes[i][1] : boxes[i][2]].strip())
  return ", ".join(dict.fromkeys(reversed(contents))) if contents else None


def stated(text: str, grader: str, options: Mapping[str, str] | None = None) -> str | None:
  """Finds the text behind the last "the answer is", or None.

  One that is empty, unfinished or says no more than that an answer is correct does not count where there is another
  one, nor, of multiple choice, one that names no option.

  For mathematics that is displayed mathematics, or the rest of the sentence; for options the rest of the line; for text
  the rest of the paragraph.

  >>> stated("Adding up, the answer is **42**. I hope it is correct.", "number")
  '42'
  >>> stated("The answer is 42. This answer is correct.", "number")
  '42'
  """
  found = (mark for mark in _ANSWER_IS.finditer(text) if grader in ("math", "number") or not mark["alone"])
  marks = list(collections.deque(found, maxlen=_STATEMENTS))
  ends = [*(mark.start() for mark in marks[1:]), len(text)][: len(marks)]
  kept: list[str] = []  # the last first
  assessed = None
  cut = ""  # what the text breaks off with
  for mark, end in zip(reversed(marks), reversed(ends), strict=True):
    is_last = end == len(text)
    region = text[mark.end() : min(end, mark.end() + _STATEMENT_LIMIT)]
    if not is_last and (breaks := _last(_SENTENCE_BREAK, region.rstrip())):
      region = region[: breaks.end()]
    statement = _statement(region, grader)
    if not statement:
      continue
    is_own = _OWN.search(text, max(mark.start() - 40, 0), mark.start()) is not None
    if _ASSESSED.match(statement) or (is_own and _ASSESSED_OF_ITS_OWN.match(statement)):
      assessed = assessed or (None if is_own or grader != "text" else statement)
    elif grader != "text" and _NO_VALUE.match(statement):
      pass
    elif grader == "multiple_choice" and label_of(statement, dict(options or {})):
      return statement
    elif is_last and text.endswith(statement):
      cut = statement
    else:
      kept.append(statement)
  if cut and not any(statement.startswith(cut) for statement in kept):
    return cut
  return kept[0] if kept else assessed


def _statement(text: str, grader: str) -> str:
  statement = text.lstrip(" \t\r\n*_")
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
  if grader != "text":
    statement = statement.rstrip(".。")
  return "" if statement in ("$", "$$", "\\[", "\\(", ":", "(") else statement


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
