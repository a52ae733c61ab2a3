"""Small random models of every family, and their logits and gradients by torch and by us in several ways.

For the tests and for tools/model_agreement.py. torch is imported where it is used: the run over eight devices, which
takes the same cases, does without it.
"""

import copy
import functools
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlpr_jax import huggingface, models
from rlpr_jax.huggingface import families
from rlpr_jax.models import CacheView, ModelConfig, Params
from rlpr_jax.models.weights import WEIGHTS

VOCAB, LENGTH = 96, 40
_SIZES = {
  "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 8,
  "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
  "pad_token_id": None,  # torch gives the embedding of a padding token no gradient
}  # fmt: skip
_GEMMA = _SIZES | {
  "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 12, "query_pre_attn_scalar": 30,
}  # fmt: skip

# The fields of a config.json. Among the cases: as many key/value heads as query heads, one of them, and some between; a
# head that is embed_dim / heads and others; windows shorter than LENGTH; both spellings of rope.
CASES = {
  "llama": _SIZES | {"model_type": "llama", "head_dim": 10, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
  "llama_tied": _SIZES | {"model_type": "llama", "num_key_value_heads": 8, "tie_word_embeddings": True},
  "llama_biases": _SIZES
  | {
    "model_type": "llama",
    "num_key_value_heads": 1,
    "attention_bias": True,
    "mlp_bias": True,
  },
  "llama_long": _SIZES
  | {  # as Llama 3.1: here LENGTH is five times the original length
    "model_type": "llama",
    "head_dim": 12,
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8,
    },
  },
  "llama_linear": _SIZES
  | {
    "model_type": "llama",
    "rope_theta": 1000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
  },
  "llama_yarn": _SIZES
  | {  # every field of it; between the first pairs and the last it is neither
    "model_type": "llama",
    "head_dim": 12,
    "rope_parameters": {
      "rope_type": "yarn",
      "factor": 8.0,
      "original_max_position_embeddings": 64,
      "rope_theta": 100.0,
      "beta_fast": 4.0,
      "beta_slow": 0.7,
      "mscale": 2.0,
      "mscale_all_dim": 0.5,
      "truncate": False,
    },
  },
  "mistral": _SIZES | {"model_type": "mistral", "head_dim": 12, "sliding_window": 6, "rope_theta": 1e6},
  "mistral_unlimited": _SIZES
  | {
    "model_type": "mistral",
    "num_key_value_heads": 4,
    "sliding_window": None,
    "rope_parameters": {"rope_theta": 700.0},
  },
  "qwen2": _SIZES
  | {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 2,
    "rope_theta": 1e6,
  },
  "qwen2_tied": _SIZES | {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
  "qwen3": _SIZES | {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True, "rope_theta": 1e6},
  "qwen3_biases": _SIZES | {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 10, "attention_bias": True},
  "qwen3_yarn": _SIZES
  | {  # as DeepSeek-R1-0528-Qwen3-8B
    "model_type": "qwen3",
    "head_dim": 12,
    "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "attn_factor": 0.88},
  },
  "gemma2": _GEMMA
  | {
    "model_type": "gemma2",
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "sliding_window": 7,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.5,
  },
  "gemma3": _GEMMA
  | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "sliding_window": 9,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
  },
  "smollm3": _SIZES
  | {
    "model_type": "smollm3",
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "no_rope_layer_interval": 2,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
  },
  "smollm3_windows": _SIZES
  | {  # in a layer that is rotated, and in one that is not, whose keys need no bias
    "model_type": "smollm3",
    "num_hidden_layers": 4,
    "mlp_bias": True,
    "no_rope_layers": [1, 0, 0, 1],
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 6,
    "rope_parameters": {
      "rope_type": "yarn",
      "factor": 4.0,
      "original_max_position_embeddings": 100,
      "rope_theta": 100.0,
    },
  },
  "olmo2": _SIZES | {"model_type": "olmo2", "head_dim": 10, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
  "olmo2_biases": _SIZES
  | {
    "model_type": "olmo2",
    "num_key_value_heads": 8,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
  },
  "phi3": _SIZES | {"model_type": "phi3", "head_dim": 10, "rope_theta": 500.0},
  "phi3_partial": _SIZES
  | {
    "model_type": "phi3",
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
  },
}  # fmt: skip


def config(name: str) -> ModelConfig:
  return families.from_huggingface(CASES[name], name)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Parameters in which nothing is one or zero, neither norms nor biases. No torch."""
  rng = np.random.default_rng(seed)

  def make(path, leaf) -> np.ndarray:
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    keys = [key.key for key in path]
    if keys[-1] == "scale":
      return 1 - config.norm_offset + 0.3 * noise
    if keys[-1] == "bias":
      return 0.3 * noise
    if keys[-1] == "weight":
      ins = WEIGHTS[keys[-2]].inputs
      return noise / np.sqrt(np.prod(leaf.shape[1 : 1 + ins]), dtype=np.float32)
    return noise * np.float32(config.embed_dim**-0.5)

  return jax.tree_util.tree_map_with_path(make, models.abstract_params(config))


# --- torch ---


def import_torch():
  """torch, a development requirement that is large: a test that needs it is skipped where it is not installed."""
  import pytest  # not above: the benchmarks take these cases without it

  return pytest.importorskip("torch", reason="torch is not installed")


@functools.cache
def torch_model(name: str):
  """A model of transformers in float32 in which nothing is left at one or zero, neither norms nor biases."""
  import_torch()
  import transformers

  return randomise(transformers.AutoConfig.for_model(**CASES[name]))


def randomise(their_config):
  torch = import_torch()
  import transformers

  torch.set_num_threads(1)  # its threads spin while they wait, which is slow beside those of jax
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="eager").eval()
  for name, parameter in model.named_parameters():
    norm = 1.0 if "norm" in name and "gemma" not in their_config.model_type else 0.0
    scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
    parameter.data = norm + scale * torch.randn(parameter.shape)
  model.tie_weights()
  return model


def load(their_model) -> tuple[ModelConfig, Params]:
  """Saves a model as transformers does and reads it as we do."""
  with tempfile.TemporaryDirectory() as directory:
    their_model.save_pretrained(directory)
    return huggingface.load_pretrained(directory)


@functools.cache
def loaded(name: str) -> tuple[ModelConfig, Params]:
  return load(torch_model(name))


def torch_logits(their_model, tokens: np.ndarray) -> np.ndarray:
  torch = import_torch()
  with torch.no_grad():
    return their_model(torch.tensor(tokens)).logits.numpy()


def torch_gradients(their_model, tokens: np.ndarray) -> Params:
  """Of the mean log-likelihood of each next token, in our layout: read like a model whose weights they are."""
  torch = import_torch()
  their_model = copy.deepcopy(their_model)
  logits = their_model(torch.tensor(tokens)).logits[:, :-1]
  targets = torch.tensor(tokens[:, 1:]).long()
  (-torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))).backward()
  for parameter in their_model.parameters():
    parameter.data = parameter.grad
  return load(their_model)[1]


# --- ours ---


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, positions, segment_ids):
  decoder = nnx.merge(model, params)
  return decoder.logits(decoder(tokens, positions, segment_ids))


def whole_logits(
  model: nnx.GraphDef,
  params: Params,
  tokens: np.ndarray,
  positions: np.ndarray | None = None,
  segment_ids: np.ndarray | None = None,
) -> np.ndarray:
  """Logits [B, T, V] of whole rows, one sequence each unless it is said otherwise."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
  segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
  return np.asarray(_logits(model, params, tokens, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill(model, params, tokens, capacity):
  """Logits, and a cache of `capacity` slots a row that holds the rows."""
  decoder = nnx.merge(model, params)
  hidden, new = decoder.prefill(tokens)
  empty = decoder.empty_cache(tokens.shape[0], capacity)
  return decoder.logits(hidden), _write(empty, new, jnp.zeros(tokens.shape[0], jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens, starts, cache):
  """Logits of tokens that stand in each row from `starts` on, and the cache with them, as far as it reaches.

  What stood in the cache from `starts` on is not seen.
  """
  decoder = nnx.merge(model, params)
  positions = starts[:, None] + jnp.arange(tokens.shape[1])
  capacity = cache.values.shape[3]
  slots = jnp.broadcast_to(jnp.arange(capacity), (tokens.shape[0], capacity))
  hidden, new = decoder.extend(tokens, positions, (CacheView(cache, slots),))
  return decoder.logits(hidden), _write(cache, new, starts)


def _write(cache, new, starts):
  """The cache with new keys and values from slot `starts` of each row on."""
  rows = jnp.arange(new.rows)[:, None]
  slots = starts[:, None] + jnp.arange(new.values.shape[3])

  def write(axis, old, new):
    old, new = jnp.moveaxis(old, axis, 2), jnp.moveaxis(new, axis, 2)
    return jnp.moveaxis(old.at[:, rows, slots].set(new, mode="drop"), 2, axis)

  return cache.map(write, new)


def by_token(cache):
  """Keys and values as [L, B, S, K, H]."""
  return np.moveaxis(np.asarray(cache.keys), 4, 2), np.moveaxis(np.asarray(cache.values), 3, 2)


def chunked_logits(
  model: nnx.GraphDef, params: Params, tokens: np.ndarray, starts: np.ndarray, chunks: tuple[int, ...]
) -> np.ndarray:
  """Logits [B, T, V] through a cache: row r reads starts[r] tokens, then by turns the numbers of `chunks`."""
  rows, length = tokens.shape
  width = int(max(starts))
  padded = np.where(np.arange(width) < starts[:, None], tokens[:, :width], 3)
  logits, cache = prefill(model, params, padded, length)
  out = np.zeros((rows, length, logits.shape[-1]), np.float32)
  out[:, :width] = logits
  turn, places = 0, starts.astype(np.int32)
  while np.any(places < length):
    count = chunks[turn % len(chunks)]
    reach = places[:, None] + np.arange(count)
    logits, cache = extend(
      model, params, np.take_along_axis(tokens, np.minimum(reach, length - 1), axis=1), places, cache
    )
    for row, place in enumerate(places):
      out[row, place : place + count] = logits[row, : max(length - place, 0)]  # what is beyond the end is dropped
    turn, places = turn + 1, places + count
  return out


@functools.partial(jax.jit, static_argnums=0)
def gradients(model: nnx.GraphDef, params: Params, tokens: jax.Array) -> Params:
  """Of the mean log-likelihood of each next token."""

  def likelihood(params):
    decoder = nnx.merge(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder(tokens, positions, jnp.ones_like(tokens))
    return jnp.mean(decoder.logprobs(hidden[:, :-1], tokens[:, 1:])[0])

  return jax.grad(likelihood)(params)


def pack(sequences: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One row of tokens, positions and segment ids [1, length]."""
  tokens, positions, segment_ids = (np.zeros((1, length), np.int32) for _ in range(3))
  start = 0
  for segment, sequence in enumerate(sequences, start=1):
    end = start + len(sequence)
    tokens[0, start:end], positions[0, start:end] = sequence, np.arange(len(sequence))
    segment_ids[0, start:end] = segment
    start = end
  return tokens, positions, segment_ids


def differences(found: Params, expected: Params) -> dict[str, float]:
  """Largest difference of each parameter, of one layer where they are stacked, as a part of its largest entry."""

  def compare(path, ours, theirs):
    axes = tuple(range(1 if path[0].key == "layers" else 0, ours.ndim))
    error, size = np.max(np.abs(ours - theirs), axis=axes), np.max(np.abs(theirs), axis=axes)
    return "/".join(key.key for key in path), float(np.max(error / size))

  pairs = jax.tree_util.tree_map_with_path(compare, found, expected)
  return dict(jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple)))


def check_greedy(theirs, chat: list[int], found: list[int], expected: list[int], tokenizer) -> None:
  """A greedy response is that of a torch model, up to the first tie.

  Two best logits within 1e-4 of each other may change places by rounding: a warning then, and nothing else may differ.
  """
  if found == expected:
    return
  torch = import_torch()
  place = next(i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
  with torch.no_grad():
    logits = theirs(torch.tensor([chat + expected[:place]])).logits[0, -1]
  best, gap = logits.topk(2).indices.tolist(), -float(logits.topk(2).values.diff())
  assert {found[place], expected[place]} == set(best)
  assert gap < 1e-4, f"{tokenizer.decode(chat)!r}: {found} is not {expected} from place {place} on"
  warnings.warn(f"a tie within {gap:.1e} at place {place} of {tokenizer.decode(chat)!r}", stacklevel=1)


def variants_slow() -> list:
  """Names to parametrise a test with: the first of each family in the fast tests, its variants in the slow ones."""
  import pytest  # as above

  return [pytest.param(name, marks=[pytest.mark.slow] if "_" in name else []) for name in CASES]
