"""What a response may ask of its tokens beyond how they are drawn: penalties, biases, what ends it, a form.

Servers ask for it. Training does not, and its programs hold none of these arrays.

Shapes: B rows, V tokens of the vocabulary, W = V / 32 words of a bit a token, K tokens told beside a drawn one.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from rlpr_jax.sampling.params import RowParams, at_temperature, sample_token
from rlpr_jax.types import AnyArray

MOST_TOP = 20  # most probable tokens that can be told, as OpenAI has it
_WORD = 32  # bits


@runtime_checkable
class Form(Protocol):
  """A form that a response is to have, followed token by token."""

  def allowed(self) -> UInt32[np.ndarray, "*W"]:
    """Which tokens may come next, a bit each, the lowest of a word first; never none."""
    ...

  def take(self, token: int) -> None:
    """Goes on after a token."""
    ...


@dataclasses.dataclass(frozen=True)
class Adjustments:
  """How a response's distributions differ from the model's, and what is told of them. The defaults change nothing."""

  presence_penalty: float = 0.0  # taken from the logits of tokens that the response has
  frequency_penalty: float = 0.0  # the same, times how often it has them
  repetition_penalty: float = 1.0  # divides positive logits of tokens of prompt and response, multiplies negative ones
  bias: tuple[tuple[int, float], ...] = ()  # added to logits, by token
  only: tuple[int, ...] = ()  # tokens that may be drawn; () for all
  stop_ids: tuple[int, ...] = ()  # tokens that end the response, beside EOS
  ignore_eos: bool = False
  min_tokens: int = 0  # of a response; before them nothing ends it
  top: int = 0  # how many of the most probable tokens are told of each place, MOST_TOP at most
  raw: bool = False  # log-probabilities that are told are the model's own, at temperature 1 and without adjustments
  form: Callable[[], Form] | None = None  # makes one for each response

  def ends(self, eos_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end the response.

    >>> sorted(Adjustments(stop_ids=(7,)).ends((2,)))
    [2, 7]
    """
    return frozenset(self.stop_ids) | frozenset(() if self.ignore_eos else eos_ids)


class RowAdjustments(NamedTuple):
  """An `Adjustments` of each row, and what of the row's text it depends on. numpy or jax."""

  presence: Float[AnyArray, "B"]
  frequency: Float[AnyArray, "B"]
  repetition: Float[AnyArray, "B"]
  min_tokens: Int[AnyArray, "B"]
  top: Int[AnyArray, "B"]
  raw: Bool[AnyArray, "B"]
  bias: Float[AnyArray, "B V"]  # -inf where a token may not be drawn
  in_prompt: Bool[AnyArray, "B V"]
  counts: Int[AnyArray, "B V"]  # of each token in the response
  ends: Bool[AnyArray, "B V"]  # tokens that end the response
  allowed: UInt32[AnyArray, "B W"]  # by the row's form

  def after(self, tokens: Int[Array, "B"], drawn: Bool[Array, "B"]) -> "RowAdjustments":
    """The same after a token of each row, where one was drawn."""
    counts = jnp.asarray(self.counts)
    return self._replace(counts=counts.at[jnp.arange(tokens.size), tokens].add(drawn.astype(counts.dtype)))


class TopTokens(NamedTuple):
  """The most probable tokens of each place, the most probable first. numpy or jax."""

  ids: Int[AnyArray, "*B K"]
  logprobs: Float[AnyArray, "*B K"]


class TokenScores(NamedTuple):
  """What the model makes of tokens that are there, each after those before it. numpy or jax."""

  logprobs: Float[AnyArray, "*B"]
  ranks: Int[AnyArray, "*B"]  # 1: the most probable
  top: TopTokens


class Drawn(NamedTuple):
  """A token of each row, and what is told of it."""

  tokens: Int[Array, "B"]
  logprobs: Float[Array, "B"]
  ended: Bool[Array, "B"]  # the token is one that ends its row
  top: TopTokens  # zeros where no row asks for them


def fill_rows(rows: list[tuple[Adjustments, np.ndarray]], eos_ids: Collection[int], vocabulary: int) -> RowAdjustments:
  """Lays out the adjustments of responses that begin, each with its prompt. numpy.

  >>> rows = fill_rows([(Adjustments(only=(1, 2), stop_ids=(3,)), np.array([0]))], eos_ids=(1,), vocabulary=4)
  >>> rows.bias.tolist(), rows.ends.tolist()
  ([[-inf, 0.0, 0.0, -inf]], [[False, True, False, True]])
  """
  count = len(rows)
  bias, in_prompt = np.zeros((count, vocabulary), np.float32), np.zeros((count, vocabulary), bool)
  ends = np.zeros((count, vocabulary), bool)
  for row, (asked, prompt) in enumerate(rows):
    if asked.only:
      bias[row] = -np.inf
      bias[row, list(asked.only)] = 0
    for token, value in asked.bias:
      bias[row, token] += value
    in_prompt[row, prompt] = True
    ends[row, list(asked.ends(eos_ids))] = True

  def column(name: str, dtype: type) -> np.ndarray:
    return np.array([getattr(asked, name) for asked, _ in rows], dtype)

  return RowAdjustments(
    presence=column("presence_penalty", np.float32),
    frequency=column("frequency_penalty", np.float32),
    repetition=column("repetition_penalty", np.float32),
    min_tokens=column("min_tokens", np.int32),
    top=column("top", np.int32),
    raw=column("raw", bool),
    bias=bias,
    in_prompt=in_prompt,
    counts=np.zeros((count, vocabulary), np.int32),
    ends=ends,
    allowed=everything(count, vocabulary),
  )


def everything(rows: int, vocabulary: int) -> UInt32[np.ndarray, "B W"]:
  """Bits of rows in which every token is allowed.

  >>> everything(1, 40).shape
  (1, 2)
  """
  return np.full((rows, -(-vocabulary // _WORD)), 2**_WORD - 1, np.uint32)


def adjust(logits: Float[Array, "B V"], rows: RowAdjustments, lengths: Int[Array, "B"]) -> Float[Array, "B V"]:
  """Biases logits, shuts out what may not come, then applies the penalties; `lengths`: of the responses so far.

  The penalties are those of vLLM: repetition (Keskar et al. 2019), then frequency and presence (OpenAI).

  >>> asked = Adjustments(repetition_penalty=2.0, frequency_penalty=0.5)
  >>> rows = fill_rows([(asked, np.array([0]))], eos_ids=(), vocabulary=3)
  >>> rows = rows._replace(counts=jnp.array([[0, 2, 0]]))
  >>> adjust(jnp.array([[4.0, -1.0, 1.0]]), rows, jnp.array([2])).tolist()
  [[2.0, -3.0, 1.0]]
  """
  rows, tokens = jax.tree.map(jnp.asarray, rows), jnp.arange(logits.shape[-1])
  is_allowed = (rows.allowed[:, tokens // _WORD] >> (tokens % _WORD).astype(jnp.uint32)) & 1
  is_early = (lengths < rows.min_tokens)[:, None]
  logits = jnp.where((is_allowed == 0) | (rows.ends & is_early), -jnp.inf, logits + rows.bias)
  repetition = rows.repetition[:, None]
  penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(rows.in_prompt | (rows.counts > 0), penalized, logits)
  logits -= rows.frequency[:, None] * rows.counts
  return logits - rows.presence[:, None] * (rows.counts > 0)


def draw_adjusted(
  logits: Float[Array, "B V"],
  keys: Key[Array, "B"],
  sampling: RowParams,
  rows: RowAdjustments,
  lengths: Int[Array, "B"],
) -> Drawn:
  """Draws a token a row from adjusted logits, as `sample_token` does from the model's own.

  Log-probabilities are of the whole distribution at the temperature, adjusted and not truncated, or where `raw` asks
  for it of the model's own.
  """
  adjusted = adjust(logits, rows, lengths)
  tokens, _ = sample_token(adjusted, keys, sampling)
  told = jnp.where(rows.raw[:, None], logits, at_temperature(adjusted, sampling)[0])
  logps = jax.nn.log_softmax(told, axis=-1)
  none = no_top(tokens.shape, logits.shape[-1])
  size = none.ids.shape[-1]
  # Sorting is dear: only where a row asks for it.
  top = jax.lax.cond(jnp.any(rows.top > 0), lambda logps: top_tokens(logps, size), lambda _: none, logps)
  chosen = tokens[:, None]
  return Drawn(
    tokens=tokens,
    logprobs=jnp.take_along_axis(logps, chosen, axis=-1)[:, 0],
    ended=jnp.take_along_axis(rows.ends, chosen, axis=-1)[:, 0],
    top=top,
  )


def no_top(shape: tuple[int, ...], vocabulary: int) -> TopTokens:
  """Room for the most probable tokens of places of this shape, as many as can be told; zeros.

  >>> no_top((4,), vocabulary=9).ids.shape
  (4, 9)
  """
  shape = *shape, min(MOST_TOP, vocabulary)
  return TopTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def top_tokens(logps: Float[Array, "*B V"], size: int) -> TopTokens:
  """The `size` most probable tokens of each place.

  >>> top_tokens(jnp.log(jnp.array([0.2, 0.5, 0.3])), 2).ids.tolist()
  [1, 2]
  """
  values, ids = jax.lax.top_k(logps, size)
  return TopTokens(ids, values)


def rank_tokens(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], size: int) -> TokenScores:
  """Log-probability and rank of each token, and the `size` most probable ones in its place.

  >>> scores = rank_tokens(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), jnp.array([2]), size=1)
  >>> scores.ranks.tolist(), scores.top.ids.tolist(), round(float(jnp.exp(scores.logprobs[0])), 3)
  ([2], [[1]], 0.3)
  """
  logps = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(logps, tokens[..., None], axis=-1)
  ranks = 1 + jnp.sum(logps > chosen, axis=-1)
  return TokenScores(chosen[..., 0], ranks, top_tokens(logps, min(size, logits.shape[-1])))
