"""Evaluation: `rlpr evaluate --config=RECIPE --workdir=DIR`.

    benchmarks -> questions -> responses (our engine or an endpoint) -> rule -> judge -> figures, tables, a picture

WORKDIR/responses.jsonl grows while models answer; an evaluation that was interrupted goes on from it. Grades are made
anew each time: WORKDIR/samples.jsonl, summary.json, summary.md, summary.png.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rlpr_jax import entry
from rlpr_jax.compilation import keep_programs
from rlpr_jax.errors import InputError
from rlpr_jax.evaluation import benchmarks, config, summary
from rlpr_jax.evaluation.benchmarks import BENCHMARKS, Question
from rlpr_jax.evaluation.responses import Store, Task, keys, missing, open_model, respond
from rlpr_jax.evaluation.summary import Graded, Sample
from rlpr_jax.grading import graders, mathverify
from rlpr_jax.judging import judge
from rlpr_jax.judging.client import Cache, Client, Endpoint, Usage
from rlpr_jax.judging.judge import JudgeItem
from rlpr_jax.runs import storage
from rlpr_jax.runs.metrics import Progress


class Loaded(NamedTuple):
  """A benchmark of the config."""

  name: str
  questions: list[Question]
  samples: int  # k of Avg@k
  free_form: bool  # whether the paper also asks a judge
  dropped: dict[str, int]  # rows that are no questions, by reason


def evaluate(settings: ConfigDict, workdir: pathlib.Path) -> None:
  """Evaluates the models of a config on its benchmarks.

  Raises:
    InputError: wrong input, or an endpoint that did not answer all questions.
  """
  config.validate(settings)
  if jax.process_count() > 1:
    raise InputError("evaluate: many processes, expected one; it uses all devices of its own host")
  loaded = [_load(name, of, settings.seed) for name, of in settings.benchmarks.items()]
  if any(form.grader == "math" for benchmark in loaded for question in benchmark.questions for form in question.forms):
    mathverify.check_installed()
  judging = _open_judge(settings.judge) if settings.judge.url else None
  models = {name: open_model(model, f"config.models.{name}") for name, model in settings.models.items()}
  entry.open_workdir(workdir)
  keep_programs(settings.compilation_cache)
  store = Store(workdir)
  everything, timeouts = [], mathverify.process.timeouts
  for name, asked in models.items():
    tasks = keys(asked, settings.seed, _tasks(loaded, settings.greedy))
    if to_ask := missing(asked, tasks, store):
      respond(asked, settings.seed, to_ask, store, progress=Progress(f"{name}, question"))
    everything += _grade(name, loaded, tasks, store)
  timeouts = mathverify.process.timeouts - timeouts
  if judging:
    everything = _judge(everything, loaded, settings.judge, client=judging, workdir=workdir)
  write = functools.partial(_write, everything, loaded, settings, asked=judging, timeouts=timeouts, workdir=workdir)
  storage.persist(write, workdir / "summary.json", seconds=60)


def _load(name: str, settings: ConfigDict, seed: int) -> Loaded:
  known = BENCHMARKS.get(name)
  questions, dropped = benchmarks.load(
    name if known else "own", settings.path, settings.split, limit=settings.limit, seed=seed, subset=settings.subset
  )
  said = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
  print(f"{name}: {len(questions)} questions, dropped: {said}", flush=True)
  samples = settings.samples or (known.samples if known else 2)
  return Loaded(name, questions, samples, free_form=known.free_form if known else True, dropped=dropped)


def _tasks(loaded: Sequence[Loaded], greedy: bool) -> list[Task]:
  tasks = []
  for benchmark in loaded:
    for question in benchmark.questions:
      tasks.append(Task(benchmark.name, question, "sampled", benchmark.samples))
      if greedy:
        tasks.append(Task(benchmark.name, question, "greedy", 1))
  return tasks


def _grade(model: str, loaded: Sequence[Loaded], tasks: dict[str, Task], store: Store) -> list[Graded]:
  """The rule's grades of all that a model answered."""
  stored = {(task.benchmark, task.mode, task.question.id): store.get(key) for key, task in tasks.items()}
  modes = list(dict.fromkeys(task.mode for task in tasks.values()))
  progress, done = Progress(f"{model}, graded"), 0
  everything = []
  for benchmark in loaded:
    for mode in modes:
      rows = []
      for question in benchmark.questions:
        responses = stored[benchmark.name, mode, question.id]
        rows.append([Sample(response, graders.grade(question, response.text), None) for response in responses])
        progress(done := done + 1, len(tasks))
      everything.append(Graded(model, benchmark.name, mode, benchmark.questions, samples=rows, judged=False))
  return everything


def _open_judge(settings: ConfigDict) -> Client:
  return Client(
    Endpoint(
      base_url=settings.url,
      model=settings.model,
      key_variable=settings.key_variable,
      concurrency=settings.concurrency,
      time_limit=settings.time_limit,
      attempts=settings.attempts,
      max_tokens=settings.max_tokens,
      response_format=settings.response_format,
      price_in=settings.price_in,
      price_out=settings.price_out,
    )
  )


def _judge(
  everything: Sequence[Graded], loaded: Sequence[Loaded], settings: ConfigDict, client: Client, workdir: pathlib.Path
) -> list[Graded]:
  """Grades with the judge's verdicts where it is asked."""
  free_form = {benchmark.name for benchmark in loaded if benchmark.free_form or settings.all_benchmarks}

  def is_asked(graded: Graded, sample: Sample) -> bool:
    return graded.benchmark in free_form and (settings.when == "always" or not sample.grade.right)

  items = [
    JudgeItem(question.prompt, question.gold, sample.grade.answer)
    for graded in everything
    for question, row in zip(graded.questions, graded.samples, strict=True)
    for sample in row
    if is_asked(graded, sample)
  ]
  verdicts = iter(judge.judge_all(items, client, Cache(workdir / "verdicts"), Progress("judged")))

  def with_verdict(graded: Graded, sample: Sample) -> Sample:
    return sample._replace(verdict=next(verdicts)) if is_asked(graded, sample) else sample

  return [
    graded._replace(
      samples=[[with_verdict(graded, sample) for sample in row] for row in graded.samples],
      judged=graded.benchmark in free_form,
    )
    for graded in everything
  ]


def _write(
  everything: Sequence[Graded],
  loaded: Sequence[Loaded],
  settings: ConfigDict,
  asked: Client | None,
  timeouts: int,
  workdir: pathlib.Path,
) -> None:
  lines = [
    json.dumps(_row(graded, question, i, sample))
    for graded in everything
    for question, row in zip(graded.questions, graded.samples, strict=True)
    for i, sample in enumerate(row)
  ]
  all_figures = summary.summarize(everything, settings.resamples, settings.seed)
  all_figures["dropped"] = {benchmark.name: benchmark.dropped for benchmark in loaded}
  all_figures["judge"] = _usage(settings.judge, asked.usage) if asked else None
  all_figures["timeouts"] = timeouts
  notes = [_note(settings.judge, asked.usage)] if asked else []
  if timeouts:
    notes.append(f"Mathematics: {timeouts} comparisons of answer and reference took too long; they are wrong by rule.")
  page = summary.to_markdown(all_figures, notes)
  storage.write_atomically(workdir / "samples.jsonl", "\n".join(lines) + "\n")
  storage.write_atomically(workdir / "config.json", json.dumps(settings.to_dict(), indent=2, sort_keys=True))
  summary.draw(all_figures, workdir / "summary.png")
  storage.write_atomically(workdir / "summary.json", json.dumps(all_figures, indent=2))
  storage.write_atomically(workdir / "summary.md", page)
  for model, averages in all_figures["models"].items():
    for name, modes in averages.items():
      for mode, figures in modes.items():
        said = f"{model}, {name}, {mode}: {summary.percent(figures['rule']['avg'])} by rule"
        if "judge" in figures:
          said += f", {summary.percent(figures['judge']['avg'])} by judge ({figures['unjudged']} unjudged)"
        if figures["refused"]:
          said += f", {figures['refused']} of {figures['questions'] * figures['samples']} samples refused"
        print(said)
  if timeouts:
    print(f"{timeouts} comparisons of mathematical answers took too long: wrong by rule")
  print(f"summary: {workdir / 'summary.md'}")


def _row(graded: Graded, question: Question, i: int, sample: Sample) -> dict[str, object]:
  verdict = {} if sample.verdict is None else {"judge": sample.verdict.right, "judge_why": sample.verdict.why}
  return {
    "model": graded.model,
    "benchmark": graded.benchmark,
    "id": question.id,
    "category": question.category,
    "mode": graded.mode,
    "sample": i,
    "question": question.prompt,
    "reference": question.gold,
    **sample.response._asdict(),
    "rule": sample.grade.right,
    "rule_why": sample.grade.why,
    "answer": sample.grade.answer,
    "found_by": sample.grade.path,
    **verdict,
  }


def _usage(settings: ConfigDict, usage: Usage) -> dict[str, object]:
  return {"model": settings.model, "when": settings.when, **vars(usage)}


def _note(settings: ConfigDict, usage: Usage) -> str:
  asked = "where the rule says wrong" if settings.when == "wrong" else "about every sample"
  cost = f", {usage.cost:.2f} dollars" if usage.cost else ""
  return (
    f"Judge: {settings.model}, asked {asked}: {usage.requests} requests, {usage.cached} verdicts from disk,"
    f" {usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens{cost}."
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  entry.run(evaluate, argv, __doc__, recipe="evaluate")


if __name__ == "__main__":
  main()
