"""Writes examples/notebooks, and runs them on this machine's CPU with a tiny policy to show what their cells print.

    .venv/bin/python -m pip install -c requirements.txt -r requirements-slow.txt
    PYTHONPATH=. .venv/bin/python tools/notebooks.py

The notebooks differ in where they run alone. When they are run here, cells tagged "settings" and "questions" are
those of TINY, and what is tagged "install" or "push" is left out; everything else is run as it stands.
"""

import copy
import os
import pathlib
import re
import shlex
import sys
import tempfile
from typing import Any

Notebook = dict[str, Any]
OUT = pathlib.Path(__file__).parents[1] / "examples/notebooks"
SHOWN = "What stands below the cells was printed by a run on a CPU, with the quickstart's tiny policy and ten steps."
TINY = {
  "settings": """\
RECIPE = "quickstart"
WORKDIR = "run"
SETTINGS = (
  "--config.steps=10 --config.warm_start.steps=300 --config.data.path=questions.csv"
  " --config.evaluation.path=held_out.csv --config.evaluation.prompts=40"
)
DTYPE = "float32"
""",
  "questions": """\
import csv
from rlpr_jax.data import builtin

for split, name, size in (("train", "questions.csv", 2048), ("held_out", "held_out.csv", 100)):
  with open(name, "w", newline="") as file:
    rows = [(example.messages[0]["content"], example.reference) for example in builtin.examples(split, size)]
    csv.writer(file).writerows([("question", "answer"), *rows])
""",
}
# Where, what is to be known of it, source of the package, extra, recipe, directory that is kept.
PLACES = {
  "kaggle_tpu": (
    "Kaggle, TPU v5e-8",
    "Choose *Accelerator: TPU v5e-8*. A session ends after 9 hours; what lies under /kaggle/working is its output. Save"
    " the version, add that output to the next session as a data set, copy `run` back there, and the same cell goes on"
    " from the last checkpoint.",
    "/kaggle/input/rlpr-jax",
    "tpu",
    "own_machine:v5e:2x4/qwen2.5-1.5b",
    "/kaggle/working/run",
  ),
  "colab_tpu": (
    "Colab, TPU v5e-1 or v6e-1",
    "Choose *Runtime: v5e-1 TPU* (or v6e-1, and its recipe). The machine goes when the session ends: keep the run's"
    " directory on a mounted Drive, and the same cell goes on from the last checkpoint.",
    "/content/drive/MyDrive/rlpr_jax",
    "tpu",
    "own_machine:v5e:1x1/gemma-3-1b",
    "/content/drive/MyDrive/run",
  ),
  "one_gpu": (
    "One GPU",
    "A machine with one GPU and CUDA 13's driver: T4, L4, RTX 4090, A100 or H100, each with a recipe of its own"
    " (`own_machine:l4:1/qwen2.5-0.5b`, ...).",
    "rlpr_jax",
    "cuda13",
    "own_machine:rtx4090:1/qwen2.5-0.5b",
    "run",
  ),
}


def cells(name: str) -> list[tuple[str, str, str]]:
  """Kind, tag and text of each cell."""
  title, note, source, extra, recipe, workdir = PLACES[name]
  settings = f'''\
RECIPE = "{recipe}"  # configs/own_machine.py has others
WORKDIR = "{workdir}"
SETTINGS = "--config.steps=100 --config.data.path=questions.csv --config.evaluation.path=held_out.csv"
SETTINGS += " --config.evaluation.prompts=100 --config.evaluation.verifier=inferred"
DTYPE = "bfloat16"
'''
  questions = """\
import csv

train = [("Ann has 3 boxes of 12 pencils. How many pencils is that?", "36 pencils")]  # and some hundreds of yours
held_out = [("A shelf holds 9 books. How many do 4 such shelves hold?", "36 books")]
for name, rows in (("questions.csv", train), ("held_out.csv", held_out)):
  with open(name, "w", newline="") as file:
    csv.writer(file).writerows([("question", "answer"), *rows])
"""
  evaluate = """\
%%writefile evaluate_mine.py
from rlpr_jax.evaluation.config import benchmark, default, model


def get_config():
  c = default()
  c.models.trained = model(path="model")
  c.benchmarks.held_out = benchmark(path="held_out.csv", samples=4)
  return c
"""
  push = """\
# HF_TOKEN in the environment; org/name is yours. A card with data, reward, curve and figures goes with it.
# !rlpr export --workdir={WORKDIR} --out=pushed --push=org/name --evaluation=evaluation/summary.json
"""
  return [
    ("markdown", "", f"# RLPR on your own questions: {title}\n\n{note}\n\n{SHOWN}"),
    ("code", "install", f'%pip install -q "{source}[{extra},evaluate]"  # a checkout of rlpr_jax, or its wheel'),
    ("code", "settings", settings),
    ("markdown", "", "Any question with an answer will do; no verifier is needed. Columns `question` and `answer`."),
    ("code", "questions", questions),
    ("markdown", "", "What will it take? The compiler answers before anything is trained."),
    ("code", "", "!rlpr plan --config={RECIPE} --topology=local --nosearch --fast {SETTINGS}"),
    ("markdown", "", "Train. The recipe begins with a few supervised steps that bring the model to the tags."),
    ("code", "", "!rlpr train --config={RECIPE} --workdir={WORKDIR} {SETTINGS}"),
    ("markdown", "", "Curves, and one question with what the reward made of two responses."),
    (
      "code",
      "",
      '!rlpr report --workdir={WORKDIR} --picture=run.png\nfrom IPython.display import Image\n\nImage("run.png")',
    ),
    (
      "markdown",
      "",
      "Export a model that transformers loads, and see what it answers to questions it did not train on.",
    ),
    ("code", "", "!rlpr export --workdir={WORKDIR} --out=model --dtype={DTYPE}"),
    ("code", "", evaluate),
    ("code", "", "!rlpr evaluate --config=evaluate_mine.py --workdir=evaluation\n!cat evaluation/summary.md"),
    ("code", "push", push),
  ]


def build(name: str) -> Notebook:
  """A notebook without outputs."""

  def cell(number: int, kind: str, tag: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"cell_type": kind, "id": f"{name}-{number}", "metadata": {}, "source": text.rstrip()}
    if tag:
      found["metadata"]["tags"] = [tag]
    return found | ({"execution_count": None, "outputs": []} if kind == "code" else {})

  kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
  return {
    "cells": [cell(number, *parts) for number, parts in enumerate(cells(name))],
    "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
  }


def tiny(notebook: Notebook) -> Notebook:
  """The same for a CPU and some minutes."""
  changed = copy.deepcopy(notebook)
  for cell in changed["cells"]:
    (tag,) = cell["metadata"].get("tags", [""])
    cell["source"] = TINY.get(tag, "" if tag in ("install", "push") else cell["source"])
  return changed


def run(notebook: Notebook, directory: str) -> Notebook:
  """Runs all cells, one after the other, in a directory.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed, with what it said.
  """
  import nbclient
  import nbformat

  node = nbformat.from_dict(notebook)
  program = pathlib.Path(directory) / "bin" / "rlpr"  # of this checkout, which need not be installed
  program.parent.mkdir()
  program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rlpr_jax "$@"\n')
  program.chmod(0o755)
  os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
  os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
  nbclient.NotebookClient(node, timeout=1800, resources={"metadata": {"path": directory}}).execute()
  return dict(node)


def tidy(outputs: list[dict[str, Any]], directory: str) -> list[dict[str, Any]]:
  """Outputs as they stand on a screen in the end: of lines that were written over, the last. No warnings.

  >>> lines = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("\\r1 of 2", "\\r2 of 2\\n")]
  >>> [output["text"] for output in tidy(lines, "/tmp/x")]
  ['2 of 2\\n']
  """
  joined: list[dict[str, Any]] = []
  for output in outputs:
    if output.get("name") == "stderr":
      continue
    if output["output_type"] == "stream" and joined and joined[-1].get("name") == output["name"]:
      joined[-1]["text"] += output["text"]
    else:
      joined.append(dict(output))
  for output in joined:
    if output["output_type"] == "stream":
      text = output["text"].replace("\r\n", "\n").replace(directory, ".")
      output["text"] = re.sub(r"^.*(?:\r|\x1b\[K)", "", text, flags=re.MULTILINE)
  return joined


def main() -> None:
  import nbformat

  OUT.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as directory:
    done = run(tiny(build("one_gpu")), directory)  # run like this, they are all the same
    shown = [tidy(cell.get("outputs", []), directory) for cell in done["cells"]]
  for name in PLACES:
    notebook = build(name)
    for cell, outputs in zip(notebook["cells"], shown, strict=True):
      if cell["cell_type"] == "code":
        cell["outputs"] = outputs
    nbformat.write(nbformat.from_dict(notebook), OUT / f"{name}.ipynb")
    print(OUT / f"{name}.ipynb")


if __name__ == "__main__":
  main()
