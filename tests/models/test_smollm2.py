"""A real policy, SmolLM2-135M-Instruct, against transformers in torch (float32) and against itself."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from rlpr_jax import models
from rlpr_jax.sampling.decode import SamplingSettings, decode, prefill
from rlpr_jax.training import packing
from rlpr_jax.training.update import row_logprobs

torch.set_num_threads(1)  # its threads spin while they wait, which is slow beside those of jax
DIRECTORY = pathlib.Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct"
pytestmark = pytest.mark.skipif(
  not (DIRECTORY / "model.safetensors").exists(), reason="no .cache/smollm2-135m-instruct: run tools/smollm2.py"
)
QUESTIONS = (
  "What is the capital of France?",
  "Count from one to ten.",
  "A train leaves at 3 pm and arrives at 5 pm. How long is the journey?",
  "Hi",
)
WIDTH, NEW = 56, 16  # tokens of a padded prompt, and of a response


@pytest.fixture(scope="module")
def loaded():
  config, params = models.load_pretrained(str(DIRECTORY))
  return config, models.definition(config), params


@pytest.fixture(scope="module")
def theirs():
  return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(published):
  """Chats as int32[4, WIDTH], padded on the right, and their lengths."""
  tokenizer = published("smollm2")
  chats = [
    tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    for text in QUESTIONS
  ]
  lengths = np.array([len(chat) for chat in chats], np.int32)
  assert len(set(lengths)) == 4
  return np.array([chat + [0] * (WIDTH - len(chat)) for chat in chats], np.int32), lengths


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(model, params, tokens):
  decoder = nnx.merge(model, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens, starts, cache):
  decoder = nnx.merge(model, params)
  hidden, cache = decoder.extend(tokens, starts, cache)
  return decoder.logits(hidden[:, 0]), cache


def test_logits_are_those_of_transformers(loaded, theirs, prompts):
  _, model, params = loaded
  tokens, lengths = prompts
  found = np.asarray(compute_logits(model, params, tokens))
  for row, length in enumerate(lengths):
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
    np.testing.assert_allclose(found[row, :length], expected, atol=1e-3)


def test_greedy_tokens_are_those_of_transformers(loaded, theirs, prompts):
  """Four prompts of different lengths in one padded batch, against each of them alone and unpadded."""
  _, model, params = loaded
  tokens, lengths = prompts
  eos = theirs.config.eos_token_id
  settings = SamplingSettings(NEW, suffix_length=4, temperature=0.0, eos_ids=(eos,))
  hidden, cache = prefill(model, params, tokens, lengths, capacity=WIDTH + NEW + 4)
  samples, _ = decode(model, params, hidden, cache, lengths, jax.random.split(jax.random.key(0), 4), settings)
  for row, (length, new) in enumerate(zip(lengths, samples.lengths, strict=True)):
    assert new == NEW or (samples.finished[row] and samples.tokens[row, new - 1] == eos)
    text = np.concatenate([tokens[row, :length], samples.tokens[row, :new]])
    with torch.no_grad():
      likeliest = theirs(torch.tensor(text[None, :-1])).logits[0].argmax(dim=-1).numpy()
    # Each token is the likeliest after those before it, so theirs would have been the same from the first to the last.
    np.testing.assert_array_equal(likeliest[length - 1 :], samples.tokens[row, :new])


def test_cached_decoding_is_the_full_forward_pass(loaded, prompts):
  """All but the last six tokens of each prompt are read at once, and those one by one."""
  _, model, params = loaded
  tokens, lengths = prompts
  rows, starts = np.arange(4), lengths - 6
  full = np.asarray(compute_logits(model, params, tokens))
  tolerance = 1e-4 * np.max(np.abs(full))
  padded = np.where(np.arange(WIDTH) < starts[:, None], tokens, 1)
  hidden, cache = prefill(model, params, padded, starts, capacity=WIDTH + 3)
  logits = hidden @ params["embedding"].T
  np.testing.assert_allclose(logits, full[rows, starts - 1], atol=tolerance)
  for step in range(6):
    places = starts + step
    logits, cache = extend(model, params, tokens[rows, places][:, None], places, cache)
    np.testing.assert_allclose(logits, full[rows, places], atol=tolerance)


def test_log_probabilities_of_the_sampler_are_those_of_the_trainer(loaded, prompts):
  _, model, params = loaded
  tokens, lengths = prompts
  settings = SamplingSettings(NEW, suffix_length=4, temperature=0.6, eos_ids=(2,))
  hidden, cache = prefill(model, params, tokens, lengths, capacity=WIDTH + NEW + 4)
  samples, _ = decode(model, params, hidden, cache, lengths, jax.random.split(jax.random.key(1), 8), settings)
  samples = jax.device_get(samples)
  by_prompt = [field.reshape(4, 2, *field.shape[1:]) for field in samples[:3]]
  groups = packing.Groups(tokens, lengths, *by_prompt, advantages=np.zeros((4, 2), np.float32))
  rows = packing.pack(groups, 4, "token_mean")
  assert rows.mask.sum() == samples.lengths.sum() > 64
  found, _ = jax.jit(row_logprobs, static_argnums=(0, 3))(model, params, rows, 0.6)
  np.testing.assert_allclose(np.asarray(found)[rows.mask], rows.old_logprobs[rows.mask], atol=1e-4)
