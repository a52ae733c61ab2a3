"""RLPR's reward in TRL's GRPOTrainer: no verifier, the trained model's own probability of the reference answer.

    pip install trl accelerate
    python examples/in_trl.py --model=Qwen/Qwen2.5-0.5B-Instruct --questions=questions.jsonl --out=DIR

TRL samples, compares the responses of a group and takes the steps; it asks the function below what each response is
worth. That has rlpr_jax splice the reference into the response, reads it once more with the model as it is now, and
makes the reward by the same formulas as our own trainer. A second pass over each response is what that costs here: our
own rollouts score the reference from the cache that they left behind.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from rlpr_jax.data.templates import INSTRUCTIONS
from rlpr_jax.reference_reward import ReferenceReward


@torch.no_grad()
def log_probabilities(
  model: PreTrainedModel, texts: Sequence[list[int]], suffixes: Sequence[list[int]], batch: int = 8
) -> list[np.ndarray]:
  """Of each suffix's tokens, given the text before it and those before them."""
  found = []
  rows = [text + suffix for text, suffix in zip(texts, suffixes, strict=True)]
  for first in range(0, len(rows), batch):
    part = [torch.tensor(row) for row in rows[first : first + batch]]
    tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(model.device)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    logps = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()
    lengths = zip(texts[first : first + batch], suffixes[first : first + batch], strict=True)
    found += [line[len(text) - 1 :][: len(suffix)] for line, (text, suffix) in zip(logps, lengths, strict=True)]
  return found


def reward_function(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
  """A reward function as TRL takes them; the data set has a column `answer`."""
  reference_reward = ReferenceReward(tokenizer, functools.partial(log_probabilities, model))

  def reward(prompts: list[str], completion_ids: list[list[int]], answer: list[str], **_: object) -> list[float]:
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts}
    return reference_reward([ids[text] for text in prompts], completion_ids, answer).tolist()

  return reward


def main(argv: Sequence[str] | None = None) -> GRPOTrainer:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True, help="a Hugging Face directory or name")
  parser.add_argument("--questions", required=True, type=pathlib.Path, help="rows of question and answer, JSONL")
  parser.add_argument("--out", required=True, help="directory of TRL's trainer")
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
  parser.add_argument("--length", type=int, default=512, help="most tokens of a response")
  given = parser.parse_args(argv)

  tokenizer = AutoTokenizer.from_pretrained(given.model)
  model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
  rows = []
  for line in given.questions.read_text().splitlines():
    row = json.loads(line)
    messages = [
      {"role": "system", "content": INSTRUCTIONS["think"]},
      {"role": "user", "content": row["question"]},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows.append({"prompt": prompt, "answer": row["answer"]})
  trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=reward_function(model, tokenizer),
    args=GRPOConfig(
      output_dir=given.out,
      per_device_train_batch_size=given.samples,
      num_generations=given.samples,
      max_completion_length=given.length,
      max_steps=given.steps,
      beta=0.0,
      temperature=1.0,
      learning_rate=1e-6,
      bf16=torch.cuda.is_available(),
      use_cpu=not torch.cuda.is_available(),
      logging_steps=1,
      save_strategy="no",
      report_to=[],
    ),
    train_dataset=Dataset.from_list(rows),
  )
  trainer.train()
  return trainer


if __name__ == "__main__":
  main()
