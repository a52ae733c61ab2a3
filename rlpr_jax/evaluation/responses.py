"""Responses of a model to the questions of benchmarks, each written down as soon as it is there.

What is on disk is told from what is missing by all that a response depends on, so an evaluation that was interrupted
goes on, and one whose config grew does only what is new.
"""

import asyncio
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlpr_jax.data.sources import Example
from rlpr_jax.data.templates import build_messages, render
from rlpr_jax.errors import InputError, MachineError, setting_names, trouble
from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.judging.client import GIVE_UP_AFTER, Cache, Client, ClientError, Endpoint
from rlpr_jax.runs import storage, trained
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Request
from rlpr_jax.types import Prompt

_RETRY_SECONDS = 60.0  # how long a disk that is full or gone is tried again


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
  refused: bool = False  # the prompt is too long, or the endpoint does not take it: nothing was sampled


_REFUSED = Response(text="", tokens=0, finished=False, refused=True)


class Store:
  """Responses on disk, by all that they depend on: WORKDIR/responses.jsonl, and replies of endpoints one by one."""

  def __init__(self, workdir: pathlib.Path):
    self._path, self._responses = workdir / "responses.jsonl", {}
    self.replies = Cache(workdir / "replies")
    if self._path.exists():
      try:
        lines = self._path.read_bytes().splitlines()
      except OSError as error:
        message = f"{self._path}: cannot be read ({storage.reason(error)}), expected the responses of an evaluation"
        raise trouble(error, message) from None
      for line in lines:
        try:
          row = json.loads(line)
          self._responses[row["key"]] = [Response(*response) for response in row["responses"]]
        except (ValueError, KeyError, TypeError, RecursionError):  # half a line, of a process that was killed
          continue

  def get(self, key: str) -> list[Response] | None:
    return self._responses.get(key)

  def add(self, key: str, responses: Sequence[Response]) -> None:
    line = json.dumps({"key": key, "responses": responses})
    storage.persist(lambda: storage.append(self._path, line), self._path, _RETRY_SECONDS)
    self.note(key, responses)

  def note(self, key: str, responses: Sequence[Response]) -> None:
    """Keeps responses for this time alone: the next call asks again."""
    self._responses[key] = list(responses)


class Asked(NamedTuple):
  """A model and how it is asked."""

  settings: ConfigDict  # `config.models.NAME`
  source: trained.Source | None  # of our own engine
  clients: dict[str, Client]  # of an endpoint, by mode
  where: str  # what the user calls the settings, in errors

  def messages(self, question: Question) -> list[dict[str, str]]:
    """The chat of a question."""
    template, instruction = self.settings.template, self.settings.instruction
    if template == "default":
      template = self.source.config.data.template if self.source else "think"
    if instruction == "default":
      instruction = self.source.instruction if self.source else None
    example = Example(({"role": "user", "content": question.prompt},), question.reference, "", question.row)
    return build_messages(example, template, instruction=instruction)


def open_model(settings: ConfigDict, where: str = "config.models.NAME") -> Asked:
  """Finds a model; nothing is read or asked yet.

  Args:
    where: what the user calls the settings, in errors.

  Raises:
    InputError: a checkpoint that is not there, a URL or key that cannot be.
  """
  if not settings.url:
    source = trained.find(settings.path, None if settings.step < 0 else settings.step)
    return Asked(settings, source, clients={}, where=where)
  sampling = {"sampled": (settings.temperature, settings.top_p), "greedy": (0.0, 1.0)}
  clients = {
    mode: Client(
      Endpoint(
        base_url=settings.url,
        model=settings.name,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        time_limit=settings.time_limit,
        attempts=settings.attempts,
        temperature=temperature,
        top_p=top_p,
        max_tokens=settings.max_tokens,
      )
    )
    for mode, (temperature, top_p) in sampling.items()
  }
  return Asked(settings, source=None, clients=clients, where=where)


def keys(asked: Asked, seed: int, tasks: Iterable[Task]) -> dict[str, Task]:
  """Tasks by a hash of all that their responses depend on.

  Raises:
    InputError: there is no such model.
  """
  # Where the same responses come from, and how fast, makes no difference.
  fields = ("name", "temperature", "top_p", "top_k", "min_p", "stop", "max_tokens", "prompt_limit", "dtype")
  model = [asked.settings[field] for field in fields]
  model.append(trained.fingerprint(asked.source) if asked.source else None)
  by_key = {}
  for task in tasks:
    what = [model, seed, task.seed, asked.messages(task.question), task.mode, task.samples]
    by_key[hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()] = task
  return by_key


def missing(asked: Asked, tasks: dict[str, Task], store: Store) -> dict[str, Task]:
  """Tasks without a response; what an endpoint refuses it may take another time."""

  def is_there(stored: list[Response] | None) -> bool:
    return stored is not None and not (asked.clients and any(response.refused for response in stored))

  return {key: task for key, task in tasks.items() if not is_there(store.get(key))}


def respond(
  asked: Asked, seed: int, missing: dict[str, Task], store: Store, progress: Callable[[int, int], None]
) -> None:
  """Has a model answer what is missing, and stores it question by question.

  Args:
    missing: tasks by their keys.
    progress: called with how many questions are done, of how many.

  Raises:
    InputError: the model cannot be loaded, or an endpoint refused something.
    MachineError: an endpoint cannot be reached.
  """
  ask = _ask_engine if asked.source else _ask_endpoint
  ask(asked, seed, missing, store, progress=progress)


def _ask_engine(
  asked: Asked, seed: int, missing: dict[str, Task], store: Store, progress: Callable[[int, int], None]
) -> None:
  settings, where = asked.settings, asked.where
  policy = trained.load(asked.source, settings.dtype)
  fields = {"slots": "slots", "prompt_limit": "prompt_limit", "max_response_length": "max_tokens"}
  with setting_names({size: f"{where}.{field}" for size, field in fields.items()}):
    engine = trained.create_engine(
      policy, settings.slots, settings.prompt_limit, settings.max_tokens, decode_steps=settings.decode_steps
    )
    engine.device.compile_programs(policy.params, scoring=False)
  scheduler = engine.scheduler(policy.params, jax.random.key(seed))
  sampled = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
  requests: dict[str, list[Request]] = {}  # by key
  key_of, done = {}, 0
  for key, task in missing.items():
    ids = render(policy.tokenizer, asked.messages(task.question))
    prompt = Prompt(
      ids=np.array(ids, np.int32),
      reference=task.question.reference,
      question=task.question.prompt,
      source=task.benchmark,
      row=0,
    )
    if not engine.device.shapes.takes(prompt):
      store.add(key, [_REFUSED] * task.samples)
      progress(done := done + 1, len(missing))
      continue
    sampling = SamplingParams(0.0) if task.mode == "greedy" else sampled
    limits = [settings.max_tokens] * task.samples
    requests[key] = scheduler.add(prompt, task.seed, limits, sampling, stop=settings.stop)
    key_of |= dict.fromkeys(requests[key], key)
  unfinished = {key: len(of_task) for key, of_task in requests.items()}
  while scheduler.busy:
    for request in scheduler.round():
      key = key_of.pop(request)
      unfinished[key] -= 1
      if not unfinished[key]:
        store.add(key, [Response(each.text, each.tokens.size, each.finished) for each in requests.pop(key)])
        progress(done := done + 1, len(missing))


def _ask_endpoint(
  asked: Asked, seed: int, missing: dict[str, Task], store: Store, progress: Callable[[int, int], None]
) -> None:
  async def sample(task: Task, i: int) -> Response:
    # A request for each sample: not every server knows `n`. Its reply is kept, also where another one fails.
    client, messages = asked.clients[task.mode], asked.messages(task.question)
    request = client.request(messages, seed=(seed + task.seed + i) % 2**31)
    reply = store.replies.get(request)
    if reply is None:
      reply = await client.chat(messages, seed=request["seed"])
      store.replies.put(request, reply)
    return Response(reply.texts[0], reply.completion_tokens, reply.finish_reasons[0] != "length")

  last, in_a_row = ClientError(""), 0
  done = 0

  async def answer(key: str, task: Task) -> None:
    nonlocal last, in_a_row, done
    samples = await asyncio.gather(*(sample(task, i) for i in range(task.samples)), return_exceptions=True)
    for error in samples:
      if isinstance(error, BaseException) and not isinstance(error, ClientError):
        raise error
    errors = [error for error in samples if isinstance(error, ClientError)]
    for error in errors:
      if error.refused == "settings":
        raise InputError(f"{asked.where}: the endpoint refuses whatever it is asked so: {_sent(asked, task)} ({error})")
    if errors and all(error.refused for error in errors):
      store.note(key, [_REFUSED if isinstance(outcome, ClientError) else outcome for outcome in samples])
      in_a_row = 0
    elif errors:
      in_a_row, last = in_a_row + 1, errors[0]
    else:
      store.add(key, samples)
      in_a_row = 0
    progress(done := done + 1, len(missing))

  async def work(todo: Iterator[tuple[str, Task]]) -> None:
    for key, task in todo:  # one iterator for all workers
      if in_a_row >= GIVE_UP_AFTER:
        return
      await answer(key, task)

  async def run() -> None:
    todo = iter(missing.items())
    async with asked.clients["sampled"], asked.clients["greedy"]:
      await asyncio.gather(*(work(todo) for _ in range(asked.settings.concurrency)))

  asyncio.run(run())
  unanswered = sum(store.get(key) is None for key in missing)
  if unanswered:
    kind = MachineError if last.may_pass else InputError
    raise kind(
      f"{asked.settings.url}: {unanswered} of {len(missing)} questions got no response ({last}); the same command asks"
      " again"
    )


def _sent(asked: Asked, task: Task) -> str:
  """What an endpoint is asked beside the question, in words."""
  request = asked.clients[task.mode].request((), seed=None)
  return ", ".join(f"{name} {value}" for name, value in request.items() if name not in ("model", "messages"))
