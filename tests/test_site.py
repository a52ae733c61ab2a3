"""The documentation as a site: built without a warning, and every link in it leads somewhere."""

import doctest
import html.parser
import importlib
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="a source distribution has no docs")


def test_every_page_is_in_the_navigation():
  named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
  assert len(named) == len(set(named))
  pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
  assert pages <= set(named)


class Reader(html.parser.HTMLParser):
  """What a page names and what it leads to."""

  def __init__(self, text: str):
    super().__init__()
    self.anchors, self.links, self.fetched = set(), [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
    for name in ("href", "src"):
      if values.get(name):
        self.links.append(values[name])
        if tag in ("script", "img") or (tag == "link" and values.get("rel") in ("stylesheet", "icon")):
          self.fetched.append(values[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The site, and what was printed while it was built."""
  for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package)
  directory = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return directory, done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_is_warned_of(site):
  assert [line for line in site[1].splitlines() if not line.startswith("INFO")] == []


@pytest.mark.slow
def test_all_links_lead_somewhere(site):
  directory = site[0]
  pages = {file: Reader(file.read_text()) for file in directory.rglob("*.html") if file.name != "404.html"}
  assert len(pages) > 40
  wrong = []
  for file, read in pages.items():
    for link in read.links:
      parts = urllib.parse.urlsplit(link)
      if parts.scheme or parts.netloc:
        continue
      target = (file.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else file
      target = target / "index.html" if target.is_dir() else target
      anchor = urllib.parse.unquote(parts.fragment)
      if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
        wrong.append(f"{file.relative_to(directory)}: {link}")
  assert wrong == []


@pytest.mark.slow
def test_a_page_fetches_nothing_from_elsewhere(site):
  for file in site[0].rglob("*.html"):
    assert [link for link in Reader(file.read_text()).fetched if urllib.parse.urlsplit(link).netloc] == []


@pytest.mark.slow
def test_docstrings_are_in_the_reference(site):
  text = (site[0] / "reference/grpo.html").read_text()
  assert 'id="rlpr_jax.grpo.policy_loss"' in text
  assert "&gt;&gt;&gt; " in text  # examples are code, and no quotations
  assert "<blockquote>" not in text
  assert "config.training.clip_high" not in text
  assert 'id="training.clip_high"' in (site[0] / "reference/fields.html").read_text()


@pytest.mark.slow
def test_links_as_the_site_has_them(site, monkeypatch):
  """The examples of docstrings; and a code host, if there were one, takes the place of copies."""
  monkeypatch.syspath_prepend(str(ROOT / "tools"))
  pages = importlib.import_module("site_pages")
  assert doctest.testmod(pages).failed == 0
  made = pages.made_pages("")
  assert "# `rlpr_jax/config.py`" in made["source/rlpr_jax/config.py.md"]
  assert not [page for page in pages.made_pages("https://host/us/it") if page.startswith("source/")]
