"""Supervised warm start: a policy that never saw the tags learns them from demonstrations, before RLPR begins."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Int
from optax.contrib import MuonDimensionNumbers, muon

from rlpr_jax.models import Decoder, Params, combine

# Layer weights that Muon orthogonalises: which axes of the stacked array come in and which go out.
_MUON = {
  "query": MuonDimensionNumbers(1, (2, 3)),
  "key": MuonDimensionNumbers(1, (2, 3)),
  "value": MuonDimensionNumbers(1, (2, 3)),
  "out": MuonDimensionNumbers((1, 2), 3),
  "gate": MuonDimensionNumbers(1, 2),
  "up": MuonDimensionNumbers(1, 2),
  "down": MuonDimensionNumbers(1, 2),
}


class Demonstrations(NamedTuple):
  """Prompts with one response each, padded on the right. numpy."""

  tokens: Int[np.ndarray, "N L"]  # prompt, then response with its EOS
  mask: Bool[np.ndarray, "N L"]  # True on the response

  def batches(self, size: int, seed: int) -> Iterator["Demonstrations"]:
    """Batches for ever, each epoch in another order."""
    rng = np.random.default_rng(seed)
    while True:
      order = rng.permutation(len(self.tokens))
      for first in range(0, len(order) - size + 1, size):
        rows = order[first : first + size]
        yield Demonstrations(self.tokens[rows], self.mask[rows])


def pad(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Demonstrations:
  """Pairs of prompt ids and response ids (EOS included) as rows as long as the longest."""
  length = max(len(prompt) + len(response) for prompt, response in pairs)
  out = Demonstrations(np.zeros((len(pairs), length), np.int32), np.zeros((len(pairs), length), bool))
  for row, (prompt, response) in enumerate(pairs):
    end = len(prompt) + len(response)
    out.tokens[row, :end] = [*prompt, *response]
    out.mask[row, len(prompt) : end] = True
  return out


OPTIMIZERS = ("muon", "adam")


def optimizer(kind: str, steps: int, learning_rate: float, adam_learning_rate: float) -> optax.GradientTransformation:
  """Learning rates follow a cosine to zero.

  Args:
    kind: `muon`: Muon on the layers' matrices and Adam on the rest, for a policy that starts from nothing; `adam`: Adam
      on everything, for a pretrained one.
    learning_rate: of Muon.
    adam_learning_rate: of Adam.
  """
  adam_schedule = optax.cosine_decay_schedule(adam_learning_rate, steps)
  if kind == "adam":
    return optax.adam(adam_schedule)

  def dimensions(params: Params) -> Params:
    def of(path, _) -> MuonDimensionNumbers | None:
      return _MUON.get(path[-2].key) if path[-1].key == "weight" else None

    return jax.tree_util.tree_map_with_path(of, params)

  return muon(
    optax.cosine_decay_schedule(learning_rate, steps),
    adam_learning_rate=adam_schedule,
    muon_weight_dimension_numbers=dimensions,
  )


@functools.partial(jax.jit, static_argnames=("model", "transform"), donate_argnames=("params", "opt_state"))
def step(
  model: nnx.GraphDef,
  transform: optax.GradientTransformation,
  frozen: Params,
  params: Params,
  opt_state: optax.OptState,
  batch: Demonstrations,
) -> tuple[Params, optax.OptState, jax.Array]:
  """One step of next-token prediction on the responses; returns the mean loss in nats a token beside the new state."""

  def loss(params):
    decoder: Decoder = nnx.merge(model, combine(frozen, params))
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    hidden = decoder(batch.tokens, positions, jnp.ones_like(batch.tokens))
    logps, _ = decoder.logprobs(hidden[:, :-1], batch.tokens[:, 1:])
    mask = batch.mask[:, 1:]
    return -jnp.sum(jnp.where(mask, logps, 0.0)) / jnp.sum(mask)

  value, gradients = jax.value_and_grad(loss)(params)
  changes, opt_state = transform.update(gradients, opt_state, params)
  return optax.apply_updates(params, changes), opt_state, value
