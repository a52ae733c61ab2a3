"""A reference answer scored from the cache of the sampled text, against a second forward pass over the whole text.

    make smollm2
    PYTHONPATH=. .venv/bin/python -m benchmarks.scoring  # two minutes on two cores

Both give the log-probabilities of the same tokens, computed in float32 by the same decoder, with logits at those tokens
alone. Nothing is padded. The runs of the two alternate. Ends with status 1 if they differ by more than rounding.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.common import MODEL, REPEATS, run, spread
from benchmarks.suffixes import last_tokens
from rlpr_jax import huggingface, models
from rlpr_jax.models import Params
from rlpr_jax.planning import flops
from rlpr_jax.policy import load_tokenizer
from rlpr_jax.sampling import decode

TOLERANCE = 1e-4  # of log-probabilities in float32

_ROWS = flags.DEFINE_integer("rows", 8, "texts scored together")
_PROMPT = flags.DEFINE_integer("prompt", 128, "tokens of the prompt")
_REASONING = flags.DEFINE_integer("reasoning", 512, "tokens of the response before the reference answer")
_REFERENCE = flags.DEFINE_integer("reference", 16, "tokens of the reference answer")
_GROUP = flags.DEFINE_integer("group", 8, "samples of a prompt, for the cost of reading prompts")
_GROUP_PROMPT = flags.DEFINE_integer("group_prompt", 256, "tokens of that prompt")


class Ways(NamedTuple):
  """Both ways to score the same suffixes, as functions of the parameters and the arrays beside them."""

  cached: Callable[..., jax.Array]
  cached_args: tuple
  whole: Callable[..., jax.Array]
  whole_args: tuple


def real_text(tokenizer, rows: int, length: int) -> np.ndarray:
  """int32[rows, length], each row another part of the project's licence."""
  text = pathlib.Path(__file__).parents[1].joinpath("LICENSE").read_text()
  ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
  return np.stack([np.resize(np.roll(ids, -97 * row), length) for row in range(rows)])


def both_ways(model: nnx.GraphDef, params: Params, texts: np.ndarray, reference: int) -> Ways:
  """The last `reference` tokens of each text are scored after the rest of it."""
  rows, length = texts.shape
  kept = length - reference
  suffixes = last_tokens(texts, reference)
  targets = suffixes.targets
  # In a rollout the cache is there already, from sampling.
  _, cache = decode.prefill(model, params, texts[:, :kept], np.full(rows, kept, np.int32))

  def cached(params, cache, suffixes):
    return decode.score(model, params, cache, suffixes, temperature=1.0, kv_length=kept)

  @jax.jit
  def whole(params, tokens, targets):
    decoder = nnx.merge(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder(tokens, positions, jnp.ones_like(tokens))
    return decoder.logprobs(hidden[:, kept - 1 :], targets)[0]

  return Ways(cached, (params, cache, suffixes), whole, (params, texts[:, :-1], targets))


def timed(function: Callable[[], jax.Array]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def prefill_flops(model: nnx.GraphDef, params: Params, rows: int, length: int) -> int:
  tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, length), (rows,)))
  return flops.count(functools.partial(decode.prefill, model), params, tokens, lengths)


def main(argv: list[str]) -> None:
  del argv
  config, params = huggingface.load_pretrained(MODEL.value)
  model, tokenizer = models.definition(config), load_tokenizer(MODEL.value)
  texts = real_text(tokenizer, _ROWS.value, _PROMPT.value + _REASONING.value + _REFERENCE.value)
  ways = both_ways(model, params, texts, _REFERENCE.value)
  difference = float(np.max(np.abs(ways.cached(*ways.cached_args) - ways.whole(*ways.whole_args))))  # and compiles
  cached, whole = [], []
  for repeat in range(REPEATS.value):
    cached.append(timed(lambda: ways.cached(*ways.cached_args)))
    whole.append(timed(lambda: ways.whole(*ways.whole_args)))
    left = (REPEATS.value - repeat - 1) * (cached[-1] + whole[-1])
    print(f"{repeat + 1}/{REPEATS.value}  {cached[-1]:.3g} s, {whole[-1]:.3g} s  {left:.0f} s left", file=sys.stderr)
  cached_flops, whole_flops = flops.count(ways.cached, *ways.cached_args), flops.count(ways.whole, *ways.whole_args)
  times = [slow / fast for slow, fast in zip(whole, cached, strict=True)]
  once, each = (prefill_flops(model, params, rows, _GROUP_PROMPT.value) for rows in (1, _GROUP.value))
  print(f"""
{_ROWS.value} texts of {_PROMPT.value} + {_REASONING.value} tokens, {_REFERENCE.value} tokens scored after each; \
median of {REPEATS.value} (least to most)

| | from the cache | whole text again | ratio |
|---|---|---|---|
| time | {spread(cached, " s")} | {spread(whole, " s")} | {spread(times)} |
| operations, counted | {cached_flops:.4g} | {whole_flops:.4g} | {whole_flops / cached_flops:.1f} |

Largest difference of a log-probability: {difference:.1e} (at most {TOLERANCE:g} is rounding).

Prompt of {_GROUP_PROMPT.value} tokens for {_GROUP.value} samples, operations counted: read once {once:.4g}, \
read for each sample {each:.4g}, ratio {each / once:.1f}.""")
  if not difference < TOLERANCE:
    raise SystemExit(1)


if __name__ == "__main__":
  run(main)
