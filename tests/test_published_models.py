"""Tokenizer, chat template, config and generation_config.json of one model together, as their makers publish them.

The weights are random and small, of the published vocabulary.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from rlpr_jax import config as configs
from rlpr_jax import huggingface, models, splicing
from rlpr_jax.errors import InputError
from rlpr_jax.policy import load_policy
from rlpr_jax.runs import trained
from rlpr_jax.sampling.params import SamplingParams, sample_token, stack
from rlpr_jax.training import supervised
from rlpr_jax.training.reward import gather_evidence
from rlpr_jax.training.run import check_vocabulary, set_up
from rlpr_jax.types import Prompt, Rollouts

# Name: rows of the embedding, eos_token_id of generation_config.json, the token that ends a turn, all that end one.
MODELS = {
  "qwen2_5": (151936, [151645, 151643], "<|im_end|>", (151643, 151645)),
  "gemma3": (262144, [1, 106], "<end_of_turn>", (1, 106)),
  "llama3_2": (128256, [128001, 128008, 128009], "<|eot_id|>", (128001, 128008, 128009)),
  "smollm2": (49152, 2, "<|im_end|>", (2,)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, published, tmp_path_factory):
  """Name and directory of each model."""
  name = request.param
  tokenizer = published(name)
  vocab_size, eos_ids, *_ = MODELS[name]
  directory = tmp_path_factory.mktemp("published") / name
  config = models.ModelConfig(vocab_size, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
  generation = {"eos_token_id": eos_ids, "top_k": 20}
  huggingface.save_pretrained(directory, config, models.init_params(config, 0), tokenizer, generation=generation)
  return name, directory


def run_config(directory, tmp_path):
  c = configs.default()
  c.model.path = str(directory)
  rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
  c.data.path = str(tmp_path / "rows.jsonl")
  (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  c.warm_start.path = str(tmp_path / "demonstrations.jsonl")
  (tmp_path / "demonstrations.jsonl").write_text(json.dumps({"question": "1 + 1?", "response": "<answer> 2 </answer>"}))
  c.data.prompt_limit, c.rollout.max_response_length = 256, 32
  c.data.max_reference_length = 24
  c.evaluation.prompts = 0
  return c


def test_one_place_says_how_a_response_ends(model, tmp_path):
  name, directory = model
  *_, end, eos_ids = MODELS[name]
  run = set_up(run_config(directory, tmp_path))
  tokenizer = run.engine.tokenizer
  assert run.engine.device.settings.eos_ids == eos_ids
  assert tokenizer.decode([run.engine.eos_id]) == end
  (row,), _ = supervised.load(run.config, tokenizer, run.engine.eos_id)
  assert tokenizer.decode(row.response) == f"<answer> 2 </answer>{end}"
  ids = tokenizer.encode("<think>a</think><answer>9</answer>", add_special_tokens=False)
  (spliced,) = run.engine._splices(run.prompts[0], ids)
  assert tokenizer.decode(spliced.suffix_ids).endswith(f" 0 </answer>{end}")
  assert splicing.baseline_suffix(tokenizer, "4", eos_id=run.engine.eos_id)[0][-1] == run.engine.eos_id
  assert trained.load(trained.find(str(directory)), "float32").turn_end.eos_ids == eos_ids


def test_an_exported_model_stops_where_the_published_one_does(model, tmp_path):
  name, directory = model
  c = run_config(directory, tmp_path)
  c.compilation_cache = ""
  c.lora.rank = 0
  policy = load_policy(c)
  generation = huggingface.with_eos(huggingface.load_generation(directory), policy.turn_end.eos_ids)
  params = models.init_params(policy.config, 1)
  huggingface.save_pretrained(tmp_path / "out", policy.config, params, policy.tokenizer, generation=generation)
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  found = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
  assert tuple(found) == MODELS[name][3]
  assert theirs.top_k == 20  # whatever else stood there stays


def test_rows_of_the_embedding_that_are_no_tokens_are_never_sampled(model, tmp_path):
  name, directory = model
  policy = load_policy(run_config(directory, tmp_path))
  known = max(policy.tokenizer.get_vocab().values()) + 1
  vocab_size = MODELS[name][0]
  assert policy.config.known_tokens == (known if known < vocab_size else None)


def test_unknown_rows_have_no_probability_in_sampler_and_trainer():
  config = models.ModelConfig(16, 8, 8, 1, 1, 1, 8, known_tokens=11, final_softcap=30.0)
  decoder = nnx.merge(models.definition(config), models.init_params(config, 0))
  hidden = jax.random.normal(jax.random.key(0), (1, 400, 8))
  logits = decoder.logits(hidden)[0]
  free = nnx.merge(models.definition(models.ModelConfig(16, 8, 8, 1, 1, 1, 8, final_softcap=30.0)), nnx.state(decoder))
  wide = np.asarray(free.logits(hidden)[0], np.float64)[:, :11] / 0.7
  expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
  keys = jax.random.split(jax.random.key(1), 400)
  tokens, logps = sample_token(logits, keys, jax.tree.map(jnp.asarray, stack([SamplingParams(0.7)] * 400)))
  assert tokens.max() < 11
  assert {int(token) for token in tokens} == set(range(11))
  np.testing.assert_allclose(logps, expected[np.arange(400), tokens], atol=1e-5)
  again, entropy = decoder.logprobs(hidden, tokens[None], 0.7)
  np.testing.assert_allclose(again[0], logps, atol=1e-5)
  np.testing.assert_allclose(entropy[0], -(np.exp(expected) * expected).sum(axis=1), atol=1e-5)
  gradient = jax.grad(lambda hidden: decoder.logprobs(hidden, tokens[None], 0.7)[0].sum())(hidden)
  assert np.isfinite(gradient).all()


def test_a_token_that_the_model_lacks_is_refused_where_it_is_used():
  check_vocabulary("config.data", [Prompt(ids=np.array([0, 7]))], vocab_size=8)
  with pytest.raises(InputError, match=r"config\.data: prompt 2 holds token 9, expected tokens of the model, under 8"):
    check_vocabulary("config.data", [Prompt(ids=np.array([0, 9]), row=2)], vocab_size=8)


def test_a_turn_that_ends_in_no_token_of_the_model_is_refused(published, tmp_path):
  tokenizer = published("smollm2")
  config = models.ModelConfig(2, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
  huggingface.save_pretrained(tmp_path / "small", config, models.init_params(config, 0), tokenizer)
  c = configs.default()
  c.model.path = str(tmp_path / "small")
  with pytest.raises(InputError, match=r"a response ends in token 2 \('<\|im_end\|>'\), expected one of the model's 2"):
    load_policy(c)


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "2"}', '{"eos_token_id": [1, -1]}'])
def test_a_generation_config_that_is_none_is_one_line(tmp_path, text):
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(InputError, match=r"generation_config\.json"):
    huggingface.load_generation(tmp_path)


THINKING = (
  "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)


def test_a_template_that_opens_the_thought(published, tmp_path):
  """As R1's and QwQ's: a response has no <think> of its own, and is well-formed."""
  config = models.ModelConfig(49152, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
  huggingface.save_pretrained(tmp_path / "model", config, models.init_params(config, 0), published("smollm2"))
  c = run_config(tmp_path / "model", tmp_path)
  c.data.chat_template = str(tmp_path / "thinking.jinja")
  (tmp_path / "thinking.jinja").write_text(THINKING)
  demonstration = {"question": "1 + 1?", "response": "<think>\none more </think> <answer> 2 </answer>"}
  (tmp_path / "demonstrations.jsonl").write_text(json.dumps(demonstration))
  run = set_up(c)
  tokenizer = run.engine.tokenizer
  prompt = run.prompts[1]
  assert prompt.opening == "<think>"
  response = "easy </think> <answer> 2 </answer>"
  assert run.engine._splices(prompt, tokenizer.encode(response))
  rollouts = Rollouts(
    **dict.fromkeys(Rollouts._fields)
    | {
      "texts": [response] * run.config.samples_per_prompt,
      "scorable": np.ones(run.config.samples_per_prompt, bool),
      "reference_logps": np.zeros((run.config.samples_per_prompt, 3), np.float32),
      "reference_mask": np.ones((run.config.samples_per_prompt, 3), bool),
    }
  )
  evidence = gather_evidence(run.config, [(0, prompt)], rollouts, np.zeros((1, 3), np.float32))
  assert (evidence.formats == 1).all()
  (row,), _ = supervised.load(c, tokenizer)
  assert tokenizer.decode(row.prompt + row.response).endswith(
    "assistant:<think>\none more </think> <answer> 2 </answer><|im_end|>"
  )


def test_a_base_model_has_a_plain_template(across_words, tmp_path):
  config = models.ModelConfig(len(across_words), 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
  huggingface.save_pretrained(tmp_path / "base", config, models.init_params(config, 0), across_words)
  c = run_config(tmp_path / "base", tmp_path)
  c.data.prompt_limit = 1000
  with pytest.raises(InputError, match="expected a chat template, found none"):
    set_up(c)
  c.data.chat_template = "plain"
  run = set_up(c)
  assert run.engine.tokenizer.decode(run.prompts[1].ids).endswith("User: What is 1 + 1?\n\nAssistant:")
  c.data.chat_template_kwargs = "[]"
  with pytest.raises(InputError, match=r"config\.data\.chat_template_kwargs: '\[\]', expected a JSON object"):
    set_up(c)


def test_a_system_message_of_the_templates_own_is_said(published, tmp_path, capsys):
  config = models.ModelConfig(151936, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
  huggingface.save_pretrained(tmp_path / "model", config, models.init_params(config, 0), published("qwen2_5"))
  c = run_config(tmp_path / "model", tmp_path)
  set_up(c)
  assert "a system message of its own" not in capsys.readouterr().out
  c.data.instruction = ""
  set_up(c)
  assert "a system message of its own: <|im_start|>system You are Qwen" in capsys.readouterr().out
