"""A made-up run for the viewer's tests: what `rlpr train` writes, by hand."""

import json
import pathlib
from typing import Any

Row = dict[str, Any]

SAMPLES = 4
QUESTIONS = (
  ("law", "What is 17 * 3?", "51", ["5", "1"]),
  ("physics", "Why does ice float on Water?", "Because it is less dense", [" Because", " it is", " less dense"]),
  ("läw", 'Wie heißt die Hauptstadt?\nUnd "warum"?', "Zürich", [" Zür", "ich"]),
)


def rollout(step: int, prompt: int, sample: int) -> Row:
  """One response; of each prompt the second is empty, and the last is cut off before it answers."""
  source, question, reference, tokens = QUESTIONS[prompt % len(QUESTIONS)]
  scorable, answer = sample != SAMPLES - 1, "" if sample == 1 else reference if sample == 0 else f"no {step}"
  r = round(0.2 + 0.6 * ((7 * step + 3 * prompt + sample) % 10) / 10, 3) if scorable else 0.0
  response = (
    f"<think> step {step} sample {sample} </think> <answer> {answer} </answer>" if scorable else "and so on " * 20
  )
  return {
    "step": step,
    "row": 100 * step + prompt,
    "source": source,
    "question": question,
    "reference": reference,
    "response": response,
    "finish": "eos" if scorable else "length",
    "length": 20 + sample,
    "scorable": scorable,
    "reference_tokens": tokens if scorable else [],
    "reference_probs": [r] * len(tokens) if scorable else [],
    "baseline_probs": [0.3] * len(tokens),
    "reward_reference": r,
    "reward_baseline": 0.3,
    "reward_total": max(r - 0.3, 0.0) if scorable else float("nan"),
    "group_std": 0.1,
    "kept": prompt % 2 == 0,
  }


def rollouts(step: int, prompts: int = len(QUESTIONS)) -> list[Row]:
  return [rollout(step, prompt, sample) for prompt in range(prompts) for sample in range(SAMPLES)]


def lines(rows: list[Row]) -> str:
  return "".join(f"{json.dumps(row)}\n" for row in rows)


def metrics(step: int) -> Row:
  values = {
    "reward/total": 0.1 * step,
    "update/loss": float("nan") if step == 2 else 0.5 / step,
    "my/number": 2.0 * step,
  }
  return {"step": step, **values}


def write(workdir: pathlib.Path, steps: int = 3, prompts: int = len(QUESTIONS)) -> pathlib.Path:
  """A run of some steps."""
  (workdir / "rollouts").mkdir(parents=True)
  (workdir / "config.json").write_text("{}")
  evaluation = {"step": 0, "held_out/accuracy": 0.25, "held_out/accuracy/law": 0.5}
  (workdir / "metrics.jsonl").write_text(lines([evaluation, *(metrics(step) for step in range(1, steps + 1))]))
  for step in range(1, steps + 1):
    (workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines(rollouts(step, prompts)))
  return workdir
