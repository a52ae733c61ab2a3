"""Hugging Face directories into policies, each device reading its own part. Never pickle, never remote code."""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from rlpr_jax import sharding
from rlpr_jax.errors import InputError, MachineError, is_of_network
from rlpr_jax.huggingface.families import from_huggingface
from rlpr_jax.huggingface.tensors import INDEX, SINGLE, Layout, canonical_name, layout, left_out
from rlpr_jax.models.config import ModelConfig
from rlpr_jax.models.transformer import abstract_params
from rlpr_jax.models.weights import fused_rows, key_path, tensor_name
from rlpr_jax.types import Params

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt")
_OTHER_FILES = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py")  # other formats of the weights, and code
_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_DTYPES = ("BF16", "F16", "F32")
_COMPARED = 2**26  # bytes of a tensor that are compared at once
_Index = tuple[slice, ...]


class _Tensor(NamedTuple):
  """A tensor of a file, not read yet."""

  file: pathlib.Path
  name: str  # in the file
  reader: safe_open
  rows: tuple[int, int] | None = None  # of it, where a parameter is a part of it

  @property
  def slices(self) -> Any:
    return self.reader.get_slice(self.name)


_Tensors = dict[str, _Tensor]  # by their canonical names


def resolve(path_or_repo: str | os.PathLike[str], files: Sequence[str] = _FILES) -> pathlib.Path:
  """The local directory of a model: a directory as it is, `org/name` or `org/name@revision` from the Hugging Face hub.

  Args:
    files: patterns of what is to come of a repository, into the cache of huggingface_hub; by default its JSON,
      safetensors and tokenizer files.

  Raises:
    InputError: neither a directory nor such a name, or one that is not there.
    MachineError: the hub cannot be reached.
  """
  path = pathlib.Path(path_or_repo)
  if str(path_or_repo) and path.is_dir():
    return path
  name = _HUB_ID.fullmatch(str(path_or_repo))
  if name is None:
    raise InputError(f"{path_or_repo}: no such directory, expected one or org/name of the Hugging Face hub")
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name["id"], revision=name["revision"], allow_patterns=list(files), ignore_patterns=list(_OTHER_FILES)
      )
    )
  except Exception as error:  # its errors and those of the HTTP library below it have no common class
    reason = " ".join(str(error).split())
    kind = MachineError if is_of_network(error) else InputError
    raise kind(f"{path_or_repo}: no such directory, and not on the Hugging Face hub either: {reason}") from None


def load_pretrained(
  path_or_repo: str | os.PathLike[str],
  mesh: Mesh | AbstractMesh | None = None,
  dtype: Any = jnp.float32,
  rules: Mapping[str, Sequence[str]] | None = None,
) -> tuple[ModelConfig, Params]:
  """Loads a model of one of `families.FAMILIES`. What the files hold beyond it is left out, which one line says.

  Every process reads the parts of its own devices and no others, a part that several of them keep once. A host holds
  one tensor of the files at a time beyond what its devices keep; a CPU device has a second one while it is converted.

  Args:
    path_or_repo: as in `resolve`: config.json and model.safetensors, or model.safetensors.index.json and its files.
    mesh: with the axes of `sharding.create_mesh`; without one, parameters are on the default device.
    dtype: of the parameters, whatever that of the files is.
    rules: as in `sharding.create`.

  Returns:
    The config, and parameters as in `abstract_params`.

  Raises:
    InputError: naming the file, field or tensor and what was expected; or the model does not divide by the mesh.
  """
  directory = resolve(path_or_repo)
  config = load_config(directory)
  abstract = abstract_params(config, sharding.create(mesh, rules))
  with contextlib.ExitStack() as opened:
    tensors = _by_name(directory, _open(directory, opened))
    _check(directory, config, abstract, tensors)

    def load(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
      keys = key_path(path)
      parts = [tensors[name]._replace(rows=fused_rows(config, keys)) for name in _names(config, keys)]
      if keys[0] != "layers":
        return _place(_reader(parts[0]), layout(keys, leaf.shape), leaf.sharding).astype(dtype)
      return _stack([_reader(part) for part in parts], layout(keys, leaf.shape[1:]), leaf.sharding, dtype)

    return config, jax.tree.map_with_path(load, abstract)


def load_config(directory: pathlib.Path) -> ModelConfig:
  """The config of the model in a directory.

  Raises:
    InputError: config.json is missing, or says what `families.from_huggingface` does not take.
  """
  file = directory / "config.json"
  return from_huggingface(read_json(file), str(file))


def _names(config: ModelConfig, keys: tuple[str, ...]) -> list[str]:
  """Tensors that hold the parameter: one, or one a layer."""
  name = tensor_name(config, keys)
  return [name.format(layer) for layer in range(config.num_layers)] if keys[0] == "layers" else [name]


def _stack(
  readers: list[Callable[[_Index], np.ndarray]], layout: Layout, where: NamedSharding | None, dtype: Any
) -> jax.Array:
  """Puts the layers into one array [L, ...], which is made on the devices: no copy of it is ever on the host."""
  layer = None if where is None else NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
  make = functools.partial(jnp.zeros, (len(readers), *layout.shape), dtype)
  stacked = jax.jit(make, out_shardings=where)()
  put = jax.jit(_put, static_argnames="layout", donate_argnums=0, out_shardings=where)
  for i, read in enumerate(readers):
    # Waiting keeps the layers after this one from being read before it has left the host.
    stacked = jax.block_until_ready(put(stacked, _place(read, layout, layer), i, layout=layout))
  return stacked


def _put(stacked: jax.Array, tensor: jax.Array, i: jax.Array, layout: Layout) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stacked, layout.read(tensor).astype(stacked.dtype), i, 0)


def _place(read: Callable[[_Index], np.ndarray], layout: Layout, where: NamedSharding | None) -> jax.Array:
  """A tensor of a file on the devices, in its own dtype and shape, split as the parameter `where` is to be."""
  if where is None:
    return jax.block_until_ready(jnp.asarray(read((slice(None),) * len(layout.groups))))
  # Of axes that are one in the file the first alone is ever split: a head's dimensions stay together.
  spec = PartitionSpec(*(where.spec[group[0]] for group in layout.groups))
  parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  def part(index: _Index | None) -> np.ndarray:
    assert index is not None  # it is for what lies on no device of this process
    key = tuple((piece.start, piece.stop) for piece in index)
    if key not in parts:
      parts[key] = read(index)
    return parts[key]

  placed = jax.make_array_from_callback(layout.file_shape, NamedSharding(where.mesh, spec), part)
  return jax.block_until_ready(placed)


def _reader(tensor: _Tensor) -> Callable[[_Index], np.ndarray]:
  return functools.partial(_read, tensor)


def _read(tensor: _Tensor, index: _Index) -> np.ndarray:
  """A slice of a tensor, or of the rows that are asked for; nothing else of it is read."""
  if tensor.rows is not None:
    first, last = tensor.rows
    start, stop, _ = index[0].indices(last - first)
    index = (slice(first + start, first + stop), *index[1:])
  return tensor.slices[index]


def _check(directory: pathlib.Path, config: ModelConfig, abstract: Params, tensors: _Tensors) -> None:
  """Compares the tensors of the files with what the config says, before any is read."""
  expected: dict[str, list[int]] = {}
  for path, leaf in jax.tree.leaves_with_path(abstract):
    keys = key_path(path)
    shape = leaf.shape[1:] if keys[0] == "layers" else leaf.shape
    for name in _names(config, keys):
      rows, *others = layout(keys, shape).file_shape
      expected[name] = [rows + (expected[name][0] if name in expected else 0), *others]  # the parts of a fused one
  for name, shape in expected.items():
    if name not in tensors:
      raise InputError(f"{directory}: tensor {name} is missing, expected shape {shape}")
    tensor, found = tensors[name], tensors[name].slices
    if found.get_dtype() not in _DTYPES:
      raise InputError(
        f"{tensor.file}: tensor {tensor.name} is {found.get_dtype()}, expected one of {', '.join(_DTYPES)}"
      )
    if found.get_shape() != shape:
      raise InputError(f"{tensor.file}: tensor {tensor.name} has shape {found.get_shape()}, expected {shape}")
  tied = tensors.get(tensor_name(config, ("head",))) if config.tie_embeddings else None
  for name, tensor in tensors.items():
    if name not in expected and tensor is not tied:
      raise InputError(
        f"{tensor.file}: tensor {tensor.name} is not one of the model in config.json, expected no such tensor"
      )
  embedding = tensors[tensor_name(config, ("embedding",))]
  if tied and not _equal(tied, embedding):
    # transformers would compute with this head, and others with the embedding.
    raise InputError(
      f"{tied.file}: tensor {tied.name} differs from {embedding.name}, expected the same numbers where config.json has "
      "tie_word_embeddings true"
    )


def _equal(one: _Tensor, other: _Tensor) -> bool:
  """Whether two tensors hold the same numbers, compared slice by slice."""
  shape, kinds = one.slices.get_shape(), {one.slices.get_dtype(), other.slices.get_dtype()}
  if shape != other.slices.get_shape() or not kinds <= set(_DTYPES):
    return False
  rows = max(1, _COMPARED // (4 * max(1, math.prod(shape[1:]))))
  for start in range(0, shape[0], rows):
    index = (slice(start, min(start + rows, shape[0])),)
    # As float32, which holds the numbers of all these dtypes.
    left, right = (_read(tensor, index).astype(np.float32) for tensor in (one, other))
    if not np.array_equal(left, right, equal_nan=True):
      return False
  return True


def _by_name(directory: pathlib.Path, tensors: list[_Tensor]) -> _Tensors:
  """The tensors that a model may have, by their canonical names; says what else there is."""
  found: _Tensors = {}
  others: collections.Counter[str] = collections.Counter()
  for tensor in tensors:
    name, other = canonical_name(tensor.name), left_out(tensor.name)
    if other is not None:
      others[other] += 1
    elif name in found:
      raise InputError(f"{tensor.file}: has tensors {found[name].name} and {tensor.name}, expected one of them")
    else:
      found[name] = tensor
  if others:
    said = ", ".join(f"{count} {other}" for other, count in others.items())
    print(f"{directory}: tensors left out, which the model does not compute with: {said}", flush=True)
  return found


def _open(directory: pathlib.Path, opened: contextlib.ExitStack) -> list[_Tensor]:
  """Opens the files of the weights. As in transformers, an index is read where there is no single file."""
  single, index = directory / SINGLE, directory / INDEX
  if single.exists():
    reader = opened.enter_context(_open_file(single))
    return [_Tensor(single, name, reader) for name in sorted(reader.keys())]
  if not index.exists():
    raise InputError(f"{directory}: no weights, expected {SINGLE} or {INDEX}")
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
    raise InputError(f"{index}: no weight_map, expected tensor names and their files")
  tensors = []
  for name in sorted(set(weight_map.values())):
    if name in ("", "..") or name != pathlib.PurePath(name).name:
      raise InputError(f"{index}: names {name!r}, expected the name of a file beside it")
    if not (directory / name).exists():
      raise InputError(f"{index}: names {name}, which is missing")
    reader = opened.enter_context(_open_file(directory / name))
    held = set(reader.keys())
    promised = {tensor for tensor, file in weight_map.items() if file == name}
    # What is left out may stand in one of the two alone: older files hold buffers that no index lists.
    absent, unlisted = (sorted(filter(_needed, names)) for names in (promised - held, held - weight_map.keys()))
    if absent:
      raise InputError(f"{directory / name}: tensor {absent[0]} is missing, which {INDEX} says is there")
    if unlisted:
      raise InputError(f"{directory / name}: tensor {unlisted[0]} is not in {INDEX}, expected it there")
    tensors += [
      _Tensor(directory / name, tensor, reader) for tensor in sorted(held - weight_map.keys() | promised & held)
    ]
  return tensors


def _needed(name: str) -> bool:
  return left_out(name) is None


@contextlib.contextmanager
def _open_file(file: pathlib.Path) -> Iterator[safe_open]:
  try:
    reader = safe_open(file, framework="numpy")
  except (SafetensorError, OSError) as error:
    raise InputError(f"{file}: not a complete safetensors file ({error})") from None
  with reader:
    yield reader


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """An object of a JSON file; a field that stands there twice is refused."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
      if name in fields:
        raise InputError(f"{file}: {name} stands there twice, expected it once")
      fields[name] = value
    return fields

  try:
    fields = json.loads(file.read_text(), object_pairs_hook=unique)
  except FileNotFoundError:
    raise InputError(f"{file}: missing, expected a Hugging Face model directory") from None
  except InputError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{file}: cannot be read as JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{file}: expected a JSON object")
  return fields
