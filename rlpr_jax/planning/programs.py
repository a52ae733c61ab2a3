"""The programs of a training step at a config's true shapes, traced on devices that may be only described.

gather:   trained parameters -> the copy that samples        prefill, insert, decode, score:   a process's rollouts
exchange: own answers behind each other's reasoning, a micro-batch, where a reward asks for it
update:   one minibatch, micro-batch by micro-batch
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from rlpr_jax import models, sharding, types
from rlpr_jax.errors import in_field
from rlpr_jax.models import ModelConfig, Params
from rlpr_jax.models.cache_rows import CACHE
from rlpr_jax.models.logprobs import chunk_length
from rlpr_jax.planning.hardware import Slice
from rlpr_jax.policy import Policy, create_mesh, create_sharding, place_policy
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.sampling.shapes import bucket
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.logprobs import LogprobProgram, compute_logprobs
from rlpr_jax.training.optimizer import abstract_opt_state, create_optimizer
from rlpr_jax.training.reward import looks_at_answers
from rlpr_jax.training.settings import (
  check_lengths,
  check_rows,
  rollout_shapes,
  row_length,
  text_row_length,
  update_settings,
)
from rlpr_jax.training.state import keeps_initial
from rlpr_jax.training.update import Trainable, UpdateProgram, optimizer_step
from rlpr_jax.types import PackedRows

WITHOUT_ATTENTION = ("gather", "insert")  # and without any product: they move what others computed
_EOS = 0  # which token ends a response changes no program


class Program(NamedTuple):
  """One compiled function of a step."""

  trace: Callable[[], jax.stages.Traced]
  trips: tuple[int, ...]  # how often a loop runs whose length the data decide, and one inside it
  parts: dict[str, int]  # bytes a device of its arguments and of what is alive beside them
  beside: int  # bytes a device of those that are not its arguments


class Layout(NamedTuple):
  """A config on devices: everything that the programs are made of."""

  config: ConfigDict
  policy: Policy
  sampler: Policy  # the same, as a process runs it on its own devices
  sampled: Params  # shapes of the parameters that sample
  opt_state: optax.OptState
  optimizer: optax.GradientTransformation
  state: dict[str, int]  # bytes a device of what lives from step to step
  processes: int


def place_on_slice(config: ConfigDict, model_config: ModelConfig, place: Slice) -> Layout:
  """The config on the devices of a slice.

  Raises:
    InputError: a config that cannot be run there.
  """
  devices = place.describe()
  process_mesh = mesh = create_mesh(config, devices)
  process_devices = place.describe_host(devices)
  if process_devices is not devices:
    with in_field("config.mesh"):
      process_mesh = sharding.create_mesh(1, -1, config.mesh.tensor, process_devices)
  return place_on_mesh(config, model_config, mesh, process_mesh)


def place_on_mesh(config: ConfigDict, model_config: ModelConfig, mesh: Mesh, own: Mesh) -> Layout:
  """The config on a mesh; `own`: the devices of one of its processes."""
  frozen: Params = {}
  if config.lora.rank:
    where = sharding.fit(create_sharding(config, mesh), models.axis_sizes(model_config))
    frozen = _cast(models.abstract_params(model_config, where), config.lora.base_dtype)
  policy = place_policy(config, model_config, mesh, frozen)
  check_rows(config, policy.sharding)
  check_lengths(config, policy.config.max_length)
  on_own = dataclasses.replace(policy.gathered, mesh=own)
  sampling = dataclasses.replace(policy.sampling, sharding=sharding.Sharding(on_own.mesh, on_own.rules))
  merged = policy.merged_params(policy.trained)
  sampled = _like(_sampling_dtypes(policy, merged), models.abstract_params(policy.config, sampling.sharding))
  sampled = _on_device(sampled, own)
  optimizer = create_optimizer(config)
  opt_state = _on_device(abstract_opt_state(optimizer, policy.trained, policy.sharding), mesh)
  policy = policy._replace(trained=_on_device(policy.trained, mesh), frozen=_on_device(policy.frozen, mesh))
  copies = keeps_initial(config) + (config.reward.scorer == "lagged")
  copies += config.reward.baseline_policy == "averaged_weights"
  state = {
    "parameters": device_bytes(policy.trained) * (1 + copies),
    "frozen": device_bytes(policy.frozen),
    "optimiser": device_bytes(opt_state),
  }
  sampler = policy._replace(sampling=sampling, sampler=models.definition(policy.config, sampling))
  return Layout(config, policy, sampler, sampled, opt_state, optimizer, state, policy.sharding.processes)


def copies_to_sample(layout: Layout) -> bool:
  """Whether sampling reads a copy of the parameters and not these themselves."""
  policy = layout.policy
  return policy.gathered.mesh is not None or policy.sampling.compute_dtype != "float32"


class Extent(NamedTuple):
  """Lengths that some of a rollout's programs are run for: each is compiled for a few."""

  prompt: int  # tokens of the prompts that are read
  suffix: int  # tokens that are scored
  exchanged: float = 1.0  # share of the places of rows with exchanged answers whose log-probability is asked for


def extent_of(layout: Layout, prompt: int, reference: int, exchanged: float = 1.0) -> Extent:
  """For prompts and references of so many tokens: what they are rounded up to."""
  shapes = rollout_shapes(layout.config, layout.processes, layout.sampler.sampling)
  return Extent(
    bucket(shapes.prompt_buckets, min(prompt, shapes.prompt_limit)),
    bucket(shapes.suffix_buckets, min(reference, shapes.suffix_length)),
    exchanged,
  )


def rollout_programs(layout: Layout, slots: int, extent: Extent | None = None) -> dict[str, Program]:
  """Programs with which a process samples and scores, with so many slots; `extent`: None for the longest texts."""
  config, policy = layout.config, layout.sampler
  where = policy.sampling.sharding
  model, params = policy.sampler, layout.sampled
  num_shards = where.num_shards("batch")
  shapes = dataclasses.replace(rollout_shapes(config, layout.processes, policy.sampling), slots=slots)
  extent = extent or Extent(shapes.prompt_limit, shapes.suffix_length)
  abstract = functools.partial(_place_rows, where)
  empty = functools.partial(decode.empty_slots, model, slots=slots, capacity=shapes.capacity)
  rows = abstract(jax.eval_shape(empty, params))
  prompts = _ids(shapes.prefill_rows, extent.prompt), _ids(shapes.prefill_rows)
  hidden, read = abstract(jax.eval_shape(functools.partial(decode.prefill, model), params, *prompts))
  prefilled = decode.Prefilled(hidden, read, _ids(shapes.prefill_rows))
  settings = decode.DecodeSettings(shapes.steps, (_EOS,))
  many = shapes.insert_rows
  entries = decode.Entries(
    source=_ids(many),
    target=_ids(many),
    keys=jax.ShapeDtypeStruct((many, 2), jnp.uint32),
    limits=_ids(many),
    sampling=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, stack([SamplingParams()] * many))),
  )
  suffixes = decode.Suffixes(
    _ids(shapes.score_rows), *(_ids(shapes.score_rows, extent.suffix) for _ in decode.Suffixes._fields[1:])
  )
  weights, cache, waiting = map(device_bytes, (params, rows, read))
  # A batch of prompts that was read waits until its last sample has a slot.
  parts = layout.state | {"sampling copy": weights, "slots": cache, "prompts read": waiting}
  state = sum(layout.state.values())
  if not copies_to_sample(layout):
    parts["sampling copy"], state = 0, state - weights
  temperature = config.reward.score_temperature

  def program(function, *args, beside: int, trips: int = 1) -> Program:
    return Program(lambda: function.trace(model, params, *args), (trips,), parts, state + beside)

  programs = {
    "prefill": program(decode.prefill, *prompts, beside=cache + waiting),
    "insert": program(decode.insert, rows, prefilled, entries, beside=weights),
    "decode": program(
      decode.decode, rows, settings, slots, shapes.longest, beside=waiting, trips=shapes.steps
    ),
    "score": program(
      decode.score, rows.cache, suffixes, temperature, shapes.longest,
      beside=waiting + cache - device_bytes(rows.cache),
    ),
  }  # fmt: skip
  if looks_at_answers(config):
    length, at_once = text_row_length(config), config.rollout.score_rows
    texts = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PackedRows.empty(at_once, length)))
    scorer = LogprobProgram(model, temperature, at_once, where)
    chunks = math.ceil(extent.exchanged * length / chunk_length(length, at_once, num_shards, partly=True))
    # When the last response has ended no slots are held any more.
    held = layout.state | {"sampling copy": parts["sampling copy"], "rows": device_bytes(texts)}
    programs["exchange"] = Program(lambda: compute_logprobs.trace(scorer, params, texts), (1, chunks), held, state)
  if copies_to_sample(layout):
    source, gathered = policy.sharding, policy.gathered.by_process()
    merged, dtype = policy.merged_params(policy.trained), policy.sampling.compute_dtype
    trace = functools.partial(models.cast.trace, merged, dtype, source, gathered)
    beside = layout.state["parameters"] + layout.state["frozen"] - device_bytes(merged)
    gather = Program(trace, (1,), layout.state | {"sampling copy": weights}, beside + layout.state["optimiser"])
    programs = {"gather": gather} | programs
  return programs


def update_programs(layout: Layout, micro_batch_rows: int, counted: float = 1.0) -> dict[str, Program]:
  """The optimiser step on one minibatch, so many rows at a time.

  Args:
    counted: share of the rows' places whose token's log-probability is asked for.
  """
  config, policy = layout.config, layout.policy
  settings = update_settings(config, policy.sharding)
  settings = dataclasses.replace(settings, micro_batch_rows=micro_batch_rows)
  rows = abstract_rows(config, micro_batch_rows)
  program = UpdateProgram(policy.model, layout.optimizer, settings)
  trace = functools.partial(
    optimizer_step.trace, program, policy.frozen, Trainable(policy.trained, layout.opt_state), rows
  )
  beside = layout.state["parameters"] - device_bytes(policy.trained)
  length, num_shards = row_length(config), policy.sharding.num_shards("batch")
  chunks = math.ceil(counted * length / chunk_length(length, micro_batch_rows, num_shards, partly=True))
  return {"update": Program(trace, (1, chunks), layout.state | {"rows": device_bytes(rows)}, beside)}


def abstract_rows(config: ConfigDict, micro_batch_rows: int) -> PackedRows:
  """Shapes of the rows of a minibatch: as many as it would take if no two sequences shared one."""
  sequences = config.prompts_per_step // config.training.minibatches * config.samples_per_prompt
  count = -(-sequences // micro_batch_rows) * micro_batch_rows
  empty = functools.partial(types.PackedRows.empty, count, row_length(config))
  rows = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, empty()))
  if config.training.answer_gradient != "none":
    rows = rows._replace(answer_weights=rows.weights)
  if config.training.kl_coefficient:
    rows = rows._replace(reference_logprobs=rows.weights)
  return rows


def device_bytes(tree: Any) -> int:
  """Bytes of the arrays on one device; what says nothing of its place lies on every one.

  >>> device_bytes({"kernel": jax.ShapeDtypeStruct((2, 3), "float32")})
  24
  """
  return sum(
    math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _on_device(tree: Any, mesh: Mesh) -> Any:
  """Shapes on the device of a mesh of one, which no sharding tells them; on another mesh they are as they are."""
  if mesh.size > 1:
    return tree
  where = SingleDeviceSharding(mesh.devices.flat[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def _sampling_dtypes(policy: Policy, params: Params) -> Params:
  return jax.eval_shape(
    functools.partial(
      models.cast, dtype=policy.sampling.compute_dtype, source=sharding.Sharding(), sharding=sharding.Sharding()
    ),
    params,
  )


def _like(dtypes: Params, places: Params) -> Params:
  return jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), dtypes, places)


def _cast(params: Params, dtype: str) -> Params:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), params)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _place_rows(rows_sharding: Sharding, tree: Any) -> Any:
  """Places slots, or what was read into them, on a mesh: rows split, of caches key/value heads too."""

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    axes = CACHE if x.ndim == 5 else ("batch", *[None] * (x.ndim - 1))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding.named(axes))

  return jax.tree.map(place, tree)
