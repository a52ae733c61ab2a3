"""Rollouts of SmolLM2-135M-Instruct in float32 on the CPU: the slot engine beside other ways to sample the same tokens.

    make smollm2
    make peers  # for the last row, which is optional
    PYTHONPATH=. .venv/bin/python -m benchmarks.rollout --tunix=.cache/tunix --json=rollout.json

Every contender samples a response of the same length to the same prompts, at temperature 1 from the whole vocabulary;
EOS is one token among others. Lengths are as uneven as in training: exponential, a quarter of the limit on average.

    ours          rlpr_jax's engine: a response that ends makes room for the next; each prompt is read once
    scored        the same, and a reference answer is scored after every response, from the cache
    fixed         the same programs without refilling: a batch runs, all of its rows, until its last one ends
    compacted     the same, but the rows that are left move to the front and fewer are decoded, as the engine does
    transformers  `generate` in torch, in the same batches, each row with its own limit
    tunix         google-tunix's vanilla sampler, in the same batches; no limits for single rows, so a batch runs up to
                  its longest row, and what a row has too much is not counted (its Llama ignores the model's rope_theta:
                  the same work, another text)

A run is a process of its own, one after another, the contenders taking turns: memory is that process's high-water mark,
weights, libraries and compiler included. Nothing is timed before one warm-up of every program that the run needs.
Libraries are imported by the contender that needs them, so that none carries another's.
"""

import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from absl import app, flags

from benchmarks.common import MODEL, REPEATS, run, spread
from rlpr_jax import huggingface

PROMPT_LIMIT, REFERENCE_LIMIT = 256, 48  # tokens; the engine is compiled for them
LABELS = {
  "ours": "slot engine",
  "scored": "slot engine, references scored",
  "fixed": "(a) fixed batches, our programs",
  "compacted": "fixed batches that shrink, our programs",
  "transformers": "(b) transformers `generate`",
  "tunix": "(c) tunix vanilla sampler",
}
TEXT = (
  "The lighthouse on the northern cape was built in 1857 from granite that came by ship.",
  "It is 41 metres high, and 196 steps lead up to the lamp.",
  "For sixty years the keeper climbed them twice a night to wind the clockwork that turned the lens.",
  "An electric motor took over that work in 1921, and the last keeper left in 1984.",
  "On a clear night the light can be seen from 23 nautical miles away.",
  "Every ten seconds it gives two short flashes, which tell it from the lights to the east and the west.",
  "In the winter of 1903 a storm broke four panes of the lantern room, and snow put the lamp out.",
  "The keeper's daughter, Marit Solheim, then rang the fog bell by hand until the morning.",
  "A ferry with 112 passengers found its way into the harbour by that sound alone.",
)
QUESTIONS = (
  ("What is the capital of France?", "Paris"),
  ("A train leaves at 3 pm and arrives at 5 pm. How long is the journey?", "two hours"),
  ("Which planet of the solar system is the largest, and how many times does the Earth fit into it?", "Jupiter, 1300"),
  ("What is 17 times 23? Think step by step.", "391"),
  ("Why is the sky blue during the day and red in the evening?", "Short waves of light are scattered more."),
  ("Who wrote Hamlet?", "William Shakespeare"),
  ("How high would a tower of a thousand coins be if every coin is 2 millimetres thick?", "2 metres"),
)

_PROMPTS = flags.DEFINE_integer("prompts", 16, "questions", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 8, "responses to each question", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 32, "rows that are decoded at once, in every contender", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 256, "most tokens of a response", lower_bound=8)
_STEPS = flags.DEFINE_integer("steps", 16, "tokens that the engine decodes between two looks at what has ended")
_ONLY = flags.DEFINE_list("only", list(LABELS), "contenders")
_TUNIX = flags.DEFINE_string("tunix", None, "directory where pip installed google-tunix, if not beside jax")
_JSON = flags.DEFINE_string("json", None, "file for the results of every run")
_RUN = flags.DEFINE_enum("run", None, list(LABELS), "only for the program itself: one run, in this process")


class Work(NamedTuple):
  """What is to be sampled: `samples` responses to each prompt, limits[p * samples + s] tokens each."""

  prompts: list[list[int]]  # token ids
  references: list[str]
  samples: int
  limits: np.ndarray
  slots: int
  limit: int
  steps: int

  def batches(self) -> list[np.ndarray]:
    """Rows that are sampled together where nothing is refilled."""
    return np.split(np.arange(self.limits.size), range(self.slots, self.limits.size, self.slots))

  def prompt_of(self, row: int) -> list[int]:
    return self.prompts[row // self.samples]


Progress = Callable[[int, int], None]  # responses that have ended, of how many
# Samples all responses, and says how many seconds went where, as far as it knows.
Sample = Callable[[Progress], dict[str, float]]


def make_work(tokenizer, prompts: int, samples: int, slots: int, limit: int, steps: int) -> Work:
  """Questions with more or less text before them, and lengths from a fixed seed."""
  if slots % samples:
    raise app.UsageError(f"--slots={slots} is not a multiple of --samples={samples}")
  chats, references = [], []
  for i in range(prompts):
    question, reference = QUESTIONS[i % len(QUESTIONS)]
    text = " ".join([*TEXT[: i * 4 % (len(TEXT) + 1)], question])
    chat = [{"role": "user", "content": text}]
    chats.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    references.append(reference)
  lengths = np.random.default_rng(0).exponential(limit / 4, prompts * samples)
  return Work(chats, references, samples, np.clip(lengths, 8, limit).astype(int), slots, limit, steps)


def load_tokenizer():
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(MODEL.value)


def with_engine(work: Work, refill: bool = True, scored: bool = False, shrink: bool = True) -> Sample:
  """rlpr_jax. Without refilling: batch after batch, each with all the slots to itself, shrinking or not."""
  import jax

  from rlpr_jax import models, splicing
  from rlpr_jax.sampling.decode import DecodeSettings
  from rlpr_jax.sampling.device import Device
  from rlpr_jax.sampling.engine import Engine, SampleOptions
  from rlpr_jax.sampling.shapes import Shapes
  from rlpr_jax.types import Prompt

  config, params = huggingface.load_pretrained(MODEL.value)
  tokenizer = load_tokenizer()
  together = work.slots // work.samples  # prompts
  shapes = Shapes(
    slots=work.slots,
    prompt_limit=PROMPT_LIMIT,
    max_response_length=work.limit,
    suffix_length=REFERENCE_LIMIT,
    steps=work.steps,
    prefill_rows=together,
    score_rows=min(16, work.slots),
    insert_rows=work.samples,
  )
  device = Device(models.definition(config), DecodeSettings(work.steps, eos_ids=()), shapes)
  engine = Engine(device, tokenizer, template="think", baseline_prefix="bare")
  draws = [
    (i, Prompt(ids=np.array(ids, np.int32), reference=reference, row=i))
    for i, (ids, reference) in enumerate(zip(work.prompts, work.references, strict=True))
  ]

  def splice_at_the_end(tokenizer, prompt_ids, response_ids, reference, template):
    return splicing.Splice(len(response_ids), *splicing.baseline_suffix(tokenizer, reference))

  def sample(limits: np.ndarray, progress: Progress) -> dict[str, float]:
    seconds = Counter()
    size = together if not refill else len(draws)
    for first in range(0, len(draws), size):
      rows = slice(first * work.samples, (first + size) * work.samples)
      options = SampleOptions(
        limits=limits[rows], progress=lambda done, _, before=rows.start: progress(before + done, limits.size)
      )
      sample_batch = engine.rollout if scored else engine.sample
      rollouts = sample_batch(params, draws[first : first + size], jax.random.key(0), work.samples, options)
      np.testing.assert_array_equal(rollouts.lengths, limits[rows])
      assert not scored or rollouts.scorable.all()
      seconds.update(rollouts.seconds)
    return dict(seconds)

  if not shrink:
    mock.patch.object(Shapes, "decode_rows", property(lambda shapes: (shapes.slots,))).start()
  # A response here is not worth scoring: it has no tags. The same number of tokens is scored behind it instead.
  mock.patch.object(splicing, "splice", splice_at_the_end).start()
  device.compile_programs(params, scored)
  sample(np.ones_like(work.limits), lambda *_: None)  # what the warm-up leaves out
  return lambda progress: sample(work.limits, progress)


def with_transformers(work: Work) -> Sample:
  """`generate` on left-padded batches; a row counts as done at its limit, and the batch ends with its last row."""
  import torch
  import transformers

  class AtLimits(transformers.StoppingCriteria):
    def __init__(self, limits: torch.Tensor):
      self.limits = limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
      return input_ids.shape[1] >= self.limits

  model = transformers.AutoModelForCausalLM.from_pretrained(MODEL.value, dtype=torch.float32).eval()
  # Neither generation_config nor the call names an EOS, so none is looked for.
  model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
  padding = 0

  def sample(limits: np.ndarray, progress: Progress) -> dict[str, float]:
    torch.manual_seed(0)
    for rows in work.batches():
      prompts = [work.prompt_of(row) for row in rows]
      width, longest = max(map(len, prompts)), int(limits[rows].max())
      ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
      mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
      out = model.generate(
        ids,
        attention_mask=mask,
        max_length=width + longest + 1,  # never reached
        pad_token_id=padding,
        stopping_criteria=transformers.StoppingCriteriaList([AtLimits(torch.tensor(width + limits[rows]))]),
      )
      assert out.shape[1] == width + longest
      progress(int(rows[-1]) + 1, limits.size)
    return {}

  sample(np.full_like(work.limits, 2), lambda *_: None)
  return lambda progress: sample(work.limits, progress)


def with_tunix(work: Work) -> Sample:
  """Its sampler compiles for each length of prompt and response, here the longest ones of each batch."""
  import dataclasses

  if _TUNIX.value:
    sys.path.append(_TUNIX.value)  # behind the libraries that are installed here
  import jax
  import jax.numpy as jnp
  from tunix.generate.sampler import CacheConfig, Sampler
  from tunix.models.llama3 import model as llama
  from tunix.models.llama3.params import create_model_from_safe_tensors

  config = huggingface.load_config(huggingface.resolve(MODEL.value))
  theirs = llama.ModelConfig(
    num_layers=config.num_layers,
    vocab_size=config.vocab_size,
    embed_dim=config.embed_dim,
    hidden_dim=config.mlp_dim,
    num_heads=config.num_heads,
    head_dim=config.head_dim,
    num_kv_heads=config.num_kv_heads,
    rope_theta=int(config.rope.theta),
    norm_eps=config.norm_eps,
    weight_tying=config.tie_embeddings,
  )
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  model = create_model_from_safe_tensors(MODEL.value, theirs, mesh, jnp.float32)
  tokenizer = load_tokenizer()
  tokenizer.pad_token = tokenizer.unk_token  # by default <|im_end|>, which the prompts contain
  room = max(map(len, work.prompts)) + work.limit
  sampler = Sampler(model, tokenizer, CacheConfig(room, config.num_layers, config.num_kv_heads, config.head_dim))

  def sample(progress: Progress) -> dict[str, float]:
    for rows in work.batches():
      prompts = [work.prompt_of(row) for row in rows]
      out = sampler(
        [tokenizer.decode(prompt) for prompt in prompts],
        max_generation_steps=int(work.limits[rows].max()),
        max_prompt_length=max(map(len, prompts)),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_tokens=[-1],  # never sampled
      )
      for prompt, padded in zip(prompts, out.padded_prompt_tokens, strict=True):
        assert padded[-len(prompt) :].tolist() == prompt
      progress(int(rows[-1]) + 1, work.limits.size)
    return {}

  decode = sampler._compiled_decode_fn

  def compile_only(params, state):
    return decode(params, dataclasses.replace(state, done=state.done | True))  # the loop ends at once

  with mock.patch.object(sampler, "_compiled_decode_fn", compile_only):
    sample(lambda *_: None)
  return sample


CONTENDERS: dict[str, Callable[[Work], Sample]] = {
  "ours": with_engine,
  "scored": lambda work: with_engine(work, scored=True),
  "fixed": lambda work: with_engine(work, refill=False, shrink=False),
  "compacted": lambda work: with_engine(work, refill=False),
  "transformers": with_transformers,
  "tunix": with_tunix,
}


def compilations() -> int | None:
  """Programs that jax has compiled so far, if there is jax here."""
  if "jax" not in sys.modules:
    return None
  from rlpr_jax.runs import metrics

  return metrics.compilations()


def measure(name: str, work: Work) -> dict[str, Any]:
  """One run in this process."""
  sample = CONTENDERS[name](work)
  compiled, start = compilations(), time.perf_counter()
  parts = sample(Lines(f"  {name}, responses").update)
  seconds = time.perf_counter() - start
  return {
    "seconds": seconds,
    "tokens_per_s": int(work.limits.sum()) / seconds,
    "parts": parts,
    "compilations": None if compiled is None else compilations() - compiled,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
  }


class Lines:
  """Lines on stderr that say how far something is and how long the rest will take; one every ten seconds at most."""

  def __init__(self, label: str, every: float = 10.0):
    self.label, self.every = label, every
    self.start = self.printed = time.monotonic()

  def update(self, done: int, total: int, detail: str = "") -> None:
    now = time.monotonic()
    if now - self.printed < self.every or not done:
      return
    self.printed = now
    left = (now - self.start) * (total - done) / done
    print(f"{self.label} {done}/{total}  {detail}  {left:.0f} s left", file=sys.stderr, flush=True)


def run_apart(name: str) -> dict[str, Any]:
  """`measure` in a process of its own; {"failed": reason} if it cannot be."""
  arguments = [sys.executable, "-m", "benchmarks.rollout", *sys.argv[1:], f"--run={name}"]
  child = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path.cwd())
  lines = child.stdout.splitlines()
  return json.loads(lines[-1]) if child.returncode == 0 and lines else {"failed": f"exit status {child.returncode}"}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
  """Markdown; medians, for the speed with the slowest and the fastest run."""

  def speed(name: str) -> float | None:
    good = [run["tokens_per_s"] for run in runs.get(name, []) if "failed" not in run]
    return statistics.median(good) if good else None

  def ratio(name: str, other: str) -> str:
    return f"{speed(name) / speed(other):.2f}" if speed(other) else "-"

  def median(name: str, field: str) -> str:
    values = [run[field] for run in runs[name]]
    return "-" if None in values else f"{statistics.median(values):.0f}"

  def shares(name: str) -> str:
    parts = [run["parts"] for run in runs[name]]
    if not all(parts):
      return "-"
    of = [statistics.median(run[part] / sum(run.values()) for run in parts) for part in ("prefill", "decode", "score")]
    return " / ".join(f"{share:.0%}" for share in of)

  lines = [
    "| | tokens/s | to (a) | to (b) | prefill / decode / score | peak memory, MiB | compiled meanwhile |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, results in runs.items():
    failed = [run["failed"] for run in results if "failed" in run]
    if failed:
      cells = [f"skipped: {failed[0]}", *["-"] * 5]
    else:
      speeds = spread([run["tokens_per_s"] for run in results])
      cells = [speeds, ratio(name, "fixed"), ratio(name, "transformers"), shares(name)]
      cells += [median(name, "peak_mib"), median(name, "compilations")]
    lines.append(f"| {' | '.join([LABELS[name], *cells])} |")
  return "\n".join(lines)


def describe(work: Work) -> dict[str, Any]:
  """The workload and the machine."""
  lengths = [len(prompt) for prompt in work.prompts]
  versions = {name: metadata.version(name) for name in ("jax", "torch", "transformers")}
  return {
    "responses": work.limits.size,
    "samples_per_prompt": work.samples,
    "slots": work.slots,
    "prompt_tokens": [min(lengths), max(lengths)],
    "response_tokens": [int(work.limits.min()), float(work.limits.mean()), int(work.limits.max())],
    "cpus": len(os.sched_getaffinity(0)),
    "load_before": os.getloadavg()[0],
    "machine": platform.machine(),
    "versions": versions,
  }


def main(argv: Sequence[str]) -> None:
  del argv
  work = make_work(load_tokenizer(), _PROMPTS.value, _SAMPLES.value, _SLOTS.value, _LIMIT.value, _STEPS.value)
  if _RUN.value:
    try:
      print("\n" + json.dumps(measure(_RUN.value, work)))
    except Exception as error:  # of whatever kind: the other contenders go on, and the table says why
      traceback.print_exc()
      print("\n" + json.dumps({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}))
    return
  about = describe(work)
  print(json.dumps(about), file=sys.stderr)
  if about["load_before"] > 0.5:
    print("other programs are running: torch above all loses by it, for its threads spin", file=sys.stderr)
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in _ONLY.value}
  todo = [name for _ in range(REPEATS.value) for name in runs]
  progress = Lines("run", every=0)
  for done, name in enumerate(todo, 1):
    if not any("failed" in run for run in runs[name]):
      runs[name].append(run_apart(name))
      detail = runs[name][-1].get("failed") or f"{runs[name][-1]['tokens_per_s']:.3g} tokens/s"
      progress.update(done, len(todo), f"{name}: {detail}")
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json.dumps({**about, "runs": runs}, indent=1))
  least, mean, most = about["response_tokens"]
  print(table(runs))
  print(
    f"\n{work.limits.size} responses of {least} to {most} tokens ({mean:.0f} on average) to prompts of "
    f"{about['prompt_tokens'][0]} to {about['prompt_tokens'][1]} tokens, {work.slots} rows at once, "
    f"{about['cpus']} CPUs, float32; median of {REPEATS.value} runs (least to most), each in a process of its own, "
    "one after another."
  )


if __name__ == "__main__":
  run(main)
