"""What the site has beside docs/ (a hook of mkdocs.yml): pages made at the build, and links as the code host has them.

README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site. The reference is made of docstrings and of `FIELDS`.
A link to another file of the repository leads to the code host where pyproject.toml names it (`Repository` under
`project.urls`), else to a copy of the file in the site. griffe, which reads the docstrings, is told of their examples.
"""

import html
import pathlib
import posixpath
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from rlpr_jax.config import FIELDS
from rlpr_jax.fields import Field

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages from outside of docs/, by their names in the site.
TOP_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Modules in the reference, and of which of their members: all that are public where none are named.
MODULES: dict[str, tuple[str, ...]] = {
  "config": (),
  "rewards": (),
  "grpo": (),
  "filtering": (),
  "splicing": (),
  "types": (),
  "train": ("train",),
  "policy": (),
  "data.templates": (),
  "grading.graders": (),
  "evaluation.config": (),
  "errors": (),
}
# Fenced code, a code span, or the target of a link.
_PIECES = re.compile(
  r"(?P<code>^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$|`[^`]+`)|(?<=\]\()(?P<link>[^)\s]+)", re.MULTILINE | re.DOTALL
)
_NAMES = {"sh": "bash", "yml": "yaml", "gitignore": "text", "": "text"}  # of languages, by a file's suffix


def repository() -> str:
  """The address of the repository at its code host; "" where pyproject.toml names none."""
  urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
  return str(urls.get("Repository", "")).rstrip("/")


# --- links ---


def source_of(page: str) -> str:
  """The file of the repository that a page of the site is made of.

  >>> source_of("rewards.md"), source_of("index.md")
  ('docs/rewards.md', 'README.md')
  """
  return TOP_PAGES.get(page, f"docs/{page}")


def page_of(path: str) -> str:
  """The page or file of the site that holds a file of the repository: itself, or a copy.

  >>> page_of("docs/rewards.md"), page_of("README.md"), page_of("rlpr_jax/grpo.py"), page_of("examples")
  ('rewards.md', 'index.md', 'source/rlpr_jax/grpo.py.md', 'source/examples/index.md')
  """
  for page, source in TOP_PAGES.items():
    if path == source:
      return page
  if path.startswith("docs/"):
    return path.removeprefix("docs/")
  if (ROOT / path).is_dir():
    return f"source/{path}/index.md"
  return f"source/{path}" if path.endswith(".ipynb") else f"source/{path}.md"  # notebooks as they are, to be opened


def target_of(link: str, page: str) -> str | None:
  """The file of the repository that a link leads to; None for one to elsewhere, or within its page.

  >>> target_of("../rlpr_jax/grpo.py", "rewards.md"), target_of("#notation", "architecture.md")
  ('rlpr_jax/grpo.py', None)
  """
  path = link.partition("#")[0]
  if not path or re.match(r"[a-z]+:", link):
    return None
  return posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), path))


def rewrite(link: str, page: str, host: str) -> str:
  """A link of the repository as the site has it.

  Args:
    link: as it stands in the file that the page is made of.
    page: of the site.
    host: the address of the repository; "" for copies.

  >>> rewrite("data.md#rows", "rewards.md", ""), rewrite("../../rlpr_jax/grpo.py", "how_to_add/loss.md", "")
  ('data.md#rows', '../source/rlpr_jax/grpo.py.md')
  >>> rewrite("docs/rewards.md", "index.md", ""), rewrite("../README.md#install", "data.md", "")
  ('rewards.md', 'index.md#install')
  >>> rewrite("../rlpr_jax/grpo.py", "rewards.md", "https://host/us/it")
  'https://host/us/it/blob/HEAD/rlpr_jax/grpo.py'
  """
  target = target_of(link, page)
  if target is None:
    return link
  anchor = link.partition("#")[2]
  found = page_of(target)
  if host and found.startswith("source/"):
    found = f"{host}/{'tree' if (ROOT / target).is_dir() else 'blob'}/HEAD/{target}"
  else:
    found = posixpath.relpath(found, posixpath.dirname(page) or ".")
  return f"{found}#{anchor}" if anchor else found


def links(text: str) -> Iterator[str]:
  """The targets of a page's links.

  >>> list(links("[`a`](b.md) and `[c](d.md)`"))
  ['b.md']
  """
  for piece in _PIECES.finditer(text):
    if piece["link"]:
      yield piece["link"]


# --- Markdown as the code host reads it ---


def adapt(text: str) -> str:
  r"""Markdown of the code host as Python-Markdown reads it, where the two differ on these pages.

  What belongs to a numbered item is indented by four columns, where the code host asks for the three of `1. `, and the
  next item stands behind an empty line then; so does a list behind a paragraph. A bar within a code span of a table is
  not escaped. Fenced code stays as it is.

  >>> adapt("1. One:\n\n   more\n\n       code\n2. Two\n3. Three")
  '1. One:\n\n    more\n\n        code\n\n2. Two\n3. Three'
  >>> adapt("One:\n- two\n  more\n- three")
  'One:\n\n- two\n  more\n- three'
  >>> adapt(r"| `a \| b` | c \| d |")
  '| `a | b` | c \\| d |'
  """
  lines = [""]
  fenced, within, deep = False, False, False  # in code; in a numbered item; in more of it than its first paragraph
  for line in text.split("\n"):
    fenced ^= line.startswith("```")
    if fenced:
      pass
    elif line.startswith("|"):
      line = re.sub(r"`[^`]+`", lambda span: span[0].replace(r"\|", "|"), line)
    elif line.startswith("   "):
      deep |= within and not lines[-1]
      line = f" {line}" if within else line
    elif line:
      behind_paragraph = line.startswith("- ") and not lines[-1].startswith(("- ", "  "))
      within = re.match(r"\d\. ", line) is not None
      if lines[-1] and (behind_paragraph or (within and deep)):
        lines.append("")
      deep = False
    lines.append(line)
  return "\n".join(lines[1:])


def fence_examples(text: str) -> str:
  """A docstring with its examples as fenced code, which Markdown would take for quotations.

  >>> fence_examples(f"One more.\\n\\n{'>' * 3} add(1)\\n2")
  'One more.\\n\\n```pycon\\n>>> add(1)\\n2\\n```'
  """
  return re.sub(r"^>>> .*?(?=\n\s*\n|\s*\Z)", lambda block: f"```pycon\n{block[0]}\n```", text, flags=re.M | re.S)


class Examples(griffe.Extension):
  """Fences the examples of every docstring that is read."""

  def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
    if obj.docstring:
      obj.docstring.value = fence_examples(obj.docstring.value)


# --- pages that are made ---


def copy_of(path: str) -> str:
  """The page of a file or a folder of the repository, which search leaves out; a notebook as it is."""
  head = f"---\nsearch: {{exclude: true}}\n---\n# `{path}`\n\n"
  if (ROOT / path).is_dir():
    pages = {name: posixpath.relpath(page_of(name), f"source/{path}") for name in listing(path)}
    return head + "".join(f"- [`{name}`]({page})\n" for name, page in pages.items())
  text = (ROOT / path).read_text()
  if path.endswith(".ipynb"):
    return text
  suffix = pathlib.PurePath(path).suffix[1:]
  fence = "`" * (1 + max(map(len, re.findall(r"`{2,}", text)), default=2))
  return f"{head}{fence}{_NAMES.get(suffix, suffix)}\n{text.rstrip()}\n{fence}\n"


def listing(path: str) -> list[str]:
  """Files in a folder of the repository and in those within it."""
  found = (file for file in (ROOT / path).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
  return sorted(str(file.relative_to(ROOT)) for file in found)


def fields_page() -> str:
  """Every field of a run's config, by group."""
  text = "# Config fields\n\n`--config.FIELD=value` on the command line, `c.FIELD = value` in a recipe.\n"
  text += "A run that goes on may have another value of those with a star.\n"
  groups: dict[str, list[str]] = {}
  for name, field in FIELDS.items():
    groups.setdefault(name.rpartition(".")[0], []).append(_row(name, field))
  for group, rows in groups.items():
    title = f"`{group}`" if group else "The run"
    text += f"\n## {title}\n\n| field | default | meaning |\n|---|---|---|\n" + "".join(rows)
  return text


def _row(name: str, field: Field) -> str:
  """A field's row, with its name as an anchor; what it means is text, not Markdown."""
  star = " \\*" if field.may_change else ""
  meaning = "".join(f"&#{ord(character)};" if character in "|<>*_`[]\\" else character for character in field.meaning)
  default = html.escape(repr(field.default)).replace("|", "&#124;")
  return f'| <span id="{name}">`{name}`</span>{star} | <code>{default}</code> | {meaning} |\n'


def made_pages(host: str) -> dict[str, str]:
  """The text of each page and file that is not in docs/, by its name in the site."""
  pages = {page: (ROOT / source).read_text() for page, source in TOP_PAGES.items()}
  written = pages | {str(file.relative_to(ROOT / "docs")): file.read_text() for file in (ROOT / "docs").rglob("*.md")}
  pages["reference/fields.md"] = fields_page()
  for module, members in MODULES.items():
    options = f"    options: {{members: [{', '.join(members)}]}}\n" if members else ""
    pages[f"reference/{module}.md"] = f"# `{module}`\n\n::: rlpr_jax.{module}\n{options}"
  if not host:
    linked = {target for page, text in written.items() for link in links(text) if (target := target_of(link, page))}
    copied = {path for path in linked if page_of(path).startswith("source/")}
    copied |= {file for path in copied if (ROOT / path).is_dir() for file in listing(path)}
    pages |= {page_of(path): copy_of(path) for path in sorted(copied)}
  return pages


# --- what MkDocs calls ---


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Gives the theme the code host, which it links to at the top of each page."""
  config.repo_url = repository() or None
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are made."""
  for page, text in made_pages(repository()).items():
    inclusion = InclusionLevel.NOT_IN_NAV if page.startswith("source/") else InclusionLevel.UNDEFINED
    files.append(File.generated(config, page, content=text, inclusion=inclusion))
  return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Turns a page of the repository into one of the site."""
  name = page.file.src_uri
  if name.startswith(("source/", "reference/")):
    return markdown
  host = repository()
  text = _PIECES.sub(lambda piece: piece["code"] or rewrite(piece["link"], name, host), markdown)
  return adapt(text)
