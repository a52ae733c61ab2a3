"""A local OpenAI-compatible server that does whatever a test wants of it, and counts what it is asked."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Body = dict[str, Any]


def completion(*texts: str, finish_reason: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 5) -> Body:
  """A chat completion as the API writes it."""
  return {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
      {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
      for i, text in enumerate(texts)
    ],
    "usage": {
      "prompt_tokens": prompt_tokens,
      "completion_tokens": completion_tokens,
      "total_tokens": prompt_tokens + completion_tokens,
    },
  }


class ChatServer:
  """Answers POST /v1/chat/completions by `reply(body, number)`, `number` counting the requests from 1.

  A string is the text of a completion, a dict a JSON body, a Response itself, a number the seconds to hang.
  """

  def __init__(self, reply: Callable[[Body, int], Any]):
    self.reply = reply
    self.bodies: list[Body] = []
    self.headers: list[dict[str, str]] = []
    self.at_once = self.most_at_once = 0
    self.delay = 0.0  # seconds before every answer
    self._socket = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
    app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])
    # No logging: setting it up closes absl's handler, and with it the stderr that pytest stands in.
    self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

  @property
  def requests(self) -> int:
    return len(self.bodies)

  async def _answer(self, request: Request) -> Response:
    self.bodies.append(json.loads(await request.body()))
    self.headers.append(dict(request.headers))
    number = len(self.bodies)
    self.at_once += 1
    self.most_at_once = max(self.most_at_once, self.at_once)
    try:
      await asyncio.sleep(self.delay)
      said = self.reply(self.bodies[number - 1], number)
      if isinstance(said, Awaitable):
        said = await said
      if isinstance(said, float):
        await asyncio.sleep(said)
        said = "too late"
      if isinstance(said, str):
        said = completion(said)
      return JSONResponse(said) if isinstance(said, dict) else said
    finally:
      self.at_once -= 1

  def start(self) -> None:
    self._thread.start()
    while not self._server.started:
      time.sleep(0.005)

  def stop(self) -> None:
    self._server.should_exit = self._server.force_exit = True
    self._thread.join(5)
    self._socket.close()

  def die(self) -> None:
    """To be called by `reply`: no connection is taken any more."""
    self._server.should_exit = self._server.force_exit = True
    self._socket.close()


@contextlib.contextmanager
def serving(reply: Callable[[Body, int], Any]) -> Iterator[ChatServer]:
  server = ChatServer(reply)
  server.start()
  try:
    yield server
  finally:
    server.stop()
