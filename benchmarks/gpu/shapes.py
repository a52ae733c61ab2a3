"""The models that are measured, and what their programs read and compute, by formula."""

from collections.abc import Iterable

import jax
import numpy as np

from rlpr_jax import models
from rlpr_jax.models import ModelConfig, Params, Rope
from rlpr_jax.types import PackedRows

QWEN2_5_1_5B = ModelConfig(
  vocab_size=151_936, embed_dim=1536, mlp_dim=8960, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
  rope=Rope(1e6), biases=("query", "key", "value"), tie_embeddings=True, max_length=32_768,
)  # fmt: skip
QWEN2_5_7B = ModelConfig(
  vocab_size=152_064, embed_dim=3584, mlp_dim=18_944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
  rope=Rope(1e6), biases=("query", "key", "value"), max_length=32_768,
)  # fmt: skip
TINY = ModelConfig(
  vocab_size=512, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
  biases=("query", "key", "value"), tie_embeddings=True,
)  # fmt: skip


def product_weights(config: ModelConfig) -> int:
  """Weights that every token is multiplied by: the linear layers' and the head's."""
  leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(config))
  return sum(leaf.size for path, leaf in leaves if path[-1].key == "weight") + config.vocab_size * config.embed_dim


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
  """Bytes of the parameters that a decode step reads: all but an embedding that is not the head, of which it reads a
  row for each token."""
  leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(config))
  skipped = () if config.tie_embeddings else ("embedding",)
  return itemsize * sum(leaf.size for path, leaf in leaves if path[0].key not in skipped)


def token_bytes(config: ModelConfig, itemsize: int) -> int:
  """Bytes of the keys and values of one token in all layers."""
  return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def decode_bytes(config: ModelConfig, rows: int, tokens: float, itemsize: int) -> float:
  """Bytes that a decode step reads: the weights once, and the cached keys and values of `tokens` tokens of each row."""
  return weight_bytes(config, itemsize) + rows * tokens * token_bytes(config, itemsize)


def forward_flops(config: ModelConfig, lengths: Iterable[int]) -> int:
  """Operations of a forward pass over sequences of these lengths: 2 for each weight of a product and token, and
  4 * layers * heads * head_dim for each pair of a token and one that it sees, itself included."""
  lengths = np.asarray(list(lengths), np.int64)
  pairs = int((lengths * (lengths + 1) // 2).sum())
  attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
  return 2 * product_weights(config) * int(lengths.sum()) + attention


def update_flops(config: ModelConfig, rows: PackedRows) -> int:
  """Model operations of an update: three forward passes (one forwards, two backwards), nothing computed again.

  As of `forward_flops`, of the tokens that stand in the rows; the head meets those before sampled ones alone.
  """
  seen = np.asarray(rows.positions, np.int64)[rows.positions >= 0] + 1  # by each token: all before it in its text
  head = config.vocab_size * config.embed_dim
  products = 2 * (product_weights(config) - head) * len(seen) + 2 * head * int(rows.mask.sum())
  return 3 * (products + 4 * config.num_layers * config.num_heads * config.head_dim * int(seen.sum()))


def random_params(config: ModelConfig, dtype: str, seed: int = 0) -> Params:
  """Random parameters in the dtype of products; norms in float32, as `models.cast` leaves them. Made in place: float32
  ones of a large model would not always fit beside them."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(models.abstract_params(config))
  keys = jax.random.split(jax.random.key(seed), len(leaves))

  def make(key, path, leaf):
    if path[-1].key == "scale":
      return np.ones(leaf.shape, np.float32)
    spread = 0.1 if path[-1].key == "bias" else config.embed_dim**-0.5
    return _normal(key, leaf.shape, dtype, spread)

  return jax.tree.unflatten(structure, [make(key, *leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, spread: float) -> jax.Array:
  return jax.jit(lambda key: (spread * jax.random.normal(key, shape)).astype(dtype))(key)
