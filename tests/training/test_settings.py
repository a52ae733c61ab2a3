import pytest

from rlpr_jax import config as configs
from rlpr_jax.training import settings


@pytest.mark.parametrize(
  ("prompt", "response", "samples", "expected"),
  [
    (100, 200, 4, 900),  # a group, whole
    (100, 900, 8, 2048),  # part of a group of 7,300
    (1000, 2000, 8, 3003),  # one response behind its prompt, wherever the fourth place is at which they may meet
    (2048, 3072, 8, 5135),
  ],
)
def test_rows_hold_a_group_by_default_or_so_much_of_it(prompt, response, samples, expected):
  config = configs.default()
  config.data.prompt_limit, config.rollout.max_response_length, config.samples_per_prompt = prompt, response, samples
  assert settings.row_length(config) == expected
  assert settings.text_row_length(config) >= expected


def test_room_for_the_reference_behind_each_reasoning():
  config = configs.default()
  config.data.prompt_limit, config.rollout.max_response_length, config.samples_per_prompt = 100, 200, 4
  config.training.answer_gradient, config.data.max_reference_length = "verifree", 50
  assert settings.row_length(config) == 100 + 4 * 250
