"""The process of one part: `python -m benchmarks.gpu.child JOB`, a `report.Job` as JSON."""

import importlib
import json
import pathlib
import sys
import traceback

from benchmarks.gpu.report import Job, Report

REFUSED = 2  # exit status where no part can run


def main(job: Job) -> None:
  report = Report(job)
  try:
    import jax

    from rlpr_jax.compilation import keep_programs

    part = importlib.import_module(f"benchmarks.gpu.parts.{job.part}")
    # Who asks takes the device.
    if not job.rehearse and not getattr(part, "STARTS_ANOTHER", False) and jax.default_backend() != "gpu":
      report.refused(f"no GPU: jax {jax.__version__} runs on {jax.default_backend()}, expected gpu, or --rehearse")
      sys.exit(REFUSED)
    keep_programs(job.cache)
    part.run(report)
  except ModuleNotFoundError as error:
    if not error.name or error.name.partition(".")[0] in ("benchmarks", "rlpr_jax", "tests"):
      raise
    report.skipped(f"{error.name} is not installed")
  except Exception as error:
    traceback.print_exc()
    report.failed(one_line(error))
    sys.exit(1)


def one_line(error: BaseException) -> str:
  """An error with the place of this project where it was raised."""
  root = pathlib.Path(__file__).parents[2]
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if root in pathlib.Path(frame.filename).parents and ".venv" not in frame.filename]
  place = f" ({pathlib.Path(own[-1].filename).relative_to(root)}:{own[-1].lineno})" if own else ""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


if __name__ == "__main__":
  main(Job(**json.loads(sys.argv[1])))
