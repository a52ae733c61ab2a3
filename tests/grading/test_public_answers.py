"""That responses as models write them to public suites are graded as those suites grade them."""

import random
import re

import pytest

from rlpr_jax.grading import extraction
from rlpr_jax.grading.graders import grade
from rlpr_jax.grading.question import Question
from tests.grading.public_answers import KINDS, TEN


@pytest.mark.parametrize("kind", KINDS)
def test_every_response_of_a_kind(kind):
  """All at once, so that a failure shows every response that is graded otherwise."""
  missed = []
  for question, response, right in KINDS[kind]:
    found = grade(question, response)
    if found.right is not right:
      missed.append((question.grader, question.reference, response, found))
  assert missed == []


def without_calculator(text):
  return re.sub(r"<<[^<>]*>>", "", text)


def solution(rng):
  """A solution in GSM8K's form, with its annotations of a calculator, and the number that it ends on."""
  price, count, paid = rng.randrange(2, 400), rng.randrange(2, 90), rng.randrange(1, 9000)
  cost = price * count
  left = cost - paid
  lines = [
    f"She sells {count} of them for ${price} each, which is {count} * {price} = $<<{count}*{price}={cost}>>{cost:,}.",
    f"After the rent of ${paid:,} she has {cost:,} - {paid:,} = $<<{cost}-{paid}={left}>>{left:,} left.",
    f"#### {left:,}" if rng.random() < 0.5 else f"#### {left}",
  ]
  return "\n".join(lines), str(left)


def test_solutions_of_gsm8k():
  """By the number behind the last ####, as they are and as few-shot outputs go on with the next question."""
  rng = random.Random(0)
  for _ in range(500):
    text, gold = solution(rng)
    other, other_gold = solution(rng)
    question = Question("1", "How much is left?", gold, "", "number")
    for response in (text, without_calculator(text), f"{text}\n\nQuestion: How much is left?\nAnswer: {other}"):
      assert grade(question, response).right, response
      assert grade(Question("1", "", other_gold, "", "number"), response).right is (gold == other_gold), response


# MMLU-Pro's own rules (TIGER-AI-Lab/MMLU-Pro, compute_accuracy.py): the first "answer is (X)", else the first
# "Answer: X", else the last capital from A to J. Its prompts end a response where "Question:" comes.
def mmlu_pro_extraction(text):
  if found := re.search(r"answer is \(?([A-J])\)?", text):
    return found[1]
  if found := re.search(r".*[aA]nswer:\s*([A-J])", text):
    return found[1]
  return (re.findall(r"[A-J]", text) or [None])[-1]


ENDS = (
  "The answer is ({}).", "Thus, the answer is ({}).", "The answer is {}.", "So the best answer is ({}).", "Answer: {}",
  "The correct answer is: the answer is ({}).", "The answer is ({}). {} is correct.",
)  # fmt: skip
STEPS = (
  "We refer to Wikipedia articles on mechanics for help.",
  "By Newton's second law, F = ma.",
  "Option A would need a = 2, and option (C) a = 3.",
  "Let's go through the options:\n(A) is too small.\n(B) has the wrong unit.\n(D) may be right.",
  "We have $F = \\boxed{2 \\cdot 7}$ N.",
  "Plugging in, 2 * 7 = 14.",
)


def output(rng):
  """As base models answer MMLU-Pro's five examples: reasoning, the statement, and the next questions, invented."""

  def answer():
    steps = " ".join(rng.choice(STEPS) for _ in range(rng.randrange(1, 5)))
    return f"{steps} {rng.choice(ENDS).replace('{}', rng.choice('ABCDEFGHIJ'))}"

  text = answer()
  for _ in range(rng.randrange(4)):
    options = "\n".join(f"{'ABCDEFGHIJ'[i]}. {option}" for i, option in enumerate(TEN))
    text += f"\n\nQuestion:\nWhat is the force?\nOptions:\n{options}\nAnswer: Let's think step by step. {answer()}"
  return text[: rng.randrange(len(text) // 2, len(text))] if rng.random() < 0.2 and "\n\nQuestion" in text else text


def test_outputs_to_mmlu_pro_give_the_letter_of_its_own_extraction():
  rng = random.Random(1)
  options = {"ABCDEFGHIJ"[i]: option for i, option in enumerate(TEN)}
  for _ in range(1000):
    text = output(rng)
    own = mmlu_pro_extraction(text.partition("Question:")[0])
    for letter in {own, *"ABC"}:
      found = grade(Question("1", "What is the force?", letter, "", "multiple_choice", TEN), text)
      assert found.right is (letter == own), (text, own, found)
    assert extraction.extract(text, "multiple_choice", options).path == "answer_is"
