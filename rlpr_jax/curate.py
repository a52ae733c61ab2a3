"""From questions to those worth training on: `rlpr curate --path=FILE --out=DIR [...]`.

DIR gets train.parquet (the layout of the RLPR training set), dropped.jsonl (every dropped row and why), report.html and
curation.json (the settings and counts). Cheap checks come first: answers, mathematics, duplicates, overlap with
benchmarks. Then a language model rates what is left, if --judge_url names one. Its ratings are kept in DIR/ratings: the
same command goes on where it was stopped.
"""

import asyncio
import dataclasses
import hashlib
import json
import math
import pathlib
import reprlib
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from rlpr_jax import command_line
from rlpr_jax.curation import checks
from rlpr_jax.curation.checks import Dropped, Protected, Rating, Score
from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.data.tables import read_rows
from rlpr_jax.errors import InputError, MachineError, exit_with_one_line, trouble
from rlpr_jax.judging.client import Cache, Client, Endpoint, ReplyFormat, Unanswered, ask_all
from rlpr_jax.report import funnel
from rlpr_jax.runs.storage import reason, write_atomically

_QUESTIONS = ("question", "Question", "problem", "Problem", "prompt")  # columns of a benchmark
_OPTIONS = ("options", "choices")
_LETTERS = string.ascii_uppercase
_SCORES = ("row", "std", "gain")
_ROLLOUT = ("reward_reference", "reward_baseline", "group_std")


@dataclasses.dataclass(frozen=True)
class Options:
  """Settings of a curation; the flags of the program explain them."""

  path: pathlib.Path
  out: pathlib.Path
  split: str = ""
  benchmarks: tuple[pathlib.Path, ...] = ()
  answer_words: int = 25
  keep_mathematics: bool = False
  ngram: int = 13
  similarity: float = 0.8
  judge: Endpoint | None = None
  reasoning: int = 2
  unjudged: str = "keep"
  scores: pathlib.Path | None = None
  keep: int = 0


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    curate(read_flags(command_line.parse(define_flags(), argv, __doc__)))


def read_flags(given: flags.FlagValues) -> Options:
  """The options that the command line gives.

  Raises:
    InputError: one is missing, or makes no sense without another.
  """
  for name, expected in (("path", "a file of questions"), ("out", "a directory")):
    if not given[name].value:
      raise InputError(f"--{name}: missing, expected {expected}")
  for name, needed in (
    ("judge_url", "judge_model"),
    ("judge_model", "judge_url"),
    ("scores", "keep"),
    ("keep", "scores"),
  ):
    if given[name].value and not given[needed].value:
      raise InputError(f"--{name}: given without --{needed}, expected both or neither")
  judge = Endpoint(
    given.judge_url, given.judge_model, given.judge_key_variable, given.judge_concurrency,
    temperature=given.judge_temperature if given.judge_temperature >= 0 else None,
  ) if given.judge_url else None  # fmt: skip
  return Options(
    path=pathlib.Path(given.path),
    out=pathlib.Path(given.out),
    split=given.split,
    benchmarks=tuple(map(pathlib.Path, given.benchmark)),
    answer_words=given.answer_words,
    keep_mathematics=given.keep_mathematics,
    ngram=given.ngram,
    similarity=given.similarity,
    judge=judge,
    reasoning=given.reasoning,
    unjudged=given.unjudged,
    scores=pathlib.Path(given.scores) if given.scores else None,
    keep=given.keep,
  )


def curate(options: Options) -> None:
  """Writes what is left of the questions of `options.path` to `options.out`.

  Raises:
    InputError: files that cannot be used, a directory that holds something else, a judge that refuses or says nothing
      that is understood (what it rated so far is kept), or nothing left.
    MachineError: a judge that cannot be reached, a disk that is full.
  """
  examples = load_examples(options.path, options.split or None)
  benchmarks = [Protected(path.stem, texts) for path in options.benchmarks for texts in read_benchmark(path)]
  scores = score(examples, options.scores) if options.scores else {}
  if options.scores:
    print(f"{len(scores):,} of {len(examples):,} questions have a score")
  client = Client(options.judge) if options.judge else None
  settings = _settings(options, scores)
  if _open(options.out, settings):
    print(f"{options.out} is finished: the same questions were curated the same way")
    return
  limits = checks.SiftSettings(
    answer_words=options.answer_words,
    keep_mathematics=options.keep_mathematics,
    ngram=options.ngram,
    similarity=options.similarity,
  )
  kept, dropped = checks.sift(examples, benchmarks, limits, options.path.stem)
  ratings: dict[int, Rating | str] = {}
  if client:
    ratings = _rate(examples, kept, client, options.out / "ratings")
    dropped += checks.drop_by_rating(ratings, options.reasoning, options.keep_mathematics, options.unjudged == "keep")
    kept = _without(kept, dropped)
  if options.scores:
    dropped += checks.drop_by_score(kept, scores, options.keep)
    kept = _without(kept, dropped)
  if not kept:
    reasons = ", ".join(f"{count} {why}" for why, count in Counter(drop.reason for drop in dropped).items())
    raise InputError(f"{options.path}: no row is left of {len(examples)}: {reasons}")
  curated = Curated(examples=examples, kept=kept, dropped=dropped, ratings=ratings)
  _write(options.out, settings, curated, client)


def _without(indices: Sequence[int], dropped: Sequence[Dropped]) -> list[int]:
  gone = {drop.row for drop in dropped}
  return [index for index in indices if index not in gone]


# ---- what is read ----


def read_benchmark(path: pathlib.Path) -> tuple[list[str], list[str]]:
  """The questions of a benchmark: a column question, problem or prompt of a .parquet, .csv, .jsonl or .json file.

  Returns:
    the questions alone; and with the options of a column options or choices, as most files list them: a question that
    is too short to be found by itself is found with these.

  Raises:
    InputError: it cannot be read, or has no such column.
  """
  columns, rows = read_rows(path)
  name = next((name for name in _QUESTIONS if name in columns), None)
  if name is None:
    raise InputError(f"{path}: expected a column {' or '.join(_QUESTIONS)}, found only {', '.join(columns)}")
  alone, listed = [], []
  for number, row in rows:
    value = row.get(name)
    if isinstance(value, list):  # chat messages
      value = "\n".join(str(message.get("content")) for message in value if isinstance(message, dict))
    if not isinstance(value, str) or not value.strip():
      raise InputError(f"{path}: row {number}, column {name}: expected a question, found {reprlib.repr(value)}")
    options = next((row[name] for name in _OPTIONS if isinstance(row.get(name), list)), [])
    alone.append(value)
    listed.append("\n".join([value, *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))]))
  return alone, listed


def score(examples: Sequence[Example], path: pathlib.Path) -> dict[int, Score]:
  """Finds the policy's figures on the questions, by index: of a file (`read_scores`) or of a run's directory.

  A run's are those of WORKDIR/rollouts, told by the text of the question: std is the group's, gain the mean of r - r'.

  Raises:
    InputError: it cannot be read, a row is not as expected, or there is no score of any question.
  """
  if not path.is_dir():
    by_row = read_scores(path)
    scores = {index: by_row[example.row] for index, example in enumerate(examples) if example.row in by_row}
  else:
    by_question: dict[str, list[Score]] = {}
    for file in sorted((path / "rollouts").glob("step_*.jsonl")):
      for number, row in read_rows(file)[1]:
        where = f"{file}: row {number}"
        question = row.get("question")
        if not isinstance(question, str):
          raise InputError(f"{where}, column question: expected text, found {reprlib.repr(question)}")
        reference, baseline, std = (_number(row, name, where) for name in _ROLLOUT)
        by_question.setdefault(question, []).append(Score(std, reference - baseline))
    texts = [[message["content"] for message in example.messages if message["role"] == "user"] for example in examples]
    scores = {index: _mean(by_question[text[-1]]) for index, text in enumerate(texts) if text[-1] in by_question}
  if not scores:
    raise InputError(f"{path}: expected scores of some of the questions, found none")
  return scores


def _mean(scores: Sequence[Score]) -> Score:
  return Score(*(sum(column) / len(scores) for column in zip(*scores, strict=True)))


def read_scores(path: pathlib.Path) -> dict[int, Score]:
  """Reads the policy's figures on the questions: columns row (of the curated file, from 1), std and gain.

  std is the standard deviation of the rewards of a group of responses to the row's question, gain the mean of r - r'.
  Of a row that comes more than once the means count.

  Raises:
    InputError: it cannot be read, or a row is not as expected.
  """
  groups: dict[int, list[Score]] = {}
  for number, row in read_rows(path)[1]:
    values = [_number(row, name, f"{path}: row {number}") for name in _SCORES]
    groups.setdefault(int(values[0]), []).append(Score(*values[1:]))
  return {row: _mean(group) for row, group in groups.items()}


def _number(row: dict[str, Any], name: str, where: str) -> float:
  try:
    value = float(row[name])
  except (KeyError, TypeError, ValueError, OverflowError):
    value = math.nan
  if not math.isfinite(value):
    raise InputError(f"{where}, column {name}: expected a number, found {reprlib.repr(row.get(name))}")
  return value


# ---- the judge ----


def _rate(
  examples: Sequence[Example], indices: Sequence[int], client: Client, cache: pathlib.Path
) -> dict[int, Rating | str]:
  from rlpr_jax.runs.metrics import Progress

  conversations = [
    checks.rating_conversation(checks.question_of(examples[index]), examples[index].reference) for index in indices
  ]

  async def ask() -> list[Rating | Unanswered]:
    async with client:
      return await ask_all(
        conversations,
        ReplyFormat(checks.parse_rating, checks.RATING_REMINDER),
        client,
        cache=Cache(cache),
        progress=Progress("rated"),
      )

  answers = asyncio.run(ask())
  for answer in answers:
    # To drop or keep a whole file unrated would be a result that says nothing.
    if isinstance(answer, Unanswered) and not answer.asked:
      rated = sum(isinstance(answer, Rating) for answer in answers)
      kind = MachineError if answer.may_pass else InputError
      raise kind(
        f"--judge_url: {rated} of {len(indices)} rows rated, then given up ({answer.why}); the same command goes on"
      )
  notes = (answer.why if isinstance(answer, Unanswered) else answer for answer in answers)
  return dict(zip(indices, notes, strict=True))


# ---- the directory ----


def _settings(options: Options, scores: dict[int, Score]) -> dict[str, Any]:
  """All that the result depends on; where the judge is served is no part of it."""
  judge = options.judge
  return {
    "input": {"name": options.path.name, "sha256": _sha256(options.path), "split": options.split},
    "benchmarks": [{"name": path.name, "sha256": _sha256(path)} for path in options.benchmarks],
    "answer_words": options.answer_words,
    "keep_mathematics": options.keep_mathematics,
    "ngram": options.ngram,
    "similarity": options.similarity,
    "judge": {"model": judge.model, "temperature": judge.temperature} if judge else None,
    "reasoning": options.reasoning,
    "unjudged": options.unjudged,
    "scores": hashlib.sha256(json.dumps(sorted(scores.items())).encode()).hexdigest() if scores else None,
    "keep": options.keep,
  }


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _open(directory: pathlib.Path, settings: dict[str, Any]) -> bool:
  """Makes the directory ours; True if it is finished already."""
  record = directory / "curation.json"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if record.exists():
      recorded = json.loads(record.read_text())
      if recorded["finished"]:
        for name, value in settings.items():
          if recorded["settings"].get(name) != value:
            raise InputError(f"--out: {directory} holds another curation ({name} differs), expected a new directory")
        return True
    elif any(directory.iterdir()):
      raise InputError(f"--out: {directory} holds other files, expected a new or empty directory")
    write_atomically(record, json.dumps({"finished": False, "settings": settings}, indent=2))
  except OSError as error:
    raise trouble(error, f"--out: {directory} cannot be written ({reason(error)})") from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{record}: expected the record of a curation, found something else") from None
  return False


class Curated(NamedTuple):
  """Result of curating a file of questions."""

  examples: Sequence[Example]
  kept: Sequence[int]  # indices of the examples that stay
  dropped: Sequence[Dropped]
  ratings: dict[int, Rating | str]  # by index; a text says why there is none


def _write(directory: pathlib.Path, settings: dict[str, Any], curated: Curated, client: Client | None) -> None:
  examples, ratings = curated.examples, curated.ratings

  def shown(index: int) -> dict[str, Any]:
    return {
      "row": examples[index].row,
      "question": checks.question_of(examples[index]),
      "reference": examples[index].reference,
    }

  def rating(index: int) -> int | None:
    answer = ratings.get(index)
    return answer.reasoning if isinstance(answer, Rating) else None

  gone = [{**shown(drop.row), "reason": drop.reason, "detail": drop.detail} for drop in curated.dropped]
  kept = [{**shown(index), "rating": rating(index)} for index in curated.kept]
  reasons = dict(Counter(drop.reason for drop in curated.dropped))
  unjudged = sum(isinstance(rating, str) for rating in ratings.values())
  note = _cost(client, unjudged) if client else ""
  counts = {"read": len(examples), "dropped": reasons, "unjudged": unjudged, "kept": len(curated.kept)}
  rows = [
    {
      "data_source": examples[index].source,
      "prompt": list(examples[index].messages),
      "ability": examples[index].source,
      "reward_model": {"style": "rule", "ground_truth": examples[index].reference},
      "extra_info": {"index": place, "row": examples[index].row, "split": "train", "reasoning": rating(index)},
    }
    for place, index in enumerate(curated.kept)
  ]
  table = pa.BufferOutputStream()
  pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), table)
  lines = (json.dumps(row, ensure_ascii=False) for row in sorted(gone, key=lambda row: row["row"]))
  page = funnel.render(
    settings["input"]["name"], rows=len(examples), kept=kept, dropped=gone, settings=settings, note=note
  )
  try:
    write_atomically(directory / "train.parquet", table.getvalue().to_pybytes())
    write_atomically(directory / "dropped.jsonl", "".join(f"{line}\n" for line in lines))
    write_atomically(directory / "report.html", page)
    # Last: with it the directory is finished.
    write_atomically(
      directory / "curation.json", json.dumps({"finished": True, "settings": settings, "counts": counts}, indent=2)
    )
  except OSError as error:
    raise trouble(error, f"--out: {directory} cannot be written ({reason(error)})") from None
  for name, count in reasons.items():
    print(f"{count:8,} {name}")
  print(f"{len(curated.kept):8,} of {len(examples):,} kept in {directory / 'train.parquet'}")
  if note:
    print(note)


_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMA = pa.schema(
  [
    ("data_source", pa.string()),
    ("prompt", pa.list_(_MESSAGE)),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
    (
      "extra_info",
      pa.struct([("index", pa.int64()), ("row", pa.int64()), ("split", pa.string()), ("reasoning", pa.int64())]),
    ),
  ]
)


def _cost(client: Client, unjudged: int) -> str:
  usage = client.usage
  return (
    f"{client.endpoint.model}: {usage.requests:,} requests, {usage.cached:,} ratings from disk,"
    f" {usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} completion tokens, {unjudged:,} rows unjudged"
  )


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string("path", None, "Questions: a .parquet, .jsonl, .csv or .json file.", flag_values=given)
  flags.DEFINE_string(
    "out", None, "Directory to write; new, empty, or of a run of the same command that was stopped.", flag_values=given
  )
  flags.DEFINE_string("split", "", "Rows whose column 'split' says so; all if not given.", flag_values=given)
  flags.DEFINE_multi_string("benchmark", [], "File of questions that may not be trained on.", flag_values=given)
  flags.DEFINE_integer(
    "ngram", 13, "Words in common with a benchmark's question that are a leak.", lower_bound=1, flag_values=given
  )
  flags.DEFINE_float(
    "similarity", 0.8, "Jaccard similarity of near duplicates.", lower_bound=0.1, upper_bound=1, flag_values=given
  )
  flags.DEFINE_integer("answer_words", 25, "Most words of a reference answer.", lower_bound=1, flag_values=given)
  flags.DEFINE_bool("keep_mathematics", False, "Leave questions of mathematics in.", flag_values=given)
  flags.DEFINE_string(
    "judge_url", None, "OpenAI-compatible endpoint, up to and with /v1, of a model that rates rows.", flag_values=given
  )
  flags.DEFINE_string("judge_model", None, "Name of that model.", flag_values=given)
  flags.DEFINE_string(
    "judge_key_variable", "", "Environment variable that holds the endpoint's key, if it needs one.", flag_values=given
  )
  flags.DEFINE_integer("judge_concurrency", 16, "Requests at a time.", lower_bound=1, flag_values=given)
  flags.DEFINE_float("judge_temperature", 0.0, "Sampling temperature; -1 leaves it to the endpoint.", flag_values=given)
  flags.DEFINE_integer(
    "reasoning", 2, "Least reasoning a question needs, to the judge.", lower_bound=0, upper_bound=4, flag_values=given
  )
  flags.DEFINE_enum(
    "unjudged", "keep", ["keep", "drop"], "What becomes of rows that the judge did not rate.", flag_values=given
  )
  flags.DEFINE_string(
    "scores", None, "Directory of a run, or .jsonl, .csv of row, std, gain. Needs --keep.", flag_values=given
  )
  flags.DEFINE_integer("keep", 0, "How many rows with the best scores are kept.", lower_bound=0, flag_values=given)
  return given


if __name__ == "__main__":
  main()
