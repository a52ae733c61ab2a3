"""Rollouts: prompts in, sampled responses and the probability of each reference answer out.

Each file of this folder imports only those before it:

    params     a token of each row           device     the host's calls of these programs
    shapes     sizes of the programs         scheduler  which prompt goes into which slot, and when
    decode     the compiled programs         engine     text: prompts and references in, rollouts out
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing
from rlpr_jax.models import Params
from rlpr_jax.sampling.device import Device, Suffix
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Reference, Request, Scheduler
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

  def sample(
    self, params: Params, draws: Draws, key: jax.Array, samples: int, options: SampleOptions = SampleOptions()
  ) -> Rollouts:
    """Samples responses to each prompt; a draw's number and `key` decide its responses, not slots or neighbours."""
    return self._finish(self.scheduler(params, key), draws, samples, options)

  def rollout(
    self, params: Params, draws: Draws, key: jax.Array, samples: int, options: SampleOptions = SampleOptions()
  ) -> Rollouts:
    """Samples responses and scores the reference answer in the place of each response's own (RLPR, section 3.2)."""
    return self._finish(self.scheduler(params, key, scoring=True), draws, samples, options)

  def scheduler(self, params: Params, key: jax.Array, scoring: bool = False) -> Scheduler:
    """A scheduler of responses whose text is this tokenizer's; with `scoring`, of their references too."""
    return Scheduler(self.device, params, key, self.decode_text, self._splice if scoring else None)

  def _splice(self, prompt: Prompt, response: list[int]) -> splicing.Splice | None:
    return splicing.splice(self.tokenizer, prompt.ids, response, prompt.reference, self.template, self.eos_id)

  def _finish(self, scheduler: Scheduler, draws: Draws, samples: int, options: SampleOptions) -> Rollouts:
    """Runs until all of a batch has ended; request b is sample b % G of prompt b // G."""
    shapes, total = self.device.shapes, len(draws) * samples
    requests: list[Request] = []
    limits = [shapes.max_response_length] * total if options.limits is None else options.limits
    for draw, prompt in draws:
      of_prompt = limits[len(requests) : len(requests) + samples]
      requests += scheduler.add(prompt, draw, of_prompt, self.sampling, options.stop)
    done = total - len(scheduler.waiting)
    while scheduler.busy:
      if options.interrupted():
        raise StoppedError
      options.ended(scheduler.round())
      if done != (done := total - len(scheduler.waiting) - len(scheduler.running)):
        options.progress(done, total)
    references = [request.reference or _NO_REFERENCE for request in requests]
    width = shapes.suffix_length if scheduler.splice else 0
    mask = pad_rows([reference.mask for reference in references], width, bool)
    logps = np.zeros(mask.shape, np.float32)
    logps[mask] = np.concatenate([_NO_REFERENCE.logps, *(reference.logps for reference in references)])
    return Rollouts(
      tokens=pad_rows([request.tokens for request in requests], shapes.max_response_length),
      lengths=np.array([request.tokens.size for request in requests], np.int32),
      logprobs=pad_rows([request.logprobs for request in requests], shapes.max_response_length, np.float32),
      finished=np.array([request.finished for request in requests], bool),
      texts=[request.text for request in requests],
      refused=np.array([not shapes.takes(request.group.prompt) for request in requests], bool),
      seconds=scheduler.seconds,
      scorable=np.any(mask, axis=1),
      overlong=np.array([request.overlong for request in requests], bool),
      reference_starts=np.array([reference.start for reference in references], np.int32),
      reference_tokens=pad_rows([reference.tokens for reference in references], width),
      reference_logps=logps,
      reference_mask=mask,
    )

  def response_text(self, response: Sequence[int] | np.ndarray) -> str:
    """A response's text, without its EOS."""
    return self.decode_text(self.device.settings.without_eos(response))

  def decode_text(self, tokens: Sequence[int] | np.ndarray) -> str:
    return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

  def baseline(self, params: Params, prompts: Sequence[Prompt]) -> Float[np.ndarray, "N A"]:
    """Scores each reference straight after its prompt, with no reasoning.

    Column k is the answer's k-th token; NaN beyond the last, and where a prompt or reference is too long.
    """
    shapes = self.device.shapes
    logps = np.full((len(prompts), shapes.suffix_length), np.nan, np.float32)
    by_width = collections.defaultdict(list)
    for row, prompt in enumerate(prompts):
      if shapes.takes(prompt):
        by_width[bucket(shapes.prompt_buckets, len(prompt.ids))].append(row)
    size = shapes.prefill_rows
    for width, rows in sorted(by_width.items()):
      for first in range(0, len(rows), size):
        part = rows[first : first + size]
        cache = self.device.prefill(params, [prompts[row] for row in part], width).cache
        suffixes = {}  # by row of the result
        for place, row in enumerate(part):
          ids, mask = splicing.baseline_suffix(
            self.tokenizer, prompts[row].reference, self.baseline_prefix, self.eos_id
          )
          suffix = Suffix.after(place, prompts[row].ids, ids, mask)
          if len(suffix.ids) <= shapes.suffix_length:
            suffixes[row] = suffix
        scores = self.device.score(params, cache, list(suffixes.values()), size, width)
        for row, of_row in zip(suffixes, scores, strict=True):
          logps[row, : of_row.size] = of_row
    return logps
