"""config.json of the models of configs/own_machine.py: published ones, or what is known of their sizes."""

from tests.huggingface.published import OFFICIAL
from tests.planning.qwen import QWEN


def _qwen(embed: int, mlp: int, layers: int, heads: int) -> dict:
  return QWEN | {
    "vocab_size": 151936, "hidden_size": embed, "intermediate_size": mlp, "num_hidden_layers": layers,
    "num_attention_heads": heads, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
  }  # fmt: skip


_GEMMA_270M = {
  "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
  "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
SIZES = {
  "qwen2.5-0.5b": _qwen(896, 4864, 24, 14),
  "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12),
  "qwen2.5-3b": _qwen(2048, 11008, 36, 16),
  "qwen2.5-7b": QWEN,
  "llama-3.1-8b": OFFICIAL["Llama-3.1-8B"],
  "gemma-2-2b": OFFICIAL["gemma-2-2b-it"],
  "gemma-3-1b": OFFICIAL["gemma-3-1b-it"],
  "gemma-3-270m": {
    key: value for key, value in (OFFICIAL["gemma-3-1b-it"] | _GEMMA_270M).items() if key != "layer_types"
  },
}
