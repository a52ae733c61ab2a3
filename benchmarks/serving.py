"""The server with many streams at once, against the engine alone on the same requests.

    make smollm2
    PYTHONPATH=. .venv/bin/python -m benchmarks.serving  # five minutes on two cores

Both sample the same tokens: as many responses of equal length to each prompt, with the same seeds. The runs of the two
alternate. The client is OpenAI's, in a process of its own, and reads every piece of every stream.
"""

import asyncio
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import openai
import uvicorn
from absl import flags

from benchmarks.common import MODEL, REPEATS, run, spread
from rlpr_jax.data.templates import render
from rlpr_jax.errors import setting_names
from rlpr_jax.runs import trained
from rlpr_jax.serving.app import Limits, create_app
from rlpr_jax.serving.loop import Loop
from rlpr_jax.types import Prompt

_STREAMS = flags.DEFINE_integer("streams", 32, "requests at once, and slots")
_TOKENS = flags.DEFINE_integer("tokens", 64, "of each response")
_CLIENT = flags.DEFINE_string("client", None, "be the client of this server; what the program starts")

_TOPICS = ("a river", "the moon", "an old clock", "bread", "a lighthouse", "winter", "a violin", "the sea")


def questions() -> list[list[dict[str, str]]]:
  return [
    [{"role": "user", "content": f"Write {3 + i} sentences about {_TOPICS[i % len(_TOPICS)]}."}]
    for i in range(_STREAMS.value)
  ]


def be_client(url: str) -> None:
  """Prints the seconds that all streams together took."""

  async def one(client: openai.AsyncOpenAI, seed: int, messages: list[dict[str, str]]) -> None:
    stream = await client.chat.completions.create(
      model="m", messages=messages, seed=seed, max_tokens=_TOKENS.value, stream=True
    )
    async for _ in stream:
      pass

  async def run() -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
      await client.models.list()
      begin = time.perf_counter()
      await asyncio.gather(*(one(client, *row) for row in enumerate(questions())))
      print(time.perf_counter() - begin)

  asyncio.run(run())


def main(_: list[str]) -> None:
  if _CLIENT.value:
    be_client(_CLIENT.value)
    return
  policy = trained.load(trained.find(MODEL.value), "float32")
  with setting_names({"slots": "--streams", "max_response_length": "--tokens"}):
    endless = policy._replace(turn_end=policy.turn_end._replace(eos_ids=()))
    engine = trained.create_engine(endless, _STREAMS.value, prompt_limit=64, response_limit=_TOKENS.value)
    engine.device.compile_programs(policy.params, scoring=False)
  draws = [
    (
      seed,
      Prompt(ids=np.array(render(engine.tokenizer, messages), np.int32), row=seed),
    )
    for seed, messages in enumerate(questions())
  ]

  def alone() -> float:
    begin = time.perf_counter()
    samples = engine.sample(policy.params, draws, jax.random.key(0), 1)
    assert (samples.lengths == _TOKENS.value).all()
    return time.perf_counter() - begin

  loop = Loop(engine, policy.params, 256)
  server = uvicorn.Server(
    uvicorn.Config(create_app(engine, loop, "m", Limits(2**20, 600)), "127.0.0.1", 0, log_config=None)
  )
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.1)
  port = server.servers[0].sockets[0].getsockname()[1]
  arguments = [f"--streams={_STREAMS.value}", f"--tokens={_TOKENS.value}", f"--client=http://127.0.0.1:{port}/v1"]

  def served() -> float:
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

  alone()
  served()
  pairs = [(alone(), served()) for _ in range(REPEATS.value)]
  server.should_exit = True
  thread.join()
  tokens = _STREAMS.value * _TOKENS.value
  print(f"engine alone: {spread([tokens / a for a, _ in pairs], ' tokens/s')}")
  print(f"server, {_STREAMS.value} streams: {spread([tokens / b for _, b in pairs], ' tokens/s')}")
  print(f"server / engine: {spread([a / b for a, b in pairs])}")


if __name__ == "__main__":
  run(main)
