"""Writes WORKDIR/report.html, and a picture of the run if asked for: `rlpr report --workdir=DIR`."""

import functools
import pathlib
from collections.abc import Sequence

from absl import flags

from rlpr_jax import command_line, report
from rlpr_jax.errors import InputError, exit_with_one_line
from rlpr_jax.runs import traces


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line() as ending:
    given = command_line.parse(define_flags(), argv, __doc__)
    if not given.workdir:
      raise InputError("--workdir: missing, expected the run's directory")
    workdir = pathlib.Path(given.workdir)
    ending.keep = functools.partial(traces.keep, workdir)
    print(report.write_report(workdir))
    if given.picture:
      print(report.save_picture(workdir, pathlib.Path(given.picture)))


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=given)
  flags.DEFINE_string("picture", None, "Also writes one PNG of the run here.", flag_values=given)
  return given


if __name__ == "__main__":
  main()
