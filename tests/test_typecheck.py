"""The checks of shapes and dtypes that stand over the core while the tests run: they are there, room by room."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from rlpr_jax import filtering, sharding
from rlpr_jax.models import attention, weights
from rlpr_jax.sampling import shapes
from rlpr_jax.training import packing


@pytest.mark.parametrize(
  "call",
  [
    lambda: filtering.init(None),
    lambda: sharding.count_processes(3),
    lambda: weights.key_path(7),
    lambda: attention.rotate(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros(2)),
    lambda: attention.rotate(jnp.zeros((1, 2, 3, 4)), jnp.zeros((2, 2), int), jnp.zeros(2)),
    lambda: shapes.bucket((1, 2), "1"),
    lambda: packing.arrange([], row_length=None),
  ],
  ids=["filtering", "sharding", "huggingface", "models, rank", "models, batch", "sampling", "training"],
)
def test_what_an_annotation_does_not_allow_is_refused(call):
  with pytest.raises(TypeCheckError):
    call()
