"""rlpr PROGRAM [--flag=value ...]: the programs of rlpr_jax, as `python -m rlpr_jax.PROGRAM` has them, by one command.

`rlpr PROGRAM --help` lists a program's flags.
"""

import importlib
import sys
from collections.abc import Sequence

import rlpr_jax
from rlpr_jax import interruption
from rlpr_jax.errors import USAGE

PROGRAMS = {
  "train": "trains a policy with RLPR",
  "sft": "supervised steps alone",
  "evaluate": "benchmarks, by rule and by a judge",
  "plan": "whether a run fits chips that are not there, and about how long a step takes",
  "serve": "an OpenAI-compatible server",
  "curate": "questions worth training on",
  "export": "a checkpoint as a Hugging Face directory",
  "diagnose": "what a reward sees, and whether the reasoning matters",
  "view": "a page of a run's curves and rollouts that follows it while it trains",
  "report": "curves and rollouts of a run as one page",
}


def main(argv: Sequence[str] | None = None) -> None:
  """The command: `argv` is its name and its arguments, those of this process if None."""
  words = list(sys.argv if argv is None else argv)[1:]
  name, *arguments = words or ["--help"]
  if name in ("--help", "-help", "-h", "help"):
    lines = [f"  {program:10}{what}" for program, what in PROGRAMS.items()]
    print(__doc__.strip(), "", "Programs:", *lines, sep="\n")
  elif name == "--version":
    print(f"rlpr_jax {rlpr_jax.__version__}")
  elif name in PROGRAMS:
    module = "rlpr_jax.report.__main__" if name == "report" else f"rlpr_jax.{name}"
    interruption.end_at_once()
    try:
      program = importlib.import_module(module).main
    finally:
      interruption.end_as_usual()
    program([f"rlpr {name}", *arguments])
  else:
    print(f"error: {name}: no such program, expected one of {', '.join(PROGRAMS)}", file=sys.stderr)
    sys.exit(USAGE)


if __name__ == "__main__":
  main()
