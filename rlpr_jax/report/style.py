"""Colours, number formats and the style sheet: what the pages and the picture share."""

import itertools

INK = "#1c2733"
DIM = "#3f4a55"
MUTED = "#64707d"
PAGE = "#f6f8f9"
LINE = "#cfd6dd"
FAINT = "#edf0f3"
TEAL = "#0f766e"
CORAL = "#d9603b"
BLUE = "#3b4cc0"
SERIES = (TEAL, CORAL, "#5b6ee1", "#b8bfc7", "#c28b00", "#8e4585", "#3a8fb7", "#7a9a01", "#a0522d", "#d36ba6")

# Name in the style sheet -> on a light page, on a dark one. What charts and cards are drawn with has its place here, so
# that a page turns dark by its style sheet alone.
SHADES = {
  "ink": (INK, "#e4e9ee"),
  "dim": (DIM, "#c3ccd4"),
  "muted": (MUTED, "#97a3af"),
  "page": (PAGE, "#12171c"),
  "line": (LINE, "#4a5560"),
  "faint": (FAINT, "#29323a"),
  "card": ("#ffffff", "#1a2127"),
  "edge": ("#e3e8ec", "#2d363f"),
  "box": ("#fafbfc", "#151b20"),
  "badge": ("#44505c", "#b9c4ce"),
  "warn": ("#a53c1a", "#ffb199"),
  "warn-back": ("#fdeee8", "#46261c"),
  "tag": (BLUE, "#aeb9ff"),
  "tag-back": ("#e4e8fb", "#2b3157"),
  "answer-back": ("#fff6d6", "#4a4018"),
  "tick": ("#8b96a1", "#6d7883"),
  "teal": (TEAL, "#2dbfae"),
  "coral": (CORAL, "#f08560"),
  **dict(
    zip(
      (f"series-{i}" for i in range(len(SERIES))),
      zip(
        SERIES,
        ("#2dbfae", "#f08560", "#8f9cff", "#7f8994", "#e0ab2b", "#c98bc2", "#62b5dc", "#a8c832", "#d08a63", "#f095c6"),
        strict=True,
      ),
      strict=True,
    )
  ),
}

# Probability 0, 1/2 and 1: told apart without green and red, and dark text reads on all of them.
PROBABILITY_STOPS = ((242, 160, 138), (249, 239, 208), (118, 198, 180))


def cycle(count: int) -> list[str]:
  """`count` line colours; they repeat after ten.

  >>> len(cycle(12)), cycle(12)[10] == cycle(1)[0]
  (12, True)
  """
  return list(itertools.islice(itertools.cycle(SERIES), count))


def series_color(index: int) -> str:
  """The colour of a line on a page, light or dark; they repeat after ten.

  >>> series_color(10)
  'var(--series-0)'
  """
  return f"var(--series-{index % len(SERIES)})"


def variables(dark: bool) -> str:
  """The shades as declarations of a style sheet.

  >>> variables(dark=True).partition(";")[0]
  '--ink: #e4e9ee'
  """
  return "; ".join(f"--{name}: {shades[dark]}" for name, shades in SHADES.items())


def clip(value: float) -> float:
  """The value on a scale from 0 to 1.

  >>> clip(1.2)
  1.0
  """
  return min(max(value, 0.0), 1.0)


def probability_color(probability: float) -> str:
  """From coral (0) over cream (1/2) to teal (1).

  >>> probability_color(0.5)
  '#f9efd0'
  """
  position = 2 * clip(probability)
  low, high = PROBABILITY_STOPS[:2] if position < 1 else PROBABILITY_STOPS[1:]
  part = position - (position >= 1)
  return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def gain_color(gain: float) -> str:
  """From coral (-1) over cream (0) to teal (1): how much more probable something became.

  >>> gain_color(0.0) == probability_color(0.5)
  True
  """
  return probability_color((gain + 1) / 2)


def compact(value: float) -> str:
  """Three significant digits, thousands grouped: 0.413, 12.7, 4,210, 1.2e-06.

  >>> compact(0.41289), compact(4210.3)
  ('0.413', '4,210')
  """
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.3g}"


def percent(value: float) -> str:
  """Percentage with one decimal.

  >>> percent(0.125)
  '12.5%'
  """
  return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
  """48 s, 12 min 05 s, 3 h 07 min.

  >>> duration(725)
  '12 min 05 s'
  """
  rounded = round(seconds)
  if rounded < 60:
    return f"{rounded} s"
  if rounded < 3600:
    return f"{rounded // 60} min {rounded % 60:02d} s"
  return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def visible(token: str) -> str:
  """A token with its white space shown: ` 42` -> `␣42`, a line break -> `↵`.

  >>> visible(" 42")
  '␣42'
  """
  return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


CSS = f"""
:root {{ color-scheme: light dark; {variables(dark=False)}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(dark=True)}; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }}
main {{ max-width: 1320px; margin: 0 auto; padding: 20px clamp(12px, 3vw, 36px) 60px; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 40px 0 10px; }}
h3 {{ font-size: .95rem; margin: 22px 0 8px; color: var(--muted); font-weight: 600; }}
p {{ margin: 4px 0 12px; max-width: 75ch; }}
.muted {{ color: var(--muted); }}
nav {{ display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .88rem; }}
a {{ color: var(--teal); }}
.card, figure, .tile, details {{ background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }}
.tiles {{ display: grid; gap: 12px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 165px), 1fr)); }}
.tile {{ padding: 12px 16px; }}
.tile.hero {{ grid-column: span 2; border-left: 5px solid var(--teal); }}
.tile span {{ display: block; color: var(--muted); font-size: .85rem; }}
.tile b {{ display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 650; }}
.tile.hero b {{ font-size: clamp(1.7rem, 6vw, 2.5rem); }}
.tile b small {{ font-weight: 400; color: var(--muted); font-size: .6em; }}
.tile em {{ font-style: normal; font-size: .9rem; }}
.gain {{ color: var(--teal); }}
.loss {{ color: var(--coral); }}
.panels {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }}
figure {{ margin: 0; padding: 10px 12px 6px; display: flex; flex-direction: column; }}
figure svg {{ width: 100%; height: auto; display: block; margin-top: auto; }}
figure svg text {{ font-family: inherit !important; }}
.pointer rect {{ fill: none; pointer-events: all; }}
.pointer path {{ stroke: var(--tick); stroke-width: .8; visibility: hidden; pointer-events: none; }}
.pointer text {{ font-size: 8.5px; fill: var(--ink); stroke: var(--card); stroke-width: 3px; paint-order: stroke;
  visibility: hidden; pointer-events: none; }}
.pointer g:hover path, .pointer g:hover text {{ visibility: visible; }}
figcaption strong {{ display: block; font-size: .9rem; overflow-wrap: anywhere; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0 12px; font-size: .78rem; color: var(--muted); }}
.legend i {{ display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px; }}
.legend b {{ color: var(--ink); font-weight: 600; }}
.card {{ padding: 14px 16px; min-width: 0; }}
.cards {{ display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }}
.head {{ display: flex; flex-wrap: wrap; gap: 6px; align-items: center; font-size: .8rem; }}
.head .total {{ margin-left: auto; font-size: 1.05rem; font-weight: 650; }}
.badge {{ background: var(--faint); border-radius: 20px; padding: 1px 9px; color: var(--badge);
  overflow-wrap: anywhere; }}
.badge.warn {{ background: var(--warn-back); color: var(--warn); }}
.label {{ font-size: .75rem; color: var(--muted); margin: 12px 0 3px; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }}
.box {{ max-height: 15em; overflow: auto; background: var(--box); border: 1px solid var(--faint); border-radius: 8px;
  padding: 8px 10px; font: .82rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
.question {{ max-height: 9em; overflow: auto; font-weight: 500; }}
.tag {{ background: var(--tag-back); color: var(--tag); border-radius: 4px; padding: 0 3px; font-weight: 600; }}
.answer {{ font-weight: 700; background: var(--answer-back); }}
.tokens {{ display: flex; flex-wrap: wrap; gap: 4px; max-height: 19em; overflow: auto; }}
.token {{ border-radius: 6px; padding: 3px 7px 2px; text-align: center; min-width: 2.5em; max-width: 100%;
  background: var(--faint); }}
.token b {{ display: block; font: 600 1.1rem/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }}
.token[style], .token[style] small {{ color: {INK}; }}
.token small {{ display: block; font-size: .7rem; color: var(--dim); }}
.scale {{ display: inline-block; width: 90px; height: 9px; border-radius: 4px; margin: 0 6px; background:
  linear-gradient(90deg, {probability_color(0)}, {probability_color(0.5)}, {probability_color(1)}); }}
.track {{ position: relative; height: 10px; border-radius: 5px; background: var(--faint); margin: 5px 0; }}
.track i {{ position: absolute; top: 0; height: 100%; border-radius: 5px; }}
.track u {{ position: absolute; top: -3px; width: 3px; height: 16px; border-radius: 2px; background: var(--ink);
  transform: translateX(-1.5px); }}
.track u.from {{ background: var(--tick); }}
.sum {{ display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem; color: var(--muted); }}
.sum b {{ font-weight: 650; color: var(--ink); }}
.domains {{ margin-top: 12px; font-size: .88rem; }}
.domain {{ display: grid; gap: 0 14px; align-items: center;
  grid: "name track numbers" auto / minmax(6em, 11em) 1fr 15em; }}
.domain .track {{ grid-area: track; }}
.domain .name {{ grid-area: name; overflow-wrap: anywhere; }}
.domain .numbers {{ grid-area: numbers; text-align: right; }}
details {{ padding: 10px 16px; }}
summary {{ cursor: pointer; font-weight: 600; }}
table {{ border-collapse: collapse; font-size: .85rem; margin: 8px 0; width: 100%; }}
td {{ border-top: 1px solid var(--faint); padding: 3px 12px 3px 0; overflow-wrap: anywhere; vertical-align: top; }}
td:first-child {{ color: var(--muted); }}
footer {{ margin-top: 40px; font-size: .8rem; color: var(--muted); }}
@media (max-width: 560px) {{
  .domain {{ grid: "name numbers" auto "track track" auto / 1fr max-content; margin-bottom: 8px; }}
}}
.featured .token b {{ font-size: 1.5rem; }}
.featured .token small {{ font-size: .8rem; }}
"""
