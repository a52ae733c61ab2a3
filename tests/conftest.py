"""Fixtures that several test files share."""

import functools
import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import NamedTuple

# Where the tests run under nohup, the programs that they start would ignore it too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's jobs in the background ignore

# Compiling is most of the tests' time: XLA's own passes as ever, LLVM's left out. Subprocesses inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

# And what one process of the tests has compiled, the others, and the programs that tests start, take from disk.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _programs = tempfile.TemporaryDirectory()
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": _programs.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jaxtyping

import tests.typecheck

# Before anything of them is imported: what their annotations say of shapes and dtypes is checked at every call.
CHECKED = (
  "rewards", "filtering", "grpo", "splicing", "types", "policy", "sharding",
  "training", "sampling", "models", "huggingface",
)  # fmt: skip
jaxtyping.install_import_hook([f"rlpr_jax.{name}" for name in CHECKED], f"{tests.typecheck.__name__}.checked")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlpr_jax.data import builtin
from rlpr_jax.models import ModelConfig, Params, abstract_params, definition
from tests.tiny_run import RECIPE

# Files of few and long tests begin first, or a worker is left alone with them at the end.
LONG = (
  "test_train.py", "test_sharding.py", "test_engine.py", "test_update.py", "test_export.py", "test_sweep.py",
  "test_evaluate.py", "test_server.py",
)  # fmt: skip

# Of the files here only test_*.py are read for tests and examples.
collect_ignore = [path for path in Path(__file__).parent.rglob("*.py") if not path.name.startswith("test_")]


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
  """A file of the recipe of a run of seconds."""
  path = tmp_path_factory.mktemp("recipe") / "tiny.py"
  path.write_text(RECIPE)
  return path


# A compiled program takes some mappings of memory. Beyond vm.max_map_count, 65,530 as a rule, XLA aborts.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
  """Compiled programs go before a process holds too many; until then the next file finds them."""
  yield
  if not MAPPINGS.exists() or len(MAPPINGS.read_text().splitlines()) > MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


CACHE = Path(__file__).parents[1] / ".cache"
# Published tokenizers, where tools/fetch_tokenizers.py and tools/smollm2.py put them.
PUBLISHED = {
  **{name: CACHE / "tokenizers" / name for name in ("qwen2_5", "qwen3", "gemma2", "gemma3", "llama3_2")},
  "smollm2": CACHE / "smollm2-135m-instruct",
}


def find_published(name: str) -> Path:
  if not (PUBLISHED[name] / "tokenizer.json").exists():
    pytest.skip(f"no tokenizer {name} under .cache: run tools/fetch_tokenizers.py or tools/smollm2.py")
  return PUBLISHED[name]


@functools.cache
def load_published(name: str) -> PreTrainedTokenizerBase:
  return AutoTokenizer.from_pretrained(find_published(name))


@functools.cache
def train_byte_level(across_words: bool) -> PreTrainedTokenizerFast:
  """A byte-level BPE that always can be had; its offsets leave out whitespace (`trim_offsets`).

  Args:
    across_words: lets tokens reach over words and tags: "> 4" or "2 </answer>" may be one token. Without it, text is
      brought to NFC first, as Qwen's tokenizer does.
  """
  texts = [f"<think> {a} * {b} </think> <answer> {a * b} </answer>" for a in range(30) for b in range(30)]
  texts += ["<answer>中文  is the answer</answer>", "<think>é</think>\n<answer>\n$x^2$\n</answer>"] * 50
  inner = Tokenizer(models.BPE())
  if not across_words:
    inner.normalizer = normalizers.NFC()
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
  inner.decoder = decoders.ByteLevel()
  inner.post_processor = processors.ByteLevel(trim_offsets=True)
  trainer = trainers.BpeTrainer(
    vocab_size=700,
    special_tokens=["<|pad|>", "<|end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(texts, trainer)
  return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")


@pytest.fixture(scope="session", params=["words", "across_words", *PUBLISHED])
def tokenizer(request) -> PreTrainedTokenizerBase:
  """Each tokenizer in turn; a published one that is not there is skipped."""
  if request.param in PUBLISHED:
    return load_published(request.param)
  return train_byte_level(request.param == "across_words")


@pytest.fixture(scope="session")
def across_words() -> PreTrainedTokenizerFast:
  return train_byte_level(True)


@pytest.fixture(scope="session")
def published():
  """Loads a published tokenizer by name, or skips the test."""
  return load_published


@pytest.fixture(scope="session")
def published_files():
  """Finds the directory of a published tokenizer by name, or skips the test."""
  return find_published


class Policy(NamedTuple):
  """A random policy over the built-in vocabulary of 64, small enough to compile in a second."""

  config: ModelConfig
  model: nnx.GraphDef
  params: Params
  tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def policy() -> Policy:
  """Grouped queries, norms of queries and keys, none of them all one. Calls that donate must copy the parameters."""
  tokenizer = builtin.tokenizer()
  config = ModelConfig(
    vocab_size=len(tokenizer),
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
  )
  rng = np.random.default_rng(0)

  def make(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(1 + 0.1 * noise if path[-1].key == "scale" else 0.18 * noise)

  return Policy(config, definition(config), jax.tree.map_with_path(make, abstract_params(config)), tokenizer)
