"""examples/notebooks: as tools/notebooks.py writes them, and run from the first cell to the last."""

import importlib.util
import json
import pathlib
import re

import pytest

from rlpr_jax import command_line, validation

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools/notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


@pytest.mark.parametrize("name", notebooks.PLACES)
def test_notebooks_are_what_the_tool_writes(name):
  found = json.loads((ROOT / f"examples/notebooks/{name}.ipynb").read_text())
  expected = notebooks.build(name)
  assert ["".join(cell["source"]) for cell in found["cells"]] == [cell["source"] for cell in expected["cells"]]
  assert found["metadata"] == expected["metadata"]
  shown = [output for cell in found["cells"] for output in cell.get("outputs", [])]
  assert shown, "no outputs: run the tool"
  assert not [output for output in shown if output["output_type"] == "error"]


@pytest.mark.parametrize("name", notebooks.PLACES)
def test_recipes_and_settings_of_notebooks_are_valid(name):
  scope = {}
  (settings,) = [text for _, tag, text in notebooks.cells(name) if tag == "settings"]
  exec(settings, scope)
  config = command_line.load_recipe(scope["RECIPE"])
  for field, value in re.findall(r"--config\.(\S+)=(\S*)", scope["SETTINGS"]):
    group, _, last = field.rpartition(".")
    where = config[group] if group else config
    where[last] = type(where[last])(value)
  validation.validate(config)


@pytest.mark.slow
def test_a_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
  pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("PATH", "/usr/bin:/bin")
  done = notebooks.run(notebooks.tiny(notebooks.build("one_gpu")), str(tmp_path))
  printed = "".join(output.get("text", "") for cell in done["cells"] for output in cell.get("outputs", []))
  assert re.search(r"held-out Avg@4 after RLPR \(step 10\): \d", printed)
  assert "| held_out | sampled | 100 |" in printed
  assert (tmp_path / "model/model.safetensors").exists()
