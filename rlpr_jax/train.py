"""Trains a policy with RLPR: `python -m rlpr_jax.train --config=configs/X.py --workdir=DIR [--config.field=value ...]`.

    questions -> prompts -> rollouts -> reference probabilities -> rewards -> kept groups -> advantages -> update

This file alone knows the order; each arrow is a function elsewhere. A run that was stopped or killed goes on from its
last checkpoint when the same command is given again.
"""

import dataclasses
import json
import os
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict, config_flags
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlpr_jax import config as configs
from rlpr_jax import filtering, grpo, models, report, rewards, splicing
from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import Prompt, PromptStream, prepare
from rlpr_jax.data.sources import load_examples
from rlpr_jax.errors import InputError, exit_on_input_error, parse_flags
from rlpr_jax.evaluation import held_out
from rlpr_jax.sampling.decode import SamplingSettings
from rlpr_jax.sampling.engine import Engine, Rollouts, pad_prompts
from rlpr_jax.training import metrics, packing, warm_start
from rlpr_jax.training.packing import Groups
from rlpr_jax.training.state import Checkpoints, TrainState
from rlpr_jax.training.update import UpdateSettings, adamw, update

_QUICKSTART = str(pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py")
_CONFIG = config_flags.DEFINE_config_file("config", _QUICKSTART, "Recipe of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: metrics, checkpoints, rollouts, report.")

_EVALUATION_STREAM = 1  # folded into the seed's key, so that evaluation never shares a key with training


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  config: ConfigDict
  workdir: pathlib.Path
  model: nnx.GraphDef
  engine: Engine
  prompts: list[Prompt]
  held_out: list[Prompt]
  optimizer: optax.GradientTransformation
  filter: filtering.FilterConfig
  key: jax.Array


class Step(NamedTuple):
  """What one training step drew, kept and looked at."""

  groups: Groups  # kept, at most prompts_per_step
  carried: Groups  # kept beyond that
  stds: np.ndarray  # float32[drawn] spread of every prompt drawn
  values: dict[str, float]  # metrics of sampling, reward and filter
  rows: list[dict[str, Any]]  # rollouts for the disk


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax and jax narrate at INFO
  with exit_on_input_error():
    if not _WORKDIR.value:
      raise InputError("--workdir: missing, expected the run's directory")
    train(_CONFIG.value, pathlib.Path(_WORKDIR.value))


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Runs `config` in `workdir` from its last checkpoint, or from the beginning, until `config.steps` are done."""
  configs.validate(config)
  saved_config = open_workdir(workdir, config)
  if config.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  run, params = set_up(config, workdir)
  metrics.write_atomically(saved_config, configs.to_json(config))

  checkpoints = Checkpoints(workdir, config.log.keep_checkpoints, config.rollout.prompts_per_draw)
  with StopRequest() as stop:
    resumed = checkpoints.latest()
    writer = metrics.MetricsWriter(workdir, resume_after=-1 if resumed is None else resumed)
    if resumed is None:
      state = first_state(run, params, writer, stop)
      if state is None:
        print("stopped before the first step; nothing was saved, and the same command begins again", flush=True)
        return
      checkpoints.save(state)
    else:
      state = checkpoints.restore(blank_state(run, params))
      print(f"resumed after step {state.step} of {config.steps}", flush=True)
    state = train_steps(run, state, checkpoints, writer, stop)
    checkpoints.close()
    writer.close()
  finish(run, state)


def train_steps(
  run: Run, state: TrainState, checkpoints: Checkpoints, writer: metrics.MetricsWriter, stop: "StopRequest"
) -> TrainState:
  """The training loop."""
  config = run.config
  stream = PromptStream(run.prompts, config.seed)
  stream.restore(state.stream)
  settings = UpdateSettings(
    config.rollout.temperature,
    config.training.clip_low,
    config.training.clip_high,
    config.training.entropy_coefficient,
    config.training.micro_batch_rows,
  )
  started, first = time.perf_counter(), state.step
  while state.step < config.steps and not stop:
    start, compiled = time.perf_counter(), metrics.compilations()

    # Sample and score until enough groups are kept.
    step = collect(run, state, stream)

    # Update on them. The checkpoint under way may still be reading the arrays that the update gives away.
    checkpoints.wait()
    before_update = time.perf_counter()
    params, opt_state, losses = state.params, state.opt_state, []
    for rows in packing.minibatches(
      step.groups, config.prompts_per_step, config.training.minibatches, config.training.aggregate
    ):
      params, opt_state, values = update(run.model, run.optimizer, params, opt_state, rows, settings)
      losses.append(values)
    losses = jax.device_get(losses)
    updated = time.perf_counter() - before_update

    state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      filter=filtering.update(state.filter, step.stds, run.filter),
      baselines=state.baselines,
      carried=step.carried,
      stream=stream.state(),
    )

    # Look at it and write it down.
    trained_tokens = int(step.groups.prompt_lengths.sum() * config.samples_per_prompt + step.groups.lengths.sum())
    values = step.values | {
      f"update/{name}": float(np.mean([x[name] for x in losses])) for name in losses[:1] and losses[0]
    }
    if losses:  # before the first update the ratio says how far sampler and trainer are apart
      values["update/sampler_gap"] = float(losses[0]["ratio_worst"])
    last = state.step == config.steps
    every = config.evaluation.every
    if last or (every and state.step % every == 0):
      values |= evaluate(run, state.params, state.step)
    values |= {
      "seconds/update": updated,
      "seconds/step": time.perf_counter() - start,
      "tokens_per_second/update": trained_tokens / updated,
      "compilations": metrics.compilations() - compiled,
    }
    writer.write_rollouts(state.step, step.rows)
    writer.write(state.step, values)
    left = (time.perf_counter() - started) / (state.step - first) * (config.steps - state.step)
    print(progress_line(state.step, config.steps, values, left), flush=True)
    if last or stop or state.step % config.log.checkpoint_every == 0:
      checkpoints.save(state)
  return state


def collect(run: Run, state: TrainState, stream: PromptStream) -> Step:
  """Draws prompts, samples, scores and filters until the step has its groups, or `max_draws` draws were made."""
  config = run.config
  kept, parts, rows = [state.carried], [], []
  while sum(groups.count for groups in kept) < config.prompts_per_step and len(parts) < config.max_draws:
    draws = stream.next_batch(config.rollout.prompts_per_draw)
    rollouts = run.engine.rollout(state.params, draws, run.key, config.samples_per_prompt)
    parts_rewards = reward(run, state, draws, rollouts)
    advantages, stds = jax.device_get(grpo.group_advantages(parts_rewards.total, config.training.advantages))
    keep = np.asarray(filtering.keep(state.filter, stds, run.filter))
    kept.append(to_groups(draws, rollouts, advantages, run).take(keep))
    parts.append((rollouts, parts_rewards, stds, keep))
    if len(rows) < config.log.rollouts:
      rows += rollout_rows(run, state.step + 1, draws, rollouts, parts_rewards, advantages, stds, keep)
  groups = packing.concatenate(kept)
  size = config.prompts_per_step
  stds = np.concatenate([stds for _, _, stds, _ in parts]) if parts else np.zeros(0, np.float32)
  return Step(
    groups.take(slice(size)), groups.take(slice(size, None)), stds, summarize(run, state, parts, groups), rows
  )


def reward(run: Run, state: TrainState, draws: list[tuple[int, Prompt]], rollouts: Rollouts) -> rewards.Rewards:
  """Every part of the reward of a draw, as [P, G] arrays; rlpr sections 2 to 5."""
  settings = run.config.reward
  shape = (len(draws), run.config.samples_per_prompt)
  parts = rewards.assess(
    rollouts.reference_logps.reshape(*shape, -1),
    rollouts.reference_mask.reshape(*shape, -1),
    rollouts.scorable.reshape(shape),
    state.baselines[[prompt.row for _, prompt in draws]],
    np.array([rewards.format_score(text, run.engine.template) for text in rollouts.texts], np.float32).reshape(shape),
    np.array(
      [
        rewards.repetition_penalty(text, settings.repetition_window, settings.repetition_limit)
        for text in rollouts.texts
      ],
      np.float32,
    ).reshape(shape),
    aggregate=settings.aggregate,
    shaping=settings.shaping,
    format_coefficient=settings.format_coefficient,
  )
  if settings.kind == "random":  # the control: as noisy as can be, and it knows nothing
    noise = [np.random.default_rng([run.config.seed, draw]).random(shape[1]) for draw, _ in draws]
    parts = parts._replace(total=np.array(noise, np.float32))
  return jax.device_get(parts)


def to_groups(draws: list[tuple[int, Prompt]], rollouts: Rollouts, advantages: np.ndarray, run: Run) -> Groups:
  """The draw as groups [P, G, ...]."""
  tokens, lengths = pad_prompts([prompt for _, prompt in draws], run.engine.prompt_limit)
  shape = advantages.shape
  return Groups(
    tokens,
    lengths,
    rollouts.tokens.reshape(*shape, -1),
    rollouts.lengths.reshape(shape),
    rollouts.logprobs.reshape(*shape, -1),
    advantages,
  )


def summarize(run: Run, state: TrainState, parts: list[tuple], groups: Groups) -> dict[str, float]:
  """Metrics of everything that a step sampled, dropped groups included."""
  values = {
    "filter/threshold": max(float(filtering.threshold(state.filter, run.filter)), 0.0),
    "filter/drawn": sum(len(stds) for _, _, stds, _ in parts),
    "filter/kept": int(sum(keep.sum() for *_, keep in parts)),
    "filter/carried_in": state.carried.count,
    "filter/trained": min(groups.count, run.config.prompts_per_step),
  }
  if not parts:
    return values
  all_rewards = rewards.Rewards(*(np.concatenate(x) for x in zip(*(r for _, r, _, _ in parts), strict=True)))
  rollouts = [r for r, _, _, _ in parts]

  def of_rollouts(field: str) -> np.ndarray:
    return np.concatenate([getattr(r, field) for r in rollouts])

  tokens = int(of_rollouts("lengths").sum())
  sampling = sum(r.seconds["sample"] for r in rollouts)
  return values | {
    **{f"reward/{name}": float(np.mean(value)) for name, value in all_rewards._asdict().items()},
    "reward/group_std": float(np.nanmean(np.concatenate([stds for _, _, stds, _ in parts]))),
    "rollout/response_length": float(np.mean(of_rollouts("lengths"))),
    "rollout/truncated": float(np.mean(~of_rollouts("finished"))),
    "rollout/scorable": float(np.mean(of_rollouts("scorable"))),
    "rollout/overlong_references": int(of_rollouts("overlong").sum()),
    "seconds/rollout": sampling,
    "seconds/score": sum(r.seconds["score"] for r in rollouts),
    "tokens_per_second/rollout": tokens / sampling,
  }


def rollout_rows(
  run: Run,
  step: int,
  draws: list[tuple[int, Prompt]],
  rollouts: Rollouts,
  parts: rewards.Rewards,
  advantages: np.ndarray,
  stds: np.ndarray,
  keep: np.ndarray,
) -> list[dict[str, Any]]:
  """The first `log.rollouts` responses of a draw with every part of their reward, as they go to disk."""
  samples, rows = run.config.samples_per_prompt, []
  for i in range(min(run.config.log.rollouts, len(rollouts.texts))):
    p, g = divmod(i, samples)
    prompt, answer = draws[p][1], rollouts.reference_mask[i]
    rows.append(
      {
        "step": step,
        "row": prompt.row,
        "source": prompt.source,
        "question": prompt.question,
        "reference": prompt.reference,
        "response": rollouts.texts[i],
        "finish": "eos" if rollouts.finished[i] else "length",
        "length": int(rollouts.lengths[i]),
        "scorable": bool(rollouts.scorable[i]),
        "reference_tokens": [run.engine.tokenizer.decode([t]) for t in rollouts.reference_tokens[i][answer]],
        "reference_probs": np.exp(rollouts.reference_logps[i][answer]).tolist(),
        "reward_reference": float(parts.reference[p, g]),
        "reward_baseline": float(parts.baseline[p]),
        "reward_debiased": float(parts.debiased[p, g]),
        "reward_format": float(parts.format[p, g]),
        "reward_repetition": float(parts.repetition[p, g]),
        "reward_total": float(parts.total[p, g]),
        "advantage": float(advantages[p, g]),
        "group_std": float(stds[p]),
        "kept": bool(keep[p]),
      }
    )
  return rows


def set_up(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, models.Params]:
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
  model = models.definition(dataclasses.replace(model_config, compute_dtype=config.model.compute_dtype))
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
  return Run(config, workdir, model, engine, prompts, held_out_prompts, optimizer, filter_config, key), params


def load_prompts(
  config: ConfigDict, source: ConfigDict, tokenizer: PreTrainedTokenizerBase, builtin_split: str, count: int
) -> list[Prompt]:
  """Questions of a file, or of the built-in set, as prompts; says how many were dropped."""
  data = config.data
  if source.path:
    examples = load_examples(source.path, source.split or None)
  else:
    examples = builtin.examples(builtin_split, count, config.seed)
  prompts, dropped = prepare(
    examples,
    tokenizer,
    template=data.template,
    instruction=None if data.instruction == "default" else data.instruction,
    worked_examples=data.examples,
    prompt_limit=data.prompt_limit,
    max_reference_length=data.max_reference_length,
  )
  name = source.path or f"built-in {builtin_split} questions"
  print(f"{name}: {len(prompts)} prompts, dropped: {dropped}", flush=True)
  return prompts


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
  if not pathlib.Path(path).is_dir():
    raise InputError(f"config.model.path: {path} is not a directory, expected a Hugging Face model directory")
  try:
    return AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: no tokenizer ({' '.join(str(error).split())[:200]})") from None


def first_state(
  run: Run, params: models.Params, writer: metrics.MetricsWriter, stop: "StopRequest"
) -> TrainState | None:
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


def warm_up(run: Run, params: models.Params, stop: "StopRequest") -> models.Params:
  """Supervised steps on the built-in demonstrations."""
  settings, tokenizer = run.config.warm_start, run.engine.tokenizer
  examples, responses = zip(*builtin.demonstrations(settings.steps * settings.batch_size, run.config.seed), strict=True)
  prompts, _ = prepare(
    examples,
    tokenizer,
    template=run.config.data.template,
    instruction=None if run.config.data.instruction == "default" else run.config.data.instruction,
    worked_examples=run.config.data.examples,
    prompt_limit=run.config.data.prompt_limit,
    max_reference_length=run.config.data.max_reference_length,
  )
  pairs = [
    (prompt.ids, [*tokenizer.encode(responses[prompt.row], add_special_tokens=False), tokenizer.eos_token_id])
    for prompt in prompts
  ]
  demonstrations = warm_start.pad(pairs, run.config.data.prompt_limit + run.config.rollout.max_response_length)
  transform = warm_start.optimizer(settings.steps, settings.learning_rate, settings.adam_learning_rate)
  opt_state = transform.init(params)
  progress = metrics.Progress("warm start, step")
  batches = demonstrations.batches(settings.batch_size, run.config.seed)
  for done in range(1, settings.steps + 1):
    if stop:
      break
    params, opt_state, loss = warm_start.step(run.model, transform, params, opt_state, next(batches))
    progress(done, settings.steps, f"loss {float(loss):.3f}")
  return params


def initial_baselines(run: Run, params: models.Params, stop: "StopRequest") -> np.ndarray:
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


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
  """Makes sure that the directory can be written and holds no other run; returns where its config belongs."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise InputError(f"--workdir: {workdir} cannot be written ({error.strerror})") from None
  saved = workdir / "config.json"
  if saved.exists():
    try:
      difference = configs.first_difference(json.loads(saved.read_text()), config)
    except ValueError:
      raise InputError(f"{saved}: not JSON, expected the config of this directory's run") from None
    if difference:
      raise InputError(f"--workdir: {workdir} holds another run: {difference}")
  return saved


def finish(run: Run, state: TrainState) -> None:
  """Last words: the report, and what became of the held-out accuracy, or how to go on."""
  path = report.write_report(run.workdir)
  accuracy = {
    row["step"]: row["held_out/accuracy"]
    for row in metrics.read(run.workdir / "metrics.jsonl")
    if "held_out/accuracy" in row
  }
  if state.step < run.config.steps:
    print(f"stopped after step {state.step} of {run.config.steps}; saved. The same command goes on from there.")
  if accuracy:
    k = run.config.evaluation.samples
    (first, before), (last, after) = min(accuracy.items()), max(accuracy.items())
    print(f"held-out Avg@{k} before (step {first}): {100 * before:.1f}%")
    if last != first:
      print(f"held-out Avg@{k} after  (step {last}): {100 * after:.1f}%")
  print(f"report: {path}", flush=True)


def progress_line(step: int, steps: int, values: dict[str, float], left: float) -> str:
  """One line a step: reward, what was kept, length, where the time went, speed, time left."""
  shown = {name: values.get(name, float("nan")) for name in ("reward/total", "reward/reference", "reward/baseline")}
  return (
    f"step {step}/{steps}  reward {shown['reward/total']:.3f}  r {shown['reward/reference']:.3f}"
    f"  r' {shown['reward/baseline']:.3f}  kept {values['filter/kept']}/{values['filter/drawn']}"
    f"  length {values.get('rollout/response_length', 0):.1f}"
    f"  | sample {values.get('seconds/rollout', 0):.1f}s score {values.get('seconds/score', 0):.1f}s"
    f" update {values['seconds/update']:.1f}s  {values.get('tokens_per_second/rollout', 0):.0f} tokens/s"
    f"  | {metrics.duration(left)} left"
  )


class StopRequest:
  """Ctrl-C and SIGTERM ask the run to stop after the step under way; a second Ctrl-C interrupts at once."""

  def __init__(self):
    self._asked = False

  def __bool__(self) -> bool:
    return self._asked

  def __enter__(self) -> "StopRequest":
    self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _ask(self, number: int, _: object) -> None:
    self._asked = True
    signal.signal(number, self._previous[number])
    print(f"\n{signal.Signals(number).name}: finishing the step, then saving", flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
