"""Every setting of a run, with the paper's value where it has one, and the checks on them.

A recipe in configs/ calls `default()` and changes fields; the command line changes more
(`--config.training.minibatches=2`).
Unknown fields and values of another type are refused by `ml_collections`, impossible ones by `validate`.
"""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlpr_jax import filtering, grpo, rewards, sharding
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.evaluation import graders
from rlpr_jax.models.config import ATTENTION_BACKENDS, REMAT_POLICIES
from rlpr_jax.training import old_logprobs, reward, supervised, update


def default() -> ConfigDict:
  """The method as the paper runs it on Qwen2.5 (arXiv 2506.18254, section 4.1), on data and a model to be named."""
  c = ConfigDict()
  c.seed = 0  # decides initial weights, data order and sampling
  c.steps = 300  # training steps in all; a finished run goes on when this is raised
  c.prompts_per_step = 768  # groups that an update trains on
  c.samples_per_prompt = 8  # G, responses to each prompt
  c.max_draws = 4  # at most this many draws of prompts a step; then it trains on what it kept, and says so
  c.compilation_cache = "~/.cache/rlpr_jax"  # compiled programs are kept here between runs; "" for nowhere

  c.model = ConfigDict()
  c.model.path = ""  # Hugging Face directory or hub name (org/name); "" for a new policy of the sizes below
  c.model.compute_dtype = "float32"  # float32 | bfloat16; trained parameters are always float32
  c.model.attention = "auto"  # auto | xla | splash (TPU) | tokamax (GPU)
  c.model.remat = "dots"  # kept for the backward pass: none (all) | dots (products with weights) | full (layer inputs)
  c.model.embed_dim = 96  # of a new policy, here and below
  c.model.mlp_dim = 256
  c.model.num_layers = 3
  c.model.num_heads = 3
  c.model.head_dim = 32

  c.lora = ConfigDict()
  c.lora.rank = 0  # of adapters beside a frozen base; 0 trains all parameters
  c.lora.alpha = 32.0  # adapters are scaled by alpha / rank
  c.lora.targets = "query,key,value,out,gate,up,down"  # linear layers that get one
  c.lora.base_dtype = "bfloat16"  # of the frozen base: bfloat16 | float32

  c.mesh = ConfigDict()  # devices along each axis; -1 for all that the others leave
  c.mesh.data = 1  # copies of the parameters, each with its share of the rows
  c.mesh.fsdp = -1  # rows, parameters and optimiser state are split
  c.mesh.tensor = 1  # heads, MLP columns and vocabulary are split

  c.sharding = ConfigDict(  # axes of arrays -> axes of the mesh over which they are split
    {axis: ",".join(on) for axis, on in sharding.RULES.items()}
  )

  c.data = ConfigDict()
  c.data.path = ""  # .parquet (verl or question/answer), .jsonl or .csv; "" for the built-in questions
  c.data.split = ""  # rows whose column "split" says so; "" for all
  c.data.count = 2048  # of the built-in questions
  c.data.domains = "short"  # of those, the held-out ones and the warm start's demonstrations: short | sentences | all
  c.data.template = "think"  # think | answer_only
  c.data.instruction = "default"  # system message of rows without one: "default" is the template's, "" is none
  c.data.examples = ()  # worked examples before each question: ((question, response), ...)
  c.data.prompt_limit = 2048  # tokens, chat template included; longer prompts are dropped and counted
  c.data.max_reference_length = 256  # tokens of a spliced reference; longer ones are dropped and counted

  c.rollout = ConfigDict()
  c.rollout.max_response_length = 3072  # tokens, EOS included
  c.rollout.temperature = 1.0
  c.rollout.prompts_per_draw = 768  # prompts sampled together; refilling draws as many again
  c.rollout.slots = 256  # responses that are decoded at once; one that ends makes room for the next
  c.rollout.decode_steps = 16  # tokens between two looks at which responses have ended
  c.rollout.prefill_prompts = 8  # prompts read at once
  c.rollout.score_rows = 16  # reference answers scored at once
  c.rollout.int8_cache = False  # keys and values of the rollout in eight bits; watch sampler_gap/mean
  c.rollout.gather_params = True  # over fsdp, once a step; without it, which takes less memory, once a token

  c.reward = ConfigDict()
  c.reward.kind = "reference"  # reference | rule (verifier) | mixture of both | random (control: uniform in [0, 1))
  c.reward.verifier = "none"  # none | exact | multiple_choice | math | builtin; of rule, mixture, accuracy filter, AUC
  c.reward.rule_weight = 0.5  # of mixture: (1 - w) * reference + w * rule
  c.reward.normalization = "joint"  # of mixture: joint (advantages of the sum) | separate (sum of each one's own)
  c.reward.scorer = "policy"  # whose probability: policy | initial (frozen) | lagged (the policy some steps ago)
  c.reward.scorer_every = 10  # training steps between two copies of the policy for a lagged scorer
  c.reward.aggregate = "mean_prob"  # mean_prob | geometric_mean | product | mean_logprob
  c.reward.token_weights = "uniform"  # uniform | inverse (rare tokens) | base (unknown without reasoning) | spread
  c.reward.shaping = "clip"  # clip | identity | threshold_T | one_minus | sigmoid_K | leaky_T | bins_N | rank | zscore
  c.reward.baseline_policy = "initial"  # initial | current | moving_average | none
  c.reward.baseline_rate = 0.1  # of moving_average: weight of the newest probabilities
  c.reward.baseline_prefix = "bare"  # bare | tagged (with <answer> before the reference)
  c.reward.format_coefficient = 0.1  # share of the format term; -1: a wrong format scores -1
  c.reward.answer_length_coefficient = 0.0  # most that is taken off for an answer longer than the reference
  c.reward.repetition_window = 10  # words
  c.reward.repetition_limit = 10  # occurrences of one window from which on the response gets -1
  c.reward.score_temperature = 1.0  # of the distribution in which the reference is scored
  c.reward.shadow = ()  # rewards that are logged and not trained on: ("product: aggregate=product", ...)

  c.filter = ConfigDict()
  c.filter.kind = "ema"  # ema | fixed | accuracy (drops all right and all wrong) | off
  c.filter.scale = 0.5  # of the moving average; Qwen 0.5, Llama 0.9, Gemma 1.0
  c.filter.source_scales = ()  # of some sources' own: (("stem", 0.9), ...)
  c.filter.alpha = 0.01  # weight of the newest step in the average
  c.filter.collect_from = 6  # first step (from 1) whose spread enters the average
  c.filter.start = 11  # first step that filters
  c.filter.threshold = 0.0  # of kind "fixed": smallest standard deviation kept

  c.training = ConfigDict()
  c.training.minibatches = 4  # optimiser steps a pass over the step's rollouts
  c.training.epochs_per_step = 1  # passes
  c.training.row_length = 0  # tokens of a row, into which sequences are packed; 0 for the longest sequence there can be
  c.training.micro_batch_rows = 0  # rows whose gradients are taken at once; 0 for one on each part of the mesh
  c.training.advantages = "std"  # std | none (Dr. GRPO) | leave_one_out (RLOO)
  c.training.aggregate = "token_mean"  # token_mean | seq_mean_token_sum | seq_mean_token_mean
  c.training.loss = "clip"  # clip (PPO) | truncated (importance weights, REINFORCE)
  c.training.clip_low = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
  c.training.clip_high = 0.27
  c.training.dual_clip = 0.0  # of clip: most times |advantage| that a bad token costs, 3 in its paper; 0 for off
  c.training.ratio_cap = 2.0  # of truncated: largest importance weight
  c.training.answer_gradient = "none"  # through the reference: none (RLPR) | verifree (reward-weighted) | jepo (bound)
  c.training.answer_coefficient = 1.0  # of that term
  c.training.kl_coefficient = 0.0  # of the k3 estimate against the initial policy, which is kept only above 0
  c.training.entropy_coefficient = 0.001  # nats of mean token entropy
  c.training.old_logprobs = "auto"  # ratios start from: sampler | trainer (another pass) | auto (by the gap of the two)
  c.training.sampler_gap_limit = 0.01  # of auto: largest mean of |ratio - 1| with which the sampler's are taken
  c.training.learning_rate = 1e-6  # AdamW
  c.training.schedule = "constant"  # constant | linear | cosine: to zero at the last of config.steps
  c.training.warmup_steps = 0  # training steps in which the rate rises from zero
  c.training.weight_decay = 0.01
  c.training.max_grad_norm = 1.0

  c.warm_start = ConfigDict()
  c.warm_start.steps = 0  # supervised steps on demonstrations before RLPR, or of rlpr_jax.sft; 0 for none
  c.warm_start.path = ""  # demonstrations: prompt and response, .parquet, .jsonl or .csv; "" for the built-in ones
  c.warm_start.split = ""  # rows whose column "split" says so; "" for all
  c.warm_start.batch_size = 64  # sequences
  c.warm_start.optimizer = "muon"  # muon (with Adam for embeddings, head and norms) | adam (for a pretrained model)
  c.warm_start.learning_rate = 0.02  # of Muon; both rates follow a cosine to zero
  c.warm_start.adam_learning_rate = 0.003

  c.evaluation = ConfigDict()
  c.evaluation.path = ""  # held-out questions, as data.path; "" for the built-in ones
  c.evaluation.split = ""
  c.evaluation.prompts = 0  # first so many of them; 0 for no evaluation
  c.evaluation.samples = 4  # k of Avg@k
  c.evaluation.temperature = 1.0
  c.evaluation.top_p = 1.0  # only the most probable tokens that together reach it; training never truncates
  c.evaluation.top_k = 0  # only so many of the most probable tokens; 0 for all
  c.evaluation.min_p = 0.0  # only tokens at least so many times as probable as the most probable one
  c.evaluation.stop = ()  # strings that end a response, beside EOS: ("Question:", ...)
  c.evaluation.every = 0  # training steps between evaluations; 0 for before the first and after the last alone

  c.guards = ConfigDict()
  c.guards.max_skipped = 5  # updates in a row with a loss or gradient that is not finite, at which the run stops
  c.guards.patience = 5  # steps in a row after which a sign of collapse, of those below, is an alarm
  c.guards.stop = False  # whether an alarm stops the run, beside being printed and saved
  c.guards.min_length_share = 0.25  # of the first steps' mean response length
  c.guards.min_entropy = 0.01  # nats a token
  c.guards.min_format = 0.2  # share of well-formed responses
  c.guards.min_gain = 0.0  # of r over r': what reasoning adds to the reference answer's probability

  c.log = ConfigDict()
  c.log.rollouts = 16  # responses written to disk each step, whole groups first
  c.log.checkpoint_every = 10  # training steps; the last one is always saved
  c.log.keep_checkpoints = 2  # of the newest
  c.log.keep_best = 1  # and of those with the best held-out accuracy, which are saved when it is measured
  c.log.retry_seconds = 300.0  # how long a disk that is full or gone is tried again before the run stops
  return c


_CHOICES = {
  "model.compute_dtype": ("float32", "bfloat16"),
  "model.attention": ATTENTION_BACKENDS,
  "model.remat": REMAT_POLICIES,
  "lora.base_dtype": ("float32", "bfloat16"),
  "data.domains": builtin.DOMAINS,
  "data.template": tuple(rewards.TEMPLATE_TAGS),
  "reward.kind": reward.KINDS,
  "reward.verifier": ("none", *graders.VERIFIERS),
  "reward.normalization": ("joint", "separate"),
  "reward.scorer": ("policy", "initial", "lagged"),
  "reward.aggregate": rewards.AGGREGATES,
  "reward.token_weights": rewards.TOKEN_WEIGHTS,
  "reward.baseline_policy": ("initial", "current", "moving_average", "none"),
  "reward.baseline_prefix": ("bare", "tagged"),
  "filter.kind": filtering.KINDS,
  "warm_start.optimizer": supervised.OPTIMIZERS,
  "training.advantages": grpo.NORMALIZATIONS,
  "training.loss": ("clip", "truncated"),
  "training.old_logprobs": old_logprobs.CHOICES,
  "training.schedule": update.SCHEDULES,
  "training.answer_gradient": ("none", "verifree", "jepo"),
  "training.aggregate": grpo.AGGREGATES,
}
_AT_LEAST = {
  0: (
    "seed", "steps", "lora.rank", "training.row_length", "training.micro_batch_rows", "training.clip_low",
    "training.clip_high",
    "training.learning_rate", "training.kl_coefficient", "training.answer_coefficient", "evaluation.temperature",
    "evaluation.top_k", "evaluation.min_p",
    "reward.answer_length_coefficient", "training.weight_decay", "training.entropy_coefficient", "warm_start.steps",
    "training.sampler_gap_limit", "training.warmup_steps", "guards.min_length_share", "guards.min_entropy",
    "guards.min_format", "log.keep_best", "log.retry_seconds",
    "evaluation.prompts", "evaluation.every", "log.rollouts", "filter.scale", "filter.threshold",
  ),
  1: (
    "prompts_per_step", "max_draws", "samples_per_prompt", "model.embed_dim", "model.mlp_dim", "model.num_layers",
    "model.num_heads", "model.head_dim", "data.count", "data.prompt_limit", "data.max_reference_length",
    "rollout.max_response_length", "rollout.prompts_per_draw", "rollout.slots", "rollout.decode_steps",
    "rollout.prefill_prompts", "rollout.score_rows", "reward.repetition_window", "reward.repetition_limit",
    "reward.scorer_every", "training.minibatches", "training.epochs_per_step", "warm_start.batch_size",
    "evaluation.samples", "filter.collect_from", "log.checkpoint_every", "log.keep_checkpoints",
    "guards.max_skipped", "guards.patience",
  ),
}  # fmt: skip
# A resumed run may change these and still be the same run.
_MAY_CHANGE = (
  "steps", "compilation_cache", "evaluation", "guards", "log", "mesh", "sharding", "model.attention", "model.remat",
  "training.row_length", "training.micro_batch_rows", "rollout.slots", "rollout.prefill_prompts", "rollout.score_rows",
  "rollout.decode_steps", "rollout.gather_params",
)  # fmt: skip


def validate(config: ConfigDict) -> None:
  """Checks what types alone cannot say.

  Raises:
    InputError: naming the field, its value and what was expected.
  """
  if missing := [name for name in default() if name not in config]:
    raise InputError(f"config.{missing[0]}: missing, expected the config of a run, made by rlpr_jax.config.default()")
  for field, choices in _CHOICES.items():
    _expect(config, field, lambda value, choices=choices: value in choices, f"one of {', '.join(choices)}")
  for least, fields in _AT_LEAST.items():
    for field in fields:
      _expect(config, field, lambda value, least=least: value >= least, f"at least {least}")
  for field in ("lora.alpha", "reward.score_temperature", "rollout.temperature", "training.max_grad_norm",
                "training.ratio_cap", "evaluation.top_p"):  # fmt: skip
    _expect(config, field, lambda value: value > 0, "more than 0")
  for field in ("filter.alpha", "reward.baseline_rate", "evaluation.top_p"):
    _expect(config, field, lambda value: 0 < value <= 1, "more than 0 and at most 1")
  _expect(config, "evaluation.min_p", lambda value: value <= 1, "at most 1")
  _expect(config, "evaluation.stop", lambda texts: all(isinstance(x, str) and x for x in texts), "texts, none empty")
  _expect(config, "reward.rule_weight", lambda value: 0 <= value <= 1, "between 0 and 1")
  _expect(config, "training.dual_clip", lambda value: value == 0 or value > 1, "0, or more than 1")
  _expect(config, "training.warmup_steps", lambda value: value < (config.steps or value + 1), "fewer than config.steps")
  _expect(config, "filter.start", lambda value: value >= config.filter.collect_from, "at least filter.collect_from")
  check_reward("config.reward", reward.RewardSettings.of(config.reward), config.reward.verifier)
  names = set()
  for text in config.reward.shadow:
    name, settings = reward.parse_shadow(config, text)
    check_reward(f"config.reward.shadow {name}", settings, config.reward.verifier)
    if name in names:
      raise InputError(f"config.reward.shadow: {name!r} twice, expected names of their own")
    names.add(name)
    if settings.baseline_policy not in ("none", config.reward.baseline_policy):
      raise InputError(f"config.reward.shadow {name}: baselines of the run itself or none, there are no others")
  if config.filter.kind == "accuracy" and config.reward.verifier == "none":
    raise InputError("config.filter.kind: accuracy needs a verifier, expected config.reward.verifier")
  if not all(len(pair) == 2 and isinstance(pair[0], str) and pair[1] >= 0 for pair in config.filter.source_scales):
    raise InputError("config.filter.source_scales: expected pairs of a source's name and its scale")
  if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in config.data.examples):
    raise InputError("config.data.examples: expected pairs of question and response texts")
  minibatches, row_length = config.training.minibatches, config.training.row_length
  if config.prompts_per_step % minibatches:
    raise InputError(
      f"config.training.minibatches: {minibatches} does not divide config.prompts_per_step {config.prompts_per_step}"
    )
  if 0 < row_length < longest_sequence(config):
    raise InputError(
      f"config.training.row_length: {row_length}, expected 0 or room for the longest sequence,"
      f" {longest_sequence(config)} tokens"
    )


class SliceSettings(NamedTuple):
  """What a recipe sets for a slice of devices: their number along `config.mesh.tensor`, and rows of all of them."""

  tensor: int
  micro_batch_rows: int
  slots: int
  prefill_prompts: int
  score_rows: int


def set_slice(config: ConfigDict, slices: dict[str, SliceSettings], name: str) -> None:
  """Sets what a recipe has for the devices that stand behind its name, `configs/X.py:v5p:4x4x4`; for "" nothing.

  Raises:
    InputError: the recipe has nothing for them.
  """
  if name and name not in slices:
    raise InputError(f"--config: {name!r} after the recipe, expected nothing or one of {', '.join(slices)}")
  if name:
    config.mesh.tensor, config.training.micro_batch_rows, *rows = slices[name]
    config.rollout.slots, config.rollout.prefill_prompts, config.rollout.score_rows = rows


def longest_sequence(config: ConfigDict) -> int:
  """Most tokens of a prompt and its response, the reference answer included where a gradient goes through it."""
  answer = config.data.max_reference_length if config.training.answer_gradient != "none" else 0
  return config.data.prompt_limit + config.rollout.max_response_length + answer


def check_reward(where: str, settings: reward.RewardSettings, verifier: str) -> None:
  """Checks what a reward and a shadow reward have in common; `where` begins the message."""
  for field in ("kind", "aggregate", "token_weights", "baseline_policy"):
    value, choices = getattr(settings, field), _CHOICES[f"reward.{field}"]
    if value not in choices:
      raise InputError(f"{where}.{field}: {value!r}, expected one of {', '.join(choices)}")
  if settings.kind in ("rule", "mixture") and verifier == "none":
    raise InputError(f"{where}.kind: {settings.kind} needs a verifier, expected config.reward.verifier")
  if settings.format_coefficient != -1 and not 0 <= settings.format_coefficient <= 1:
    raise InputError(f"{where}.format_coefficient: {settings.format_coefficient}, expected -1, or between 0 and 1")
  try:
    rewards.parse_shaping(settings.shaping)
  except ValueError as error:
    raise InputError(f"{where}.shaping: {error}") from None


def to_json(config: ConfigDict) -> str:
  """The whole config, sorted, as it stands in WORKDIR/config.json."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def read(path: pathlib.Path) -> ConfigDict:
  """A config that `to_json` wrote.

  Raises:
    InputError: missing, or not such a config.
  """
  config = default().lock()
  try:
    with config.ignore_type():  # JSON has no tuples
      config.update(json.loads(path.read_text()))
  except FileNotFoundError:
    raise InputError(f"{path}: missing, expected the config of a run") from None
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise InputError(f"{path}: not the config of a run ({' '.join(str(error).split())[:200]})") from None
  return config


def first_difference(saved: dict[str, Any], config: ConfigDict) -> str | None:
  """Where a saved config says another run: "field: saved value, not value"; None if a run may be resumed with it."""
  now = json.loads(to_json(config))

  def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
      flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

  before, after = flatten(saved), flatten(now)
  for field in sorted(before | after):
    may_change = any(f"{field}.".startswith(f"{name}.") for name in _MAY_CHANGE)
    if not may_change and before.get(field) != after.get(field):
      return f"config.{field} is {before.get(field)!r} there, {after.get(field)!r} here"
  return None


def _expect(config: ConfigDict, field: str, holds, expected: str) -> None:
  value = config
  for name in field.split("."):
    value = value[name]
  if not holds(value):
    raise InputError(f"config.{field}: {value!r}, expected {expected}")
