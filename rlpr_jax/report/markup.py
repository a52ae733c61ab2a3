"""HTML that escapes by construction: what a model wrote cannot become a tag."""

import html

# Shown as their code: control characters, halves of surrogate pairs (no UTF-8 holds them), and what turns the
# direction of writing, with which a response could show another text than it is.
_RANGES = (
  (0x00, 0x08),
  (0x0B, 0x1F),
  (0x7F, 0x9F),
  (0x200E, 0x200F),
  (0x202A, 0x202E),
  (0x2066, 0x2069),
  (0xD800, 0xDFFF),
)
VISIBLE = {code: f"\\u{code:04x}" for first, last in _RANGES for code in range(first, last + 1)}


class Markup(str):
  """Text that is HTML already."""

  __slots__ = ()


def escape(text: object) -> Markup:
  """`text` as HTML. Markup passes unchanged.

  >>> escape("1 < 2"), escape(escape("1 < 2"))
  ('1 &lt; 2', '1 &lt; 2')
  """
  return text if isinstance(text, Markup) else Markup(html.escape(str(text).translate(VISIBLE)))


def join(*parts: object) -> Markup:
  """All parts in a row, escaped where they are not Markup.

  >>> join("1 < 2 ", tag("b", "yes"))
  '1 &lt; 2 <b>yes</b>'
  """
  return Markup("".join(escape(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Markup:
  """One element; `class_` stands for the attribute `class`, and `text_anchor` for `text-anchor`.

  >>> tag("b", "1 < 2", class_="x")
  '<b class="x">1 &lt; 2</b>'
  """
  pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
  return Markup(f"<{name}{pairs}>{join(*children)}</{name}>")
