"""Files that stand at the top of the repository and inside the installed package: recipes, the compilers' flags."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parent


def path(name: str) -> pathlib.Path:
  """Where `configs` or `launch/flags.sh` lies.

  Args:
    name: as seen from the top of the repository.
  """
  installed = _PACKAGE / name
  return installed if installed.exists() else _PACKAGE.parent / name
