"""The web application: OpenAI's routes in front of the engine's loop."""

import asyncio
import contextlib
import functools
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import prometheus_client
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlpr_jax import __version__
from rlpr_jax.sampling.adjustments import TopTokens
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.serving import answers, protocol
from rlpr_jax.serving.answers import Json
from rlpr_jax.serving.forms import Forms
from rlpr_jax.serving.loop import ClosedError, FullError, Job, Loop, Written
from rlpr_jax.serving.protocol import Call, RequestError, Served


class Limits(NamedTuple):
  """Bounds of what a client may ask for."""

  body_bytes: int
  seconds: float  # of a request, its time in the queue included


class _Metrics:
  """Counters and gauges that Prometheus collects."""

  def __init__(self, loop: Loop):
    self.registry = prometheus_client.CollectorRegistry()
    counter = functools.partial(prometheus_client.Counter, registry=self.registry)
    self.requests = counter("rlpr_requests", "Requests by HTTP status; 499: the client went away.", ["status"])
    self.prompt_tokens = counter("rlpr_prompt_tokens", "Tokens of the prompts that were taken.")
    self.completion_tokens = counter("rlpr_completion_tokens", "Tokens of the responses that ended.")
    gauge = functools.partial(prometheus_client.Gauge, registry=self.registry)
    gauge("rlpr_samples_waiting", "Samples without a slot.").set_function(lambda: loop.waiting)
    gauge("rlpr_samples_running", "Samples in slots.").set_function(lambda: loop.running)


_GONE = 499  # as nginx has it; no client reads it
_LONGEST_ID = 256  # characters of an X-Request-Id that is sent back
_EVERY_METHOD: Json = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["X-Request-Id"]}


def create_app(
  engine: Engine,
  loop: Loop,
  model: str,
  limits: Limits,
  key: str | None = None,
  origins: Sequence[str] = (),
  raw_logprobs: bool = True,
) -> Starlette:
  """Makes the application.

  Args:
    model: the name that it is served under.
    key: what clients must send as a bearer token; None for nothing.
    origins: of web pages that may ask (CORS); "*" for all.
    raw_logprobs: log-probabilities are the model's own, and not those of the distribution that was sampled.
  """
  metrics, begun = _Metrics(loop), int(time.time())
  shapes, eos_ids = engine.device.shapes, engine.device.settings.eos_ids
  served = Served(
    model=model,
    tokenizer=engine.tokenizer,
    shapes=shapes,
    eos_ids=eos_ids,
    vocabulary=loop.vocabulary,
    most=loop.most,
    raw_logprobs=raw_logprobs,
    form=Forms(engine.tokenizer, eos_ids, loop.vocabulary).compile,
  )

  async def receive(request: Request) -> bytes:
    check_key(request)
    try:
      async with asyncio.timeout(limits.seconds):
        return await read(request, limits.body_bytes)
    except TimeoutError:
      raise RequestError(408, "the body did not come in time", "timeout_error", "timeout") from None

  async def complete(request: Request, chat: bool) -> Response:
    body = await receive(request)
    # Templates and tokenizers take a while on long texts, during which others are to be heard.
    call = await asyncio.to_thread(protocol.parse, body, chat, served)
    answer = _Answer(engine, loop, call, model=model, seconds=limits.seconds)
    answer.begin()
    if call.stream:
      return StreamingResponse(stream(request, answer), media_type="text/event-stream")
    try:
      response = await _unless_gone(request, answer.whole())
    finally:
      finish(answer)
    metrics.requests.labels(200 if response else _GONE).inc()
    return JSONResponse(response) if response else Response(status_code=_GONE)

  async def stream(request: Request, answer: "_Answer") -> AsyncIterator[str]:
    status = _GONE
    try:
      async for piece in answer.pieces():
        yield f"data: {json.dumps(piece)}\n\n"
        if await request.is_disconnected():
          return
      status = 200
      yield "data: [DONE]\n\n"
    except RequestError as error:  # the status line is long gone
      status = error.status
      yield f"data: {json.dumps(error.body())}\n\n"
    finally:
      finish(answer)
      metrics.requests.labels(status).inc()

  def finish(answer: "_Answer") -> None:
    answer.end()
    metrics.prompt_tokens.inc(answer.prompt_tokens)
    metrics.completion_tokens.inc(answer.completion_tokens)

  def check_key(request: Request) -> None:
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
      raise RequestError(401, "wrong or missing API key", "authentication_error", "invalid_api_key")

  card = {
    "id": model,
    "object": "model",
    "created": begun,
    "owned_by": "rlpr_jax",
    "root": model,
    "parent": None,
    "max_model_len": shapes.longest,
  }

  async def models(request: Request) -> Response:
    check_key(request)
    return JSONResponse({"object": "list", "data": [card]})

  async def one_model(request: Request) -> Response:
    check_key(request)
    asked = request.path_params["name"]
    if asked != model:
      raise RequestError(404, f"model {asked[:100]!r}: not served here, expected {model!r}", code="model_not_found")
    return JSONResponse(card)

  async def tokens(request: Request, answer: Callable[[bytes, Served], Json]) -> Response:
    return JSONResponse(await asyncio.to_thread(answer, await receive(request), served))

  async def tokenizer_info(request: Request) -> Response:
    check_key(request)
    return JSONResponse(answers.tokenizer_body(engine.tokenizer))

  async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})

  async def ping(request: Request) -> Response:
    return Response(status_code=503 if loop.error else 200)

  async def health(request: Request) -> Response:
    return JSONResponse({"status": "error" if loop.error else "ok"}, 503 if loop.error else 200)

  async def show_metrics(request: Request) -> Response:
    return PlainTextResponse(prometheus_client.generate_latest(metrics.registry))

  async def refuse(request: Request, error: RequestError) -> Response:
    metrics.requests.labels(error.status).inc()
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers)

  async def forget(request: Request, error: ClientDisconnect) -> Response:
    metrics.requests.labels(_GONE).inc()
    return Response(status_code=_GONE)

  async def refuse_route(request: Request, error: HTTPException) -> Response:
    return await refuse(request, RequestError(error.status_code, error.detail))

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(loop.close)

  return Starlette(
    routes=[
      Route("/v1/chat/completions", functools.partial(complete, chat=True), methods=["POST"]),
      Route("/v1/completions", functools.partial(complete, chat=False), methods=["POST"]),
      Route("/v1/models", models),
      Route("/v1/models/{name:path}", one_model),
      Route("/tokenize", functools.partial(tokens, answer=protocol.parse_tokenize), methods=["POST"]),
      Route("/detokenize", functools.partial(tokens, answer=protocol.parse_detokenize), methods=["POST"]),
      Route("/tokenizer_info", tokenizer_info),
      Route("/version", version),
      Route("/ping", ping, methods=["GET", "POST"]),
      Route("/health", health),
      Route("/metrics", show_metrics),
    ],
    exception_handlers={RequestError: refuse, HTTPException: refuse_route, ClientDisconnect: forget},
    middleware=[
      Middleware(_WithRequestId),
      *([Middleware(CORSMiddleware, allow_origins=list(origins), **_EVERY_METHOD)] if origins else []),
    ],
    lifespan=lifespan,
  )


class _WithRequestId:
  """Sends a request's X-Request-Id back with the response, or one of its own."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    sent = Headers(scope=scope).get("x-request-id", "")
    name = sent if 0 < len(sent) <= _LONGEST_ID else secrets.token_hex(16)

    async def send_with_id(message: Message) -> None:
      if message["type"] == "http.response.start":
        MutableHeaders(scope=message)["X-Request-Id"] = name
      await send(message)

    await self._app(scope, receive, send_with_id)


async def read(request: Request, most: int) -> bytes:
  """Reads the body of a request, if it is not over `most` bytes."""
  body = bytearray()
  async for part in request.stream():
    body += part
    if len(body) > most:
      raise RequestError(413, f"body: over {most} bytes")
  return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[Json]) -> Json | None:
  """Waits for the work; None if the client goes away before it is done."""

  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks[0].result() if tasks[0].done() else None
  finally:
    for task in tasks:
      task.cancel()


class _Answer:
  """The samples of one call on their way."""

  def __init__(self, engine: Engine, loop: Loop, call: Call, model: str, seconds: float):
    self.call, self.completion_tokens = call, 0
    self.prompt_tokens = sum(len(prompt.ids) for prompt in call.prompts)
    self.unfinished = len(call.prompts) * call.n  # samples
    self._engine, self._loop = engine, loop
    self._seconds = seconds
    self._common = answers.identify(call.chat) | {"model": model}
    self._news: asyncio.Queue[tuple[int, Written] | None] = asyncio.Queue()
    self._jobs: list[Job] = []

  def begin(self) -> None:
    """Hands the samples to the engine.

    Raises:
      RequestError: it takes no more.
    """
    call, events = self.call, asyncio.get_running_loop()
    self._deadline = events.time() + self._seconds

    def tell(row: int, written: Written | None) -> None:
      news = None if written is None else (row * call.n + written.sample, written)
      with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
        events.call_soon_threadsafe(self._news.put_nowait, news)

    try:
      for row, prompt in enumerate(call.prompts):
        job = Job(
          prompt=prompt,
          limits=[call.limit] * call.n,
          sampling=call.sampling,
          extras=call.extras,
          stop=call.stop,
          seed=call.seeds[row],
          stream=call.stream,
          tell=functools.partial(tell, row),
        )
        self._loop.submit(job)
        self._jobs.append(job)
    except FullError:
      self.end()
      raise RequestError(429, "the queue is full", "rate_limit_error", "queue_full") from None
    except ClosedError:
      self.end()
      raise RequestError(503, "the server is shutting down or has failed", "server_error") from None

  def end(self) -> None:
    """Gives up what has not finished."""
    if self.unfinished:
      for job in self._jobs:
        self._loop.cancel(job)

  async def whole(self) -> Json:
    """Makes the body of the response, once all samples have finished."""
    call, tokenizer = self.call, self._engine.tokenizer
    body: Json = {}
    choices: dict[int, Json] = {}
    while self.unfinished:
      index, written = await self._next()
      if written.text is None:
        continue
      text = self._echo(index) + written.text
      piece = answers.Piece(index, text, self._reason(written), self._logprobs(index, written))
      choices[index] = answers.choice_body(call.chat, piece, streamed=False)
      if call.prompt_logprobs is not None and written.scores is not None:
        ids = call.prompts[index // call.n].ids
        told = answers.prompt_logprobs_body(tokenizer, ids, written.scores, call.prompt_logprobs)
        (body if call.chat else choices[index])["prompt_logprobs"] = told
    total = answers.usage(self.prompt_tokens, self.completion_tokens)
    return self._common | {"choices": [choices[index] for index in sorted(choices)], "usage": total} | body

  async def pieces(self) -> AsyncIterator[Json]:
    """Makes the bodies of a stream."""
    call, settings = self.call, self._engine.device.settings
    common = self._common | {"object": "chat.completion.chunk"} if call.chat else self._common
    if call.usage:
      common = common | {"usage": None}
    adjustments = call.extras.adjustments
    ends = adjustments.ends(settings.eos_ids) if adjustments else frozenset(settings.eos_ids)
    unseen = ends | call.extras.hidden
    texts = [answers.TextStream(self._engine.tokenizer, unseen, call.stop) for _ in range(self.unfinished)]
    told: list[int | None] = [None] * self.unfinished  # tokens; None: nothing was said at all
    for index in range(self.unfinished) if call.chat else ():
      yield common | {"choices": [answers.opening_body(index)]}
    while self.unfinished:
      index, written = await self._next()
      stream, begin = texts[index], told[index]
      before = 0 if begin is None else len(self._echo(index)) + stream.told
      text = self._echo(index) if begin is None else ""
      text += stream.grow(written.tokens) if written.text is None else stream.end(written.text)
      if text or written.text is not None:
        logprobs = self._logprobs(index, written, begin, before)
        piece = answers.Piece(index, text, self._reason(written), logprobs)
        yield common | {"choices": [answers.choice_body(call.chat, piece, streamed=True)]}
        told[index] = len(written.tokens)
    if call.usage:
      yield common | {"choices": [], "usage": answers.usage(self.prompt_tokens, self.completion_tokens)}

  def _echo(self, index: int) -> str:
    """The prompt's text, where it is to stand before a response."""
    return self.call.echoes[index // self.call.n] if self.call.echoes else ""

  async def _next(self) -> tuple[int, Written]:
    try:
      async with asyncio.timeout_at(self._deadline):
        news = await self._news.get()
    except TimeoutError:
      raise RequestError(408, f"not done within {self._seconds:.0f} seconds", "timeout_error", "timeout") from None
    if news is None:
      raise RequestError(500, "the engine has failed", "server_error")
    index, written = news
    if written.text is not None:
      self.unfinished -= 1
      self.completion_tokens += len(written.tokens)
    return index, written

  def _reason(self, written: Written) -> str | None:
    """Why a sample ended; None before."""
    if written.text is None:
      return None
    return "stop" if written.finished else "length"

  def _logprobs(self, index: int, written: Written, first: int | None = None, begin: int = 0) -> Json | None:
    """Log-probabilities of the tokens from `first` on, after `begin` characters; None if they were not asked for.

    Args:
      first: among those of the response; None: all of them, and before them those of a prompt that is repeated.
    """
    call, count = self.call, self.call.logprobs
    if count is None:
      return None
    places = slice(first or 0, None)
    top = written.top and TopTokens(written.top.ids[places], written.top.logprobs[places])
    told = answers.tell(written.tokens[places], written.logprobs[places], top, count)
    if first is None and call.echoes and written.scores is not None:
      told = answers.tell_prompt(call.prompts[index // call.n].ids, written.scores, count) + told
    return answers.logprobs_body(call.chat, self._engine.tokenizer, told, count, begin=begin)
