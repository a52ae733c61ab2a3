"""Where a device's time goes, from the trace.json.gz that jax.profiler writes."""

import collections
import gzip
import json
import pathlib
from typing import NamedTuple


class Kernel(NamedTuple):
  """All runs of the kernels of one name."""

  name: str
  runs: int
  seconds: float  # in total, without what ran inside them on the same line of the trace
  source: str  # the operation of the program that one of them is part of; "" where the trace does not say


def find(directory: pathlib.Path) -> pathlib.Path:
  """The trace of a directory that `jax.profiler.trace` wrote to.

  Raises:
    ValueError: there is none.
  """
  found = sorted(directory.glob("plugins/profile/*/*.trace.json.gz"))
  if not found:
    raise ValueError(f"{directory}: no plugins/profile/*/*.trace.json.gz, expected what jax.profiler writes")
  return found[-1]


def kernels(file: pathlib.Path) -> list[Kernel]:
  """The device's kernels, that with the most time first.

  On a GPU they are the events of its streams; the other lines of the trace there (modules, operations, steps) say the
  same once more. Without a GPU they are the events of XLA's threads.

  Raises:
    ValueError: there are none.
  """
  with gzip.open(file) as stream:
    events = json.load(stream)["traceEvents"]
  processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
  threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
  on_gpu = {line for line in threads if "/device:GPU" in processes.get(line[0], "")}
  begins = "Stream" if on_gpu else "tf_XLA"
  lines = {line for line in on_gpu or threads if threads[line].startswith(begins)}
  by_line = collections.defaultdict(list)
  for event in events:
    if event.get("ph") == "X" and (event["pid"], event.get("tid")) in lines:
      by_line[event["pid"], event["tid"]].append(event)
  if not by_line:
    raise ValueError(f"{file}: no events on lines {begins}*, expected kernels; lines are {sorted(threads.values())}")
  totals: dict[str, Kernel] = {}
  for line in by_line.values():
    for event, own in _own_times(line):
      old = totals.get(event["name"], Kernel(event["name"], 0, 0.0, ""))
      source = old.source or event.get("args", {}).get("name", "") or event.get("args", {}).get("hlo_op", "")
      totals[event["name"]] = Kernel(old.name, old.runs + 1, old.seconds + own / 1e6, source)
  return sorted(totals.values(), key=lambda kernel: -kernel.seconds)


def _own_times(events: list[dict]) -> list[tuple[dict, float]]:
  """Each event of one line with its microseconds, less those of events inside it."""
  own, open_ = [], []
  for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0))):
    while open_ and own[open_[-1]][0]["ts"] + own[open_[-1]][0].get("dur", 0) <= event["ts"]:
      open_.pop()
    if open_:
      outer, microseconds = own[open_[-1]]
      own[open_[-1]] = outer, microseconds - event.get("dur", 0)
    open_.append(len(own))
    own.append((event, event.get("dur", 0)))
  return own
