"""Attention kernels against plain XLA: splash interpreted, tokamax by its own form for CPUs."""

import json
import os
import pathlib
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax import models
from rlpr_jax.errors import InputError
from rlpr_jax.models import attention, blockwise, kernels, masks, transformer
from rlpr_jax.models.attention import AttentionSettings
from rlpr_jax.models.masks import Places, Spans
from tests.models import attention_cases
from tests.models.attention_cases import branched_inputs, distances, random_inputs

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


@pytest.mark.parametrize(
  ("length", "heads", "kv_heads", "head_dim", "softcap", "window"),
  [
    (200, 4, 2, 64, None, None),
    pytest.param(640, 7, 1, 128, 20.0, 24, marks=pytest.mark.slow),  # windows shorter than most branches, and a block
    (640, 2, 2, 64, 5.0, 200),  # reaches from a branch into its stem, over others
    pytest.param(1300, 2, 1, 64, None, 300, marks=pytest.mark.slow),  # places in units of two
  ],
)
def test_splash_with_branches(interpreted, length, heads, kv_heads, head_dim, softcap, window):
  inputs = branched_inputs(2, length, heads, kv_heads, head_dim)
  settings = AttentionSettings("splash", head_dim**-0.5, softcap, window)
  assert_close(distances(inputs, None, settings))
  if window is not None:
    assert_close(distances(inputs, jnp.array(True), settings))


@pytest.mark.parametrize(
  ("length", "heads", "kv_heads", "head_dim", "softcap", "window"),
  [
    (200, 4, 2, 64, None, None),  # padded to 256
    (384, 7, 1, 32, 20.0, 24),  # windows shorter than a block, and than most branches
    (330, 2, 2, 64, 5.0, 150),  # reaches from a branch into its stem, over others
  ],
)
@pytest.mark.parametrize("make", [random_inputs, branched_inputs])
def test_blockwise(make, length, heads, kv_heads, head_dim, softcap, window):
  inputs, settings = make(2, length, heads, kv_heads, head_dim), AttentionSettings("blockwise", 0.2, softcap, window)
  for windowed in (None, jnp.array(False), *([jnp.array(True)] if window else [])):
    assert_close(distances(inputs, windowed, settings))


def test_blockwise_bfloat16():
  inputs = branched_inputs(1, 200, 2, 1, 64)
  inputs = inputs._replace(**{name: getattr(inputs, name).astype(jnp.bfloat16) for name in inputs._fields[:4]})
  settings = AttentionSettings("blockwise", 0.125)  # a scale without rounding
  found = attention_cases.attend(inputs, None, settings)
  assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
  assert_close(distances(inputs, None, settings), tolerance=2**-7)


@pytest.mark.parametrize("make", [random_inputs, branched_inputs])
def test_blockwise_takes_the_blocks_in_which_something_is_seen(make):
  inputs = make(2, 6 * blockwise.BLOCK, 1, 1, 8)
  places = Places(inputs.segment_ids, jnp.array(True), group_ids=inputs.group_ids)
  sees = np.asarray(places.sees(30)).reshape(2, 6, blockwise.BLOCK, 6, blockwise.BLOCK).any(axis=(2, 4))
  found = blockwise._find_blocks(places, 30)
  np.testing.assert_array_equal(found.counts, sees.sum(axis=2).reshape(-1))
  taken = [np.sort(row[:count]) % 6 for row, count in zip(found.keys, found.counts, strict=True)]
  np.testing.assert_array_equal(np.concatenate(taken), np.concatenate([np.flatnonzero(x) for x in sees.reshape(12, 6)]))
  assert sees.mean() < 0.5


@pytest.mark.parametrize(("remat", "loops"), [("none", 2), ("dots", 2), ("full", 3)])
def test_blockwise_is_computed_again_where_remat_is_full_alone(remat, loops):
  """Loops over blocks of keys: one forwards and one backwards, and one more where nothing was kept."""
  config = models.ModelConfig(32, 32, 32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
  model, params = (
    models.definition(config, models.Runtime(attention="blockwise", remat=remat)),
    models.init_params(config, 0),
  )
  tokens = jnp.ones((1, 256), int)

  def loss(params):
    return jnp.sum(nnx.merge(model, params)(tokens, jnp.arange(256)[None], tokens))

  assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("while[") == loops


@pytest.mark.parametrize("windowed", [True, False])
def test_blockwise_holds_no_scores(windowed):
  """Temporary memory grows with the tokens, and not with their square."""
  settings = AttentionSettings("blockwise", 0.125, window=100)

  def temporary(length):
    inputs = branched_inputs(1, length, 2, 1, 64)
    compiled = attention_cases.attend.lower(inputs, jnp.array(windowed), settings).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(2048) < 2.5 * temporary(1024) < 2048 * 2048 * 4


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("make", [random_inputs, branched_inputs])
def test_splash_runs_the_blocks_in_which_something_is_seen(make, window):
  """Counted against the mask itself."""
  inputs, block = make(2, 1280, 1, 1, 64), 256
  ids, groups = inputs.segment_ids, inputs.segment_ids if inputs.group_ids is None else inputs.group_ids
  sees = np.asarray(Places(ids, jnp.array(True), group_ids=groups).sees(window))
  expected = sees.reshape(2, 5, block, 5, block).any(axis=(2, 4))
  spans = Spans.of(ids, groups)
  for row in range(2):
    found = masks.visible_blocks(jax.tree.map(lambda x, row=row: x[row], spans), window, block)
    np.testing.assert_array_equal(found, expected[row])
  assert expected.mean() < 0.6


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


@pytest.mark.parametrize("backend", ["splash", "blockwise"])
def test_decoder(interpreted, monkeypatch, backend):
  """The scan over layers with and without a window, rematerialised, forwards and backwards, and a prefill."""
  monkeypatch.setattr(attention, "ALL_AT_ONCE", 0)
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

  jax.tree.map(assert_near, run(backend), run("xla"))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tokamax(softcap):
  """What a token sees, heads and scale. Which of its kernels serves a GPU is not seen here."""
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  settings = AttentionSettings("tokamax", 0.1, softcap, window=25)
  for make in (random_inputs, branched_inputs):
    for windowed in (jnp.array(True), jnp.array(False), None):
      assert_close(distances(make(2, 200, 4, 2, 64), windowed, settings))


def test_tokamax_private_names():
  """All that is taken of its private modules: this fails when they move, where a run would go on with plain XLA."""
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  implementations, mask = kernels.import_tokamax()
  assert {"mosaic_gpu", "triton", "xla"} <= set(implementations)
  made = mask(k_start=jnp.zeros((2, 1, 8), jnp.int32), q_end=jnp.full((2, 1, 8), 8), is_causal=True)
  assert made.is_causal  # kept beside the range, or the future would be computed
  assert made.k_start.shape == (2, 1, 8)
  sees = np.asarray(mask(k_start=jnp.array([0, 0, 2, 2]), is_causal=True).as_array(4, 4))
  np.testing.assert_array_equal(sees.reshape(4, 4), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


# --- what goes wrong with tokamax ---

ROW = random_inputs(1, 8, 1, 1, 64)
EITHER, TOKAMAX, PLAIN = (AttentionSettings(name, 0.125) for name in ("tokamax_or_xla", "tokamax", "xla"))


class Mask(NamedTuple):
  """Stands for tokamax's."""

  k_start: jax.Array
  is_causal: bool


def doubles(queries, keys, values, **_):
  """An implementation that can be told from the right one."""
  return 2 * queries


def fails(error):
  def implementation(*_, **__):
    raise error

  return implementation


def fails_backwards(error):
  @jax.custom_vjp
  def double(queries):
    return 2 * queries

  double.defvjp(lambda queries: (2 * queries, None), fails(error))
  return lambda queries, keys, values, **_: double(queries)


@pytest.fixture
def implementations(monkeypatch):
  """What stands for tokamax's implementations. Whatever was said before is said again."""
  found = {}
  monkeypatch.setattr(kernels, "import_tokamax", lambda: (found, Mask))
  kernels._warn.cache_clear()
  yield found
  kernels._warn.cache_clear()


def attend(settings):
  """Without jit, so that nothing is kept from another test."""
  return np.asarray(attention.attend(*ROW[:3], Places(ROW.segment_ids), settings))


@pytest.mark.parametrize("make", [fails, fails_backwards])
@pytest.mark.parametrize("error", [TypeError, AttributeError, ImportError, RuntimeError])
def test_what_cannot_be_traced_is_passed_over(implementations, capsys, make, error):
  implementations |= {"mosaic_gpu": make(error("out_shape\nis gone")), "triton": doubles}
  for _ in range(2):
    np.testing.assert_array_equal(attend(EITHER), 2 * ROW.queries)
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1
  pattern = r"warning: attention: mosaic_gpu .* jax .*out_shape is gone\), going on with triton$"
  assert re.match(pattern, said[0])


@pytest.mark.parametrize("make", [fails, fails_backwards])
def test_what_is_for_other_devices_is_passed_over_in_silence(implementations, capsys, make):
  implementations |= {"mosaic_gpu": make(NotImplementedError("float32")), "triton": doubles}
  np.testing.assert_array_equal(attend(EITHER), 2 * ROW.queries)
  assert capsys.readouterr().err == ""


def test_plain_xla_comes_last(implementations, capsys):
  implementations |= {"mosaic_gpu": fails(TypeError("one")), "triton": fails(AttributeError("two")), "xla": doubles}
  np.testing.assert_array_equal(attend(EITHER), attend(PLAIN))
  said = capsys.readouterr().err.splitlines()
  assert [line.rpartition(" with ")[2] for line in said] == ["triton", "plain XLA"]


def test_tokamax_asked_for_takes_its_own_xla(implementations):
  implementations |= {"mosaic_gpu": fails(TypeError("one")), "triton": fails(TypeError("two")), "xla": doubles}
  np.testing.assert_array_equal(attend(TOKAMAX), 2 * ROW.queries)


def test_tokamax_asked_for_of_which_nothing_serves(implementations, capsys):
  implementations |= {"mosaic_gpu": fails(TypeError("one")), "triton": fails(NotImplementedError("two"))}
  pattern = r"^attention: 'tokamax', but tokamax.* jax [\d.]+ .*TypeError: one; .*two; xla: .*'xla'$"
  with pytest.raises(InputError, match=pattern):
    attend(TOKAMAX)
  assert len(capsys.readouterr().err.splitlines()) == 1  # of the last one the error speaks


@pytest.mark.parametrize("error", [ImportError("moved"), AttributeError("moved"), TypeError("moved")])
def test_tokamax_that_cannot_be_imported(implementations, monkeypatch, capsys, error):
  monkeypatch.setattr(kernels, "import_tokamax", fails(error))
  for _ in range(2):
    np.testing.assert_array_equal(attend(EITHER), attend(PLAIN))
  assert re.fullmatch(r"warning: attention: .*jax [\d.]+ .*moved.*plain XLA.*\n", capsys.readouterr().err)
  with pytest.raises(InputError, match=r"^attention: 'tokamax', but .*jax [\d.]+ .*moved.*'xla'$"):
    attend(TOKAMAX)


@pytest.fixture
def missing(monkeypatch):
  """tokamax is not installed."""
  monkeypatch.setitem(sys.modules, "tokamax", None)
  for name in [name for name in sys.modules if name.startswith("tokamax.")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(kernels.importlib.metadata, "version", fails(PackageNotFoundError("tokamax")))
  kernels._warn.cache_clear()


def test_tokamax_asked_for_and_missing(missing):
  with pytest.raises(InputError, match=r"^attention: 'tokamax', but tokamax, .*not installed .*'xla'$"):
    attend(TOKAMAX)


def test_auto_on_a_gpu_without_tokamax(missing, monkeypatch, capsys):
  """A decoder runs with plain XLA, and says so once."""
  config = models.ModelConfig(32, 16, 16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
  params, tokens = models.init_params(config, 0), jnp.arange(16).reshape(1, 16)
  gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
  monkeypatch.setattr(transformer, "_device", lambda sharding: gpu)

  def hidden(backend):
    model = models.definition(config, models.Runtime(attention=backend))
    return nnx.merge(model, params).prefill(tokens)[0]

  np.testing.assert_array_equal(hidden("auto"), hidden("xla"))
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1
  assert re.match(r"warning: attention: tokamax, of the extra cuda13, is not installed .*XLA", said[0])


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
@pytest.mark.parametrize("name", ["split", "replicated"])
def test_blockwise_on_mesh(on_mesh, name):
  assert_close(on_mesh[f"{name} blockwise"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("split", [1, 40, 4, 64]), ("replicated", [2, 40, 2, 64])])
def test_splash_on_mesh_stays_split(on_mesh, name, part):
  assert on_mesh[f"{name} part"] == part


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "replicated"])
def test_tokamax_on_mesh(on_mesh, name):
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  assert_close(on_mesh[f"{name} tokamax"])
