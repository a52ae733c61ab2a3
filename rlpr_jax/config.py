"""Every setting of a run: its default, what it means, and what it may be.

A recipe in configs/ calls `default()` and changes fields; the command line changes more
(`--config.training.minibatches=2`). Defaults are the paper's values where it has one (arXiv 2506.18254, section 4.1, on
Qwen2.5), for data and a model that are to be named, but for `training.credit` and `reward.empty_answer`: as published
the own answer drifted further (docs/rewards.md, long runs). Unknown fields and values of another type are refused by
`ml_collections`, values that cannot be by `check_fields` and `validation.validate`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from rlpr_jax.errors import InputError
from rlpr_jax.fields import Field, check_value, show

T = TypeVar("T")

_SIZE = 2**20  # of one axis of an array: more than any machine holds of these

FIELDS = {
  "seed": Field(0, "decides initial weights, data order and sampling", at_least=0, at_most=2**32 - 1),
  "steps": Field(300, "training steps in all; a finished run goes on when this is raised", at_least=0, may_change=True),
  "prompts_per_step": Field(768, "groups that an update trains on", at_least=1, at_most=_SIZE),
  "samples_per_prompt": Field(8, "G, responses to each prompt", at_least=1, at_most=_SIZE),
  "max_draws": Field(
    4,
    "at most this many draws of prompts a step; then it trains on what it kept, and says so",
    at_least=1,
    at_most=1000,
  ),
  "compilation_cache": Field(
    "~/.cache/rlpr_jax", 'compiled programs are kept here between runs; "" for nowhere', may_change=True
  ),
  # The policy.
  "model.path": Field("", 'Hugging Face directory or hub name (org/name); "" for a new policy of the sizes below'),
  "model.compute_dtype": Field(
    "float32", "float32 | bfloat16; trained parameters are always float32", choices=("float32", "bfloat16")
  ),
  "model.attention": Field(
    "auto",
    "auto (by the devices) | xla | blockwise (CPU) | splash (TPU) | tokamax (GPU)",
    choices=("auto", "xla", "blockwise", "splash", "tokamax"),
    may_change=True,
  ),
  "model.decode_attention": Field(
    "auto",
    "to the text so far, sampling: auto (ragged on TPUs and GPUs) | ragged (reads what a slot holds) | xla (its room)",
    choices=("auto", "ragged", "xla"),
    may_change=True,
  ),
  "model.remat": Field(
    "dots",
    "kept for the backward pass: none (all) | dots (products with weights) | full (layer inputs)",
    choices=("none", "dots", "full"),
    may_change=True,
  ),
  "model.embed_dim": Field(96, "of a new policy, here and below", at_least=1, at_most=_SIZE),
  "model.mlp_dim": Field(256, "columns of its MLPs", at_least=1, at_most=_SIZE),
  "model.num_layers": Field(3, "layers of it", at_least=1, at_most=_SIZE),
  "model.num_heads": Field(3, "query heads of it, and as many of keys and values", at_least=1, at_most=_SIZE),
  "model.head_dim": Field(32, "size of one of its heads", at_least=1, at_most=_SIZE),
  # Adapters.
  "lora.rank": Field(0, "of adapters beside a frozen base; 0 trains all parameters", at_least=0, at_most=_SIZE),
  "lora.alpha": Field(32.0, "adapters are scaled by alpha / rank", above=0),
  "lora.targets": Field("query,key,value,out,gate,up,down", "linear layers that get one"),
  "lora.base_dtype": Field("bfloat16", "of the frozen base: bfloat16 | float32", choices=("float32", "bfloat16")),
  # Devices along each axis; -1 for all that the others leave.
  "mesh.data": Field(1, "copies of the parameters, each with its share of the rows", at_least=-1, may_change=True),
  "mesh.fsdp": Field(-1, "rows, parameters and optimiser state are split", at_least=-1, may_change=True),
  "mesh.tensor": Field(1, "heads, MLP columns and vocabulary are split", at_least=-1, may_change=True),
  # Axes of arrays, and the axes of the mesh over which they are split.
  "sharding.batch": Field("data,fsdp", "rows", may_change=True),
  "sharding.sequence": Field("", "tokens of a row", may_change=True),
  "sharding.embed": Field("fsdp", "the width of the model", may_change=True),
  "sharding.heads": Field("tensor", "query heads", may_change=True),
  "sharding.kv_heads": Field("tensor", "heads of keys and values", may_change=True),
  "sharding.mlp": Field("tensor", "columns of MLPs", may_change=True),
  "sharding.vocab": Field("tensor", "the vocabulary", may_change=True),
  "sharding.layers": Field("", "layers", may_change=True),
  # Questions.
  "data.path": Field(
    "",
    "a file (.parquet, .jsonl, .csv, .json), a directory of such files or a data set of the Hugging Face hub (org/name,"
    " org/name@revision), each with :SPLIT and :WEIGHT behind it if wanted, several with commas between them;"
    ' "" for the built-in questions',
  ),
  "data.split": Field(
    "", 'of a path that names none: rows whose column "split" says so, or files so named; "" for all'
  ),
  "data.max_dropped": Field(
    0.05,
    "largest share of rows, here, of evaluation.path and of warm_start.path, that may be of no use; they are dropped"
    " and named in WORKDIR/dropped_rows.jsonl",
    at_least=0,
    at_most=1,
    may_change=True,
  ),
  "data.count": Field(2048, "of the built-in questions", at_least=1),
  "data.domains": Field(
    "short",
    "of those, the held-out ones and the warm start's demonstrations: short | sentences | all (of these two) | facts"
    " (several in an answer)",
    choices=("short", "sentences", "all", "facts"),
  ),
  "data.chat_template": Field(
    "",
    'a file, "plain" (for a base model), or the name of one of the tokenizer\'s own; "" for its own',
  ),
  "data.chat_template_kwargs": Field(
    "", 'variables of the chat template, a JSON object such as {"enable_thinking": false}; "" for none'
  ),
  "data.template": Field(
    "think", "tags that a response must have: think (and answer) | answer_only", choices=("think", "answer_only")
  ),
  "data.instruction": Field("default", 'system message of rows without one: "default" is the template\'s, "" is none'),
  "data.system": Field("", 'system message of every row, instead of its own and of data.instruction; "" leaves those'),
  "data.examples": Field((), "worked examples before each question: ((question, response), ...)"),
  "data.prompt_limit": Field(
    2048, "tokens, chat template included; longer prompts are dropped and counted", at_least=1, at_most=_SIZE
  ),
  "data.max_reference_length": Field(
    256, "tokens of a spliced reference; longer ones are dropped and counted", at_least=1, at_most=_SIZE
  ),
  "data.max_references": Field(
    4, "reference answers of a row where reward.references takes them all; rows with more are dropped", at_least=1
  ),
  # Sampling.
  "rollout.max_response_length": Field(3072, "tokens, EOS included", at_least=1, at_most=_SIZE),
  "rollout.temperature": Field(1.0, "of sampling, and of the log-probabilities that are trained", at_least=0.001),
  "rollout.prompts_per_draw": Field(
    768, "prompts sampled together; refilling draws as many again", at_least=1, at_most=_SIZE
  ),
  "rollout.slots": Field(
    256,
    "responses that are decoded at once; one that ends makes room for the next",
    at_least=1,
    at_most=_SIZE,
    may_change=True,
  ),
  "rollout.decode_steps": Field(
    16, "tokens between two looks at which responses have ended", at_least=1, at_most=_SIZE, may_change=True
  ),
  "rollout.prefill_prompts": Field(8, "prompts read at once", at_least=1, at_most=_SIZE, may_change=True),
  "rollout.score_rows": Field(16, "reference answers scored at once", at_least=1, at_most=_SIZE, may_change=True),
  "rollout.carry": Field(
    "none",
    "none (a draw ends with its last response) | partial (responses that take longer than carry_tokens go on in the"
    " next step, with the parameters of that)",
    choices=("none", "partial"),
  ),
  "rollout.carry_tokens": Field(
    3072,
    "of partial: new tokens of a response in a draw, at most; of other groups fewer, down to a 32nd, to end together",
    at_least=1,
    at_most=_SIZE,
  ),
  "rollout.max_staleness": Field(
    1, "of partial: draws after its first in which a response may go on; in the last it runs to its end", at_least=1
  ),
  "rollout.int8_cache": Field(False, "keys and values of the rollout in eight bits; watch sampler_gap/mean"),
  "rollout.gather_params": Field(
    True, "over fsdp, once a step; without it, which takes less memory, once a token", may_change=True
  ),
  # What a response earns (docs/rewards.md).
  "reward.kind": Field(
    "reference",
    "reference | rule (verifier) | mixture of both | random (control: uniform in [0, 1))",
    choices=("reference", "rule", "mixture", "random"),
  ),
  "reward.custom": Field("", 'a reward of your own, FILE.py:FUNCTION, in the place of what follows; "" for none'),
  "reward.verifier": Field(
    "none",
    "none | exact | multiple_choice | math | builtin; of rule, mixture, accuracy filter, AUC",
    choices=("none", "exact", "multiple_choice", "math", "builtin"),
  ),
  "reward.rule_weight": Field(0.5, "of mixture: (1 - w) * reference + w * rule", at_least=0, at_most=1),
  "reward.normalization": Field(
    "joint",
    "of mixture: joint (advantages of the sum) | separate (sum of each one's own)",
    choices=("joint", "separate"),
  ),
  "reward.conditional_weight": Field(
    0.0,
    "share of how probable the reference is given the response's own answer (CER), beside 1 - w of its debiased"
    " probability; above 0 each answer of a group is scored after each reasoning of it",
    at_least=0,
    at_most=1,
  ),
  "reward.conditional_pairs": Field(
    0, "of that: after how many of a group's reasonings each answer is scored, its own first; 0 for all", at_least=0
  ),
  "reward.references": Field(
    "first",
    "of a row with several reference answers: first (it alone counts) | best (the most probable one) | mean of all",
    choices=("first", "best", "mean"),
  ),
  "reward.scorer": Field(
    "policy",
    "whose probability: policy | initial (frozen) | lagged (the policy some steps ago)",
    choices=("policy", "initial", "lagged"),
  ),
  "reward.scorer_every": Field(10, "training steps between two copies of the policy for a lagged scorer", at_least=1),
  "reward.aggregate": Field(
    "mean_prob",
    "mean_prob | geometric_mean | product | mean_logprob | weighted_sum (by weights that are not normalised)",
    choices=("mean_prob", "geometric_mean", "product", "mean_logprob", "weighted_sum"),
  ),
  "reward.token_weights": Field(
    "uniform",
    "uniform | inverse (rare tokens) | base, inverse_base, surprise (1 - p', 1 / p', -log p': not known before)"
    " | spread, logprob_spread, logprob_variance (decided by the reasoning)",
    choices=(
      "uniform",
      "inverse",
      "base",
      "inverse_base",
      "surprise",
      "spread",
      "logprob_spread",
      "logprob_variance",
    ),
  ),
  "reward.shaping": Field(
    "clip", "clip | identity | positive | threshold_T | one_minus | sigmoid_K | leaky_T | bins_N | rank | zscore"
  ),
  "reward.baseline_policy": Field(
    "initial",
    "initial | current | moving_average (of probabilities) | averaged_weights (a moving average of the policy) | none",
    choices=("initial", "current", "moving_average", "averaged_weights", "none"),
  ),
  "reward.baseline_when": Field(
    "before",
    "of initial: before (step 1, all prompts) | first_draw (as they come; the initial policy stays in memory for it)",
    choices=("before", "first_draw"),
  ),
  "reward.baseline_rate": Field(
    0.1, "of the two averages: weight of the newest probabilities, or parameters", above=0, at_most=1
  ),
  "reward.baseline_prefix": Field(
    "bare", "bare | tagged (with <answer> before the reference)", choices=("bare", "tagged")
  ),
  "reward.format_coefficient": Field(
    0.1, "share of the format term; -1: a wrong format scores -1", at_least=-1, at_most=1
  ),
  "reward.answer_length_coefficient": Field(
    0.0, "most that is taken off for an answer longer than the reference", at_least=0
  ),
  "reward.length_difference_coefficient": Field(
    0.0, "most that is taken off for an answer longer or shorter than the (first) reference", at_least=0
  ),
  "reward.overlong_coefficient": Field(
    0.0, "most that is taken off for a response near its limit (DAPO's soft overlong penalty)", at_least=0
  ),
  "reward.overlong_buffer": Field(
    512, "of that: tokens before the limit from which on it rises, in a line", at_least=1
  ),
  "reward.concentration_coefficient": Field(
    0.0, "most that is taken off for length in groups of long responses whose scores coincide (RLCPR)", at_least=0
  ),
  "reward.concentration_length": Field(
    0.5, "of that: long is a group whose shortest is above this quantile of a draw's lengths", at_least=0, at_most=1
  ),
  "reward.concentration_gap": Field(
    0.5, "and equal one whose range of scores is below this quantile of a draw's ranges", at_least=0, at_most=1
  ),
  "reward.empty_answer": Field(
    "malformed",
    "an answer of nothing but white space: malformed, as one without its tags | allowed, as published",
    choices=("malformed", "allowed"),
  ),
  "reward.repetition_window": Field(10, "words", at_least=1),
  "reward.repetition_characters": Field(True, "count characters as words where a script puts no spaces between these"),
  "reward.repetition_limit": Field(10, "occurrences of one window from which on the response gets -1", at_least=1),
  "reward.score_temperature": Field(1.0, "of the distribution in which the reference is scored", at_least=0.001),
  "reward.shadow": Field((), 'rewards that are logged and not trained on: ("product: aggregate=product", ...)'),
  # Which prompts are kept.
  "filter.kind": Field(
    "ema",
    "ema | fixed | accuracy (drops all right and all wrong) | share (keeps what spreads most) | off",
    choices=("ema", "fixed", "accuracy", "share", "off"),
  ),
  "filter.scale": Field(0.5, "of the moving average; Qwen 0.5, Llama 0.9, Gemma 1.0", at_least=0),
  "filter.source_scales": Field((), 'of some sources\' own: (("stem", 0.9), ...)'),
  "filter.alpha": Field(0.01, "weight of the newest step in the average", above=0, at_most=1),
  "filter.collect_from": Field(6, "first step (from 1) whose spread enters the average", at_least=1),
  "filter.start": Field(11, "first step that filters", at_least=1),
  "filter.threshold": Field(0.0, 'of kind "fixed": smallest standard deviation kept', at_least=0),
  "filter.share": Field(0.9, 'of kind "share": of the sum of a draw\'s standard deviations', above=0, at_most=1),
  # The update.
  "training.minibatches": Field(4, "optimiser steps a pass over the step's rollouts", at_least=1, at_most=_SIZE),
  "training.epochs_per_step": Field(1, "passes", at_least=1, at_most=1000),
  "training.row_length": Field(
    0,
    "tokens of a row, into which prompts and their responses are packed; 0 for the largest group, to 2,048 or one pair",
    at_least=0,
    at_most=_SIZE,
    may_change=True,
  ),
  "training.micro_batch_rows": Field(
    0,
    "rows whose gradients are taken at once; 0 for one on each part of the mesh",
    at_least=0,
    at_most=_SIZE,
    may_change=True,
  ),
  "training.advantages": Field(
    "std", "std | none (Dr. GRPO) | leave_one_out (RLOO)", choices=("std", "none", "leave_one_out")
  ),
  "training.aggregate": Field(
    "token_mean",
    "token_mean | seq_mean_token_sum | seq_mean_token_mean",
    choices=("token_mean", "seq_mean_token_sum", "seq_mean_token_mean"),
  ),
  "training.loss": Field(
    "clip", "clip (PPO) | truncated (importance weights, REINFORCE)", choices=("clip", "truncated")
  ),
  "training.clip_low": Field(0.2, "the ratio is clipped to [1 - clip_low, 1 + clip_high]", at_least=0),
  "training.clip_high": Field(0.27, "see clip_low", at_least=0),
  "training.dual_clip": Field(
    0.0, "of clip: most times |advantage| that a bad token costs, 3 in its paper; 0 for off", at_least=0
  ),
  "training.ratio": Field(
    "token", "whose probabilities are compared: token | sequence (GSPO)", choices=("token", "sequence")
  ),
  "training.truncated": Field(
    "trained",
    "responses cut at their limit: trained | left_out (of the loss; their groups compare with them as ever)",
    choices=("trained", "left_out"),
  ),
  "training.ratio_cap": Field(2.0, "of truncated: largest importance weight", above=0),
  "training.credit": Field(
    "auto",
    "what an advantage reaches: response (all of its tokens, as published) | parts (the reference's probability those"
    " of the reasoning alone, on which it depends) | auto: parts where they are known, which they are not of"
    " reward.custom, of reward.normalization separate, nor with an answer_gradient",
    choices=("auto", "parts", "response"),
  ),
  "training.answer_gradient": Field(
    "none",
    "through the reference: none (RLPR) | reward (its own gradient, of reward.aggregate) | likelihood (supervised)"
    " | verifree (reward-weighted) | jepo (bound)",
    choices=("none", "reward", "likelihood", "verifree", "jepo"),
  ),
  "training.answer_coefficient": Field(1.0, "of that term", at_least=0),
  "training.kl_coefficient": Field(
    0.0, "of the k3 estimate against the initial policy, which is kept only above 0", at_least=0
  ),
  "training.entropy_coefficient": Field(0.001, "nats of mean token entropy", at_least=0),
  "training.old_logprobs": Field(
    "auto",
    "ratios start from: sampler | trainer (another pass) | auto (by the gap of the two)",
    choices=("auto", "sampler", "trainer"),
  ),
  "training.sampler_gap_limit": Field(
    0.01,
    "of auto: largest share of tokens whose ratio is outside the clip range from the start with which the sampler's are"
    " taken",
    at_least=0,
    at_most=1,
  ),
  "training.importance_cap": Field(
    0.0,
    "tokens count p(trainer) / p(sampler) times, at most so much, where ratios start from the trainer (truncated"
    " importance weights); 0 for off",
    at_least=0,
  ),
  "training.optimizer": Field(
    "adamw",
    "adamw | adafactor (moments by row and column) | muon (linear layers, AdamW on the others) | sgd",
    choices=("adamw", "adafactor", "muon", "sgd"),
  ),
  "training.learning_rate": Field(1e-6, "of the optimiser", at_least=0),
  "training.schedule": Field(
    "constant",
    "constant | linear | cosine: to zero at the last of config.steps",
    choices=("constant", "linear", "cosine"),
  ),
  "training.warmup_steps": Field(0, "training steps in which the rate rises from zero", at_least=0),
  "training.weight_decay": Field(0.01, "of the optimiser, times the rate", at_least=0),
  "training.max_grad_norm": Field(1.0, "gradients of a larger norm are scaled down to it", above=0),
  # Supervised steps.
  "warm_start.steps": Field(
    0, "supervised steps on demonstrations before RLPR, or of rlpr_jax.sft; 0 for none", at_least=0
  ),
  "warm_start.path": Field("", 'demonstrations: prompt and response, named as in data.path; "" for the built-in ones'),
  "warm_start.split": Field("", 'as data.split; "" for all'),
  "warm_start.batch_size": Field(64, "sequences", at_least=1, at_most=_SIZE),
  "warm_start.optimizer": Field(
    "muon", "muon (with Adam for embeddings, head and norms) | adam (for a pretrained model)", choices=("muon", "adam")
  ),
  "warm_start.learning_rate": Field(0.02, "of Muon; both rates follow a cosine to zero", at_least=0),
  "warm_start.adam_learning_rate": Field(0.003, "of Adam", at_least=0),
  # Held-out questions.
  "evaluation.path": Field("", 'held-out questions, as data.path; "" for the built-in ones', may_change=True),
  "evaluation.split": Field("", 'as data.split; "" for all', may_change=True),
  "evaluation.prompts": Field(0, "first so many of them; 0 for no evaluation", at_least=0, may_change=True),
  "evaluation.verifier": Field(
    "builtin",
    "what held-out accuracy counts as right: builtin (as reward.verifier) | exact | multiple_choice | math | number |"
    " inferred (each row by what its reference is), these four as rlpr_jax.evaluate grades",
    choices=("exact", "multiple_choice", "math", "number", "inferred", "builtin"),
    may_change=True,
  ),
  "evaluation.samples": Field(4, "k of Avg@k", at_least=1, at_most=_SIZE, may_change=True),
  "evaluation.temperature": Field(1.0, "of sampling; 0 takes the most probable token", at_least=0, may_change=True),
  "evaluation.top_p": Field(
    1.0,
    "only the most probable tokens that together reach it; training never truncates",
    above=0,
    at_most=1,
    may_change=True,
  ),
  "evaluation.top_k": Field(0, "only so many of the most probable tokens; 0 for all", at_least=0, may_change=True),
  "evaluation.min_p": Field(
    0.0,
    "only tokens at least so many times as probable as the most probable one",
    at_least=0,
    at_most=1,
    may_change=True,
  ),
  "evaluation.stop": Field((), 'strings that end a response, beside EOS: ("Question:", ...)', may_change=True),
  "evaluation.every": Field(
    0,
    "training steps between evaluations; 0 for before the first and after the last alone",
    at_least=0,
    may_change=True,
  ),
  # Signs of a run that goes wrong (docs/running.md).
  "guards.max_skipped": Field(
    5,
    "updates in a row with a loss or gradient that is not finite, at which the run stops",
    at_least=1,
    may_change=True,
  ),
  "guards.patience": Field(
    5, "steps in a row after which a sign of collapse, of those below, is an alarm", at_least=1, may_change=True
  ),
  "guards.stop": Field(False, "whether an alarm stops the run, beside being printed and saved", may_change=True),
  "guards.min_length_share": Field(0.25, "of the first steps' mean response length", at_least=0, may_change=True),
  "guards.max_truncated": Field(
    0.5,
    "share of responses that reach their limit, as of a policy that does not end",
    at_least=0,
    may_change=True,
  ),
  "guards.max_empty_answers": Field(0.2, "share of answers that are empty", at_least=0, may_change=True),
  "guards.min_answer_length": Field(
    0.2, "characters of answers over those of their references, in the mean", at_least=0, may_change=True
  ),
  "guards.max_answer_length": Field(5.0, "the same", at_least=0, may_change=True),
  "guards.min_exact_share": Field(
    0.25,
    "of the first steps' share of answers with the reference's very text, as of answers whose form drifts away",
    at_least=0,
    may_change=True,
  ),
  "guards.max_not_finite": Field(0.1, "share of rewards that are not finite", at_least=0, may_change=True),
  "guards.max_step_kl": Field(
    0.1, "nats a token that a step moves the policy, as of a rate that is too high", at_least=0, may_change=True
  ),
  "guards.min_entropy": Field(0.01, "nats a token", at_least=0, may_change=True),
  "guards.min_format": Field(0.2, "share of well-formed responses", at_least=0, may_change=True),
  "guards.min_gain": Field(
    0.0, "of r over r': what reasoning adds to the reference answer's probability", may_change=True
  ),
  "guards.max_accuracy_lost": Field(
    0.1,
    "how far held-out accuracy may fall under its best so far, as of answers that drift",
    at_least=0,
    may_change=True,
  ),
  # What is written (docs/running.md).
  "log.trackers": Field(
    ("tensorboard",),
    'who is told of config, metrics and rollouts, each an extra of this package: ("tensorboard", "wandb", "trackio",'
    ' "mlflow")',
    may_change=True,
  ),
  "log.project": Field("rlpr_jax", "the run's project (experiment) at the last three", may_change=True),
  "log.tracker_seconds": Field(
    60.0, "how long those may take for what is left when a run ends", at_least=0, may_change=True
  ),
  "log.rollouts": Field(16, "responses written to disk each step, whole groups first", at_least=0, may_change=True),
  "log.checkpoint_every": Field(10, "training steps; the last one is always saved", at_least=1, may_change=True),
  "log.keep_checkpoints": Field(2, "of the newest", at_least=1, may_change=True),
  "log.keep_best": Field(
    1, "and of those with the best held-out accuracy, which are saved when it is measured", at_least=0, may_change=True
  ),
  "log.retry_seconds": Field(
    300.0, "how long a disk that is full or gone is tried again before the run stops", at_least=0, may_change=True
  ),
  # Exports while the run goes on (docs/running.md).
  "export.every": Field(
    0,
    "training steps between exports of the policy to WORKDIR/exports/step_NNNNNN, and one after the last; 0 for none",
    at_least=0,
    may_change=True,
  ),
  "export.keep": Field(1, "of the newest there", at_least=1, may_change=True),
  "export.dtype": Field(
    "bfloat16", "of their weights: bfloat16 | float32", choices=("bfloat16", "float32"), may_change=True
  ),
  "export.push": Field(
    "", 'repository of the hub (org/name) that each is sent to, by the token in HF_TOKEN; "" for none', may_change=True
  ),
}


def default() -> ConfigDict:
  """The method as the paper runs it on Qwen2.5, on data and a model to be named; credit by parts is not the paper's.

  >>> default().prompts_per_step
  768
  """
  config = ConfigDict()
  for path, field in FIELDS.items():
    *groups, name = path.split(".")
    group = config
    for part in groups:
      if part not in group:
        group[part] = ConfigDict()
      group = group[part]
    group[name] = field.default
  return config.lock()  # a recipe's misspelt field is an error, and not a field of its own


class SliceSettings(NamedTuple):
  """A recipe's settings for a slice of devices: their numbers along axes of `config.mesh`, and rows of all of them."""

  tensor: int
  micro_batch_rows: int
  slots: int
  prefill_prompts: int
  score_rows: int
  data: int = 1  # copies of the parameters


def setting_of(settings: Mapping[str, T], name: str) -> T:
  """What a recipe has for what stands behind its name, as in `configs/X.py:v5p:4x4x4`.

  Raises:
    InputError: it has nothing of that name.

  >>> setting_of({"v5e:2x4": 8}, "v5e:2x4")
  8
  """
  if name not in settings:
    raise InputError(f"--config: {name!r} after the recipe, expected nothing or one of {', '.join(settings)}")
  return settings[name]


def set_slice(config: ConfigDict, slices: dict[str, SliceSettings], name: str) -> None:
  """Sets what a recipe has for the devices that stand behind its name, `configs/X.py:v5p:4x4x4`; for "" nothing.

  Raises:
    InputError: the recipe has nothing for them.
  """
  if name:
    chosen = setting_of(slices, name)
    config.mesh.data, config.mesh.tensor = chosen.data, chosen.tensor
    config.training.micro_batch_rows = chosen.micro_batch_rows
    config.rollout.slots, config.rollout.score_rows = chosen.slots, chosen.score_rows
    config.rollout.prefill_prompts = chosen.prefill_prompts


def longest_sequence(config: ConfigDict) -> int:
  """Most tokens of a prompt and its response, the reference answer included where a gradient goes through it.

  >>> config = default()
  >>> config.data.prompt_limit, config.rollout.max_response_length = 100, 400
  >>> longest_sequence(config)
  500
  """
  answer = config.data.max_reference_length if config.training.answer_gradient != "none" else 0
  return int(config.data.prompt_limit + config.rollout.max_response_length + answer)


def longest_text(config: ConfigDict) -> int:
  """Most tokens of a prompt, its reasoning and the reference answer behind it, as a scorer reads them."""
  return int(config.data.prompt_limit + config.rollout.max_response_length + config.data.max_reference_length)


def max_references(config: ConfigDict) -> int | None:
  """M, the most reference answers of a row that are scored; None where the first of each alone is.

  >>> config = default()
  >>> config.reward.references = "best"
  >>> max_references(config)
  4
  """
  return None if config.reward.references == "first" else int(config.data.max_references)


def flatten(group: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values by the paths of their fields, of a config or of what JSON makes of one.

  >>> flatten({"seed": 0, "model": {"path": "m"}})
  {'seed': 0, 'model.path': 'm'}
  """
  flat: dict[str, Any] = {}
  for name, value in group.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, ConfigDict | dict) else {prefix + name: value}
  return flat


def to_json(config: ConfigDict) -> str:
  """The whole config, sorted, as it stands in WORKDIR/config.json.

  >>> json.loads(to_json(default()))["seed"]
  0
  """
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def check_fields(config: ConfigDict) -> None:
  """Checks that a config has all fields and no others, and each value by itself.

  Raises:
    InputError: naming the field, its value and what was expected.
  """
  values = flatten(config)
  if missing := [path for path in FIELDS if path not in values]:
    raise InputError(f"config.{missing[0]}: missing, expected the config of a run, made by rlpr_jax.config.default()")
  if unknown := [path for path in values if path not in FIELDS]:
    raise InputError(f"config.{unknown[0]}: there is no such field")
  for path, field in FIELDS.items():
    check_value(f"config.{path}", field, values[path])


def read_fields(path: pathlib.Path) -> dict[str, Any]:
  """The object of a file of JSON in which a config is to be.

  Raises:
    InputError: it is missing, or something else.
  """
  try:
    fields = json.loads(path.read_text())
  except FileNotFoundError:
    raise InputError(f"{path}: missing, expected the config of a run") from None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())[:200]})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{path}: {show(fields)}, expected the config of a run, an object")
  return fields


def read(path: pathlib.Path) -> ConfigDict:
  """A config that `to_json` wrote.

  Raises:
    InputError: missing, or not such a config.
  """
  config, values = default(), flatten(read_fields(path))
  for name, value in values.items():
    if name not in FIELDS:
      raise InputError(f"{path}: config.{name}: there is no such field")
    check_value(f"{path}: config.{name}", FIELDS[name], value)
  with config.ignore_type():  # JSON has no tuples
    config.update_from_flattened_dict(values)
  return config


def first_difference(saved: dict[str, Any], config: ConfigDict) -> str | None:
  """Where a saved config says another run: "field: saved value, not value"; None if a run may be resumed with it.

  >>> saved = json.loads(to_json(default()))
  >>> first_difference(saved | {"seed": 1}, default())
  'config.seed is 1 there, 0 here'
  """
  defaults, now = (flatten(json.loads(to_json(one))) for one in (default(), config))
  before = defaults | flatten(saved)  # a run of a version without a field was run with what is its default now
  for field in sorted(before | now):
    may_change = field in FIELDS and FIELDS[field].may_change
    if not may_change and before.get(field) != now.get(field):
      return f"config.{field} is {before.get(field)!r} there, {now.get(field)!r} here"
  return None
