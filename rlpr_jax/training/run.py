"""From a config to a run that can take its first step: data, policy, warm start, baselines, first evaluation."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import filtering, models, processes, splicing
from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import PromptStream, prepare
from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders
from rlpr_jax.policy import Policy, abstract_opt_state, init_opt_state, initial_params, load_policy
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import OnDisk
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.engine import Engine, StoppedError
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.sharding import Sharding
from rlpr_jax.training import held_out, supervised
from rlpr_jax.training.reward import CustomReward, RewardSettings, align, parse_shadow
from rlpr_jax.training.update import UpdateSettings, adamw, learning_rate
from rlpr_jax.types import Answers, Groups, Params, Prompt, TrainState

# Folded into the run's key before the step, the draw and the sample; training folds the draw and the sample alone, so
# no key is used twice.
_EVALUATION_STREAM = 1


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  config: ConfigDict
  policy: Policy
  engine: Engine
  prompts: list[Prompt]
  held_out: list[Prompt]
  optimizer: optax.GradientTransformation
  update_settings: UpdateSettings
  filter: filtering.FilterConfig
  key: jax.Array
  reward: RewardSettings
  shadows: dict[str, RewardSettings]  # by name
  custom_reward: CustomReward | None


def set_up(config: ConfigDict, custom_reward: CustomReward | None = None) -> Run:
  """Model, tokenizer and data, with everything checked before anything compiles."""
  if config.reward.verifier == "math":
    graders.check_installed()
  policy = load_policy(config)
  check_rows(config, policy.sharding)
  check_lengths(config, policy.config.max_length)
  tokenizer = policy.tokenizer
  splicing.check_tokenizer(tokenizer)
  prompts = load_prompts(config, config.data, tokenizer, builtin_split="train", count=config.data.count)
  held_out_prompts = []
  if config.evaluation.prompts:
    count = config.evaluation.prompts
    held_out_prompts = load_prompts(config, config.evaluation, tokenizer, builtin_split="held_out", count=count)[:count]
  engine = Engine(
    policy.sampler,
    tokenizer,
    DecodeSettings(config.rollout.decode_steps, (tokenizer.eos_token_id,)),
    rollout_shapes(config, jax.process_count(), policy.sampling.sharding.num_shards("batch")),
    config.data.template,
    config.reward.score_temperature,
    config.reward.baseline_prefix,
    SamplingParams(config.rollout.temperature),
  )
  settings = config.filter.to_dict()
  del settings["source_scales"]
  return Run(
    config,
    policy,
    engine,
    prompts,
    held_out_prompts,
    create_optimizer(config),
    create_update_settings(config, policy.sharding),
    filtering.FilterConfig(**settings),
    jax.random.key(config.seed),
    RewardSettings.of(config.reward),
    dict(parse_shadow(config, text) for text in config.reward.shadow),
    custom_reward,
  )


def rollout_shapes(config: ConfigDict, shares: int, num_shards: int) -> Shapes:
  """Sizes of the programs with which each of `shares` processes samples; its devices split rows `num_shards` ways."""
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
    num_shards=num_shards,
  )


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """The optimiser of a run's updates."""
  training = config.training
  updates = training.minibatches * training.epochs_per_step  # of a training step
  steps = max(config.steps, training.warmup_steps + 1)  # of 0 steps, which a warm start alone has, no rate is taken
  rate = learning_rate(training.learning_rate, training.schedule, training.warmup_steps * updates, steps * updates)
  return adamw(rate, training.weight_decay, training.max_grad_norm)


def create_update_settings(config: ConfigDict, where: Sharding) -> UpdateSettings:
  """What the update is compiled for."""
  training = config.training
  return UpdateSettings(
    temperature=config.rollout.temperature,
    loss=training.loss,
    clip_low=training.clip_low,
    clip_high=training.clip_high,
    dual_clip=training.dual_clip,
    ratio_cap=training.ratio_cap,
    entropy_coefficient=training.entropy_coefficient,
    kl_coefficient=training.kl_coefficient,
    micro_batch_rows=training.micro_batch_rows or where.num_shards("batch"),
    sharding=where,
  )


def check_rows(config: ConfigDict, where: Sharding) -> None:
  """Rows must divide evenly among the parts into which the mesh splits them, of all devices and of each process."""
  rows = {name: config.rollout[name] for name in ("slots", "prefill_prompts", "score_rows")}
  num_shards = where.own().num_shards("batch") * where.processes
  rows = {f"rollout.{name}": (count, num_shards) for name, count in rows.items()}
  rows["training.micro_batch_rows"] = (config.training.micro_batch_rows, where.num_shards("batch"))
  for field, (count, parts) in rows.items():
    if count % parts:
      raise InputError(f"config.{field}: {count} rows, expected a multiple of the {parts} parts of config.mesh")


def check_lengths(config: ConfigDict, max_length: int | None) -> None:
  """The longest text of a rollout must fit into the context that the weights were made for."""
  longest = config.data.prompt_limit + config.rollout.max_response_length + config.data.max_reference_length
  if max_length is not None and longest > max_length:
    raise InputError(
      f"config.data.prompt_limit + rollout.max_response_length + data.max_reference_length: {longest} tokens,"
      f" expected at most the model's context of {max_length}"
    )


def load_prompts(
  config: ConfigDict, source: ConfigDict, tokenizer: PreTrainedTokenizerBase, builtin_split: str, count: int
) -> list[Prompt]:
  """Questions of a file, or of the built-in set, as prompts; says how many were dropped."""
  if source.path:
    examples = load_examples(source.path, source.split or None)
  else:
    examples = builtin.examples(builtin_split, count, config.seed, config.data.domains)
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


def first_state(run: Run, writer: metrics.MetricsWriter, stop: StopRequest) -> TrainState | None:
  """The state before step 1: warm start, the baselines of the initial policy, the first evaluation."""
  params = initial_params(run.config, run.policy)
  demonstrations = supervised.load(run.config, run.engine.tokenizer) if run.config.warm_start.steps else None
  run.engine.compile_programs(
    run.policy.sampling_params(params), scoring=True
  )  # a lack of memory shows here, before anything
  if demonstrations:
    params = warm_start_policy(run, params, demonstrations, stop)
  baselines = unknown_baselines(run)
  if run.config.reward.baseline_policy == "initial":
    baselines = initial_baselines(run, params, stop)
  if processes.any_of(stop):
    return None
  try:
    values = evaluate(run, params, 0, stop)
  except StoppedError:
    return None
  if values:
    writer.write(0, values)
  return abstract_state(run)._replace(
    params=params,
    opt_state=init_opt_state(run.optimizer, params, run.policy.sharding),
    baselines=baselines,
    initial=copy_params(params) if keeps_initial(run.config) else {},
    lagged=copy_params(params) if run.config.reward.scorer == "lagged" else {},
  )


def keeps_initial(config: ConfigDict) -> bool:
  """Whether the initial policy is needed after the first step."""
  return config.training.kl_coefficient > 0 or config.reward.scorer == "initial"


def copy_params(params: models.Params) -> models.Params:
  """A copy that outlives the parameters, which an update donates."""
  return jax.tree.map(jnp.copy, params)


def scorer_params(run: Run, state: TrainState) -> models.Params:
  """The trained parameters of the policy that scores the references, where it is not the one that samples."""
  return state.initial if run.config.reward.scorer == "initial" else state.lagged


def abstract_state(run: Run) -> TrainState:
  """A state before step 1 with shapes in the place of parameters and optimiser state, to restore a checkpoint into."""
  config = run.config
  samples, limit, width = (
    config.samples_per_prompt,
    config.rollout.max_response_length,
    config.data.max_reference_length,
  )
  answers = Answers(
    np.zeros((0, samples), np.float32),
    np.zeros((0, samples), np.int32),
    np.zeros((0, samples, width), np.int32),
    np.zeros((0, samples, width), bool),
  )
  return TrainState(
    step=0,
    params=run.policy.trained,
    opt_state=abstract_opt_state(run.optimizer, run.policy.trained, run.policy.sharding),
    filter=jax.device_get(filtering.init(run.filter)),
    baselines=unknown_baselines(run),
    initial=run.policy.trained if keeps_initial(config) else {},
    lagged=run.policy.trained if config.reward.scorer == "lagged" else {},
    carried=Groups(
      np.zeros((0, config.data.prompt_limit), np.int32),
      np.zeros(0, np.int32),
      np.zeros((0, samples, limit), np.int32),
      np.zeros((0, samples), np.int32),
      np.zeros((0, samples, limit), np.float32),
      np.zeros((0, samples), np.float32),
      None if config.training.answer_gradient == "none" else answers,
    ),
    stream=PromptStream(run.prompts, config.seed).state(),
  )


def warm_start_policy(
  run: Run, params: models.Params, demonstrations: Sequence[supervised.Demonstration], stop: StopRequest
) -> models.Params:
  """Supervised steps on demonstrations."""
  opt_state = init_opt_state(supervised.optimizer(run.config.warm_start), params, run.policy.sharding)
  state = supervised.SupervisedState(0, params, opt_state)
  progress, total = metrics.Progress("warm start, step"), run.config.warm_start.steps
  for state, losses in supervised.steps(run.config, run.policy, state, demonstrations):  # noqa: B020
    progress(state.step, total, f"loss {float(losses['answer_loss']):.3f}")
    if processes.any_of(stop):
      break
  return state.params


def initial_baselines(run: Run, params: models.Params, stop: StopRequest) -> np.ndarray:
  """Log-probabilities [N, A] of every reference under the initial policy (RLPR, section 3.2), kept in the state."""
  size, prompts = run.config.rollout.prompts_per_draw, processes.share(run.prompts)
  ready, baselines = run.policy.sampling_params(params), processes.share(unknown_baselines(run))
  progress = metrics.Progress("baselines, prompt")
  for first in range(0, len(prompts), size):
    if stop:
      break
    baselines[first : first + size] = baseline_logps(run, ready, prompts[first : first + size])
    progress(min(first + size, len(prompts)), len(prompts))
  return processes.gather(baselines, len(run.prompts))


def baseline_logps(run: Run, params: models.Params, prompts: Sequence[Prompt]) -> np.ndarray:
  """Log-probabilities [P, A] of each reference's tokens with no reasoning before them; NaN beyond the last."""
  logps, mask = align(*run.engine.baseline(params, prompts))
  return np.where(mask, logps, np.nan).astype(np.float32)


def unknown_baselines(run: Run) -> np.ndarray:
  return np.full((len(run.prompts), run.config.data.max_reference_length), np.nan, np.float32)


def evaluate(run: Run, params: models.Params, step: int, stop: StopRequest) -> dict[str, float]:
  """Avg@k on the held-out prompts; nothing if there are none.

  Raises:
    StoppedError: `stop` was asked for.
  """
  if not run.held_out:
    return {}
  settings = run.config.evaluation
  choice = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
  evaluator = dataclasses.replace(run.engine, choice=choice)
  key = jax.random.fold_in(jax.random.fold_in(run.key, _EVALUATION_STREAM), step)
  progress = metrics.Progress("held-out, response")
  ready = run.policy.sampling_params(params)
  values = held_out.evaluate(
    evaluator, ready, run.held_out, settings.samples, key, progress, settings.stop, stop.__bool__
  )
  return {f"held_out/{name}": value for name, value in values.items()}


def split(state: TrainState, carried_limit: int) -> OnDisk:
  """A state as its checkpoint holds it; carried groups are padded to `carried_limit`, so that all have one shape."""
  arrays = state._asdict()
  params, host = arrays.pop("params"), {name: arrays.pop(name) for name in ("step", "stream")}
  missing = carried_limit - state.carried.num_groups
  carried = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), state.carried)
  arrays = {name: value for name, value in (arrays | {"carried": carried}).items() if jax.tree.leaves(value)}
  return OnDisk(params, arrays, host | {"carried": state.carried.num_groups})


def join(params: Params, arrays: dict[str, Any], host: dict[str, Any]) -> TrainState:
  """The state that `split` took apart."""
  carried = arrays["carried"].take(slice(host["carried"]))
  return TrainState(params=params, **{"initial": {}, "lagged": {}} | arrays | host | {"carried": carried})
