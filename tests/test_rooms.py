"""Which part of the package imports which: arrows point down only."""

import ast
import graphlib
import pathlib

from tests.rooms import ORDER

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "rlpr_jax"

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, pathlib.Path]:
  """Files by the names of their modules, without the package's."""
  found = {}
  for path in PACKAGE.rglob("*.py"):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    found[name.removesuffix(".__init__") if path.parent != PACKAGE else name] = path
  return found


def imports(path: pathlib.Path, names: set[str]) -> set[str]:
  """The modules that a file imports anywhere in it, but for what a type checker alone reads."""
  tree, found = ast.parse(path.read_text()), set()
  unread = {
    id(inner)
    for node in ast.walk(tree)
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    for inner in ast.walk(node)
  }
  for node in ast.walk(tree):
    if id(node) in unread:
      continue
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlpr_jax":
      inside = node.module.removeprefix("rlpr_jax").lstrip(".")
      for alias in node.names:
        whole = f"{inside}.{alias.name}".lstrip(".")
        found.add(whole if whole in names else inside or "__init__")
    elif isinstance(node, ast.Import):
      found |= {
        alias.name.removeprefix("rlpr_jax").lstrip(".") or "__init__"
        for alias in node.names
        if alias.name.split(".")[0] == "rlpr_jax"
      }
  return found


def room(module: str) -> str:
  return module.split(".")[0]


def test_every_room_has_its_place():
  assert {room(name) for name in modules()} == set(LEVEL)


def test_arrows_point_down():
  files = modules()
  up = [
    f"{name} imports {other}"
    for name, path in files.items()
    for other in sorted(imports(path, set(files)))
    if room(other) != room(name)
    and LEVEL[room(other)] >= LEVEL[room(name)]
    # Two names that other programs import from where they once stood.
    and (name, other) != ("models", "huggingface")
  ]
  assert up == []


def test_no_circle_of_files():
  files = modules()
  graph = {name: imports(path, set(files)) - {name} for name, path in files.items()}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_an_arrow_up_is_seen(tmp_path):
  path = tmp_path / "low.py"
  path.write_text(
    "from typing import TYPE_CHECKING\nfrom rlpr_jax import training\nimport rlpr_jax\n"
    "def f():\n  from rlpr_jax.data.pipeline import Prompt\n"
    "if TYPE_CHECKING:\n  from rlpr_jax import models\n"
  )
  assert imports(path, {"training", "data.pipeline"}) == {"training", "data.pipeline", "__init__"}


def test_no_test_imports_a_test():
  """Helpers that several tests share stand in modules that are no tests."""
  found = [
    f"{path.relative_to(ROOT)} imports {node.module}"
    for path in (ROOT / "tests").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests"
    for name in [(node.module or "").split(".")[-1], *(alias.name for alias in node.names)]
    if name.startswith("test_")
  ]
  assert found == []
