"""The viewer's HTTP server: GET alone, on 127.0.0.1 alone, and nothing is served by its path in the file system."""

import contextlib
import http.server
import importlib.resources
import pathlib
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

import numpy as np

from rlpr_jax.errors import InputError
from rlpr_jax.report import style
from rlpr_jax.report.records import Json
from rlpr_jax.viewer import cards
from rlpr_jax.viewer.curves import Curves
from rlpr_jax.viewer.index import Index, column_names, mean_of
from rlpr_jax.viewer.query import Searches, dump, order, page_of, read_query, select

LIMIT = 100  # rollouts that a page of the list has
GROUP_LIMIT = 256  # responses that are shown side by side
# A page of another site can neither read these answers nor show them in a frame, and text that a model wrote can
# neither run nor fetch anything even if it were to get past the escaping.
HEADERS = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
}
# Also through a tunnel, which may have another port; another name may be that of a site which points here.
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")

Parameters = dict[str, list[str]]


class Answer(NamedTuple):
  """What is sent."""

  kind: str  # of its content
  content: bytes


class NotThereError(LookupError):
  """There is no such page, or no such rollout any more. The message is one line."""


def json_answer(content: object) -> Answer:
  return Answer("application/json", dump(content))


class Viewer:
  """A run that is looked at. Its answers may be asked for by several threads; they look one after the other."""

  def __init__(self, workdir: pathlib.Path):
    self.name = workdir.resolve().name
    self.curves = Curves(workdir / "metrics.jsonl", self.name)
    self.index = Index(workdir / "rollouts")
    self._searches = Searches(self.index)
    self._watched = (workdir / "metrics.jsonl", workdir / "rollouts")
    self._lock = threading.Lock()
    self._pages: dict[str, Callable[[Parameters], Answer]] = {
      "/": lambda _: asset("page.html", "text/html"),
      "/page.js": lambda _: asset("page.js", "text/javascript"),
      "/page.css": lambda _: asset("page.css", "text/css", before=style.CSS),
      "/api/run": self.run,
      "/api/curves": self.draw,
      "/api/rollouts": self.rollouts,
      "/api/rollout": self.rollout,
      "/api/group": self.group,
      "/api/row": self.row,
    }

  def answer(self, path: str, query: str) -> Answer:
    """Answers a request.

    Raises:
      NotThereError: there is no such page, or no such rollout.
      InputError: parameters that cannot be.
    """
    page = self._pages.get(path)
    if page is None:
      raise NotThereError(f"{path}: no such page")
    with self._lock:
      return page(urllib.parse.parse_qs(query, keep_blank_values=True))

  def run(self, _: Parameters) -> Answer:
    """What there is: a page asks for this every few seconds, and for more where a version has changed."""
    behind = self.curves.look()
    behind = self.index.look() or behind
    table = self.index.table()
    steps = table.columns.get("step", np.zeros(0))
    steps = steps[np.isfinite(steps)]
    return json_answer(
      {
        "name": self.name,
        "step": self.curves.last_step(),
        "curves": self.curves.version,
        "rollouts": self.index.version,
        "count": len(table),
        "steps": [int(steps.min()), int(steps.max())] if len(steps) else None,
        "columns": column_names(table),
        "sources": sorted(filter(None, table.sources)),
        "damaged": self.index.damaged + self.curves.damaged,
        "behind": behind,
        "age": self._age(),
      }
    )

  def _age(self) -> float | None:
    """Seconds since the run wrote something that is shown."""
    times = []
    for path in self._watched:
      with contextlib.suppress(OSError):
        times.append(path.stat().st_mtime)
    return max(time.time() - max(times), 0.0) if times else None

  def draw(self, _: Parameters) -> Answer:
    """All curves."""
    return json_answer({"version": self.curves.version, **self.curves.draw()})

  def rollouts(self, parameters: Parameters) -> Answer:
    """A page of the rollouts that are asked for: from `offset` on, or the page that shows `id`."""
    query = read_query(parameters)
    table = self.index.table()
    places, waiting = select(table, query), 0
    if query.words:
      places, waiting = self._searches.search(places, query.words)
    places = order(table, places, query)
    limit = read_count(parameters, "limit", LIMIT)
    if not 0 < limit <= LIMIT:
      raise InputError(f"limit={limit}: expected 1 to {LIMIT}")
    offset = read_count(parameters, "offset", 0)
    if "id" in parameters:
      offset = page_of(places, table.find(parameters["id"][-1]), limit)
    shown = places[offset : offset + limit]
    rows = self.index.read(shown)
    numbers = {name: values[shown] for name, values in table.columns.items()}
    return json_answer(
      {
        "total": len(table),
        "matched": len(places),
        "waiting": waiting,
        "means": {name: mean_of(table.columns, name, places) for name in ("reward_total", "gain", "length")},
        "offset": offset,
        "version": self.index.version,
        "rows": [
          {
            "id": table.id(place),
            "group": int(table.group[place]),
            "numbers": {name: float(values[i]) for name, values in numbers.items() if np.isfinite(values[i])},
            **cards.summary(rows.get(int(place), {})),
          }
          for i, place in enumerate(shown)
        ],
      }
    )

  def rollout(self, parameters: Parameters) -> Answer:
    """One rollout as HTML."""
    place, row = self._find(parameters)
    table = self.index.table()
    responses = int((table.group == table.group[place]).sum())
    card = cards.rollout(row, read_color(parameters))
    return json_answer({"id": table.id(place), "responses": responses, "html": card})

  def group(self, parameters: Parameters) -> Answer:
    """All responses to the prompt of one, side by side, as HTML."""
    place, _ = self._find(parameters)
    table = self.index.table()
    places = np.flatnonzero(table.group == table.group[place])[:GROUP_LIMIT]
    rows = [(table.id(place), row) for place, row in self.index.read(places).items()]
    return json_answer(
      {
        "id": table.id(place),
        "responses": len(rows),
        "html": cards.group(rows, table.id(place), read_color(parameters)),
      }
    )

  def row(self, parameters: Parameters) -> Answer:
    """One rollout as the run wrote it, but for numbers that are not finite."""
    _, row = self._find(parameters)
    return json_answer(row)

  def _find(self, parameters: Parameters) -> tuple[int, Json]:
    table = self.index.table()
    id = parameters.get("id", [""])[-1]
    place = table.find(id)
    row = self.index.read([place]).get(place) if place is not None else None
    if place is None or row is None:
      raise NotThereError(f"{id!r}: no such rollout, or none any more")
    return place, row


def read_count(parameters: Parameters, name: str, default: int) -> int:
  """A whole number of an address, 0 or more.

  Raises:
    InputError: it is none.

  >>> read_count({"offset": ["200"]}, "offset", 0)
  200
  """
  value = parameters.get(name, [str(default)])[-1]
  if not (value.isascii() and value.isdigit() and len(value) < 10):
    raise InputError(f"{name}={value}: expected a whole number")
  return int(value)


def read_color(parameters: Parameters) -> str:
  """What colours the tokens of a reference.

  Raises:
    InputError: nothing can.
  """
  color = parameters.get("color", ["r"])[-1]
  if color not in cards.COLORS:
    raise InputError(f"color={color}: expected one of {', '.join(cards.COLORS)}")
  return color


def asset(name: str, kind: str, before: str = "") -> Answer:
  """A file of this package, which the page is made of, behind what it goes on from."""
  content = importlib.resources.files(__name__.rpartition(".")[0]).joinpath(name).read_bytes()
  return Answer(f"{kind}; charset=utf-8", before.encode() + content)


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection of a browser."""

  protocol_version = "HTTP/1.1"
  timeout = 60  # seconds that a connection may be idle
  server: "Server"

  def do_GET(self) -> None:
    """Answers, or says in one line why not."""
    path, _, query = self.path.partition("?")
    if not HOST.fullmatch(self.headers.get("Host", "")):
      self._send(HTTPStatus.FORBIDDEN, Answer("text/plain", b"expected 127.0.0.1 or localhost as host\n"))
      return
    try:
      self._send(HTTPStatus.OK, self.server.viewer.answer(path, query))
    except NotThereError as error:
      self._send(HTTPStatus.NOT_FOUND, json_answer({"error": str(error.args[0])}))
    except InputError as error:
      self._send(HTTPStatus.BAD_REQUEST, json_answer({"error": str(error)}))

  def _send(self, status: HTTPStatus, answer: Answer) -> None:
    self.send_response(status)
    for name, value in {"Content-Type": answer.kind, "Content-Length": str(len(answer.content)), **HEADERS}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(answer.content)

  def log_message(self, format: str, *args: object) -> None:
    """Says nothing: a page asks every few seconds."""

  def version_string(self) -> str:
    return "rlpr_jax"


class Server(socketserver.ThreadingTCPServer):
  """Serves one run on this machine's own address; threads end with the program."""

  daemon_threads = True
  allow_reuse_address = True

  def __init__(self, port: int, viewer: Viewer):
    """
    Args:
      port: 0 for any that is free.

    Raises:
      OSError, OverflowError: it cannot be had.
    """
    self.viewer = viewer
    super().__init__(("127.0.0.1", port), Handler)

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}/"

  def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
    """A browser that goes away is no news; all else is, with its trace."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)
