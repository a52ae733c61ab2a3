"""The queue that plans count with, against the real scheduler on a device that only counts tokens."""

import jax
import numpy as np
import pytest

from rlpr_jax.config import default
from rlpr_jax.planning.queue import DRAWS, decode_calls, simulate
from rlpr_jax.sampling.decode import DecodeSettings, NewTokens, Prefilled, Slots
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.sampling.scheduler import Beginning, Scheduler
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.splicing import Splice
from rlpr_jax.training.carrying import budget
from rlpr_jax.types import Prompt

SAMPLES, LIMIT, PROMPT = 4, 64, 5


class CountingDevice(Device):
  """A response ends after as many tokens as it was told, and nothing is computed."""

  def __init__(self, shapes, lengths):
    """`lengths`: of each draw's samples."""
    own = {"shapes": shapes, "settings": DecodeSettings(shapes.steps, ())}
    own |= {"lengths": lengths, "ends": np.zeros(shapes.slots, np.int32)}
    for name, value in own.items():
      object.__setattr__(self, name, value)

  def empty_slots(self, params):
    slots = self.shapes.slots
    zeros = np.zeros(slots, np.int32)
    return Slots(
      cache=None, lengths=zeros, hidden=zeros, keys=zeros, limits=zeros, sampling=stack([SamplingParams()] * slots),
      counts=zeros, active=zeros > 0,
    )  # fmt: skip

  def prefill(self, params, prompts, width):
    return Prefilled(None, None, np.array([len(prompt.ids) for prompt in prompts], np.int32))

  def insert(self, params, slots, prompts, key, entries):
    slots = jax.tree.map(np.array, slots)
    for entry in entries:
      slots.lengths[entry.slot], slots.counts[entry.slot] = prompts.lengths[entry.row], 0
      slots.limits[entry.slot], slots.active[entry.slot] = entry.limit, entry.limit > 0
      of_group = self.lengths[entry.draw]
      begun = prompts.lengths[entry.row] - PROMPT  # of a response that goes on, which has a sample's number of its own
      self.ends[entry.slot] = of_group[entry.sample % len(of_group)] - begun
    return slots

  def move(self, params, slots, pairs, rows):
    slots = jax.tree.map(np.array, slots)
    for old, new in pairs:
      for x in (*jax.tree.leaves(slots), self.ends):
        x[new] = x[old]
    return slots

  def decode(self, params, slots, rows, kv_length, one=False):
    slots = jax.tree.map(np.array, slots)
    drawn = np.where(slots.active, np.minimum(self.shapes.steps, np.minimum(self.ends, slots.limits) - slots.counts), 0)
    counts = slots.counts + drawn
    finished = slots.active & (counts >= self.ends)
    active = slots.active & ~finished & (counts < slots.limits)
    tokens = np.zeros((rows, self.shapes.steps), np.int32)
    new = NewTokens(tokens, tokens.astype(np.float32), drawn[:rows], finished[:rows], active[:rows])
    return slots._replace(counts=counts, lengths=slots.lengths + drawn, active=active), new

  def score(self, params, cache, suffixes, most, kv_length):
    return [np.zeros(sum(suffix.mask), np.float32) for suffix in suffixes]


def scheduler(lengths, slots, steps, limit=LIMIT):
  shapes = Shapes(
    slots, prompt_limit=8, max_response_length=limit, suffix_length=4, steps=steps, prefill_rows=2, score_rows=8,
    insert_rows=SAMPLES, continues=True,
  )  # fmt: skip

  def splice(prompt, response):
    return [Splice(prefix_length=0, suffix_ids=[1, 2], answer_mask=[False, True])]

  return Scheduler(CountingDevice(shapes, lengths), {}, jax.random.key(0), lambda tokens: "", splice)


def drawn_lengths(count, seed=0):
  rng = np.random.default_rng(seed)
  return np.clip(np.round(rng.lognormal(np.log(16), 0.6, (count, SAMPLES))), 1, LIMIT).astype(int).tolist()


@pytest.mark.parametrize(("slots", "steps"), [(8, 1), (8, 4), (16, 5), (64, 4)])
def test_calls_are_those_of_the_scheduler(slots, steps):
  lengths = drawn_lengths(24)
  queue = scheduler(lengths, slots, steps)
  for draw in range(len(lengths)):
    queue.add(Prompt(ids=np.arange(PROMPT, dtype=np.int32)), draw, [LIMIT] * SAMPLES, SamplingParams())
  calls = 0
  while queue.busy:
    calls += bool(queue.running or queue.waiting)
    queue.round()
    assert np.count_nonzero(queue.slots.active) == len(queue.running)  # none is decoded that nobody waits for
  every = [n for group in lengths for n in group]
  assert queue.clock().slot_steps[0] == sum(every)
  # The last call may end early, and one that only reads texts decodes nothing.
  expected = decode_calls(every, slots, steps)
  assert abs(calls - expected) <= 1
  assert expected * steps - steps < queue.steps + steps <= (expected + 1) * steps


def config_of(carry, each=96):
  config = default()
  config.rollout.carry, config.rollout.prompts_per_draw = carry, each
  return config


def paper_lengths(each=96, seed=1):
  """Of draws as large as a process' share of the paper's on v5p:2x4x4: 768 tokens on average, 3,072 at most."""
  rng = np.random.default_rng(seed)
  lengths = rng.lognormal(np.log(768) - 0.18, 0.6, (DRAWS * each, 8))
  return np.clip(np.round(lengths), 1, 3072).astype(int).tolist()


def test_carrying_keeps_slots_busy():
  """At the paper's sizes: what slots wait for is the longest response, and what goes on is waited for by nobody."""
  lengths, slots = paper_lengths(), 120
  alone, two, carried = (
    simulate(config, lengths, slots, processes=1, draws=draws)
    for config, draws in ((config_of("none"), 1.0), (config_of("none"), 2.0), (config_of("partial"), 1.0))
  )
  assert alone.occupancy(slots) < 0.75
  assert two.occupancy(slots) > alone.occupancy(slots) + 0.05
  assert carried.occupancy(slots) > 0.92
  assert carried.tokens == pytest.approx(sum(map(sum, lengths)) / DRAWS, rel=0.05)  # as much is drawn as ends
  assert alone.read_again == alone.texts_again == 0
  assert 0 < carried.texts_again < 0.5 * 96 * 8  # of a draw's responses far fewer than go on with their groups
  assert carried.read_again < carried.tokens


def test_groups_go_on_as_in_the_scheduler():
  """Draws at the paper's sizes by the scheduler itself: as many slots are busy as are counted."""
  slots, each = 120, 48
  config, lengths = config_of("partial", each), paper_lengths(each)
  queue = scheduler(lengths, slots, config.rollout.decode_steps, limit=3072)
  prompt, waiting, busy, steps = Prompt(ids=np.arange(PROMPT, dtype=np.int32)), {}, 0, 0
  for draw in range(DRAWS):
    done = waiting | {draw * each + i: (0, [0] * 8) for i in range(each)}
    work = {}
    for number, (parts, so_far) in done.items():
      most = 3072 if parts else budget(number, config.rollout.carry_tokens)
      work[number] = [0 if n == d else min(most, 3072 - d) for n, d in zip(lengths[number], so_far, strict=True)]
    before = queue.clock()
    for number in sorted(work, key=lambda number: -max(work[number])):
      parts, so_far = done[number]
      begun = [
        Beginning(np.zeros(n, np.int32), np.zeros(n, np.float32), n == whole, parts)
        for n, whole in zip(so_far, lengths[number], strict=True)
        if parts
      ]
      queue.add(prompt, number, work[number], SamplingParams(), beginnings=begun)
    while queue.busy:
      queue.round()
    taken = (queue.clock() - before).slot_steps
    busy, steps = busy + taken[0] * (draw >= 2), steps + taken[1] * (draw >= 2)
    after = {
      number: (parts + 1, [min(d + most, n) for d, most, n in zip(so_far, work[number], lengths[number], strict=True)])
      for number, (parts, so_far) in done.items()
    }
    waiting = {number: group for number, group in after.items() if group[1] != lengths[number]}
    assert all(parts == 1 for parts, _ in waiting.values())
  counted = simulate(config, lengths, slots, processes=1, draws=1.0)
  assert busy / steps == pytest.approx(counted.occupancy(slots), abs=0.005)
  assert busy / steps > 0.85


def test_shares_of_processes_are_alike_where_groups_go_on():
  config, lengths = config_of("partial", 768), paper_lengths(768)
  one = simulate(config, lengths, 960, processes=1, draws=1.0)
  eight = simulate(config, lengths, 120, processes=8, draws=1.0)
  assert eight.steps == pytest.approx(one.steps, rel=0.1)
  assert eight.tokens == pytest.approx(one.tokens / 8)


def test_nothing_is_drawn():
  assert simulate(config_of("none", 2), paper_lengths(2), 8, 1, draws=0.0).steps == 0
