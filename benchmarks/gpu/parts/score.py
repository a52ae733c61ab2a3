"""Reference answers scored from the cache that the text left behind, beside a second pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu import shapes
from benchmarks.gpu.measure import seconds
from benchmarks.gpu.report import Report
from benchmarks.suffixes import last_tokens
from rlpr_jax import models
from rlpr_jax.sampling import decode

BOUND = 0.25  # of the largest difference of a log-probability, in nats, between two ways to compute it in bfloat16


def run(report: Report) -> None:
  name, config, rows, texts, reference = "Qwen2.5-1.5B's shapes", shapes.QWEN2_5_1_5B, 16, (768, 3072), 16
  if report.rehearse:
    name, config, rows, texts, reference = "a tiny model", shapes.TINY, 4, (96,), 8
  report.note(f"{name} in bfloat16; a second pass has logits at the scored tokens alone, too")
  model = models.definition(config, models.Runtime("bfloat16"))
  params = shapes.random_params(config, "bfloat16")
  for text in texts:
    report.say(f"{rows} texts of {text} tokens")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (rows, text + reference)), np.int32)
    kept = np.full(rows, text, np.int32)
    _, cache = decode.prefill(model, params, tokens[:, :text], kept)
    suffixes = jax.tree.map(jnp.asarray, last_tokens(tokens, reference))
    targets = suffixes.targets

    @jax.jit
    def whole(params, tokens, targets, text=text):
      decoder = nnx.merge(model, params)
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
      hidden = decoder(tokens, positions, jnp.ones_like(tokens))
      return decoder.logprobs(hidden[:, text - 1 :], targets)[0]

    def from_cache(cache=cache, suffixes=suffixes, text=text):
      return decode.score(model, params, cache, suffixes, temperature=1.0, kv_length=text)

    def again(whole=whole, tokens=tokens[:, :-1], targets=targets):
      return whole(params, tokens, targets)

    difference = float(jnp.max(jnp.abs(from_cache() - again())))  # and compiles
    cached, second = seconds(from_cache), seconds(again)
    report.row(
      "score",
      {
        "texts": f"{rows} of {text}, {reference} scored",
        "from the cache, ms": 1e3 * cached,
        "whole text again, ms": 1e3 * second,
        "times as fast": second / cached,
        "largest difference, nats": difference,
        "bound": BOUND,
      },
      ok=difference <= BOUND,
    )
