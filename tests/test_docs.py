"""README, docs and CONTRIBUTING name only what is there: config fields, files, links, programs, flags, modules."""

import ast
import functools
import importlib
import importlib.util
import itertools
import pathlib
import re
import textwrap

import pytest

from rlpr_jax import __main__ as rlpr
from rlpr_jax.config import FIELDS
from rlpr_jax.evaluation import config as evaluation_config
from tests import rooms

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  path
  for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md")
  for path in ROOT.glob(pattern)
  if path.name != "CHANGELOG.md"  # of which older entries name what was there
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="a source distribution has no docs")

# What files are called, so that `config.json` is not taken for a field nor `train.py` for a module.
SUFFIXES = {
  "bib", "csv", "html", "json", "jsonl", "md", "parquet", "png", "py", "safetensors", "sh", "toml", "txt", "yaml",
}  # fmt: skip
OURS = {"py", "sh", "toml", "yaml"}  # of these a name without a folder has to be a file of the repository too
GROUPS = {field.rpartition(".")[0] for field in FIELDS} - {""}
# Folders from which a path in the text may start.
ROOMS = ("", "rlpr_jax", "configs", "docs", "launch", "tests", "tools", "benchmarks")
PROGRAMS = tuple(rlpr.PROGRAMS)


# --- reading a page ---


def unfenced(text: str) -> str:
  """The text without its fenced code blocks."""
  return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
  """Code blocks, fenced or indented."""
  fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
  return fenced + re.findall(r"(?:^    .*\n)+", unfenced(text), re.MULTILINE)


def prose(text: str) -> str:
  """The text without its code blocks."""
  return re.sub(r"^    .*\n", "", unfenced(text), flags=re.MULTILINE)


def spans(text: str) -> list[str]:
  """What stands between backticks, in order."""
  return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(text))]


def code(text: str) -> str:
  """Blocks and spans, with continued lines joined."""
  return "\n".join([*blocks(text), *spans(text)]).replace("\\\n", " ")


def anchors(text: str) -> set[str]:
  """The anchors that GitHub gives a page's headings."""
  found: set[str] = set()
  for heading in re.findall(r"^#+ (.+)$", unfenced(text), re.MULTILINE):
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
    numbered = (f"{slug}-{i}" if i else slug for i in itertools.count())
    found.add(next(name for name in numbered if name not in found))
  return found


# --- what is there ---


@functools.cache
def evaluation_fields() -> set[str]:
  """Fields of the config of an evaluation, with * for names that are the user's."""
  config = evaluation_config.default()
  fields = set(config) | {f"judge.{name}" for name in config.judge}
  fields |= {f"models.*.{name}" for name in evaluation_config.model()}
  return fields | {f"benchmarks.*.{name}" for name in evaluation_config.benchmark()}


def is_field(name: str) -> bool:
  """Whether a name is that of a field or of a group of fields, of a run or of an evaluation."""
  starred = re.sub(r"^(models|benchmarks)\.\w+", r"\1.*", name)
  known = FIELDS.keys() | GROUPS | evaluation_fields() | {"field", "models.*", "benchmarks.*"}  # `config.field` is any
  return name in known or starred in known


def resolves(name: str) -> bool:
  """Whether a dotted name is a module, or an attribute of one."""
  parts = name.split(".")
  for size in range(len(parts), 0, -1):
    try:
      found = importlib.import_module(".".join(parts[:size]))
    except ModuleNotFoundError:
      continue
    for part in parts[size:]:
      if not hasattr(found, part):
        # A dataclass's field without a default is no attribute of the class.
        return part in getattr(found, "__dataclass_fields__", ()) and part == parts[-1]
      found = getattr(found, part)
    return True
  return False


def is_program(module: str) -> bool:
  """Whether `python -m MODULE` starts something."""
  spec = importlib.util.find_spec(module)
  if spec is None:
    return False
  if spec.submodule_search_locations is not None:
    return importlib.util.find_spec(f"{module}.__main__") is not None
  return '__name__ == "__main__"' in pathlib.Path(spec.origin).read_text()


@functools.cache
def repository() -> frozenset[str]:
  """Paths of the repository's files."""
  hidden = (".git", ".venv", ".cache", ".mypy", ".ruff", ".pytest", ".hypothesis", "runs", "__pycache__")
  return frozenset(
    str(path.relative_to(ROOT))
    for top in ROOT.iterdir()
    if top.name in (".github", ".ci", ".gitignore", ".pre-commit-config.yaml") or not top.name.startswith(hidden)
    for path in [top, *top.rglob("*")]
  )


@functools.cache
def targets() -> set[str]:
  """Targets of the Makefile."""
  return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def flags_of(program: str) -> set[str]:
  """The flags that a program's module or script defines."""
  text = pathlib.Path(program).read_text()
  if "entry.run" in text or "entry.define_flags" in text:
    text += (ROOT / "rlpr_jax/entry.py").read_text()
  text += (ROOT / "rlpr_jax/command_line.py").read_text()
  if "known_only=True" in text:  # the rest is passed on to a program on a run's directory
    text += (ROOT / "rlpr_jax/entry.py").read_text()
  named = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))
  named |= set(re.findall(r'DEFINE_alias\("([\w-]+)"', text))
  booleans = re.findall(r'DEFINE_bool(?:ean)?\(\s*"(\w+)"', text)
  return named | {f"no{name}" for name in booleans} | {"config", "help"}


# --- what the pages say ---


def unknown_fields(text: str) -> list[str]:
  """Fields that no config has: `config.a.b` anywhere, `a.b` and a following `.c` between backticks."""
  wrong = []
  for name in re.findall(r"(?<![\w/.])config\.([a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)*)", text):
    if name.split(".")[-1] not in SUFFIXES and not is_field(name) and not resolves(f"rlpr_jax.config.{name}"):
      wrong.append(f"config.{name}")
  group = ""
  for span in spans(text):
    name = re.split(r"[=\s]", span)[0]
    if re.fullmatch(r"\.[a-z_0-9]+", name):  # `config.mesh.data`, `.fsdp`
      if name[1:] not in SUFFIXES and not name.startswith((".venv", ".cache")) and not is_field(group + name):
        wrong.append(f"{span} after {group}")
      continue
    name = name.removeprefix("config.")
    if not re.fullmatch(r"[a-z_]+\.[a-z_0-9.]+", name) or name.split(".")[-1] in SUFFIXES:
      continue
    first = name.split(".")[0]
    if first in GROUPS and not is_field(name) and not resolves(f"rlpr_jax.{name}"):
      wrong.append(span)
    if is_field(name):
      group = name.rpartition(".")[0]
  return wrong


def unknown_rows(text: str) -> list[str]:
  """Fields and choices in the tables under a heading that names a group, `## ...: `config.reward``."""
  wrong = []
  for heading, section in re.findall(r"^#+ .*`config\.(\w+)`\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
    field = ""
    for row in re.findall(r"^\|(.*)\|$", section, re.MULTILINE):
      cells = [cell.strip() for cell in row.split("|")]
      named = re.findall(r"`([^`]+)`", cells[0])
      wrong += [f"{heading}.{name}" for name in named if not is_field(f"{heading}.{name}")]
      field = f"{heading}.{named[0]}" if named else field
      choices = FIELDS[field].choices if field in FIELDS else ()
      values = re.findall(r"`([^`]+)`", cells[1]) if choices else []
      wrong += [f"{field}={value}" for value in values if value not in choices]
  return wrong


def missing_paths(text: str) -> list[str]:
  """Files that are not in the repository."""
  wrong = []
  for word in re.findall(r"[^\s`'\"=(),;|]+", code(text)):
    path = re.sub(r"(\.(?:py|sh|md|toml|yaml|txt))[:#].*$", r"\1", word).rstrip(":/.")
    if re.search(r"[A-Z<>$*{}\[]", path.rpartition("/")[2].split(".")[0]) and "/" not in path:
      continue  # FILE.py
    if re.search(r"(?:^|/)(?:X|FILE|DIR|RUN|NAME|OUT)\b|[<>$*{}]|//", path) or path.startswith((".", "~", "/", "-")):
      continue
    suffix = path.rpartition(".")[2] if "." in path else ""
    first = path.split("/")[0]
    named = "/" in path and (first in ROOMS[1:] or suffix in OURS) and not path.startswith("runs/")
    if suffix in OURS and "/" not in path:
      if not any(known.rpartition("/")[2] == path for known in repository()):
        wrong.append(path)
    elif named and not any(str(pathlib.PurePath(room, path)) in repository() for room in ROOMS):
      wrong.append(path)
  return wrong


def broken_links(page: pathlib.Path, text: str) -> list[str]:
  """Relative links to what is not there, or to headings that are not."""
  wrong = []
  without_code = re.sub(r"`[^`]*`", "", prose(text))
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
      wrong.append(target)
  return wrong


def unknown_programs(text: str) -> list[str]:
  """Subcommands, modules, make targets and flags that are not there."""
  wrong, lines = [], code(text)
  for name in re.findall(r"\brlpr ([a-z_]+)", lines):
    if name not in PROGRAMS:
      wrong.append(f"rlpr {name}")
  for module in re.findall(r"python3? -m ([a-z_]+(?:\.[a-z_]+)*)", lines):
    if module.split(".")[0] in ("rlpr_jax", "benchmarks") and not is_program(module):
      wrong.append(f"python -m {module}")
  for words in re.findall(r"^\s*make((?: [a-z][a-z0-9-]*)+)", lines, re.MULTILINE):
    wrong += [f"make {target}" for target in words.split()[:1] if target not in targets()]
  for line in lines.splitlines():
    line = line.split(" #")[0].split(" -- ")[0]
    if command := re.search(r"(?:\brlpr |-m rlpr_jax\.|-m rlpr_jax )(\w+)(.*)", line):
      name = command[1]
      spec = importlib.util.find_spec(f"rlpr_jax.{name}")
      if spec is None:
        continue
      file = spec.origin if spec.submodule_search_locations is None else str(ROOT / f"rlpr_jax/{name}/__main__.py")
      given, known = command[2], flags_of(file)
    elif command := re.search(r"\b((?:launch|tools|benchmarks)/\w+\.py)(.*)", line):
      if not (ROOT / command[1]).exists():
        continue  # missing_paths says so
      given, known = command[2], flags_of(str(ROOT / command[1]))
    else:
      continue
    flags = re.findall(r"(?<=[\s\[])--([a-zA-Z][\w-]*)(?![\w.-])", given)
    wrong += [f"{command[0].split()[0]} {command[1]} --{flag}" for flag in flags if flag not in known]
  return wrong


def unknown_names(text: str) -> list[str]:
  """Modules of the package and their attributes, between backticks: `rlpr_jax.a.b`, `grpo.policy_loss`."""
  wrong = []
  ours = {path.stem for path in (ROOT / "rlpr_jax").iterdir()} - {"config"}
  for span in spans(text):
    name = span.removesuffix("()")
    if not re.fullmatch(r"[a-z_]+(\.\w+)+", name) or name.split(".")[-1] in SUFFIXES:
      continue
    first = name.split(".")[0]
    if first in ("rlpr_jax", "benchmarks") and not resolves(name):
      wrong.append(span)
    if first in ours and not is_field(name) and not resolves(f"rlpr_jax.{name}"):
      wrong.append(span)
  return wrong


CHECKS = {
  "fields": unknown_fields,
  "rows": unknown_rows,
  "paths": missing_paths,
  "programs": unknown_programs,
  "names": unknown_names,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_pages_name_what_is_there(name, check):
  assert CHECKS[check]((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(name):
  assert broken_links(ROOT / name, (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", NAMES)
def test_python_in_pages_is_python(name):
  text = (ROOT / name).read_text()
  found = re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
  assert len(found) == text.count("```python")
  for block in found:
    ast.parse(textwrap.dedent(block))


def test_rooms_are_those_of_the_test_of_rooms():
  """In the same order, which the page gives from top to bottom."""
  section = (ROOT / "docs/architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
  rows = [tuple(re.findall(r"`([^`]+)`", row)) for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)]
  order = [tuple(name for name in level if name != "__init__") for level in rooms.ORDER]
  assert list(map(set, reversed(rows))) == list(map(set, order))


def test_papers_named_in_the_code_are_in_the_index():
  index = (ROOT / "docs/papers.md").read_text()
  named = {
    found
    for folder in ("rlpr_jax", "configs")
    for path in (ROOT / folder).rglob("*.py")
    for found in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text())
  }
  assert [paper for paper in sorted(named) if paper not in index] == []


def test_papers_are_somewhere():
  """Each row names a module's attribute, and every name and field in it is there."""
  for row in re.findall(r"^\|(.*)\|$", (ROOT / "docs/papers.md").read_text(), re.MULTILINE):
    cells = [cell.strip() for cell in row.split("|")]
    if cells[2] == "code" or set(row) <= set("-|"):
      continue
    named = re.findall(r"`([^`]+)`", cells[2])
    assert named, row
    assert [name for name in named if not resolves(f"rlpr_jax.{name}") and not resolves(name)] == [], row
    for field in re.findall(r"`([^`]+)`", cells[3]):
      name, _, value = field.removeprefix("config.").partition("=")
      assert is_field(name), row
      assert not value or value in FIELDS[name].choices, row


def test_every_page_is_in_the_table_of_contents():
  readme = (ROOT / "README.md").read_text()
  assert [name for name in NAMES if name.startswith("docs/") and f"]({name}" not in readme] == []


# --- the test sees what it looks for ---


@pytest.mark.parametrize(
  ("check", "text"),
  [
    ("fields", "`config.reward.agregate` says so"),
    ("fields", "Set `rollout.slotz` to 4."),
    ("fields", "`config.mesh.data` and `.fdsp`"),
    ("fields", "    rlpr train --config.training.minibatch=2\n"),
    ("fields", "`config.models.policy.paths`"),
    ("rows", "## Loss: `config.training`\n\n| `lossy` | `clip` | x |\n"),
    ("rows", "## Loss: `config.training`\n\n| `loss` | `clip` | x |\n| | `clipped` | x |\n"),
    ("paths", "See `training/updates.py`."),
    ("paths", "    python tools/nothing.py --data=DIR\n"),
    ("paths", "`nothing.sh` restarts it."),
    ("programs", "    rlpr trian --workdir=DIR\n"),
    ("programs", "`python -m rlpr_jax.grpo`"),
    ("programs", "    make quickstrat   # fast\n"),
    ("programs", "    rlpr train --config=quickstart \\\n      --wrkdir=DIR\n"),
    ("programs", "    python launch/sweep.py --dry-runs\n"),
    ("names", "`grpo.clip_loss`"),
    ("names", "`rlpr_jax.nothing`"),
  ],
)
def test_what_is_not_there_is_found(check, text):
  assert CHECKS[check](text)


@pytest.mark.parametrize(
  "text",
  [
    "`config.reward.aggregate`, `config.mesh.data`, `.fsdp` and `.tensor`; `config.json`; `config.models.mine.path`",
    "`training/update.py: loss`, `rlpr_jax/grpo.py`, `tpu.sh`, `configs/X.py`, `FILE.py:FUNCTION`, `DIR/results.md`",
    "`grpo.policy_loss`, `training.update.UpdateSettings`, `training.loss`, `jax.distributed`, `rlpr_jax.plan`",
    "    rlpr plan --config=RECIPE --topology=v5p:4x4x4 --nosearch\n    make test\n    rlpr --help\n",
    "`--config.field=value`, `configs/rlpr_qwen2_5_7b.py:v5p:4x4x4`, `model.safetensors`, `held_out/accuracy`",
  ],
)
def test_what_is_there_is_not(text):
  assert [found for check in CHECKS.values() for found in check(text)] == []


def test_links_that_lead_nowhere_are_found(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("# A heading: `x`\n\n[a](#a-heading-x) [b](#b) [c](page.md#a-heading-x) [d](other.md) ![e](e.png)\n")
  assert broken_links(page, page.read_text()) == ["#b", "other.md", "e.png"]
