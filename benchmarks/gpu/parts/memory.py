"""Memory that an update and decoding take, beside what the plan of the same programs says."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.gpu.measure import GIB, peak_bytes, unless_too_large
from benchmarks.gpu.parts import decode, update
from benchmarks.gpu.report import Report
from rlpr_jax import config as configs
from rlpr_jax.models import ModelConfig
from rlpr_jax.planning import compiler, estimate, hardware, programs
from rlpr_jax.planning.programs import Program

SLOTS = 128


def run(report: Report) -> None:
  config, model, slots = _config(report.rehearse)
  place = hardware.parse("local")
  layout = programs.place_on_slice(config, model, place)
  made: dict[str, Callable[[], Program]] = {
    # That with the smaller peak first: a device tells its highest alone.
    "decode": lambda: programs.rollout_programs(layout, slots)["decode"],
    "update": lambda: programs.update_programs(layout, config.training.micro_batch_rows)["update"],
  }
  before = 0
  for name, make in made.items():
    report.say(f"compiling {name}")
    program = make()
    said = compiler.compile_program(name, program, place, lambda group: False, None)
    planned = estimate.memory_peak(program, said) - program.beside
    columns = {"program": name, "planned GiB": planned / GIB, "of it temporaries": said.temporary / GIB}
    with unless_too_large(report, name):
      report.say(f"running {name}")
      _run(program)
      used = peak_bytes()
      if used is not None and used <= before:
        report.note(f"{name}: its peak is hidden by that of what ran before it")
        used = None
      columns |= {"used GiB": used and used / GIB, "used over planned": used and used / planned}
      before = used or before
    report.row("memory", columns)
  if peak_bytes() is None:
    report.note("this device does not say how much of its memory was used")
  report.note(
    f"planned: arguments, results and temporaries as the compiler says (rlpr_jax.plan --topology=local); used: the most"
    f" that the device's allocator had given out. Decoding of {slots} slots at the longest texts; the update of rows of"
    f" {config.training.row_length} tokens, {config.training.micro_batch_rows} at once"
  )


def _config(rehearse: bool) -> tuple[ConfigDict, ModelConfig, int]:
  """A config with the shapes of the parts `decode` and `update`."""
  of_update, of_decode = update.sizes(rehearse), decode.sizes(rehearse)
  slots = 8 if rehearse else SLOTS
  config = configs.default()
  config.model.compute_dtype = decode.DTYPE
  config.data.prompt_limit, config.rollout.max_response_length = of_decode.prompt_limit, of_decode.response_limit
  config.rollout.slots, config.rollout.decode_steps = slots, of_decode.steps
  config.prompts_per_step, config.training.minibatches = max(of_update.rows // 8, 1), 1
  config.training.row_length, config.training.micro_batch_rows = of_update.row_length, of_update.micro_batch_rows
  return config, of_update.config, slots


def _run(program: Program) -> None:
  """Runs a program on ones."""
  compiled = program.trace().lower().compile()
  shapes = jax.tree.unflatten(compiled.in_tree, jax.tree.leaves(compiled.in_avals))
  args, kwargs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  jax.block_until_ready(compiled(*args, **kwargs))
