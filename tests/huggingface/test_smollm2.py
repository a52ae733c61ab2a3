"""A real policy, SmolLM2-135M-Instruct, against transformers in torch (float32) and against itself."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from rlpr_jax import huggingface, models, types
from rlpr_jax.sampling.decode import DecodeSettings, Entries, Prefilled, empty_slots, insert, prefill
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.training import packing
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.types import Prompt
from tests.models import cases
from tests.sampling.drawing import Responses, draw_all

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
TOPICS = (
  "Why is the sky blue?",
  "Write a short poem about the sea.",
  "What is 17 times 23? Think step by step.",
  "Translate 'good morning' into French, German and Spanish.",
  "Explain photosynthesis to a child.",
  "List three uses of a paper clip.",
  "Who wrote Hamlet?",
  "Write a Python function that reverses a string.",
  "What should I cook with rice, two eggs and an onion?",
  "Summarise: The meeting was moved from Monday to Wednesday because the room was taken. Everybody was told but Anna.",
  "Hello!",
  "What is the difference between a virus and a bacterium?",
  "Name the planets of the solar system, from the sun outwards.",
  "Is it cheaper to buy 3 apples for 2 euros or 5 apples for 3 euros?",
  "Give me advice for a job interview.",
  "When did the Second World War end?",
  "Complete the sentence: The early bird",
  "What are the advantages of trains over cars for a journey of 300 kilometres between two large cities?",
  "Sort these numbers: 9, 2, 31, 4.",
  "Tell me a story about a fox and a lantern in no more than three sentences, please.",
)
WIDTH, NEW = 56, 16  # tokens of a padded prompt, and of a response


@pytest.fixture(scope="module")
def loaded():
  config, params = huggingface.load_pretrained(str(DIRECTORY))
  return config, models.definition(config), params


@pytest.fixture(scope="module")
def torch():
  found = cases.import_torch()
  found.set_num_threads(1)  # its threads spin while they wait, which is slow beside those of jax
  return found


@pytest.fixture(scope="module")
def theirs(torch):
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


def sample(model, params, prompts, samples, settings: DecodeSettings, sampling: SamplingParams, key) -> Responses:
  """Responses of NEW tokens at most to each prompt, in order."""
  tokens, lengths = prompts
  rows = len(tokens) * samples
  slots = empty_slots(model, params, rows, WIDTH + NEW + settings.steps)
  hidden, cache = prefill(model, params, tokens, lengths)
  entries = Entries(
    source=np.repeat(np.arange(len(tokens)), samples),
    target=np.arange(rows),
    keys=jax.random.key_data(jax.random.split(key, rows)),
    limits=np.full(rows, NEW),
    sampling=stack([sampling] * rows),
  )
  slots = insert(model, params, slots, Prefilled(hidden, cache, lengths), entries)
  return draw_all(model, params, slots, settings, WIDTH + NEW, NEW)[1]


def test_logits_are_those_of_transformers(loaded, theirs, torch, prompts):
  _, model, params = loaded
  tokens, lengths = prompts
  found = np.asarray(compute_logits(model, params, tokens))
  for row, length in enumerate(lengths):
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
    np.testing.assert_allclose(found[row, :length], expected, atol=1e-3)


def test_logits_of_a_long_text_are_those_of_transformers(loaded, theirs, torch, published):
  """English prose: the beginning of the project's licence."""
  _, model, params = loaded
  text = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text()
  tokens = np.array([published("smollm2")(text)["input_ids"][:384]], np.int32)
  assert tokens.shape == (1, 384)
  assert len(np.unique(tokens)) > 100
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(compute_logits(model, params, tokens), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_generation_is_that_of_transformers(loaded, theirs, torch, published):
  """64 greedy tokens to each of twenty prompts: in eight slots in ours, one after the other in theirs.

  Two best logits within 1e-4 of each other may change places by rounding: a warning then, and nothing else may differ.
  """
  _, model, params = loaded
  tokenizer = published("smollm2")
  eos, new = theirs.config.eos_token_id, 64
  chats = [
    tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    for text in TOPICS
  ]
  assert len({len(chat) for chat in chats}) > 8
  settings = DecodeSettings(steps=16, eos_ids=(eos,))
  shapes = Shapes(
    slots=8, prompt_limit=96, max_response_length=new, suffix_length=4, steps=16, prefill_rows=4, score_rows=4,
    insert_rows=4,
  )  # fmt: skip
  device = Device(model, settings, shapes)
  engine = Engine(device, tokenizer, "think", baseline_prefix="bare", sampling=SamplingParams(0.0))
  draws = [
    (i, Prompt(ids=np.array(chat), question=text, row=i))
    for i, (chat, text) in enumerate(zip(chats, TOPICS, strict=True))
  ]
  samples = engine.sample(params, draws, jax.random.key(0), 1)
  for chat, tokens, length in zip(chats, samples.tokens, samples.lengths, strict=True):
    with torch.no_grad():
      out = theirs.generate(
        torch.tensor([chat]), attention_mask=torch.ones(1, len(chat)), do_sample=False, max_new_tokens=new
      )
    expected, found = out[0, len(chat) :].tolist(), tokens[:length].tolist()
    cases.check_greedy(theirs, chat, found, expected, tokenizer)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(loaded, theirs, torch, prompts):
  """Four prompts of different lengths in one padded batch, against each of them alone and unpadded."""
  _, model, params = loaded
  tokens, lengths = prompts
  eos = theirs.config.eos_token_id
  settings = DecodeSettings(steps=6, eos_ids=(eos,))
  samples = sample(model, params, prompts, 1, settings, SamplingParams(0.0), jax.random.key(0))
  for row, (length, new) in enumerate(zip(lengths, samples.counts, strict=True)):
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
  hidden, _ = prefill(model, params, padded, starts)
  np.testing.assert_allclose(hidden @ params["embedding"].T, full[rows, starts - 1], atol=tolerance)
  _, cache = cases.prefill(model, params, padded, WIDTH + 3)
  for step in range(6):
    places = starts + step
    logits, cache = cases.extend(model, params, tokens[rows, places][:, None], places, cache)
    np.testing.assert_allclose(logits[:, 0], full[rows, places], atol=tolerance)


def test_log_probabilities_of_the_sampler_are_those_of_the_trainer(loaded, prompts):
  _, model, params = loaded
  tokens, lengths = prompts
  settings = DecodeSettings(steps=6, eos_ids=(2,))
  samples = sample(model, params, prompts, 2, settings, SamplingParams(0.6), jax.random.key(1))
  fields = (samples.tokens, samples.counts, samples.logprobs)
  by_prompt = [field.reshape(4, 2, *field.shape[1:]) for field in fields]
  groups = types.Groups(tokens, lengths, *by_prompt, advantages=np.zeros((4, 2), np.float32))
  rows = packing.pack(groups, "token_mean", rows=8, row_length=tokens.shape[1] + samples.tokens.shape[1])
  assert rows.mask.sum() == samples.counts.sum() > 64
  found, _ = jax.jit(row_logprobs, static_argnums=(0, 3))(model, params, rows, 0.6)
  np.testing.assert_allclose(np.asarray(found)[rows.mask], rows.old_logprobs[rows.mask], atol=1e-4)
