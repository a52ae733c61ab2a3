"""The policy of a run: its model and tokenizer, how it lies on the devices, and which parameters are trained."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import huggingface, models, sharding
from rlpr_jax.data import builtin
from rlpr_jax.data.templates import TurnEnd, choose_template, turn_end
from rlpr_jax.errors import InputError, in_field
from rlpr_jax.models import ModelConfig, ModelGraph, Params, Runtime
from rlpr_jax.sharding import Sharding


class Policy(NamedTuple):
  """All that stays the same while a policy is trained."""

  config: ModelConfig
  model: ModelGraph  # as it is trained
  sampler: ModelGraph  # the same, as it samples and scores
  sampling: Runtime  # how that one is run: by each process on its own devices
  gathered: Sharding  # how the parameters lie for it, on all devices
  tokenizer: PreTrainedTokenizerBase | None  # None for a policy that is only placed, to be planned
  turn_end: TurnEnd | None  # how its responses end; None likewise
  sharding: Sharding
  trained: Params  # shapes, dtypes and shardings of the parameters that are trained
  frozen: Params  # parameters that are not: the base under LoRA, else nothing

  def merged_params(self, params: Params) -> Params:
    """All parameters, given those that are trained."""
    return models.combine(self.frozen, params)

  def sampling_params(self, params: Params) -> Params:
    """All parameters as the sampler reads them, token after token: to be made once for each policy, not for each token.

    They are cast to the compute dtype, and gathered over the axes of the mesh that `sampler` does not split; each
    process has them all.
    """
    whole, dtype = self.merged_params(params), self.sampling.compute_dtype
    if self.gathered.mesh is None and dtype == "float32":
      return whole  # no copy of what is right as it is
    return sharding.own_part(models.cast(whole, dtype, self.sharding, self.gathered.by_process()), self.gathered)


def load_policy(config: ConfigDict) -> Policy:
  """Everything but the trained parameters; only a base that LoRA freezes is read here.

  Raises:
    InputError: naming the field of the config, or the file.
  """
  mesh = create_mesh(config)
  if config.model.path:
    directory = huggingface.resolve(config.model.path)
    # In this order: what is wrong with config.json is said before transformers reads it, for the tokenizer's class.
    model_config = huggingface.load_config(directory)
    tokenizer = load_tokenizer(str(directory))
    variables = parse_variables(config.data.chat_template_kwargs)
    with in_field("config.data.chat_template"):
      choose_template(tokenizer, config.data.chat_template, variables)
    end = turn_end(tokenizer, huggingface.generation_eos(huggingface.load_generation(directory)))
  else:
    if config.data.chat_template or config.data.chat_template_kwargs:
      raise InputError("config.data.chat_template: the built-in policy has its own, expected config.model.path with it")
    tokenizer = builtin.tokenizer(config.data.domains)
    model_config = new_config(config, len(tokenizer))
    end = turn_end(tokenizer)
  if end.eos_id >= model_config.vocab_size:
    raise InputError(
      f"{config.model.path}: a response ends in token {end.eos_id} ({tokenizer.decode([end.eos_id])!r}), expected one"
      f" of the model's {model_config.vocab_size}"
    )
  known_tokens = max(tokenizer.get_vocab().values()) + 1
  if known_tokens < model_config.vocab_size:
    model_config = dataclasses.replace(model_config, known_tokens=known_tokens)
  frozen: Params = {}
  if config.lora.rank:
    if not config.model.path:
      raise InputError("config.lora.rank: adapters need a pretrained model, expected config.model.path")
    rules = dict(create_sharding(config, mesh).rules)
    frozen = huggingface.load_pretrained(str(directory), mesh, jnp.dtype(config.lora.base_dtype), rules)[1]
  return place_policy(config, model_config, mesh, frozen)._replace(tokenizer=tokenizer, turn_end=end)


def place_policy(config: ConfigDict, model_config: ModelConfig, mesh: Mesh, frozen: Params) -> Policy:
  """The policy on the devices of a mesh, which may be only described.

  Args:
    frozen: parameters, or shapes of them.

  Raises:
    InputError: a model that the mesh cannot split, or adapters that cannot be.
  """
  fitted = sharding.fit(create_sharding(config, mesh), models.axis_sizes(model_config))
  if config.lora.rank:
    lora = models.LoRA(config.lora.rank, config.lora.alpha, parse_targets(config.lora.targets))
    model_config = dataclasses.replace(model_config, lora=lora)
  settings = config.model
  runtime = Runtime(
    settings.compute_dtype,
    settings.attention,
    settings.remat,
    decode_attention=settings.decode_attention,
    sharding=fitted,
  )
  runtime = models.for_device(runtime, mesh.devices.flat[0])
  model = models.definition(model_config, runtime)
  gathered = gathered_sharding(config, fitted)
  sampling = dataclasses.replace(runtime, sharding=gathered.own(), int8_cache=config.rollout.int8_cache)
  everything = models.abstract_params(model_config, fitted)
  trained = models.adapters(everything) if config.lora.rank else everything
  return Policy(
    config=model_config,
    model=model,
    sampler=models.definition(model_config, sampling),
    sampling=sampling,
    gathered=gathered,
    tokenizer=None,
    turn_end=None,
    sharding=fitted,
    trained=trained,
    frozen=frozen,
  )


def create_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
  """The config's mesh, of devices that may be only described."""
  table = gathered_sharding(config, create_sharding(config, None))
  with in_field("config.mesh"):
    return sharding.create_mesh(**config.mesh, devices=devices, together=table.splits_params)


def create_sharding(config: ConfigDict, mesh: Mesh | None) -> Sharding:
  """The config's table of axes, on a mesh."""
  rules = {name: split_names(axes) for name, axes in config.sharding.items()}
  with in_field("config.sharding", separator="."):
    return sharding.create(mesh, rules)


def gathered_sharding(config: ConfigDict, sharding: Sharding) -> Sharding:
  """Says how the parameters lie for sampling."""
  return sharding.replicate("embed") if config.rollout.gather_params else sharding


def initial_params(config: ConfigDict, policy: Policy) -> Params:
  """The trained parameters before the first step, float32: pretrained, random, or adapters that change nothing yet."""
  if config.lora.rank:
    return models.init_adapters(policy.config, config.seed, policy.sharding)
  if config.model.path:
    rules = dict(policy.sharding.rules)
    return huggingface.load_pretrained(config.model.path, policy.sharding.mesh, jnp.float32, rules)[1]
  return models.init_params(policy.config, config.seed, policy.sharding)


def new_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
  """A policy that begins from nothing, of the sizes in the config."""
  return ModelConfig(
    vocab_size=vocab_size,
    embed_dim=config.model.embed_dim,
    mlp_dim=config.model.mlp_dim,
    num_layers=config.model.num_layers,
    num_heads=config.model.num_heads,
    num_kv_heads=config.model.num_heads,
    head_dim=config.model.head_dim,
    qk_norm=True,
  )


def split_names(text: str) -> tuple[str, ...]:
  """The names in "query, value"; none in ""."""
  return tuple(filter(None, text.replace(" ", "").split(",")))


def parse_variables(text: str) -> dict[str, Any]:
  """The variables of a chat template, of `config.data.chat_template_kwargs`.

  >>> parse_variables('{"enable_thinking": false}')
  {'enable_thinking': False}
  """
  try:
    variables = json.loads(text or "{}")
  except (ValueError, RecursionError) as error:
    raise InputError(f"config.data.chat_template_kwargs: {text!r}, expected a JSON object ({error})") from None
  if not isinstance(variables, dict) or not all(name.isidentifier() for name in variables):
    raise InputError(f"config.data.chat_template_kwargs: {text!r}, expected a JSON object whose keys are names")
  return variables


def parse_targets(text: str) -> tuple[str, ...]:
  """Names of the linear layers that get adapters, from "query,value"."""
  targets = split_names(text)
  for target in targets or ("nothing",):
    if target not in models.LINEAR:
      raise InputError(f"config.lora.targets: {target!r}, expected some of {', '.join(models.LINEAR)}")
  return targets


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
  """The tokenizer of a Hugging Face directory. Code in the directory is never run.

  Raises:
    InputError: there is none, or none without that code.
  """
  from transformers import AutoTokenizer  # with it comes torch, where that is installed

  try:
    # Not its default, which asks at a terminal whether to run the directory's code.
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
      path, local_files_only=True, trust_remote_code=False
    )
  except Exception as error:  # transformers' own errors, those of its tokenizers and of its checks have no common class
    raise InputError(f"{path}: no tokenizer ({' '.join(str(error).split())[:200]})") from None
  file = pathlib.Path(path) / "chat_template.json"  # of models that see, too: transformers leaves it to their processor
  if not tokenizer.chat_template and file.exists():
    try:
      tokenizer.chat_template = json.loads(file.read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      raise InputError(f"{file}: expected an object with chat_template ({error})") from None
  return tokenizer
