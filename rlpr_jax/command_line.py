"""Command lines: flags of one program, a recipe by name or by path, and fields of its config.

    --config=RECIPE[:ARGUMENT] --config.field=value ... --flag=value ...

Each program defines flags of its own, so that several can be imported in one process. Whatever is wrong is said in one
line, with exit status 2 (`errors.exit_with_one_line`).
"""

import difflib
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from rlpr_jax import resources
from rlpr_jax.config import flatten
from rlpr_jax.errors import InputError, user_code
from rlpr_jax.fields import Field, check_value

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(=.*)?", re.DOTALL)


def parse(given: flags.FlagValues, argv: Sequence[str] | None, doc: str) -> flags.FlagValues:
  """Reads a command line into a program's flags; prints help and exits where that is asked for.

  Args:
    given: the flags, as defined.
    argv: the program's name and its arguments; those of this process if None.
    doc: what the program says of itself: the docstring of its module.

  Raises:
    InputError: an unknown flag, a value that one cannot have, or anything that is no flag.
  """
  program, *words = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)  # orbax and jax narrate at INFO
  if any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in words):
    print(help_text(given, doc))
    sys.exit(0)
  given.set_gnu_getopt(True)
  try:
    rest = given([program, *words])[1:]
  except (flags.Error, ValueError) as error:
    raise InputError(_one_line(error)) from None
  if rest:
    raise InputError(f"{rest[0]}: unexpected argument, expected flags (--help lists them)")
  for name in given:
    value = given[name].value
    if value is not None:
      value = tuple(value) if isinstance(value, list) else value
      check_value(f"--{name}", Field(value, given[name].help), value)
  return given


def help_text(given: flags.FlagValues, doc: str) -> str:
  """A program's description of itself, and its flags by name."""
  lines = [doc.strip(), "", "Flags:"]
  for name in sorted(given):
    flag = given[name]
    default = "" if flag.default in (None, "", [], False) else f" (default: {flag.default_as_str.strip(chr(39))})"
    lines.append(flags.text_wrap(f"--{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}", 100, "    ", "  "))
  return "\n".join(lines)


def define_config(given: flags.FlagValues, default: str | None) -> None:
  """Defines --config, for `parse_config`; `default`: the recipe that is taken where none is named."""
  names = ", ".join(recipe_names())
  flags.DEFINE_string(
    "config",
    default,
    f"Recipe: {names}, or a Python file; RECIPE:ARGUMENT where one takes an argument."
    " --config.FIELD=VALUE sets a field of it.",
    flag_values=given,
  )


def parse_config(given: flags.FlagValues, argv: Sequence[str] | None, doc: str) -> tuple[flags.FlagValues, ConfigDict]:
  """Reads a command line that names a recipe and sets fields of its config.

  Args, Raises: as for `parse`; `define_config` has defined --config among the flags. Besides, a recipe that is not
  there or cannot be read, and a field that it does not have.

  Returns:
    the flags, and the recipe's config with the fields set, locked.
  """
  program, *words = sys.argv if argv is None else argv
  own, overrides = split_overrides(words)
  parse(given, [program, *own], doc)
  if given.config is None:
    raise InputError(f"--config: missing, expected a Python file or one of {', '.join(recipe_names())}")
  return given, override(load_recipe(given.config), overrides)


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
  """Splits arguments into a program's own and those that set fields of a config, values that stand apart included.

  >>> split_overrides(["--config=x.py", "--config.steps", "3", "--workdir=w", "--config.model.path=m"])
  (['--config=x.py', '--workdir=w'], ['--config.steps', '3', '--config.model.path=m'])
  """
  own: list[str] = []
  overrides: list[str] = []
  value_may_follow = False
  for word in words:
    if found := _OVERRIDE.fullmatch(word):
      overrides.append(word)
      value_may_follow = found[2] is None
      continue
    (overrides if value_may_follow and not word.startswith("--") else own).append(word)
    value_may_follow = False
  return own, overrides


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """Sets fields of a config as --config.FIELD=VALUE says, each to a value of the field's own type; the last one counts.

  Raises:
    InputError: a field that the config does not have, or a value of another type.
  """
  by_field: dict[str, list[str]] = {}
  for word in overrides:
    if found := _OVERRIDE.fullmatch(word):
      field = found[1]
      _check_field(config, field)
      by_field.pop(field, None)
    by_field.setdefault(field, []).append(word)
  overrides = [word for words in by_field.values() for word in words]
  fields = flags.FlagValues()
  fields.set_gnu_getopt(True)
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=fields, sys_argv=["", *overrides])
    rest = fields(["", *overrides])[1:]
  except (flags.Error, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(_one_line(error)) from None
  if rest:
    raise InputError(f"{rest[0]}: unexpected argument, expected --config.FIELD=VALUE")
  return fields["config"].value


def _check_field(config: ConfigDict, field: str) -> None:
  """A field by its path: of a group that is not there, or has no such field, the nearest names are said."""
  group, where = config, "config"
  for name in field.split("."):
    if not isinstance(group, ConfigDict) or name not in group:
      names = list(group.keys()) if isinstance(group, ConfigDict) else []
      near = [f"{where}.{other}" for other in difflib.get_close_matches(name, names, cutoff=0.75)]
      paths = [f"config.{path}" for path in flatten(config)]
      same = [path for path in paths if path.rpartition(".")[2] == name]
      alike = [path for path in paths if difflib.SequenceMatcher(None, path.rpartition(".")[2], name).ratio() > 0.8]
      near = near or same or alike
      hint = f", did you mean {' or '.join(near)}?" if near else ""
      raise InputError(f"--config.{field}: there is no field {where}.{name}{hint}")
    group, where = group[name], f"{where}.{name}"
  if isinstance(group, ConfigDict):
    raise InputError(f"--config.{field}: a group, expected one of its fields: {', '.join(group.keys())}")


def recipe_names() -> list[str]:
  """Names of the recipes that come with the package."""
  return sorted(file.stem for file in resources.path("configs").glob("*.py"))


def find_recipe(text: str) -> tuple[pathlib.Path, list[str]]:
  """A recipe by what --config says: a name of `recipe_names` or the path of a Python file, and `:ARGUMENT` behind it.

  Returns:
    the file, and the argument of its `get_config`, if there is one.

  Raises:
    InputError: there is none.
  """
  name, *argument = text.split(":", 1)
  path = pathlib.Path(name)
  if path.suffix == ".py" or len(path.parts) > 1:
    if not path.is_file():
      raise InputError(f"--config: {name}: no such file")
    return path, argument
  packaged = resources.path("configs") / f"{name}.py"
  if name not in recipe_names():
    raise InputError(f"--config: no recipe {name!r}, expected a Python file or one of {', '.join(recipe_names())}")
  return packaged, argument


def load_recipe(text: str) -> ConfigDict:
  """The config that a recipe's `get_config` gives.

  Raises:
    InputError: no such recipe, or what went wrong in it, with the line.
  """
  path, argument = find_recipe(text)
  sys.path.insert(0, str(path.parent.absolute()))  # a recipe may import one beside it
  try:
    with user_code(f"--config: {path}", path):
      get_config = runpy.run_path(str(path)).get("get_config")
      if get_config is None:
        raise InputError(f"--config: {path} has no get_config()")
      config = get_config(*argument)
  finally:
    sys.path.pop(0)
  if isinstance(config, FrozenConfigDict):
    config = ConfigDict(config)
  if not isinstance(config, ConfigDict):
    raise InputError(f"--config: {path}: get_config() gave {type(config).__name__}, expected a ConfigDict")
  return config.lock()


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())
