"""Rollouts: prompts in, sampled responses and the probability of each reference answer out.

The host's half: text, token ids and padding. What the device computes is in `decode.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.models import KVCache, Params
from rlpr_jax.sampling.decode import Samples, SamplingSettings, decode, prefill, score_suffix


class Rollouts(NamedTuple):
  """Responses of a batch of prompts, with what the reward needs. numpy; B = P * G, a prompt's samples together."""

  tokens: np.ndarray  # int32[B, T]
  lengths: np.ndarray  # int32[B]
  logprobs: np.ndarray  # float32[B, T] of the sampled tokens
  finished: np.ndarray  # bool[B] True: ended by EOS
  texts: list[str]  # [B] decoded, without the EOS
  scorable: np.ndarray  # bool[B] the reference answer could be spliced in
  overlong: np.ndarray  # bool[B] it could have been, but did not fit into the context
  reference_tokens: np.ndarray  # int32[B, E] the suffix that was scored
  reference_logps: np.ndarray  # float32[B, E] its log-probabilities
  reference_mask: np.ndarray  # bool[B, E] True on the reference answer's own tokens
  seconds: dict[str, float]  # wall time of "sample" and "score"


class Suffixes(NamedTuple):
  """What is to be scored after a prefix, one a row."""

  last_kept: np.ndarray  # int32[B] the token before the suffix
  starts: np.ndarray  # int32[B] the position at which the suffix begins
  tokens: np.ndarray  # int32[B, E]
  mask: np.ndarray  # bool[B, E]


@dataclasses.dataclass(frozen=True)
class Engine:
  """Samples and scores with fixed shapes, so that nothing compiles twice."""

  model: nnx.GraphDef
  tokenizer: PreTrainedTokenizerBase
  settings: SamplingSettings
  prompt_limit: int  # S, tokens
  template: str  # think | answer_only
  score_temperature: float
  baseline_prefix: str  # bare | tagged

  def sample(
    self, params: Params, draws: Sequence[tuple[int, Prompt]], key: jax.Array, samples: int
  ) -> tuple[Samples, KVCache]:
    """`samples` responses to each prompt; a draw's number and `key` decide its responses, not its neighbours."""
    tokens, lengths = pad_prompts([prompt for _, prompt in draws], self.prompt_limit)
    hidden, cache = prefill(self.model, params, tokens, lengths, capacity=self._capacity)
    keys = row_keys(key, np.array([draw for draw, _ in draws], np.uint32), samples)
    return decode(self.model, params, hidden, cache, lengths, keys, self.settings)

  def rollout(self, params: Params, draws: Sequence[tuple[int, Prompt]], key: jax.Array, samples: int) -> Rollouts:
    """Samples responses and scores the reference answer in the place of each response's own (rlpr section 3.2)."""
    start = time.perf_counter()
    out, cache = self.sample(params, draws, key, samples)
    out = jax.device_get(out)
    sampled = time.perf_counter()
    prompts = [prompt for _, prompt in draws for _ in range(samples)]
    suffixes, overlong = self._splice(prompts, out)
    logps, _ = score_suffix(
      self.model, params, cache, suffixes.last_kept, suffixes.starts, suffixes.tokens, self.score_temperature
    )
    logps = np.asarray(logps)
    return Rollouts(
      *out,
      texts=self.decode_texts(out),
      scorable=suffixes.mask.any(axis=1),
      overlong=overlong,
      reference_tokens=suffixes.tokens,
      reference_logps=logps,
      reference_mask=suffixes.mask,
      seconds={"sample": sampled - start, "score": time.perf_counter() - sampled},
    )

  def baseline(self, params: Params, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [P, E] and mask [P, E] of each reference straight after the prompt, with no reasoning."""
    tokens, lengths = pad_prompts(prompts, self.prompt_limit)
    _, cache = prefill(self.model, params, tokens, lengths, capacity=self._capacity)
    suffixes = self._empty_suffixes(len(prompts))
    for row, prompt in enumerate(prompts):
      ids, mask = splicing.baseline_suffix(self.tokenizer, prompt.reference, self.baseline_prefix)
      self._fill(suffixes, row, prompt.ids, ids, mask)
    logps, _ = score_suffix(
      self.model, params, cache, suffixes.last_kept, suffixes.starts, suffixes.tokens, self.score_temperature
    )
    return np.asarray(logps), suffixes.mask

  def decode_texts(self, out: Samples) -> list[str]:
    """Text of each response, up to its EOS."""
    ends = out.lengths - out.finished
    return [
      self.tokenizer.decode(row[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
      for row, end in zip(out.tokens, ends, strict=True)
    ]

  @property
  def _capacity(self) -> int:
    return self.prompt_limit + self.settings.max_response_length + self.settings.suffix_length

  def _splice(self, prompts: Sequence[Prompt], out: Samples) -> tuple[Suffixes, np.ndarray]:
    suffixes = self._empty_suffixes(len(prompts))
    overlong = np.zeros(len(prompts), bool)
    for row, (prompt, tokens, length) in enumerate(zip(prompts, out.tokens, out.lengths, strict=True)):
      response = tokens[:length].tolist()
      splice = splicing.splice(self.tokenizer, prompt.ids, response, prompt.reference, self.template)
      if splice is not None:
        kept = np.concatenate([prompt.ids, tokens[: splice.prefix_length]])
        overlong[row] = not self._fill(suffixes, row, kept, splice.suffix_ids, splice.answer_mask)
    return suffixes, overlong

  def _empty_suffixes(self, rows: int) -> Suffixes:
    shape = (rows, self.settings.suffix_length)
    # Position 1 of a row without a suffix: scored like the others, and ignored for its empty mask.
    return Suffixes(np.zeros(rows, np.int32), np.ones(rows, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))

  def _fill(self, suffixes: Suffixes, row: int, kept: np.ndarray, ids: list[int], mask: list[bool]) -> bool:
    """Writes a suffix into its row, up to the last token that counts; False if that does not fit."""
    needed = max(place for place, counts in enumerate(mask) if counts) + 1
    if needed > self.settings.suffix_length:
      return False
    suffixes.last_kept[row], suffixes.starts[row] = kept[-1], len(kept)
    suffixes.tokens[row, :needed], suffixes.mask[row, :needed] = ids[:needed], mask[:needed]
    return True


def pad_prompts(prompts: Sequence[Prompt], limit: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32[P, limit], padded on the right, and their lengths int32[P]."""
  tokens = np.zeros((len(prompts), limit), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt.ids)] = prompt.ids
  return tokens, np.array([len(prompt.ids) for prompt in prompts], np.int32)


@functools.partial(jax.jit, static_argnames=("samples",))
def row_keys(key: jax.Array, draws: jax.Array, samples: int) -> jax.Array:
  """One key a row [P * samples]: the run's key, folded with the draw's number, folded with the sample's."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  prompt_keys = fold(key, draws)
  return jax.vmap(lambda k: fold(k, jnp.arange(samples)))(prompt_keys).reshape(-1)
