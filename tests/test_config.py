"""The config: every field is read by something and explained, wrong ones are refused, recipes hold what they claim."""

import functools
import json
import math
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs import own_machine
from rlpr_jax import config as configs
from rlpr_jax import fields, filtering, grpo, rewards, sharding, validation
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders
from rlpr_jax.planning import hardware

ROOT = pathlib.Path(__file__).parents[1]


def leaves(config, prefix=""):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name


FIELDS = list(leaves(configs.default()))
# Groups that are handed over whole, to keyword arguments or fields of the same names.
WHOLE = {"mesh": "**config.mesh", "sharding": "config.sharding.items()"}


def code() -> dict[str, str]:
  return {
    str(path): path.read_text()
    for path in (ROOT / "rlpr_jax").rglob("*.py")
    if path.name not in ("config.py", "validation.py")
  }


def is_read(field: str, sources: dict[str, str]) -> bool:
  """Whether some code says `config.field`, or `name.field` after `name = ...config.group`."""
  group, _, name = field.rpartition(".")
  if group in WHOLE:
    return any(WHOLE[group] in text for text in sources.values())
  for text in sources.values():
    if not group:
      found = re.search(rf"\bconfig\.{name}\b", text)
    else:
      names = [group, *re.findall(rf"(\w+)(?:, \w+)* = [\w.]*config\.{group}\b", text)]
      names += re.findall(r"(\w+): ConfigDict", text) if group in ("data", "evaluation", "guards", "log") else []
      # A line that takes several at once.
      for left, right in re.findall(r"^\s*([\w, ]+) = (.*config\..*)$", text, re.MULTILINE):
        for one, value in zip(left.split(", "), right.split(", "), strict=False):
          if value.endswith(f"config.{group}"):
            names.append(one)
      found = any(re.search(rf"\b{one}\.{name}\b", text) for one in names)
    if found:
      return True
  return False


def read_by_fields(sources: dict[str, str]) -> set[str]:
  """Fields that a dataclass takes by the names of its own fields."""
  taken = set()
  for cls, group, path in (
    ("RewardSettings", "reward", "training/reward.py"),
    ("FilterConfig", "filter", "filtering.py"),
  ):
    text = sources[str(ROOT / "rlpr_jax" / path)]
    body = text[text.index(f"class {cls}") :]
    names = re.findall(r"^  (\w+): \w+", body[: body.index("\n\n\n")], re.MULTILINE)
    taken |= {f"{group}.{name}" for name in names}
  return taken


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read(field):
  sources = code()
  assert field in read_by_fields(sources) or is_read(field, sources), f"nothing reads config.{field}"


def test_a_field_that_nothing_reads_is_found():
  assert not is_read("reward.nothing", code())
  assert not is_read("nothing", code())


def test_every_field_is_explained():
  assert [name for name, field in configs.FIELDS.items() if len(field.meaning) < 4] == []


def test_choices_are_those_of_the_code_that_reads_them():
  """config.py imports nothing of it."""
  expected = {
    "data.domains": builtin.DOMAINS,
    "data.template": tuple(rewards.TEMPLATE_TAGS),
    "reward.aggregate": rewards.AGGREGATES,
    "reward.token_weights": rewards.TOKEN_WEIGHTS,
    "reward.verifier": ("none", *graders.VERIFIERS),
    "evaluation.verifier": graders.HELD_OUT_VERIFIERS,
    "filter.kind": filtering.KINDS,
    "training.advantages": grpo.NORMALIZATIONS,
    "training.aggregate": grpo.AGGREGATES,
  }
  assert {name: configs.FIELDS[name].choices for name in expected} == expected
  assert configs.default().sharding.to_dict() == {axis: ",".join(on) for axis, on in sharding.RULES.items()}


@pytest.mark.parametrize("name", [name for name, field in configs.FIELDS.items() if field.choices])
def test_what_is_no_choice_is_refused(name):
  config = configs.default()
  config.update_from_flattened_dict({name: "nothing"})
  with pytest.raises(InputError, match=rf"^config\.{name}: 'nothing', expected one of ") as error:
    validation.validate(config)
  assert all(choice in str(error.value) for choice in configs.FIELDS[name].choices)


BOUNDED = [
  (name, bound - step)
  for name, field in configs.FIELDS.items()
  for bound, step in ((field.at_least, 1), (field.above, 0), (field.at_most, -1))
  if bound is not None
]


@pytest.mark.parametrize(("name", "value"), BOUNDED)
def test_what_is_out_of_bounds_is_refused(name, value):
  config = configs.default()
  config.update_from_flattened_dict({name: type(configs.FIELDS[name].default)(value)})
  with pytest.raises(InputError, match=rf"^config\.{name}: [-\d.]+, expected (at|more)"):
    validation.validate(config)


def test_defaults_are_within_their_bounds():
  validation.validate(configs.default())


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.reward.agregate=product", ("agregate", "aggregate")),
    pytest.param(
      "--config.filter.kind=3x", ("filter.kind", "'3x'", "ema, fixed, accuracy, share, off"), marks=pytest.mark.slow
    ),
    pytest.param("--config.prompts_per_step=many", ("prompts_per_step",), marks=pytest.mark.slow),
    pytest.param("--config.trainning.loss=clip", ("trainning", "training"), marks=pytest.mark.slow),
  ],
)
def test_unknown_and_mistyped_fields_are_refused_with_the_nearest_name(tmp_path, argument, words):
  done = subprocess.run(
    [sys.executable, "-m", "rlpr_jax.train", f"--workdir={tmp_path / 'run'}", argument],
    capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
  )  # fmt: skip
  assert done.returncode == 2
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: ")
  assert all(word in line for word in words), line
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("rlpr_qwen2_5_7b", (768, 192, 2048, 1.0, "think", 0.5, 1.0, 1.0)),
    ("rlpr_llama3_1_8b", (256, 64, 2048, 0.6, "answer_only", 0.9, 0.6, 0.95)),
    ("rlpr_gemma2_2b", (256, 64, 1024, 0.6, "answer_only", 1.0, 0.6, 0.95)),
    ("rlpr_gemma2_9b", (256, 64, 1024, 0.6, "answer_only", 1.0, 0.6, 0.95)),
  ],
)
def test_recipes_hold_the_papers_settings(name, expected):
  """The table of section 9, and what all families have in common."""
  c = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()
  validation.validate(c)
  found = (
    c.prompts_per_step, c.prompts_per_step // c.training.minibatches, c.data.prompt_limit, c.rollout.temperature,
    c.data.template, c.filter.scale, c.evaluation.temperature, c.evaluation.top_p,
  )  # fmt: skip
  assert found == expected
  assert (c.samples_per_prompt, c.rollout.max_response_length, c.training.minibatches) == (8, 3072, 4)
  assert (c.reward.aggregate, c.reward.shaping, c.reward.baseline_policy) == ("mean_prob", "clip", "initial")
  assert (c.reward.format_coefficient, c.reward.repetition_window, c.reward.repetition_limit) == (0.1, 10, 10)
  assert (c.training.clip_low, c.training.clip_high, c.training.entropy_coefficient) == (0.2, 0.27, 0.001)
  assert (c.training.learning_rate, c.training.weight_decay, c.training.max_grad_norm) == (1e-6, 0.01, 1.0)
  assert (c.filter.alpha, c.filter.collect_from, c.filter.start) == (0.01, 6, 11)


RECIPES_WITH_SLICES = ("rlpr_qwen2_5_7b", "rlpr_llama3_1_8b", "rlpr_gemma2_9b")


@pytest.mark.parametrize("recipe", RECIPES_WITH_SLICES)
def test_what_recipes_set_for_slices_fits_their_chips(recipe):
  """Rows are multiples of the parts of the mesh, and nothing of the method changes."""
  module = runpy.run_path(str(ROOT / f"configs/{recipe}.py"))
  plain = json.loads(configs.to_json(module["get_config"]()))
  assert "v5p:2x4x4" in module["SLICES"]
  for name in module["SLICES"]:
    config = module["get_config"](name)
    validation.validate(config)
    parts, rest = divmod(hardware.parse(name).chips, config.mesh.tensor)
    rows = (config.rollout.slots, config.rollout.prefill_prompts, config.rollout.score_rows)
    assert rest == 0
    assert all(count % parts == 0 for count in (*rows, config.training.micro_batch_rows)), name
    assert configs.first_difference(plain, config) is None, name


@pytest.mark.parametrize("name", own_machine.SETTINGS)
def test_recipes_for_own_machines(name):
  config = own_machine.get_config(name)
  validation.validate(config)
  parts, rest = divmod(hardware.parse(name.split("/")[0]).chips, config.mesh.tensor)
  rows = (config.rollout.slots, config.rollout.prefill_prompts, config.rollout.score_rows)
  assert rest == 0
  assert all(count % parts == 0 for count in (*rows, config.training.micro_batch_rows))


def test_a_machine_that_the_recipe_does_not_know():
  with pytest.raises(InputError, match=r"'v5e:2x4' after the recipe, expected nothing or one of v5e:1x1/"):
    own_machine.get_config("v5e:2x4")


def test_a_slice_that_a_recipe_does_not_know():
  get_config = runpy.run_path(str(ROOT / "configs/rlpr_qwen2_5_7b.py"))["get_config"]
  with pytest.raises(InputError, match=r"'v5p:9x9x9' after the recipe, expected nothing or one of v5e:16x16, "):
    get_config("v5p:9x9x9")


def test_what_another_slice_needs_may_change():
  """A run that is resumed may have other programs; not other results."""
  config = configs.default()
  saved = json.loads(configs.to_json(config))
  config.mesh.tensor, config.training.micro_batch_rows, config.model.remat = 4, 32, "full"
  config.rollout.slots, config.rollout.prefill_prompts, config.rollout.score_rows = 512, 64, 64
  assert configs.first_difference(saved, config) is None
  config.rollout.int8_cache = True
  assert configs.first_difference(saved, config) == "config.rollout.int8_cache is False there, True here"


def test_a_run_of_a_version_without_a_field_goes_on_with_its_default():
  config = configs.default()
  saved = json.loads(configs.to_json(config))
  del saved["reward"]["custom"]
  assert configs.first_difference(saved, config) is None
  config.reward.custom = "mine.py:reward"
  assert configs.first_difference(saved, config) == "config.reward.custom is '' there, 'mine.py:reward' here"


# What is none of the kind, by the type of a field; `configs.check_fields` and `validation` are to say so.
NUMBERS = (math.nan, math.inf, -math.inf, 1e300, -1e300, 2**63, -(2**63), 10**400, -(10**400), "1", None, (1,), True)
WRONG = {
  bool: (1, "yes", None, math.nan),
  int: (*NUMBERS, 2**31 + 2**32, 0.5),
  float: NUMBERS,
  str: ("\ud800", "a\0b", 1, None, ("x",)),
  tuple: (
    1, "text", None, (1,), (None,), ((1, 2),), ({},), ("",), ("\ud800",), (("a", "b", "c"),), (("a", math.nan),),
    (("a", math.inf),), (("a", True),), (("a", "b\0"),), (("a", 10**400),), (("a", {}),), ({"a": 1},),
  ),
}  # fmt: skip


@pytest.mark.parametrize("path", configs.FIELDS)
@pytest.mark.parametrize("written", [False, True], ids=["set", "read"])
def test_every_field_refuses_what_it_cannot_be(path, written, tmp_path):
  """Set in a recipe that goes round the types of `ml_collections`, or written in a config.json."""
  kind = type(configs.FIELDS[path].default)
  for value in WRONG[kind]:
    if not written and kind is float and value in (True, 10**400, -(10**400)):
      continue  # ml_collections makes 1.0 of the one, and raises of the others by itself
    try:
      if written:
        values = json.loads(configs.to_json(configs.default()))
        *groups, name = path.split(".")
        functools.reduce(dict.get, groups, values)[name] = value
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = configs.read(tmp_path / "config.json")
      else:
        config = configs.default()
        with config.ignore_type():
          config.update_from_flattened_dict({path: value})
      validation.validate(config)
    except InputError as error:
      said = str(error)
    else:
      pytest.fail(f"{value!r} was taken")
    assert f"config.{path}" in said, (value, said)
    assert "\n" not in said
    assert said.isascii()
    assert len(said) < 500


@pytest.mark.parametrize("path", configs.FIELDS)
def test_the_ends_of_the_bounds_are_allowed(path):
  """By the field itself: together with the others of the default some cannot be."""
  field = configs.FIELDS[path]
  if type(field.default) not in fields.LARGEST:
    return
  largest = fields.LARGEST[type(field.default)]
  for value in (field.at_least, field.at_most, largest if field.at_most is None else None):
    if value is not None and (field.above is None or value > field.above):
      fields.check_value(path, field, value)


@pytest.mark.parametrize(
  "shadow",
  [
    "x: format_coefficient=nan", "x: format_coefficient=2", "x: rule_weight=nan", "x: rule_weight=7",
    "x: answer_length_coefficient=-1", "x: answer_length_coefficient=inf", "x: aggregate=sum", "x: shaping=leaky_nan",
    "x: kind=rule", "x: rule_weight=a", "x: nothing=1", "x", ": kind=reference", "x: kind",
  ],
)  # fmt: skip
def test_shadows_are_within_the_bounds_of_rewards(shadow):
  config = configs.default()
  config.reward.shadow = (shadow,)
  with pytest.raises(InputError, match=r"^config\.reward\.shadow[^\n]+$"):
    validation.validate(config)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"model.head_dim": 7}, r"config\.model\.head_dim: 7, expected an even number"),
    ({"seed": 10**23}, r"config\.seed: 1000+, expected at least 0 and at most 4294967295"),
    ({"warm_start.learning_rate": -1.0}, r"config\.warm_start\.learning_rate: -1\.0, expected at least 0"),
    ({"filter.source_scales": (("a", -1.0),)}, r"config\.filter\.source_scales: expected pairs of a source's name"),
  ],
)
def test_numbers_that_are_refused(changes, said):
  config = configs.default()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=said):
    validation.validate(config)


def test_groups_that_were_replaced():
  with configs.default().unlocked() as config:
    config.training = ConfigDict({"learning_rate": 1.0})
    with pytest.raises(InputError, match=r"^config\.training\.minibatches: missing, expected the config of a run"):
      validation.validate(config)
  with configs.default().unlocked() as config:
    config.training.lr = 5.0
    with pytest.raises(InputError, match=r"^config\.training\.lr: there is no such field$"):
      validation.validate(config)
