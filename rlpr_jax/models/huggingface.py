"""Policies in and out of Hugging Face directories: config.json and safetensors, never pickle."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rlpr_jax.errors import InputError
from rlpr_jax.models.config import ModelConfig
from rlpr_jax.models.families import from_huggingface
from rlpr_jax.models.transformer import Params, abstract_params

# Ours -> theirs; `{}` is the layer. Their linear weights are [out, in], ours [in, out] with the heads split.
_TOP = {
  ("embedding",): "model.embed_tokens.weight",
  ("final_norm", "scale"): "model.norm.weight",
  ("head",): "lm_head.weight",
}
_NORMS = {
  "attention_norm": "input_layernorm",
  "query_norm": "self_attn.q_norm",
  "key_norm": "self_attn.k_norm",
  "mlp_norm": "post_attention_layernorm",
}
_GEMMA_NORMS = _NORMS | {
  "post_attention_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "post_mlp_norm": "post_feedforward_layernorm",
}
_LINEAR = {
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "out": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}


def tensor_name(config: ModelConfig, path: tuple[str, ...]) -> str:
  """Name of the parameter at `path` in safetensors; `{}` stands for the layer."""
  if path in _TOP:
    return _TOP[path]
  module, kind = path[1:]
  norms = _GEMMA_NORMS if config.post_norms else _NORMS
  return f"model.layers.{{}}.{norms[module] if kind == 'scale' else _LINEAR[module]}.{'bias' if kind == 'bias' else 'weight'}"


def load_pretrained(path: str, dtype: Any = jnp.float32) -> tuple[ModelConfig, Params]:
  """Loads a Llama or Qwen2 directory.

  Args:
    path: directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.
    dtype: of the parameters.

  Raises:
    InputError: naming the file, or the tensor and the shape that was expected.
  """
  directory = pathlib.Path(path)
  config = from_huggingface(_read_json(directory / "config.json"), str(directory / "config.json"))
  files = _tensor_files(directory)

  def read(name: str, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    theirs = _their_shape(shape, transposed, name)
    if name not in files:
      raise InputError(f"{directory}: tensor {name} is missing, expected shape {list(theirs)}")
    tensor = _read_tensor(files[name], name)
    if tensor.shape != theirs:
      raise InputError(f"{files[name]}: tensor {name} has shape {list(tensor.shape)}, expected {list(theirs)}")
    return (tensor.T if transposed else tensor).reshape(shape)

  params: Params = {}
  for ours, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
    keys = tuple(key.key for key in ours)
    transposed = keys[-1] == "weight"
    if keys[0] == "layers":
      theirs = tensor_name(config, keys)
      value = np.empty(leaf.shape, dtype)
      for i in range(config.num_layers):
        value[i] = read(theirs.format(i), leaf.shape[1:], transposed)
    else:
      value = read(_TOP[keys], leaf.shape, transposed).astype(dtype)
    _set(params, keys, jnp.asarray(value))
  return config, params


def _their_shape(shape: tuple[int, ...], transposed: bool, name: str) -> tuple[int, ...]:
  """[D, N, H] -> [N * H, D]; [N, H, D] -> [D, N * H]; [D, F] -> [F, D]; biases are flat."""
  if name.endswith("bias"):
    return (int(np.prod(shape)),)
  if not transposed:
    return shape
  if len(shape) == 2:
    return shape[::-1]
  first, second, third = shape
  return (third, first * second) if "o_proj" in name else (second * third, first)


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Which file holds each tensor."""
  index = directory / "model.safetensors.index.json"
  if index.exists():
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
      raise InputError(f"{index}: no weight_map, expected tensor names and their files")
    for file in set(weight_map.values()):
      if not (directory / file).exists():
        raise InputError(f"{index}: names {file}, which is missing")
    return {name: directory / file for name, file in weight_map.items()}
  single = directory / "model.safetensors"
  if not single.exists():
    raise InputError(f"{directory}: no weights, expected model.safetensors or model.safetensors.index.json")
  return dict.fromkeys(_tensor_names(single), single)


def _tensor_names(file: pathlib.Path) -> Iterator[str]:
  try:
    with safe_open(file, framework="flax") as tensors:
      yield from tensors.keys()
  except SafetensorError as error:
    raise InputError(f"{file}: not a complete safetensors file ({error})") from None


def _read_tensor(file: pathlib.Path, name: str) -> np.ndarray:
  try:
    with safe_open(file, framework="flax") as tensors:  # numpy alone cannot hold bfloat16
      return np.asarray(tensors.get_tensor(name))
  except SafetensorError as error:
    raise InputError(f"{file}: cannot read tensor {name} ({error})") from None


def _read_json(file: pathlib.Path) -> dict:
  try:
    fields = json.loads(file.read_text())
  except FileNotFoundError:
    raise InputError(f"{file}: missing, expected a Hugging Face model directory") from None
  except (OSError, ValueError) as error:
    raise InputError(f"{file}: cannot be read as JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{file}: expected a JSON object")
  return fields


def _set(tree: Params, keys: tuple[str, ...], value: jax.Array) -> None:
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
  tree[keys[-1]] = value
