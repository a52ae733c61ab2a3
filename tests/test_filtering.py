"""filtering.py against plain Python numbers that follow section 6 of RLPR's statement word by word."""

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlpr_jax import filtering
from rlpr_jax.filtering import FilterConfig

STEPS, PROMPTS = 30, 24


def simulate(spreads, scale, alpha):
  """Thresholds in force and prompts kept, step by step, in Python floats."""
  thresholds, kept = [], []
  warm_up, beta = [], None
  for step, stds in enumerate(spreads, start=1):
    stds = [float(std) for std in stds]
    if step >= 11 and beta is None and warm_up:
      beta = statistics.fmean(warm_up)
    limit = -math.inf if step < 11 or beta is None else scale * beta
    thresholds.append(limit)
    kept.append([math.isfinite(std) and std >= limit for std in stds])
    finite = [std for std in stds if math.isfinite(std)]
    if finite:
      mean = statistics.fmean(finite)
      if 6 <= step <= 10:
        warm_up.append(mean)
      elif step >= 11:
        beta = mean if beta is None else (1 - alpha) * beta + alpha * mean
  return np.array(thresholds), np.array(kept)


def run(spreads, config):
  """The same with `filtering`: the threshold and what is kept are asked for before the step is taken in."""
  state = filtering.init(config)
  thresholds, kept = [], []
  for stds in spreads:
    thresholds.append(float(filtering.threshold(state, config)))
    kept.append(np.asarray(filtering.keep(state, stds, config)))
    state = filtering.update(state, stds, config)
  return np.array(thresholds), np.array(kept)


def make_spreads(seed=0):
  """Thirty steps that shrink as training does, with some prompts whose spread is not a number."""
  rng = np.random.default_rng(seed)
  spreads = rng.gamma(2.0, 0.1, (STEPS, PROMPTS)) * np.linspace(1.5, 0.5, STEPS)[:, None]
  spreads[rng.random(spreads.shape) < 0.2] = 0.0
  for value in (np.nan, np.inf, -np.inf):
    spreads[rng.random(spreads.shape) < 0.04] = value
  return spreads.astype(np.float32)


def make_holes(spreads, *steps):
  spreads = spreads.copy()
  for step in steps:
    spreads[step - 1] = np.resize([np.nan, np.inf, -np.inf], PROMPTS)
  return spreads


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("alpha", [0.01, 0.3])
@pytest.mark.parametrize(
  "holes",
  [
    (),
    (3,),
    (6,),
    (8, 20),
    (10,),
    (11,),
    (6, 7, 8, 9),
    (6, 7, 8, 9, 10),
    (6, 7, 8, 9, 10, 11, 12),
    tuple(range(1, 31)),
  ],
)
def test_thirty_steps(scale, alpha, holes):
  spreads = make_holes(make_spreads(), *holes)
  thresholds, kept = simulate(spreads, scale, alpha)
  near = np.isclose(spreads, thresholds[:, None], rtol=1e-5, atol=0)
  assert not np.any(near & np.isfinite(spreads))  # none so near that float32 may decide otherwise
  found_thresholds, found_kept = run(spreads, FilterConfig(scale=scale, alpha=alpha))
  np.testing.assert_allclose(found_thresholds, thresholds, rtol=2e-6)
  np.testing.assert_array_equal(found_kept, kept)
  if not holes:
    assert 0 < kept[10:].mean() < kept[:10].mean()  # it filters something


def test_defaults_are_the_papers_for_qwen():
  config = FilterConfig()
  assert (config.kind, config.scale, config.alpha, config.collect_from, config.start) == ("ema", 0.5, 0.01, 6, 11)


def test_warm_up_keeps_every_finite_prompt_whatever_it_spreads():
  spreads = np.resize(np.array([0.0, 1e-9, 0.3, np.nan], np.float32), (10, 4))
  _, kept = run(spreads, FilterConfig(scale=100.0))
  np.testing.assert_array_equal(kept, np.resize([True, True, True, False], (10, 4)))


def test_steps_before_six_leave_no_trace():
  spreads = make_spreads()
  other = spreads.copy()
  other[:5] = 1000.0
  np.testing.assert_array_equal(run(spreads, FilterConfig())[0], run(other, FilterConfig())[0])


def test_each_step_from_six_to_ten_counts_the_same():
  for step in range(6, 11):
    spreads = np.full((11, 3), 0.2, np.float32)
    spreads[step - 1] = 0.7
    assert run(spreads, FilterConfig())[0][10] == pytest.approx(0.5 * (4 * 0.2 + 0.7) / 5, rel=1e-6)


def test_a_step_is_judged_by_the_steps_before_it_alone():
  spreads = make_spreads()
  thresholds, _ = run(spreads, FilterConfig(alpha=0.3))
  for step in (11, 12, 20):
    other = spreads.copy()
    other[step - 1] *= 7
    found, _ = run(other, FilterConfig(alpha=0.3))
    np.testing.assert_array_equal(found[:step], thresholds[:step])
    assert found[step] > 1.01 * thresholds[step]  # the next one feels it


def test_prompts_that_are_dropped_count_in_the_average():
  spreads = np.full((13, 2), 0.4, np.float32)
  spreads[10] = [0.0, 0.6]
  thresholds, kept = run(spreads, FilterConfig(alpha=0.5))
  np.testing.assert_array_equal(kept[10], [False, True])
  assert thresholds[11] == pytest.approx(0.5 * (0.5 * 0.4 + 0.5 * 0.3), rel=1e-6)


@pytest.mark.parametrize("kind", filtering.KINDS)
def test_non_finite_spreads_are_dropped_by_every_kind(kind):
  stds = np.array([np.nan, np.inf, -np.inf, 0.5], np.float32)
  config = FilterConfig(kind=kind)
  state = filtering.init(config)
  mixed = np.resize(np.array([1, 0], np.float32), (4, 2))
  for _ in range(12):
    np.testing.assert_array_equal(filtering.keep(state, stds, config, mixed), [False, False, False, True])
    state = filtering.update(state, stds, config)
    assert np.isfinite(state.average)


def test_fixed_threshold_holds_from_the_first_step_and_includes_itself():
  config = FilterConfig(kind="fixed", threshold=0.25)
  spreads = np.resize(np.array([0.0, 0.2499, 0.25, 0.5], np.float32), (15, 4))
  thresholds, kept = run(spreads, config)
  np.testing.assert_array_equal(thresholds, np.full(15, 0.25))
  np.testing.assert_array_equal(kept, np.resize([False, False, True, True], (15, 4)))


def test_moving_threshold_includes_itself():
  spreads = np.full((11, 2), 0.5, np.float32)
  spreads[10] = [0.25, np.nextafter(np.float32(0.25), np.float32(0))]
  np.testing.assert_array_equal(run(spreads, FilterConfig())[1][10], [True, False])


def test_off_keeps_every_finite_prompt():
  thresholds, kept = run(make_spreads(), FilterConfig(kind="off", scale=100.0))
  assert np.all(thresholds == -np.inf)
  np.testing.assert_array_equal(kept, np.isfinite(make_spreads()))


def test_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="filter kind 'median': expected one of ema, fixed, accuracy, share, off"):
    filtering.init(FilterConfig(kind="median"))


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_accuracy_drops_what_is_all_right_and_all_wrong(kind):
  correct = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]]).astype(kind)
  mixed = [False, True, True, False, True]
  np.testing.assert_array_equal(filtering.keep_mixed(correct), mixed)
  np.testing.assert_array_equal(jax.jit(jax.vmap(filtering.keep_mixed))(correct), mixed)
  config = FilterConfig(kind="accuracy", scale=100.0, threshold=100.0)
  state = filtering.init(config)
  stds = np.array([0.5, 0.0, 0.3, 0.9, np.nan], np.float32)  # how far they spread does not matter
  for _ in range(12):
    np.testing.assert_array_equal(filtering.keep(state, stds, config, correct), [False, True, True, False, False])
    state = filtering.update(state, stds, config)
  assert float(filtering.threshold(state, config)) == -np.inf


def test_a_group_of_one_is_never_mixed():
  np.testing.assert_array_equal(filtering.keep_mixed(np.array([[0], [1]])), [False, False])


def test_accuracy_without_a_verifier_is_refused():
  config = FilterConfig(kind="accuracy")
  with pytest.raises(ValueError, match='filter kind "accuracy": expected correct'):
    filtering.keep(filtering.init(config), np.ones(3, np.float32), config)


@pytest.mark.parametrize("kind", ["ema", "fixed", "off"])
def test_the_other_kinds_do_not_look_at_the_verifier(kind):
  config = FilterConfig(kind=kind)
  stds, wrong = np.array([0.1, 0.5, np.nan], np.float32), np.zeros((3, 2))
  keep = [filtering.keep(filtering.init(config), stds, config, *correct) for correct in ((), (wrong,))]
  np.testing.assert_array_equal(*keep)


def test_scales_of_sources():
  """Each prompt against its own multiple of one average; the config's is for those without a say."""
  config = FilterConfig(scale=0.5, alpha=0.3)
  scales = np.resize(np.array([0.5, 0.9, 1.0, 0.0], np.float32), PROMPTS)
  spreads = make_spreads()
  by_scale = {scale: simulate(spreads, float(scale), config.alpha)[1] for scale in np.unique(scales)}
  state = filtering.init(config)
  keep = jax.jit(lambda state, stds, scales: filtering.keep(state, stds, config, scales=scales))
  for step, stds in enumerate(spreads):
    expected = [by_scale[scale][step, p] for p, scale in enumerate(scales)]
    np.testing.assert_array_equal(keep(state, stds, scales), expected)
    np.testing.assert_array_equal(
      filtering.keep(state, stds, config, scales=np.full(PROMPTS, 0.5)), filtering.keep(state, stds, config)
    )
    state = filtering.update(state, stds, config)
  np.testing.assert_allclose(filtering.threshold(state, config, scales), scales * state.average, rtol=1e-6)
  assert filtering.threshold(state, config).shape == ()


@pytest.mark.parametrize("kind", ["fixed", "accuracy", "off"])
def test_scales_are_of_the_moving_average_alone(kind):
  config = FilterConfig(kind=kind, threshold=0.2)
  state = filtering.FilterState(jnp.int32(20), jnp.float32(0.4), jnp.int32(5))
  stds, mixed = np.array([0.1, 0.3], np.float32), np.array([[0, 1], [1, 0]])
  plain = filtering.keep(state, stds, config, mixed)
  np.testing.assert_array_equal(filtering.keep(state, stds, config, mixed, scales=np.full(2, 100.0)), plain)
  assert np.any(plain)


def test_other_warm_ups():
  """Nothing to collect: the first step that filters has nothing to go by, and its own mean begins the average."""
  spreads = make_spreads()[:, :4]
  config = FilterConfig(collect_from=1, start=1)
  thresholds, _ = run(spreads, config)
  first = np.mean(spreads[0][np.isfinite(spreads[0])])
  assert thresholds[0] == -np.inf
  assert thresholds[1] == pytest.approx(0.5 * first, rel=1e-6)


def test_under_jit_a_state_keeps_its_form_and_compiles_once():
  config = FilterConfig(alpha=0.3)
  traced = []

  def watch(function):
    """Notes each tracing, of which there is one for each compilation."""

    @jax.jit
    def call(*args):
      traced.append(function)
      return function(*args, config=config)

    return call

  update, keep = watch(filtering.update), watch(filtering.keep)
  state = jax.jit(lambda: filtering.init(config))()
  spreads = make_holes(make_spreads(), 8, 20)
  _, kept = simulate(spreads, config.scale, config.alpha)
  form = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for step, stds in enumerate(spreads):
    np.testing.assert_array_equal(keep(state, stds), kept[step])
    state = update(state, stds)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == form
  assert traced == [filtering.keep, filtering.update]
  assert state.step == STEPS


def test_state_that_went_to_disk_and_back_goes_on_the_same():
  config, spreads = FilterConfig(alpha=0.3), make_spreads()
  thresholds, _ = run(spreads, config)
  state = filtering.init(config)
  for step, stds in enumerate(spreads):
    state = filtering.FilterState(*(jnp.asarray(np.array(field)) for field in state))
    assert float(filtering.threshold(state, config)) == thresholds[step]
    state = filtering.update(state, stds, config)


def test_config_is_hashable_and_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    FilterConfig().scale = 1.0
  assert hash(FilterConfig()) == hash(FilterConfig())  # jit takes it as a static argument
