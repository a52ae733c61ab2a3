"""From the compiler's figures to what fits, and to the time of a step by rooflines, which is an estimate.

A roofline is the time that the dearest of three takes if nothing is lost: operations over the chip's rate, bytes over
its memory's bandwidth, bytes from other chips over its links'. A real step takes longer. Nothing here was measured.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlpr_jax.models import Reader, kernels, ragged
from rlpr_jax.planning import flops, queue
from rlpr_jax.planning.compiler import Compiled
from rlpr_jax.planning.hardware import Chip
from rlpr_jax.planning.programs import WITHOUT_ATTENTION, Layout, Program, copies_to_sample, device_bytes
from rlpr_jax.training import packing
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.training.settings import rollout_shapes, row_length, text_row_length

SPREAD = 0.6  # standard deviation of the logarithm of lengths, where nothing else is said


class Lengths(NamedTuple):
  """Assumptions about a run's texts."""

  prompt: int  # tokens, on average
  response: int
  reference: int  # of an answer that is scored, with what is around it
  draws: float  # of `prompts_per_draw` prompts that a step takes
  spread: float = SPREAD  # standard deviation of the logarithm of the lengths of responses


class Sizes(NamedTuple):
  """Sizes of a run on which the time of a step depends."""

  slots: int  # of a process
  slot_bytes: float  # of a device's slots
  micro_batch_rows: int
  exchanged_rows: float = 0.0  # of a prompt; 0 where no reward asks for them


class Roofline(NamedTuple):
  """Seconds of a step's part.

  >>> Roofline(operations=2.0, memory=1.0, links=3.0, overlap=True).seconds
  3.0
  """

  operations: float
  memory: float
  links: float
  overlap: bool  # whether what comes over links may come while the chip computes

  @property
  def seconds(self) -> float:
    work = max(self.operations, self.memory)
    return max(work, self.links) if self.overlap else work + self.links


def memory_peak(program: Program, compiled: Compiled) -> int:
  """Bytes a device while the program runs, with all that is alive beside it.

  >>> program = Program(lambda: None, trips=(1,), parts={}, beside=100)
  >>> memory_peak(program, Compiled("", peak=20, temporary=0, traffic={}, kernels=[], seconds=1.0))
  120
  """
  return compiled.peak + program.beside


def count_flops(programs: dict[str, Program]) -> dict[str, int]:
  """Operations of one run of each program, on all of its devices; loops as `Program.trips` says.

  Args:
    programs: on one device, with plain attention, whose products can be counted: as if no block were skipped.
  """
  return {
    name: flops.of_jaxpr(program.trace().jaxpr.jaxpr, program.trips)
    for name, program in programs.items()
    if name not in WITHOUT_ATTENTION
  }


def count_devices(layout: Layout, name: str) -> int:
  """How many devices run a program: all, or in a rollout those of one process."""
  mesh = (layout.policy if name == "update" else layout.sampler.sampling).sharding.mesh
  return mesh.size if mesh is not None else 1


class Packed(NamedTuple):
  """What a minibatch of texts of some lengths becomes."""

  rows: int
  counted: float  # share of the rows' places whose token's log-probability is asked for
  visible: float  # share of splash's blocks that it does not skip


def packed(layout: Layout, lengths: Lengths) -> Packed:
  """Packs a minibatch of prompts and responses, log-normal as those of a run are, as an update would."""
  config = layout.config
  trees = [
    Tree(np.zeros(prompt, np.int32), [Branch.of_tokens(np.zeros(n, np.int32)) for n in of_prompt])
    for prompt, of_prompt in draw_lengths(config, lengths, config.prompts_per_step // config.training.minibatches)
  ]
  length = row_length(config)
  pieces = packing.arrange(trees, length)
  rows = packing.lay(trees, pieces, max(piece.row for piece in pieces) + 1, length)
  return Packed(
    rows=len(rows.tokens),
    counted=sum(branch.tokens.size for tree in trees for branch in tree.branches) / rows.tokens.size,
    visible=kernels.visible_share(rows.segment_ids, rows.group_ids),
  )


def draw_lengths(config: ConfigDict, lengths: Lengths, groups: int) -> list[tuple[int, list[int]]]:
  """Tokens of prompts and of each one's responses, log-normal as those of a run are."""
  rng = np.random.default_rng(0)

  def draw(mean: int, spread: float, most: int, count: int) -> np.ndarray:
    return np.clip(np.round(rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)), 1, most).astype(int)

  prompts = draw(lengths.prompt, SPREAD, config.data.prompt_limit, groups)
  most, responses_each = config.rollout.max_response_length, config.samples_per_prompt
  responses = draw(lengths.response, lengths.spread, most, groups * responses_each)
  return list(zip(prompts.tolist(), responses.reshape(groups, -1).tolist(), strict=True))


def queue_of(layout: Layout, lengths: Lengths, slots: int) -> queue.Queue:
  """What the slots of a process do in a step, with lengths log-normal as those of a run are.

  Args:
    slots: of a process.
  """
  config = layout.config
  groups = [responses for _, responses in draw_lengths(config, lengths, queue.DRAWS * config.rollout.prompts_per_draw)]
  return queue.simulate(config, groups, slots, layout.processes, lengths.draws)


class Exchanged(NamedTuple):
  """What scoring a group's own answers behind each other's reasoning takes, all of them being different."""

  rows: float  # of a prompt
  counted: float  # share of the rows' places whose token's log-probability is asked for
  visible: float  # share of splash's blocks that it does not skip


def exchanged(layout: Layout, lengths: Lengths) -> Exchanged:
  """Packs prompts and responses with all answers behind each, as `training.exchange` does; of some prompts."""
  config = layout.config
  groups, length = min(config.rollout.prompts_per_draw, 32), text_row_length(config)
  each = min(config.reward.conditional_pairs or config.samples_per_prompt, config.samples_per_prompt) + 1
  answers = [Branch.of_tokens(np.zeros(lengths.reference, np.int32))] * each
  trees = [
    Tree(np.zeros(prompt + response, np.int32), answers)
    for prompt, of_prompt in draw_lengths(config, lengths, groups)
    for response in of_prompt
  ]
  pieces = packing.arrange(trees, length)
  rows = packing.lay(trees, pieces, max(piece.row for piece in pieces) + 1, length)
  return Exchanged(
    rows=len(rows.tokens) / groups,
    counted=len(trees) * each * lengths.reference / rows.tokens.size,
    visible=kernels.visible_share(rows.segment_ids, rows.group_ids),
  )


def skipped_attention(layout: Layout, rows: int, length: int, visible: float, trained: bool = True) -> float:
  """Operations of attention in so many rows at once, in blocks that splash skips in layers without window.

  Two products forwards; where the rows are trained on, four backwards, and forwards again what is not kept.
  """
  config = layout.policy.config
  passes = (3 if layout.config.model.remat == "none" else 4) if trained else 1
  every = rows * length**2 * 4 * config.num_heads * config.head_dim * config.num_layers * passes
  return (1 - visible) * every


def micro_batches(layout: Layout, rows: int, lengths: Lengths) -> int:
  """How many of so many rows a minibatch takes."""
  return math.ceil(packed(layout, lengths).rows / rows)


class Read(NamedTuple):
  """Cached tokens that are read at a time of each row, on average over a run's responses and the policy's layers."""

  decoding: float
  scoring: float


def tokens_read(layout: Layout, lengths: Lengths, busy: float) -> Read:
  """What texts of such lengths have read of them: where a kernel does it, whole blocks, and no more than a window.

  Plain XLA reads all slots as far as the longest text in them, which among many is nearly always near the limit.

  Args:
    busy: share of the slots whose response has not ended, on average over the steps of decoding.
  """
  config, policy = layout.config, layout.sampler
  model, reader = policy.config, policy.sampling.decode_attention
  shapes = rollout_shapes(config, layout.processes, policy.sampling)
  if not isinstance(reader, Reader):
    return Read(shapes.longest, shapes.longest)
  heads = max(model.num_kv_heads // policy.sampling.sharding.num_shards("kv_heads"), 1)
  itemsize = 1 if policy.sampling.int8_cache else jnp.dtype(policy.sampling.compute_dtype).itemsize
  block = ragged.block_length(shapes.capacity, heads * model.head_dim * itemsize, reader.kernel)
  of_responses = [(p, r) for p, of_prompt in draw_lengths(config, lengths, config.prompts_per_step) for r in of_prompt]
  prompts, responses = np.array(of_responses).T
  texts = np.arange(shapes.longest + 1)

  def of_layer(window: int | None) -> Read:
    whole = -(-texts // block) * block
    read = whole if window is None else whole - np.maximum(texts - window, 0) // block * block
    before = np.concatenate([[0], np.cumsum(read)])  # of all shorter texts
    decoded = (before[prompts + responses] - before[prompts]).sum() / responses.sum()
    return Read(busy * decoded, read[prompts + responses].mean())

  share = sum(model.windowed) / model.num_layers
  full, windowed = of_layer(None), of_layer(model.window)
  return Read(*((1 - share) * x + share * y for x, y in zip(full, windowed, strict=True)))


def rooflines(
  layout: Layout,
  chip: Chip,
  lengths: Lengths,
  sizes: Sizes,
  decoding: queue.Queue,
  operations: Mapping[str, float],
  compiled: dict[str, Compiled],
) -> dict[str, Roofline]:
  """Estimate the seconds of each part of a training step.

  Args:
    decoding: as of `queue_of`, with these slots.
    operations: as of `count_flops`, with these slots and rows, for texts of these lengths.
  """
  config = layout.config
  shapes = rollout_shapes(config, layout.processes, layout.sampler.sampling)
  prompts = config.rollout.prompts_per_draw * lengths.draws / layout.processes
  responses = prompts * config.samples_per_prompt
  weights = device_bytes(layout.sampled)

  def links(name: str) -> float:
    traffic = compiled[name].traffic.values() if name in compiled else ()
    near = sum(kind.received - kind.far for kind in traffic)
    return near / chip.links + sum(kind.far for kind in traffic) / chip.network

  def part(name: str, calls: float, memory: float, overlap: bool = False) -> Roofline:
    """`memory`: bytes a call."""
    return Roofline(
      operations=calls * operations.get(name, 0) / count_devices(layout, name) / chip.flops,
      memory=calls * memory / chip.bandwidth,
      links=calls * links(name),
      overlap=overlap,
    )

  steps = decoding.steps
  read = tokens_read(layout, lengths, busy=decoding.occupancy(sizes.slots))
  # A response that goes on is read with its prompt and what there is of it.
  again = decoding.texts_again + decoding.read_again / lengths.prompt
  filled = sizes.slot_bytes * read.decoding / shapes.capacity
  scored = sizes.slot_bytes * read.scoring / shapes.capacity * shapes.score_rows / sizes.slots
  parts = {
    "prefill": part("prefill", (prompts + again) / shapes.prefill_rows, weights),
    "insert": part("insert", (responses + decoding.texts_again) / shapes.insert_rows, 0.0),
    "decode": part("decode", steps / shapes.steps, shapes.steps * (weights + filled)),
    "score": part("score", responses / shapes.score_rows, weights + scored),
    "update": part(
      "update",
      micro_batches(layout, sizes.micro_batch_rows, lengths)
      * config.training.minibatches
      * config.training.epochs_per_step,
      0.0,
      overlap=True,
    ),
  }
  if sizes.exchanged_rows:
    parts["exchange"] = part("exchange", sizes.exchanged_rows * prompts / config.rollout.score_rows, weights)
  if copies_to_sample(layout):
    parts = {"gather": part("gather", 1, 2 * weights)} | parts
  return parts
