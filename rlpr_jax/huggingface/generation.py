"""generation_config.json: of all that stands there, which tokens end a response."""

import pathlib
from collections.abc import Collection
from typing import Any

from rlpr_jax.errors import InputError
from rlpr_jax.huggingface.loading import read_json

GENERATION = "generation_config.json"


def load_generation(directory: pathlib.Path) -> dict[str, Any]:
  """Reads generation_config.json of a model's directory; {} where there is none.

  Raises:
    InputError: it is no JSON object.
  """
  file = directory / GENERATION
  if not file.exists():
    return {}
  fields = read_json(file)
  generation_eos(fields, str(file))
  return fields


def generation_eos(generation: dict[str, Any], where: str = GENERATION) -> tuple[int, ...]:
  """Finds the tokens that end a response: a chat model may end a turn with another token than its tokenizer's EOS.

  Raises:
    InputError: `eos_token_id` is neither a token's id, nor a list of some, nor null.

  >>> generation_eos({"eos_token_id": [151645, 151643]})
  (151645, 151643)
  """
  ids = generation.get("eos_token_id")
  listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if any(type(token) is not int or token < 0 for token in listed):
    raise InputError(f"{where}: eos_token_id is {ids!r}, expected ids of tokens")
  return tuple(listed)


def with_eos(generation: dict[str, Any], eos_ids: Collection[int]) -> dict[str, Any]:
  """Adds the tokens that end a response to a generation_config.json.

  >>> with_eos({"top_k": 20}, {2})
  {'top_k': 20, 'eos_token_id': 2}
  """
  ids = sorted(eos_ids)
  return generation | {"eos_token_id": ids[0] if len(ids) == 1 else ids}
