"""Each version that is written down stands in one place, and the places fit each other."""

import importlib.metadata
import pathlib
import re
import subprocess
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.txt", "requirements-newest.txt")
EXTRAS = PROJECT["optional-dependencies"]


def lines(file: str) -> list[Requirement]:
  return [Requirement(line) for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def python_of(lock: str) -> str:
  return re.match(r"#.*Python (\d\.\d+)", (ROOT / lock).read_text())[1]


def pins(lock: str) -> dict[str, str]:
  """Versions by name, of a lock and of what the tests need beside it, on the lock's Python."""
  environment = default_environment() | {"python_version": python_of(lock), "python_full_version": python_of(lock)}
  found = {}
  for requirement in [*lines(lock), *lines("requirements-dev.txt")]:
    if requirement.marker is None or requirement.marker.evaluate(environment):
      (specifier,) = requirement.specifier
      assert specifier.operator == "=="
      found[canonicalize_name(requirement.name)] = specifier.version
  return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_fits_the_ranges(lock):
  pinned, own = pins(lock), {canonicalize_name(requirement.name) for requirement in lines(lock)}
  environment = default_environment() | {"python_version": python_of(lock)}
  ranges = PROJECT["dependencies"] + [text for name in ("serve", "structured", "evaluate") for text in EXTRAS[name]]
  for requirement in map(Requirement, ranges):
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
  assert own == {canonicalize_name(Requirement(text).name) for text in ranges} | {"jaxlib"}
  for requirement in map(Requirement, EXTRAS["cuda13"]):
    if requirement.marker and requirement.marker.evaluate(environment):
      assert requirement.specifier.contains(pinned[requirement.name])


@pytest.mark.parametrize("extra", ["dev", "docs"])
def test_an_extra_for_development_has_what_its_file_pins(extra):
  needed = {canonicalize_name(requirement.name) for requirement in lines(f"requirements-{extra}.txt")}
  assert needed == {canonicalize_name(Requirement(text).name) for text in EXTRAS[extra]} - {"rlpr-jax"}


def test_the_oldest_python():
  assert PROJECT["requires-python"] == f">={python_of(LOCKS[0])}"
  assert f"FROM python:{python_of(LOCKS[0])}-" in (ROOT / "launch/Containerfile").read_text()


def test_versions_stand_in_the_locks_alone():
  """No exact version of a package of the locks, nor of the compilers that follow jax, in code, scripts or settings."""
  names = "|".join(re.escape(name) for name in {*pins(LOCKS[0]), "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"})
  written = re.compile(rf"\b({names})(\[\w+\])?==\d", re.IGNORECASE)
  tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
  found = []
  for file in tracked:
    if file.endswith((".py", ".sh", ".toml", "file")) and not file.startswith("tests/"):
      text = (ROOT / file).read_text()
      found += [f"{file}: {match[0]}" for match in written.finditer(text)]
  assert found == []


def test_this_environment_is_a_lock():
  """What the tests run on is what the locks say: a figure in the docs names the versions by them."""
  lock = next((lock for lock in LOCKS if pins(lock)["jax"] == importlib.metadata.version("jax")), None)
  if lock is None:
    pytest.skip("another environment than those of the locks")
  for name in ("flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy"):
    assert importlib.metadata.version(name) == pins(lock)[name]
