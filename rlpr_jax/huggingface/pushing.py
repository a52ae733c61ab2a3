"""Directories of models to the Hugging Face hub, whole or not at all: one commit each."""

import os
import pathlib
import re
import sys

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them at run time
  disable_progress_bars,
  logging,
  validate_repo_id,
)

from rlpr_jax.errors import InputError, MachineError, is_of_network

TOKEN = "HF_TOKEN"  # the environment variable; a token is neither an argument nor a field, which would be written down
_NAME = re.compile(r"(?P<owner>\w[\w.-]*)/\w[\w.-]*")


def check_push(where: str, name: str) -> str:
  """Checks all about a push that can be known without the hub, and returns the token.

  Args:
    where: the flag or field that has the name; begins the message.
    name: `org/name`.

  Raises:
    InputError: no such name, or no token.

  >>> check_push("--push", "my-model")
  Traceback (most recent call last):
  rlpr_jax.errors.InputError: --push: 'my-model', expected org/name, as a repository of the hub is called
  """
  found = _NAME.fullmatch(name)
  try:
    validate_repo_id(name)
  except HFValidationError:
    found = None
  if found is None:
    raise InputError(f"{where}: {name!r}, expected org/name, as a repository of the hub is called")
  token = os.environ.get(TOKEN, "").strip()
  if not token:
    raise InputError(f"{where}: {name}: no token, expected one that may write to {found['owner']} in {TOKEN}")
  return token


def check_account(where: str, name: str) -> None:
  """Asks the hub whose token it is, before anything is written.

  Raises:
    InputError: the hub does not take it.
    MachineError: the hub cannot be reached.
  """
  api = huggingface_hub.HfApi(token=check_push(where, name))
  try:
    api.whoami()
  except Exception as error:  # its errors and those of the HTTP library below it have no common class
    raise _trouble(where, name, error) from None


def push(where: str, name: str, directory: pathlib.Path, message: str, private: bool = True) -> str:
  """Sends the files of a directory to a repository, which is made where there is none.

  Args:
    where: as in `check_push`.
    private: of a new repository; one that is there stays as it is.
    message: of the commit.

  Returns:
    the address of the commit.

  Raises:
    InputError: the hub refuses.
    MachineError: it cannot be reached.
  """
  api = huggingface_hub.HfApi(token=check_push(where, name))
  logging.set_verbosity_error()  # each try of a request that fails would be a line
  if not sys.stderr.isatty():
    disable_progress_bars()
  try:
    api.create_repo(name, private=private, exist_ok=True)
    # Files of weights that a push of before has cut otherwise do not stay beside these.
    commit = api.upload_folder(
      repo_id=name, folder_path=directory, commit_message=message, delete_patterns="*.safetensors*"
    )
  except Exception as error:  # likewise
    raise _trouble(where, name, error) from None
  return str(commit.commit_url)


def _trouble(where: str, name: str, error: Exception) -> InputError | MachineError:
  kind = MachineError if is_of_network(error) else InputError
  words = re.sub(r"For more information check: \S+", "", str(error)).split()
  return kind(f"{where}: {name}: {' '.join(words)[:300]}")
