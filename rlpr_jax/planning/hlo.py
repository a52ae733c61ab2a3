"""Collectives of a compiled program, and its hand-written kernels, read from its text.

A loop's body counts as often as its condition, or the compiler, says that it runs; other loops as often as the caller
says.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_SIZES |= {"s64": 8, "u64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_KIND = re.compile(
  r"\s(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{|branch_computations=\{)=?%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")  # of TPUs: mesh['a'=4,'b'=2] {'b'}
_SCATTER = "all-reduce-scatter"  # what TPUs call a fusion that reduces, and keeps a part on each device
_CONSTANT = re.compile(r"\s*%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
# On TPUs a collective that goes on while others compute stands in what starts it, fusions meanwhile, and what ends it.
_GOES_ON = re.compile(r"%async-collective-done|calls=%async_collective_fusion")
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")

# Targets of calls of hand-written kernels; the only ones that this package has are of attention. Its own have a name.
_KERNELS = {"tpu_custom_call": "splash", "mosaic_gpu": "mosaic_gpu", "__gpu$xla.gpu.triton": "triton"}


class Traffic(NamedTuple):
  """Of one kind of collective."""

  runs: float = 0  # how often it is run
  received: float = 0  # bytes that a device receives from the others of its group, at least
  far: float = 0  # of those, the bytes of groups that reach beyond a slice or host


def traffic(text: str, trips: Sequence[int], far: Callable[[list[int]], bool]) -> dict[str, Traffic]:
  """Bytes that each device receives in one run of a program, by kind.

  Args:
    text: of the compiled program.
    trips: how often loops run that the compiler does not know the length of; then those inside them, and so on.
    far: whether a group of devices, by their places in the mesh, reaches beyond a slice or host.

  >>> lines = ["ENTRY %main (x: f32[8]) -> f32[8] {", "  %y = f32[8] all-reduce(%x), replica_groups={{0,1}}"]
  >>> traffic(chr(10).join(lines), trips=(1,), far=lambda group: False)
  {'all-reduce': Traffic(runs=1, received=32.0, far=0)}
  """
  bodies, entry = _computations(text)
  seen: dict[tuple[str, int], dict[str, Traffic]] = {}

  def of(name: str, depth: int) -> dict[str, Traffic]:
    """`depth`: how many such loops are around it."""
    if (name, depth) not in seen:
      total: dict[str, Traffic] = {}
      for line in bodies.get(name, ()):
        if kind := _KIND.search(line):
          which = "reduce-scatter" if name.startswith(_SCATTER) else kind[1]
          _add(total, {which: _collective(line, which, bool(kind[2]), far, unsplit=which != kind[1])}, 1)
        elif " while(" in line:
          known = _length(line, bodies)
          times = known or trips[min(depth, len(trips) - 1)]
          _add(total, of(_BODY.search(line)[1], depth + (not known)), times)
        elif not _GOES_ON.search(line):
          for called in _CALLED.findall(line):
            _add(total, of(called, depth), 1)
      seen[name, depth] = total
    return seen[name, depth]

  return of(entry, 0)


def kernels(text: str) -> list[str]:
  """Which of the hand-written kernels a program calls, lowered or compiled; none where XLA made all of it.

  >>> kernels('%custom-call.1 = bf16[8,128] custom-call(%x), custom_call_target="tpu_custom_call"')
  ['splash']
  """
  found = set()
  for line in text.splitlines():
    for target, name in _KERNELS.items():
      if re.search(rf'(target="|@"?){re.escape(target)}', line):
        found.add("ragged" if "ragged_attention" in line else name)
  return sorted(found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[1]
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _length(line: str, bodies: dict[str, list[str]]) -> int | None:
  """How often a loop runs: it counts from 0 up to a constant, if its length does not depend on data."""
  if known := _TRIPS.search(line):
    return int(known[1])
  condition = bodies.get(_CONDITION.search(line)[1], [])
  ends = [match[2] for text in condition if (match := _CONSTANT.match(text))]
  compares = [text for text in condition if " compare(" in text]
  if len(ends) != 1 or len(compares) != 1 or "direction=LT" not in compares[0]:
    return None
  return math.ceil(int(ends[0]) / _stride(condition, bodies.get(_BODY.search(line)[1], [])))


def _stride(condition: list[str], body: list[str]) -> int:
  """Step by which a loop's body moves the counter of its condition; 1 where that cannot be seen."""
  places = [match[1] for text in condition if (match := re.search(r" get-tuple-element\(.*index=(\d+)", text))]
  root = next((text for text in body if text.lstrip().startswith("ROOT ") and " tuple(" in text), "")
  state = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
  if len(places) != 1 or int(places[0]) >= len(state):
    return 1
  lines = {match[1]: text for text in body if (match := re.match(r"\s*%([\w.\-]+) =", text))}
  added = re.findall(r"%([\w.\-]+)", lines.get(state[int(places[0])], "").partition(" add(")[2].partition(")")[0])
  steps = [int(match[2]) for name in added if (match := _CONSTANT.match(lines.get(name, "")))]
  return steps[0] if len(steps) == 1 else 1


def _collective(line: str, kind: str, started: bool, far: Callable[[list[int]], bool], unsplit: bool) -> Traffic:
  """`unsplit`: of a reduce-scatter, whether the result in the text is what is reduced, not yet split."""
  arrays = [
    _SIZES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
    for dtype, sizes in _ARRAY.findall(line[line.index("=") : _KIND.search(line).start()])
  ]
  if started and kind != "all-reduce":  # operands, results, and of a permutation tokens
    arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
  group = _group(line)
  size, result_bytes = len(group), sum(arrays)
  share = (size - 1) / size if size else 1
  received = {
    "all-gather": share * result_bytes,
    "all-reduce": 2 * share * result_bytes,  # a reduce-scatter and an all-gather
    "reduce-scatter": share * result_bytes if unsplit else (size - 1) * result_bytes,
    "collective-permute": result_bytes,
  }.get(kind, share * result_bytes)
  return Traffic(1, received, received if far(group) else 0)


def _group(line: str) -> list[int]:
  """The devices of the first group."""
  if match := _IOTA.search(line):
    groups, size = int(match[1]), int(match[2])
    numbers = np.arange(groups * size).reshape([int(x) for x in match[3].split(",")])
    if match[4]:
      numbers = numbers.transpose([int(x) for x in match[4].split(",")])
    return numbers.reshape(groups, size)[0].tolist()
  if match := _MESH.search(line):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    inside = re.findall(r"'([^']+)'", match[2])
    numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return numbers[tuple(slice(None) if name in inside else 0 for name in sizes)].ravel().tolist()
  if match := _LISTS.search(line):
    return [int(x) for x in match[1].split("}")[0].strip("{").split(",") if x]
  if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
    return [int(match[1]), int(match[2])]
  return []


def _add(total: dict[str, Traffic], more: dict[str, Traffic], times: int) -> None:
  for kind, new in more.items():
    old = total.get(kind, Traffic())
    total[kind] = Traffic(*(a + times * b for a, b in zip(old, new, strict=True)))
