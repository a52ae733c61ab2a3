"""The server with OpenAI's own client, over a real socket."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2
import jax
import numpy as np
import openai
import pytest
import uvicorn

from rlpr_jax import huggingface
from rlpr_jax.data.templates import render
from rlpr_jax.errors import InputError
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine, SampleOptions
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Scheduler
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.serve import listen
from rlpr_jax.serving.app import Limits, create_app
from rlpr_jax.serving.loop import Loop
from rlpr_jax.types import Prompt

KEY, LIMIT = "sk-of-the-tests", 120
SHAPES = Shapes(
  slots=8,
  prompt_limit=24,
  max_response_length=LIMIT,
  suffix_length=1,
  steps=4,
  prefill_rows=4,
  score_rows=4,
  insert_rows=4,
)


@pytest.fixture(scope="module")
def engine(policy):
  """Of a random policy that seldom ends; each letter is a token."""
  settings = DecodeSettings(SHAPES.steps, (policy.tokenizer.eos_token_id,))
  return Engine(Device(policy.model, settings, SHAPES), policy.tokenizer, "think", baseline_prefix="bare")


class Served:
  """A server in a thread of its own."""

  def __init__(self, engine, params, waiting=64, seconds=60.0, body=4096):
    self.loop = Loop(engine, params, waiting)
    app = create_app(engine, self.loop, "tiny", Limits(body, seconds), KEY)
    self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None))
    self._thread = threading.Thread(target=self._server.run)
    self._thread.start()
    while not self._server.started:
      time.sleep(0.01)
    host, port = self._server.servers[0].sockets[0].getsockname()
    self.url = f"http://{host}:{port}"

  def client(self, key=KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

  def get(self, path: str) -> httpx2.Response:
    return httpx2.get(self.url + path)

  def idle(self) -> bool:
    """Whether all slots and queues become empty within some seconds."""
    return wait(lambda: (self.loop.waiting, self.loop.running) == (0, 0))

  def stop(self) -> None:
    self._server.should_exit = True
    self._thread.join()


def wait(condition, seconds=20.0) -> bool:
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      return False
    time.sleep(0.02)
  return True


@pytest.fixture(scope="module")
def served(engine, policy):
  served = Served(engine, policy.params)
  yield served
  served.stop()


@contextlib.contextmanager
def other(engine, policy, **options):
  served = Served(engine, policy.params, **options)
  try:
    yield served
  finally:
    served.stop()


def chat(text="1+2"):
  return {"model": "tiny", "messages": [{"role": "user", "content": text}]}


def expected(engine, policy, text, seed, samples=1, limit=LIMIT, sampling=SamplingParams(), stop=()):
  """What the engine alone samples."""
  ids = render(policy.tokenizer, [{"role": "user", "content": text}])
  prompt = Prompt(ids=np.array(ids, np.int32))
  alone = dataclasses.replace(engine, sampling=sampling)
  options = SampleOptions(limits=[limit] * samples, stop=stop)
  return alone.sample(policy.params, [(seed, prompt)], jax.random.key(0), samples, options)


def test_32_streams_at_once_are_what_the_engine_alone_samples(engine, policy, served):
  """In eight slots, each with its own temperature, limit and seed."""
  asked = [(f"{i}+{i}", i, LIMIT - i, (1.0, 0.0, 0.7)[i % 3]) for i in range(32)]

  async def one(client, text, seed, limit, temperature):
    stream = await client.chat.completions.create(
      **chat(text), seed=seed, max_tokens=limit, temperature=temperature, stream=True,
      stream_options={"include_usage": True},
    )  # fmt: skip
    pieces = [piece async for piece in stream]
    (reason,) = [piece.choices[0].finish_reason for piece in pieces if piece.choices and piece.choices[0].finish_reason]
    text = "".join(piece.choices[0].delta.content for piece in pieces if piece.choices)
    return text, reason, pieces[-1].usage, len(pieces)

  async def everything():
    async with served.client() as client:
      return await asyncio.gather(*(one(client, *row) for row in asked))

  most = 0
  for (text, seed, limit, temperature), found in zip(asked, asyncio.run(everything()), strict=True):
    alone = expected(engine, policy, text, seed, limit=limit, sampling=SamplingParams(temperature))
    assert found[0] == alone.texts[0]
    assert found[1] == ("stop" if alone.finished[0] else "length")
    assert found[2].completion_tokens == alone.lengths[0]
    most = max(most, found[3])
  assert most > 5  # it came in pieces
  assert served.idle()


def test_whole_responses_samples_stops_and_log_probabilities(engine, policy, served):
  async def ask():
    async with served.client() as client:
      whole = await client.chat.completions.create(**chat(), n=3, seed=5, logprobs=True, top_p=0.9, max_tokens=30)
      again = await client.chat.completions.create(**chat(), n=3, seed=5, top_p=0.9, max_tokens=30)
      stopped = await client.chat.completions.create(**chat(), n=3, seed=5, top_p=0.9, max_tokens=30, stop=["1", "b"])
      plain = await client.completions.create(
        model="tiny", prompt=["12", [5, 6, 7]], n=2, seed=1, max_tokens=6, logprobs=0
      )
      return whole, again, stopped, plain, await client.models.list()

  whole, again, stopped, plain, listed = asyncio.run(ask())
  alone = expected(engine, policy, "1+2", 5, 3, 30, SamplingParams(top_p=0.9))
  for i, choice in enumerate(whole.choices):
    assert (choice.index, choice.message.content) == (i, alone.texts[i])
    length = alone.lengths[i] - alone.finished[i]
    np.testing.assert_allclose([x.logprob for x in choice.logprobs.content], alone.logprobs[i, :length], atol=1e-5)
    assert "".join(x.token for x in choice.logprobs.content) == alone.texts[i]
  assert whole.usage.completion_tokens == alone.lengths.sum()
  assert [x.message.content for x in again.choices] == alone.texts
  halted = expected(engine, policy, "1+2", 5, 3, 30, SamplingParams(top_p=0.9), ["1", "b"])
  assert [x.message.content for x in stopped.choices] == halted.texts != alone.texts
  assert "stop" in {x.finish_reason for x in stopped.choices}
  assert [x.index for x in plain.choices] == [0, 1, 2, 3]
  assert len({x.text for x in plain.choices}) > 1
  assert all(len(x.logprobs.tokens) <= 6 for x in plain.choices)
  assert [model.id for model in listed.data] == ["tiny"]


def test_streams_that_are_left_free_their_slots(engine, policy, monkeypatch):
  """Clients that go away, while they stream and while they wait for the whole; left alone it would take 30 seconds."""
  begun = threading.Event()

  async def leave(served):
    async with served.client() as client:
      streams = [await client.chat.completions.create(**chat(), stream=True, n=2) for _ in range(10)]
      begun.set()
      for stream in streams:
        await anext(aiter(stream))
        await stream.close()
      waiting = [asyncio.ensure_future(client.chat.completions.create(**chat(), n=4)) for _ in range(5)]
      while len({id(job) for job in list(served.loop.jobs.values()) if not job.stream}) < len(waiting):
        await asyncio.sleep(0.01)
      for task in waiting:
        task.cancel()
      await asyncio.gather(*waiting, return_exceptions=True)

  honest, seen = Scheduler.round, []

  def slow_round(scheduler):
    seen.append(scheduler)
    begun.wait(60)
    time.sleep(0.2)
    return honest(scheduler)

  monkeypatch.setattr(Scheduler, "round", slow_round)
  with other(engine, policy) as served:
    asyncio.run(leave(served))
    assert wait(lambda: (served.loop.waiting, served.loop.running) == (0, 0), 5)
    assert not served.loop.jobs
    assert sorted(seen[-1].free) == list(range(SHAPES.slots))
    assert wait(lambda: 'rlpr_requests_total{status="499"} 15.0' in served.get("/metrics").text)


@pytest.mark.parametrize(
  ("change", "error", "says"),
  [
    ({"model": "other"}, openai.NotFoundError, "model 'other'"),
    ({"messages": []}, openai.BadRequestError, "messages: expected one or more"),
    ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, r"messages\[0\].role"),
    ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, r"messages\[0\].content"),
    ({"messages": [{"role": "user", "content": "x" * 40}]}, openai.BadRequestError, "tokens, expected at most 24"),
    ({"max_tokens": LIMIT + 1}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": True}, openai.BadRequestError, "max_tokens: expected int"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature: expected float"),
    ({"top_p": 1.5}, openai.BadRequestError, "top_p"),
    ({"n": 100}, openai.BadRequestError, "n: 100"),
    ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
    ({"top_logprobs": 3, "logprobs": True}, openai.BadRequestError, "top_logprobs: not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools: not supported"),
    ({"extra_body": {"beam_width": 4}}, openai.BadRequestError, "'beam_width': unknown field"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.APIStatusError, "body: over 4096 bytes"),
  ],
)
def test_requests_that_cannot_be_served_say_why(served, change, error, says):
  with pytest.raises(error, match=says):
    asyncio.run(served.client().chat.completions.create(**{**chat(), **change}))
  assert served.idle()


@pytest.mark.parametrize(
  "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b'{"model": "tiny"}', b'{"messages": "\\ud800"}']
)
def test_malformed_bodies_are_refused(served, body):
  headers = {"Authorization": f"Bearer {KEY}"}
  for path in ("/v1/chat/completions", "/v1/completions"):
    answer = httpx2.post(served.url + path, content=body, headers=headers)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]
  surrogate = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}).encode()
  assert httpx2.post(f"{served.url}/v1/chat/completions", content=surrogate, headers=headers).status_code == 400


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x"])
def test_the_key_is_needed(served, key):
  headers = {"Authorization": f"Bearer {key}"} if key else {}
  for answer in (
    httpx2.get(f"{served.url}/v1/models", headers=headers),
    httpx2.post(f"{served.url}/v1/chat/completions", json=chat(), headers=headers),
  ):
    assert answer.status_code == 401
    assert KEY not in answer.text
  assert served.get("/health").json() == {"status": "ok"}


def test_a_full_queue_and_a_time_limit(engine, policy):
  async def ask(served, count):
    async with served.client() as client:
      calls = (client.chat.completions.create(**chat(), n=4) for _ in range(count))
      return await asyncio.gather(*calls, return_exceptions=True)

  with other(engine, policy, waiting=4) as served:
    found = asyncio.run(ask(served, 12))
    full = [x for x in found if isinstance(x, openai.RateLimitError)]
    assert 0 < len(full) < 12
    assert full[0].response.headers["retry-after"] == "1"
    assert all(len(x.choices) == 4 for x in found if x not in full)
    assert served.idle()
  with other(engine, policy, seconds=0.001) as served:
    (found,) = asyncio.run(ask(served, 1))
    assert found.status_code == 408
    assert served.idle()


def test_an_engine_that_fails_leaves_nobody_waiting(engine, policy, monkeypatch):
  monkeypatch.setattr(threading, "excepthook", lambda *_: None)  # it is also printed
  with other(engine, policy) as served:
    monkeypatch.setattr(Scheduler, "round", lambda scheduler: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the engine has failed"):
      asyncio.run(served.client().chat.completions.create(**chat()))
    assert served.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="shutting down or has failed"):
      asyncio.run(served.client().chat.completions.create(**chat()))


def start(directory, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "rlpr_jax.serve", f"--model={directory}", "--port=0", *arguments],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
  )  # fmt: skip


def test_the_program_serves_and_finishes_what_runs_when_told_to_stop(policy, tmp_path):
  directory = tmp_path / "model"
  huggingface.save_pretrained(directory, policy.config, policy.params, policy.tokenizer)
  process = start(
    directory, "--name=tiny", "--prompt_limit=24", "--response_limit=120", "--slots=4", "--key_variable=TEST_KEY",
    "--compilation_cache=", TEST_KEY=KEY,
  )  # fmt: skip
  try:
    line = next(line for line in process.stdout if line.startswith("serving tiny at "))
    url = line.split()[-1]

    async def stream():
      async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        pieces = await client.chat.completions.create(**chat(), stream=True, n=4, seed=0, extra_body={"min_p": 0.0})
        reasons = []
        async for piece in pieces:
          if not reasons:
            process.send_signal(signal.SIGTERM)
          reasons.append(piece.choices[0].finish_reason)
        return [reason for reason in reasons if reason]

    # Where some clients put a key, and a body that is none.
    assert httpx2.get(f"{url}/models?api_key={KEY}").status_code == 401
    assert httpx2.get(f"{url}/{KEY}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404
    refused = httpx2.post(f"{url}/completions", content=f"{{{KEY}", headers={"Authorization": f"Bearer {KEY}"})
    assert refused.status_code == 400
    assert KEY not in refused.text
    assert len(asyncio.run(stream())) == 4
    out, errors = process.communicate(timeout=30)
    assert KEY not in out + errors
    assert process.returncode == 0
  finally:
    process.kill()


def test_slots_that_do_not_fit_are_called_as_the_flag(policy, tmp_path):
  huggingface.save_pretrained(tmp_path, policy.config, policy.params, policy.tokenizer)
  process = start(tmp_path, "--slots=1000000", "--response_limit=1000000", "--compilation_cache=")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  assert re.search(r"^error: --slots: 1000000 is too much .*; each of --slots takes [\d.]+ MiB$", errors, re.MULTILINE)


def test_a_port_that_is_taken(served):
  port = int(served.url.rsplit(":", 1)[1])
  for other in (port, 70_000):
    with pytest.raises(InputError, match=f"--port {other}: cannot be listened on"):
      listen("127.0.0.1", other)


@pytest.mark.slow
def test_wrong_flags_are_one_line(tmp_path):
  process = start(tmp_path, "--key_variable=NOT_SET_ANYWHERE")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  assert "NOT_SET_ANYWHERE: not set" in errors.strip().splitlines()[-1]
