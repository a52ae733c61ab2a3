"""One PNG of a run, for a README: accuracy, reward and length, and one rollout with its reference tokens."""

import dataclasses
import io
import pathlib
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rlpr_jax.report import charts, gallery, style
from rlpr_jax.report.panels import Panel
from rlpr_jax.report.records import EXACT, Json, Run, number, read_run
from rlpr_jax.runs import ACCURACY
from rlpr_jax.runs.storage import write_result

# All lengths are points, 1/72 inch; at 100 dots an inch the picture is 1,200 wide. Written at twice that.
WIDTH, DPI = 864.0, 200
MARGIN, PADDING = 26.0, 18.0
HEADLINE, PANELS = 100.0, 205.0
SIZE, LEADING = 10.0, 16.0  # of the text of the rollout
CHIP_SIZE = 14.0
CHIP_HEIGHT, CHIP_GAP = 36.0, 5.0
ADVANCE = 0.602  # width of a DejaVu Sans Mono character, as a part of its size
LINES = 6  # of a response; of a longer one, its beginning and its end
CHIP_ROWS = 3  # of a reference; of a longer one, its beginning

PANELS_SHOWN = (
  Panel("Held-out accuracy", "share correct", {ACCURACY: "right", EXACT: "exact"}),
  Panel("Reward", "mean of responses", {"reward/total": ""}),
  Panel("Response length", "tokens", {"rollout/response_length": ""}),
)


@dataclasses.dataclass(frozen=True)
class Word:
  """A piece of text with its look."""

  text: str
  color: str = style.INK
  weight: str = "normal"


@dataclasses.dataclass(frozen=True)
class Chip:
  """A token of the reference answer at its place. Its probability is None where there is none to show."""

  text: str
  probability: float | None
  left: float
  row: int
  width: float


def drawable(text: str) -> str:
  """One line without what a font cannot draw.

  >>> drawable("6 * 7\\n= 42")
  '6 * 7 = 42'
  """
  line = " ".join(text.encode("utf-8", "replace").decode().split())
  return "".join(character for character in line if character.isprintable())


def response_words(response: str) -> Iterator[Word]:
  """The words of a response: tags blue, the answer bold.

  >>> [word.weight for word in response_words("so <answer>42</answer>")]
  ['normal', 'bold', 'bold', 'bold']
  """
  inside = False
  for piece in gallery.TAGS.split(drawable(response)):
    if gallery.TAGS.fullmatch(piece):
      inside = piece == "<answer>"
      yield Word(piece, style.BLUE, "bold")
    else:
      weight = "bold" if inside else "normal"
      yield from (Word(word, weight=weight) for word in piece.split())


def wrap(words: Iterator[Word], columns: int) -> list[list[Word]]:
  """Lines of at most `columns` characters, LINES of them at most.

  >>> [[word.text for word in line] for line in wrap(map(Word, ["a", "long", "line"]), columns=6)]
  [['a', 'long'], ['line']]
  """
  lines: list[list[Word]] = [[]]
  used = 0
  for word in words:
    if len(word.text) > columns:
      word = dataclasses.replace(word, text=word.text[: columns - 1] + "…")
    if used + len(word.text) > columns:
      lines.append([])
      used = 0
    lines[-1].append(word)
    used += len(word.text) + 1
  if len(lines) > LINES:
    return [*lines[: LINES - 3], [Word("…", style.MUTED)], *lines[-2:]]
  return lines


def place_chips(row: Json, width: float) -> list[Chip]:
  """The reference tokens, left to right in rows of `width`.

  >>> [chip.row for chip in place_chips({"reference_tokens": ["4", "2"]}, width=50.0)]
  [0, 1]
  """
  chips: list[Chip] = []
  left, line = 0.0, 0
  for token, probability in gallery.reference_tokens(row):
    text = drawable(style.visible(token))
    needed = max(len(text) * CHIP_SIZE * ADVANCE, 2.2 * CHIP_SIZE) + 12
    if left and left + needed > width:
      left, line = 0.0, line + 1
    if line == CHIP_ROWS:
      return [*chips[:-1], dataclasses.replace(chips[-1], text="…", probability=None)]
    chips.append(Chip(text=text, probability=probability, left=left, row=line, width=needed))
    left += needed + CHIP_GAP
  return chips


def draw_words(axes: Axes, left: float, top: float, words: list[Word]) -> None:
  """One line of monospaced words."""
  for word in words:
    axes.text(left, top, word.text, size=SIZE, va="top", color=word.color, weight=word.weight, family="monospace")
    left += (len(word.text) + 1) * SIZE * ADVANCE


class Box(NamedTuple):
  """Place and size of a box, in points."""

  x: float
  y: float
  width: float
  height: float


def draw_box(axes: Axes, box: Box, radius: float, color: str, edge: str = "none") -> None:
  """Draw a filled box with round corners."""
  corners = f"round,pad=0,rounding_size={radius}"
  patch = FancyBboxPatch((box.x, box.y), box.width, box.height, boxstyle=corners, facecolor=color, edgecolor=edge)
  axes.add_patch(patch)


def draw_chips(axes: Axes, left: float, top: float, chips: list[Chip]) -> None:
  """The coloured tokens, each with its probability under it."""
  for chip in chips:
    x, y = left + chip.left, top + chip.row * (CHIP_HEIGHT + CHIP_GAP)
    known = chip.probability is not None
    color = style.probability_color(chip.probability) if known else style.FAINT
    draw_box(axes, Box(x, y, chip.width, CHIP_HEIGHT), radius=5, color=color)
    middle = x + chip.width / 2
    center = {"ha": "center", "va": "center"}
    axes.text(middle, y + 14, chip.text, size=CHIP_SIZE, weight="bold", family="monospace", **center)
    if known:
      axes.text(middle, y + 28, f"{chip.probability:.2f}", size=8.5, color=style.DIM, **center)


def draw_track(axes: Axes, left: float, top: float, width: float, row: Json) -> None:
  """The bar from r' to r, and in words what it is worth."""
  before, after = (number(row, f"reward_{name}") or 0.0 for name in ("baseline", "reference"))
  color = style.TEAL if after >= before else style.CORAL
  draw_box(axes, Box(left, top, width, 8), radius=4, color=style.FAINT)
  places = [left + width * style.clip(value) for value in (before, after)]
  axes.fill_between(places, top, top + 8, color=color, linewidth=0)
  axes.vlines(places, top - 3, top + 11, colors=(style.MUTED, style.INK), linewidth=2.2)
  sentence = (
    f"r = {after:.2f} after the reasoning,  r' = {before:.2f} without it:  "
    f"debiased {number(row, 'reward_debiased') or 0.0:.2f},  with format and repetition terms "
    f"{number(row, 'reward_total') or 0.0:.2f}"
  )
  axes.text(left, top + 18, sentence, size=SIZE, color=style.INK, va="top")


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of the card: what it takes, and how to draw it from a top edge down."""

  height: float
  draw: Callable[[Axes, float], None]


def label(text: str) -> Block:
  return Block(15, lambda axes, top: axes.text(PADDING, top, text, size=8.5, color=style.MUTED, va="top"))


def question_line(text: str) -> Block:
  return Block(LEADING, lambda axes, top: axes.text(PADDING, top, text, size=11, weight="bold", va="top"))


def response_line(words: list[Word]) -> Block:
  return Block(LEADING, lambda axes, top: draw_words(axes, PADDING, top, words))


def answer_blocks(title: str, row: Json) -> list[Block]:
  """One response: its text, the reference tokens after it, and the bar of its reward."""
  inner = WIDTH - 2 * (MARGIN + PADDING)
  lines = wrap(response_words(gallery.text(row, "response")), int(inner / (SIZE * ADVANCE)))
  chips = place_chips(row, inner)
  chip_rows = 1 + max((chip.row for chip in chips), default=0)
  return [
    Block(14, lambda axes, top: None),
    label(title),
    *(response_line(words) for words in lines),
    Block(7, lambda axes, top: None),
    label("The reference answer in its place, and the probability of each token"),
    Block(chip_rows * (CHIP_HEIGHT + CHIP_GAP) + 8, lambda axes, top: draw_chips(axes, PADDING, top + 1, chips)),
    Block(34, lambda axes, top: draw_track(axes, PADDING, top, width=inner, row=row)),
  ]


def card_blocks(rows: list[Json]) -> list[Block]:
  """The card: one question, and one or two responses to it."""
  question = textwrap.wrap(drawable(gallery.text(rows[0], "question")), 110, max_lines=3, placeholder=" …")
  titles = ("What the policy wrote", "Another response to the same question")
  return [
    label(f"A question of step {rows[0].get('step', '?')}"),
    *(question_line(line) for line in question),
    *(block for title, row in zip(titles, rows, strict=False) for block in answer_blocks(title, row)),
  ]


def card_height(blocks: list[Block]) -> float:
  return 2 * PADDING + sum(block.height for block in blocks)


def draw_card(axes: Axes, blocks: list[Block]) -> None:
  """`axes` counts points, downwards from the card's upper left corner."""
  box = Box(1, 1, WIDTH - 2 * MARGIN - 2, card_height(blocks) - 2)
  draw_box(axes, box, radius=9, color="white", edge=style.LINE)
  top = PADDING
  for block in blocks:
    block.draw(axes, top)
    top += block.height


def draw_headline(axes: Axes, run: Run) -> None:
  """Accuracy before and after, in large type."""
  label, numbers = run.headline()
  axes.text(0, 40, numbers, size=34, weight="bold", color=style.TEAL, va="center")
  seconds = run.seconds()
  facts = f"{label}  ·  {max(run.rows):,} steps of RLPR"
  facts += f" in {style.duration(seconds)}" if seconds is not None else ""
  axes.text(0, 76, facts, size=12, color=style.MUTED, va="center")


def point_axes(figure: Figure, total: float, top: float, height: float) -> Axes:
  """Axes over the whole width that count points downwards from `top`."""
  width = WIDTH - 2 * MARGIN
  axes = figure.add_axes((MARGIN / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
  axes.set_xlim(0, width)
  axes.set_ylim(height, 0)
  axes.set_axis_off()
  return axes


def draw_panels(figure: Figure, run: Run, total: float, top: float) -> None:
  """The three curves side by side."""
  shown = [panel for panel in PANELS_SHOWN if any(len(run.series(key)) for key in panel.lines)]
  inner = (WIDTH - 2 * MARGIN) / len(PANELS_SHOWN)
  left_labels, bottom_labels = 46, 38
  for index, panel in enumerate(shown):
    left = MARGIN + index * inner + left_labels
    box = (left, total - top - PANELS + bottom_labels, inner - left_labels - 12, PANELS - bottom_labels - 24)
    axes = figure.add_axes((box[0] / WIDTH, box[1] / total, box[2] / WIDTH, box[3] / total))
    charts.draw_panel(axes, run, panel)
    for (key, label), color in zip(panel.lines.items(), style.cycle(len(panel.lines)), strict=True):
      if len(series := run.series(key)):
        axes.annotate(label, (series.steps[-1], series.values[-1]), ha="right", va="bottom", color=color)
    axes.set_title(panel.title, loc="left", size=11, weight="bold", color=style.INK)


def draw(run: Run) -> bytes:
  """The picture as PNG."""
  rows = gallery.featured(run)
  card = card_blocks(rows) if rows else []
  height = card_height(card)
  total = HEADLINE + PANELS + MARGIN + (height + MARGIN if card else 0)
  figure = Figure(figsize=(WIDTH / 72, total / 72), facecolor=style.PAGE)
  draw_headline(point_axes(figure, total, 0, HEADLINE), run)
  draw_panels(figure, run, total, HEADLINE)
  if card:
    draw_card(point_axes(figure, total, total - height - MARGIN, height), card)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=DPI)
  return buffer.getvalue()


def save_picture(workdir: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """Writes the picture of the run in `workdir` to `path`, and returns it."""
  run = read_run(workdir)
  with matplotlib.rc_context(charts.SETTINGS), warnings.catch_warnings():
    # A response in a script the font lacks becomes boxes, which is no reason to fill the screen.
    warnings.filterwarnings("ignore", message="Glyph")
    content = draw(run)
  write_result(path, content)
  return path
