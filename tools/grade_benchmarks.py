r"""Measures the graders on real benchmark files: what they say of gold answers, and of answers to other questions.

  PYTHONPATH=. python tools/grade_benchmarks.py --data=DIR

DIR holds benchmark files, told by how their names begin (math500.jsonl, minerva_math.jsonl, theoremqa.json, ...). Every
gold answer is graded in the dressings that policies give their answers; so is, as a wrong answer, the gold answer of
another row that is graded by the same rules and is not the same answer; so is a mathematical gold answer with one
digit, sign, relation, unit, function, letter or item changed. Prints a Markdown table and some failures.
"""

import pathlib
import random
import re
from collections.abc import Iterator

from absl import app, flags

from rlpr_jax.errors import exit_with_one_line
from rlpr_jax.evaluation import benchmarks
from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.grading import graders, multiple_choice, numbers
from rlpr_jax.grading.question import GRADERS
from rlpr_jax.grading.texts import plain
from tools.changed_answers import changes

DATA = flags.DEFINE_string("data", None, "Directory of benchmark files.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Which other rows' answers are the wrong ones.")
SHOWN = flags.DEFINE_integer("shown", 5, "How many failures are printed of each benchmark and kind.")

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def plain_dressings(answer: str, grader: str) -> Iterator[tuple[str, str]]:
  """Name and response of the dressings that fit any answer."""
  boxed = f"\\boxed{{\\text{{{answer}}}}}" if grader == "text" else f"\\boxed{{{answer}}}"
  yield "tag", f"<think> 1 + 1 = 3, so 7 </think> <answer> {answer} </answer>"
  yield "tag, boxed", f"<answer>\n${boxed}$\n</answer>"
  yield "tag, sentence", f"<think> (A) 12 </think>\n<answer>The answer is {answer}.</answer>"
  yield "open tag", f"<think> 12 </think> <answer> {answer}"
  yield "boxed", f"Step 1: take 12 and 13.\nTherefore, ${boxed}$."
  yield "sentence", f"First 12, then 13.\nThe final answer is {answer}. I hope it is correct."


def dressings(question: Question, answer: str) -> Iterator[tuple[str, str]]:
  """All dressings of an answer, or of the letter of an option."""
  yield from plain_dressings(answer, question.grader)
  if question.grader == "multiple_choice":
    yield "bracketed", f"<answer> ({answer}) </answer>"
    yield "bold", f"Let us see.\n\n**Answer: {answer}**"
    yield "text{}", f"So it is $\\boxed{{\\text{{{answer}}}}}$."
    yield "letter", f"A or B?\n\n{answer}"
    index = ord(answer) - ord("A")
    if index < len(question.options):  # a label may be none of the options that were read from the question
      text = question.options[index]
      yield "option text", f"<answer> {text} </answer>"
      yield "letter and text", f"The answer is {answer}. {text}"
  elif question.grader == "text":
    yield "capitals", f"<answer> {answer.upper()} </answer>"
    yield "spaces", f"<answer>\n\u200b{answer.replace(' ', chr(0xA0))}.\n</answer>"
  else:
    yield "dollars", f"<answer> ${answer}$ </answer>"
    yield "displayed", f"The answer is:\n\\[ {answer} \\]"
    if "(" in answer and "\\left" not in answer and not answer.startswith(("(-\\infty", "\\text")):
      yield (
        "left right",
        f"<answer> {answer.replace('(', chr(92) + 'left(').replace(')', chr(92) + 'right)')} </answer>",
      )
    if "\\frac" in answer:
      yield "dfrac", f"<answer> {answer.replace(chr(92) + 'frac', chr(92) + 'dfrac')} </answer>"
    if re.fullmatch(r"-?\d+(\.\d+)?", answer):
      yield "unit", f"<answer> {answer} \\text{{ units}} </answer>"
      yield "word", f"The answer is {answer} apples."
    if re.fullmatch(r"-?\d{4,}", answer):
      yield "commas", f"<answer> {int(answer):,} </answer>"
    if found := re.fullmatch(r"(-?[\d.]+)e\+?(-?\d+)", answer):
      yield "power of ten", f"<answer> {found[1]} \\times 10^{{{int(found[2])}}} </answer>"
    if re.fullmatch(r"\[[^\[\]]+\]", answer):
      yield "tuple", f"<answer> ({answer[1:-1]}) </answer>"


def is_same(one: Question, other: Question) -> bool:
  """Whether the reference of one question is also answered by that of another one."""
  if plain(one.reference) == plain(other.reference):
    return True
  texts = [(multiple_choice.split_label(q.reference) or ("", q.reference))[1] for q in (one, other)]
  if multiple_choice.bare(texts[0]) == multiple_choice.bare(texts[1]):
    return True
  lists = [numbers.parse_list(text) for text in texts]
  if None in lists or len(lists[0]) != len(lists[1]):
    return False
  percent = ["%" in text for text in texts]
  scales = (1, 0.01, 100) if percent[0] != percent[1] else (1,)
  pairs = list(zip(*map(sorted, lists), strict=True))
  return any(
    all(numbers.equal(graders.rounded(scale * v, one), item, one.rtol, one.atol) for item, v in pairs)
    for scale in scales
  )


def wrong_responses(question: Question, others: list[Question], rng: random.Random) -> Iterator[tuple[str, str]]:
  """Another row's answer in five dressings, each time another row's."""
  candidates = [other for other in others if not is_same(question, other)]
  if question.grader == "multiple_choice" and question.options:
    candidates = [other for other in candidates if ord(other.reference) - ord("A") < len(question.options)]
  for kind in range(5):
    if candidates:
      yield list(plain_dressings(rng.choice(candidates).reference, question.grader))[kind + (kind > 2)]


def measure(name: str, path: pathlib.Path) -> tuple[str, list[str]]:
  """A row of the table and lines about failures."""
  questions, dropped = benchmarks.load(name, str(path))
  rng = random.Random(SEED.value)
  by_grader = {kind: [q for q in questions if q.grader == kind] for kind in GRADERS}
  kinds, right, gold, missed = set(), 0, 0, []
  accepted, wrong, taken = 0, 0, []
  changed, slipped = 0, []
  for question in questions:
    for kind, response in dressings(question, question.reference):
      kinds.add(kind)
      found = graders.grade(question, response)
      gold, right = gold + 1, right + found.right
      if not found.right:
        missed.append((kind, question, found))
    for kind, response in wrong_responses(question, by_grader[question.grader], rng):
      found = graders.grade(question, response)
      wrong, accepted = wrong + 1, accepted + found.right
      if found.right:
        taken.append((kind, question, found))
    for kind, answer in changes(question.reference, rng) if question.grader == "math" else ():
      found = graders.grade(question, f"<answer> {answer} </answer>")
      changed += 1
      if found.right:
        slipped.append((kind, question, found))
  left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
  row = (
    f"| {name} | {len(questions)} | {left_out} | {len(kinds)} | {gold} | {100 * right / gold:.2f}% | {wrong} | "
    f"{100 * accepted / max(wrong, 1):.2f}% | {changed} | {100 * len(slipped) / max(changed, 1):.2f}% |"
  )
  lines = []
  kinds_of_failure = (
    ("gold called wrong", missed),
    ("other row's called right", taken),
    ("changed called right", slipped),
  )
  for title, failures in kinds_of_failure:
    for kind, question, found in random.Random(0).sample(failures, min(SHOWN.value, len(failures))):
      reference, answer = (repr(text)[:70] for text in (question.reference, found.answer))
      lines.append(f"- {name}, {title}, {kind}, {question.grader}: {reference} graded {answer} ({found.why})")
  return row, lines


def main(_) -> None:
  with exit_with_one_line():
    print(
      "| benchmark | rows | left out | dressings | gold graded | gold right | others graded | others right | "
      "changed graded | changed right |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    lines = []
    for path in sorted(pathlib.Path(DATA.value).iterdir()):
      name = next((name for name in benchmarks.BENCHMARKS if path.name.startswith(name)), None)
      if name and path.suffix in SUFFIXES:
        row, failures = measure(name, path)
        print(row, flush=True)
        lines += failures
    if lines:
      print("", *lines, sep="\n")


if __name__ == "__main__":
  app.run(main)
