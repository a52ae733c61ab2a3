"""Asking language models behind OpenAI-compatible endpoints: retries, a limit of concurrency, a cache on disk.

A key is read from the environment variable that the endpoint names. It stands in no `repr`, message or file: what an
endpoint says is written down without it.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import math
import os
import pathlib
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import tenacity

from rlpr_jax.errors import InputError, needs_extra, trouble
from rlpr_jax.runs.storage import reason, write_atomically

T = TypeVar("T")
Message = dict[str, str]  # role, content
RESPONSE_FORMATS = ("json_schema", "text")  # how a reply can be asked for, where there is a schema for it

GIVE_UP_AFTER = 20  # conversations without an answer in a row, after which no more are asked
_LONGEST_PAUSE = 60.0  # seconds between two attempts
_LONGEST_ASKED = 180.0  # seconds that an endpoint may ask us to wait; a longer wait is no passing trouble
_SECRET = 8  # characters from which on a key is more than a placeholder such as "EMPTY" or "none"
_REFUSALS = (400, 413, 422)  # statuses of what an endpoint will not answer, however often it is asked
# A conversation that no endpoint refuses for itself.
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "Say yes."},)
# Fields that mean the same by another name, or may be left out, and what an endpoint says that wants it so.
_ADAPTABLE: dict[str, tuple[str | None, re.Pattern[str]]] = {
  # First: a refused schema is quoted, and may have anything in it.
  "response_format": (None, re.compile(r"(?i)response[ _]?format|json[ _]?schema")),
  "max_tokens": ("max_completion_tokens", re.compile(r"\bmax_completion_tokens\b")),
  "seed": (None, re.compile(r"\bseed\b")),
}

# What an endpoint may say of keys that are not ours: a gateway's, of whom it asks in its turn.
_FOREIGN = re.compile(
  r"""(?ix) (?P<before> \bbearer\s+ | \b(?:x-)?api[-_ ]?key["']?\s*[=:]\s*["']? | [?&](?:key|token|access_token|sig)= )
  [^\s"'&,;}\])]{8,} | (?P<scheme> \w://) [^/\s@]+ (?=@) | \bsk-[\w-]{8,}"""
)


class ClientError(RuntimeError):
  """An endpoint gave no answer. One line, without the key."""

  def __init__(self, message: str, refused: str = "", may_pass: bool = False):
    super().__init__(message)
    self.refused = refused  # "conversation": this one, too long or filtered; "settings": any, as it is asked; ""
    self.may_pass = may_pass  # of the network, or of a server that is not well


@dataclass(frozen=True)
class Endpoint:
  """Where a model is and how it is asked. A setting that is None is left to the endpoint."""

  base_url: str  # up to and with /v1
  model: str
  key_variable: str = ""  # environment variable that holds the key; "" for an endpoint without one
  concurrency: int = 16  # requests at a time
  time_limit: float = 120.0  # seconds a request
  attempts: int = 5  # of one request, as long as the trouble may pass
  pause: float = 1.0  # seconds before the second attempt; doubled before each further one, with jitter
  temperature: float | None = 0.0
  top_p: float | None = None
  max_tokens: int | None = 1024
  response_format: str = "json_schema"  # of replies that there is a schema for, one of RESPONSE_FORMATS
  price_in: float = 0.0  # dollars a million prompt tokens, 0 if unknown
  price_out: float = 0.0  # of completion tokens


class Reply(NamedTuple):
  """A model's reply."""

  texts: tuple[str, ...]
  finish_reasons: tuple[str, ...]  # "stop", "length", ...
  prompt_tokens: int  # 0 if the endpoint does not say
  completion_tokens: int


@dataclass
class Usage:
  """The cost of asking so far."""

  requests: int = 0  # attempts included
  retries: int = 0
  cached: int = 0  # conversations whose reply was on disk
  prompt_tokens: int = 0
  completion_tokens: int = 0
  cost: float = 0.0  # dollars, by the endpoint's prices


class Client:
  """Asks one endpoint. `async with client:` holds its connections open."""

  def __init__(self, endpoint: Endpoint, say: Callable[[str], object] = print):
    """Takes the key from the environment.

    Args:
      say: is told in one line how requests are adapted to the endpoint.

    Raises:
      InputError: settings that cannot be, or a key that is not there.
    """
    if not _is_url(endpoint.base_url):
      # Not shown: it may hold a password or a key.
      raise InputError("endpoint: expected a URL http(s)://HOST.../v1 without a password, ?... or #... in it")
    for field in ("concurrency", "attempts", "time_limit"):
      if getattr(endpoint, field) <= 0:
        raise InputError(f"endpoint {endpoint.base_url}: {field} {getattr(endpoint, field)}, expected more than 0")
    if endpoint.response_format not in RESPONSE_FORMATS:
      found, expected = endpoint.response_format, " or ".join(RESPONSE_FORMATS)
      raise InputError(f"endpoint {endpoint.base_url}: response_format {found!r}, expected {expected}")
    with needs_extra("evaluate"):
      import openai  # noqa: F401
    self.endpoint = endpoint
    self.usage = Usage()
    self._key = read_key(endpoint.key_variable) if endpoint.key_variable else ""
    self._say = say
    self._adapted: dict[str, str | None] = {}  # fields under another name, or under none: left out
    self._takes_format = False  # whether it has answered a request with a `response_format`
    self._answers: bool | None = None  # whether it answers anything, asked as it is; None: not known yet
    pause = endpoint.pause
    self._backoff = tenacity.wait_exponential_jitter(multiplier=pause, max=_LONGEST_PAUSE, jitter=pause)

  async def __aenter__(self) -> "Client":
    self._slots, self._probing = asyncio.Semaphore(self.endpoint.concurrency), asyncio.Lock()
    import openai

    self._openai = openai.AsyncOpenAI(
      base_url=self.endpoint.base_url,
      api_key=self._key or "none",  # without one the package would send another service's, from the environment
      max_retries=0,
      timeout=self.endpoint.time_limit,
    )
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._openai.close()

  async def chat(
    self, messages: Sequence[Message], seed: int | None = None, response_format: Mapping[str, Any] | None = None
  ) -> Reply:
    """Asks for a reply to a conversation.

    Rate limits, errors of the server, broken connections, unreadable replies and timeouts are tried again, after the
    time that the endpoint names or one that doubles; requests that the endpoint refuses are not. Of the first of these
    it is found out whether the endpoint refuses the conversation or all, as they are asked: by asking another one.

    Args:
      response_format: as the API has it; a reply need not have it, as there are endpoints that do not take or heed it.

    Raises:
      ClientError: no answer could be had.
    """
    import openai

    attempts = tenacity.AsyncRetrying(
      retry=tenacity.retry_if_exception(_may_pass),
      wait=self._pause,
      stop=tenacity.stop_after_attempt(self.endpoint.attempts),
      before_sleep=self._count_retry,
      reraise=True,
    )
    async with self._slots:  # held while waiting as well: an endpoint that limits rates is asked less
      try:
        return await attempts(self._request, self.request(messages, seed, response_format))
      except (openai.OpenAIError, TimeoutError, ValueError) as error:
        said, refused = self._in_one_line(error), _is_refusal(error)
        may_pass = _may_pass(error) and isinstance(error, openai.OpenAIError | TimeoutError)
      what = await self._what_is_refused(attempts, seed) if refused else ""
    # Not within the handler: the error would carry the request along, and with it the key.
    raise ClientError(said, what, may_pass)

  async def _what_is_refused(self, attempts: tenacity.AsyncRetrying, seed: int | None) -> str:
    """What `ClientError.refused` says of a refusal; "" where the endpoint has other trouble meanwhile."""
    import openai

    async with self._probing:
      if self._answers is None:
        try:
          await attempts(self._request, self.request(_PROBE, seed))
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
          self._answers = False if _is_refusal(error) else None
    return {True: "conversation", False: "settings", None: ""}[self._answers]

  def request(
    self, messages: Sequence[Message], seed: int | None = None, response_format: Mapping[str, Any] | None = None
  ) -> dict[str, Any]:
    """The request that `chat` sends: all that a reply depends on, but for where the model is."""
    is_formatted = self.endpoint.response_format != "text" and "response_format" not in self._adapted
    given = {
      "model": self.endpoint.model,
      "messages": list(messages),
      "seed": seed,
      "temperature": self.endpoint.temperature,
      "top_p": self.endpoint.top_p,
      "max_tokens": self.endpoint.max_tokens,
      "response_format": response_format if is_formatted else None,
    }
    return {name: value for name, value in given.items() if value is not None}

  async def _request(self, request: dict[str, Any]) -> Reply:
    reply = self._read(await self._send(request))
    self._answers = True
    self.usage.prompt_tokens += reply.prompt_tokens
    self.usage.completion_tokens += reply.completion_tokens
    prices = self.endpoint.price_in, self.endpoint.price_out
    self.usage.cost += (reply.prompt_tokens * prices[0] + reply.completion_tokens * prices[1]) / 1e6
    if len(reply.texts) != 1:
      raise ValueError(f"expected 1 choice, found {len(reply.texts)}")
    return reply

  async def _send(self, request: dict[str, Any]) -> Any:
    """Sends a request, with fields adapted where the endpoint does not take them and says so.

    What is refused with a `response_format` is asked without it too, whatever is said: it is the field that most
    endpoints know nothing of, or know and fail at.
    """
    import openai

    adapted, unformatted = dict(self._adapted), False
    while True:
      named = {adapted.get(name, name): value for name, value in request.items()}
      if unformatted:
        named.pop("response_format")
      self.usage.requests += 1
      try:
        async with asyncio.timeout(self.endpoint.time_limit):  # the package's own limit starts anew with every byte
          completion = await self._openai.chat.completions.create(**{name: x for name, x in named.items() if name})
      except openai.APIStatusError as error:
        field = _adaptable(error, named.keys() - adapted.keys()) if _is_refusal(error) else None
        if field is not None:
          adapted[field] = _ADAPTABLE[field][0]
        elif _is_refusal(error) and "response_format" in named:
          unformatted = True
        else:
          raise
        continue
      self._takes_format |= "response_format" in named
      if unformatted and not self._takes_format:  # it was that, and not this conversation
        adapted["response_format"] = None
      for field in adapted.keys() - self._adapted.keys():
        does = f"is sent as {adapted[field]}" if adapted[field] else "is left out"
        self._say(f"{self.endpoint.model} at {self.endpoint.base_url}: {field} {does}, as the endpoint wants it")
      self._adapted |= adapted
      return completion

  def _read(self, completion: Any) -> Reply:
    """The package checks nothing of what it gets: HTML comes as a string, a missing field as None."""
    choices, usage = getattr(completion, "choices", None), getattr(completion, "usage", None)
    if not isinstance(choices, list) or not choices:
      raise _UnreadableError("expected a chat completion, found something else")
    texts = []
    for choice in choices:
      message = getattr(choice, "message", None)
      if not hasattr(message, "content") or not isinstance(message.content, str | None):
        raise _UnreadableError("expected choices with a message, found something else")
      text = message.content or _reasoning(message)
      texts.append(self._redact(text) if len(self._key) >= _SECRET else text)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(
      tuple(texts),
      tuple(str(choice.finish_reason) for choice in choices),
      *(count if isinstance(count, int) else 0 for count in counts),
    )

  def _pause(self, state: tenacity.RetryCallState) -> float:
    asked = _asked_to_wait(state.outcome.exception())
    # Jitter on top of what was asked for: all who were told the same second must not come back in it.
    return self._backoff(state) if asked is None else asked + random.uniform(0, self.endpoint.pause)

  def _count_retry(self, _: tenacity.RetryCallState) -> None:
    self.usage.retries += 1

  def _in_one_line(self, error: Exception) -> str:
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
      said = f"no reply within {self.endpoint.time_limit:g}s"
    elif isinstance(error, openai.APIConnectionError):
      said = f"no connection ({reason(error.__cause__ or error)})"
    else:
      said = str(error) or type(error).__name__
    said = _FOREIGN.sub(lambda found: f"{found['before'] or found['scheme'] or ''}[key]", self._redact(said))
    said = " ".join(f"{self.endpoint.model} at {self.endpoint.base_url}: {said}".split())
    return said if len(said) <= 400 else f"{said[:399]}…"  # cut last: part of a key would not be found

  def _redact(self, text: str) -> str:
    if self._key:
      for form in (self._key, urllib.parse.quote(self._key, safe=""), json.dumps(self._key)[1:-1]):
        text = text.replace(form, "[key]")
    return text


def _reasoning(message: Any) -> str:
  """What a reasoning model wrote where servers keep thoughts apart and found nothing else; "" if nothing."""
  texts = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
  return next((text for text in texts if isinstance(text, str)), "")


class _UnreadableError(ValueError):
  """A reply that is none; the next may be."""


def _is_url(text: str) -> bool:
  try:
    parts = urllib.parse.urlsplit(text)
    has_host = parts.hostname and (parts.port is None or parts.port > 0)
  except ValueError:
    return False
  # Where some services expect a key (`?api_key=...`), and what is appended to the URL would end up.
  bare = "@" not in parts.netloc and "?" not in text and "#" not in text
  return bool(has_host) and parts.scheme in ("http", "https") and bare


def read_key(variable: str) -> str:
  """A key from the environment: on a command line, or in a config, others could read it.

  Raises:
    InputError: there is none, or none that a header takes.
  """
  if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # perhaps the key itself, which is not shown
    raise InputError("expected the name of an environment variable that holds the key, found something else")
  where = f"environment variable {variable}"
  key = os.environ.get(variable, "").strip()
  if not key:
    raise InputError(f"{where}: not set, expected the key of an endpoint")
  if not key.isascii() or not key.isprintable() or " " in key:  # which no header takes, and says so with the key
    raise InputError(f"{where}: expected a key of printable ASCII characters without spaces")
  return key


def _is_refusal(error: BaseException) -> bool:
  """Whether an endpoint will not answer this, however often it is asked."""
  return getattr(error, "status_code", None) in _REFUSALS


def _adaptable(error: Any, fields: Collection[str]) -> str | None:
  """The field that a refusal is about, if it is one of those that can be adapted."""
  said = str(error)
  found = (name for name, (_, wanted) in _ADAPTABLE.items() if name in fields and wanted.search(said))
  return next(found, None)


def _may_pass(error: BaseException) -> bool:
  """Whether another attempt may succeed."""
  import openai

  if isinstance(error, openai.APIStatusError):
    passing = error.status_code in (408, 409, 429) or error.status_code >= 500
    out_of_money = error.code == "insufficient_quota"  # OpenAI's, which comes as 429
    return passing and not out_of_money and (_asked_to_wait(error) or 0) <= _LONGEST_ASKED
  return isinstance(error, openai.APIConnectionError | TimeoutError | json.JSONDecodeError | _UnreadableError)


def _asked_to_wait(error: BaseException) -> float | None:
  """Seconds that a reply's Retry-After names, as a number or as a date (RFC 9110, section 10.2.3)."""
  import openai

  if not isinstance(error, openai.APIStatusError):
    return None
  header = error.response.headers.get("retry-after", "")
  try:
    seconds = float(header)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
      return None
  return max(seconds, 0.0) if math.isfinite(seconds) else None


class Cache:
  """Replies on disk, a file each, by the SHA-256 of the request: model, messages and sampling settings."""

  def __init__(self, directory: str | os.PathLike):
    """Makes the directory.

    Raises:
      InputError: it cannot be made, until somebody mends it.
      MachineError: the disk is full or gone.
    """
    self._directory = pathlib.Path(directory)
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise trouble(error, f"{self._directory}: cannot be made ({reason(error)})") from None

  def get(self, request: dict[str, Any]) -> Reply | None:
    """The reply to a request, or None if it is not there or its file is damaged."""
    try:
      stored = json.loads(self._path(request).read_text())["reply"]
      reply = Reply(tuple(stored["texts"]), tuple(stored["finish_reasons"]), int(stored["prompt_tokens"]),
                    int(stored["completion_tokens"]))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return None
    return reply if reply.texts and all(isinstance(text, str) for text in reply.texts) else None

  def put(self, request: dict[str, Any], reply: Reply) -> None:
    """Stores a reply, with its request for those who want to read what was asked.

    Raises: as above, where it cannot be written.
    """
    path, content = self._path(request), json.dumps({"request": request, "reply": reply._asdict()}, indent=1)
    try:
      path.parent.mkdir(exist_ok=True)
      with contextlib.suppress(FileNotFoundError):  # another process has just put its own in place
        write_atomically(path, content)
    except OSError as error:
      raise trouble(error, f"{path}: cannot be written ({reason(error)})") from None

  def _path(self, request: dict[str, Any]) -> pathlib.Path:
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return self._directory / name[:2] / f"{name}.json"


# ---- many conversations ----


class Unanswered(NamedTuple):
  """A conversation that came to nothing, and why."""

  why: str
  asked: bool  # False if it was not even tried
  may_pass: bool = False  # as of `ClientError`; of what was not tried, that of the last that was


class _GaveUpError(Exception):
  """Too many in a row came to nothing."""


class ReplyFormat(NamedTuple, Generic[T]):
  """Form of the replies that are asked for."""

  parse: Callable[[str], T | None]  # of a reply's text; None if it is not understood
  reminder: str  # what to say to a model whose reply was not
  response_format: Mapping[str, Any] | None = None  # as the API has it, of endpoints that take it


async def ask_all(
  conversations: Sequence[Sequence[Message]],
  reply_format: ReplyFormat[T],
  client: Client,
  cache: Cache | None = None,
  progress: Callable[[int, int, str], None] | None = None,
  give_up_after: int = GIVE_UP_AFTER,
) -> list[T | Unanswered]:
  """Ask every conversation for something that `reply_format.parse` understands.

  The same conversation is asked once. A reply that is not understood, or was cut off, is asked for once more, with
  another seed, the reminder at the end and in plain text: what a format did to it, it would do again. Understood
  replies are kept in `cache` and asked for never again; all others are asked again by another call. Where many
  conversations in a row come to nothing, the endpoint is taken for dead (or its model for unfit) and the rest is not
  asked.

  Args:
    conversations: messages {role, content} each, the last of them the user's.
    client: opened (`async with client:`).
    progress: called with what is done, the total, and what it cost.
    give_up_after: conversations in a row without an answer.

  Returns:
    what was understood, in the order of `conversations`.

  Raises:
    InputError: the cache cannot be written.
  """
  names = [json.dumps(list(messages), sort_keys=True) for messages in conversations]
  requests = {
    name: _both_requests(list(messages), reply_format) for name, messages in zip(names, conversations, strict=True)
  }
  answers: dict[str, T | Unanswered] = {}
  for name, pair in requests.items() if cache else ():
    for request in (pair[0], {"messages": pair[0]["messages"]}, pair[1]):  # the second: of an endpoint without formats
      reply = cache.get(client.request(**request))
      if reply and (understood := reply_format.parse(reply.texts[0])) is not None:
        answers[name] = understood
        client.usage.cached += 1
        break
  todo = iter([name for name in requests if name not in answers])
  failures, last = 0, Unanswered("", True)

  async def ask(name: str) -> T | Unanswered:
    reply = None
    for request in requests[name]:
      try:
        reply = await client.chat(**request)
      except ClientError as error:
        return Unanswered(str(error), True, error.may_pass)
      if reply.finish_reasons[0] != "length" and (understood := reply_format.parse(reply.texts[0])) is not None:
        if cache:
          cache.put(client.request(**request), reply)
        return understood
    end = " ".join(reply.texts[0].split())[-80:]
    return Unanswered(f"{client.endpoint.model}: reply not understood, it ends {end!r}", True)

  async def work() -> None:
    nonlocal failures, last
    for name in todo:  # one iterator for all workers
      answers[name] = answer = await ask(name)
      failures, last = (failures + 1, answer) if isinstance(answer, Unanswered) else (0, last)
      if progress:
        progress(len(answers), len(requests), _spent(client.usage))
      if failures >= give_up_after:
        raise _GaveUpError  # which ends the other workers

  try:
    async with asyncio.TaskGroup() as group:
      for _ in range(min(client.endpoint.concurrency, len(requests) - len(answers))):
        group.create_task(work())
  except BaseExceptionGroup as errors:
    _, others = errors.split(_GaveUpError)
    if others:
      raise others.exceptions[0] from None
  skipped = Unanswered(f"not asked, as {give_up_after} in a row came to nothing: {last.why}", False, last.may_pass)
  return [answers.get(name, skipped) for name in names]


def _both_requests(messages: list[Message], form: ReplyFormat[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Arguments of `Client.chat` for the first and the second time."""
  end = messages[-1]
  reminded = [*messages[:-1], {**end, "content": f"{end['content']}\n\n{form.reminder}"}]
  return {"messages": messages, "response_format": form.response_format}, {"messages": reminded, "seed": 1}


def _spent(usage: Usage) -> str:
  cost = f", ${usage.cost:.2f}" if usage.cost else ""
  return f"{usage.requests} requests, {usage.retries} retries{cost}"
