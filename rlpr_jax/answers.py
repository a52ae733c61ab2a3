"""A response's own answer, out of its text. Imports nothing, for programs that only read what a run wrote."""

from typing import NamedTuple

OPEN, CLOSE = "<answer>", "</answer>"


class OwnAnswer(NamedTuple):
  """What a response has between its answer's tags."""

  text: str  # stripped
  closing: str  # what stands behind it, down to and including `</answer>`


def own_answer(text: str) -> OwnAnswer | None:
  """Content of the first `<answer>...</answer>` and what ends it, or None where there is none.

  >>> own_answer("<think>6 * 7</think> <answer> 42</answer>")
  OwnAnswer(text='42', closing='</answer>')
  """
  begin = text.find(OPEN)
  end = text.find(CLOSE, begin + len(OPEN))
  if begin < 0 or end < 0:
    return None
  inside = text[begin + len(OPEN) : end]
  return OwnAnswer(inside.strip(), inside[len(inside.rstrip()) :] + CLOSE)


def extract_answer(text: str) -> str | None:
  """Stripped content of the first `<answer>...</answer>`, or None where there is none.

  >>> extract_answer("<think>6 * 7</think> <answer> 42 </answer>")
  '42'
  """
  answer = own_answer(text)
  return answer.text if answer else None
