"""Results as Markdown."""

from typing import Any

REHEARSAL = "**REHEARSAL**: tiny sizes, to see that everything runs. No number here is a measurement."


def render(results: dict[str, Any]) -> str:
  """The whole document: which parts passed, then each part's tables and notes."""
  lines = [f"# {results['title']}", ""]
  if results["rehearsal"]:
    lines += [REHEARSAL, ""]
  lines += table([
    {"part": name, "result": part["status"], "s": part["seconds"], "of s": part["limit"], "why": part["error"]}
    for name, part in results["parts"].items()
  ])  # fmt: skip
  for name, part in results["parts"].items():
    if not part["tables"] and not part["notes"]:
      continue
    lines += ["", f"## {name}{' (REHEARSAL)' if results['rehearsal'] else ''}"]
    for title, rows in part["tables"].items():
      lines += ["", *([] if title == name else [f"{title}:", ""]), *table(rows)]
    lines += ["", *(f"- {note}" for note in part["notes"])] if part["notes"] else []
  return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
  """Lines of a table whose columns are those of any row, in the order in which they first come.

  >>> table([{"n": 1, "ms": 0.123456}, {"n": 20, "ok": False}])
  ['| n | ms | ok |', '|---|---|---|', '| 1 | 0.1235 |  |', '| 20 |  | NO |']
  """
  columns = list(dict.fromkeys(name for row in rows for name in row))
  body = [[_cell(row.get(name)) for name in columns] for row in rows]
  head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *body))
  return [head, "|" + "---|" * len(columns), *lines]


def _cell(value: Any) -> str:
  match value:
    case None:
      return ""
    case bool():
      return "yes" if value else "NO"
    case float():
      return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
  return str(value).replace("|", "\\|").replace("\n", " ")
