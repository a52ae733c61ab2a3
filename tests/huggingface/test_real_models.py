"""Real weights with their own tokenizer, chat template and end of a turn: from the files to an exported policy.

Those that the project may not fetch are used where somebody has put them under .cache.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
import transformers
from flax import nnx

from rlpr_jax import config as configs
from rlpr_jax import export, huggingface, models
from rlpr_jax import train as training_program
from rlpr_jax.data.templates import render
from rlpr_jax.runs import trained
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.types import Prompt
from tests.models import cases

CACHE = pathlib.Path(__file__).parents[2] / ".cache"
NAMES = ("smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b")
TOPICS = (
  "Why is the sky blue?", "Write a short poem about the sea.", "What is 17 times 23? Think step by step.", "Hello!",
  "Translate 'good morning' into French and German.", "Explain photosynthesis to a child.", "Who wrote Hamlet?",
  "List three uses of a paper clip.", "Write a Python function that reverses a string.", "Say yes.",
  "What should I cook with rice, two eggs and an onion?", "When did the Second World War end?",
  "What is the difference between a virus and a bacterium?", "Name the planets of the solar system.",
  "Is it cheaper to buy 3 apples for 2 euros or 5 apples for 3 euros?", "Give me advice for a job interview.",
  "Complete the sentence: The early bird", "Sort these numbers: 9, 2, 31, 4.", "What is 2 + 2? One word.",
  "What are the advantages of trains over cars for a journey of 300 kilometres?",
)  # fmt: skip
NEW = 64  # tokens of a response, at most

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NAMES)
def directory(request) -> pathlib.Path:
  path = CACHE / request.param
  if not (path / "config.json").exists():
    pytest.skip(f"no {request.param} under .cache")
  return path


@pytest.fixture(scope="module")
def torch():
  found = cases.import_torch()
  found.set_num_threads(1)  # its threads spin while they wait, which is slow beside those of jax
  return found


def load_torch(directory, torch):
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ending(directory) -> set[int]:
  """Tokens at which transformers ends a response."""
  published = (directory / "generation_config.json").exists()
  source = transformers.GenerationConfig if published else transformers.AutoConfig
  ids = source.from_pretrained(directory).eos_token_id
  return set(ids if isinstance(ids, list) else [ids])


def test_logits_and_greedy_responses_are_those_of_transformers(directory, torch):
  """Two best logits within 1e-4 of each other may change places by rounding: a warning then, and nothing else."""
  theirs = load_torch(directory, torch)
  config, params = huggingface.load_pretrained(directory)
  decoder = nnx.merge(models.definition(config), params)
  policy = trained.load(trained.find(str(directory)), "float32")
  text = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text()
  tokens = np.array([policy.tokenizer(text, add_special_tokens=False)["input_ids"][:160]], np.int32)
  positions = np.arange(160)[None]
  found = np.asarray(decoder.logits(decoder(tokens, positions, np.ones_like(tokens))))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)

  assert set(policy.turn_end.eos_ids) >= ending(directory)
  chats = [render(policy.tokenizer, [{"role": "user", "content": topic}]) for topic in TOPICS]
  engine: Engine = trained.create_engine(policy, slots=8, prompt_limit=96, response_limit=NEW, decode_steps=16)
  engine = Engine(engine.device, policy.tokenizer, "think", "bare", SamplingParams(0.0), policy.turn_end.eos_id)
  draws = [(i, Prompt(ids=np.array(chat, np.int32), row=i)) for i, chat in enumerate(chats)]
  samples = engine.sample(policy.params, draws, jax.random.key(0), 1)
  for chat, row, length in zip(chats, samples.tokens, samples.lengths, strict=True):
    with torch.no_grad():
      out = theirs.generate(
        torch.tensor([chat]),
        attention_mask=torch.ones(1, len(chat)),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=list(policy.turn_end.eos_ids),
      )
    ours, wanted = row[:length].tolist(), out[0, len(chat) :].tolist()
    cases.check_greedy(theirs, chat, ours, wanted, policy.tokenizer)


def test_two_steps_and_what_is_exported(directory, torch, tmp_path):
  c = configs.default()
  c.compilation_cache = ""
  c.model.path = str(directory)
  c.lora.rank, c.lora.base_dtype = 4, "float32"
  c.steps = c.prompts_per_step = c.samples_per_prompt = 2
  c.max_draws = 1
  rows = [{"question": f"How much is {n} and {n}?", "answer": f"{2 * n} apples"} for n in range(4)]
  (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  c.data.path = str(tmp_path / "rows.jsonl")
  c.data.prompt_limit, c.data.max_reference_length, c.rollout.max_response_length = 192, 24, 16
  c.rollout.prompts_per_draw, c.rollout.slots, c.rollout.decode_steps = 2, 4, 8
  c.rollout.prefill_prompts, c.rollout.score_rows = 2, 4
  c.filter.kind, c.reward.kind, c.training.minibatches = "off", "random", 1
  c.training.learning_rate = 1e-3
  c.evaluation.prompts = 0
  training_program.train(c, tmp_path / "run")
  metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in metrics][-1] == 2
  assert all(np.isfinite(value) for row in metrics for value in row.values())
  assert all(row["sampler_gap/worst"] < 1e-2 for row in metrics if "sampler_gap/worst" in row)

  export.export(tmp_path / "run", tmp_path / "out", step=None, dtype="float32", adapter=False)
  assert ending(tmp_path / "out") >= ending(directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  tokens = np.array([render(tokenizer, [{"role": "user", "content": TOPICS[0]}])], np.int32)
  config, params = huggingface.load_pretrained(tmp_path / "out")
  decoder = nnx.merge(models.definition(config), params)
  ours = np.asarray(decoder.logits(decoder(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))))
  with torch.no_grad():
    exported = load_torch(tmp_path / "out", torch)(torch.tensor(tokens)).logits.numpy()
    before = load_torch(directory, torch)(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(ours, exported, atol=2e-4, rtol=0)
  assert np.abs(exported - before).max() > 1e-3  # it has learned something
