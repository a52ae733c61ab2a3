"""Responses as text: where the reasoning stands in the tokens, its sentences and words."""

import bisect
import re
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing

_TAGS = re.compile(r"</?(?:think|answer)>")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")  # the same marks, and those of Chinese


def reasoning_span(
  tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray, template: str = "think"
) -> tuple[int, int]:
  """Finds the tokens of a scorable response's reasoning: those that hold nothing of a tag.

  Args:
    ids: of the response.
    template: as for `splicing.splice`. Reasoning ends where `</think>`, or of `answer_only` where `<answer>`, begins;
      it begins with the response where the prompt has opened it.

  Returns:
    begin and end; the same where there is none.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> reasoning_span(tokenizer, tokenizer.encode("<think>6*7</think> <answer>42</answer>"))
  (1, 4)
  """
  ids = [int(i) for i in ids]

  def decode(end: int) -> str:
    return str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

  text = decode(len(ids))
  opening, closing = splicing.TAGS[template][0], splicing.TAGS[template][-2 if template == "think" else -1]
  begin = text.find(opening) + len(opening) if template == "think" and opening in text else 0
  end = text.find(closing, begin)
  first = _first(lambda k: len(decode(k)) >= begin, len(ids))
  last = _first(lambda k: len(decode(k)) > end, len(ids)) - 1 if end >= 0 else first
  return first, max(first, last)


def _first(holds: Callable[[int], bool], most: int) -> int:
  """The first of 0 to `most` for which something holds that holds for all behind it."""
  return bisect.bisect_left(range(most), True, key=holds)


def sentences(text: str) -> list[str]:
  """Splits a text behind its full stops, question and exclamation marks, and at line breaks.

  >>> sentences("First 6 * 7. That is 42!\\n\\nSo 42.")
  ['First 6 * 7.', 'That is 42!', 'So 42.']
  """
  return [part.strip() for part in _SENTENCES.split(text) if part.strip()]


def shuffle(pieces: Sequence[str], seed: int) -> str | None:
  """Joins pieces of a text, by spaces, in another order than they had; None where there is no other.

  >>> shuffle(["a", "b"], seed=0), shuffle(["a", "a"], seed=0)
  ('b a', None)
  """
  if len(set(pieces)) < 2:
    return None
  rng, order = np.random.default_rng(seed), list(pieces)
  while order == list(pieces):
    order = [pieces[i] for i in rng.permutation(len(pieces))]
  return " ".join(order)


def words(text: str) -> set[str]:
  """The words of a response without its tags, in lower case; numbers are of one kind, whatever they are.

  >>> sorted(words("<think> So 17 + 25 is forty-two </think> <answer> 42 </answer>"))
  ['NUMBER', 'forty', 'is', 'so', 'two']
  """
  found = re.findall(r"\w+", _TAGS.sub(" ", text).lower())
  return {"NUMBER" if word[0].isdigit() else word for word in found}
