"""A checkpoint as a Hugging Face directory: `rlpr export --workdir=RUN --out=DIR [--step=N]`.

transformers, vLLM and the rest load the directory as they load any other. Under LoRA the adapters are merged into the
base; with --adapter they are written alone, as peft loads them.
"""

import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, huggingface
from rlpr_jax import config as configs
from rlpr_jax.errors import InputError, exit_with_one_line
from rlpr_jax.policy import load_policy
from rlpr_jax.runs.checkpoints import restore_params


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    given = command_line.parse(define_flags(), argv, __doc__)
    for name in ("workdir", "out"):
      if not given[name].value:
        raise InputError(f"--{name}: missing, expected a directory")
    export(pathlib.Path(given.workdir), pathlib.Path(given.out), given.step, given.dtype, given.adapter)


def export(workdir: pathlib.Path, out: pathlib.Path, step: int | None, dtype: str, adapter: bool) -> None:
  """Writes the policy of one checkpoint of `workdir` to `out`.

  Raises:
    InputError: no run, no such checkpoint, an `out` that is there already, or adapters of a run that has none.
  """
  config = read_config(workdir)
  policy = load_policy(config)
  if adapter and not config.lora.rank:
    raise InputError(f"--adapter: the run in {workdir} trained all parameters, it has no adapters")
  step, params = restore_params(workdir, step, policy.trained)
  if adapter:
    huggingface.save_adapter(out, policy.config, params, base=config.model.path, tokenizer=policy.tokenizer)
  else:
    assert policy.turn_end is not None
    generation = huggingface.load_generation(huggingface.resolve(config.model.path)) if config.model.path else {}
    huggingface.save_pretrained(
      out,
      policy.config,
      policy.merged_params(params),
      policy.tokenizer,
      jnp.dtype(dtype),
      generation=huggingface.with_eos(generation, policy.turn_end.eos_ids),
    )
  print(f"wrote {'the adapters' if adapter else 'the policy'} of step {step} to {out}")


def read_config(workdir: pathlib.Path) -> ConfigDict:
  """The config of the run in `workdir`, on the devices that are here instead of those it was trained on."""
  config = configs.read(workdir / "config.json")
  config.mesh = configs.default().mesh
  return config


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=given)
  flags.DEFINE_string("out", None, "Directory to write; new or empty.", flag_values=given)
  flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.", flag_values=given)
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights in the files.", flag_values=given)
  flags.DEFINE_bool("adapter", False, "Write a LoRA run's adapters alone, for peft.", flag_values=given)
  return given


if __name__ == "__main__":
  main()
