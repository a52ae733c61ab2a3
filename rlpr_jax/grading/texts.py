"""When two texts are the same, whoever asks: the characters that all graders and verifiers take for one."""

import unicodedata

DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))  # hyphens, dashes, minus


def plain(text: str) -> str:
  """The text without case, with single spaces, accents composed: an NFC tokenizer cannot write them otherwise.

  >>> plain("  New   York ")
  'new york'
  """
  return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shown(text: str) -> str:
  """The text as it looks: without characters that cannot be seen, with one kind of dash.

  >>> shown("1\\u20132\\u200b")
  '1-2'
  """
  unseen = hidden(text)
  return "".join(c for c in text.translate(DASHES) if c not in unseen)


def hidden(text: str) -> set[str]:
  """Its characters that cannot be seen: joiners, marks of direction, halves of surrogate pairs.

  >>> hidden("4\\u200b2") == {"\\u200b"}
  True
  """
  return {c for c in set(text) if unicodedata.category(c) in ("Cf", "Cs")}


def compatible(text: str) -> str:
  """Puts a text into compatibility form: wide letters and ligatures become plain ones, and x² becomes x2.

  >>> compatible("x²")
  'x2'
  """
  return shown(unicodedata.normalize("NFKC", text))
