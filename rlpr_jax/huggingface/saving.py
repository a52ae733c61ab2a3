"""Policies into directories that transformers, vLLM and PEFT load. A directory appears whole or not at all."""

import contextlib
import functools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from rlpr_jax.errors import InputError
from rlpr_jax.huggingface.families import to_huggingface
from rlpr_jax.huggingface.generation import GENERATION
from rlpr_jax.huggingface.tensors import INDEX, Layout, layout
from rlpr_jax.models.config import ModelConfig
from rlpr_jax.models.weights import WEIGHTS, fused_rows, key_path, tensor_name
from rlpr_jax.types import Params

_METADATA = {"format": "pt"}  # transformers asks for it


def save_pretrained(
  directory: str | os.PathLike[str],
  model_config: ModelConfig,
  params: Params,
  tokenizer: PreTrainedTokenizerBase | None = None,
  dtype: Any = None,
  max_shard_bytes: int = 5 * 10**9,
  generation: dict[str, Any] | None = None,
  others: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
  """Writes config.json, safetensors and the tokenizer's files. Adapters are merged into the weights, in float32.

  The host holds no more than one file of weights beyond the parameters. Every parameter must be on devices of this
  process; they may be split over a mesh.

  Args:
    directory: new or empty.
    params: as in `abstract_params`.
    tokenizer: its special tokens go into config.json too.
    dtype: of the tensors; None for that of each parameter.
    max_shard_bytes: of one file, unless a single tensor is larger.
    generation: what is to stand in generation_config.json, such as the tokens that end a response; None for no file.
    others: further files by name, such as a README.md.

  Raises:
    InputError: the directory is not empty or cannot be written, or no family has the settings of the config.
  """
  dtype = None if dtype is None else jnp.dtype(dtype)
  config = to_huggingface(model_config) | {"torch_dtype": str(dtype or params["embedding"].dtype)}
  if tokenizer is not None:
    config |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
  tensors = _tensors(model_config, params, dtype)
  shards = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda tensor: tensor.nbytes,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_bytes,
  )
  with _new_directory(directory) as files:
    _write_json(files / "config.json", config)
    if generation is not None:
      _write_json(files / GENERATION, generation)
    for name, content in others.items():
      (files / name).write_bytes(content)
    if tokenizer is not None:
      tokenizer.save_pretrained(files)
    for file, names in shards.filename_to_tensors.items():
      save_file({name: tensors[name].fetch() for name in names}, files / file, _METADATA)
    if shards.is_sharded:
      _write_json(files / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def save_adapter(
  directory: str | os.PathLike[str],
  model_config: ModelConfig,
  params: Params,
  base: str,
  tokenizer: PreTrainedTokenizerBase | None = None,
  others: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
  """Writes the adapters alone, in the format of PEFT.

  Args:
    directory: new or empty.
    params: as in `abstract_params`.
    base: directory or hub id of the model that the adapters were trained on.
    tokenizer: its files are written too.
    others: as in `save_pretrained`.

  Raises:
    InputError: the directory is not empty or cannot be written, or the config has no adapters, or some of layers that
      are one tensor in files.
  """
  lora = model_config.lora
  if lora is None:
    raise InputError(f"{directory}: the model has no adapters to be written, expected one with LoRA")
  fused = [name for name in lora.targets if model_config.fused_files and WEIGHTS[name].fused]
  if fused:
    raise InputError(
      f"{directory}: the adapters of {', '.join(fused)} belong to one tensor of the model, which PEFT cannot say, "
      "expected the merged policy"
    )
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": [WEIGHTS[name].huggingface.split(".")[-1] for name in lora.targets],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  tensors = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    keys = key_path(path)
    if keys[-1] in ("lora_a", "lora_b"):
      name = f"base_model.model.{tensor_name(model_config, keys)}"
      for i in range(model_config.num_layers):
        tensors[name.format(i)] = _fetch_layer(leaf, i, layout(keys, leaf.shape[1:]), leaf.dtype, None)
  with _new_directory(directory) as files:
    _write_json(files / "adapter_config.json", config)
    for name, content in others.items():
      (files / name).write_bytes(content)
    if tokenizer is not None:
      tokenizer.save_pretrained(files)
    save_file(tensors, files / "adapter_model.safetensors", _METADATA)


class _Tensor(NamedTuple):
  """A tensor of a file, still on the devices."""

  nbytes: int
  fetch: Callable[[], np.ndarray]


def _tensors(config: ModelConfig, params: Params, dtype: jnp.dtype | None) -> dict[str, _Tensor]:
  """The tensors of the files by name, layer after layer."""
  tensors, stacked = {}, {}
  parts: dict[str, dict[int, _Tensor]] = {}  # of fused tensors, by their first rows
  for path, leaf in jax.tree.leaves_with_path(params):
    keys = key_path(path)
    if keys[0] == "layers":
      stacked[keys] = leaf
    else:
      kind = dtype or leaf.dtype
      fetch = functools.partial(_fetch, leaf, kind)
      tensors[tensor_name(config, keys)] = _Tensor(leaf.size * kind.itemsize, fetch)
  weights = {keys: leaf for keys, leaf in stacked.items() if keys[-1] not in ("lora_a", "lora_b")}
  for i in range(config.num_layers):
    for keys, leaf in weights.items():
      adapter = None
      if config.lora and keys[-1] == "weight" and keys[-2] in config.lora.targets:
        adapter = (*(stacked[*keys[:-1], part] for part in ("lora_a", "lora_b")), config.lora.alpha / config.lora.rank)
      kind = dtype or leaf.dtype
      place = layout(keys, leaf.shape[1:])
      fetch = functools.partial(_fetch_layer, leaf, i, place, kind, adapter)
      name, part = tensor_name(config, keys).format(i), _Tensor(math.prod(place.shape) * kind.itemsize, fetch)
      rows = fused_rows(config, keys)
      if rows is None:
        tensors[name] = part
      else:
        parts.setdefault(name, {})[rows[0]] = part
        tensors[name] = _fused([piece for _, piece in sorted(parts[name].items())])
  return tensors


def _fused(parts: list[_Tensor]) -> _Tensor:
  """One tensor of several, one below the other."""
  return _Tensor(sum(part.nbytes for part in parts), lambda: np.concatenate([part.fetch() for part in parts]))


@functools.partial(jax.jit, static_argnames=("place", "dtype"))
def _layer(
  stacked: jax.Array,
  i: ArrayLike,
  place: Layout,
  dtype: jnp.dtype,
  adapter: tuple[jax.Array, jax.Array, ArrayLike] | None,
) -> jax.Array:
  """Layer i of a parameter [L, ...] as a file has it, with its adapter (a, b, scale) merged in."""
  weight = stacked[i]
  if adapter is not None:
    a, b, scale = adapter
    a, b = a[i].astype(jnp.float32), b[i].astype(jnp.float32)
    # Accelerators would multiply in less than float32 by default.
    change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    weight = weight.astype(jnp.float32) + scale * change
  return place.write(weight.astype(dtype))


def _fetch(parameter: jax.Array, dtype: jnp.dtype) -> np.ndarray:
  return np.ascontiguousarray(parameter.astype(dtype))  # safetensors writes the memory as it lies


def _fetch_layer(*args: Any) -> np.ndarray:
  return np.ascontiguousarray(_layer(*args))


@contextlib.contextmanager
def _new_directory(directory: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A directory to write into, which becomes `directory` at the end; after an error nothing is left of it."""
  target = pathlib.Path(directory).resolve()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise InputError(f"{directory}: is there and not an empty directory, expected a new one")
  near = next(parent for parent in target.parents if parent.exists())  # on the same disk, so that it can be renamed
  try:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=near) as temporary:
      files = pathlib.Path(temporary) / target.name  # with the usual permissions, unlike the temporary directory
      files.mkdir()
      yield files
      target.parent.mkdir(parents=True, exist_ok=True)
      files.rename(target)
  except (OSError, SafetensorError) as error:
    raise InputError(f"{directory}: cannot be written ({' '.join(str(error).split())})") from error


def _write_json(file: pathlib.Path, fields: dict[str, Any]) -> None:
  file.write_text(json.dumps(fields, indent=2) + "\n")
