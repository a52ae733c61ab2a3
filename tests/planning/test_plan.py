"""Plans: counts against formulas, memory against what a run takes, what is proposed against the compiler."""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from rlpr_jax import config as configs
from rlpr_jax import huggingface, models
from rlpr_jax.errors import InputError
from rlpr_jax.planning import compiler, estimate, hardware, planner, programs, table
from rlpr_jax.planning.estimate import Lengths
from rlpr_jax.planning.hlo import Traffic
from rlpr_jax.training import settings
from tests.planning.qwen import QWEN
from tests.tiny_run import RECIPE

ROOT = pathlib.Path(__file__).parents[2]
LENGTHS = Lengths(256, 768, 16, 1.0)


@pytest.fixture
def qwen(tmp_path) -> models.ModelConfig:
  (tmp_path / "config.json").write_text(json.dumps(QWEN))
  return huggingface.load_config(tmp_path)


@pytest.fixture
def paper():
  """The paper's settings for that model."""
  config = configs.default()
  config.model.compute_dtype = "bfloat16"
  return config


# --- names ---


@pytest.mark.parametrize(
  ("name", "chips"),
  [
    ("v5e:16x16", 256),
    ("v5p:4x4x4", 64),
    ("v5p:4x4x8*2", 256),
    ("tpu7x:2x2x1", 4),
    ("h100:8", 8),
    ("h200:4x8", 32),
    ("t4:2", 2),
  ],
)
def test_slices(name, chips):
  assert hardware.parse(name).chips == chips


@pytest.mark.parametrize("name", ["", "v5p", "v5q:4x4", "v5e:4x4x4", "v5e:32x32", "v5e:0x4", "h100:2x2x2", "h100:8*2"])
def test_names_of_no_slice(name):
  with pytest.raises(InputError, match=r"--topology: .*expected"):
    hardware.parse(name)


def test_what_a_gpu_grants(monkeypatch):
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert hardware.parse("h100:8").granted == pytest.approx(0.9 * 79.1 * 2**30)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  assert hardware.parse("h100:8").granted == pytest.approx(0.5 * 79.1 * 2**30)


# --- counts ---


def weights_of_a_layer(c):
  return c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.embed_dim * c.mlp_dim


@pytest.mark.parametrize("remat", ["dots", "full", "none"])
def test_operations_are_those_of_the_formulas(paper, qwen, remat):
  """Of the 7B model at the paper's shapes: prefill, decoding and the update."""
  paper.model.remat = remat
  flat = planner.flat_layout(paper, qwen, processes=1)
  slots, rows = paper.rollout.slots, 4
  counted = estimate.count_flops(programs.rollout_programs(flat, slots) | programs.update_programs(flat, rows))
  layers, weights, head = qwen.num_layers, weights_of_a_layer(qwen), qwen.vocab_size * qwen.embed_dim
  width = qwen.num_heads * qwen.head_dim
  prompts, limit = paper.rollout.prefill_prompts, paper.data.prompt_limit
  longest, steps = limit + paper.rollout.max_response_length, paper.rollout.decode_steps
  prefill = prompts * limit * layers * (2 * weights + 4 * width * limit)
  decode = slots * steps * (layers * (2 * weights + 4 * width * longest) + 2 * head)
  # Two products in the backward pass for one forwards; and forwards again what is not kept, for the head always.
  again = {"none": (0, 0), "dots": (0, 1), "full": (1 - qwen.mlp_dim * qwen.embed_dim / weights, 1)}[remat]
  layer = 2 * weights * (3 + again[0]) + 4 * width * longest * (3 + again[1])
  update = rows * longest * (layers * layer + 2 * head * 4)
  assert counted["prefill"] == pytest.approx(prefill, rel=0.02)
  assert counted["decode"] == pytest.approx(decode, rel=0.02)
  assert counted["update"] == pytest.approx(update, rel=0.02)


def test_exchanged_answers_are_counted_where_a_reward_asks_for_them(paper, qwen):
  """One pass forwards over each prompt and response, answers of the whole group behind, at the lengths of a run."""
  lengths = Lengths(prompt=300, response=700, reference=10, draws=1.0)
  assert "exchange" not in programs.rollout_programs(planner.flat_layout(paper, qwen, processes=1), 64)
  paper.reward.shadow = ("judged: conditional_weight=1",)
  flat = planner.flat_layout(paper, qwen, processes=1)
  exchanged = estimate.exchanged(flat, lengths)
  texts = paper.samples_per_prompt * (300 + 700 + (paper.samples_per_prompt + 1) * 10)
  length = settings.text_row_length(paper)
  assert texts < exchanged.rows * length < 1.2 * texts  # lengths are drawn, and rows not quite full
  extent = programs.extent_of(flat, 300, 10, exchanged.counted)
  counted = estimate.count_flops({"exchange": programs.rollout_programs(flat, 64, extent)["exchange"]})["exchange"]
  rows, width = paper.rollout.score_rows, qwen.num_heads * qwen.head_dim
  layers = qwen.num_layers * (2 * weights_of_a_layer(qwen) + 4 * width * length)
  assert counted >= rows * length * layers
  assert counted == pytest.approx(
    rows * length * (layers + exchanged.counted * 2 * qwen.vocab_size * qwen.embed_dim), rel=0.03
  )
  paper.reward.baseline_policy = "averaged_weights"
  state = planner.flat_layout(paper, qwen, processes=1).state
  assert state["parameters"] == 8 * (state["optimiser"] - 4) // 8


def test_tokens_read_follow_the_lengths(paper, qwen, monkeypatch):
  """By hand, for a prompt of 100 tokens and a response of 3, and one of 10 and 300, in blocks of 128."""
  monkeypatch.setattr(estimate, "draw_lengths", lambda *_: [(100, [3]), (10, [300])])
  paper.data.prompt_limit, paper.rollout.max_response_length, paper.rollout.decode_steps = 500, 500, 24

  def read(reader, **windows):
    flat = planner.flat_layout(paper, dataclasses.replace(qwen, **windows), processes=1)
    sampler = flat.sampler._replace(sampling=dataclasses.replace(flat.sampler.sampling, decode_attention=reader))
    return estimate.tokens_read(flat._replace(sampler=sampler), LENGTHS, busy=0.5)

  assert read(None) == (1000, 1000)
  monkeypatch.setattr(models.ragged, "MOST_TOKENS", 128)
  full = (3 * 128 + 119 * 128 + 128 * 256 + 53 * 384) / 303  # texts of up to 128, 256 and 309 tokens
  assert read(models.Reader("tpu")) == pytest.approx((0.5 * full, (128 + 384) / 2))
  # The last 100 tokens are in two blocks at most; a third of the layers reads no more.
  windowed = (3 * 128 + 119 * 128 + 99 * 256 + 29 * 128 + 53 * 256) / 303
  windows = {"window": 100, "windowed": (True, False, False, False) * 7}
  mixed = (0.75 * full + 0.25 * windowed) / 2, (0.75 * 512 + 0.25 * 384) / 2
  assert read(models.Reader("tpu"), **windows) == pytest.approx(mixed)


def test_bytes_of_parameters_and_optimiser_are_exact(paper, qwen):
  c = qwen
  biases, norms = c.head_dim * (c.num_heads + 2 * c.num_kv_heads), 2 * c.embed_dim
  count = c.num_layers * (weights_of_a_layer(c) + biases + norms) + 2 * c.vocab_size * c.embed_dim + c.embed_dim
  assert count == 7_615_616_512
  state = planner.flat_layout(paper, qwen, processes=1).state
  assert state["parameters"] == 4 * count
  assert state["optimiser"] == 8 * count + 4  # moments, and the number of steps
  paper.training.kl_coefficient = 0.1
  assert planner.flat_layout(paper, qwen, processes=1).state["parameters"] == 8 * count
  paper.reward.scorer = "lagged"
  assert planner.flat_layout(paper, qwen, processes=1).state["parameters"] == 12 * count


def test_shapes_on_a_single_device_say_which(paper, qwen):
  """Or the compiler of this machine would plan for it."""
  layout = planner.flat_layout(paper, qwen, processes=1)
  shapes = jax.tree.leaves((layout.sampled, layout.policy.trained, layout.opt_state))
  assert {shape.sharding for shape in shapes} == {SingleDeviceSharding(jax.devices("cpu")[0])}


# --- fitting ---


@dataclasses.dataclass(frozen=True)
class Small(hardware.Slice):
  """This machine with less memory."""

  limit: int = 0

  @property
  def granted(self) -> float:
    return self.limit


def tiny_config(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(RECIPE)
  scope = {}
  exec(path.read_text(), scope)
  config = scope["get_config"]()
  config.data.prompt_limit, config.rollout.max_response_length = 128, 256
  config.prompts_per_step, config.rollout.slots, config.training.row_length = 32, 8, 0
  return config


def make_plan(config, model, place, search, cache):
  return planner.plan(planner.Planner(config, model, place, cache, lambda _: None), LENGTHS, search)


@pytest.mark.slow
def test_what_is_one_too_large_is_refused_and_what_is_proposed_fits(tmp_path, policy):
  """With room for two rows at a time, or three, and not for four, which are asked for."""
  config, model = tiny_config(tmp_path), policy.config
  local = planner.Planner(config, model, hardware.parse("local"), None, lambda _: None)
  needed = {}
  for rows in (2, 3, 4):
    program = programs.update_programs(local.layout, rows)["update"]
    needed[rows] = estimate.memory_peak(program, local.compile("update", program))
  assert needed[2] < needed[3] < needed[4]
  place = Small("local", None, limit=(needed[3] + needed[4]) // 2)
  config.training.micro_batch_rows = 4
  found = make_plan(config, model, place, True, tmp_path / "plans")
  assert not found["fits"]
  assert not found["programs"]["update"]["fits"]
  assert found["best"]["micro_batch_rows"] == 2
  assert "--config.training.micro_batch_rows=2" in table.of_one(found, 10)
  # Of many devices a plan has collectives, which one device's has not.
  found["programs"]["update"]["collectives"] = {"all-gather": Traffic(runs=12, received=3 * 2**30)._asdict()}
  assert "| all-gather 3.000 (12) |" in table.of_one(found, 10)
  config.training.micro_batch_rows, config.rollout.slots = 2, found["best"]["slots"]
  found = make_plan(config, model, place, False, tmp_path / "plans")
  assert found["fits"]


def test_nothing_fits(tmp_path, policy):
  place = Small("local", None, limit=1000)
  found = make_plan(tiny_config(tmp_path), policy.config, place, True, None)
  assert not found["fits"]
  assert found["best"] == {"slots": 0, "micro_batch_rows": 0}
  assert "Does not fit with a single slot" in table.of_one(found, 10)


def test_what_was_compiled_is_not_compiled_again(tmp_path, policy, monkeypatch):
  config = tiny_config(tmp_path)

  def found():
    place = hardware.parse("local")
    plan = make_plan(config, policy.config, place, False, tmp_path / "plans")
    return {name: program for name, program in plan["programs"].items()}

  first = found()
  monkeypatch.setattr(compiler.hlo, "traffic", None)  # nobody asks again
  assert found() == first
  for file in (tmp_path / "plans").iterdir():
    file.write_text("{")  # damaged: made anew
  with pytest.raises(TypeError):
    found()


# --- the program ---


def plan(*arguments, status=0):
  done = subprocess.run(
    [sys.executable, "-m", "rlpr_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done


def test_the_program(tmp_path):
  """Prints what it found; the second time at once, and as JSON."""
  (tmp_path / "tiny.py").write_text(RECIPE)
  arguments = [f"--config={tmp_path / 'tiny.py'}", "--topology=local", f"--config.compilation_cache={tmp_path / 'c'}"]
  first = plan(*arguments, "--nosearch")
  assert "| update |" in first.stdout
  assert "\n| insert | - | 0.00 |" in first.stdout
  assert "\n| update | xla | " in first.stdout  # the attention of its programs
  assert "compiling update" in first.stderr
  second = plan(*arguments, "--nosearch", "--json")
  assert "compiling" not in second.stderr
  found = json.loads(second.stdout)
  assert found["fits"]
  assert found["programs"]["update"]["operations"] > 0
  assert [found["programs"][name]["attention"] for name in ("insert", "decode", "update")] == ["", "xla", "xla"]
  assert not math.isnan(found["granted"])


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    pytest.param(["--topology=v5p:4x4"], "--topology: 'v5p:4x4', expected 3 sizes", marks=pytest.mark.slow),
    pytest.param([], "--topology: missing", marks=pytest.mark.slow),
    pytest.param(["--topology=local", "--config.model.path=/none"], "/none: no such directory", marks=pytest.mark.slow),
    pytest.param(["--topology=local", "--config.mesh.fsdp=3"], "config.mesh: sizes", marks=pytest.mark.slow),
    pytest.param(["--topology=local", "--compare=h100:8"], "--topology: ", marks=pytest.mark.slow),
  ],
)
def test_wrong_use_is_one_line(tmp_path, arguments, said):
  (tmp_path / "tiny.py").write_text(RECIPE)
  done = plan(f"--config={tmp_path / 'tiny.py'}", *arguments, status=2)
  assert done.stderr.splitlines()[-1].startswith(f"error: {said}")


# --- the compilers ---


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
  """No compiler is named, installed, or under .cache."""
  monkeypatch.setattr(compiler, "_checkout", lambda: tmp_path)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
  return tmp_path


METADATA = [
  "jaxlib<=0.12.0.1,>=0.11.2",
  'libtpu==0.0.50.*; extra == "tpu"',
  'requests; extra == "tpu"',
  'jax-cuda13-plugin[with-cuda]<=0.12.0.1,>=0.12.0.1; extra == "cuda13"',
  'jax-cuda13-plugin<=0.12.0.1,>=0.12.0.1; extra == "cuda13-local"',
]


@pytest.mark.parametrize(
  ("platform", "wanted"),
  [("tpu", ["libtpu==0.0.50.*"]), ("cuda", ["jax-cuda13-plugin==0.12.0.1", "jax-cuda13-pjrt==0.12.0.1"])],
)
def test_requirements(monkeypatch, platform, wanted):
  monkeypatch.setattr(compiler.importlib.metadata, "requires", lambda name: METADATA)
  assert compiler.requirements(platform) == wanted


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_requirements_of_this_jax_have_versions(platform):
  for requirement in compiler.requirements(platform):
    assert re.fullmatch(r"[\w-]+==[\d.]+\*?", requirement)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    (
      "v5p:2x2x1",
      r"no compiler for TPUs .*run `make libtpu`; installed: .*'libtpu==[\d.*]+', and set TPU_LIBRARY_PATH",
    ),
    ("h100:8", r"no compiler for GPUs .*run `make cuda-compiler`; .* jax-cuda13-pjrt==[\d.]+, and set PYTHONPATH=DIR$"),
  ],
)
def test_a_compiler_that_is_not_there(nowhere, name, said):
  with pytest.raises(InputError, match=said):
    compiler.environment(hardware.parse(name))


def test_a_library_that_is_not_there(monkeypatch):
  monkeypatch.setenv("TPU_LIBRARY_PATH", "/none/libtpu.so")
  with pytest.raises(InputError, match=r"^TPU_LIBRARY_PATH: /none/libtpu\.so: no such file"):
    compiler.environment(hardware.parse("v5p:2x2x1"))


def test_a_compiler_under_cache_is_for_this_jax(nowhere):
  cache = nowhere / ".cache" / "libtpu"
  (cache / "libtpu-0.0.1.dist-info").mkdir(parents=True)
  with pytest.raises(InputError, match="no compiler for TPUs"):
    compiler.environment(hardware.parse("v5p:2x2x1"))
  version = compiler.requirements("tpu")[0].partition("==")[2].replace("*", "7")
  (cache / f"libtpu-{version}.dist-info").mkdir()
  found = compiler.environment(hardware.parse("v5p:2x2x1"))
  assert found["TPU_LIBRARY_PATH"] == str(cache / "libtpu" / "libtpu.so")


def test_an_installed_package_brings_no_path(nowhere, monkeypatch):
  """Where it lies the child finds it; all that lies beside it would come before Python's own modules."""
  monkeypatch.setattr(compiler, "_checkout", lambda: None)
  monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name)
  monkeypatch.delenv("PYTHONPATH", raising=False)
  assert compiler.environment(hardware.parse("h100:8"))["PYTHONPATH"] == ""
