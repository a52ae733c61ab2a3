"""OpenAI's interface: bodies of requests to calls, what was sampled to bodies of responses."""

import dataclasses
import json
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.data.templates import render
from rlpr_jax.errors import InputError
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.types import Prompt

Json = dict[str, Any]

MOST_STOPS = 4  # as OpenAI has it
# Fields that change nothing here.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that would change the response and are not there, with the values that ask for nothing.
_NEUTRAL = {
  "frequency_penalty": (None, 0),
  "presence_penalty": (None, 0),
  "logit_bias": (None, {}),
  "top_logprobs": (None, 0),
  "echo": (None, False),
  "suffix": (None, ""),
  "best_of": (None, 1),
  "tools": (None, []),
  "tool_choice": (None, "none"),
  "response_format": (None, {"type": "text"}),
  "modalities": (None, ["text"]),
}
_COMMON = (
  "model",
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "n",
  "stop",
  "seed",
  "stream",
  "stream_options",
  "logprobs",
)
_FIELDS = {
  True: (*_COMMON, "messages", "max_tokens", "max_completion_tokens"),
  False: (*_COMMON, "prompt", "max_tokens"),
}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_COMPLETION_TOKENS = 16  # where a plain completion does not say how many, as OpenAI has it


class RequestError(Exception):
  """A request that cannot be served; the message is one line for the client.

  >>> RequestError(404, "no such model", code="model_not_found").body()["error"]["code"]
  'model_not_found'
  """

  def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
    super().__init__(message)
    self.status = status
    self.kind = kind
    self.code = code

  def body(self) -> Json:
    return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Call:
  """A request that can be served."""

  chat: bool
  prompts: tuple[Prompt, ...]  # one, or several of a plain completion
  n: int  # samples of each
  limit: int  # tokens of a response
  sampling: SamplingParams
  stop: tuple[str, ...]
  seed: int  # uint32
  stream: bool
  usage: bool  # whether a stream ends with the number of tokens
  logprobs: bool


def parse(body: bytes, chat: bool, model: str, tokenizer: PreTrainedTokenizerBase, shapes: Shapes, most: int) -> Call:
  """Reads and checks the body of a request.

  Args:
    model: the name that is served.
    most: samples of one request.

  Raises:
    RequestError: naming the field and what was expected.
  """
  try:
    request = json.loads(body)
  except (ValueError, RecursionError):
    raise RequestError(400, "body: expected JSON") from None
  if not isinstance(request, dict):
    raise RequestError(400, "body: expected a JSON object")
  for name, value in request.items():
    if name in _NEUTRAL and value not in _NEUTRAL[name]:
      raise RequestError(400, f"{name}: not supported")
    if name not in (*_FIELDS[chat], *_IGNORED, *_NEUTRAL):
      raise RequestError(400, f"{name[:100]!r}: unknown field")
  asked = _take(request, "model", str, None)
  if asked != model:
    raise RequestError(404, f"model {str(asked)[:100]!r}: not served here, expected {model!r}", code="model_not_found")
  n = _within(_take(request, "n", int, 1), "n", 1, most)
  prompts = _chat_prompt(request, tokenizer) if chat else _plain_prompts(request, tokenizer, most // n)
  if not all(prompts):
    raise RequestError(400, "the prompt has no tokens, expected some")
  longest = max(len(ids) for ids in prompts)
  if longest > shapes.prompt_limit:
    raise RequestError(
      400, f"the prompt has {longest} tokens, expected at most {shapes.prompt_limit}", code="context_length_exceeded"
    )
  limit = _take(request, "max_tokens", int, shapes.max_response_length if chat else _COMPLETION_TOKENS)
  limit = _take(request, "max_completion_tokens", int, limit)  # the name of it in chats; else it is refused above
  limit = _within(limit, "max_tokens", 1, shapes.max_response_length)
  sampling = SamplingParams(
    temperature=_within(_take(request, "temperature", float, 1.0), "temperature", 0, 2),
    top_k=_within(_take(request, "top_k", int, 0), "top_k", -1, 2**31 - 1),
    top_p=_within(_take(request, "top_p", float, 1.0), "top_p", 0, 1),
    min_p=_within(_take(request, "min_p", float, 0.0), "min_p", 0, 1),
  )
  options = _take(request, "stream_options", dict, {})
  seed = _take(request, "seed", int, None)
  logprobs = request.get("logprobs")
  if logprobs is not None and not (isinstance(logprobs, bool) if chat else type(logprobs) is int and logprobs == 0):
    raise RequestError(400, f"logprobs: expected {'true or false' if chat else '0: those of the sampled tokens'}")
  return Call(
    chat=chat,
    prompts=tuple(Prompt(ids=np.array(ids, np.int32), row=row) for row, ids in enumerate(prompts)),
    n=n,
    limit=limit,
    sampling=dataclasses.replace(sampling, top_k=max(sampling.top_k, 0)),
    stop=_stops(request.get("stop")),
    seed=secrets.randbits(32) if seed is None else seed % 2**32,
    stream=_take(request, "stream", bool, False),
    usage=bool(options.get("include_usage")),
    logprobs=logprobs is not None and logprobs is not False,
  )


def _take(request: Json, name: str, kind: type, default: Any) -> Any:
  value = request.get(name)
  if value is None:
    return default
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise RequestError(400, f"{name}: expected {kind.__name__}, found {json.dumps(value)[:100]}")
  return value


def _within(value: Any, name: str, least: float, most: float) -> Any:
  if not least <= value <= most:  # NaN is not
    raise RequestError(400, f"{name}: {value}, expected {least} to {most}")
  return value


def _stops(value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value or []
  if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(x, str) and x for x in stops):
    raise RequestError(400, f"stop: expected a text or at most {MOST_STOPS} of them, none empty")
  return tuple(map(_text, stops))


def _text(text: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
    raise RequestError(400, "text: expected Unicode, found a lone surrogate") from None
  return text


def _chat_prompt(request: Json, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
  messages = request.get("messages")
  if not isinstance(messages, list) or not messages:
    raise RequestError(400, "messages: expected one or more messages")
  chat = []
  for i, message in enumerate(messages):
    where = f"messages[{i}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise RequestError(400, f"{where}: expected an object with role and content")
    role = {"developer": "system"}.get(message["role"], message["role"])
    if role not in ("system", "user", "assistant"):
      raise RequestError(400, f"{where}.role: expected system, user or assistant")
    content = message.get("content")
    if isinstance(content, list):  # parts
      if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise RequestError(400, f"{where}.content: expected parts of text alone")
      content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
      raise RequestError(400, f"{where}.content: expected text")
    chat.append({"role": role, "content": _text(content)})
  if not any(message["role"] == "user" for message in chat):
    raise RequestError(400, "messages: expected one or more of the user")
  try:
    return [render(tokenizer, chat)]
  except InputError as error:
    raise RequestError(400, str(error)) from None


def _plain_prompts(request: Json, tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[int]]:
  prompt = request.get("prompt")
  several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
  if several and len(prompt) > most:
    raise RequestError(400, f"prompt: {len(prompt)} of them, expected at most {most} with that n")
  prompts = []
  for entry in prompt if several else [prompt]:
    if isinstance(entry, str) and entry:
      prompts.append(tokenizer.encode(_text(entry)))
    elif isinstance(entry, list) and entry and all(type(x) is int and 0 <= x < len(tokenizer) for x in entry):
      prompts.append(entry)
    else:
      raise RequestError(400, "prompt: expected a text or token ids, or a list of such, none empty")
  return prompts


# --- responses ---


class TextStream:
  """The text of a response as it grows; what is told is never taken back.

  Of the tokens some last ones are kept, in two parts that each end where later tokens change nothing: what the new ones
  add is decoded after the older ones, so that a decoder that strips a text's first space, or puts one between tokens,
  does it as in the whole text. So a token is decoded a few times, however long the response becomes.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], stop: Sequence[str]):
    self._tokenizer = tokenizer
    self._eos_ids, self._stop = eos_ids, stop
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
    self._ids += [int(token) for token in tokens[self._seen :] if token not in self._eos_ids]
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


def token_logprobs(
  chat: bool, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, logprobs: np.ndarray, begin: int
) -> Json:
  """Log-probabilities of the sampled tokens, in nats; `begin`: characters of text before them."""
  texts = [tokenizer.decode([int(token)], clean_up_tokenization_spaces=False) for token in tokens]
  values = [float(value) for value in logprobs]
  if not chat:
    offsets = np.cumsum([begin, *map(len, texts)])[:-1].tolist()
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
  return {
    "content": [
      {"token": text, "logprob": value, "bytes": _bytes(text), "top_logprobs": []}
      for text, value in zip(texts, values, strict=True)
    ]
  }


def _bytes(text: str) -> list[int] | None:
  """A token's bytes; None for part of a character, whose bytes its text does not tell."""
  return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


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
  content = {"role": "assistant", "content": piece.text}
  said = {"delta" if streamed else "message": content} if chat else {"text": piece.text}
  return {"index": piece.choice, **said, "logprobs": piece.logprobs, "finish_reason": piece.reason}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
  """Counts the tokens of a request.

  >>> usage(3, 4)
  {'prompt_tokens': 3, 'completion_tokens': 4, 'total_tokens': 7}
  """
  total = prompt_tokens + completion_tokens
  return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
