"""The examples say what they promise."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from rlpr_jax import train as training_program
from rlpr_jax.errors import InputError
from tests.tiny_run import rows, tiny

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def test_the_mathematics_work_outside_the_trainer():
  done = subprocess.run(
    [sys.executable, str(EXAMPLES / "in_another_trainer.py")], capture_output=True, text=True, check=True
  )
  numbers = [float(number) for number in re.findall(r"-?\d+\.\d*", done.stdout)]
  # 0.9 * (mean p - r') + 0.1 * format: (0.85, 0.6, 0.15) - 0.25, the last below 0; then 0.5 - 0.4. The last of
  # each group has no tags.
  expected = np.array([[0.64, 0.415, 0.0], [0.19, 0.19, 0.09]])
  np.testing.assert_allclose(numbers[:6], expected.ravel(), atol=1e-3)
  advantages = (expected - expected.mean(axis=1, keepdims=True)) / expected.std(axis=1, ddof=1, keepdims=True)
  np.testing.assert_allclose(numbers[6:], advantages.ravel(), atol=1e-3)
  assert "[ True  True]" in done.stdout


def test_the_whole_method_in_one_file():
  path = EXAMPLES / "minimal_rlpr.py"
  assert len(path.read_text().splitlines()) <= 300
  done = subprocess.run(
    [sys.executable, str(path), "--steps=1", "--warm_start=4"], capture_output=True, text=True, check=True
  )
  assert re.search(r"^held-out accuracy before RLPR: \d+\.\d%$", done.stdout, re.MULTILINE)
  # The ratio of the trainer's probability to the sampler's, after three small steps.
  step = re.search(r"^step 1/1  reward -?0\.\d+  kept 64/64  ratio (\d\.\d+)$", done.stdout, re.MULTILINE)
  assert abs(float(step[1]) - 1) < 0.02


@pytest.mark.slow
def test_a_custom_reward_is_what_is_trained_on(tmp_path):
  brevity = runpy.run_path(str(EXAMPLES / "custom_reward.py"))["brevity"]
  config = tiny()
  config.steps, config.warm_start.steps, config.evaluation.prompts = 1, 20, 0
  seen = []

  def recorded(evidence, texts, prompts):
    assert len(texts) == evidence.logps.shape[0] * evidence.logps.shape[1]
    assert len(prompts) == evidence.logps.shape[0]
    seen.append(brevity(evidence, texts, prompts))
    return seen[-1]

  training_program.train(config, tmp_path, recorded)
  assert json.loads((tmp_path / "config.json").read_text())["reward"]["custom"].endswith("recorded")
  with pytest.raises(InputError, match=r"another run: config\.reward\.custom is '.*recorded' there, '.*brevity'"):
    training_program.train(config, tmp_path, brevity)
  np.testing.assert_allclose(rows(tmp_path)[-1]["reward/total"], np.mean(seen), rtol=1e-5)


@pytest.mark.slow
def test_a_custom_reward_on_the_command_line(tmp_path):
  file = EXAMPLES / "custom_reward.py"
  arguments = [
    f"--workdir={tmp_path}", f"--config.reward.custom={file}:brevity", "--config.steps=1",
    "--config.warm_start.steps=2", "--config.evaluation.prompts=0", "--config.data.count=64",
  ]  # fmt: skip
  training_program.main(["train", "--config=quickstart", *arguments])
  assert json.loads((tmp_path / "config.json").read_text())["reward"]["custom"] == f"{file}:brevity"
  written = [json.loads(line) for line in next((tmp_path / "rollouts").iterdir()).read_text().splitlines()]
  for row in written:
    mean = float(np.mean(row["reference_probs"])) if row["reference_probs"] else 0.0
    assert row["reward_total"] == pytest.approx(mean - 0.001 * len(row["response"]), abs=1e-4)
