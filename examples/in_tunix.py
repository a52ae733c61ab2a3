"""RLPR's reward in tunix's GRPOLearner: no verifier, the trained model's own probability of the reference answer.

    pip install google-tunix
    python examples/in_tunix.py --model=DIR --questions=questions.jsonl

DIR is a Llama, Qwen2.5 or Qwen3 of Hugging Face with its tokenizer. tunix samples, compares the responses of a group
and takes the steps; it asks the function below what each response is worth. That has rlpr_jax splice the reference into
the response, and reads both once more with the model as it is now.
"""

import argparse
import importlib
import json
import pathlib
from collections.abc import Callable, Sequence

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from rlpr_jax.data.templates import INSTRUCTIONS
from rlpr_jax.reference_reward import ReferenceReward

FAMILIES = {"llama": "llama3", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type of config.json -> tunix's name


def load(directory: str, mesh: jax.sharding.Mesh) -> nnx.Module:
  """The model of a directory, in float32."""
  config = AutoConfig.from_pretrained(directory)
  if config.model_type not in FAMILIES:
    raise SystemExit(f"--model: {directory} has a {config.model_type}, expected one of {', '.join(FAMILIES)}")
  family, theta = FAMILIES[config.model_type], int(config.rope_parameters["rope_theta"])
  if family == "qwen3" and theta != 1_000_000:
    raise SystemExit(f"--model: {directory} has rope_theta {theta}, expected 1000000, which tunix takes for any Qwen3")
  model, params = (importlib.import_module(f"tunix.models.{family}.{part}") for part in ("model", "params"))
  theirs = model.ModelConfig(
    num_layers=config.num_hidden_layers,
    vocab_size=config.vocab_size,
    embed_dim=config.hidden_size,
    hidden_dim=config.intermediate_size,
    num_heads=config.num_attention_heads,
    head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    num_kv_heads=config.num_key_value_heads,
    rope_theta=theta,
    norm_eps=config.rms_norm_eps,
    **{"weight_tying" if family == "llama3" else "use_tied_embedding": config.tie_word_embeddings},
  )
  return params.create_model_from_safe_tensors(directory, theirs, mesh, jnp.float32)


def log_probabilities(
  cluster: rl_cluster.RLCluster, texts: Sequence[list[int]], suffixes: Sequence[list[int]]
) -> list[np.ndarray]:
  """Of each suffix's tokens, given the text before it and those before them; lengths are multiples of 64."""
  pad = cluster.rollout.pad_id()
  before, after = (-(-max(map(len, rows)) // 64) * 64 for rows in (texts, suffixes))
  prompts = np.array([[pad] * (before - len(text)) + text for text in texts])
  completions = np.array([suffix + [pad] * (after - len(suffix)) for suffix in suffixes])
  logps = np.asarray(cluster.get_old_per_token_logps(jnp.asarray(prompts), jnp.asarray(completions)))
  return [line[: len(suffix)] for line, suffix in zip(logps, suffixes, strict=True)]


def reward_function(cluster: rl_cluster.RLCluster, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
  """A reward function as tunix takes them; the data set has a column `answer`."""
  reference_reward = ReferenceReward(tokenizer, lambda *rows: log_probabilities(cluster, *rows))

  def reward(prompts: list[str], completions: list[str], answer: Sequence[str], **_: object) -> list[float]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    return reference_reward(ids, responses, list(map(str, answer))).tolist()

  return reward


def main(argv: Sequence[str] | None = None) -> GRPOLearner:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True, help="a directory of Hugging Face")
  parser.add_argument("--questions", required=True, type=pathlib.Path, help="rows of question and answer, JSONL")
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--prompts", type=int, default=4, help="of a step")
  parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
  parser.add_argument("--prompt_length", type=int, default=256, help="most tokens of a prompt")
  parser.add_argument("--length", type=int, default=512, help="most tokens of a response")
  given = parser.parse_args(argv)

  tokenizer = AutoTokenizer.from_pretrained(given.model)
  mesh = jax.make_mesh((jax.device_count(), 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rows = []
  for line in given.questions.read_text().splitlines():
    row = json.loads(line)
    messages = [
      {"role": "system", "content": INSTRUCTIONS["think"]},
      {"role": "user", "content": row["question"]},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows.append({"prompts": prompt, "answer": row["answer"]})
  model = load(given.model, mesh)
  cluster = rl_cluster.RLCluster(
    actor=model,
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh={role: mesh for role in rl_cluster.Role},
      rollout_engine="vanilla",
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10**9, max_steps=given.steps
      ),
      rollout_config=RolloutConfig(
        max_tokens_to_generate=given.length,
        max_prompt_length=given.prompt_length,
        kv_cache_size=given.prompt_length + given.length,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
      ),
    ),
  )
  learner = GRPOLearner(
    rl_cluster=cluster,
    algo_config=GRPOConfig(num_generations=given.samples, num_iterations=1, beta=0.0),
    reward_fns=reward_function(cluster, tokenizer),
  )
  learner.train(grain.MapDataset.source(rows).repeat().batch(given.prompts))
  return learner


if __name__ == "__main__":
  main()
