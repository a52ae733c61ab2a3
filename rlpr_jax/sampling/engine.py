"""Rollouts: prompts in, sampled responses and the probability of each reference answer out.

Each file of this folder imports only those before it:

    params       a token of each row         device     the host's calls of these programs
    adjustments  what servers change of it   scheduler  which prompt goes into which slot, and when
    shapes       sizes of the programs       engine     text: prompts and references in, rollouts out
    decode       the compiled programs
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing
from rlpr_jax.models import Params
from rlpr_jax.sampling.device import Device, Suffix
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Beginning, Clock, Reference, Request, Scheduler
from rlpr_jax.sampling.shapes import bucket, pad_rows
from rlpr_jax.types import Prompt, Rollouts

Draws = Sequence[tuple[int, Prompt]]  # prompts and their numbers, which decide their responses
_NO_REFERENCE = Reference(start=0, tokens=[], mask=[], logps=np.zeros(0, np.float32))


class StoppedError(Exception):
  """The caller asked to stop; what was sampled so far is lost."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
  """How the responses of a batch end, and who hears of it."""

  limits: Sequence[int] | np.ndarray | None = None  # most tokens of each, a prompt's samples together; None: T
  beginnings: Sequence[Beginning | None] = ()  # of each, what there is already, if that is anything; (): of none
  stop: Sequence[str] = ()  # strings that end a response, as in `Scheduler.add`
  progress: Callable[[int, int], None] = lambda done, total: None  # told how many responses have ended, of how many
  ended: Callable[[list[Request]], None] = lambda requests: None  # given the responses whose text is known now
  interrupted: Callable[[], bool] = lambda: False  # asked every few tokens; once it is true, `StoppedError` is raised


@dataclasses.dataclass(frozen=True)
class Engine:
  """Samples and scores, whatever lengths come: texts and prompts in front of the device's fixed shapes."""

  device: Device
  tokenizer: PreTrainedTokenizerBase
  template: str  # think | answer_only
  baseline_prefix: str  # bare | tagged
  sampling: SamplingParams = SamplingParams()
  eos_id: int | None = None  # that ends a reference answer; None: the tokenizer's EOS
  max_references: int | None = None  # M, of a prompt that are scored; None: the first, without an axis M in arrays

  def sample(
    self, params: Params, draws: Draws, key: jax.Array, samples: int, options: SampleOptions = SampleOptions()
  ) -> Rollouts:
    """Samples responses to each prompt; a draw's number and `key` decide its responses, not slots or neighbours."""
    return Session(self, self.scheduler(params, key), samples).run(draws, options)

  def rollout(
    self, params: Params, draws: Draws, key: jax.Array, samples: int, options: SampleOptions = SampleOptions()
  ) -> Rollouts:
    """Samples responses and scores the reference answers in the place of each response's own (RLPR, section 3.2)."""
    return self.session(params, key, samples).run(draws, options)

  def session(self, params: Params, key: jax.Array, samples: int) -> "Session":
    """For several batches of rollouts with the same parameters."""
    return Session(self, self.scheduler(params, key, scoring=True), samples)

  def scheduler(self, params: Params, key: jax.Array, scoring: bool = False) -> Scheduler:
    """A scheduler of responses whose text is this tokenizer's; with `scoring`, of their references too."""
    return Scheduler(self.device, params, key, self.decode_text, self._splices if scoring else None)

  def _references(self, prompt: Prompt) -> tuple[str, ...]:
    """Those of a prompt that are scored."""
    return prompt.references[: self.max_references or 1]

  def _splices(self, prompt: Prompt, response: list[int]) -> list[splicing.Splice]:
    references = self._references(prompt)
    return splicing.splice_each(self.tokenizer, prompt.ids, response, references, self.template, self.eos_id)

  def reference_shape(self, rows: int, width: int) -> tuple[int, ...]:
    """Of arrays of references: [rows, *M, width]."""
    return (rows, width) if self.max_references is None else (rows, self.max_references, width)

  def response_text(self, response: Sequence[int] | np.ndarray) -> str:
    """A response's text, without its EOS."""
    return self.decode_text(self.device.settings.without_eos(response))

  def decode_text(self, tokens: Sequence[int] | np.ndarray) -> str:
    return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

  def baseline(self, params: Params, prompts: Sequence[Prompt]) -> Float[np.ndarray, "N *M A"]:
    """Scores each reference straight after its prompt, with no reasoning.

    Column k is the answer's k-th token; NaN beyond the last, and where a prompt or reference is too long.
    """
    shapes = self.device.shapes
    scores: dict[tuple[int, int], np.ndarray] = {}
    by_width = collections.defaultdict(list)
    for row, prompt in enumerate(prompts):
      if shapes.takes(prompt):
        by_width[bucket(shapes.prompt_buckets, len(prompt.ids))].append(row)
    size = shapes.prefill_rows
    for width, rows in sorted(by_width.items()):
      for first in range(0, len(rows), size):
        part = rows[first : first + size]
        cache = self.device.prefill(params, [prompts[row] for row in part], width).cache
        suffixes = self.baseline_suffixes(enumerate(prompts[row] for row in part))
        found = self.device.score(params, cache, list(suffixes.values()), size, width)
        scores |= {(part[place], number): x for (place, number), x in zip(suffixes, found, strict=True)}
    return self.baselines(scores, len(prompts))

  def baseline_suffixes(self, prompts: Iterable[tuple[int, Prompt]]) -> dict[tuple[int, int], Suffix]:
    """Each reference straight after its prompt, by numbers of prompt and reference, but for what is too long."""
    shapes, suffixes = self.device.shapes, {}
    for row, prompt in prompts:
      for number, reference in enumerate(self._references(prompt) if shapes.takes(prompt) else ()):
        ids, mask = splicing.baseline_suffix(self.tokenizer, reference, self.baseline_prefix, self.eos_id)
        suffix = Suffix.after(row, prompt.ids, ids, mask)
        if len(suffix.ids) <= shapes.suffix_length:
          suffixes[row, number] = suffix
    return suffixes

  def baselines(self, scores: Mapping[tuple[int, int], np.ndarray], count: int) -> Float[np.ndarray, "N *M A"]:
    """Lays out the scores of `baseline_suffixes` of so many prompts, as `baseline` returns them."""
    width = self.device.shapes.suffix_length
    logps = np.full((count, self.max_references or 1, width), np.nan, np.float32)
    for at, found in scores.items():
      logps[at][: found.size] = found
    return logps.reshape(self.reference_shape(count, width))


class Session:
  """Batches of responses by one policy, which share its slots: the next may begin where one leaves some free."""

  def __init__(self, engine: Engine, scheduler: Scheduler, samples: int):
    self.engine, self.scheduler, self.samples = engine, scheduler, samples
    self.begun: list[Request] = []  # of the batch that comes next

  def run(self, draws: Draws, options: SampleOptions = SampleOptions(), ahead: Draws = ()) -> Rollouts:
    """Runs until all of a batch has ended; response b is sample b % G of prompt b // G.

    Args:
      ahead: the batch that comes next, if it is known: its responses begin in slots for which this one has none left.
        None is another for it, since a draw's number and the key decide them. `options` say how these end too.

    Raises:
      StoppedError: the options' `interrupted` said so.
    """
    scheduler = self.scheduler
    before = scheduler.clock()
    requests = self.begun or self._add(draws, options)
    if {request.group.draw for request in requests} != {draw for draw, _ in draws}:
      raise ValueError("draws: expected the batch that has begun")
    self.begun = self._add(ahead, dataclasses.replace(options, limits=None, beginnings=()))
    own, done = set(requests), 0
    while any(request in own for request in scheduler.pending()):
      if options.interrupted():
        raise StoppedError
      options.ended([request for request in scheduler.round() if request in own])
      left = sum(request in own for request in (*scheduler.waiting, *scheduler.running.values()))
      if done != (done := len(requests) - left):
        options.progress(done, len(requests))
    return self._rollouts(requests, scheduler.clock() - before)

  def tokens_ahead(self) -> int:
    """Tokens that were sampled of the batch that has begun."""
    return sum(request.tokens.size for request in self.begun)

  def _add(self, draws: Draws, options: SampleOptions) -> list[Request]:
    most = self.engine.device.shapes.max_response_length
    limits = [most] * (len(draws) * self.samples) if options.limits is None else options.limits
    of_each = [slice(p * self.samples, (p + 1) * self.samples) for p in range(len(draws))]
    requests: dict[int, list[Request]] = {}
    # What may take longest comes first, so that little is left when slots run free.
    for p in sorted(range(len(draws)), key=lambda p: -max(limits[of_each[p]])):
      draw, prompt = draws[p]
      begun = [beginning for beginning in options.beginnings[of_each[p]] if beginning]
      requests[p] = self.scheduler.add(
        prompt, draw, limits[of_each[p]], self.engine.sampling, options.stop, beginnings=begun
      )
    return [request for p in range(len(draws)) for request in requests[p]]

  def _rollouts(self, requests: Sequence[Request], clock: Clock) -> Rollouts:
    engine, shapes, total = self.engine, self.engine.device.shapes, len(requests)
    count, width = engine.max_references or 1, shapes.suffix_length if self.scheduler.splice else 0
    shape = engine.reference_shape(total, width)
    references = [
      reference or _NO_REFERENCE
      for request in requests
      for reference in (*request.references, *[None] * (count - len(request.references)))
    ]
    mask = pad_rows([reference.mask for reference in references], width, bool)
    logps = np.zeros(mask.shape, np.float32)
    logps[mask] = np.concatenate([_NO_REFERENCE.logps, *(reference.logps for reference in references)])
    starts = [max((one.start for one in request.references if one), default=0) for request in requests]
    return Rollouts(
      tokens=pad_rows([request.tokens for request in requests], shapes.max_response_length),
      lengths=np.array([request.tokens.size for request in requests], np.int32),
      logprobs=pad_rows([request.logprobs for request in requests], shapes.max_response_length, np.float32),
      finished=np.array([request.finished for request in requests], bool),
      texts=[request.text for request in requests],
      refused=np.array([not shapes.takes(request.group.prompt) for request in requests], bool),
      seconds=clock.seconds,
      scorable=np.any(mask.reshape(total, count * width), axis=1),
      overlong=np.array([request.overlong for request in requests], bool),
      reference_starts=np.array(starts, np.int32),
      reference_tokens=pad_rows([reference.tokens for reference in references], width).reshape(shape),
      reference_logps=logps.reshape(shape),
      reference_mask=mask.reshape(shape),
      slot_steps=clock.slot_steps,
    )
