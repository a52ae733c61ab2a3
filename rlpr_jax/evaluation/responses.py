"""Responses of a model to the questions of benchmarks, each written down as soon as it is there.

What is on disk is told from what is missing by all that a response depends on, so an evaluation that was interrupted
goes on, and one whose config grew does only what is new.
"""

import asyncio
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlpr_jax import storage
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.data.sources import Example
from rlpr_jax.data.templates import build_messages, render
from rlpr_jax.errors import InputError
from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.evaluation.client import GIVE_UP_AFTER, Client, ClientError, Endpoint
from rlpr_jax.models import resolve
from rlpr_jax.sampling.choose import Choice
from rlpr_jax.sampling.session import Session
from rlpr_jax.training import trained

Json = dict[str, Any]
MODES = ("sampled", "greedy")


class Task(NamedTuple):
  """A question that a model is to answer some times."""

  benchmark: str
  question: Question
  mode: str  # sampled | greedy
  samples: int

  @property
  def seed(self) -> int:
    """A uint32 of the question's own: its responses do not depend on what else is asked."""
    return int.from_bytes(hashlib.sha256(f"{self.benchmark}/{self.question.id}".encode()).digest()[:4])


class Response(NamedTuple):
  """One sample."""

  text: str
  tokens: int
  finished: bool  # ended by itself; else cut at the limit
  refused: bool = False  # the prompt is over the limit: nothing was sampled


class Store:
  """Responses on disk, JSONL, by all that they depend on."""

  def __init__(self, path: pathlib.Path):
    self._path, self._found = path, {}
    if path.exists():
      for line in path.read_bytes().splitlines():
        try:
          row = json.loads(line)
          self._found[row["key"]] = [Response(*response) for response in row["responses"]]
        except (ValueError, KeyError, TypeError):  # half a line, of a process that was killed
          continue

  def get(self, key: str) -> list[Response] | None:
    return self._found.get(key)

  def add(self, key: str, responses: Sequence[Response]) -> None:
    storage.append(self._path, json.dumps({"key": key, "responses": responses}))
    self._found[key] = list(responses)


def keys(settings: ConfigDict, seed: int, tasks: Iterable[Task]) -> dict[str, Task]:
  """Tasks by a hash of all that their responses depend on."""
  # Where the same responses come out, or how fast, makes no difference.
  beside = ("key_variable", "concurrency", "time_limit", "attempts", "slots", "decode_steps")
  model = {name: value for name, value in settings.to_dict().items() if name not in beside}
  if settings.path:
    model["files"] = _files(settings.path, settings.step)
  parts = {}
  for task in tasks:
    what = [model, seed, task.benchmark, task.question.id, task.question.prompt, task.mode, task.samples]
    parts[hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()] = task
  return parts


def _files(path: str, step: int) -> list[tuple[str, int, int]]:
  """Names, sizes and times of the files that hold the weights: other weights may come to lie in the same place."""
  checkpoints = pathlib.Path(path) / "checkpoints"
  if checkpoints.is_dir():
    steps = [int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit()]
    chosen = max(steps, default=0) if step < 0 else step
    return [(str(chosen), 0, (checkpoints / str(chosen)).stat().st_mtime_ns if chosen in steps else 0)]
  found = sorted(resolve(path).glob("*.safetensors"))
  return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def respond(
  settings: ConfigDict,
  seed: int,
  missing: dict[str, Task],
  store: Store,
  progress: Callable[[int, int], None],
) -> None:
  """Has a model answer what is missing, and stores it question by question.

  Args:
    settings: `config.models.NAME`.
    missing: tasks by their keys.
    progress: called with how many questions are done, of how many.

  Raises:
    InputError: the model cannot be loaded, or an endpoint did not answer everything.
  """
  ask = _ask_endpoint if settings.url else _ask_engine
  ask(settings, seed, missing, store, progress)


def _ask_engine(
  settings: ConfigDict,
  seed: int,
  missing: dict[str, Task],
  store: Store,
  progress: Callable[[int, int], None],
) -> None:
  policy = trained.load(settings.path, settings.dtype, None if settings.step < 0 else settings.step)
  engine = trained.create_engine(
    policy, settings.slots, settings.prompt_limit, settings.max_tokens, settings.decode_steps
  )
  instruction = policy.instruction if settings.instruction == "default" else settings.instruction
  engine.warm_up(policy.params, scoring=False)
  session = Session(engine, policy.params, jax.random.key(seed))
  sampled = Choice(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
  left, done, of = {}, 0, {}
  for key, task in missing.items():
    ids = render(policy.policy.tokenizer, _messages(task.question, settings.template, instruction))
    prompt = Prompt(np.array(ids, np.int32), task.question.reference, task.question.prompt, task.benchmark, 0)
    if not engine.shapes.takes(prompt):
      store.add(key, [Response("", 0, True, True)] * task.samples)
      done += 1
      continue
    choice = Choice(0.0) if task.mode == "greedy" else sampled
    requests = session.add(prompt, task.seed, [settings.max_tokens] * task.samples, choice, settings.stop)
    left[key] = len(requests)
    of |= {request: (key, requests) for request in requests}
  while session.busy:
    for request in session.round():
      key, requests = of.pop(request)
      left[key] -= 1
      if not left[key]:
        store.add(key, [Response(each.text, each.tokens.size, each.finished) for each in requests])
        done += 1
        progress(done, len(missing))


def _ask_endpoint(
  settings: ConfigDict,
  seed: int,
  missing: dict[str, Task],
  store: Store,
  progress: Callable[[int, int], None],
) -> None:
  instruction = None if settings.instruction == "default" else settings.instruction

  def client(mode: str) -> Client:
    temperature, top_p = (0.0, 1.0) if mode == "greedy" else (settings.temperature, settings.top_p)
    return Client(
      Endpoint(
        settings.url,
        settings.name,
        settings.key_variable,
        settings.concurrency,
        settings.time_limit,
        settings.attempts,
        temperature=temperature,
        top_p=top_p,
        max_tokens=settings.max_tokens,
      )
    )

  async def run() -> tuple[int, str]:
    failures, last, in_a_row, done = 0, "", 0, 0
    todo = iter(missing.items())
    clients = {mode: client(mode) for mode in MODES}

    async def sample(task: Task, i: int) -> Response:
      messages = _messages(task.question, settings.template, instruction)
      # A request for each sample: not every server knows `n`.
      reply = await clients[task.mode].chat(messages, seed=(seed + task.seed + i) % 2**31)
      return Response(reply.texts[0], reply.completion_tokens, reply.finish_reasons[0] != "length")

    async def work() -> None:
      nonlocal failures, last, in_a_row, done
      for key, task in todo:  # one iterator for all workers
        if in_a_row >= GIVE_UP_AFTER:
          failures += 1
          continue
        try:
          store.add(key, [await sample(task, i) for i in range(task.samples)])
          in_a_row = 0
        except ClientError as error:
          failures, in_a_row, last = failures + 1, in_a_row + 1, str(error)
        done += 1
        progress(done, len(missing))

    async with clients["sampled"], clients["greedy"], asyncio.TaskGroup() as group:
      for _ in range(settings.concurrency):
        group.create_task(work())
    return failures, last

  failures, last = asyncio.run(run())
  if failures:
    raise InputError(
      f"{settings.url}: {failures} of {len(missing)} questions got no response ({last}); the same command asks again"
    )


def _messages(question: Question, template: str, instruction: str | None) -> list[dict[str, str]]:
  example = Example(({"role": "user", "content": question.prompt},), question.reference, "", question.row)
  return build_messages(example, template, instruction=instruction)
