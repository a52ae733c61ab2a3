"""Whether a config fits a slice, which slots and micro-batch would fit it best, and what a step would take."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from rlpr_jax import sharding
from rlpr_jax.models import ModelConfig
from rlpr_jax.planning import estimate, programs
from rlpr_jax.planning.compiler import Compiled, compile_program
from rlpr_jax.planning.estimate import Lengths, Sizes
from rlpr_jax.planning.hardware import Slice
from rlpr_jax.planning.programs import Layout, Program
from rlpr_jax.training.reward import looks_at_answers
from rlpr_jax.training.settings import row_length, text_row_length, update_settings

_STEP = 8  # slots of a part of the mesh are proposed in such steps
Say = Callable[[str], None]


class Planner:
  """Compiles a config's programs for one slice."""

  def __init__(
    self,
    config: ConfigDict,
    model_config: ModelConfig,
    place: Slice,
    cache: pathlib.Path | None,
    say: Say,
  ):
    self.started = time.perf_counter()
    self.config, self.place = config, place
    self.cache, self.say = cache, say
    self.layout = programs.place_on_slice(config, model_config, place)
    self.flat = flat_layout(config, model_config, self.layout.processes)
    mesh = self.layout.policy.sharding.mesh
    self.devices = [] if mesh is None else list(mesh.devices.flat)

  def far(self, group: list[int]) -> bool:
    """Whether a group of the update's devices reaches beyond a slice, or a host of GPUs."""
    if self.place.chip is None or not group or max(group) >= len(self.devices):
      return False
    if self.place.chip.platform == "tpu":
      return len({getattr(self.devices[i], "slice_index", 0) or 0 for i in group}) > 1
    return len({i // self.place.shape[-1] for i in group}) > 1

  def compile(self, name: str, program: Program) -> Compiled:
    """Says what it does, since it may take minutes."""
    self.say(f"compiling {name}")
    return compile_program(name, program, self.place, self.far, cache=self.cache)

  def fits(self, program: Program, compiled: Compiled) -> bool:
    return not compiled.refused and estimate.memory_peak(program, compiled) <= self.place.granted

  def most(
    self,
    make: Callable[[int], Program],
    name: str,
    tried: dict[int, Compiled],
    limit: int,
    round_down: Callable[[int], int],
  ) -> tuple[int, Compiled | None]:
    """The most of something up to a limit, slots or rows in each part, whose program fits; 0 if not even one does.

    Memory grows in proportion, so two are compiled and the rest follows from them; what comes out is compiled too.

    Args:
      make: the program for so many.
      tried: what was compiled already, with the number to begin with alone.
      limit: more are not wanted.
      round_down: to numbers that are proposed.

    Returns:
      how many, and what the compiler said of them.
    """

    def fits(count: int) -> bool:
      program = make(count)
      if count not in tried:
        tried[count] = self.compile(f"{name} of {count}", program)
      return self.fits(program, tried[count])

    few = min(next(iter(tried)), limit)
    if not fits(few):
      few = 1
      if not fits(1):
        return 0, None
    more = min(few + max(few // 2, 1), limit)
    if more <= few or not fits(more):
      return few, tried[few]
    peaks = [estimate.memory_peak(make(count), tried[count]) for count in (few, more)]
    each = max((peaks[1] - peaks[0]) / (more - few), 1)
    best = round_down(min(int(more + (self.place.granted - peaks[1]) / each), limit))
    while best > more and not fits(best):
      best = round_down(best - 1)
    best = max(best, more)
    return best, tried[best]


def attention_of(name: str, compiled: Compiled) -> str:
  """The attention that a program was compiled with: a kernel, or that of plain XLA; "" where there is none.

  >>> compiled = Compiled("", peak=20, temporary=0, traffic={}, kernels=["splash"], seconds=1.0)
  >>> attention_of("decode", compiled), attention_of("gather", compiled)
  ('splash', '')
  """
  if name in programs.WITHOUT_ATTENTION:
    return ""
  return ", ".join(compiled.kernels) or "xla"


def flat_layout(config: ConfigDict, model_config: ModelConfig, processes: int) -> Layout:
  """The planner of one device with plain attention, in whose programs products are counted."""
  flat = config.copy_and_resolve_references()
  flat.model.attention = flat.model.decode_attention = "xla"
  flat.mesh.update(data=1, fsdp=1, tensor=1)
  mesh = sharding.create_mesh(1, 1, 1, devices=jax.devices("cpu")[:1])
  return programs.place_on_mesh(flat, model_config, mesh, mesh)._replace(processes=processes)


def plan(planner: Planner, lengths: Lengths, search: bool) -> dict[str, Any]:
  """Plans a config's step on a slice, as JSON; sizes in bytes a device, times in seconds."""
  layout, place = planner.layout, planner.place
  config = planner.config
  num_shards, own_shards = (
    layout.policy.sharding.num_shards("batch"),
    layout.sampler.sampling.sharding.num_shards("batch"),
  )
  slots = config.rollout.slots // layout.processes
  micro = update_settings(config, layout.policy.sharding).micro_batch_rows
  all_programs = programs.rollout_programs(layout, slots) | programs.update_programs(layout, micro)
  compiled = {name: planner.compile(name, program) for name, program in all_programs.items()}
  fits = {name: planner.fits(program, compiled[name]) for name, program in all_programs.items()}
  mesh = layout.policy.sharding.mesh
  counted = programs.rollout_programs(planner.flat, slots) | programs.update_programs(planner.flat, micro)
  operations = estimate.count_flops(counted)
  figures = {
    "topology": place.name,
    "chips": place.chips,
    "processes": layout.processes,
    "mesh": dict(mesh.shape) if mesh is not None else {},
    "granted": place.granted,
    "level": jax.config.jax_optimization_level,
    "fits": all(fits.values()),
    "slots": config.rollout.slots,
    "micro_batch_rows": micro,
    "programs": {
      name: {
        "fits": fits[name],
        "refused": compiled[name].refused,
        "peak": 0 if compiled[name].refused else estimate.memory_peak(program, compiled[name]),
        "parts": program.parts,
        "temporary": compiled[name].temporary,
        "operations": operations.get(name, 0),
        "devices": estimate.count_devices(layout, name),
        "attention": attention_of(name, compiled[name]),
        "collectives": {kind: traffic._asdict() for kind, traffic in compiled[name].traffic.items()},
      }
      for name, program in all_programs.items()
    },
    "lengths": lengths._asdict(),
    "step": step_of(planner, lengths, slots, micro, compiled=compiled),
  }
  if search:
    wanted_slots, wanted_rows = fastest(planner, lengths, slots, micro, compiled=compiled)
    best_rows, update = planner.most(
      make=lambda rows: programs.update_programs(layout, rows * num_shards)["update"],
      name="update",
      tried={max(micro // num_shards, 1): compiled["update"]},
      limit=wanted_rows // num_shards,
      round_down=lambda rows: 2 ** (rows.bit_length() - 1) if rows else 0,
    )
    # Of the programs of a rollout, what decoding leaves room for may be too much for another one.
    needed = {name: program["peak"] for name, program in figures["programs"].items() if name != "update"}
    spare = max(needed.values()) - needed["decode"] if all(needed.values()) else 0

    def decoding(count: int) -> Program:
      program = programs.rollout_programs(layout, count * own_shards)["decode"]
      return program._replace(beside=program.beside + spare)

    best_slots, decode = planner.most(
      make=decoding,
      name="decode",
      tried={max(slots // own_shards, 1): compiled["decode"]},
      limit=wanted_slots // own_shards,
      round_down=lambda count: count - count % _STEP if count > _STEP else count,
    )
    used = best_slots * own_shards, best_rows * num_shards
    figures["best"] = {"slots": used[0] * layout.processes, "micro_batch_rows": used[1]}
    if update and decode:
      figures["best"]["step"] = step_of(planner, lengths, *used, compiled | {"update": update, "decode": decode})
  figures["seconds"] = time.perf_counter() - planner.started
  return figures


def fastest(
  planner: Planner, lengths: Lengths, slots: int, micro_batch_rows: int, compiled: dict[str, Compiled]
) -> tuple[int, int]:
  """Slots of a process and rows of a micro-batch with which the estimated step is shortest, were there memory for them;
  all that are of use for a chip whose rates are not known.

  Args:
    slots, micro_batch_rows: which `compiled` has.
  """
  layout, config = planner.layout, planner.config
  chip = planner.place.chip
  num_shards, own_shards = (
    layout.policy.sharding.num_shards("batch"),
    layout.sampler.sampling.sharding.num_shards("batch"),
  )
  responses = config.rollout.prompts_per_draw * config.samples_per_prompt // layout.processes
  most_slots = max(responses // own_shards, 1)
  most_rows = max(config.prompts_per_step // config.training.minibatches * config.samples_per_prompt // num_shards, 1)
  if chip is None:
    return most_slots * own_shards, most_rows * num_shards
  operations, sizes = count(planner, lengths, slots, micro_batch_rows)

  queue_of = functools.cache(lambda slots_then: estimate.queue_of(layout, lengths, slots_then))

  def seconds(slots_then: int, rows_then: int) -> float:
    more_slots, more_rows = slots_then / slots, rows_then / micro_batch_rows
    scaled = {"decode": operations["decode"] * more_slots, "update": operations["update"] * more_rows}
    then = sizes._replace(slots=slots_then, slot_bytes=sizes.slot_bytes * more_slots, micro_batch_rows=rows_then)
    parts = estimate.rooflines(
      layout,
      chip=chip,
      lengths=lengths,
      sizes=then,
      decoding=queue_of(slots_then),
      operations=operations | scaled,
      compiled=compiled,
    )
    return sum(part.seconds for part in parts.values())

  each = range(_STEP, most_slots + 1, _STEP) if most_slots > _STEP else range(1, most_slots + 1)
  powers = [2**i for i in range(most_rows.bit_length())]
  return (
    min((own_shards * n for n in each), key=lambda n: seconds(n, micro_batch_rows)),
    min((num_shards * n for n in powers), key=lambda n: seconds(slots, n)),
  )


def count(planner: Planner, lengths: Lengths, slots: int, micro_batch_rows: int) -> tuple[dict[str, int], Sizes]:
  """Operations of each program for texts of these lengths, and the sizes of the run."""
  config, exchanged = planner.config, None
  if looks_at_answers(config):
    exchanged = estimate.exchanged(planner.layout, lengths)
  share = exchanged.counted if exchanged else 1.0
  extent = programs.extent_of(planner.layout, lengths.prompt, lengths.reference, share)
  counted = programs.rollout_programs(planner.flat, slots, extent)
  packed = estimate.packed(planner.layout, lengths)
  update = programs.update_programs(planner.flat, micro_batch_rows, packed.counted)
  operations = estimate.count_flops(counted | update)
  if planner.place.chip is not None and planner.place.chip.platform == "tpu":
    flat, length = planner.flat, row_length(config)
    operations["update"] -= round(estimate.skipped_attention(flat, micro_batch_rows, length, packed.visible))
    if exchanged:
      rows, length = config.rollout.score_rows, text_row_length(config)
      skipped = estimate.skipped_attention(flat, rows, length, exchanged.visible, trained=False)
      operations["exchange"] -= round(skipped)
  slot_bytes = programs.rollout_programs(planner.layout, slots)["decode"].parts["slots"]
  return operations, Sizes(slots, slot_bytes, micro_batch_rows, exchanged.rows if exchanged else 0.0)


def step_of(
  planner: Planner, lengths: Lengths, slots: int, micro_batch_rows: int, compiled: dict[str, Compiled]
) -> dict[str, Any] | None:
  """The estimate of a step's time; None for a chip whose rates are not known."""
  chip = planner.place.chip
  if chip is None:
    return None
  operations, sizes = count(planner, lengths, slots, micro_batch_rows)
  decoding = estimate.queue_of(planner.layout, lengths, slots)
  parts = estimate.rooflines(
    planner.layout,
    chip=chip,
    lengths=lengths,
    sizes=sizes,
    decoding=decoding,
    operations=operations,
    compiled=compiled,
  )
  seconds = sum(part.seconds for part in parts.values())
  return {
    "micro_batches": estimate.micro_batches(planner.layout, micro_batch_rows, lengths),
    "occupancy": decoding.occupancy(slots),
    "parts": {name: part._asdict() | {"seconds": part.seconds} for name, part in parts.items()},
    "seconds": seconds,
    "device_hours": seconds * planner.config.steps * planner.place.chips / 3600,
  }
