r"""Which option of a question a text names: by its letter, by its text, or in a sentence."""

import re
import unicodedata

from rlpr_jax.grading.texts import plain

_MARK = re.compile(r"(?:(?<=\s)|^)\(?([A-Za-z])[.):](?=\s)", re.MULTILINE)
_WRAPPED = re.compile(  # braces may nest once
  r"\\(?:boxed|text(?:bf|rm|it)?|math(?:rm|bf)) ?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\$([^$]*)\$|\*{1,3}([^*]*)\*{1,3}"
  r"|\\\((.*)\\\)|\\\[(.*)\\\]|_([^_]*)_|<b>(.*)</b>|`([^`]*)`"
  r"|\"([^\"]*)\"|'([^']*)'|[“„]([^“”„]*)[“”]|\u2018([^\u2018\u2019]*)\u2019|«([^«»]*)»|「([^「」]*)」"
)
_BRACKETED = re.compile(r"\(([^()]*)\)\.?|\[([^\[\]]*)\]\.?|\{([^{}]*)\}\.?|<([^<>]*)>\.?")
# Wide letters, brackets and marks, as they are written beside Chinese characters; letters in circles.
_WIDE = str.maketrans(
  {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **{chr(0x24B6 + i): chr(ord("A") + i) for i in range(26)},
    **{"【": "[", "】": "]", "。": ".", "、": ","},
  }
)
# Letters of options in Arabic and Bengali.
_ELSEWHERE = dict(zip("أبجدঅবডঢ", "ABCDABCD", strict=True))
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:,;!]?")
# The letter that a text begins with, in whatever dress: (B), **B.**, \textbf{(B)}\ , "B"
_HEAD = re.compile(
  r"(?P<open>(?:\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:rm|bf)|[(\[]) ?|[({\[<\"'“*_$]){0,8}+)(?P<letter>[A-Za-z])"
  r"(?P<close>(?:[)}\]>\"'”*_$.:,;!]|\\[)\]]|(?<=[)}])\\ | (?=[)}])){0,8})(?=(?P<gap>\s)|$|(?P<glued>.))"
)
# A claim about the letter that goes before, and a name of the option in brackets or behind a dash or a line's end.
_CLAIMED = re.compile(
  r"(?i)(?:is|was|must be|seems)(?! ?n.t\b)\b|(?:because|since|as|which|for|not|rather|instead|due|but)\b"
  r"|[-—\u2013(\n,;:]"
)
_DENIED = re.compile(
  r"(?i)(?:\)? )?(?:is|are|was|were|seems?|must be|cannot be|can.t be)(?: ?n.t\b| (?:\w+ )?"
  r"(?:not|wrong|incorrect|false|untrue|out|excluded|impossible|ruled)\b)|cannot be|can.t be"
)
# What comes behind one of these is said of other options.
_REASON = re.compile(
  r"(?i)[,;.(]{0,2}(?:^| |(?<=\())(?:because|since|as|which|whereas|while|not|rather than|instead of|unlike|for the)\b"
)
_CLAUSE = re.compile(r"[.;!?](?=\s|$)|\n")
_EXCLUDED = re.compile(
  r"(?i)\b(?:not|wrong|incorrect|false|neither|nor|unlike|eliminate\w*|exclude\w*|ruled out)\b|n.t\b"
)
# (B), (C); B. or C.; (B) (C); or maybe C
_OTHER_LABEL = re.compile(
  r"(?:^|(?:\b(?i:or|and|nor|maybe|perhaps|possibly|also|both|no)\b|[,;/&]),? ?)"
  r"[(\[]?[A-Z][)\]]?(?![A-Za-z'])(?! [a-z])"
)
_TEXT_AND_LETTER = re.compile(r"(.*\S)\s*[(\[]([A-Z])[)\]]\.?")
_LABELLED = re.compile(r"(?:\(([A-Za-z]|\d|[ivxIVX]{2,4})\) ?|([A-Za-z])[.)] )(\S.*)")
# A letter in a sentence: a small one, which may be the article "a", only where the sentence or a bracket ends; none
# that another one follows ("A or B") or that is denied.
_NAMED = (
  r"(?:\\boxed\{|\\text(?:bf)?\{|\\mathbf\{|[*(\[$\"'“ ]){0,6}+([A-Z]|[a-z](?=[).,;:}*$\"”]|$))(?![A-Za-z'])"
  rf"(?!\)?\.? ?(?:or|and|,|/|&) ?\(?[A-Z]\b)(?!(?i:{_DENIED.pattern.removeprefix('(?i)')}))"
)
_PHRASES = tuple(
  re.compile(lead + _NAMED)
  for lead in (
    r"\\boxed ?(?=\{)\{",
    "(?i:answer)(?i: is| would be| must be| should be)? ?[:=]?",
    "(?i:option|choice|letter)(?i: is)? ?:?",
    r"(?i:\b(?:choose|pick|select|go with|it is|it's|it must be|must be)) ?:?",
  )
)


def letter(index: int) -> str:
  """The letter of an option: A for the first.

  >>> letter(1)
  'B'
  """
  return chr(ord("A") + index)


def options_of(question: str) -> dict[str, str]:
  """Letter -> text of the options that a question lists: the last run of marks A, B, ... of two or more.

  >>> options_of("Capital of France? A. Rome B. Paris")
  {'A': 'Rome', 'B': 'Paris'}
  """
  run: list[re.Match[str]] = []
  best: list[re.Match[str]] = []
  for mark in _MARK.finditer(question):
    label = mark[1].upper()
    if label == "A":
      run = [mark]
    elif run and ord(label) == ord(run[-1][1].upper()) + 1:
      run.append(mark)
    best = run if len(run) > 1 else best
  ends = [mark.start() for mark in best[1:]] + [len(question)]
  texts = [question[mark.end() : end].strip() for mark, end in zip(best, ends, strict=True)] if best else []
  if texts:
    texts[-1] = texts[-1].partition("\n")[0]
  return {mark[1].upper(): text for mark, text in zip(best, texts, strict=True)}


def label_of(text: str, options: dict[str, str]) -> str | None:
  """The letter of the one option that a text names, or None.

  Args:
    text: a letter ("B", "(B)", "B.", "B. Paris", "the answer is B", "\\boxed{B}") or the text of an option.
    options: letter -> text; empty where they are not known.

  >>> options = {"A": "Rome", "B": "Paris"}
  >>> label_of("the answer is (B)", options), label_of("paris", options)
  ('B', 'B')
  >>> label_of("A or B", {}) is None
  True
  """
  text = _romanised(unwrap(text.translate(_WIDE)))
  bare_options = {label: bare(option) for label, option in options.items()}
  same = [label for label, option in bare_options.items() if option == bare(text)]
  if (found := _LETTER.fullmatch(text)) and (found[1].upper() in options or not same):
    return found[1].upper()
  if same:
    return same[0] if len(same) == 1 else None
  bracketed = _BRACKETED.fullmatch(text)
  inner = next(filter(None, bracketed.groups()), "").strip() if bracketed else ""
  if (found := _HEAD.match(inner or text)) and (lead := _leads(found, options)) is not None:
    return found["letter"].upper() if lead else None
  for phrase in _PHRASES:
    labels = {found[1].upper() for found in phrase.finditer(text)}
    if labels:
      return labels.pop() if len(labels) == 1 else None
  if (found := _TEXT_AND_LETTER.fullmatch(text)) and _says(found[1], options.get(found[2], "")):
    return found[2]
  claim = bare(_claim(text))
  same = [label for label, option in bare_options.items() if option == claim]
  return same[0] if len(same) == 1 else None


def _leads(head: re.Match[str], options: dict[str, str]) -> bool | None:
  """Whether the letter that a text begins with is the option that it names; None where it is no letter of an option."""
  label, close, rest = head["letter"].upper(), head["close"], head.string[head.end() :]
  option = options.get(label, "")
  # The option's own text may stand in brackets.
  says = bool(option) and any(_says(text, option) for text in (_after_label(rest), rest.strip()))
  bracketed = close.strip(" .:,;!*_$\"'”") != "" or head["open"].strip(" *_$\"'“") != ""
  if head["glued"] and not (bracketed or says):  # e.g. this, C.elegans
    return None
  if head["letter"].islower() and not (close.strip(",") or says):  # a dog
    return None
  if not close and not says and rest and not (_CLAIMED.match(rest.lstrip(" ")) or _OTHER_LABEL.match(rest.lstrip(" "))):
    return None  # A dog; I am
  if says:
    return True
  if _DENIED.match(f" {rest.strip()}"):
    return False
  claim = _claim(_after_label(rest))
  others = (bare(text) for other, text in options.items() if other != label)
  hedged = any(_holds(bare(claim), text) and not _holds(bare(option), text) for text in others)
  # "B, C": the comma belongs to the letter.
  return not (hedged or _OTHER_LABEL.search(f"{close[-1:] if close[-1:] in (',', ';') else ''}{claim}"))


def _after_label(rest: str) -> str:
  """What is said behind a letter, without the dash, colon or brackets between: "Paris" of " - Paris" or " (Paris)"."""
  rest = rest.strip().lstrip("-—\u2013:\\ ")
  found = _BRACKETED.fullmatch(rest)
  return next(filter(None, found.groups()), "") if found else rest


def _claim(text: str) -> str:
  """The text without reasons, and without sentences that say what is not the case."""
  reason = _REASON.search(text)
  clauses = _CLAUSE.split(text[: reason.start()] if reason else text)
  return ". ".join(clause.strip() for clause in clauses if not _EXCLUDED.search(clause)).strip()


def _romanised(text: str) -> str:
  """The text with the Latin letter for an Arabic or a Bengali one that it begins with, where that is no word."""
  first, following = text[:1], text[1:2]
  is_word = following.isalpha() or unicodedata.category(following or " ").startswith("M")
  return _ELSEWHERE[first] + text[1:] if first in _ELSEWHERE and not is_word else text


def _says(text: str, option: str) -> bool:
  """Whether a text is that of an option, but for markup and punctuation, with or without the reason for it."""
  said = {bare(text), bare(_claim(text)), bare(_CLAUSE.split(text)[0])}
  return bool({bare(option), _letters(option)} & (said | {_letters(part) for part in said}))


def _holds(text: str, words: str) -> bool:
  """Whether words stand in a text, as words."""
  return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _letters(text: str) -> str:
  """The text without what only sets it."""
  return re.sub(r"\\(?:text|mathrm|mathbf|textbf|left|right|[dt](?=frac))|\\(?=[$%])|[\s${}*]|[.,;]$", "", plain(text))


def split_label(text: str) -> tuple[str, str] | None:
  """Label and text of "(B) Paris", "B. Paris", "(2) Paris" or "(ii) Paris", or None.

  >>> split_label("(B) Paris")
  ('B', 'Paris')
  """
  found = _LABELLED.fullmatch(" ".join(text.split()))
  return (found[1] or found[2], found[3]) if found else None


def unwrap(text: str) -> str:
  """The text without the markup around the whole of it, with single spaces.

  >>> unwrap("**$x + 1$**")
  'x + 1'
  """
  text = " ".join(text.split())
  for _ in range(4):
    found = _WRAPPED.fullmatch(text)
    if not found:
      break
    text = next(inner for inner in found.groups() if inner is not None).strip()
  return text


def bare(text: str) -> str:
  """Reduces an option's text to what has to agree: no case, no markup, no final punctuation.

  >>> bare("**Paris.**")
  'paris'
  """
  return plain(unwrap(text)).rstrip(".;,")
