"""filtering.py: what must hold whatever the spreads are."""

import math

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlpr_jax import filtering
from rlpr_jax.filtering import FilterConfig, FilterState

PROPERTY = settings(deadline=None, max_examples=50, derandomize=True)
PROMPTS = 5
SPREAD = st.one_of(st.floats(0, 2, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))
# A step may have no spread at all that is a number.
STEP = st.one_of(hnp.arrays(np.float32, PROMPTS, elements=SPREAD), st.just(np.full(PROMPTS, np.nan, np.float32)))
FINITE = hnp.arrays(np.float32, PROMPTS, elements=st.floats(0, 2, width=32))


@jax.jit
def take_in(state, stds, alpha, collect_from, start):
  """Compiled once for all configs."""
  return filtering.update(state, stds, FilterConfig(alpha=alpha, collect_from=collect_from, start=start))


@PROPERTY
@given(st.lists(STEP, max_size=30), st.floats(0.001, 1), st.integers(1, 9), st.integers(0, 6))
def test_state_is_the_closed_form(steps, alpha, collect_from, warm_up):
  """beta = (1 - a)^k beta_0 + sum_j a (1 - a)^(k - j) m_j, m_j the means of the k steps that had one, after beta_0."""
  start = collect_from + warm_up
  state = filtering.init(FilterConfig())
  for stds in steps:
    state = take_in(state, stds, alpha, collect_from, start)

  finite = [stds[np.isfinite(stds)].astype(np.float64) for stds in steps]
  means = [(step, values.mean()) for step, values in enumerate(finite, start=1) if values.size]
  first = [mean for step, mean in means if collect_from <= step < start]
  later = [mean for step, mean in means if step >= start]
  if not first:  # nothing was collected: the first step that filters begins the average
    first, later = later[:1], later[1:]
  k = len(later)
  beta = (1 - alpha) ** k * np.mean(first) if first else 0.0
  beta += sum(alpha * (1 - alpha) ** (k - j) * mean for j, mean in enumerate(later, start=1))
  assert int(state.step) == len(steps)
  assert int(state.collected) == len(first)
  np.testing.assert_allclose(state.average, beta, rtol=1e-5, atol=1e-7)

  config = FilterConfig(alpha=alpha, collect_from=collect_from, start=start, scale=0.7)
  in_force = first and len(steps) + 1 >= start
  np.testing.assert_allclose(
    filtering.threshold(state, config), 0.7 * beta if in_force else -np.inf, rtol=1e-5, atol=1e-7
  )


@PROPERTY
@given(STEP, st.permutations(range(PROMPTS)), st.integers(0, 12), st.floats(0, 2, width=32))
def test_the_order_of_prompts_does_not_matter(stds, order, step, average):
  order, config = np.array(order), FilterConfig()
  state = FilterState(np.int32(step), np.float32(average), np.int32(max(min(step - 5, 5), 0)))
  kept = np.asarray(filtering.keep(state, stds, config))
  np.testing.assert_array_equal(filtering.keep(state, stds[order], config), kept[order])
  one, other = (take_in(state, x, 0.3, 6, 11) for x in (stds, stds[order]))
  for found, expected in zip(other, one, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@PROPERTY
@given(STEP, hnp.arrays(np.float32, PROMPTS, elements=st.floats(0, 1, width=32)), st.floats(0, 2, width=32))
def test_to_spread_further_never_drops_a_prompt(stds, more, average):
  config, state = FilterConfig(), FilterState(np.int32(20), np.float32(average), np.int32(5))
  before = np.asarray(filtering.keep(state, stds, config))
  after = np.asarray(filtering.keep(state, stds + more, config))
  assert not np.any(before & ~after)
  assert not np.any(after[~np.isfinite(stds)])
  assert np.array_equal(before, np.isfinite(stds) & (stds >= np.float32(0.5) * np.float32(average)))


@PROPERTY
@given(FINITE, hnp.arrays(np.float32, PROMPTS, elements=st.floats(0, 2, width=32)), st.floats(0, 2, width=32))
def test_a_prompts_scale_is_its_own(stds, scales, average):
  state = FilterState(np.int32(20), np.float32(average), np.int32(5))
  found = filtering.keep(state, stds, FilterConfig(), scales=scales)
  alone = [bool(filtering.keep(state, stds[p : p + 1], FilterConfig(scale=scales[p]))[0]) for p in range(PROMPTS)]
  np.testing.assert_array_equal(found, alone)


@PROPERTY
@given(hnp.arrays(bool, st.tuples(st.just(4), st.sampled_from([1, 2, 5]))), st.randoms(use_true_random=False))
def test_mixed_groups_hold_two_kinds_of_response(correct, random):
  expected = [len(set(group)) == 2 for group in correct.tolist()]
  np.testing.assert_array_equal(filtering.keep_mixed(correct), expected)
  order = random.sample(range(correct.shape[1]), correct.shape[1])
  np.testing.assert_array_equal(filtering.keep_mixed(correct[:, order].astype(np.float32)), expected)
  np.testing.assert_array_equal(filtering.keep_mixed(~correct), expected)
