"""The card of a model that a run has trained: README.md of its directory, as the Hugging Face hub shows it."""

import io
import pathlib
import pprint
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from rlpr_jax import config as configs
from rlpr_jax.report import charts
from rlpr_jax.report.charts import Panel
from rlpr_jax.report.records import EXACT, Json, Run
from rlpr_jax.runs import ACCURACY

CURVE = "curve.png"
PANELS = (
  Panel("Held-out accuracy", "share correct", {ACCURACY: "right", EXACT: "the reference's text"}),
  Panel("Reward", "mean of responses", {"reward/total": ""}),
  Panel("Response length", "tokens", {"rollout/response_length": ""}),
  Panel("Supervised loss", "nats a token", {"sft/loss": ""}),
)
SHOWN = 10  # rows of the table of steps
COLUMNS = {
  "reward/total": "reward",
  "reward/reference": "r",
  "reward/baseline": "r'",
  "rollout/response_length": "length",
  ACCURACY: "held-out accuracy",
  "sft/loss": "supervised loss",
}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OF_MACHINE = ("compilation_cache",)  # where something is on one machine, and no part of what was run


def model_card(
  name: str,
  run: Run,
  step: int,
  program: str,
  versions: Mapping[str, str],
  commit: str = "",
  adapter: bool = False,
  evaluation: str = "",
) -> str:
  """The card, in Markdown.

  Args:
    name: of the model.
    run: whose rows end with the step that was exported.
    program: train | sft.
    versions: of what wrote the directory, by package.
    commit: of the source, if it is known.
    adapter: whether the directory holds adapters alone.
    evaluation: figures in Markdown, by `evaluation.summary.accuracy_tables`.
  """
  fields = configs.flatten(run.config)
  base, data = fields["model.path"], fields["data.path" if program == "train" else "warm_start.path"]
  hub = {"base_model": base, "datasets": data.partition(":")[0]}
  front = ModelCardData(
    library_name="peft" if adapter else "transformers",
    pipeline_tag="text-generation",
    tags=["rlpr", "rlpr_jax", "reinforcement-learning"] if program == "train" else ["rlpr_jax", "sft"],
    **{key: value for key, value in hub.items() if is_on_hub(value)},
  )
  how = (
    "reinforcement learning from reference answers ([RLPR](https://arxiv.org/abs/2506.18254))"
    if program == "train"
    else "supervised steps"
  )
  what = "Adapters (LoRA, as peft loads them)" if adapter else "A model"
  asked = fields["steps" if program == "train" else "warm_start.steps"]
  parts = [
    f"---\n{front.to_yaml()}\n---",
    f"# {name}",
    f"{what} after step {step} of {asked} of {how} with rlpr_jax.",
    table(["", ""], _facts(fields, program, base, data)),
  ]
  if rows := _course(run):
    parts += ["## Curve", f"![What the run measured after each step]({CURVE})", rows]
  if evaluation:
    parts += ["## Evaluation", evaluation]
  packages = ", ".join(f"{package} {version}" for package, version in versions.items())
  parts += [
    "## How to reproduce it",
    f"Save this recipe as `recipe.py`; what it does not name has its default in rlpr_jax {versions['rlpr_jax']}.",
    f"```python\n{recipe(fields)}```",
    f"```\nrlpr {program} --config=recipe.py --workdir=DIR\nrlpr export --workdir=DIR --out=MODEL --step={step}\n```",
    f"Written by {packages}{f', source {commit}' if commit else ''}.",
  ]
  return "\n\n".join(parts) + "\n"


def _facts(fields: Json, program: str, base: str, data: str) -> list[tuple[str, str]]:
  """What the model is made of, by fields of the config."""
  begun = f"`{without_directories(base)}`" if base else "none: random weights and the built-in tokenizer"
  facts = [("base model", begun)]
  if fields["lora.rank"]:
    facts.append(("adapters", f"LoRA of rank {fields['lora.rank']}, alpha {fields['lora.alpha']:g}"))
  if program == "sft":
    rows = f"`{without_directories(data)}`" if data else f"built-in demonstrations ({fields['data.domains']})"
    return [*facts, ("demonstrations", rows), ("batch", f"{fields['warm_start.batch_size']} sequences")]
  questions = f"`{without_directories(data)}`" if data else f"built-in questions ({fields['data.domains']})"
  changed = [
    name
    for name, value in fields.items()
    if name.startswith("reward.") and value != _default(name) and name not in (*_REWARD, "reward.shadow")
  ]
  reward = [f"{name.removeprefix('reward.')} {without_directories(str(fields[name]))}" for name in (*_REWARD, *changed)]
  update = (
    f"{fields['prompts_per_step']} prompts x {fields['samples_per_prompt']} responses, {fields['training.optimizer']}"
  )
  return [
    *facts,
    ("questions", questions),
    ("reward", ", ".join(reward)),
    ("filter", fields["filter.kind"]),
    ("step", f"{update}, learning rate {fields['training.learning_rate']:g}"),
    ("responses", f"at most {fields['rollout.max_response_length']} tokens"),
  ]


_REWARD = ("reward.kind", "reward.aggregate", "reward.baseline_policy", "reward.shaping", "reward.format_coefficient")


def _default(name: str) -> Any:
  value = configs.FIELDS[name].default
  return list(value) if isinstance(value, tuple) else value  # as JSON has it


def _course(run: Run) -> str:
  """A table of some steps, the first and the last among them; "" of a run without any."""
  names = [name for name in COLUMNS if len(run.series(name))]
  steps = [step for step, row in run.rows.items() if any(name in row for name in names)]
  evaluated = [step for step in steps if ACCURACY in run.rows[step]]
  steps = evaluated if len(evaluated) > 2 else steps
  if not steps:
    return ""
  places = sorted({round(i * (len(steps) - 1) / max(SHOWN - 1, 1)) for i in range(SHOWN)})
  rows = [
    [steps[place], *(_show(run.rows[steps[place]].get(name), share=name == ACCURACY) for name in names)]
    for place in places
  ]
  return table(["step", *(COLUMNS[name] for name in names)], rows)


def _show(value: float | None, share: bool) -> str:
  if value is None:
    return "-"
  return f"{100 * value:.1f}%" if share else f"{value:.4g}"


def draw_curve(run: Run) -> bytes | None:
  """The panels of which the run has something, side by side. PNG; None where there is nothing."""
  panels = [panel for panel in PANELS if any(len(run.series(key)) for key in panel.lines)]
  if not panels:
    return None
  with matplotlib.rc_context(charts.SETTINGS):
    figure = Figure(figsize=(3.6 * len(panels), 2.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
      axes.set_title(panel.title, fontsize=9)
      charts.draw_panel(axes, run, panel)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
  return content.getvalue()


def recipe(fields: Json) -> str:
  """A recipe that gives a config, in Python; of a path on one machine the last part alone.

  >>> print(recipe({"seed": 0, "steps": 40, "data.path": "/home/me/law.jsonl"}))
  from rlpr_jax.config import default
  <BLANKLINE>
  <BLANKLINE>
  def get_config():
    c = default()
    c.steps = 40
    c.data.path = 'law.jsonl'
    return c
  <BLANKLINE>
  """
  lines = []
  for name, value in fields.items():
    if name in configs.FIELDS and value != _default(name) and name not in _OF_MACHINE:
      value = tuple(value) if isinstance(value, list) else value
      value = without_directories(value) if isinstance(value, str) else value
      shown = pprint.pformat(value, width=100).replace("\n", "\n      ")
      lines.append(f"  c.{name} = {shown}\n")
  return f"from rlpr_jax.config import default\n\n\ndef get_config():\n  c = default()\n{''.join(lines)}  return c\n"


def is_on_hub(path: str) -> bool:
  """Whether a path is a name on the hub, of a model or of a data set.

  >>> is_on_hub("Qwen/Qwen2.5-0.5B"), is_on_hub("/models/qwen")
  (True, False)
  """
  return bool(_HUB_NAME.fullmatch(path)) and not pathlib.Path(path).exists()


def without_directories(text: str) -> str:
  """Of each path on this machine, several with commas between them, its last part: a card is for others.

  >>> without_directories("/home/me/law.jsonl:2,org/sums"), without_directories("rewards.py:mine")
  ('law.jsonl:2,org/sums', 'rewards.py:mine')
  """
  parts = [part.rpartition("/")[2] if part.startswith(("/", "~", "./", "../")) else part for part in text.split(",")]
  return ",".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Rows in Markdown.

  >>> print(table(["step", "r"], [[1, "a|b"]]))
  | step | r |
  |---|---|
  | 1 | a\\|b |
  """
  lines = [head, *rows]
  shown = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
  return "\n".join([shown[0], "|" + "---|" * len(head), *shown[1:]])
