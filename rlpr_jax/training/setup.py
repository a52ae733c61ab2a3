"""From a config to a run that can take its first step: data, policy, warm start, baselines, first evaluation."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlpr_jax import filtering, models, rewards, splicing
from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import Prompt, PromptStream, prepare
from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.errors import InputError
from rlpr_jax.evaluation import held_out
from rlpr_jax.sampling.decode import SamplingSettings
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.training import metrics, warm_start
from rlpr_jax.training.interrupt import StopRequest
from rlpr_jax.training.packing import Groups
from rlpr_jax.training.state import TrainState
from rlpr_jax.training.update import adamw

# Folded into the run's key before the step, the draw and the sample; training folds the draw and the sample alone, so
# no key is used twice.
_EVALUATION_STREAM = 1


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  config: ConfigDict
  model: nnx.GraphDef
  engine: Engine
  prompts: list[Prompt]
  held_out: list[Prompt]
  optimizer: optax.GradientTransformation
  filter: filtering.FilterConfig
  key: jax.Array


def set_up(config: ConfigDict) -> tuple[Run, models.Params]:
  """Model, tokenizer and data, with everything checked before anything compiles; and the initial parameters."""
  tokenizer = load_tokenizer(config.model.path) if config.model.path else builtin.tokenizer()
  splicing.check_tokenizer(tokenizer)
  prompts = load_prompts(config, config.data, tokenizer, builtin_split="train", count=config.data.count)
  held_out_prompts = []
  if config.evaluation.prompts:
    count = config.evaluation.prompts
    held_out_prompts = load_prompts(config, config.evaluation, tokenizer, builtin_split="held_out", count=count)[:count]
  if config.model.path:
    model_config, params = models.load_pretrained(config.model.path)
  else:
    model_config = models.ModelConfig(
      vocab_size=len(tokenizer),
      embed_dim=config.model.embed_dim,
      mlp_dim=config.model.mlp_dim,
      num_layers=config.model.num_layers,
      num_heads=config.model.num_heads,
      num_kv_heads=config.model.num_heads,
      head_dim=config.model.head_dim,
      qk_norm=True,
    )
    params = models.init_params(model_config, config.seed)
  if len(tokenizer) > model_config.vocab_size:
    raise InputError(f"{config.model.path}: tokenizer has {len(tokenizer)} ids, the model {model_config.vocab_size}")
  model = models.definition(model_config, models.Runtime(compute_dtype=config.model.compute_dtype))
  engine = Engine(
    model,
    tokenizer,
    SamplingSettings(
      config.rollout.max_response_length,
      config.data.max_reference_length,
      config.rollout.temperature,
      (tokenizer.eos_token_id,),
    ),
    config.data.prompt_limit,
    config.data.template,
    config.reward.score_temperature,
    config.reward.baseline_prefix,
  )
  optimizer = adamw(config.training.learning_rate, config.training.weight_decay, config.training.max_grad_norm)
  filter_config = filtering.FilterConfig(**config.filter)
  key = jax.random.key(config.seed)
  return Run(config, model, engine, prompts, held_out_prompts, optimizer, filter_config, key), params


def load_prompts(
  config: ConfigDict, source: ConfigDict, tokenizer: PreTrainedTokenizerBase, builtin_split: str, count: int
) -> list[Prompt]:
  """Questions of a file, or of the built-in set, as prompts; says how many were dropped."""
  if source.path:
    examples = load_examples(source.path, source.split or None)
  else:
    examples = builtin.examples(builtin_split, count, config.seed)
  prompts, dropped = _prepare(config, examples, tokenizer)
  name = source.path or f"built-in {builtin_split} questions"
  print(f"{name}: {len(prompts)} prompts, dropped: {dropped}", flush=True)
  return prompts


def _prepare(
  config: ConfigDict, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], dict[str, int]]:
  data = config.data
  return prepare(
    examples,
    tokenizer,
    template=data.template,
    instruction=None if data.instruction == "default" else data.instruction,
    worked_examples=data.examples,
    prompt_limit=data.prompt_limit,
    max_reference_length=data.max_reference_length,
  )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
  if not pathlib.Path(path).is_dir():
    raise InputError(f"config.model.path: {path} is not a directory, expected a Hugging Face model directory")
  try:
    return AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: no tokenizer ({' '.join(str(error).split())[:200]})") from None


def first_state(run: Run, params: models.Params, writer: metrics.MetricsWriter, stop: StopRequest) -> TrainState | None:
  """The state before step 1: warm start, the baselines of the initial policy, the first evaluation."""
  if run.config.warm_start.steps:
    params = warm_up(run, params, stop)
  baselines = np.zeros(len(run.prompts), np.float32)
  if run.config.reward.baseline_policy == "initial":
    baselines = initial_baselines(run, params, stop)
  if stop:
    return None
  values = evaluate(run, params, 0)
  if values:
    writer.write(0, values)
  return blank_state(run, params)._replace(baselines=baselines)


def blank_state(run: Run, params: models.Params) -> TrainState:
  config = run.config
  samples, limit = config.samples_per_prompt, config.rollout.max_response_length
  return TrainState(
    step=0,
    params=params,
    opt_state=run.optimizer.init(params),
    filter=filtering.init(run.filter),
    baselines=np.zeros(len(run.prompts), np.float32),
    carried=Groups(
      np.zeros((0, config.data.prompt_limit), np.int32),
      np.zeros(0, np.int32),
      np.zeros((0, samples, limit), np.int32),
      np.zeros((0, samples), np.int32),
      np.zeros((0, samples, limit), np.float32),
      np.zeros((0, samples), np.float32),
    ),
    stream=PromptStream(run.prompts, config.seed).state(),
  )


def warm_up(run: Run, params: models.Params, stop: StopRequest) -> models.Params:
  """Supervised steps on the built-in demonstrations."""
  settings, tokenizer = run.config.warm_start, run.engine.tokenizer
  examples, responses = zip(*builtin.demonstrations(settings.steps * settings.batch_size, run.config.seed), strict=True)
  prompts, dropped = _prepare(run.config, examples, tokenizer)
  if any(dropped.values()):
    raise InputError(
      f"config.data.prompt_limit or max_reference_length: too small for the warm start's demonstrations ({dropped})"
    )
  pairs = [
    (prompt.ids, [*tokenizer.encode(responses[prompt.row], add_special_tokens=False), tokenizer.eos_token_id])
    for prompt in prompts
  ]
  demonstrations = warm_start.pad(pairs)
  transform = warm_start.optimizer(
    settings.optimizer, settings.steps, settings.learning_rate, settings.adam_learning_rate
  )
  opt_state = transform.init(params)
  progress = metrics.Progress("warm start, step")
  batches = demonstrations.batches(settings.batch_size, run.config.seed)
  for done in range(1, settings.steps + 1):
    if stop:
      break
    params, opt_state, loss = warm_start.step(run.model, transform, params, opt_state, next(batches))
    progress(done, settings.steps, f"loss {float(loss):.3f}")
  return params


def initial_baselines(run: Run, params: models.Params, stop: StopRequest) -> np.ndarray:
  """r' of every prompt under the initial policy (rlpr section 3), computed once and kept in the state."""
  size, total = run.config.rollout.prompts_per_draw, len(run.prompts)
  baselines = np.zeros(total, np.float32)
  progress = metrics.Progress("baselines, prompt")
  for first in range(0, total, size):
    if stop:
      break
    part = run.prompts[first : first + size]
    padded = part + [run.prompts[0]] * (size - len(part))
    logps, mask = run.engine.baseline(params, padded)
    values = rewards.reference_probability(logps, mask, run.config.reward.aggregate)
    baselines[first : first + len(part)] = values[: len(part)]
    progress(first + len(part), total)
  return baselines


def evaluate(run: Run, params: models.Params, step: int) -> dict[str, float]:
  """Avg@k on the held-out prompts; nothing if there are none."""
  if not run.held_out:
    return {}
  settings = run.config.evaluation
  key = jax.random.fold_in(jax.random.fold_in(run.key, _EVALUATION_STREAM), step)
  progress = metrics.Progress("held-out, prompt")
  batch = min(settings.prompts_per_batch, len(run.held_out))
  values = held_out.evaluate(run.engine, params, run.held_out, settings.samples, batch, key, progress)
  return {f"held_out/{name}": value for name, value in values.items()}
