"""Logits beside those of transformers in torch on the same device: small random models of each family.

The truth is torch in float32, without TF32. Ours are read from what transformers saved. A distance is the largest
difference over the largest logit.
"""

import copy

import jax
import numpy as np
import torch
import transformers

from benchmarks.gpu.report import Report
from rlpr_jax import models
from rlpr_jax.models import Runtime
from tests.models import cases

_SIZES = {
  "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
  "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
_GEMMA = _SIZES | {
  "head_dim": 128, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 128,
  "sliding_window": 64,
}  # fmt: skip
# Fields of config.json: real heads, groups and switches of each family, few and narrow layers.
FAMILIES = {
  "Llama 3": _SIZES | {
    "model_type": "llama", "rope_theta": 500_000.0,
    "rope_scaling": {
      "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 128,
    },
  },
  "Qwen2.5": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
  "Qwen3": _SIZES | {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128},
  "Gemma 2": _GEMMA | {
    "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
  },
  "Gemma 3": _GEMMA | {
    "model_type": "gemma3_text", "num_hidden_layers": 7, "num_key_value_heads": 1,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  },
}  # fmt: skip
ROWS, LENGTH = 2, 256
BOUND = 1e-4  # in float32 at the highest precision
# In bfloat16 we may be twice as far from the truth as torch in bfloat16 is, or this far.
LEAST_BOUND = 1e-2


def run(report: Report) -> None:
  torch.set_float32_matmul_precision("highest")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  length = 96 if report.rehearse else LENGTH
  for name, fields in FAMILIES.items():
    report.say(name)
    tokens = np.random.default_rng(0).integers(0, fields["vocab_size"], (ROWS, length)).astype(np.int32)
    theirs = cases.randomise(transformers.AutoConfig.for_model(**fields))
    config, params = cases.load(theirs)
    theirs = theirs.to(device)
    truth = _torch_logits(theirs, tokens, device)
    of_torch = distance(_torch_logits(copy.deepcopy(theirs).to(torch.bfloat16), tokens, device), truth)
    for dtype, precision, attention, bound in (
      ("float32", "highest", "xla", BOUND),
      ("bfloat16", None, "auto", max(2 * of_torch, LEAST_BOUND)),
    ):
      model = models.definition(config, Runtime(dtype, attention))
      with jax.default_matmul_precision(precision):
        whole = distance(cases.whole_logits(model, params, tokens), truth)
        # A prefill of unlike lengths, then pieces that follow it in the cache.
        starts = np.array([length // 2, length // 2 + 13])
        extended = distance(cases.chunked_logits(model, params, tokens, starts, (31,)), truth)
      report.row(
        "parity",
        {
          "family": name,
          "dtype": dtype,
          "precision": precision or "default",
          "attention": attention,
          "whole rows": whole,
          "prefill and extend": extended,
          "torch in this dtype": of_torch if dtype == "bfloat16" else None,
          "bound": bound,
        },
        ok=max(whole, extended) <= bound,
      )
  report.note(
    f"torch {torch.__version__} on {device}, transformers {transformers.__version__}, {ROWS} rows of {length} tokens;"
    " torch has a share of the card's memory, so XLA_PYTHON_CLIENT_PREALLOCATE is false in this part"
  )


def distance(found: np.ndarray, truth: np.ndarray) -> float:
  return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))


def _torch_logits(model, tokens: np.ndarray, device: str) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(tokens, device=device).long()).logits.float().cpu().numpy()
