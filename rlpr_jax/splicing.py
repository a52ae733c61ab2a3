"""Where the reference answer goes in a sampled response, in token ids (RLPR, section 3.1).

A response `<think> z </think> <answer> y </answer>` is scored by putting the reference y* in the place of y and asking
the policy how probable the tokens of y* are. Everything before the `>` of `<answer>` stays as it was sampled, token by
token; everything from there on is tokenised anew:

    sampled   <think> 6 * 7 </think> <answer | >   41   </answer> EOS
    spliced   <think> 6 * 7 </think> <answer | >   42   </answer> EOS
    mask                                       F   T    F         F
"""

import bisect
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.answers import CLOSE as CLOSE
from rlpr_jax.answers import OPEN as OPEN
from rlpr_jax.answers import OwnAnswer as OwnAnswer
from rlpr_jax.answers import extract_answer as extract_answer
from rlpr_jax.answers import own_answer as own_answer
from rlpr_jax.errors import InputError
from rlpr_jax.rewards import TEMPLATE_TAGS

# The tags a scorable response holds, each exactly once and in this order.
# What closes the answer is left out: it is replaced together with the answer.
TAGS = {template: tags[:-1] for template, tags in TEMPLATE_TAGS.items()}


_OPENING = re.compile(r"<think>\s*(</think>)?\s*$")


class Splice(NamedTuple):
  """A response with the reference answer in it: `response_ids[:prefix_length] + suffix_ids`."""

  prefix_length: int  # how many of the sampled response ids are kept
  suffix_ids: list[int]  # from the token that holds the `>` of `<answer>` up to and including EOS
  answer_mask: list[bool]  # same length as suffix_ids; True on the tokens of the reference


class Place(NamedTuple):
  """Where answers go in a response."""

  prefix_length: int  # how many of its ids stand before them as they are
  before: str  # text from the first id that is not kept to where an answer begins

  def splice(
    self, tokenizer: PreTrainedTokenizerBase, answer: str, closing: str = f" {CLOSE}", eos_id: int | None = None
  ) -> Splice:
    """Puts an answer there, and `closing` and EOS behind it."""
    return Splice(self.prefix_length, *_encode_around(tokenizer, self.before, answer, closing, eos_id))


def splice(
  tokenizer: PreTrainedTokenizerBase,
  prompt_ids: Sequence[int] | np.ndarray,
  response_ids: Sequence[int] | np.ndarray,
  reference: str,
  template: str = "think",
  eos_id: int | None = None,
) -> Splice | None:
  """Put the reference answer in the place of the response's own answer.

  After `<answer>` come the whitespace the model wrote there (one space if it wrote none), the reference, one space,
  `</answer>` and EOS. Whatever else stood after `<answer>` is gone, so it need not be well formed.

  Args:
    tokenizer: a tokenizer that passed `check_tokenizer`.
    prompt_ids: ids of the prompt. A tag that they end with counts as the response's first; beside that tags count in
      the response alone, and no token of a response reaches back into its prompt.
    response_ids: sampled ids, in any tokenisation, with or without EOS at the end.
    reference: the reference answer, without whitespace around it.
    template: `think` or `answer_only`.
    eos_id: the token that ends a response; None for the tokenizer's EOS.

  Returns:
    The splice, or None when the response is not scorable: a tag of the template is missing, repeated or out of order.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> ids = tokenizer.encode("<think>6*7</think> <answer>41</answer>")
  >>> spliced = splice(tokenizer, [], ids, "42")
  >>> tokenizer.decode(ids[: spliced.prefix_length] + spliced.suffix_ids)
  '<think>6*7</think> <answer> 42 </answer><end>'
  """
  splices = splice_each(tokenizer, prompt_ids, response_ids, [reference], template, eos_id)
  return splices[0] if splices else None


def splice_each(
  tokenizer: PreTrainedTokenizerBase,
  prompt_ids: Sequence[int] | np.ndarray,
  response_ids: Sequence[int] | np.ndarray,
  references: Sequence[str],
  template: str = "think",
  eos_id: int | None = None,
) -> list[Splice]:
  """`splice` of each of several reference answers, which all stand behind the same response ids; [] instead of None.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> ids = tokenizer.encode("<think>6*7</think> <answer>41</answer>")
  >>> [tokenizer.decode(spliced.suffix_ids) for spliced in splice_each(tokenizer, [], ids, ["42", "XLII"])]
  ['<answer> 42 </answer><end>', '<answer> ???? </answer><end>']
  """
  place = find_place(tokenizer, prompt_ids, response_ids, template)
  return [place.splice(tokenizer, reference, eos_id=eos_id) for reference in references] if place else []


def find_place(
  tokenizer: PreTrainedTokenizerBase,
  prompt_ids: Sequence[int] | np.ndarray,
  response_ids: Sequence[int] | np.ndarray,
  template: str = "think",
) -> Place | None:
  """Find where `splice` puts an answer; None when the response is not scorable.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> find_place(tokenizer, [], tokenizer.encode("<think>6*7</think> <answer>41</answer>"))
  Place(prefix_length=6, before='<answer> ')
  """
  ids = [int(i) for i in response_ids]
  text = _decode(tokenizer, ids)
  if not _is_scorable(prompt_opening(tokenizer, prompt_ids) + text, template):
    return None
  end = text.index(OPEN) + len(OPEN)
  prefix_length, head = _keep(tokenizer, ids, text, end)
  written = re.match(r"\s*", text[end:])
  space = (written and written[0]) or " "
  return Place(prefix_length, text[len(head) : end] + space)


def prompt_opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] | np.ndarray) -> str:
  """Find the tags that a prompt ends with, which count as the response's first.

  Chat templates of models that always think open the thought themselves; those that can be told not to close it, too.

  Returns:
    "<think>", "<think></think>", or "".

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> prompt_opening(tokenizer, tokenizer.encode("<q>6*7<a><think>"))
  '<think>'
  """
  end = _OPENING.search(_decode(tokenizer, [int(i) for i in prompt_ids[-16:]]))
  return "".join(end[0].split()) if end else ""


def baseline_suffix(
  tokenizer: PreTrainedTokenizerBase, reference: str, prefix: str = "bare", eos_id: int | None = None
) -> tuple[list[int], list[bool]]:
  """Tokenise the reference straight after the assistant header, with no reasoning: what r' is measured on.

  Args:
    tokenizer: a tokenizer that passed `check_tokenizer`.
    reference: the reference answer, without whitespace around it.
    prefix: `bare` for the text `" " + y* + " "`, as the reference implementation has it; `tagged` puts `<answer>`
      before it.
    eos_id: as for `splice`.

  Returns:
    Token ids up to and including EOS, and the mask of the reference's tokens, of the same length.

  >>> from rlpr_jax.data import builtin
  >>> baseline_suffix(builtin.tokenizer(), "42")  # a space, 4, 2, a space and EOS
  ([44, 38, 36, 44, 1], [False, True, True, False, False])
  """
  before = {"bare": " ", "tagged": f"{OPEN} "}
  if prefix not in before:
    raise InputError(f"baseline prefix {prefix!r}: expected one of {', '.join(before)}")
  return _encode_around(tokenizer, before[prefix], reference, " ", eos_id)


def count_suffix_tokens(tokenizer: PreTrainedTokenizerBase, references: Sequence[str], template: str) -> list[int]:
  """How many tokens the suffix of each reference has, with EOS, in a response of nothing but the template's tags.

  The same as the lengths of `splice` one by one, many times as fast: what stands before the reference is looked for
  once, and all references are tokenised together.

  >>> from rlpr_jax.data import builtin
  >>> count_suffix_tokens(builtin.tokenizer(), ["42", "seven"], "think")
  [7, 10]
  """
  ids = tokenizer.encode("".join(TAGS[template]), add_special_tokens=False)
  text = _decode(tokenizer, ids)
  end = text.index(OPEN) + len(OPEN)
  _, head = _keep(tokenizer, ids, text, end)
  return _count_around(tokenizer, f"{text[len(head) : end]} ", references, f" {CLOSE}")


def count_baseline_tokens(tokenizer: PreTrainedTokenizerBase, references: Sequence[str]) -> list[int]:
  """How many tokens `baseline_suffix` has of each reference with the longer prefix, `tagged`."""
  return _count_around(tokenizer, f"{OPEN} ", references, " ")


def as_sampled(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int] | np.ndarray, spliced: Splice) -> Splice:
  """The response's own answer in its own ids, where these are others than those of its text spliced in.

  Args:
    spliced: the answer's text in its own response, with its own closing.

  Returns:
    a splice whose `answer_mask` is True from the answer's first token to the last of `</answer>`.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> ids = tokenizer.encode("<think>6*7</think> <answer>41</answer>")
  >>> spliced = find_place(tokenizer, [], ids).splice(tokenizer, "41", "</answer>")
  >>> sum(as_sampled(tokenizer, ids, spliced).answer_mask)
  3
  """
  sampled = [int(i) for i in response_ids[spliced.prefix_length :]]
  count = len(spliced.suffix_ids) - 1
  if sampled[:count] == spliced.suffix_ids[:-1]:
    return with_ending(spliced)
  texts = [_decode(tokenizer, sampled[:n]) for n in range(len(sampled) + 1)]
  end = next(n for n, text in enumerate(texts) if CLOSE in text)
  start = max(n for n, text in enumerate(texts[:end]) if not text.partition(">")[2].strip())
  mask = [start <= i < end for i in range(end)]
  return Splice(spliced.prefix_length, [*sampled[:end], spliced.suffix_ids[-1]], [*mask, False])


def with_ending(spliced: Splice) -> Splice:
  """A splice whose `answer_mask` goes on to the end of `</answer>`: how probable the answer is and that it ends there.

  >>> with_ending(Splice(5, [7, 3, 8, 1], [False, True, False, False])).answer_mask
  [False, True, True, False]
  """
  end = len(spliced.suffix_ids) - 1
  start = spliced.answer_mask.index(True) if any(spliced.answer_mask) else end
  return spliced._replace(answer_mask=[start <= i < end for i in range(end + 1)])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
  """Refuse, with an `InputError`, a tokenizer that responses cannot be spliced with."""
  name = tokenizer.name_or_path or type(tokenizer).__name__
  if not tokenizer.is_fast:
    raise InputError(f"tokenizer {name}: expected a fast tokenizer (tokenizer.json), only those say where a token lies")
  if tokenizer.eos_token_id is None:
    raise InputError(f"tokenizer {name}: expected an EOS token, found none")
  # What a splice does, without the answer: keep the ids before the last `>`, tokenise the rest by itself. A tokenizer
  # that puts a space before every text or between tokens, or does not know the characters, gives another text.
  ids = 2 * tokenizer.encode(OPEN, add_special_tokens=False)
  text = _decode(tokenizer, ids)
  if text == 2 * OPEN:
    length, head = _keep(tokenizer, ids, text, len(text))
    text = _decode(tokenizer, ids[:length] + tokenizer.encode(text.removeprefix(head), add_special_tokens=False))
  if text != 2 * OPEN:
    raise InputError(f"tokenizer {name}: expected {2 * OPEN!r} back when tokenised in pieces, found {text!r}")


def _is_scorable(text: str, template: str) -> bool:
  """Whether every tag of the template occurs exactly once, in order; text may stand anywhere around them."""
  if template not in TAGS:
    raise InputError(f"template {template!r}: expected one of {', '.join(TAGS)}")
  tags = TAGS[template]
  positions = [text.find(tag) for tag in tags]
  return all(text.count(tag) == 1 for tag in tags) and positions == sorted(positions)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
  return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _keep(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, end: int) -> tuple[int, str]:
  """The sampled ids before the token that holds the last character of `text[:end]`.

  Args:
    ids: the sampled tokens.
    text: what they decode to.
    end: position after an ASCII character, here the `>` of `<answer>`.

  Returns:
    How many ids are kept and what they decode to, a proper prefix of `text[:end]`.
  """

  def tail(start: int) -> str:
    return _decode(tokenizer, ids[start:])

  # No UTF-8 sequence reaches over an ASCII character, so what follows it reads the same wherever decoding starts
  # before it. Answers stand near the end: look in short tails first, then halve.
  size = 16
  while size < len(ids) and not tail(-size).endswith(text[end - 1 :]):
    size *= 2
  first_without = bisect.bisect_left(
    range(len(ids)), True, lo=max(len(ids) - size, 0), key=lambda start: not tail(start).endswith(text[end - 1 :])
  )
  length = first_without - 1
  # A tail that starts inside a multi-byte character reads U+FFFD there: go back to where that character starts.
  while not text.endswith(tail(length)):
    length -= 1
  return length, text.removesuffix(tail(length))


def _count_around(tokenizer: PreTrainedTokenizerBase, before: str, references: Sequence[str], after: str) -> list[int]:
  """The lengths of what `_encode_around` gives for each reference."""
  counts, controls = dict.fromkeys(references, 0), tokenizer.all_special_tokens
  for spelled in (False, True):
    if some := [text for text in counts if spelled == any(token in text for token in controls)]:
      encoded = tokenizer(
        [before + text + after for text in some],
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=spelled,
        verbose=False,
      )
      counts |= {text: len(ids) + 1 for text, ids in zip(some, encoded["input_ids"], strict=True)}
  return [counts[text] for text in references]


def _encode_around(
  tokenizer: PreTrainedTokenizerBase, before: str, reference: str, after: str, eos_id: int | None
) -> tuple[list[int], list[bool]]:
  """Ids of `before + reference + after` and EOS, and which of them hold a character of the reference."""
  text = before + reference + after
  encoded = tokenizer(
    text,
    add_special_tokens=False,
    return_offsets_mapping=True,
    return_attention_mask=False,
    # A reference that spells a control token, such as "<|im_end|>", is text and never that token.
    split_special_tokens=any(token in reference for token in tokenizer.all_special_tokens),
    verbose=False,
  )
  start, end = len(before), len(before) + len(reference)
  # ByteLevel's `trim_offsets` takes spaces off a span, down to an empty one for a token of spaces. Since a reference
  # begins and ends with something else, a span stays inside it or outside it.
  mask = [left < end and right > start for left, right in encoded["offset_mapping"]]
  return [*encoded["input_ids"], tokenizer.eos_token_id if eos_id is None else eos_id], [*mask, False]
