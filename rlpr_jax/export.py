"""A checkpoint as a Hugging Face directory, with its card: `rlpr export --workdir=RUN --out=DIR [--step=N]`.

transformers, vLLM and the rest load the directory as they load any other. Under LoRA the adapters are merged into the
base; with --adapter they are written alone, as peft loads them. `--push=org/name` sends the directory to the hub too,
or without --out to the hub alone: to a private repository unless --public is given, by the token in HF_TOKEN.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

import rlpr_jax
from rlpr_jax import command_line, huggingface
from rlpr_jax import config as configs
from rlpr_jax.errors import InputError, MachineError, exit_with_one_line, trouble
from rlpr_jax.evaluation.summary import accuracy_tables
from rlpr_jax.policy import load_policy
from rlpr_jax.report import card, records
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.runs.inputs import read_inputs
from rlpr_jax.runs.storage import reason


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    given = command_line.parse(define_flags(), argv, __doc__)
    if not given.workdir:
      raise InputError("--workdir: missing, expected a directory")
    if not given.out and not given.push:
      raise InputError("--out: missing, expected a directory, or --push=org/name")
    if given.public and not given.push:
      raise InputError("--public: of what is pushed, expected --push=org/name with it")
    export(
      pathlib.Path(given.workdir),
      pathlib.Path(given.out) if given.out else None,
      given.step,
      given.dtype,
      given.adapter,
      given.push or "",
      given.public,
      pathlib.Path(given.evaluation) if given.evaluation else None,
    )


def export(
  workdir: pathlib.Path,
  out: pathlib.Path | None,
  step: int | None,
  dtype: str,
  adapter: bool,
  push: str = "",
  public: bool = False,
  evaluation: pathlib.Path | None = None,
) -> None:
  """Writes the policy of one checkpoint of `workdir` to `out`, to the hub, or to both.

  Args:
    out: None for the hub alone.
    push: `org/name` there; "" for not at all.
    public: whether a repository that is new there can be seen by all.
    evaluation: a summary.json of `rlpr evaluate`, for the card.

  Raises:
    InputError: no run, no such checkpoint, an `out` that is there already, adapters of a run that has none, a hub that
      refuses.
    MachineError: the hub cannot be reached.
  """
  config = read_config(workdir)
  if push:
    huggingface.check_account("--push", push)
  figures = read_evaluation(evaluation) if evaluation else ""
  policy = load_policy(config)
  if adapter and not config.lora.rank:
    raise InputError(f"--adapter: the run in {workdir} trained all parameters, it has no adapters")
  step, params = restore_params(workdir, step, policy.trained)
  with contextlib.ExitStack() as held:
    directory = out or _temporary_directory(workdir, held) / "model"
    name = push.rpartition("/")[2] or directory.resolve().name
    others = write_card(workdir, config, name, step, adapter, figures)
    if adapter:
      huggingface.save_adapter(directory, policy.config, params, config.model.path, policy.tokenizer, others)
    else:
      assert policy.turn_end is not None
      generation = huggingface.load_generation(huggingface.resolve(config.model.path)) if config.model.path else {}
      huggingface.save_pretrained(
        directory,
        policy.config,
        policy.merged_params(params),
        policy.tokenizer,
        jnp.dtype(dtype),
        generation=huggingface.with_eos(generation, policy.turn_end.eos_ids),
        others=others,
      )
    what = f"{'the adapters' if adapter else 'the policy'} of step {step}"
    if out:
      print(f"wrote {what} to {out}", flush=True)
    if push:
      try:
        address = huggingface.push("--push", push, directory, f"Step {step}, by rlpr_jax", private=not public)
      except (InputError, MachineError) as error:
        raise type(error)(f"{error}{f'; {out} itself is whole' if out else ''}") from None
      print(f"pushed {what} to {push}: {address}", flush=True)


def _temporary_directory(workdir: pathlib.Path, held: contextlib.ExitStack) -> pathlib.Path:
  """A directory on the disk of the run, where there is room for a model; it is gone when `held` ends."""
  try:
    return pathlib.Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".export-", dir=workdir)))
  except OSError as error:
    raise trouble(error, f"{workdir}: cannot be written ({reason(error)}), expected --out=DIR with --push") from None


def write_card(
  workdir: pathlib.Path, config: ConfigDict, name: str, step: int, adapter: bool, evaluation: str
) -> dict[str, bytes]:
  """README.md of a model and the picture in it, by their names."""
  inputs = read_inputs(workdir)
  rows = {row["step"]: row for row in metrics.read(workdir / "metrics.jsonl") if row["step"] <= step}
  run = records.Run(name, rows, config=json.loads(configs.to_json(config)), rollouts=[], unreadable=0)
  text = card.model_card(
    name,
    run,
    step,
    inputs.program if inputs else "train",
    versions={
      "rlpr_jax": rlpr_jax.__version__,
      **{package: importlib.metadata.version(package) for package in ("jax", "flax", "transformers")},
      "Python": platform.python_version(),
    },
    commit=source_commit(),
    adapter=adapter,
    evaluation=evaluation,
  )
  curve = card.draw_curve(run)
  return {"README.md": text.encode(), **({card.CURVE: curve} if curve else {})}


def source_commit() -> str:
  """The commit of the checkout that this package runs from, `-dirty` where it was changed; "" of an installed one."""
  root = pathlib.Path(__file__).parents[1]
  if not (root / ".git").exists():
    return ""
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return ""


def read_evaluation(path: pathlib.Path) -> str:
  """Figures of an evaluation for the card, in Markdown.

  Raises:
    InputError: it is no summary.json of `rlpr evaluate`.
  """
  expected = f"--evaluation: {path}: expected the summary.json of rlpr evaluate"
  try:
    return "\n\n".join(accuracy_tables(json.loads(path.read_text()), "###"))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{expected} ({reason(error)})") from None
  except (AttributeError, KeyError, TypeError) as error:
    raise InputError(f"{expected} ({type(error).__name__}: {error})") from None


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
  flags.DEFINE_string(
    "push", None, "Repository of the hub, org/name, to send it to, by the token in HF_TOKEN.", flag_values=given
  )
  flags.DEFINE_bool("public", False, "Make a repository that is new there public.", flag_values=given)
  flags.DEFINE_string("evaluation", None, "A summary.json of rlpr evaluate, for the card.", flag_values=given)
  return given


if __name__ == "__main__":
  main()
