"""Attention kernels against plain XLA: splash interpreted, tokamax by its own form for CPUs."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax import models
from rlpr_jax.errors import InputError
from rlpr_jax.models import attention, kernels
from rlpr_jax.models.attention import AttentionSettings
from tests.models import attention_cases
from tests.models.attention_cases import distances, random_inputs

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 1e-5  # of the largest number, in float32


@pytest.fixture
def interpreted():
  with attention_cases.interpreted():
    yield


def assert_close(found, tolerance=TOLERANCE):
  assert max(found.values()) < tolerance, found


@pytest.mark.parametrize(
  ("length", "heads", "kv_heads", "head_dim", "softcap"),
  [
    (200, 4, 2, 64, 5.0),  # padded to 256, grouped queries
    (100, 2, 1, 256, 2.0),
    (640, 2, 2, 128, None),  # two blocks, and padding up to the end of the second
  ],
)
def test_splash(interpreted, length, heads, kv_heads, head_dim, softcap):
  inputs = random_inputs(2, length, heads, kv_heads, head_dim)
  settings = AttentionSettings("splash", head_dim**-0.5, softcap, window=length // 8)
  assert_close(distances(inputs, jnp.array(True), settings))
  assert_close(distances(inputs, jnp.array(False), settings))


def test_splash_without_windows(interpreted):
  assert_close(distances(random_inputs(2, 130, 2, 1, 64), None, AttentionSettings("splash", 0.125)))


def test_splash_window_matters(interpreted):
  """That the comparison sees a window that is off by one."""
  inputs, settings = random_inputs(1, 128, 1, 1, 64), AttentionSettings("splash", 0.125, window=16)
  y = attention_cases.attend(inputs, jnp.array(True), settings)["output"]
  wider = AttentionSettings("xla", 0.125, window=17)
  assert np.max(np.abs(y - attention_cases.attend(inputs, jnp.array(True), wider)["output"])) > 100 * TOLERANCE


def test_splash_bfloat16(interpreted):
  inputs = random_inputs(1, 128, 2, 1, 64)
  inputs = inputs._replace(**{name: getattr(inputs, name).astype(jnp.bfloat16) for name in inputs._fields[:4]})
  settings = AttentionSettings("splash", 0.125)  # a scale without rounding
  found = attention_cases.attend(inputs, None, settings)
  assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
  assert_close(distances(inputs, None, settings), tolerance=2**-7)


@pytest.mark.parametrize(
  ("length", "block"), [(1, 128), (128, 128), (300, 384), (512, 512), (640, 384), (1024, 512), (1280, 256), (1500, 512)]
)
def test_block_length(length, block):
  assert kernels.block_length(length) == block


def test_decoder(interpreted):
  """The scan over layers with and without a window, rematerialised, forwards and backwards, and a prefill."""
  config = models.ModelConfig(
    vocab_size=32,
    embed_dim=32,
    mlp_dim=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    window=5,
    windowed=(True, False, True),
    attention_softcap=2.0,
  )
  params = models.init_params(config, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 24)))
  positions = jnp.broadcast_to(jnp.arange(24) % 12, tokens.shape)
  segment_ids = jnp.broadcast_to(1 + jnp.arange(24) // 12, tokens.shape)

  def run(backend):
    model = models.definition(config, models.Runtime(attention=backend))

    def loss(params):
      hidden = nnx.merge(model, params)(tokens, positions, segment_ids)
      return jnp.sum(hidden**3), hidden

    gradients, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    return hidden, jax.jit(lambda params: nnx.merge(model, params).prefill(tokens))(params), gradients

  def assert_near(found, expected):
    assert np.max(np.abs(found - expected)) <= 2 * TOLERANCE * np.max(np.abs(expected))

  jax.tree.map(assert_near, run("splash"), run("xla"))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tokamax(softcap):
  """What a token sees, heads and scale. Which of its kernels serves a GPU is not seen here."""
  pytest.importorskip("tokamax", reason="tokamax is not installed: pip install tokamax==0.0.12")
  inputs, settings = random_inputs(2, 200, 4, 2, 64), AttentionSettings("tokamax", 0.1, softcap, window=25)
  for windowed in (jnp.array(True), jnp.array(False), None):
    assert_close(distances(inputs, windowed, settings))


def test_tokamax_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokamax", None)
  for name in [name for name in sys.modules if name.startswith("tokamax.")]:
    monkeypatch.delitem(sys.modules, name)
  inputs = random_inputs(1, 8, 1, 1, 64)
  with pytest.raises(InputError, match=r"^config\.model\.attention: 'tokamax' needs the package tokamax .*'xla'$"):
    attention.attend(*inputs[:3], inputs.segment_ids, AttentionSettings("tokamax", 0.125))


@pytest.fixture(scope="module")
def on_mesh():
  """Distances and parts on eight devices, by a process of its own."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
  }
  env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
  command = [sys.executable, "-m", "tests.models.attention_cases"]
  run = subprocess.run(command, cwd=ROOT, env=env, timeout=300, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split True", "split False", "replicated True", "replicated False"])
def test_splash_on_mesh(on_mesh, name):
  assert_close(on_mesh[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("split", [1, 40, 4, 64]), ("replicated", [2, 40, 2, 64])])
def test_splash_on_mesh_stays_split(on_mesh, name, part):
  assert on_mesh[f"{name} part"] == part


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "replicated"])
def test_tokamax_on_mesh(on_mesh, name):
  pytest.importorskip("tokamax", reason="tokamax is not installed: pip install tokamax==0.0.12")
  assert_close(on_mesh[f"{name} tokamax"])
