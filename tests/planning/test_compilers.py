"""Plans by the real compilers of TPUs and GPUs, on a machine that has neither."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import own_machine
from rlpr_jax.errors import InputError
from rlpr_jax.planning import compiler, hardware
from tests.planning.qwen import QWEN
from tests.planning.sizes import SIZES

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = """
from rlpr_jax.config import default

def get_config():
  c = default()
  c.model.path = {model!r}
  c.model.compute_dtype = "bfloat16"
  c.prompts_per_step = 64
  c.data.prompt_limit = 512
  c.rollout.max_response_length = 512
  c.rollout.slots = 64
  c.rollout.prompts_per_draw = 64
  c.compilation_cache = ""
  return c
"""
LAYERS, VOCABULARY = 4, 32000  # of a model like Qwen2.5-7B, cut down: minutes less


def compiler_for(topology):
  try:
    return compiler.environment(hardware.parse(topology))
  except InputError:
    return None


tpu = pytest.mark.skipif(not compiler_for("v5p:2x2x1"), reason="no TPU compiler for this JAX: run make libtpu")
gpu = pytest.mark.skipif(not compiler_for("h100:8"), reason="no GPU compiler for this JAX: run make cuda-compiler")
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path) -> pathlib.Path:
  (tmp_path / "model").mkdir()
  sizes = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
  (tmp_path / "model/config.json").write_text(json.dumps(QWEN | sizes))
  (tmp_path / "recipe.py").write_text(RECIPE.format(model=str(tmp_path / "model")))
  return tmp_path / "recipe.py"


def start(recipe, topology, *arguments):
  command = [sys.executable, "-m", "rlpr_jax.plan", f"--config={recipe}", f"--topology={topology}", "--json", "--fast"]
  return subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def plan(recipe, topology, *arguments, status=0):
  return finish(start(recipe, topology, *arguments), status)


def finish(process, status=0):
  out, err = process.communicate(timeout=1500)
  assert process.returncode in ((0, 3) if status is None else (status,)), err[-4000:]
  return json.loads(out)


@pytest.mark.parametrize("reading", ["ragged", "xla"])
@pytest.mark.parametrize(
  "topology",
  [pytest.param("v6e:2x2", marks=tpu), pytest.param("v4:2x2x1", marks=tpu), pytest.param("h100:4", marks=gpu)],
)
def test_decoding_copies_no_cache(recipe, topology, reading):
  """More slots a chip take what their keys and values take, and some rows of logits; the least copy would be half."""
  reading = f"--config.model.decode_attention={reading}"
  few, many = (plan(recipe, topology, "--nosearch", reading, f"--config.rollout.slots={n}") for n in (64, 128))
  each = (many["programs"]["decode"]["peak"] - few["programs"]["decode"]["peak"]) / 16
  room = -(-(512 + 512 + 16) // 128) * 128
  cache, logits = room * LAYERS * 4 * 128 * 2 * 2, VOCABULARY * 4
  assert cache < each < cache + 12 * logits < 1.2 * cache


@pytest.mark.parametrize("name", own_machine.SETTINGS)
def test_what_is_recommended_for_a_machine_fits_it(tmp_path, name):
  topology, model = name.split("/")
  if not compiler_for(topology):
    pytest.skip(f"no compiler for {topology} with this JAX: run make libtpu, make cuda-compiler")
  (tmp_path / "config.json").write_text(json.dumps(SIZES[model]))
  recipe = f"configs/own_machine.py:{name}"
  assert plan(recipe, topology, "--nosearch", f"--config.model.path={tmp_path}")["fits"]


@tpu
def test_parts_on_a_slice(recipe):
  """Sizes on each of sixteen chips, and what they send each other for an update of one micro-batch."""
  found = plan(recipe, "v5e:4x4", "--nosearch", "--config.rollout.prefill_prompts=16")
  assert (found["chips"], found["processes"], found["mesh"]["fsdp"]) == (16, 4, 16)
  embed, head = 3584, VOCABULARY * 3584
  layer = embed * 128 * (2 * 28 + 2 * 4) + 3 * embed * 18944
  everywhere = LAYERS * (2 * embed + 36 * 128) + embed  # norms and biases are not split over fsdp
  assert found["programs"]["update"]["parts"]["parameters"] == 4 * ((LAYERS * layer + 2 * head) // 16 + everywhere)
  gathered = 15 / 16 * 2 * (LAYERS * layer + 2 * head)  # bytes of one pass over the weights, in bfloat16
  received = sum(one["received"] for one in found["programs"]["update"]["collectives"].values())
  # Weights forwards and backwards, and their gradients; those of the head, in parts of the rows, more often.
  assert 2.9 * gathered < received < 5 * gathered


@tpu
def test_too_many_rows_are_refused_and_what_is_proposed_compiles(recipe):
  """Sizes double from what fits to what the compiler refuses; what is proposed instead fits."""
  micro, rows = "--config.training.micro_batch_rows={}", 16
  while plan(recipe, "v5e:2x2", "--nosearch", micro.format(rows), status=None)["fits"]:
    rows *= 2
  found = plan(recipe, "v5e:2x2", micro.format(rows), status=3)
  assert not found["programs"]["update"]["fits"]
  best = found["best"]
  assert 4 <= best["micro_batch_rows"] < rows
  settings = [f"--config.rollout.slots={best['slots']}", micro.format(best["micro_batch_rows"])]
  assert plan(recipe, "v5e:2x2", "--nosearch", *settings)["fits"]


@tpu
def test_two_at_the_same_time(recipe):
  one, other = start(recipe, "v5e:2x2", "--nosearch"), start(recipe, "v5p:2x2x1", "--nosearch")
  assert {finish(one)["topology"], finish(other)["topology"]} == {"v5e:2x2", "v5p:2x2x1"}


def attention(found):
  return {name: program["attention"] for name, program in found["programs"].items()}


@tpu
def test_attention_on_tpus(recipe):
  found = attention(plan(recipe, "v5e:2x2", "--nosearch"))
  assert found == {
    "gather": "",
    "insert": "",
    "prefill": "splash",
    "decode": "ragged",
    "score": "ragged",
    "update": "splash",
  }


@gpu
@pytest.mark.parametrize(("topology", "processes"), [("h100:2", 1), ("h200:2x2", 4)])
def test_gpus(recipe, topology, processes):
  """With the kernel of such a GPU, and not what the CPU that plans would take."""
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  found = plan(recipe, topology, "--nosearch")
  assert found["processes"] == processes
  assert found["fits"]
  assert found["programs"]["update"]["collectives"]["all-gather"]["received"] > 0
  assert attention(found) == {
    "gather": "", "insert": "", "prefill": "mosaic_gpu", "decode": "ragged", "score": "ragged", "update": "mosaic_gpu",
  }  # fmt: skip


@gpu
def test_gpus_in_float32(recipe):
  """Mosaic is for bfloat16."""
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  found = plan(recipe, "h100:1", "--nosearch", "--config.model.compute_dtype=float32")
  assert attention(found)["prefill"] == "triton"
