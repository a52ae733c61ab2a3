"""RLPR in one sitting: the whole method on the pure modules, from a random policy to one that reasons.

    python examples/minimal_rlpr.py --steps=30

    questions -> prompts -> rollouts -> reference probabilities -> rewards -> kept groups -> advantages -> update

The policy, its questions and its warm start are those of the quickstart. Everything is here but the decoder, the
splicing of a reference answer into a response, and the mathematics: `rewards`, `filtering`, `grpo`.

Left out, next to `rlpr_jax.train`: rows are padded and not packed; all responses are sampled in lockstep to the same
length, each prompt is read once a response, and references are scored by a second pass; groups are not carried over to
the next step, and none are drawn to replace those that the filter drops; one device; no checkpoints, no report.
"""

import argparse
import functools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rlpr_jax import filtering, grpo, models, rewards, splicing
from rlpr_jax.config import default
from rlpr_jax.data import builtin
from rlpr_jax.data.templates import build_messages, render
from rlpr_jax.policy import new_config
from rlpr_jax.training.optimizer import warm_start_optimizer

PROMPT, RESPONSE, REFERENCE = 14, 32, 16  # most tokens of each
SAMPLES = 8  # G: responses to a prompt
PROMPTS = 64  # P: prompts of a step
MINIBATCHES = 4
CLIP_LOW, CLIP_HIGH, ENTROPY = 0.2, 0.27, 0.001

TOKENIZER = builtin.tokenizer()
EOS = TOKENIZER.eos_token_id
CONFIG = new_config(default(), vocab_size=len(TOKENIZER))  # the sizes of config.model
MODEL = models.definition(CONFIG)


class Prompt(NamedTuple):
  ids: list[int]
  reference: str
  baseline: float  # r': probability of the reference with no reasoning; 0 until it is measured


class Rows(NamedTuple):
  """Token rows, padded on the right: a prompt each, and what follows it."""

  tokens: np.ndarray  # int32[B, L]
  mask: np.ndarray  # bool[B, L] True on the tokens that count


def make_rows(texts: list[list[int]], masks: list[list[bool]]) -> Rows:
  """Pads texts, and the masks of their last tokens, into rows of one length."""
  length = PROMPT + RESPONSE + REFERENCE
  rows = Rows(np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool))
  for row, (text, mask) in enumerate(zip(texts, masks, strict=True)):
    rows.tokens[row, : len(text)] = text
    rows.mask[row, len(text) - len(mask) : len(text)] = mask
  return rows


# The policy ----------------------------------------------------------------------------------------------------------


def token_logprobs(params, tokens):
  """Log-probability of each token [B, L] given those before it, and the entropy there. The first has none: 0."""
  decoder = nnx.merge(MODEL, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  # Padding stands behind the text, where no token of it looks: it needs no segment of its own.
  hidden = decoder(tokens, positions, jnp.ones_like(tokens))
  logps, entropy = decoder.logprobs(hidden[:, :-1], tokens[:, 1:])
  return jnp.pad(logps, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


@functools.partial(jax.jit, static_argnames=("greedy",))
def sample(params, prompts, lengths, key, greedy=False):
  """Samples responses int32[B, RESPONSE] to prompts int32[B, PROMPT] of these lengths, with a key/value cache.

  Returns:
    the tokens, what stands after EOS being without meaning, and their log-probabilities.
  """
  decoder = nnx.merge(MODEL, params)
  rows = jnp.arange(len(prompts))
  hidden, read = decoder.prefill(prompts)
  cache = decoder.empty_cache(len(prompts), PROMPT + RESPONSE)
  cache = cache.map(lambda axis, old, new: jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis), read)
  # Where each token of the cache stands in its text. The prompt's padding is not seen, nor what is not there yet.
  places = jnp.arange(PROMPT + RESPONSE)
  seen = jnp.where(places < lengths[:, None], places, models.UNSEEN)

  def step(carry, t):
    cache, seen, hidden = carry
    logits = decoder.logits(hidden[:, None])[:, 0]
    noise = jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
    tokens = jnp.argmax(logits if greedy else logits + noise, axis=-1)
    logps = jax.nn.log_softmax(logits)[rows, tokens]
    views = (models.CacheView(cache, seen),)
    hidden, new = decoder.extend(tokens[:, None], (lengths + t)[:, None], views)
    cache = cache.map(lambda axis, old, x: jax.lax.dynamic_update_slice_in_dim(old, x, PROMPT + t, axis), new)
    return (cache, seen.at[:, PROMPT + t].set(lengths + t), hidden[:, 0]), (tokens, logps)

  start = (cache, seen, hidden[rows, lengths - 1])
  _, (tokens, logps) = jax.lax.scan(step, start, jnp.arange(RESPONSE))
  return tokens.T, logps.T


def respond(params, prompts: list[Prompt], key, greedy=False):
  """Samples one response to each prompt: its tokens up to EOS, and their log-probabilities."""
  padded = np.zeros((len(prompts), PROMPT), np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt.ids)] = prompt.ids
  lengths = np.array([len(prompt.ids) for prompt in prompts])
  tokens, logps = jax.device_get(sample(params, padded, lengths, key, greedy))
  ended = (tokens == EOS).any(axis=1)
  counts = np.where(ended, (tokens == EOS).argmax(axis=1) + 1, RESPONSE)  # EOS is part of the response
  return [list(map(int, row[:count])) for row, count in zip(tokens, counts, strict=True)], logps


def decode(ids: list[int]) -> str:
  return TOKENIZER.decode(ids[:-1] if ids and ids[-1] == EOS else ids, clean_up_tokenization_spaces=False)


# The reward ----------------------------------------------------------------------------------------------------------

_score = jax.jit(lambda params, tokens: token_logprobs(params, tokens)[0])


def reference_probabilities(params, texts, masks) -> np.ndarray:
  """r: the mean probability of the reference's tokens in each text; 0 where there is none (section 3.2)."""
  rows = make_rows(texts, masks)
  return np.asarray(rewards.reference_probability(_score(params, rows.tokens), rows.mask))


def measure_baselines(params, prompts: list[Prompt]) -> list[Prompt]:
  """r': the same with nothing between the prompt and the reference, under the initial policy."""
  measured = []
  for first in range(0, len(prompts), PROMPTS * SAMPLES):
    part = prompts[first : first + PROMPTS * SAMPLES]
    suffixes = [splicing.baseline_suffix(TOKENIZER, prompt.reference) for prompt in part]
    texts = [prompt.ids + ids for prompt, (ids, _) in zip(part, suffixes, strict=True)]
    scores = reference_probabilities(params, texts, [mask for _, mask in suffixes])
    measured += [prompt._replace(baseline=float(r)) for prompt, r in zip(part, scores, strict=True)]
  return measured


def reward(params, prompts: list[Prompt], responses: list[list[int]]) -> np.ndarray:
  """The reward [P, G] of each response: what its reasoning adds to the reference's probability, and the format."""
  texts, masks = [], []
  for prompt, response in zip(prompts, responses, strict=True):
    splice = splicing.splice(TOKENIZER, prompt.ids, response, prompt.reference)  # the reference for its own answer
    suffix = splice.suffix_ids if splice else []
    texts.append(prompt.ids + response[: splice.prefix_length if splice else 0] + suffix)
    masks.append(splice.answer_mask if splice else [])
  written = [decode(response) for response in responses]
  debiased = rewards.debias(reference_probabilities(params, texts, masks), [prompt.baseline for prompt in prompts])
  formats = np.array([rewards.format_score(text) for text in written])
  penalties = np.array([rewards.repetition_penalty(text) for text in written])
  return np.asarray(rewards.combine(debiased, formats, penalty=penalties)).reshape(-1, SAMPLES)


# The update ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnames=("params", "opt_state"))
def update(optimizer, params, opt_state, tokens, mask, old_logps, advantages):
  """One optimiser step on the clipped policy loss of a minibatch."""

  def loss(params):
    logps, entropy = token_logprobs(params, tokens)
    policy_loss, metrics = grpo.policy_loss(logps, old_logps, advantages, mask, CLIP_LOW, CLIP_HIGH)
    mean_entropy = jnp.sum(jnp.where(mask, entropy, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
    return policy_loss - ENTROPY * mean_entropy, metrics

  (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  steps, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, steps), opt_state, metrics


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnames=("params", "opt_state"))
def imitate(optimizer, params, opt_state, tokens, mask):
  """One supervised step: the mean of -log p over the tokens of the responses."""

  def loss(params):
    return -jnp.sum(jnp.where(mask, token_logprobs(params, tokens)[0], 0.0)) / jnp.sum(mask)

  value, gradients = jax.value_and_grad(loss)(params)
  steps, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, steps), opt_state, value


def warm_start(params, steps: int, seed: int):
  """Supervised steps on demonstrations, careful and careless ones: a policy in the right format that is often wrong."""
  optimizer = warm_start_optimizer("muon", steps, rate=0.02, adam_learning_rate=0.003)
  opt_state = optimizer.init(params)
  demonstrations = builtin.demonstrations(steps * PROMPTS, seed)
  for step in range(steps):
    texts, masks = [], []
    for example, response in demonstrations[step * PROMPTS : (step + 1) * PROMPTS]:
      answer = [*TOKENIZER.encode(response, add_special_tokens=False), EOS]
      texts.append(render(TOKENIZER, build_messages(example, "think", (), "")) + answer)
      masks.append([True] * len(answer))
    params, opt_state, loss = imitate(optimizer, params, opt_state, *make_rows(texts, masks))
    if step % 100 == 0 or step == steps - 1:
      print(f"warm start {step + 1}/{steps}  loss {loss:.3f}", flush=True)
  return params


# The story -----------------------------------------------------------------------------------------------------------


def load_prompts(split: str, count: int, seed: int) -> list[Prompt]:
  return [
    Prompt(render(TOKENIZER, build_messages(example, "think", (), "")), example.reference, 0.0)
    for example in builtin.examples(split, count, seed)
  ]


def accuracy(params, prompts: list[Prompt], key) -> float:
  """Share of held-out questions whose sampled answer is the reference to the letter."""
  responses, _ = respond(params, prompts, key)
  right = [splicing.extract_answer(decode(ids)) == p.reference for p, ids in zip(prompts, responses, strict=True)]
  return float(np.mean(right))


def train(steps: int, warm_start_steps: int, seed: int) -> list[float]:
  """Trains, and returns the held-out accuracy before RLPR and after it."""
  key = jax.random.key(seed)
  params = warm_start(models.init_params(CONFIG, seed), warm_start_steps, seed)
  prompts = measure_baselines(params, load_prompts("train", 2048, seed))
  held_out = load_prompts("held_out", 400, seed)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.01))
  opt_state = optimizer.init(params)
  filter_config = filtering.FilterConfig()
  state = filtering.init(filter_config)
  accuracies = [accuracy(params, held_out, jax.random.fold_in(key, 0))]
  print(f"held-out accuracy before RLPR: {accuracies[0]:.1%}", flush=True)
  order = random.Random(seed)
  for step in range(1, steps + 1):
    # 1. Prompts, and a group of responses to each.
    drawn = [prompt for prompt in order.sample(prompts, PROMPTS) for _ in range(SAMPLES)]
    responses, old_logps = respond(params, drawn, jax.random.fold_in(key, step))
    # 2. Rewards, advantages within each group, and the groups that spread enough to teach something (section 3.3).
    totals = reward(params, drawn, responses)
    advantages, stds = map(np.asarray, grpo.group_advantages(totals))
    kept = np.repeat(np.asarray(filtering.keep(state, stds, filter_config)), SAMPLES)
    state = filtering.update(state, stds, filter_config)
    # 3. Optimiser steps. A group that was dropped has no tokens in the loss.
    rows = make_rows(
      [prompt.ids + response for prompt, response in zip(drawn, responses, strict=True)],
      [[bool(keep)] * len(response) for keep, response in zip(kept, responses, strict=True)],
    )
    old = np.zeros(rows.tokens.shape, np.float32)
    for row, (prompt, response) in enumerate(zip(drawn, responses, strict=True)):
      old[row, len(prompt.ids) : len(prompt.ids) + len(response)] = old_logps[row, : len(response)]
    for part in np.split(np.arange(len(drawn)), MINIBATCHES):
      minibatch = (rows.tokens[part], rows.mask[part], old[part], advantages.reshape(-1)[part])
      params, opt_state, metrics = update(optimizer, params, opt_state, *minibatch)
    shown = f"reward {totals.mean():.3f}  kept {kept.sum() // SAMPLES}/{PROMPTS}  ratio {metrics['ratio_mean']:.3f}"
    print(f"step {step}/{steps}  {shown}", flush=True)
  accuracies.append(accuracy(params, held_out, jax.random.fold_in(key, 0)))
  print(f"held-out accuracy after RLPR: {accuracies[1]:.1%}", flush=True)
  return accuracies


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="RLPR in one sitting.")
  parser.add_argument("--steps", type=int, default=30, help="training steps")
  parser.add_argument("--warm_start", type=int, default=800, help="supervised steps before them")
  parser.add_argument("--seed", type=int, default=0)
  given = parser.parse_args()
  train(given.steps, given.warm_start, given.seed)
