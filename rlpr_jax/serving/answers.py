"""Bodies of responses as OpenAI's interface has them, of what was sampled."""

import functools
import re
import secrets
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.sampling.adjustments import TokenScores, TopTokens

Json = dict[str, Any]

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LEAST = -9999.0  # for -inf, which JSON does not have; as vLLM has it


class TextStream:
  """The text of a response as it grows; what is told is never taken back.

  Of the tokens some last ones are kept, in two parts that each end where later tokens change nothing: what the new ones
  add is decoded after the older ones, so that a decoder that strips a text's first space, or puts one between tokens,
  does it as in the whole text. So a token is decoded a few times, however long the response becomes.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden_ids: Collection[int], stop: Sequence[str]):
    """
    Args:
      hidden_ids: tokens that the text does not show, such as EOS.
    """
    self._tokenizer = tokenizer
    self._hidden_ids, self._stop = hidden_ids, stop
    self._seen = 0  # tokens of the response
    self._ids: list[int] = []  # the last ones
    self._settled = 0  # how many of these are told, or held
    self._before = ""  # their text
    self._held = ""  # text after what was told, as far as it is known
    self.told = 0  # characters

  def grow(self, tokens: np.ndarray) -> str:
    """New text, but for what later tokens may still change: half a character, the beginning of a stop string.

    Args:
      tokens: int[T], all of the response so far.
    """
    first = len(self._ids)
    self._ids += [int(token) for token in tokens[self._seen :] if token not in self._hidden_ids]
    self._seen = len(tokens)
    end = next((end for end in range(len(self._ids), first, -1) if self._is_settled(end)), 0)
    if end:
      self._held += self._decode(self._ids[:end])[len(self._before) :]
      del self._ids[: self._settled]
      self._settled = end - self._settled
      self._before = self._decode(self._ids[: self._settled])
    text = self._held
    held = max(
      (size for stop in self._stop for size in range(1, len(stop) + 1) if text.endswith(stop[:size])), default=0
    )
    new, self._held = text[: len(text) - held], text[len(text) - held :]
    self.told += len(new)
    return new

  def _is_settled(self, end: int) -> bool:
    """Whether the text of the tokens before `end` stays as it is, whatever follows.

    A character has four bytes at most, so four tokens show whether one ends there. Tokens of a byte each, as
    SentencePiece has them, are one text with all such tokens that follow: invalid as soon as one of them is.
    """
    name = self._tokenizer.convert_ids_to_tokens(self._ids[end - 1])
    if name is None or _BYTE.fullmatch(name):  # None: an id that means nothing
      return False
    text = self._decode(self._ids[max(end - 4, 0) : end])
    return bool(text) and not text.endswith("\N{REPLACEMENT CHARACTER}")

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def end(self, text: str) -> str:
    """The part of the whole text that was not told yet."""
    new, self.told = text[self.told :], max(self.told, len(text))
    return new


def identify(chat: bool) -> Json:
  """Makes what all bodies that answer one request have in common.

  >>> identify(chat=True)["object"]
  'chat.completion'
  """
  kind = "chat.completion" if chat else "text_completion"
  return {
    "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
    "object": kind,
    "created": int(time.time()),
  }


class Told(NamedTuple):
  """A token of a response, or of the prompt that is repeated before it, as a client is told of it."""

  token: int
  logprob: float | None  # None: of a prompt's first token
  top: tuple[tuple[int, float], ...]  # most probable tokens in its place, the most probable first


def tell(tokens: np.ndarray, logprobs: np.ndarray, top: TopTokens | None, count: int) -> list[Told]:
  """What is told of sampled tokens, with so many of the most probable ones.

  >>> tell(np.array([5]), np.array([-0.5]), TopTokens(np.array([[5, 7]]), np.array([[-0.5, -1.5]])), 1)
  [Told(token=5, logprob=-0.5, top=((5, -0.5),))]
  """
  if top is None or not count:
    return [Told(int(token), _number(value), ()) for token, value in zip(tokens, logprobs, strict=True)]
  return [
    Told(int(token), _number(value), tuple(zip(map(int, ids[:count]), map(_number, values[:count]), strict=True)))
    for token, value, ids, values in zip(tokens, logprobs, top.ids, top.logprobs, strict=True)
  ]


def tell_prompt(ids: np.ndarray, scores: TokenScores, count: int) -> list[Told]:
  """The same of a prompt's tokens; before the first there is nothing to say of it."""
  return [Told(int(ids[0]), None, ()), *tell(ids[1:], scores.logprobs, scores.top, count)]


def _number(value: float) -> float:
  return max(float(value), _LEAST)


@functools.lru_cache(maxsize=2**18)
def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
  return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def logprobs_body(chat: bool, tokenizer: PreTrainedTokenizerBase, told: Sequence[Told], count: int, begin: int) -> Json:
  """Log-probabilities of tokens, in nats.

  Args:
    count: how many of the most probable tokens were asked for.
    begin: characters of text before them.
  """
  texts = [_token_text(tokenizer, each.token) for each in told]
  if not chat:
    return {
      "tokens": texts,
      "token_logprobs": [each.logprob for each in told],
      "top_logprobs": [_by_text(tokenizer, each) for each in told] if count else None,
      "text_offset": np.cumsum([begin, *map(len, texts)])[:-1].tolist(),
    }
  return {
    "content": [
      _of_chat(text, each.logprob)
      | {"top_logprobs": [_of_chat(_token_text(tokenizer, token), value) for token, value in each.top]}
      for text, each in zip(texts, told, strict=True)
    ]
  }


def _of_chat(text: str, logprob: float | None) -> Json:
  # Part of a character has bytes that its text does not tell.
  return {
    "token": text,
    "logprob": logprob,
    "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()),
  }


def _by_text(tokenizer: PreTrainedTokenizerBase, told: Told) -> dict[str, float] | None:
  """The most probable tokens, and the one that is there; of those with the same text the most probable."""
  if told.logprob is None:
    return None
  by_text: dict[str, float] = {}
  for token, value in (*told.top, (told.token, told.logprob)):
    by_text.setdefault(_token_text(tokenizer, token), value)
  return by_text


def prompt_logprobs_body(
  tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, scores: TokenScores, count: int
) -> list[Json | None]:
  """Log-probabilities of a prompt's tokens as vLLM tells them: of each by id, with the most probable ones."""
  body: list[Json | None] = [None]
  for told, rank in zip(tell_prompt(ids, scores, count)[1:], scores.ranks, strict=True):
    ranked = [(told.token, told.logprob, int(rank)), *((*pair, 1 + i) for i, pair in enumerate(told.top))]
    of_place: Json = {}
    for token, value, place in ranked:
      named = {"logprob": value, "rank": place, "decoded_token": _token_text(tokenizer, token)}
      of_place.setdefault(str(token), named)
    body.append(of_place)
  return body


class Piece(NamedTuple):
  """One response of a body, or a piece of it."""

  choice: int  # its number among the responses
  text: str
  reason: str | None  # why it ended; None before
  logprobs: Json | None


def choice_body(chat: bool, piece: Piece, streamed: bool) -> Json:
  """Makes the part of a body that is one response's.

  >>> choice_body(chat=False, piece=Piece(0, "hi", "stop", None), streamed=False)
  {'index': 0, 'text': 'hi', 'logprobs': None, 'finish_reason': 'stop'}
  """
  said = {"text": piece.text}
  if chat:
    said = {"delta": {"content": piece.text}} if streamed else {"message": {"role": "assistant", "content": piece.text}}
  return {"index": piece.choice, **said, "logprobs": piece.logprobs, "finish_reason": piece.reason}


def opening_body(choice: int) -> Json:
  """Makes the first piece of a response in a stream of a chat, which alone says who speaks.

  >>> opening_body(0)["delta"]
  {'role': 'assistant', 'content': ''}
  """
  delta = {"role": "assistant", "content": ""}
  return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
  """Counts the tokens of a request.

  >>> usage(3, 4)
  {'prompt_tokens': 3, 'completion_tokens': 4, 'total_tokens': 7}
  """
  total = prompt_tokens + completion_tokens
  return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def tokenizer_body(tokenizer: PreTrainedTokenizerBase) -> Json:
  """A tokenizer as its tokenizer_config.json has it, in what a client may go by."""
  names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
  return {
    "tokenizer_class": type(tokenizer).__name__,
    **{name: getattr(tokenizer, name, None) for name in names},
    "additional_special_tokens": tokenizer.all_special_tokens,
  }
