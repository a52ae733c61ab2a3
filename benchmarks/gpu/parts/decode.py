"""Decoding at the shapes of Qwen2.5-1.5B and 7B with the paper's limits: tokens a second, and how near to what the
memory's bandwidth allows."""

import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu import shapes
from benchmarks.gpu.measure import GIB, seconds, timed, unless_too_large
from benchmarks.gpu.parts.ceilings import BANDWIDTH, ceiling
from benchmarks.gpu.report import Report
from rlpr_jax import machine, models
from rlpr_jax.models import ModelConfig, Params
from rlpr_jax.models.ragged import GPU_BLOCK
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.decode import DecodeSettings, Slots
from rlpr_jax.sampling.shapes import Shapes, bucket

ITEM = 2  # bytes of a bfloat16
DTYPE = "bfloat16"
CALLS = 6  # one that compiles, and those that are timed; each adds `steps` tokens to the text


class Sizes(NamedTuple):
  models: dict[str, ModelConfig]
  prompt_limit: int
  response_limit: int
  steps: int  # tokens a call
  cases: tuple[tuple[int, int], ...]  # slots, tokens of text in each

  def shapes(self, slots: int, ragged: bool) -> Shapes:
    return Shapes(slots, self.prompt_limit, self.response_limit, 16, self.steps, 1, 1, 1, ragged=ragged)


def with_kernel() -> tuple[bool, ...]:
  """Whether a kernel reads the slots: as it is in runs on this device, and then without one."""
  return (True, False) if models.for_device(models.Runtime(), jax.devices()[0]).decode_attention else (False,)


def reader(sizes: Shapes) -> str:
  """`config.model.decode_attention` of slots of these shapes."""
  return "ragged" if sizes.ragged else "xla"


def sizes(rehearse: bool) -> Sizes:
  if rehearse:
    return Sizes({"tiny": shapes.TINY}, 128, 192, 4, ((8, 32), (8, 256), (2, 32)))
  configs = {"1.5B": shapes.QWEN2_5_1_5B, "7B": shapes.QWEN2_5_7B}
  # What says most comes first: time may end before the others.
  cases = ((128, 512), (128, 4096), (32, 512), (32, 4096), (512, 512), (512, 4096))
  return Sizes(configs, 2048, 3072, 16, cases)


def run(report: Report) -> None:
  size, bandwidth = sizes(report.rehearse), ceiling(report, BANDWIDTH)
  report.note(
    f"slots have room for prompts of {size.prompt_limit} and responses of {size.response_limit} tokens; calls of"
    f" {size.steps} tokens; weights and cache in bfloat16. 'ragged' is what runs take where it stands"
  )
  report.note(
    "bytes of a step: weights once, and keys and values: 'live' of the text that is there, 'read' of what the program"
    f" reads: with ragged whole blocks of {GPU_BLOCK} tokens, with xla up to the next quarter of the longest text. Both"
    f" over {bandwidth / 1e12:.3g} TB/s as measured"
  )
  for i, (name, config) in enumerate(size.models.items()):
    deadline = time.perf_counter() + report.left() / (len(size.models) - i)  # each model has its share of the time
    report.say(f"{name}: making parameters")
    with unless_too_large(report, f"{name}: parameters"):
      params, took = shapes.random_params(config, DTYPE), {}
      for (slots, text), ragged in itertools.product(size.cases, with_kernel()):
        of_slots = size.shapes(slots, ragged)
        what = f"{name}, {slots} slots of {text} tokens, {reader(of_slots)}"
        needed = shapes.weight_bytes(config, ITEM)
        needed += slots * of_slots.capacity * shapes.token_bytes(config, ITEM)
        if needed > machine.device_memory():
          room = f"{needed / GIB:.0f} GiB of weights and slots, of {machine.device_memory() / GIB:.0f}"
          report.note(f"{what}: left out, does not fit: {room}")
          continue
        # Compiling takes the most of it, and in proportion to the slots.
        expected = max((spent * max(slots / before, 1) for before, spent in took.items()), default=0)
        if time.perf_counter() + expected > deadline:
          report.note(f"{what}: left out, no time")
          continue
        report.say(what)
        began = time.perf_counter()
        with unless_too_large(report, what):
          _measure(report, name, config, params, of_slots, text, bandwidth)
        took[slots] = time.perf_counter() - began
      del params


def _measure(
  report: Report, name: str, config: ModelConfig, params: Params, sizes: Shapes, text: int, bandwidth: float
) -> None:
  call, kv_length = prepare(config, params, sizes, text)
  _, first = timed(call)
  took = seconds(call, CALLS - 1) / sizes.steps
  middle = text + CALLS // 2 * sizes.steps
  reach = -(-middle // GPU_BLOCK) * GPU_BLOCK if sizes.ragged else kv_length + sizes.steps
  live, read = (shapes.decode_bytes(config, sizes.slots, tokens, ITEM) for tokens in (middle, reach))
  report.row(
    "decode",
    {
      "model": name,
      "slots": sizes.slots,
      "text": text,
      "attention": reader(sizes),
      "read": reach,
      "first call s": first,
      "ms a step": 1e3 * took,
      "tokens/s": sizes.slots / took,
      "live GB": live / 1e9,
      "live, of the bandwidth": live / took / bandwidth,
      "read GB": read / 1e9,
      "read, of the bandwidth": read / took / bandwidth,
    },
  )


def prepare(config: ModelConfig, params: Params, sizes: Shapes, text: int):
  """A call that decodes `steps` tokens more in every slot, and how many tokens of each slot it reads."""
  model = models.definition(config, models.Runtime(DTYPE, decode_attention=reader(sizes)))
  settings, kv_length = DecodeSettings(sizes.steps, ()), bucket(sizes.kv_lengths, text + CALLS * sizes.steps)
  state = [filled_slots(model, params, sizes.slots, sizes.capacity, sizes.max_response_length, jnp.int32(text))]

  def call() -> jax.Array:
    slots, new = decode.decode(model, params, state.pop(), settings, sizes.slots, kv_length)
    state.append(slots)
    return new.counts  # the slots themselves are donated to the next call

  return call, kv_length


@functools.partial(jax.jit, static_argnames=("model", "slots", "capacity", "limit"))
def filled_slots(model: nnx.GraphDef, params: Params, slots: int, capacity: int, limit: int, text: jax.Array) -> Slots:
  """Slots as they are in the middle of a rollout: `text` tokens in each, random keys and values, all of them under way.

  The rows' caches are copies of one: random numbers for all would need more memory than the cache.
  """
  empty = decode.empty_slots(model, params, slots, capacity)

  def fill(x: jax.Array) -> jax.Array:
    row = jax.random.normal(jax.random.key(x.ndim), (x.shape[0], 1, *x.shape[2:]), x.dtype)
    return jnp.broadcast_to(row, x.shape)

  rows = jnp.arange(slots, dtype=jnp.uint32)
  return empty._replace(
    cache=jax.tree.map(fill, empty.cache),
    lengths=jnp.full_like(empty.lengths, text),
    hidden=jax.random.normal(jax.random.key(0), empty.hidden.shape, empty.hidden.dtype),
    keys=jnp.stack([rows, rows], axis=1),
    limits=jnp.full_like(empty.limits, limit),
    active=jnp.ones_like(empty.active),
  )
