"""Tokenizer, chat template, config.json and generation_config.json of one model together, as their makers publish them.

The weights are random and small; vocabulary, special tokens, rope, windows and the rest are as published.
"""

import copy
import json
import pathlib
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from rlpr_jax import config as configs
from rlpr_jax import huggingface, models, splicing
from rlpr_jax.errors import InputError
from rlpr_jax.huggingface.families import from_huggingface
from rlpr_jax.policy import load_policy
from rlpr_jax.runs import trained
from rlpr_jax.sampling.params import SamplingParams, sample_token, stack
from rlpr_jax.training import supervised
from rlpr_jax.training.reward import gather_evidence
from rlpr_jax.training.run import check_vocabulary, set_up
from rlpr_jax.types import Prompt, Rollouts
from tests.huggingface.published import GEMMA2_TEMPLATE, MULTIMODAL, OFFICIAL
from tests.models import cases


class Published(NamedTuple):
  """A model whose tokenizer can be had."""

  tokenizer: str
  eos: int | list[int]  # eos_token_id of generation_config.json
  end: str  # the token that ends a turn
  eos_ids: tuple[int, ...]  # all that end one
  bos: str | None = None  # what the tokenizer calls bos_token_id of config.json, None where it has no such token
  unused: int = 0  # rows of the embedding that are no tokens


MODELS = {
  "Llama-3.1-8B": Published(
    "llama3_2", [128001, 128008, 128009], "<|eot_id|>", (128001, 128008, 128009), "<|begin_of_text|>"
  ),
  "Llama-3.2-1B": Published(
    "llama3_2", [128001, 128008, 128009], "<|eot_id|>", (128001, 128008, 128009), "<|begin_of_text|>"
  ),
  "SmolLM2-135M": Published("smollm2", 2, "<|im_end|>", (2,), "<|im_start|>"),
  "Qwen2.5-7B": Published("qwen2_5", [151645, 151643], "<|im_end|>", (151643, 151645), unused=399),
  "Qwen3-8B": Published("qwen3", [151645, 151643], "<|im_end|>", (151643, 151645), unused=267),
  "gemma-2-2b-it": Published("gemma2", [1, 107], "<end_of_turn>", (1, 107), "<bos>"),
  "gemma-3-1b-it": Published("gemma3", [1, 106], "<end_of_turn>", (1, 106), "<bos>"),
  "gemma-3-4b-it": Published("gemma3", [1, 106], "<end_of_turn>", (1, 106), unused=63),
}
ALL = OFFICIAL | {"gemma-3-4b-it": MULTIMODAL["gemma-3-4b-it"]}
CHAT_EOS = {"SmolLM2-135M": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}}  # of SmolLM2-135M-Instruct


def small(name: str):
  """The published config.json with smaller sizes: enough layers for every kind of them, the vocabulary as it is."""
  fields = copy.deepcopy(ALL[name]) | CHAT_EOS.get(name, {})
  text = fields.get("text_config", fields)
  layers = 6 if "gemma-3" in name else 4
  text |= {"num_hidden_layers": layers, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
  text |= {"num_key_value_heads": 1} | ({"head_dim": 8} if "head_dim" in text or "gemma" in name else {})
  for field in ("layer_types", "no_rope_layers"):
    if field in text:
      text[field] = text[field][:layers]
  return fields


def write(name: str, directory: pathlib.Path, generation=None) -> None:
  """The model's directory, with its own config.json and without a tokenizer."""
  fields = small(name)
  config = from_huggingface(fields, name)
  rng = np.random.default_rng(0)

  def noise(path, leaf):
    values = rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(1 + 0.1 * values if path[-1].key == "scale" else 0.2 * values)

  params = jax.tree.map_with_path(noise, models.abstract_params(config))
  huggingface.save_pretrained(directory, config, params, generation=generation)
  (directory / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module", params=MODELS)
def model(request, published_files, tmp_path_factory):
  """A published model, its directory, and what the program makes of that."""
  facts = MODELS[request.param]
  files = published_files(facts.tokenizer)
  directory = tmp_path_factory.mktemp("published") / request.param
  write(request.param, directory, {"eos_token_id": facts.eos, "top_k": 20})
  shutil.copy(files / "tokenizer.json", directory)
  fields = json.loads((files / "tokenizer_config.json").read_text())
  (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": GEMMA2_TEMPLATE} | fields))
  return facts, directory, set_up(run_config(directory, directory.parent))


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


def test_one_place_says_how_a_response_ends(model, monkeypatch):
  facts, directory, run = model
  tokenizer = run.engine.tokenizer
  assert run.engine.device.settings.eos_ids == facts.eos_ids
  assert tokenizer.decode([run.engine.eos_id]) == facts.end
  (row,), _ = supervised.load(run.config, tokenizer, run.engine.eos_id)
  assert tokenizer.decode(row.response) == f"<answer> 2 </answer>{facts.end}"
  ids = tokenizer.encode("<think>a</think><answer>9</answer>", add_special_tokens=False)
  (spliced,) = run.engine._splices(run.prompts[0], ids)
  assert tokenizer.decode(spliced.suffix_ids).endswith(f" 0 </answer>{facts.end}")
  assert splicing.baseline_suffix(tokenizer, "4", eos_id=run.engine.eos_id)[0][-1] == run.engine.eos_id
  monkeypatch.setattr("rlpr_jax.policy.load_tokenizer", lambda path: tokenizer)  # which takes seconds
  assert trained.load(trained.find(str(directory)), "float32").turn_end.eos_ids == facts.eos_ids


def test_special_tokens_of_config_and_tokenizer_are_the_same(model):
  """And those that end a response, by the tokenizer or by generation_config.json, are tokens of the model."""
  facts, directory, run = model
  fields, tokenizer = json.loads((directory / "config.json").read_text()), run.engine.tokenizer
  assert (
    facts.bos is None or tokenizer.convert_ids_to_tokens(fields["bos_token_id"]) == facts.bos == tokenizer.bos_token
  )
  assert max(facts.eos_ids) < run.policy.config.vocab_size
  listed = fields["eos_token_id"] if isinstance(fields["eos_token_id"], list) else [fields["eos_token_id"]]
  assert set(listed) <= set(facts.eos_ids)
  assert "pad_token_id" not in fields or fields["pad_token_id"] == tokenizer.pad_token_id
  text = tokenizer.decode(run.prompts[1].ids)
  assert "What is 1 + 1?" in text
  assert text.count(facts.bos or "no such token") == (facts.bos is not None) * (1 + 2 * (facts.bos == "<|im_start|>"))


def test_an_exported_model_stops_where_the_published_one_does(model, tmp_path):
  facts, directory, run = model
  policy = run.policy
  generation = huggingface.with_eos(huggingface.load_generation(directory), policy.turn_end.eos_ids)
  _, params = huggingface.load_pretrained(directory)
  huggingface.save_pretrained(tmp_path / "out", policy.config, params, policy.tokenizer, generation=generation)
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  found = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
  assert tuple(found) == facts.eos_ids
  assert theirs.top_k == 20  # whatever else stood there stays


def test_rows_of_the_embedding_that_are_no_tokens_are_never_sampled(model):
  facts, _, run = model
  config = run.policy.config
  assert config.known_tokens == (config.vocab_size - facts.unused if facts.unused else None)


@pytest.mark.parametrize("name", OFFICIAL)
def test_logits_are_those_of_transformers(name, tmp_path):
  """Of a directory with the published config.json; tokens from the first to the last, for want of some tokenizers."""
  torch = cases.import_torch()
  write(name, tmp_path / name)
  config, params = huggingface.load_pretrained(tmp_path / name)
  assert config.vocab_size == OFFICIAL[name]["vocab_size"]
  tokens = np.linspace(0, config.vocab_size - 1, 24).astype(np.int32)[None]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / name, dtype=torch.float32, attn_implementation="eager"
  )
  expected = cases.torch_logits(theirs.eval(), tokens)
  found = cases.whole_logits(models.definition(config), params, tokens)
  assert np.std(expected) > 0.01
  np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


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
      "lengths": np.full(run.config.samples_per_prompt, 9, np.int32),
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
