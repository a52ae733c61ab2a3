"""Measures one NVIDIA GPU, part by part, in minutes and with no network:

    PYTHONPATH=. python -m benchmarks.gpu --out=DIR [--minutes=8] [--only=decode,update] [--cache=DIR] [--rehearse]

Prints one Markdown document and writes it beside its JSON to DIR. Status 0: every part passed, or was skipped for lack
of a package; 1: one failed or had no time; 2: wrong input. docs/gpu.md says how to read it.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from benchmarks.gpu import runner, table
from rlpr_jax.errors import InputError, exit_with_one_line


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string("out", "", "directory for results.json, results.md, log.txt and small traces", flag_values=given)
  flags.DEFINE_float("minutes", 8.0, "for everything", lower_bound=0.25, flag_values=given)
  flags.DEFINE_list("only", [], f"parts, of {', '.join(part.name for part in runner.PARTS)}", flag_values=given)
  flags.DEFINE_string("cache", "", "directory of compiled programs, kept for the next time", flag_values=given)
  flags.DEFINE_bool("rehearse", False, "tiny sizes, to see that everything runs; also on a CPU", flag_values=given)
  return given


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads a command line; prints help and exits where that is asked for.

  Raises:
    InputError: an unknown flag, a wrong value, or something that is no flag.
  """
  given = define_flags()
  if any(word.lstrip("-") in ("help", "h") for word in argv[1:]):
    print(__doc__ + given.get_help())
    sys.exit(0)
  try:
    rest = given(argv)[1:]
  except flags.Error as error:
    raise InputError(" ".join(str(error).split())) from None
  if rest:
    raise InputError(f"{rest[0]}: unexpected argument, expected flags (--help lists them)")
  if not given.out:
    raise InputError("--out: missing, expected a directory")
  return given


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
  with exit_with_one_line():
    given = parse(argv)
    parts = runner.choose(given.only)
    out = pathlib.Path(given.out).absolute()
    try:
      out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"--out: {out} cannot be made ({error.strerror})") from None
    results = runner.run_all(parts, out, given.minutes, given.cache, given.rehearse, runner.child, say)
  print(table.render(results), end="")
  sys.exit(0 if runner.passed(results) else 1)


if __name__ == "__main__":
  main(sys.argv)
