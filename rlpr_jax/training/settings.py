"""From a config to what the rooms below take: sizes of programs, settings of the update and of the packing."""

from ml_collections import ConfigDict

from rlpr_jax import config as configs
from rlpr_jax import filtering
from rlpr_jax.errors import InputError
from rlpr_jax.models import Reader, Runtime
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.packing import PackingSettings, shortest_row
from rlpr_jax.training.update import UpdateSettings

# The fields of a config by the names that the rooms below have for them, of those that they may find fault with.
NAMES = {
  "slots": "config.rollout.slots",
  "prefill_rows": "config.rollout.prefill_prompts",
  "score_rows": "config.rollout.score_rows",
  "attention": "config.model.attention",
  "decode_attention": "config.model.decode_attention",
}


def rollout_shapes(config: ConfigDict, shares: int, sampling: Runtime) -> Shapes:
  """Sizes of the programs with which each of `shares` processes samples, so run on its devices."""
  slots = config.rollout.slots // shares
  return Shapes(
    slots=slots,
    prompt_limit=config.data.prompt_limit,
    max_response_length=config.rollout.max_response_length,
    suffix_length=config.data.max_reference_length,
    steps=config.rollout.decode_steps,
    prefill_rows=config.rollout.prefill_prompts // shares,
    score_rows=config.rollout.score_rows // shares,
    insert_rows=min(config.samples_per_prompt, slots),
    num_shards=sampling.sharding.num_shards("batch"),
    ragged=isinstance(sampling.decode_attention, Reader),
    continues=config.rollout.carry == "partial",
  )


def micro_batch_rows(config: ConfigDict, sharding: Sharding) -> int:
  """Rows whose gradients are taken at once: as the config says, or one on each part of the mesh."""
  return config.training.micro_batch_rows or sharding.num_shards("batch")


# Rows grow so far by themselves, for a prompt's responses to share it; what they take grows with them.
SHARED_ROW = 2048


def row_length(config: ConfigDict) -> int:
  """Tokens of a row in the update, into which prompts and their responses are packed.

  Those of the config, or room for the largest group there can be, but no more than `SHARED_ROW` unless a single
  response behind its prompt is longer.

  >>> config = configs.default()
  >>> config.samples_per_prompt, config.data.prompt_limit, config.rollout.max_response_length = 4, 100, 200
  >>> row_length(config)
  900
  >>> config.training.row_length = 8192
  >>> row_length(config)
  8192
  """
  if config.training.row_length:
    return int(config.training.row_length)
  longest, stem = configs.longest_sequence(config), int(config.data.prompt_limit)
  group = stem + config.samples_per_prompt * (longest - stem)
  return max(shortest_row(longest), min(group, SHARED_ROW))


def text_row_length(config: ConfigDict) -> int:
  """Tokens of a row in which texts are scored anew: long rows hold many of a prompt's responses behind it."""
  return max(shortest_row(configs.longest_text(config)), row_length(config))


def update_settings(config: ConfigDict, sharding: Sharding) -> UpdateSettings:
  """Settings of the update."""
  training = config.training
  return UpdateSettings(
    temperature=config.rollout.temperature,
    loss=training.loss,
    clip_low=training.clip_low,
    clip_high=training.clip_high,
    dual_clip=training.dual_clip,
    ratio_cap=training.ratio_cap,
    ratio=training.ratio,
    entropy_coefficient=training.entropy_coefficient,
    kl_coefficient=training.kl_coefficient,
    micro_batch_rows=micro_batch_rows(config, sharding),
    sharding=sharding,
  )


def packing_settings(config: ConfigDict, sharding: Sharding) -> PackingSettings:
  """Settings of the packing of a step's groups into minibatches."""
  training = config.training
  return PackingSettings(
    prompts_per_step=config.prompts_per_step,
    minibatches=training.minibatches,
    aggregate=training.aggregate,
    row_length=row_length(config),
    micro_batch_rows=micro_batch_rows(config, sharding),
  )


def filter_config(config: ConfigDict) -> filtering.FilterConfig:
  """Settings of the filter; `filter.source_scales` go to each prompt by themselves."""
  settings = config.filter.to_dict()
  del settings["source_scales"]
  return filtering.FilterConfig(**settings)


def check_rows(config: ConfigDict, sharding: Sharding) -> None:
  """Checks that rows divide evenly among the parts into which the mesh splits them, of all devices and of a process."""
  num_shards = sharding.own().num_shards("batch") * sharding.processes
  rows = {f"rollout.{name}": (config.rollout[name], num_shards) for name in ("slots", "prefill_prompts", "score_rows")}
  rows["training.micro_batch_rows"] = (config.training.micro_batch_rows, sharding.num_shards("batch"))
  for field, (count, parts) in rows.items():
    if count % parts:
      raise InputError(f"config.{field}: {count} rows, expected a multiple of the {parts} parts of config.mesh")


def check_lengths(config: ConfigDict, max_length: int | None) -> None:
  """Checks that the longest text of a rollout fits into the context that the weights were made for."""
  longest = configs.longest_text(config)
  if max_length is not None and longest > max_length:
    raise InputError(
      f"config.data.prompt_limit + rollout.max_response_length + data.max_reference_length: {longest} tokens,"
      f" expected at most the model's context of {max_length}"
    )
