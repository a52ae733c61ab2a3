r"""Which option of a question a text names: by its letter, by its text, or in a sentence."""

import re

from rlpr_jax.grading.texts import plain

_MARK = re.compile(r"(?:(?<=\s)|^)\(?([A-Za-z])[.):](?=\s)", re.MULTILINE)
_WRAPPED = re.compile(  # braces may nest once
  r"\\(?:boxed|text|textbf|mathrm|mathbf) ?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\$([^$]*)\$|\*\*([^*]*)\*\*|\\\((.*)\\\)"
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:,]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\) ?|([A-Za-z])[.):] )(.*)")
# (B), (C); B. or C.; (B) (C)
_OTHER_LABEL = re.compile(r"(?:^|(?:\b(?i:or|and|nor)\b|[,;/&]) ?)[(\[]?[A-Z][)\]]?(?![A-Za-z'])(?! [a-z])")
_REASON = re.compile(r"(?i)[,;.]? (?:because|since|as|which)\b")
_LABELLED = re.compile(r"(?:\(([A-Za-z]|\d|[ivxIVX]{2,4})\) ?|([A-Za-z])[.)] )(\S.*)")
# A letter in a sentence: a small one, which may be the article "a", only where the sentence or a bracket ends; none
# that another one follows ("A or B").
_NAMED = (
  r"(?:\\boxed\{|\\text\{|[*($ ]){0,6}+([A-Z]|[a-z](?=[).,;:}*$]|$))(?![A-Za-z'])"
  r"(?!\)?\.? ?(?:or|and|,|/|&) ?\(?[A-Z]\b)"
)
_PHRASES = tuple(
  re.compile(lead + _NAMED)
  for lead in (
    r"\\boxed ?(?=\{)\{",
    "(?i:answer)(?i: is| would be| must be)? ?[:=]?",
    "(?i:option|choice)(?i: is)? ?:?",
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
  text = unwrap(text)
  if found := _LETTER.fullmatch(text):
    return found[1].upper()
  bare_options = {label: bare(option) for label, option in options.items()}
  same = [label for label, option in bare_options.items() if option == bare(text)]
  if same:
    return same[0] if len(same) == 1 else None
  if found := _LETTER_AND_TEXT.fullmatch(text):
    label, rest = (found[1] or found[2]).upper(), found[3]
    if label in options and _says(rest, options[label]):
      return label
    others = (option for other, option in bare_options.items() if other != label)
    hedged = any(_holds(bare(rest), option) and not _holds(bare_options.get(label, ""), option) for option in others)
    return None if hedged or _OTHER_LABEL.search(rest) else label
  for phrase in _PHRASES:
    labels = {found[1].upper() for found in phrase.finditer(text)}
    if labels:
      return labels.pop() if len(labels) == 1 else None
  return None


def _says(text: str, option: str) -> bool:
  """Whether a text is that of an option, but for markup and punctuation, with or without the reason for it."""
  reason = _REASON.search(text)
  said = {bare(text), bare(text[: reason.start()])} if reason else {bare(text)}
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
