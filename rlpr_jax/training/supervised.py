"""Supervised steps: a policy that never saw the tags learns them from demonstrations, before RLPR begins.

The rows are packed and the steps taken as in RLPR: -log p of the responses is the term of an answer's own gradient.
"""

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import processes
from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import BATCH, repeats
from rlpr_jax.data.sources import DroppedRow, Example, read_demonstrations
from rlpr_jax.data.templates import build_messages, encode_texts, render_all
from rlpr_jax.errors import InputError
from rlpr_jax.models import Params
from rlpr_jax.policy import Policy
from rlpr_jax.runs import unfinished
from rlpr_jax.runs.checkpoints import Checkpoints, OnDisk
from rlpr_jax.runs.dropped_rows import describe_dropped_rows
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.metrics import Progress
from rlpr_jax.splicing import prompt_opening
from rlpr_jax.training import packing
from rlpr_jax.training.optimizer import abstract_opt_state, init_opt_state, warm_start_optimizer
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.training.settings import micro_batch_rows, row_length
from rlpr_jax.training.update import Update, UpdateProgram, UpdateSettings
from rlpr_jax.types import PackedRows


def optimizer(settings: ConfigDict) -> optax.GradientTransformation:
  """The optimiser that `config.warm_start` asks for."""
  return warm_start_optimizer(settings.optimizer, settings.steps, settings.learning_rate, settings.adam_learning_rate)


class Demonstration(NamedTuple):
  """A prompt and a response to it, in token ids."""

  prompt: list[int]
  response: list[int]  # EOS included


def load(
  config: ConfigDict, tokenizer: PreTrainedTokenizerBase, eos_id: int | None = None
) -> tuple[list[Demonstration], list[DroppedRow]]:
  """The demonstrations of `config.warm_start`, built-in or of files; says how many were too long and are left out.

  Args:
    eos_id: the token that ends a response; None for the tokenizer's EOS.

  Returns:
    demonstrations, those of more than the smallest weight once more behind them all; and the rows that cannot be used.

  Raises:
    InputError: none is left, or a file that is not as expected.
  """
  settings, data = config.warm_start, config.data
  unusable: list[DroppedRow] = []
  if settings.path:
    name = settings.path
    pairs, unusable = read_demonstrations(name, settings.split or None, data.max_dropped)
  else:
    pairs = builtin.demonstrations(settings.steps * settings.batch_size, config.seed, data.domains)
    name = "built-in demonstrations"
  eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
  found: list[Demonstration] = []
  weights: list[float] = []
  long_prompts, long_responses = 0, 0
  progress = Progress(f"{name}: tokenised")
  for start in range(0, len(pairs), BATCH):
    batch = pairs[start : start + BATCH]
    for (example, _), ids, response in zip(batch, *_tokenize(config, tokenizer, batch), strict=True):
      answer = [*response, eos_id]
      if len(ids) > data.prompt_limit:
        long_prompts += 1
      elif len(answer) > config.rollout.max_response_length:
        long_responses += 1
      else:
        found.append(Demonstration(ids, answer))
        weights.append(example.weight)
    if len(pairs) > BATCH:
      progress(start + len(batch), len(pairs))
  if not found:
    raise InputError(
      f"{name}: none of {len(pairs)} rows is left: {long_prompts} prompts are over config.data.prompt_limit"
      f" {data.prompt_limit}, {long_responses} responses over config.rollout.max_response_length"
      f" {config.rollout.max_response_length}"
    )
  found += [found[i] for i in repeats(weights, config.seed)]
  dropped = f"{long_prompts} long prompts, {long_responses} long responses{describe_dropped_rows(unusable)}"
  print(f"{name}: {len(found)} rows, dropped: {dropped}", flush=True)
  return found, unusable


def _tokenize(
  config: ConfigDict, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Example, str]]
) -> tuple[list[list[int]], list[list[int]]]:
  """Ids of the prompts, and of the responses without what their prompt has written of them."""
  data = config.data
  instruction = None if data.instruction == "default" else data.instruction
  chats = [build_messages(example, data.template, data.examples, instruction, data.system) for example, _ in pairs]
  prompts = render_all(tokenizer, chats, [example.origin for example, _ in pairs])
  responses = []
  for (_, response), ids in zip(pairs, prompts, strict=True):
    opening = prompt_opening(tokenizer, ids)
    if opening and response.lstrip().startswith(opening):
      response = response.lstrip().removeprefix(opening).lstrip()
    responses.append(response)
  return prompts, encode_texts(tokenizer, responses)


def batches(demonstrations: Sequence[Demonstration], size: int, seed: int) -> Iterator[list[Demonstration]]:
  """Batches for ever, each epoch in another order; of all there are, where those are fewer."""
  rng, size = np.random.default_rng(seed), min(size, len(demonstrations))
  while True:
    order = rng.permutation(len(demonstrations))
    for first in range(0, len(order) - size + 1, size):
      yield [demonstrations[i] for i in order[first : first + size]]


def pack(batch: Sequence[Demonstration], rows: int, row_length: int) -> PackedRows:
  """Packs rows whose loss is the mean of -log p over the tokens of the responses.

  >>> rows = pack([Demonstration(prompt=[5, 6], response=[7, 2])], rows=1, row_length=6)
  >>> rows.answer_weights.tolist()
  [[0.0, 0.0, 0.5, 0.5, 0.0, 0.0]]
  """
  weight = 1 / sum(len(item.response) for item in batch)
  trees: dict[tuple[int, ...], Tree] = {}  # by prompt
  for prompt, response in batch:
    weights = np.full(len(response), weight, np.float32)
    tree = trees.setdefault(tuple(prompt), Tree(np.array(prompt, np.int32), []))
    tree.branches.append(Branch.of_tokens(np.array(response, np.int32), answer_weights=weights))
  return packing.pack_trees(list(trees.values()), rows, row_length)


class SupervisedState(NamedTuple):
  """The state between two supervised steps."""

  step: int  # steps finished
  params: Params  # what is trained
  opt_state: optax.OptState


def steps(
  config: ConfigDict, policy: Policy, state: SupervisedState, demonstrations: Sequence[Demonstration]
) -> Iterator[tuple[SupervisedState, dict[str, np.ndarray]]]:
  """Takes the steps of `config.warm_start` that are left.

  Yields:
    the state, which the next step donates, and the metrics of the update; `answer_loss` is the mean of -log p, nats a
    token.

  Raises:
    InputError: so many updates in a row were not finite as `config.guards` bears.
  """
  settings = config.warm_start
  size = micro_batch_rows(config, policy.sharding)
  rows = -(-settings.batch_size // size) * size
  compiled = UpdateSettings(
    temperature=1.0,
    clip_low=0.0,
    clip_high=0.0,
    entropy_coefficient=0.0,
    micro_batch_rows=size,
    sharding=policy.sharding,
  )
  update = Update(UpdateProgram(policy.model, optimizer(settings), compiled), policy.frozen)
  stream = batches(demonstrations, settings.batch_size, config.seed)
  skipped = 0
  for step in range(1, settings.steps + 1):
    batch = next(stream)
    if step <= state.step:
      continue
    state, metrics = update(state, pack(batch, rows, row_length(config)))
    state, metrics = state._replace(step=step), jax.device_get(metrics)
    skipped = skipped + 1 if metrics["skipped"] else 0
    if skipped == config.guards.max_skipped:
      raise InputError(f"supervised step {step}: {skipped} updates in a row were not finite, expected a lower rate")
    yield state, metrics


def warm_start(
  config: ConfigDict,
  policy: Policy,
  params: Params,
  demonstrations: Sequence[Demonstration],
  workdir: pathlib.Path,
  stop: StopRequest,
) -> Params:
  """Takes all supervised steps before RLPR begins, and shows how far they are; returns the parameters.

  The state is kept in `workdir` every minute and at a stop; the same call then goes on from there.
  """
  checkpoints = Checkpoints(unfinished.directory(workdir) / "warm_start", config.log, split, join)
  state = checkpoints.restore(abstract_supervised_state(config, policy))
  if state is None:
    state = SupervisedState(0, params, init_opt_state(optimizer(config.warm_start), params, policy.sharding))
  progress, total = Progress("warm start, step"), config.warm_start.steps
  kept_at = time.monotonic()
  for state, losses in steps(config, policy, state, demonstrations):  # noqa: B020
    progress(state.step, total, f"loss {float(losses['answer_loss']):.3f}")
    due = processes.is_first() and time.monotonic() - kept_at > unfinished.EVERY
    if processes.any_of(due or bool(stop)):
      checkpoints.save(state)
      checkpoints.wait()  # before the next step donates the arrays
      kept_at = time.monotonic()
      if processes.any_of(bool(stop)):
        break
  checkpoints.close()
  return state.params


def abstract_supervised_state(config: ConfigDict, policy: Policy) -> SupervisedState:
  """The state before the first step with shapes in the place of arrays, to restore a checkpoint into."""
  made = abstract_opt_state(optimizer(config.warm_start), policy.trained, policy.sharding)
  return SupervisedState(0, policy.trained, made)


def split(state: SupervisedState) -> OnDisk:
  """Takes a state apart as its checkpoint holds it."""
  return OnDisk(state.params, {"opt_state": state.opt_state}, {"step": state.step})


def join(params: Params, arrays: dict[str, Any], host: dict[str, Any]) -> SupervisedState:
  """Puts together the state that `split` took apart."""
  return SupervisedState(host["step"], params, arrays["opt_state"])
