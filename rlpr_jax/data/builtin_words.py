"""A built-in question, and the words that several domains have."""

from typing import NamedTuple

PEOPLE = ("ann", "bob", "cal", "dan", "eve", "gus", "kim", "lee", "pam", "ray", "sue", "tom")
UNITS = ("cats", "cups", "eggs", "hats", "keys", "pens")


class Question(NamedTuple):
  """A question, its reference answer, and a careful and a careless way to think about it."""

  domain: str
  text: str
  answer: str
  careful: str
  careless: str
  careless_answer: str
