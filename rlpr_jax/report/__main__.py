"""Writes WORKDIR/report.html, and a picture of the run if asked for.

python -m rlpr_jax.report --workdir=DIR [--picture=PATH.png]
"""

import pathlib

from absl import app, flags

from rlpr_jax import errors, report

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
PICTURE = flags.DEFINE_string("picture", None, "Also writes one PNG of the run here.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  with errors.exit_on_input_error():
    workdir = pathlib.Path(WORKDIR.value)
    print(report.write_report(workdir))
    if PICTURE.value:
      print(report.save_picture(workdir, pathlib.Path(PICTURE.value)))


if __name__ == "__main__":
  app.run(main)
