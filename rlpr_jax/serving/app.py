"""The web application: OpenAI's routes in front of the engine's loop."""

import asyncio
import contextlib
import functools
import hmac
import json
from collections.abc import AsyncIterator, Awaitable
from typing import NamedTuple

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rlpr_jax.sampling.engine import Engine
from rlpr_jax.serving import protocol
from rlpr_jax.serving.loop import ClosedError, FullError, Job, Loop, Written
from rlpr_jax.serving.protocol import Call, Json, RequestError


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


def create_app(engine: Engine, loop: Loop, model: str, limits: Limits, key: str | None = None) -> Starlette:
  """Makes the application.

  Args:
    model: the name that it is served under.
    key: what clients must send as a bearer token; None for nothing.
  """
  metrics = _Metrics(loop)
  parse = functools.partial(
    protocol.parse, model=model, tokenizer=engine.tokenizer, shapes=engine.device.shapes, most=loop.most
  )

  async def complete(request: Request, chat: bool) -> Response:
    check_key(request)
    try:
      async with asyncio.timeout(limits.seconds):
        body = await read(request, limits.body_bytes)
    except TimeoutError:
      raise RequestError(408, "the body did not come in time", "timeout_error", "timeout") from None
    # Templates and tokenizers take a while on long texts, during which others are to be heard.
    call = await asyncio.to_thread(parse, body, chat)
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

  async def models(request: Request) -> Response:
    check_key(request)
    return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "rlpr_jax"}]})

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
      Route("/health", health),
      Route("/metrics", show_metrics),
    ],
    exception_handlers={RequestError: refuse, HTTPException: refuse_route, ClientDisconnect: forget},
    lifespan=lifespan,
  )


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
    self._common = protocol.identify(call.chat) | {"model": model}
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
        seed, limits = (call.seed + row) % 2**32, [call.limit] * call.n
        job = Job(
          prompt=prompt,
          limits=limits,
          sampling=call.sampling,
          stop=call.stop,
          seed=seed,
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
    choices: dict[int, Json] = {}
    while self.unfinished:
      index, written = await self._next()
      if written.text is not None:
        piece = protocol.Piece(index, written.text, self._reason(written), self._logprobs(written))
        choices[index] = protocol.choice_body(self.call.chat, piece, streamed=False)
    total = protocol.usage(self.prompt_tokens, self.completion_tokens)
    return self._common | {"choices": [choices[index] for index in sorted(choices)], "usage": total}

  async def pieces(self) -> AsyncIterator[Json]:
    """Makes the bodies of a stream."""
    call, eos_ids = self.call, self._engine.device.settings.eos_ids
    common = self._common | {"object": "chat.completion.chunk"} if call.chat else self._common
    texts = [protocol.TextStream(self._engine.tokenizer, eos_ids, call.stop) for _ in range(self.unfinished)]
    told = [0] * self.unfinished  # tokens
    while self.unfinished:
      index, written = await self._next()
      stream = texts[index]
      begin = stream.told
      text = stream.grow(written.tokens) if written.text is None else stream.end(written.text)
      if text or written.text is not None:
        piece = protocol.Piece(index, text, self._reason(written), self._logprobs(written, told[index], begin))
        yield common | {"choices": [protocol.choice_body(call.chat, piece, streamed=True)]}
        told[index] = len(written.tokens)
    if call.usage:
      yield common | {"choices": [], "usage": protocol.usage(self.prompt_tokens, self.completion_tokens)}

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

  def _logprobs(self, written: Written, first: int = 0, begin: int = 0) -> Json | None:
    """Log-probabilities of the tokens from `first` on, after `begin` characters; None if they were not asked for."""
    if not self.call.logprobs:
      return None
    eos_ids = self._engine.device.settings.eos_ids
    seen = [i for i in range(first, len(written.tokens)) if written.tokens[i] not in eos_ids]
    return protocol.token_logprobs(
      self.call.chat, self._engine.tokenizer, written.tokens[seen], written.logprobs[seen], begin=begin
    )
