"""OpenAI's interface, with vLLM's additions: bodies of requests to calls."""

import dataclasses
import functools
import json
import secrets
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.data.templates import Rendering, render
from rlpr_jax.errors import InputError
from rlpr_jax.sampling.adjustments import MOST_TOP, Adjustments, Form
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Extras
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.serving.answers import Json
from rlpr_jax.types import Prompt

MOST_STOPS = 64
# Fields that change nothing here, whatever they say.
_IGNORED = (
  "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
  "parallel_tool_calls", "priority", "request_id", "session_id", "cache_salt", "truncation_side", "stream_interval",
)  # fmt: skip
# Fields that would change the response and are not there, with the values that ask for nothing; null always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "suffix": ("",),
  "best_of": (1,),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "functions": ([],),
  "function_call": ("none", "auto"),
  "modalities": (["text"],),
  "use_beam_search": (False,),
  "length_penalty": (1,),
  "early_stopping": (False,),
  "include_stop_str_in_output": (False,),
  "spaces_between_special_tokens": (True,),
  "include_reasoning": (True,),
  "return_tokens_as_token_ids": (False,),
  "return_token_ids": (False,),
  "return_prompt_text": (False,),
  "watermarking": (False,),
  "bad_words": ([],),
  "documents": ([],),
  "logits_processors": ([],),
  **dict.fromkeys(
    (
      "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "chat_template",
      "mm_processor_kwargs", "media_io_kwargs", "prompt_embeds", "truncate_prompt_tokens", "logprob_token_ids",
      "thinking_token_budget", "repetition_detection", "structured_outputs", "guided_json", "guided_regex",
      "guided_choice", "guided_grammar", "structural_tag", "kv_transfer_params", "vllm_xargs",
    ),
    (),
  ),
}  # fmt: skip
_COMMON = (
  "model", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "stream", "stream_options", "logprobs",
  "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "stop_token_ids",
  "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs", "response_format", "echo",
  "add_special_tokens", "max_tokens",
)  # fmt: skip
_OF_CHATS = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_FIELDS = {
  True: (*_COMMON, *_OF_CHATS, "max_completion_tokens", "top_logprobs"),
  False: (*_COMMON, "prompt"),
}
_TOKENIZED = ("model", "prompt", "add_special_tokens", "return_token_strs", *_OF_CHATS)
# What a template is not told by a client: these are arguments of the function that renders it.
_RESERVED = (
  "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
  "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "tokenize", "tokenizer_kwargs",
  "tools", "truncation",
)  # fmt: skip
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
class Served:
  """What a server offers, as far as requests go."""

  model: str  # its name
  tokenizer: PreTrainedTokenizerBase
  shapes: Shapes
  eos_ids: tuple[int, ...]
  vocabulary: int  # tokens that the model knows
  most: int  # samples of one request
  raw_logprobs: bool  # or those of the distribution that was sampled, at its temperature
  form: Callable[[Json], Callable[[], Form]]  # makes what a `response_format` of a JSON schema asks for

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    return frozenset(self.tokenizer.all_special_ids)

  @property
  def tokens(self) -> int:
    """Ids from 0 up to this are tokens of the tokenizer and of the model."""
    return min(len(self.tokenizer), self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Call:
  """A request that can be served."""

  chat: bool
  prompts: tuple[Prompt, ...]  # one, or several of a plain completion
  echoes: tuple[str, ...]  # text of each that is repeated before its responses; none without `echo`
  n: int  # samples of each
  limit: int  # tokens of a response
  sampling: SamplingParams
  extras: Extras
  stop: tuple[str, ...]
  seeds: tuple[int, ...]  # uint32, of each prompt
  stream: bool
  usage: bool  # whether a stream ends with the number of tokens
  logprobs: int | None  # of the sampled tokens, with so many of the most probable ones; None: not asked for
  prompt_logprobs: int | None  # the same of the prompt's, as vLLM tells them


def parse(body: bytes, chat: bool, served: Served) -> Call:
  """Reads and checks the body of a request.

  Raises:
    RequestError: naming the field and what was expected.
  """
  request = _read_object(body, served, (*_FIELDS[chat], *_IGNORED))
  n = _within(_take(request, "n", int, 1), "n", 1, served.most)
  echo = _take(request, "echo", bool, False)
  if chat and echo:
    raise RequestError(400, "echo: not supported in chats")
  texts = [(None, _chat_ids(request, served.tokenizer))] if chat else _plain_prompts(request, served, served.most // n)
  if not all(ids for _, ids in texts):
    raise RequestError(400, "the prompt has no tokens, expected some")
  shapes = served.shapes
  longest = max(len(ids) for _, ids in texts)
  if longest > shapes.prompt_limit:
    raise RequestError(
      400, f"the prompt has {longest} tokens, expected at most {shapes.prompt_limit}", code="context_length_exceeded"
    )
  limit = _take(request, "max_tokens", int, shapes.max_response_length if chat else _COMPLETION_TOKENS)
  limit = _take(request, "max_completion_tokens", int, limit)  # the name of it in chats; else it is refused above
  limit = _within(limit, "max_tokens", 0 if echo else 1, shapes.max_response_length)
  sampling = SamplingParams(
    temperature=_within(_take(request, "temperature", float, 1.0), "temperature", 0, 2),
    top_k=max(_within(_take(request, "top_k", int, 0), "top_k", -1, 2**31 - 1), 0),
    top_p=_within(_take(request, "top_p", float, 1.0), "top_p", 0, 1),
    min_p=_within(_take(request, "min_p", float, 0.0), "min_p", 0, 1),
  )
  logprobs = _logprobs(request, chat)
  prompt_logprobs = _take(request, "prompt_logprobs", int, None)
  stream = _take(request, "stream", bool, False)
  if prompt_logprobs is not None:
    _within(prompt_logprobs, "prompt_logprobs", 0, MOST_TOP)
    if stream:
      raise RequestError(400, "prompt_logprobs: not supported in a stream")
  tops = [prompt_logprobs, logprobs if echo else None]
  options = _take(request, "stream_options", dict, {})
  if options.get("continuous_usage_stats"):
    raise RequestError(400, "stream_options.continuous_usage_stats: not supported")
  seed = _take(request, "seed", int, None)
  # Without a seed, equal prompts of a list are to get different responses; with one, equal ones.
  first = secrets.randbits(32) if seed is None else seed
  return Call(
    chat=chat,
    prompts=tuple(Prompt(ids=np.array(ids, np.int32), row=row) for row, (_, ids) in enumerate(texts)),
    echoes=tuple(_decode(served, ids) if text is None else text for text, ids in texts) if echo else (),
    n=n,
    limit=limit,
    sampling=sampling,
    extras=Extras(
      adjustments=_adjustments(request, served, sampling, limit, logprobs),
      prompt_top=max((top for top in tops if top is not None), default=None),
      hidden=served.special_ids if _take(request, "skip_special_tokens", bool, False) else frozenset(),
    ),
    stop=_stops(request.get("stop")),
    seeds=tuple((first + (row if seed is None else 0)) % 2**32 for row in range(len(texts))),
    stream=stream,
    usage=bool(options.get("include_usage")),
    logprobs=logprobs,
    prompt_logprobs=prompt_logprobs,
  )


def parse_tokenize(body: bytes, served: Served) -> Json:
  """Answers a request for the tokens of a text or a chat, as vLLM does.

  Raises:
    RequestError: as `parse`.
  """
  request = _read_object(body, served, _TOKENIZED)
  if "messages" in request:
    ids = _chat_ids(request, served.tokenizer)
  elif "prompt" not in request:
    raise RequestError(400, "expected a prompt or messages")
  else:
    text = _text(_take(request, "prompt", str, ""))
    ids = served.tokenizer.encode(text, add_special_tokens=_take(request, "add_special_tokens", bool, True))
  with_names = _take(request, "return_token_strs", bool, False)
  return {
    "count": len(ids),
    "max_model_len": served.shapes.longest,
    "tokens": ids,
    "token_strs": served.tokenizer.convert_ids_to_tokens(ids) if with_names else None,
  }


def parse_detokenize(body: bytes, served: Served) -> Json:
  """Answers a request for the text of tokens, as vLLM does.

  Raises:
    RequestError: as `parse`.
  """
  request = _read_object(body, served, ("model", "tokens"))
  return {"prompt": _decode(served, list(_ids(request, "tokens", served)))}


def _read_object(body: bytes, served: Served, fields: Collection[str]) -> Json:
  """Reads a request, without fields that ask for nothing; it is for the model that is served."""
  try:
    request = json.loads(body)
  except (ValueError, RecursionError):
    raise RequestError(400, "body: expected JSON") from None
  if not isinstance(request, dict):
    raise RequestError(400, "body: expected a JSON object")
  request = {name: value for name, value in request.items() if value is not None}
  for name, value in request.items():
    if name in _NEUTRAL and name not in fields:
      if value not in _NEUTRAL[name]:
        raise RequestError(400, f"{name}: not supported")
    elif name not in fields:
      raise RequestError(400, f"{name[:100]!r}: unknown field")
  asked = _take(request, "model", str, served.model)
  if asked != served.model:
    message = f"model {asked[:100]!r}: not served here, expected {served.model!r}"
    raise RequestError(404, message, code="model_not_found")
  return request


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


def _ids(request: Json, name: str, served: Served) -> tuple[int, ...]:
  ids = _take(request, name, list, [])
  if not all(type(x) is int and 0 <= x < served.tokens for x in ids):
    raise RequestError(400, f"{name}: expected ids of tokens, 0 to {served.tokens - 1}")
  return tuple(ids)


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


def _decode(served: Served, ids: list[int]) -> str:
  return str(served.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _logprobs(request: Json, chat: bool) -> int | None:
  """How many of the most probable tokens are told beside the sampled ones; None where not even those are."""
  asked = request.get("logprobs")
  if not chat:
    if asked is None or asked is False:
      return None
    if type(asked) is not int:
      raise RequestError(400, f"logprobs: expected 0 to {MOST_TOP}, found {json.dumps(asked)[:100]}")
    return _within(asked, "logprobs", 0, MOST_TOP)
  asked = _take(request, "logprobs", bool, False)
  top = _within(_take(request, "top_logprobs", int, 0), "top_logprobs", 0, MOST_TOP)
  if top and not asked:
    raise RequestError(400, "top_logprobs: expected logprobs to be true with it")
  return top if asked else None


def _adjustments(
  request: Json, served: Served, sampling: SamplingParams, limit: int, logprobs: int | None
) -> Adjustments | None:
  """What is asked of the tokens beyond how they are drawn; None for nothing, which costs nothing."""
  form = _form(request, served)
  asked = Adjustments(
    presence_penalty=_within(_take(request, "presence_penalty", float, 0.0), "presence_penalty", -2, 2),
    frequency_penalty=_within(_take(request, "frequency_penalty", float, 0.0), "frequency_penalty", -2, 2),
    repetition_penalty=_within(_take(request, "repetition_penalty", float, 1.0), "repetition_penalty", 0.01, 100),
    bias=_bias(request, served),
    only=_ids(request, "allowed_token_ids", served),
    stop_ids=_ids(request, "stop_token_ids", served),
    ignore_eos=_take(request, "ignore_eos", bool, False),
    min_tokens=_within(_take(request, "min_tokens", int, 0), "min_tokens", 0, limit),
    top=logprobs or 0,
    raw=served.raw_logprobs and logprobs is not None,
    form=form,
  )
  for name in ("min_tokens", "ignore_eos", "allowed_token_ids") if form else ():
    if request.get(name):  # beside which there might be no token at all
      raise RequestError(400, f"{name}: not supported with response_format")
  if asked.only and asked.min_tokens and not set(asked.only) - asked.ends(served.eos_ids):
    raise RequestError(400, "allowed_token_ids: expected a token that does not end the response, with min_tokens")
  # The model's own log-probabilities are the sampler's where the temperature is 1, which greedy rows have there.
  is_neutral = asked == Adjustments(raw=asked.raw) and (not asked.raw or sampling.temperature in (0, 1))
  return None if is_neutral else asked


def _bias(request: Json, served: Served) -> tuple[tuple[int, float], ...]:
  values = _take(request, "logit_bias", dict, {})
  try:
    bias = {int(token): float(value) for token, value in values.items()}
  except (TypeError, ValueError):
    raise RequestError(400, "logit_bias: expected numbers by ids of tokens") from None
  for token, value in bias.items():
    if not 0 <= token < served.tokens:
      raise RequestError(400, f"logit_bias: {token}, expected ids of tokens, 0 to {served.tokens - 1}")
    _within(value, "logit_bias", -100, 100)
  return tuple(bias.items())


def _form(request: Json, served: Served) -> Callable[[], Form] | None:
  asked = _take(request, "response_format", dict, {"type": "text"})
  match asked.get("type"):
    case "text":
      return None
    case "json_object":
      schema: Any = {"type": "object"}
    case "json_schema":
      named = asked.get("json_schema")
      schema = named.get("schema") if isinstance(named, dict) else None
    case _:
      raise RequestError(400, "response_format.type: expected text, json_object or json_schema")
  if not isinstance(schema, dict):
    raise RequestError(400, "response_format.json_schema.schema: expected a JSON schema")
  try:
    return served.form(schema)
  except InputError as error:
    raise RequestError(400, f"response_format: {error}") from None


def _chat_ids(request: Json, tokenizer: PreTrainedTokenizerBase) -> list[int]:
  messages = request.get("messages")
  if not isinstance(messages, list) or not messages:
    raise RequestError(400, "messages: expected one or more messages")
  if _take(request, "add_special_tokens", bool, False):
    raise RequestError(400, "add_special_tokens: not supported in chats, whose template adds them")
  chat = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
  variables = _take(request, "chat_template_kwargs", dict, {})
  for name in variables:
    if name in _RESERVED:
      raise RequestError(400, f"chat_template_kwargs.{name}: not supported")
  opens, goes_on = (_take(request, name, bool, None) for name in ("add_generation_prompt", "continue_final_message"))
  if opens and goes_on:
    raise RequestError(400, "continue_final_message: expected add_generation_prompt to be false with it")
  if len(chat) > 1 and chat[-1] == {"role": "assistant", "content": ""} and opens is None and goes_on is not False:
    chat.pop()  # to go on with nothing is to begin
    goes_on = None
  try:
    return render(tokenizer, chat, Rendering(opens, goes_on, variables))
  except InputError as error:
    raise RequestError(400, str(error)) from None


def _message(message: Any, where: str) -> dict[str, str]:
  if not isinstance(message, dict) or not isinstance(message.get("role"), str):
    raise RequestError(400, f"{where}: expected an object with role and content")
  role = {"developer": "system"}.get(message["role"], message["role"])
  if role not in ("system", "user", "assistant"):
    raise RequestError(400, f"{where}.role: expected system, user or assistant")
  for name in ("tool_calls", "function_call", "audio"):
    if message.get(name):
      raise RequestError(400, f"{where}.{name}: not supported")
  content = message.get("content")
  if isinstance(content, list):  # parts
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
      raise RequestError(400, f"{where}.content: expected parts of text alone")
    content = "".join(str(part.get("text", "")) for part in content)
  if content is None and role == "assistant":
    content = ""
  if not isinstance(content, str):
    raise RequestError(400, f"{where}.content: expected text")
  return {"role": role, "content": _text(content)}


def _plain_prompts(request: Json, served: Served, most: int) -> list[tuple[str | None, list[int]]]:
  """Each prompt's text, None where it was given as ids, and its ids."""
  prompt = request.get("prompt")
  several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
  if several and len(prompt) > most:
    raise RequestError(400, f"prompt: {len(prompt)} of them, expected at most {most} with that n")
  with_special = _take(request, "add_special_tokens", bool, True)
  prompts: list[tuple[str | None, list[int]]] = []
  for entry in prompt if several else [prompt]:
    if isinstance(entry, str) and entry:
      prompts.append((entry, served.tokenizer.encode(_text(entry), add_special_tokens=with_special)))
    elif isinstance(entry, list) and entry and all(type(x) is int and 0 <= x < served.tokens for x in entry):
      prompts.append((None, entry))
    else:
      raise RequestError(400, "prompt: expected a text or token ids, or a list of such, none empty")
  return prompts
