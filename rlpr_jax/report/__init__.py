"""The report of a run: one HTML file, and one picture of it.

files of the run -> records -> panels, charts, gallery, diagnosis -> page -> report.html
                                                         \\-> picture -> PNG

The two that draw are imported when they are asked for: `rlpr view` shares the rest, and needs no matplotlib.
"""

import importlib
from typing import Any

_FUNCTIONS = {"write_report": "page", "save_picture": "picture"}


def __getattr__(name: str) -> Any:
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
