"""Settings of an evaluation: which models, which benchmarks, which judge.

A recipe calls `default()`, then names models and benchmarks: `c.models.policy = model(path=DIR)`,
`c.benchmarks.math500 = benchmark()`. The command line changes their fields (`--config.models.policy.path=DIR`).
"""

from ml_collections import ConfigDict

from rlpr_jax import rewards
from rlpr_jax.errors import InputError
from rlpr_jax.evaluation.benchmarks import BENCHMARKS
from rlpr_jax.fields import Field, check_value
from rlpr_jax.judging.client import RESPONSE_FORMATS

# Least and most of a number; of the others at least 0, and what `fields.LARGEST` says.
_BOUNDS: dict[str, tuple[float, float | None]] = {
  "seed": (0, 2**32 - 1),
  "resamples": (100, 10**6),
  "concurrency": (1, 10**6),
  "time_limit": (0.001, 10**6),
  "attempts": (1, 10**6),
  "step": (-1, None),
  "temperature": (0, 10),
  "top_p": (0, 1),
  "min_p": (0, 1),
  "max_tokens": (1, 2**20),
  "prompt_limit": (1, 2**20),
  "slots": (1, 2**20),
  "decode_steps": (1, 2**20),
}


def default() -> ConfigDict:
  """No models and no benchmarks yet; no judge.

  >>> len(default().models), default().judge.when
  (0, 'wrong')
  """
  c = ConfigDict()
  c.seed = 0  # decides which questions are drawn, and the responses of our own engine
  c.greedy = True  # one greedy response to each question beside the sampled ones
  c.resamples = 10_000  # of the bootstrap over questions
  c.compilation_cache = "~/.cache/rlpr_jax"  # compiled programs are kept here between runs; "" for nowhere
  c.models = ConfigDict(sort_keys=False)  # by a name of your own: `model()`; the first is what others are compared with
  c.benchmarks = ConfigDict(
    sort_keys=False
  )  # by the benchmark's name, or of a file by a name of your own: `benchmark()`

  c.judge = ConfigDict()
  c.judge.url = ""  # up to and with /v1, of any OpenAI-compatible endpoint; "" for no judge
  c.judge.model = ""  # as the endpoint names it
  c.judge.key_variable = ""  # environment variable with the endpoint's key
  c.judge.when = "wrong"  # asked where the rule says: wrong | always
  c.judge.all_benchmarks = False  # or only where the paper asks a judge: TheoremQA, Minerva, WebInstruct, files
  c.judge.concurrency = 16  # requests at once
  c.judge.time_limit = 120.0  # seconds a request
  c.judge.attempts = 5  # of a request, with growing pauses
  c.judge.max_tokens = 1024  # of a verdict
  c.judge.response_format = "json_schema"  # of a verdict, where the endpoint takes that: json_schema | text
  c.judge.price_in = 0.0  # dollars a million prompt tokens; 0 if unknown
  c.judge.price_out = 0.0
  return c


def model(**changes) -> ConfigDict:
  """A model and how it is asked, with some fields changed. The defaults are the paper's for its own models.

  >>> model(path="runs/first", top_p=0.9).top_p
  0.9
  """
  c = ConfigDict()
  c.path = ""  # directory of a run, Hugging Face directory, or name on the hub (org/name)
  c.step = -1  # checkpoint of a run; -1 for the newest
  c.url = ""  # instead of a path: an OpenAI-compatible endpoint, up to and with /v1
  c.name = ""  # of the model at the endpoint
  c.key_variable = ""  # environment variable with the endpoint's key
  c.concurrency = 16  # requests at once, to the endpoint
  c.time_limit = 600.0  # seconds a request
  c.attempts = 5  # of a request, with growing pauses
  c.template = "default"  # of the instruction: think | answer_only | default (a run's own, else think)
  c.instruction = "default"  # system message: "default" is a run's own, else the template's; "" none; else the text
  c.temperature = 1.0  # of the sampled responses
  c.top_p = 1.0  # only the most probable tokens that together reach it
  c.top_k = 0  # only so many of the most probable tokens; 0 for all; not at an endpoint
  c.min_p = 0.0  # only tokens at least so many times as probable as the most probable one; not at an endpoint
  c.stop = ()  # strings that end a response, beside EOS; not at an endpoint
  c.max_tokens = 3072  # of a response
  c.prompt_limit = 2048  # tokens; a longer prompt is refused, counted, and its samples are wrong, if they are few
  c.dtype = "float32"  # float32 | bfloat16, of weights and computation
  c.slots = 32  # responses that are sampled at once
  c.decode_steps = 16  # tokens between two looks at which responses have ended
  c.lock()
  c.update(changes)
  return c


def benchmark(**changes) -> ConfigDict:
  """A benchmark, with some fields changed.

  >>> benchmark(limit=100).limit
  100
  """
  c = ConfigDict()
  c.path = ""  # .parquet, .jsonl, .json or .csv in the benchmark's own columns, or of your own; "" for the hub
  c.split = ""  # "" for the benchmark's own
  c.subset = ""  # configuration on the hub, such as a task of BBH; "" for the benchmark's own
  c.limit = 0  # so many of its questions, drawn by config.seed; 0 for all
  c.samples = 0  # k of Avg@k; 0 for the paper's
  c.lock()
  c.update(changes)
  return c


def validate(config: ConfigDict) -> None:
  """Checks what types alone cannot say.

  Raises:
    InputError: naming the field, its value and what was expected.
  """
  if missing := [name for name in default() if name not in config]:
    raise InputError(f"config.{missing[0]}: missing, expected the config of an evaluation, as configs/evaluate.py")
  _check_fields("config", config, default())
  _check_fields("config.judge", config.judge, default().judge)
  if not config.models:
    raise InputError("config.models: empty, expected one or more")
  if not config.benchmarks:
    raise InputError("config.benchmarks: empty, expected one or more")
  if config.judge.when not in ("wrong", "always"):
    raise InputError(f"config.judge.when: {config.judge.when!r}, expected wrong or always")
  if config.judge.response_format not in RESPONSE_FORMATS:
    expected = " or ".join(RESPONSE_FORMATS)
    raise InputError(f"config.judge.response_format: {config.judge.response_format!r}, expected {expected}")
  if bool(config.judge.url) != bool(config.judge.model):
    raise InputError("config.judge: expected both url and model, or neither")
  for name, settings in config.models.items():
    _check_model(f"config.models.{name}", settings)
  for name, settings in config.benchmarks.items():
    where = f"config.benchmarks.{name}"
    _check_fields(where, settings, benchmark())
    if name not in BENCHMARKS and not settings.path:
      raise InputError(f"{where}.path: missing, expected a file, or one of the benchmarks {', '.join(BENCHMARKS)}")


def _check_model(where: str, settings: ConfigDict) -> None:
  _check_fields(where, settings, model())
  if bool(settings.path) == bool(settings.url):
    raise InputError(f"{where}: expected a path, or the url of an endpoint")
  if settings.url and not settings.name:
    raise InputError(f"{where}.name: missing, expected the model's name at the endpoint")
  templates = "default", *rewards.TEMPLATE_TAGS
  if settings.template not in templates:
    raise InputError(f"{where}.template: {settings.template!r}, expected {' or '.join(templates)}")
  if not all(isinstance(text, str) and text for text in settings.stop):
    raise InputError(f"{where}.stop: {settings.stop!r}, expected texts, none empty")
  if settings.dtype not in ("float32", "bfloat16"):
    raise InputError(f"{where}.dtype: {settings.dtype!r}, expected float32 or bfloat16")
  neutral = model()
  for field in ("top_k", "min_p", "stop", "step", "dtype", "prompt_limit", "slots", "decode_steps"):
    if settings.url and settings[field] != neutral[field]:
      raise InputError(f"{where}.{field}: {settings[field]!r}, an endpoint is not asked for that")


def _check_fields(where: str, settings: ConfigDict, expected: ConfigDict) -> None:
  """Checks that a group has all fields and no others, and each value by itself."""
  if not isinstance(settings, ConfigDict):
    raise InputError(f"{where}: {settings!r}, expected a group of fields")
  for name in settings:
    if name not in expected:
      raise InputError(f"{where}.{name}: unknown, expected some of {', '.join(expected)}")
  for name in expected:
    if name not in settings:
      raise InputError(f"{where}.{name}: missing; make it by the functions of rlpr_jax.evaluation.config")
  for name, value in expected.items():
    if not isinstance(value, ConfigDict):
      least, most = _BOUNDS.get(name, (0, None))
      check_value(f"{where}.{name}", Field(value, "", at_least=least, at_most=most), settings[name])
