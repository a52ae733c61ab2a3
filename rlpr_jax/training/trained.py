"""A policy for use: of a run's checkpoint, or of a Hugging Face directory."""

import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from rlpr_jax import config as configs
from rlpr_jax import models
from rlpr_jax.errors import InputError
from rlpr_jax.models import Params
from rlpr_jax.sampling.choose import Choice
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.training.policy import Policy, load_policy
from rlpr_jax.training.state import restore_params


class Trained(NamedTuple):
  """A policy that is sampled from and not trained."""

  policy: Policy
  params: Params  # as the sampler reads them
  step: int | None  # of a run's checkpoint
  eos_ids: tuple[int, ...]  # tokens that end a response
  template: str  # think | answer_only, which a run was trained with
  instruction: str | None  # system message that a run was trained with; None for the template's


def load(path: str, dtype: str, step: int | None = None) -> Trained:
  """Reads a policy, onto all devices.

  Args:
    path: directory of a run, Hugging Face directory, or name on the hub.
    dtype: float32 | bfloat16, of the weights and the computation.
    step: checkpoint of a run; None for the newest.

  Raises:
    InputError: there is none, or it cannot be read.
  """
  run = pathlib.Path(path)
  if (run / "checkpoints").is_dir():
    config = configs.read(run / "config.json")
    config.mesh = configs.default().mesh  # of the devices that are here
  elif step is not None:
    raise InputError(f"{path}: checkpoint {step} of a run was asked for, expected a directory with checkpoints")
  else:
    config = configs.default()
    config.model.path = path
  config.model.compute_dtype = dtype
  policy = load_policy(config)
  if config.model.path == path:
    rules = dict(policy.sharding.rules)
    params = models.load_pretrained(path, policy.sharding.mesh, jnp.dtype(dtype), rules)[1]
  else:
    step, params = restore_params(run, step, policy.trained)
  instruction = None if config.data.instruction == "default" else config.data.instruction
  ends = eos_ids(config.model.path, policy.tokenizer)
  return Trained(policy, policy.sampling_params(params), step, ends, config.data.template, instruction)


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
  """The tokenizer's EOS, and those of generation_config.json: a chat model may end a turn with another token."""
  ids = {tokenizer.eos_token_id}
  file = models.resolve(path) / "generation_config.json" if path else None
  if file and file.exists():
    try:
      more = json.loads(file.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
      raise InputError(f"{file}: expected a JSON object ({error})") from None
    ids |= set(more if isinstance(more, list) else [more])
  return tuple(sorted(ids - {None}))


def create_engine(
  trained: Trained,
  slots: int,
  prompt_limit: int,
  response_limit: int,
  decode_steps: int = 8,
  prefill_prompts: int = 4,
  choice: Choice = Choice(),
) -> Engine:
  """An engine that samples and scores nothing.

  Raises:
    InputError: a size that the model or the mesh does not take.
  """
  policy = trained.policy
  ways = policy.sampling.sharding.ways("batch")
  for name, rows in (("slots", slots), ("prefill_prompts", prefill_prompts)):
    if rows < 1 or rows % ways:
      raise InputError(f"{name}: {rows} rows, expected a multiple of the {ways} devices that share them")
  longest = policy.config.max_length
  if longest is not None and prompt_limit + response_limit > longest:
    raise InputError(
      f"prompt_limit + response_limit: {prompt_limit + response_limit} tokens, expected at most the model's context of"
      f" {longest}"
    )
  shapes = Shapes(
    slots=slots,
    prompt_limit=prompt_limit,
    max_response_length=response_limit,
    suffix_length=1,  # nothing is scored
    steps=decode_steps,
    prefill_rows=prefill_prompts,
    score_rows=min(16, slots) // ways * ways,
    insert_rows=min(8, slots),
    ways=ways,
  )
  settings = DecodeSettings(decode_steps, trained.eos_ids)
  return Engine(policy.sampler, policy.tokenizer, settings, shapes, trained.template, 1.0, "bare", choice)
