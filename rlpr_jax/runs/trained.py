"""A policy for use: of a run's checkpoint, or of a Hugging Face directory."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import config as configs
from rlpr_jax import huggingface
from rlpr_jax.data.templates import TurnEnd
from rlpr_jax.errors import InputError, SettingError
from rlpr_jax.models import Params
from rlpr_jax.policy import Policy, load_policy
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes


class Trained(NamedTuple):
  """A policy that is sampled from and not trained."""

  policy: Policy
  params: Params  # as the sampler reads them
  tokenizer: PreTrainedTokenizerBase
  turn_end: TurnEnd
  template: str  # think | answer_only


class Source(NamedTuple):
  """Where a policy is, as far as it can be told without reading its weights."""

  config: ConfigDict  # of the run; of a pretrained model the defaults, and its path
  run: pathlib.Path | None  # directory of a run
  step: int | None  # of its checkpoint

  @property
  def instruction(self) -> str | None:
    """System message of a run's questions without one of their own; None for the template's."""
    text = self.config.data.system or self.config.data.instruction
    return None if text == "default" else text


def find(path: str, step: int | None = None) -> Source:
  """Finds a policy.

  Args:
    path: directory of a run, Hugging Face directory, or name on the hub.
    step: checkpoint of a run; None for the newest.

  Raises:
    InputError: there is no such checkpoint.
  """
  run = pathlib.Path(path)
  if not (run / "checkpoints").is_dir():
    if step is not None:
      raise InputError(f"{path}: checkpoint {step} of a run was asked for, expected a directory with checkpoints")
    config = configs.default()
    config.model.path = path
    return Source(config, run=None, step=None)
  config = configs.read(run / "config.json")
  config.mesh = configs.default().mesh  # of the devices that are here
  steps = [int(entry.name) for entry in (run / "checkpoints").iterdir() if entry.name.isdigit()]
  return Source(config, run, step if step is not None else max(steps, default=0))


def fingerprint(source: Source) -> str:
  """A hash of what the policy's responses depend on: names, sizes and times of the weights, the small files whole.

  Raises:
    InputError: there is no such model.
  """
  parts, files = [], []
  if source.run:
    checkpoint = source.run / "checkpoints" / str(source.step)
    parts += [source.step, checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0, source.config.data.domains]
    parts += [source.config.model.to_dict(), source.config.lora.to_dict()]
  if source.config.model.path:
    files = sorted(huggingface.resolve(source.config.model.path).iterdir())
  for file in files:
    if file.suffix == ".safetensors":
      parts.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    elif file.suffix in (".json", ".jinja", ".model", ".txt"):
      parts.append((file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(source: Source, dtype: str) -> Trained:
  """Reads a policy, onto all devices.

  Args:
    dtype: float32 | bfloat16, of the weights and the computation.

  Raises:
    InputError: it cannot be read.
  """
  config = source.config.copy_and_resolve_references()
  config.model.compute_dtype = dtype
  policy = load_policy(config)
  tokenizer, end = policy.tokenizer, policy.turn_end
  assert tokenizer is not None
  assert end is not None
  if source.run:
    _, params = restore_params(source.run, source.step, policy.trained)
  else:
    rules = dict(policy.sharding.rules)
    params = huggingface.load_pretrained(config.model.path, policy.sharding.mesh, jnp.dtype(dtype), rules)[1]
  return Trained(
    policy=policy,
    params=policy.sampling_params(params),
    tokenizer=tokenizer,
    turn_end=end,
    template=config.data.template,
  )


def create_engine(
  trained: Trained, slots: int, prompt_limit: int, response_limit: int, decode_steps: int = 8
) -> Engine:
  """Makes an engine that samples and scores nothing.

  Raises:
    SettingError: a size that the model or the mesh does not take.
  """
  policy = trained.policy
  num_shards = policy.sampling.sharding.num_shards("batch")
  if slots < 1 or slots % num_shards:
    raise SettingError(f"{{slots}}: {slots}, expected a multiple of the {num_shards} devices that share them")
  longest = policy.config.max_length
  if longest is not None and prompt_limit + response_limit > longest:
    raise SettingError(
      f"{{prompt_limit}} + {{max_response_length}}: {prompt_limit + response_limit} tokens, expected at most"
      f" the model's context of {longest}",
    )
  shapes = Shapes(
    slots=slots,
    prompt_limit=prompt_limit,
    max_response_length=response_limit,
    suffix_length=1,  # nothing is scored
    steps=decode_steps,
    prefill_rows=max(4 // num_shards, 1) * num_shards,
    score_rows=max(min(16, slots) // num_shards, 1) * num_shards,
    insert_rows=min(8, slots),
    num_shards=num_shards,
  )
  device = Device(policy.sampler, DecodeSettings(decode_steps, trained.turn_end.eos_ids), shapes)
  return Engine(device, trained.tokenizer, trained.template, baseline_prefix="bare", eos_id=trained.turn_end.eos_id)
