"""The package as pip installs it, used outside any checkout."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

import rlpr_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
  """A directory with the package and its command, beside the environment's own packages."""
  directory = tmp_path_factory.mktemp("installed")
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
  subprocess.run([*command, "--no-build-isolation", f"--target={directory}", str(ROOT)], check=True)
  return directory


def rlpr(installed: pathlib.Path, directory: pathlib.Path, *arguments: str, status: int = 0):
  """The installed command, run in a directory."""
  return run(installed, directory, str(installed / "bin/rlpr"), *arguments, status=status)


def run(
  installed: pathlib.Path, directory: pathlib.Path, *command: str, status: int = 0
) -> subprocess.CompletedProcess:
  env = {**os.environ, "PYTHONPATH": str(installed)}
  done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=False, timeout=600)
  assert done.returncode == status, done.stdout + done.stderr
  return done


def test_what_travels(installed):
  package = installed / "rlpr_jax"
  assert {file.name for file in (package / "configs").glob("*.py")} == {x.name for x in (ROOT / "configs").glob("*.py")}
  assert (package / "configs/sweeps/rewards.py").exists()
  assert (package / "launch/flags.sh").read_bytes() == (ROOT / "launch/flags.sh").read_bytes()
  assert (package / "py.typed").exists()
  assert {"page.html", "page.js", "page.css"} <= {file.name for file in (package / "viewer").iterdir()}
  assert not (installed / "tests").exists()
  (metadata,) = installed.glob("rlpr_jax-*.dist-info/METADATA")
  text = metadata.read_text()
  assert f"\nVersion: {rlpr_jax.__version__}\n" in text
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert {line.removeprefix("Provides-Extra: ") for line in text.splitlines() if "Provides-Extra" in line} == {*extras}


def test_modules_command_and_recipes(installed, tmp_path):
  program = "import rlpr_jax; print(rlpr_jax.__file__, rlpr_jax.__version__, rlpr_jax.rewards.debias)"
  said = run(installed, tmp_path, sys.executable, "-c", program).stdout
  assert said.startswith(f"{installed}/rlpr_jax/__init__.py {rlpr_jax.__version__} <function debias")
  assert rlpr(installed, tmp_path, "--version").stdout == f"rlpr_jax {rlpr_jax.__version__}\n"
  # The recipe is read, by its name and with an argument, before the workdir is missed.
  done = rlpr(installed, tmp_path, "train", "--config=rlpr_gemma2_9b:v5p:2x4x4", status=2)
  assert done.stderr == "error: --workdir: missing, expected the run's directory\n"
  assert not any(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler for TPUs is installed")
def test_what_to_install_for_a_plan(installed, tmp_path, monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  done = rlpr(installed, tmp_path, "plan", "--config=quickstart", "--topology=v5e:2x2", status=2)
  assert "installed: pip install --no-deps --target=DIR 'libtpu==" in done.stderr


@pytest.mark.slow
def test_a_run(installed, tmp_path):
  tiny = ("--config.steps=1", "--config.warm_start.steps=2", "--config.evaluation.prompts=8", "--config.data.count=64")
  said = rlpr(installed, tmp_path, "train", "--config=quickstart", "--workdir=w", *tiny).stdout
  assert said.startswith(f"rlpr_jax {rlpr_jax.__version__}, jax ")
  assert (tmp_path / "w/report.html").exists()
  said = rlpr(installed, tmp_path, "export", "--workdir=w", "--out=model").stdout
  assert "wrote the policy of step 1" in said
