"""Configuration of a policy, and of how it is run: two dataclasses for every family and every machine."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from rlpr_jax.errors import InputError
from rlpr_jax.sharding import Sharding

TWO_CORES = ("TPU v4", "TPU v5")  # kinds of chips, as jax names them; v5 is v5p


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding: its base, and how it is stretched to contexts longer than it was trained on."""

  theta: float = 10_000.0
  kind: str = "default"  # default | linear | llama3 | yarn
  factor: float = 1.0  # of all but default: long wavelengths are stretched by it
  low_freq_factor: float = 1.0  # of llama3: wavelengths over original_length / low_freq_factor are stretched in full
  high_freq_factor: float = 4.0  # of llama3: those under original_length / high_freq_factor are not
  original_length: int = 8192  # of llama3 and yarn, tokens
  beta_fast: float = 32.0  # of yarn: pairs that turn more often than this within original_length are not stretched
  beta_slow: float = 1.0  # of yarn: those that turn less often are stretched in full
  truncate: bool = True  # of yarn: from one whole pair to another
  attention_factor: float = 1.0  # of yarn: queries and keys are multiplied by it
  fraction: float = 1.0  # of the dimensions of a head: the first ones are rotated, the others are not (Phi-3)

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians a position for each pair of dimensions that are rotated, float32[fraction * head_dim / 2]."""
    rotated = int(head_dim * self.fraction)
    # In the precision of the published code: far from the beginning the last bit of a frequency is visible.
    positions = np.float32(self.theta) ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)  # to turn by 1
    frequencies = (1.0 / positions).astype(np.float32)
    if self.kind == "linear":
      return (frequencies / self.factor).astype(np.float32)
    if self.kind == "llama3":
      turns = self.original_length / (2 * np.pi / frequencies)  # within the original length
      kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
      return ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)
    if self.kind == "yarn":
      low, high = self._ramp(rotated)
      kept = 1 - np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0, 1)
      return ((1 - kept) * (1.0 / (self.factor * positions)) + kept * frequencies).astype(np.float32)
    return frequencies

  def _ramp(self, rotated: int) -> tuple[float, float]:
    """The pairs of dimensions between which YaRN goes over to stretching (Peng et al. 2023, section 3.2)."""

    def pair(turns: float) -> float:
      """The pair that turns as often within the original length."""
      return rotated * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    low, high = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    return low, high + 0.001 if low == high else high


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters beside frozen linear layers (Hu et al. 2021): y = W x + alpha / rank * B A x."""

  rank: int
  alpha: float
  targets: tuple[str, ...]  # of weights.LINEAR


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and switches of one decoder. A family is a setting of these, not a class."""

  vocab_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope = Rope()
  local_rope: Rope | None = None  # of layers with a window, where it is another (Gemma 3)
  unrotated: tuple[bool, ...] = ()  # whether each layer goes without rotary embedding; () for no layer (SmolLM3)
  window: int | None = None  # tokens that a layer with a window sees, the newest one included
  windowed: tuple[bool, ...] = ()  # whether each layer has the window; () for no layer
  activation: str = "silu"  # silu | gelu_tanh, of the gated MLP
  norm_eps: float = 1e-6
  norm_offset: bool = False  # RMS norms multiply by 1 + scale (Gemma)
  pre_norms: bool = True  # norms before attention and MLP (all but OLMo 2)
  post_norms: bool = False  # norms after attention and MLP (Gemma, OLMo 2)
  scale_embeddings: bool = False  # by sqrt(embed_dim) (Gemma)
  query_pre_attn_scalar: float | None = None  # scores are divided by its root; None for head_dim (Gemma)
  attention_softcap: float | None = None  # scores become cap * tanh(scores / cap) (Gemma 2)
  final_softcap: float | None = None  # and so do logits
  tie_embeddings: bool = False  # the output head is the embedding
  biases: tuple[str, ...] = ()  # linear layers that have one
  qk_norm: bool = False  # RMS norm of queries and keys over the head (Qwen3, Gemma 3)
  qk_norm_whole: bool = False  # that norm is over all heads together (OLMo 2)
  fused_files: bool = False  # query, key and value are one tensor of a file, gate and up another (Phi-3)
  known_tokens: int | None = None  # ids from here on are of no token, and never sampled; None for none
  max_length: int | None = None  # tokens of context the weights were made for; None where nobody says
  lora: LoRA | None = None

  def __post_init__(self) -> None:
    if self.num_heads % self.num_kv_heads:
      raise InputError(f"{self.num_heads} query heads do not divide into {self.num_kv_heads} key/value heads")
    if self.windowed and len(self.windowed) != self.num_layers:
      raise InputError(f"{len(self.windowed)} layers are said to have a window or not, of {self.num_layers}")
    if self.qk_norm_whole and not self.qk_norm:
      raise InputError("qk_norm_whole is said of a model without qk_norm")
    if self.unrotated and len(self.unrotated) != self.num_layers:
      raise InputError(f"{len(self.unrotated)} layers are said to be rotated or not, of {self.num_layers}")


class Reader(NamedTuple):
  """A kernel that reads cached texts."""

  kernel: str  # tpu | gpu
  cores: int = 1  # of a TPU's chip, which share the rows if they divide them
  interpret: bool = False  # step by step, on any device
  required: bool = False  # that it cannot read the slots is an error; else plain XLA does


def choose_reader(choice: str, platform: str, kind: str, capability: str = "") -> Reader | None:
  """The kernel for a device, as jax names it; None for plain XLA.

  Args:
    choice: auto | ragged | xla.
    capability: of a GPU; Triton's kernels ask for 8.0 and more.

  >>> choose_reader("auto", "tpu", "TPU v4"), choose_reader("auto", "cpu", "cpu")
  (Reader(kernel='tpu', cores=2, interpret=False, required=False), None)
  >>> choose_reader("auto", "gpu", "Tesla T4", "7.5")
  """
  required = choice == "ragged"
  has_kernel = platform != "cpu" and float(capability or 8) >= 8
  if choice == "xla" or not (has_kernel or required):
    return None
  match platform:
    case "tpu":
      return Reader("tpu", 2 if kind in TWO_CORES else 1, required=required)
    case "gpu" | "cuda":
      return Reader("gpu", required=required)
  return Reader("tpu", interpret=True, required=required)


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How a policy is run. Nothing here changes what it computes beyond rounding, which an int8 cache makes coarse."""

  compute_dtype: str = "float32"  # bfloat16 on accelerators; parameters keep their own dtype
  attention: str = "auto"  # auto (the best one for the devices) | xla | blockwise | splash | tokamax
  remat: str = "dots"  # kept for the backward pass: none: all; dots: products with weights; full: layer inputs alone
  int8_cache: bool = False  # keys and values are kept in eight bits: half of bfloat16's memory, and not exact
  # To a cached text: auto | xla (as far as there is room) | ragged (what is there), and what these are on the devices.
  decode_attention: str | Reader | None = "auto"
  sharding: Sharding = Sharding()
