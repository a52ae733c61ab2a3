"""The jitted half of a rollout: prefill, decode, and scoring from the cache. Arrays in, arrays out.

Shapes: P prompts, G samples a prompt, B = P * G rows (samples of a prompt stand together), S prompt slots,
T response tokens, E tokens of a spliced suffix.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rlpr_jax.models import Decoder, KVCache, Params


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """What the compiled sampling program depends on, beside its shapes."""

  max_response_length: int  # T, tokens, EOS included
  suffix_length: int  # E, room in the cache for a spliced reference answer, tokens
  temperature: float  # 0 is greedy; log-probabilities are then those of temperature 1
  eos_ids: tuple[int, ...]


class Samples(NamedTuple):
  """Sampled responses. Only lengths say what is a token and what is padding (padding may equal EOS)."""

  tokens: Int[Array, "B T"]  # EOS included where it was sampled
  lengths: Int[Array, "B"]
  logprobs: Float[Array, "B T"]  # of the sampled tokens, at the sampling temperature; 0 beyond the length
  finished: Bool[Array, "B"]  # True: ended by EOS; False: cut at T


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(
  model: nnx.GraphDef, params: Params, tokens: Int[Array, "P S"], lengths: Int[Array, "P"], capacity: int
) -> tuple[Float[Array, "P D"], KVCache]:
  """Reads each prompt once.

  Returns:
    hidden state of each prompt's last token, and a cache of `capacity` slots a row that holds the prompts.
  """
  decoder: Decoder = nnx.merge(model, params)
  hidden, cache = decoder.prefill(tokens, capacity)
  return hidden[jnp.arange(tokens.shape[0]), lengths - 1], cache


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def decode(
  model: nnx.GraphDef,
  params: Params,
  hidden: Float[Array, "P D"],
  cache: KVCache,
  prompt_lengths: Int[Array, "P"],
  keys: Key[Array, "B"],
  settings: SamplingSettings,
) -> tuple[Samples, KVCache]:
  """Samples B / P responses to each prefilled prompt; stops when every row has ended.

  Each token's key is its row's key folded with its place, so a row's tokens do not depend on its neighbours.

  Returns:
    the samples, and the cache with prompts and responses [L, B, K, S + T + E, H].
  """
  decoder: Decoder = nnx.merge(model, params)
  samples = keys.shape[0] // prompt_lengths.shape[0]
  hidden, prompt_lengths = jnp.repeat(hidden, samples, axis=0), jnp.repeat(prompt_lengths, samples)
  cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=1), cache)
  rows, limit = keys.shape[0], settings.max_response_length
  eos_ids = jnp.array(settings.eos_ids)

  def sample(hidden, place):
    logits = decoder.logits(hidden[:, None])[:, 0]
    logps = jax.nn.log_softmax(logits / (settings.temperature or 1.0))
    if settings.temperature:
      token_keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
      tokens = jax.vmap(jax.random.categorical)(token_keys, logps)
    else:
      tokens = jnp.argmax(logits, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]

  def step(carry):
    place, hidden, cache, out = carry
    tokens, logps = sample(hidden, place)
    alive = ~out.finished
    out = Samples(
      tokens=out.tokens.at[:, place].set(jnp.where(alive, tokens, 0)),
      lengths=out.lengths + alive,
      logprobs=out.logprobs.at[:, place].set(jnp.where(alive, logps, 0.0)),
      finished=out.finished | jnp.isin(tokens, eos_ids),
    )
    # An ended row goes on writing into the slot after its end, which nothing reads before it is overwritten.
    positions = prompt_lengths + jnp.where(alive, place, out.lengths)
    hidden, cache = decoder.extend(tokens[:, None], positions, cache)
    return place + 1, hidden[:, 0], cache, out

  out = Samples(
    tokens=jnp.zeros((rows, limit), jnp.int32),
    lengths=jnp.zeros(rows, jnp.int32),
    logprobs=jnp.zeros((rows, limit), jnp.float32),
    finished=jnp.zeros(rows, bool),
  )

  def unfinished(carry):
    place, _, _, out = carry
    return (place < limit) & ~jnp.all(out.finished)

  _, _, cache, out = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), hidden, cache, out))
  return out, cache


@functools.partial(jax.jit, static_argnames=("model", "temperature"), donate_argnames=("cache",))
def score_suffix(
  model: nnx.GraphDef,
  params: Params,
  cache: KVCache,
  last_kept: Int[Array, "B"],
  starts: Int[Array, "B"],
  suffix: Int[Array, "B E"],
  temperature: float,
) -> tuple[Float[Array, "B E"], KVCache]:
  """Log-probabilities of each row's suffix after the first `starts` tokens of its cached text.

  This is the teacher-forced pass of the reward without a second pass over the reasoning: the last kept token is fed
  again (its keys and values come out the same) so that the first suffix token has a prediction too.

  Args:
    last_kept: the token at position `starts - 1`.
    suffix: padded on the right; the padding's values are to be ignored.

  Returns:
    the log-probabilities, and the cache, overwritten from `starts - 1` on (handed back so that it is updated in place).
  """
  decoder: Decoder = nnx.merge(model, params)
  inputs = jnp.concatenate([last_kept[:, None], suffix[:, :-1]], axis=1)
  hidden, cache = decoder.extend(inputs, starts - 1, cache)
  return decoder.logprobs(hidden, suffix, temperature)[0], cache
