"""Flags, recipes and fields on command lines: what is taken, and the one line that wrong input gets."""

import subprocess
import sys

import pytest
from absl import flags

import rlpr_jax
from rlpr_jax import __main__ as rlpr
from rlpr_jax import command_line, config, entry
from rlpr_jax.errors import InputError


def parse_config(*words):
  return command_line.parse_config(entry.define_flags("quickstart", goes_on=True), ["program", *words], "What it does.")


def test_fields_are_set_however_they_are_written():
  given, found = parse_config(
    "--config.steps", "3", "--config.reward.format_coefficient", "-1", "--workdir", "w", "--config.model.path=a=b",
    "--noconfig.guards.stop", "-config.reward.kind=random", "--config.rollout.int8_cache",
    "--config.reward.shadow=('a: kind=random',)",
  )  # fmt: skip
  assert given.workdir == "w"
  assert (found.steps, found.reward.format_coefficient, found.model.path) == (3, -1.0, "a=b")
  assert (found.guards.stop, found.reward.kind, found.rollout.int8_cache) == (False, "random", True)
  assert found.reward.shadow == ("a: kind=random",)
  assert found.is_locked


def test_the_last_of_two_values_wins():
  assert parse_config("--config.steps=3", "--config.steps=4")[1].steps == 4
  # Of a tuple too, or a sweep could not take away what its command line gives.
  stops = ("--config.evaluation.stop=('a', 'b')", "--config.steps", "3", "--config.evaluation.stop=('c',)")
  assert parse_config(*stops)[1].evaluation.stop == ("c",)
  assert parse_config("--config.reward.shadow=('a: kind=random',)", "--config.reward.shadow=()")[1].reward.shadow == ()


def test_a_value_may_begin_with_a_dash():
  found = parse_config("--config.data.path", "-x", "--config.training.learning_rate", "-1e-3")[1]
  assert (found.data.path, found.training.learning_rate) == ("-x", -1e-3)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--config.stpes=3"], "--config.stpes: there is no field config.stpes, did you mean config.steps?"),
    (["--config.rewrd.kind=x"], "--config.rewrd.kind: there is no field config.rewrd, did you mean config.reward?"),
    (
      ["--config.kind=x"],
      "--config.kind: there is no field config.kind, did you mean config.filter.kind or config.reward.kind?",
    ),
    (["--config.model.agregate=x"], "no field config.model.agregate, did you mean config.reward.aggregate or "),
    (["--config.nothing_like_it=x"], "--config.nothing_like_it: there is no field config.nothing_like_it"),
    (["--config.steps.more=3"], "--config.steps.more: there is no field config.steps.more"),
    (["--config.reward=3"], "--config.reward: a group, expected one of its fields: aggregate, "),
    (["--config.steps=many"], "flag --config.steps=many: invalid literal for int()"),
    (["--config.steps", "3", "4"], "4: unexpected argument"),
    (["--config=nowhere"], "--config: no recipe 'nowhere', expected a Python file or one of evaluate, facts, "),
    (["--config=nowhere.py"], "--config: nowhere.py: no such file"),
    (["--config=no/where:argument"], "--config: no/where: no such file"),
    (["--config=quickstart:argument"], "quickstart.py: TypeError: get_config() takes 0 positional arguments but 1"),
    (["--nodistributed=true"], "distributed"),
    (["--wrkdir=w"], "Unknown command line flag 'wrkdir'"),
    (["--processes=0"], "flag --processes=0: "),
    (["anything"], "anything: unexpected argument"),
  ],
)
def test_wrong_input_is_one_line(words, said):
  with pytest.raises(InputError, match=r"^[^\n]+$") as error:
    parse_config(*words)
  assert said in str(error.value)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("def get_config():\n  x = 1\n  return x.y\n", ", line 3: AttributeError: 'int' object has no attribute 'y'"),
    ("def get_config(:\n", ", line 1: SyntaxError: "),
    ("import rlpr_jax_nowhere\n", ", line 1: ModuleNotFoundError: "),
    ("x = 1\n", " has no get_config()"),
    ("def get_config():\n  return {}['a']\n", ", line 2: KeyError: 'a'"),
    ("def get_config():\n  return {}\n", ": get_config() gave dict, expected a ConfigDict"),
    ("import sys\n\ndef get_config():\n  sys.exit(0)\n", ", line 4: SystemExit: 0"),
    (
      "from rlpr_jax.config import default\n\ndef get_config():\n  c = default()\n  c.stepz = 3\n  return c\n",
      ', line 5: AttributeError: \'Key "stepz" does not exist and cannot be added since the config is locked.',
    ),
  ],
)
def test_a_recipe_with_a_mistake_is_named_with_its_line(tmp_path, text, said):
  path = tmp_path / "recipe.py"
  path.write_text(text)
  with pytest.raises(InputError, match=r"^[^\n]+$") as error:
    parse_config(f"--config={path}")
  assert str(error.value).startswith(f"--config: {path}{said}")


def test_a_recipe_by_path_by_name_and_with_an_argument(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    "from rlpr_jax.config import default\n\ndef get_config(steps='7'):\n  c = default()\n  c.steps = int(steps)\n"
    "  return c\n"
  )
  assert parse_config("--config=mine.py")[1].steps == 7
  assert parse_config("--config=mine.py:8")[1].steps == 8
  assert parse_config("--config", "sentences")[1].data.domains == "sentences"
  assert parse_config("--config=rlpr_qwen2_5_7b:v5p:4x4x4")[1].rollout.slots == 1408
  assert config.to_json(parse_config()[1]) == config.to_json(parse_config("--config=quickstart")[1])


def test_a_recipe_may_import_one_beside_it(tmp_path):
  (tmp_path / "rlpr_jax_beside.py").write_text("from rlpr_jax.config import default\n")
  (tmp_path / "mine.py").write_text(
    "from ml_collections import FrozenConfigDict\nfrom rlpr_jax_beside import default\n\n"
    "def get_config():\n  return FrozenConfigDict(default())\n"
  )
  before = list(sys.path)
  assert parse_config(f"--config={tmp_path / 'mine.py'}", "--config.steps=3")[1].steps == 3
  assert sys.path == before


def test_a_file_named_as_a_recipe_is_not_taken_for_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "quickstart").write_text("a log\n")
  assert parse_config("--config=quickstart")[1].steps == 40


def test_numbers_and_texts_of_flags_are_those_of_fields():
  def parse(*words):
    given = flags.FlagValues()
    flags.DEFINE_float("share", 1.0, "A share.", flag_values=given)
    flags.DEFINE_integer("count", None, "A count.", flag_values=given)
    flags.DEFINE_list("names", [], "Names.", flag_values=given)
    return command_line.parse(given, ["program", *words], "What it does.")

  for word in ("share=nan", "share=inf", "share=1e300", f"count={2**31}", f"count={-(2**63)}", "names=a,\udcff"):
    with pytest.raises(InputError, match=rf"^--{word.partition('=')[0]}: [^\n]+, expected [^\n]+$"):
      parse(f"--{word}")
  assert parse("--share=0.5", "--count=3", "--names=a,b").count == 3


def test_every_program_parses_by_flags_of_its_own(capsys):
  """All in one process, none of them on the process's own flags."""
  before = set(flags.FLAGS)
  for name in rlpr.PROGRAMS:
    with pytest.raises(SystemExit) as done:
      rlpr.main(["rlpr", name, "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    own = "--workdir" if name in ("train", "sft", "evaluate", "diagnose", "export", "report", "view") else "--"
    assert own in said
    assert "--alsologtostderr" not in said
  assert {name for name in set(flags.FLAGS) - before if name in ("config", "workdir", "model", "path", "out")} == set()


def test_help_tells_flags_with_their_defaults():
  given = flags.FlagValues()
  flags.DEFINE_bool("json", False, "As JSON.", flag_values=given)
  flags.DEFINE_integer("port", 8001, "Where it listens.", flag_values=given)
  text = command_line.help_text(given, "Does it.\n\nMore.\n")
  assert text == "Does it.\n\nMore.\n\nFlags:\n  --[no]json: As JSON.\n  --port: Where it listens. (default: 8001)"


def test_the_command(capsys):
  rlpr.main(["rlpr", "--version"])
  assert capsys.readouterr().out == f"rlpr_jax {rlpr_jax.__version__}\n"
  rlpr.main(["rlpr"])
  said = capsys.readouterr().out
  assert all(f"\n  {name} " in said for name in rlpr.PROGRAMS)
  with pytest.raises(SystemExit) as done:
    rlpr.main(["rlpr", "trian"])
  assert done.value.code == 2
  assert capsys.readouterr().err.startswith("error: trian: no such program, expected one of train, ")
  for name in ("export", "report", "serve", "curate", "diagnose", "view"):
    with pytest.raises(SystemExit) as done:
      rlpr.main(["rlpr", name])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: --")


@pytest.mark.parametrize(("program", "recipe"), [("train", "evaluate"), ("evaluate", "quickstart")])
def test_a_recipe_of_another_program(tmp_path, capsys, program, recipe):
  with pytest.raises(SystemExit) as done:
    rlpr.main(["rlpr", program, f"--config={recipe}", f"--workdir={tmp_path / 'run'}"])
  assert done.value.code == 2
  assert "missing, expected the config of " in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


# What `import rlpr_jax.train` may load: frameworks that are not used, and what only some runs need, are not among it.
NOT_FOR_TRAINING = {
  "torch", "pandas", "datasets", "matplotlib", "openai", "tensorboardX", "starlette", "uvicorn",
  "math_verify", "sympy", "peft", "gguf", "tokamax", "jax_plugins", "tensorflow", "IPython",
}  # fmt: skip
SPLASH = "jax.experimental.pallas"  # kernels of TPUs


def loaded_by(statement: str) -> set[str]:
  code = f"{statement}\nimport sys\nprint(*sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return set(done.stdout.split())


def test_what_a_training_import_loads():
  modules = loaded_by("import rlpr_jax.train")
  assert {name.split(".")[0] for name in modules} & NOT_FOR_TRAINING == set()
  assert not any(name.startswith(SPLASH) for name in modules)


def test_what_the_package_loads_and_shows():
  assert loaded_by("import rlpr_jax") & {"jax", "numpy", "transformers"} == set()
  assert {"rewards", "filtering", "grpo", "splicing", "models", "train"} <= set(dir(rlpr_jax))
  assert rlpr_jax.rewards.reference_probability
  with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
    rlpr_jax.nothing  # noqa: B018


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
  for name in ("uvicorn", "openai"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(SystemExit) as done:
    rlpr.main(["rlpr", "serve", "--model=x"])
  assert done.value.code == 2
  expected = "error: uvicorn: not installed, expected the extra: pip install 'rlpr_jax[serve]'\n"
  assert capsys.readouterr().err == expected
  from rlpr_jax.judging.client import Client, Endpoint

  with pytest.raises(InputError, match=r"openai: not installed, expected .*\[evaluate\]"):
    Client(Endpoint("http://localhost/v1", "model"))
