"""Compares the decoder with transformers, family by family, and prints the table of docs/models.md.

  PYTHONPATH=. python tools/model_agreement.py

Random small models (tests/models/cases.py) in float32 on the CPU, and SmolLM2's real weights where tools/smollm2.py has
put them. Needs torch.
"""

import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.gpu import shapes
from rlpr_jax import huggingface, models
from rlpr_jax.errors import exit_with_one_line
from rlpr_jax.training.optimizer import clipped_optimizer
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, optimizer_step
from rlpr_jax.types import PackedRows
from tests.models import cases

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "smollm2-135m-instruct"
LOWER = flags.DEFINE_integer("lower", 3, "How often the update of Qwen2.5-7B is lowered and timed; 0 for not.")

# Published models whose config.json is read in tests/huggingface/test_config_json.py, and the cases of the family.
FAMILIES = {
  "Llama": ("Llama-3.1-8B, Llama-3.2-1B, SmolLM2-135M", [name for name in cases.CASES if name.startswith("llama")]),
  "Mistral": ("Mistral-7B-v0.1, Mistral-Small-24B", ["mistral", "mistral_unlimited"]),
  "Qwen2": ("Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B", ["qwen2", "qwen2_tied"]),
  "Qwen3": ("Qwen3-8B, DeepSeek-R1-0528-Qwen3-8B", ["qwen3", "qwen3_biases", "qwen3_yarn"]),
  "Gemma 2": ("gemma-2-2b-it, gemma-2-9b-it, gemma-2-27b", ["gemma2"]),
  "Gemma 3": ("gemma-3-1b-it, gemma-3-4b-it, gemma-3-12b-it, gemma-3-27b-it", ["gemma3"]),
  "SmolLM3": ("SmolLM3-3B", ["smollm3", "smollm3_windows"]),
  "OLMo 2": ("OLMo-2-1124-7B", ["olmo2", "olmo2_biases"]),
  "Phi-4": ("phi-4", ["phi3", "phi3_partial"]),
}
# (whole rows, through the cache, gradients)
Differences = tuple[float, float, float | None]


def compare(name: str) -> Differences:
  """Largest differences of one random model: of logits, and of gradients as a part of each parameter's largest."""
  tokens = cases.random_tokens(2, cases.LENGTH)
  theirs, (config, params) = cases.torch_model(name), cases.loaded(name)
  model = models.definition(config)
  expected = cases.torch_logits(theirs, tokens)
  whole = cases.whole_logits(model, params, tokens)
  cached = cases.chunked_logits(model, params, tokens, np.array([5, 11]), (1, 11))
  gradients = cases.differences(cases.gradients(model, params, tokens), cases.torch_gradients(theirs, tokens))
  return float(np.max(np.abs(whole - expected))), float(np.max(np.abs(cached - expected))), max(gradients.values())


def compare_smollm2() -> Differences:
  """The same of the real weights, on English text; no gradients."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
  tokens = np.array([tokenizer((ROOT / "LICENSE").read_text())["input_ids"][:384]], np.int32)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
  config, params = huggingface.load_pretrained(str(SMOLLM2))
  model = models.definition(config)
  expected = cases.torch_logits(theirs, tokens)
  whole = cases.whole_logits(model, params, tokens)
  cached = cases.chunked_logits(model, params, tokens, np.array([200]), (1, 50))
  return float(np.max(np.abs(whole - expected))), float(np.max(np.abs(cached - expected))), None


def row(family: str, sizes: str, weights: str, differences: list[Differences]) -> str:
  worst = [max(column) if None not in column else None for column in zip(*differences, strict=True)]
  cells = (family, sizes, weights, *("-" if x is None else f"{x:.1e}" for x in worst))
  return f"| {' | '.join(cells)} |"


def lower_seconds(times: int) -> list[float]:
  """Seconds to trace and lower the update of Qwen2.5-7B, 8 rows of 1024 tokens, each time from the beginning."""
  config, optimizer = shapes.QWEN2_5_7B, clipped_optimizer("adamw", 1e-6, weight_decay=0.01, max_grad_norm=1.0)
  params = models.abstract_params(config)
  state = jax.eval_shape(optimizer.init, params)
  dtypes = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32, jnp.float32, jnp.float32)
  rows = PackedRows(*(jax.ShapeDtypeStruct((8, 1024), dtype) for dtype in dtypes))
  settings = UpdateSettings(1.0, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.0, micro_batch_rows=8)
  seconds = []
  for _ in range(times):
    jax.clear_caches()
    start = time.perf_counter()
    model = models.definition(config, models.Runtime(compute_dtype="bfloat16"))
    program = UpdateProgram(model, optimizer, settings)
    optimizer_step.lower(program, {}, Trainable(params, state), rows).as_text()
    seconds.append(time.perf_counter() - start)
  return seconds


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  transformers.utils.logging.disable_progress_bar()
  print("| family | config.json read | checked with | logits, whole rows | logits, prefill and extend | gradients |")
  print("|---|---|---|---|---|---|")
  for family, (sizes, names) in FAMILIES.items():
    weights = f"{len(names)} small random model{'s' if len(names) > 1 else ''}"
    print(row(family, sizes, weights, [compare(name) for name in names]), flush=True)
  if (SMOLLM2 / "model.safetensors").exists():
    print(row("Llama", "SmolLM2-135M-Instruct", "its real weights, 384 tokens of English", [compare_smollm2()]))
  if LOWER.value:
    seconds = lower_seconds(LOWER.value)
    each = ", ".join(f"{x:.1f}" for x in seconds)
    print(f"\nUpdate of Qwen2.5-7B, traced and lowered: {statistics.median(seconds):.1f} s, median of {each}")
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
  with exit_with_one_line():
    app.run(main)
