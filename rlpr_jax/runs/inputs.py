"""Digests of what stands behind a run's paths, in WORKDIR/inputs.json: a run that goes on sees what has changed.

A path says little: rows may be edited in place, a base model replaced, and what was computed for the old ones (r' of
each answer, adapters) would be used with the new ones.
"""

import hashlib
import json
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import huggingface, processes
from rlpr_jax.errors import InputError
from rlpr_jax.runs.storage import persist, reason, write_atomically
from rlpr_jax.types import Prompt

NAME = "inputs.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
_SAMPLES = 16  # of a file of weights
_SAMPLE_BYTES = 4096


class Inputs(NamedTuple):
  """Digests of what a run reads."""

  program: str  # train | sft
  parts: dict[str, str]  # by a name for people: "tokenizer", "weights", ...
  rows: list[str]  # of the data set's prompts, in their order
  earlier: tuple[tuple[int, list[str]], ...] = ()  # rows that were others up to a step, whose checkpoints know those

  def rows_at(self, step: int) -> list[str]:
    """The rows that the checkpoint of a step was made with.

    >>> Inputs("train", {}, ["b2"], earlier=((10, ["a1"]),)).rows_at(10)
    ['a1']
    """
    return next((rows for last, rows in self.earlier if step <= last), self.rows)


def row_digest(prompt: Prompt) -> str:
  """Tells a row by its question and reference answers.

  >>> import numpy as np
  >>> row_digest(Prompt(ids=np.zeros(0, int), question="6 * 7?", reference="42"))
  '20a331c7907ab232'
  """
  return _digest([prompt.question, *prompt.references])[:16]


def read_inputs(workdir: pathlib.Path) -> Inputs | None:
  """Reads what `write_inputs` wrote; None where nothing is, as in a directory of an older version.

  Raises:
    InputError: it is something else.
  """
  file = workdir / NAME
  try:
    fields = json.loads(file.read_text())
    earlier = tuple((int(step), list(rows)) for step, rows in fields["earlier"])
    return Inputs(fields["program"], dict(fields["parts"]), list(fields["rows"]), earlier)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(f"{file}: expected the inputs of this directory's run ({reason(error)})") from None


def write_inputs(workdir: pathlib.Path, inputs: Inputs, retry_seconds: float) -> None:
  """Writes the inputs into the run's directory; of many processes the first does."""
  if processes.is_first():
    path = workdir / NAME
    persist(lambda: write_atomically(path, json.dumps(inputs._asdict())), path, retry_seconds)


def check_program(workdir: pathlib.Path, program: str) -> None:
  """Makes sure that a directory holds no run of another program.

  Raises:
    InputError: it does.
  """
  saved = read_inputs(workdir)
  if saved and saved.program != program:
    raise InputError(f"--workdir: {workdir} holds a run of rlpr {saved.program}, expected one of rlpr {program}")


def changes(saved: Inputs, inputs: Inputs) -> list[str]:
  """Names what is not as it was.

  >>> old = Inputs("train", {"tokenizer": "a1", "weights": "b2"}, rows=["c3"])
  >>> changes(old, old._replace(parts={"tokenizer": "a1", "weights": "b9"}))
  ['weights']
  """
  names = [name for name in saved.parts | inputs.parts if saved.parts.get(name) != inputs.parts.get(name)]
  return names + ["data rows"] * (saved.rows != inputs.rows)


def check_inputs(workdir: pathlib.Path, saved: Inputs | None, inputs: Inputs, accept_changes: bool) -> bool:
  """Refuses to go on with other inputs than a run began with, unless told to.

  Returns:
    whether something has changed.

  Raises:
    InputError: naming what has changed.
  """
  changed = changes(saved, inputs) if saved else []
  if changed and not accept_changes:
    raise InputError(
      f"--workdir: {workdir} holds a run that began with other {', '.join(changed)}: expected the same, or"
      " --accept_changes to go on with these"
    )
  if changed:
    print(f"accepted: other {', '.join(changed)} than the run began with", flush=True)
  return bool(changed)


def model_digests(config: ConfigDict, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
  """Digests of a pretrained model's files as a run uses them; {} for the built-in policy."""
  if not config.model.path:
    return {}
  directory = huggingface.resolve(config.model.path)
  return {
    "tokenizer": digest_tokenizer(directory),
    "chat template": digest_text(str(tokenizer.chat_template)),
    "weights": digest_weights(directory),
  }


def digest_tokenizer(directory: pathlib.Path) -> str:
  """Digest of a tokenizer's files."""
  return _digest(_file(directory / name) for name in _TOKENIZER_FILES if (directory / name).exists())


def digest_weights(directory: pathlib.Path) -> str:
  """Digest of the files of weights: their headers, and a sample of their bytes spread over each."""
  parts: list[str | bytes] = []
  for path in sorted(directory.glob("*.safetensors")):
    size = path.stat().st_size
    with path.open("rb") as file:
      (header,) = struct.unpack("<Q", file.read(8))
      parts += [path.name, str(size), file.read(header)]
      begin = 8 + header
      for i in range(_SAMPLES):
        file.seek(begin + max(size - begin - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))  # the last ones too
        parts.append(file.read(_SAMPLE_BYTES))
  return _digest(parts)


def digest_text(text: str) -> str:
  """Digest of a text, such as a chat template.

  >>> digest_text("{{ messages }}")[:8]
  'afca0176'
  """
  return _digest([text])


def digest_rows(prompts: Sequence[Prompt]) -> list[str]:
  """Digest of each row, in order."""
  return [row_digest(prompt) for prompt in prompts]


def _file(path: pathlib.Path) -> bytes:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").digest()


def _digest(parts: Iterable[str | bytes]) -> str:
  total = hashlib.sha256()
  for part in parts:
    piece = part.encode() if isinstance(part, str) else part
    total.update(struct.pack("<Q", len(piece)) + piece)  # its length, so that pieces cannot run into each other
  return total.hexdigest()
