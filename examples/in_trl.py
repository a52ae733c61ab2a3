"""RLPR's reward in TRL's GRPOTrainer: no verifier, the trained model's own probability of the reference answer.

    pip install trl accelerate
    python examples/in_trl.py --model=Qwen/Qwen2.5-0.5B-Instruct --questions=questions.jsonl --out=DIR

TRL samples, compares the responses of a group and takes the steps; it asks the function below what each response is
worth. That splices the reference into the response by rlpr_jax, reads it once more with the model as it is now, and
makes the reward by the same formulas as our own trainer. A second pass over each response is what that costs here: our
own rollouts score the reference from the cache that they left behind.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from rlpr_jax import rewards, splicing
from rlpr_jax.data.templates import INSTRUCTIONS


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch: int = 8) -> list[np.ndarray]:
  """Of each token of each row after the tokens before it; the first has 0."""
  found = []
  for first in range(0, len(rows), batch):
    part = [torch.tensor(row) for row in rows[first : first + batch]]
    tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(model.device)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    logps = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()
    found += [np.concatenate([[0.0], line[: len(row) - 1]]) for line, row in zip(logps, part, strict=True)]
  return found


def reference_reward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
  """A reward function as TRL takes them; the data set has a column `answer`."""
  splicing.check_tokenizer(tokenizer)
  baselines: dict[tuple[str, str], float] = {}  # r' of the model as it was when a question first came

  def probabilities(rows: Sequence[tuple[list[int], list[int], list[bool]]]) -> np.ndarray:
    """Of each: tokens of the text so far, those of a suffix, and which of these are the reference's."""
    if not rows:
      return np.zeros(0)
    longest = max(len(suffix) for _, suffix, _ in rows)
    logps, mask = np.zeros((len(rows), longest)), np.zeros((len(rows), longest), bool)
    scored = log_probabilities(model, [before + suffix for before, suffix, _ in rows])
    for row, ((before, suffix, is_reference), line) in enumerate(zip(rows, scored, strict=True)):
      logps[row, : len(suffix)], mask[row, : len(suffix)] = line[len(before) :], is_reference
    return np.asarray(rewards.reference_probability(logps, mask))

  def reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: object
  ) -> list[float]:
    encoded = {prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts}
    new = [pair for pair in dict.fromkeys(zip(prompts, answer, strict=True)) if pair not in baselines]
    alone = [(encoded[text], *splicing.baseline_suffix(tokenizer, reference)) for text, reference in new]
    baselines.update(zip(new, map(float, probabilities(alone)), strict=True))
    splices = [
      splicing.splice(tokenizer, encoded[text], ids, reference)
      for text, ids, reference in zip(prompts, completion_ids, answer, strict=True)
    ]
    spliced = [
      (encoded[text] + list(ids[: splice.prefix_length]), splice.suffix_ids, splice.answer_mask)
      for text, ids, splice in zip(prompts, completion_ids, splices, strict=True)
      if splice
    ]
    found = np.zeros(len(prompts))  # what cannot be scored has 0
    found[[splice is not None for splice in splices]] = probabilities(spliced)
    gained = rewards.debias(found, np.array([baselines[pair] for pair in zip(prompts, answer, strict=True)]))
    return rewards.combine(gained, np.array([rewards.format_score(text) for text in completions])).tolist()

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
    reward_funcs=reference_reward(model, tokenizer),
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
