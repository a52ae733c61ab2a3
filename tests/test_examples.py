"""The examples say what they promise."""

import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from rlpr_jax import train as training_program
from tests.test_train import rows, tiny

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
  np.testing.assert_allclose(rows(tmp_path)[-1]["reward/total"], np.mean(seen), rtol=1e-5)
