"""The thread in which the engine works; requests of all clients share its slots (continuous batching)."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax.models import Params
from rlpr_jax.sampling.adjustments import TokenScores, TopTokens
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Extras, Request
from rlpr_jax.types import Prompt

# Seconds: an idle engine waits so long for the next request that is on its way, and so long for all of them.
_APART, _GATHERED = 0.02, 0.1


class Written(NamedTuple):
  """A sample, as far as it has come."""

  sample: int
  tokens: np.ndarray  # int32, all of the response so far
  logprobs: np.ndarray  # float32
  text: str | None  # of the whole response, once it has ended
  finished: bool  # ended by EOS, another token that ends it or a stop string
  top: TopTokens | None  # of each token, if they were asked for
  scores: TokenScores | None  # of the prompt's tokens but the first, if they were asked for

  @classmethod
  def of(cls, request: Request, ended: bool) -> "Written":
    text = request.text if ended else None
    return cls(
      sample=request.sample,
      tokens=request.tokens,
      logprobs=request.logprobs,
      text=text,
      finished=ended and request.finished,
      top=request.top,
      scores=request.group.scores,
    )


@dataclasses.dataclass(eq=False)
class Job:
  """Samples of one prompt that a client waits for."""

  prompt: Prompt
  limits: Sequence[int]  # most tokens of each sample
  sampling: SamplingParams
  extras: Extras
  stop: Sequence[str]
  seed: int  # uint32
  stream: bool  # whether `tell` is called before a sample has ended
  tell: Callable[[Written | None], None]  # called in the engine's thread; None: the engine has failed
  requests: list[Request] = dataclasses.field(default_factory=list)


class FullError(Exception):
  """As many samples wait as may."""


class ClosedError(Exception):
  """The engine has failed or is shutting down."""


class Loop:
  """Runs one scheduler for all jobs, for as long as it is open."""

  def __init__(self, engine: Engine, params: Params, most_waiting: int):
    """
    Args:
      most_waiting: samples that may wait for a slot.
    """
    self.error: BaseException | None = None
    self.waiting, self.running = 0, 0  # samples without and with a slot
    self.most = engine.device.shapes.slots + most_waiting  # samples
    self.vocabulary = params["embedding"].shape[0]  # tokens that the model knows
    self.jobs: dict[Request, Job] = {}  # that clients wait for
    self._scheduler = engine.scheduler(params, jax.random.key(0))
    self._changed = threading.Condition()
    self._new: collections.deque[Job] = collections.deque()
    self._taken: list[Job] = []  # the last that were handed to the scheduler
    self._cancelled: list[Job] = []
    self._closing = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def submit(self, job: Job) -> None:
    """Takes a job.

    Raises:
      FullError, ClosedError: it was not taken.
    """
    with self._changed:
      if self._closing or self.error:
        raise ClosedError
      taken = self.waiting + self.running + sum(len(queued.limits) for queued in self._new)
      if taken + len(job.limits) > self.most:
        raise FullError
      self._new.append(job)
      self._changed.notify()

  def cancel(self, job: Job) -> None:
    """Gives up what is left of a job; nothing happens if nothing is."""
    with self._changed:
      self._cancelled.append(job)
      self._changed.notify()

  def close(self) -> None:
    """Finishes what was taken, then ends."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    try:
      while self._take():
        self._tell(self._scheduler.round())
        with self._changed:
          self._count()
    except Exception as error:  # whatever it is, no client may wait for ever
      with self._changed:
        self.error = error
        self.waiting = self.running = 0
        jobs = {*self._taken, *self.jobs.values(), *self._new}
      for job in jobs:
        job.tell(None)

  def _take(self) -> bool:
    """Waits for something to do, and hands it to the scheduler; False once all is over."""
    scheduler = self._scheduler
    while True:
      with self._changed:
        while not (self._new or self._cancelled or scheduler.busy or self._closing):
          self._changed.wait()
        if not scheduler.busy:  # what comes together shall begin together, or the first ones decode with idle slots
          most = time.monotonic() + _GATHERED
          while not self._closing and time.monotonic() < most and self._changed.wait(_APART):
            pass
        self._taken, cancelled = list(self._new), self._cancelled
        self._new.clear()
        self._cancelled = []
        for job in self._taken:
          job.requests = scheduler.add(job.prompt, job.seed, job.limits, job.sampling, job.stop, job.extras)
          self.jobs |= dict.fromkeys(job.requests, job)
        for job in cancelled:
          scheduler.cancel(job.requests)
          for request in job.requests:
            self.jobs.pop(request, None)
        self._count()
        if scheduler.busy:
          return True
        if self._closing:
          return False

  def _count(self) -> None:
    self.waiting, self.running = len(self._scheduler.waiting), len(self._scheduler.running)

  def _tell(self, done: Sequence[Request]) -> None:
    if any(job.stream for job in self.jobs.values()):
      for request in self._scheduler.running.values():
        job = self.jobs.get(request)
        if job and job.stream:
          job.tell(Written.of(request, ended=False))
    for request in done:
      if job := self.jobs.pop(request, None):  # None: cancelled after it had finished
        job.tell(Written.of(request, ended=True))
