"""The program that says what a reward sees: of a run, of a model without one, and of what cannot be."""

import functools
import json

import numpy as np
import pytest

from rlpr_jax import __main__ as rlpr
from rlpr_jax import config as configs
from rlpr_jax import diagnose, huggingface, models
from rlpr_jax.data import builtin
from rlpr_jax.policy import initial_params
from rlpr_jax.runs.checkpoints import Checkpoints
from rlpr_jax.training.optimizer import init_opt_state
from rlpr_jax.training.run import set_up
from rlpr_jax.training.state import abstract_state, join, split
from tests.tiny_run import RECIPE, tiny

ASKED = ("--prompts=8", "--samples=4", "--pairs=3")
FIELDS = {
  "policy", "when", "prompts", "samples", "verdicts", "accuracy", "likelihood", "sampled", "trained", "reasoning",
  "information", "likes", "examples",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """What a run leaves behind, of a policy that has learned nothing and so writes a tag in every other response."""
  config = tiny()
  config.data.template = "answer_only"
  config.compilation_cache = ""
  config.reward.shadow = ("product: aggregate=product",)
  workdir = tmp_path_factory.mktemp("runs") / "mine"
  workdir.mkdir()
  (workdir / "config.json").write_text(configs.to_json(config))
  (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
  (workdir / "rollouts").mkdir()
  rows = [
    {
      "step": 1,
      "row": i // 2,
      "source": "a",
      "question": "?",
      "response": f"<answer>{i % 2}</answer>",
      "reference": "1",
    }
    | {"length": 3, "scorable": True, "reward_total": 0.1 * i, "shadow_product": -0.1 * i}
    for i in range(6)
  ]
  (workdir / "rollouts" / "step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  made = set_up(config)
  params = initial_params(config, made.policy)
  state = abstract_state(made)._replace(
    step=1, params=params, opt_state=init_opt_state(made.update.program.optimizer, params, made.policy.sharding)
  )
  to_disk = functools.partial(split, carried_limit=config.rollout.prompts_per_draw)
  checkpoints = Checkpoints(workdir, config.log, to_disk, join)
  checkpoints.save(state)
  checkpoints.close()
  return workdir


def figures(value):
  """All figures with an interval anywhere in what was found."""
  if isinstance(value, dict) and value.keys() == {"value", "low", "high", "groups"}:
    yield value
  elif isinstance(value, dict | list):
    for inner in value.values() if isinstance(value, dict) else value:
      yield from figures(inner)


def test_a_run(run, capsys):
  diagnose.main(["diagnose", f"--workdir={run}", *ASKED])
  found = json.loads((run / "diagnosis.json").read_text())
  assert found.keys() == FIELDS
  assert (found["when"], found["prompts"], found["verdicts"]) == ("step 1", 8, "the rule builtin")
  assert found["sampled"]["responses"] == 32
  assert list(found["sampled"]["scores"]) == ["total", "reference", "debiased", "shadow product"]
  trained = found["trained"]
  assert (trained["responses"], trained["groups"], trained["right"]["value"]) == (6, 3, 0.5)
  assert {name: of["within"]["value"] for name, of in trained["scores"].items()} == {"total": 1, "shadow product": 0}
  for figure in figures(found):
    if figure["low"] is not None:
      assert figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
  own = found["reasoning"]["own"]["r"]["value"]
  assert 0 < own < 1
  assert found["information"]["information"]["value"] <= np.log(3)
  assert found["examples"]
  for example in found["examples"]:
    assert "".join(token["token"] for token in example["tokens"]["reference"]) == example["reference"]
  printed = capsys.readouterr().out
  assert "AUC of shadow product, within" in printed
  page, whole = (run / "diagnosis.html").read_text(), (run / "report.html").read_text()
  for text in (page, whole):
    assert "Does the reasoning matter?" in text
    assert "<script" not in text
  assert ">Diagnosis</a>" in whole


def test_a_model_and_a_file_of_questions(tmp_path):
  tokenizer = builtin.tokenizer()
  config = models.ModelConfig(len(tokenizer), 32, 48, 2, 4, 2, 8, qk_norm=True, max_length=96)
  huggingface.save_pretrained(tmp_path / "model", config, models.init_params(config, 0), tokenizer)
  lines = [json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) for i in range(6)]
  (tmp_path / "questions.jsonl").write_text("\n".join(lines))
  (tmp_path / "recipe.py").write_text(RECIPE)
  diagnose.main(
    [
      "diagnose",
      f"--config={tmp_path}/recipe.py",
      f"--config.model.path={tmp_path}/model",
      f"--config.data.path={tmp_path}/questions.jsonl",
      "--config.compilation_cache=",
      f"--workdir={tmp_path}/out",
      "--verifier=exact",
      *ASKED,
    ]
  )
  found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
  assert (found["when"], found["verdicts"], found["trained"]) == ("as it was found", "the rule exact", {})
  assert found["accuracy"]["sampled"]["all"]["value"] == 0  # a model that has learned nothing
  assert found["sampled"]["scores"]["total"]["all"] is None
  assert {path.name for path in (tmp_path / "out").iterdir()} == {"diagnosis.json", "diagnosis.html"}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--workdir: missing"),
    (("--workdir={tmp}/none",), "none holds no run, expected one, or --config=RECIPE with --config.model.path=MODEL"),
    (("--workdir={tmp}/none", "--config=quickstart"), "--config.model.path: missing"),
    (("--workdir={run}", "--config=quickstart"), "holds a run, whose config is taken"),
    (("--workdir={run}", "--step=7"), "no checkpoint of step 7"),
    (("--workdir={run}", "--samples=1"), "samples"),
    (("--workdir={run}", "--verifier=none"), "verifier"),
    (("--workdir={run}", "--judge_url=http://127.0.0.1:1/v1"), "--judge_url: given without --judge_model"),
    (("--workdir={tmp}/none", "--config=evaluate"), "missing, expected the config of a run"),
    (("--workdir={run}", "--judge_url=x", "--judge_model=m"), "endpoint: expected a URL"),
    (("--workdir={run}", "--config.rollout.slot=3"), "there is no field config.rollout.slot"),
  ],
)
def test_wrong_input_is_one_line_and_status_2(run, tmp_path, capsys, arguments, message):
  with pytest.raises(SystemExit) as ended:
    diagnose.main(["diagnose", *(argument.format(tmp=tmp_path, run=run) for argument in arguments)])
  error = capsys.readouterr().err
  assert ended.value.code == 2
  assert error.count("\n") == 1
  assert message in error


def test_the_command(capsys):
  with pytest.raises(SystemExit) as ended:
    rlpr.main(["rlpr", "diagnose", "--workdir=/nowhere"])
  assert ended.value.code == 2
  assert "holds no run" in capsys.readouterr().err
