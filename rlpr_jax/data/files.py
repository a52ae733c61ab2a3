"""Where rows are: files, directories and data sets of the Hugging Face hub, alone or several with weights."""

import contextlib
import fnmatch
import glob
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub

from rlpr_jax.data.tables import SUFFIXES
from rlpr_jax.errors import InputError, MachineError, is_of_network

_HUB_NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(/(?P<subset>\w[\w./-]*))?(@(?P<revision>[\w./-]+))?")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}.*")  # as `datasets` names the files that it writes
# What the files of a split are called.
_SPLITS = {
  "train": ("train", "training"),
  "validation": ("validation", "valid", "val", "dev"),
  "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: split for split, words in _SPLITS.items() for word in words}
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets` itself
_README = "README.md"
_FORM = "PATH, PATH:SPLIT, PATH:WEIGHT or PATH:SPLIT:WEIGHT, several with commas between them"


class DataFile(NamedTuple):
  """A file of rows."""

  path: Path
  name: str  # in messages
  source: str  # of rows that do not name theirs


class Part(NamedTuple):
  """One of several names, taken apart."""

  name: str
  files: tuple[DataFile, ...]
  split: str | None  # only rows whose column `split` says this; None for all
  needs_column: bool  # whether a file without that column is refused then
  weight: float  # how often its rows are drawn, 1 for those of the part with the smallest weight


def find(text: str, split: str | None = None) -> list[Part]:
  """Finds the files of `PATH[:SPLIT][:WEIGHT]`, or of several of these with commas between them.

  Args:
    text: PATH is a file, a directory, or a data set of the hub: `org/name`, `org/name/configuration`, and with either
      `@revision`. What is there by its whole name, commas and colons included, is that.
    split: for a PATH that names none.

  Raises:
    InputError: nothing of that name, a weight that cannot be, or a data set of several splits of which none is named.
  """
  names = [text] if Path(text).exists() else [name.strip() for name in text.split(",")]
  parts = [_find_part(name, split) for name in names]
  smallest = min(part.weight for part in parts)
  return [part._replace(weight=part.weight / smallest) for part in parts]


def one_file(path: Path, split: str | None = None) -> Part:
  """A part of one file, whatever is there by that name."""
  return Part(str(path), (DataFile(path, str(path), path.stem),), split, needs_column=False, weight=1.0)


def parse(text: str) -> tuple[str, str | None, float]:
  """Takes `PATH[:SPLIT][:WEIGHT]` apart.

  >>> parse("sums.jsonl:2"), parse("org/name:train")
  (('sums.jsonl', None, 2.0), ('org/name', 'train', 1.0))
  """
  pieces = text.split(":")
  lengths = range(len(pieces), 1, -1)
  length = next((length for length in lengths if Path(":".join(pieces[:length])).exists()), 1)
  path, marks = ":".join(pieces[:length]), pieces[length:]
  split, weight = None, 1.0
  if marks and (number := _number(marks[-1])) is not None:
    marks, weight = marks[:-1], number
  if marks:
    split, marks = marks[0], marks[1:]
  if not path or marks or split == "" or "://" in text:
    raise InputError(f"{text!r}: expected {_FORM}")
  if not (weight > 0 and math.isfinite(weight)):
    raise InputError(f"{text!r}: weight {weight:g}, expected more than 0")
  return path, split, weight


def _number(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _find_part(text: str, default_split: str | None) -> Part:
  path, split, weight = parse(text)
  named, split = split is not None, split or default_split
  local, hub = Path(path), _HUB_NAME.fullmatch(path)
  if local.is_dir():
    listed = _list_directory(local)
    chosen, split = _choose(path, listed, _read_card(local / _README), None, split)
    for name in chosen:
      if any("\ud800" <= c <= "\udfff" for c in name):  # as Python shows bytes that are none
        raise InputError(f"{path}: {name!a}, expected names of files in UTF-8")
    files = [DataFile(local / name, str(local / name), _stem(name)) for name in chosen]
  elif hub is None and not local.exists() and local.suffix.lower() not in SUFFIXES:
    raise InputError(f"{path}: no such file or directory, expected one, or org/name of the Hugging Face hub")
  elif local.exists() or local.suffix.lower() in SUFFIXES or hub is None:
    return one_file(local, split)._replace(name=text, needs_column=named, weight=weight)
  else:
    directory, chosen, split = _fetch(hub, split)
    source = hub["id"].partition("/")[2]
    files = [DataFile(directory / name, f"{hub['id']}/{name}", source) for name in chosen]
  return Part(text, tuple(files), split, needs_column=True, weight=weight)


def _list_directory(directory: Path) -> list[str]:
  """The files in it and its folders, by their names from there; hidden ones are none of the data."""
  found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
  return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _fetch(name: re.Match[str], split: str | None) -> tuple[Path, list[str], str | None]:
  """Fetches the files of a data set that are wanted into the cache of huggingface_hub; none of its code.

  Returns:
    the directory, the files' names in it, and the split that their rows still are to be chosen by.
  """
  listed: list[str] | None = None
  with contextlib.suppress(Exception):  # without the hub its cache will do; what is wrong the next call says
    api = huggingface_hub.HfApi()
    listed = sorted(api.list_repo_files(name["id"], repo_type="dataset", revision=name["revision"]))

  def download(files: Sequence[str]) -> Path:
    try:
      return Path(
        huggingface_hub.snapshot_download(
          name["id"],
          repo_type="dataset",
          revision=name["revision"],
          allow_patterns=[glob.escape(file) for file in files],
        )
      )
    except Exception as error:  # its errors and those of the HTTP library below it have no common class
      reason = " ".join(str(error).split())
      kind = MachineError if is_of_network(error) else InputError
      raise kind(f"{name[0]}: no such file or directory, and no data set of the hub either: {reason}") from None

  if listed is None:
    directory = download([_README])
    chosen, split = _choose(name[0], _list_directory(directory), _read_card(directory / _README), name["subset"], split)
  else:
    card = _read_card(download([_README]) / _README) if _README in listed else {}
    chosen, split = _choose(name[0], listed, card, name["subset"], split)
    directory = download(chosen)
  return directory, chosen, split


def _choose(
  name: str, listed: Sequence[str], card: dict[str, Any], subset: str | None, split: str | None
) -> tuple[list[str], str | None]:
  """Chooses the files of a configuration and a split.

  Args:
    name: of the data set, for messages.
    listed: its files, sorted.
    card: what the head of its README.md says.
    subset: a configuration of the card, or a folder.

  Returns:
    files, sorted; and the split, if it is one of rows and not of files.

  >>> _choose("org/name", ["data/test.parquet", "data/train.parquet"], {}, None, "train")
  (['data/train.parquet'], None)
  """
  files = [file for file in listed if _holds_rows(file)]
  try:
    configurations = dict(_configurations(card))
  except (AttributeError, KeyError, TypeError):  # a card of another form; the files speak for themselves
    configurations = {}
  asked = subset
  if subset is None and len(configurations) > 1:
    default = [one["config_name"] for one in card["configs"] if one.get("default") or one["config_name"] == "default"]
    if not default:
      known = sorted(configurations)
      raise InputError(f"{name}: has configurations {', '.join(known)}; expected one of them, as in {name}/{known[0]}")
    subset = default[0]
  if subset is None and configurations:
    (subset,) = configurations
  if subset in configurations:
    by_split = _match(files, configurations[subset])
    if "" in by_split:
      by_split = _by_name(by_split[""])
  else:
    by_split = _by_name([file for file in files if subset is None or file.startswith(f"{subset.strip('/')}/")])
  if asked is None and not any(by_split.values()):  # the card is of other files
    by_split = _by_name(files)
  if not any(by_split.values()):
    raise InputError(f"{name}: expected files named {', '.join('*' + suffix for suffix in SUFFIXES)}, found none")
  named = sorted(set(by_split) - {""})
  wanted = split if split is None or split in named else _CANONICAL.get(split.lower(), split)
  if wanted in named:
    return sorted(by_split[wanted]), None
  if wanted is None and len(named) > 1:
    raise InputError(f"{name}: has splits {', '.join(named)}; expected one of them, as in {name}:{named[-1]}")
  return sorted(file for files in by_split.values() for file in files), split


def _holds_rows(file: str) -> bool:
  path = PurePosixPath(file)
  hidden = any(part.startswith(".") for part in path.parts)
  return path.suffix.lower() in SUFFIXES and path.name not in _NO_ROWS and not hidden


def _by_name(files: Sequence[str]) -> dict[str, list[str]]:
  """Files by the split that their names say, "" for none.

  >>> _by_name(["data/train-00000-of-00001.parquet", "more.csv"])
  {'train': ['data/train-00000-of-00001.parquet'], '': ['more.csv']}
  """
  found: dict[str, list[str]] = {}
  for file in files:
    found.setdefault(_split_of(file), []).append(file)
  return found


def _split_of(file: str) -> str:
  """The split that a file's name says, or else that of a folder above it; "" if none does.

  >>> _split_of("gsm8k_dev.jsonl"), _split_of("test/0.parquet"), _split_of("train_sft-00000-of-00002.parquet")
  ('validation', 'test', 'train_sft')
  """
  if shard := _SHARD.fullmatch(PurePosixPath(file).name):
    return _CANONICAL.get(shard["stem"], shard["stem"])
  for part in reversed(PurePosixPath(file).with_suffix("").parts):
    for word in re.split("[^a-z]+", part.lower()):
      if word in _CANONICAL:
        return _CANONICAL[word]
  return ""


def _stem(file: str) -> str:
  """A file's name without its suffix, and without the number of a shard.

  >>> _stem("data/web-00003-of-00012.parquet")
  'web'
  """
  stem = PurePosixPath(file).stem
  shard = _SHARD.fullmatch(stem)
  return shard["stem"] if shard else stem


def _read_card(path: Path) -> dict[str, Any]:
  """Reads the head of a README.md; {} if it cannot be read."""
  try:
    return huggingface_hub.metadata_load(path) or {}
  except Exception:  # YAML of anybody's; the files speak for themselves
    return {}


def _configurations(card: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[str]]]]:
  """Of each configuration that a card lists, the patterns of its files by split, "" where it names no splits.

  >>> dict(_configurations({"configs": [{"config_name": "main", "data_files": "main/*"}]}))
  {'main': {'': ['main/*']}}
  """
  configs = card.get("configs")
  for one in configs if isinstance(configs, list) else ():
    files = one.get("data_files", f"{one['data_dir'].strip('/')}/*" if one.get("data_dir") else "*")
    if isinstance(files, dict):
      files = [{"split": split, "path": path} for split, path in files.items()]
    by_split: dict[str, list[str]] = {}
    for entry in [files] if isinstance(files, str) else files:
      split, paths = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("", entry)
      by_split.setdefault(str(split), []).extend([paths] if isinstance(paths, str) else paths)
    yield str(one["config_name"]), by_split


def _match(files: Sequence[str], patterns: dict[str, list[str]]) -> dict[str, list[str]]:
  """Files by split, of the patterns of each.

  >>> _match(["a/1.csv", "b/2.csv"], {"train": ["a/*"]})
  {'train': ['a/1.csv']}
  """
  return {
    split: [file for file in files if any(fnmatch.fnmatchcase(file, pattern.removeprefix("./")) for pattern in some)]
    for split, some in patterns.items()
  }
