"""curation/checks.py on small texts, and against brute force."""

import contextlib
import random
import time

import numpy as np
import pytest

from rlpr_jax.curation.checks import (
  Dropped,
  Protected,
  Rating,
  Score,
  SiftSettings,
  drop_by_rating,
  drop_by_score,
  exact_duplicates,
  is_mathematics,
  leaks,
  near_duplicates,
  parse_rating,
  question_of,
  rating_conversation,
  shared_runs,
  sift,
  unclear_answer,
  windows,
  without_boilerplate,
  words_of,
)
from rlpr_jax.data.sources import Example

LONG = "why does the price of a good that nobody wants to buy fall when its supply in the market rises by one unit"
TEMPLATE = "{}\n\nAnswer the question and return in the following format:\n<think> ... </think> <answer> ... </answer>"


@contextlib.contextmanager
def in_no_time():
  """Fails where a search goes through a text again and again, which takes a minute; not where a machine is slow."""
  start = time.process_time()
  yield
  assert time.process_time() - start < 2


def example(question, reference="yes", source="web", row=1):
  return Example(
    ({"role": "system", "content": "Think."}, {"role": "user", "content": question}), reference, source, row
  )


def test_the_question_is_what_the_user_says():
  messages = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
  assert question_of(Example(messages, "r", "s", 1)) == "user\nuser"


@pytest.mark.parametrize(
  ("reference", "expected"),
  [
    ("42", None),
    ("-1", None),
    ("(B) none of these, e.g. gold", None),
    ("Yes", None),
    ("(D) Any of the above", None),
    ("\\frac{1}{2}", None),
    ("F", None),
    ("a decline in wages, prices, and output", None),
    ("€5", None),
    ("Answers may vary.", "several answers"),
    ("Various factors", "several answers"),
    ("It depends on the elasticity.", "depends"),
    ("Depends on the country", "depends"),
    ("Cars, for example", "examples"),
    ("taxes, tariffs, etc.", "examples"),
    ("See the graph above", "refers to something else"),
    ("N/A", "no answer"),
    ("???", "no answer"),
    ("not given", "no answer"),
    ("(C) From this it may be concluded that:", "not whole"),
    ("exports _____ and imports", "not whole"),
    ("1. Land\n2. Labor\n3. Capital", "a list"),
    ("- Land\n- Labor", "a list"),
    ("1. Land\n\n \t2. Labor", "a list"),
    ("?! ?", "no answer"),
    ("(unknown?)", "no answer"),
    ("1.5\n2.5", None),
  ],
)
def test_unclear_answers(reference, expected):
  assert unclear_answer(reference) == expected


@pytest.mark.parametrize(
  ("question", "reference", "source", "expected"),
  [
    ("Anything", "4", "Mathematics", True),
    ("Anything", "4", "college_algebra", True),
    ("Compute the integral of $x^2$ and the derivative of the polynomial.", "4", "Physics", False),
    ("Find the number of positive integers $n < 100$ divisible by 7.", "14", "web", True),
    ("What is $\\sum_{k=1}^{5} k^2$?", "55", "train", True),
    ("Solve the quadratic equation $x^2 - 4 = 0$ for real numbers.", "$x=\\pm 2$", "part_0001", True),
    ("What is the price elasticity of demand if price rises by 5% and demand falls by 10%?", "-2", "web", False),
    ("A mass of 3 kg moves with a velocity of 4 m/s. What is its kinetic energy?", "24 J", "web", False),
    ("Who wrote the first history of Rome?", "Fabius Pictor", "web", False),
  ],
)
def test_mathematics(question, reference, source, expected):
  assert is_mathematics(question, reference, source) is expected


# Written anew in the manner of GSM8K, ASDiv and MGSM.
WORD_PROBLEMS = (
  ("Nora's hens lay 14 eggs a day. She keeps five and sells the rest for $3 each. How much does she earn daily?", "27"),
  ("A scarf takes 4 balls of red wool and half as many of white wool. How many balls does it take in total?", "6"),
  ("Ben buys a bike for $120 and spends $45 on repairs. He sells it for $210. How much profit did he make?", "$45"),
  ("Ida reads 12 pages every evening. Her book has 180 pages. How many days does she need to finish it?", "15 days"),
  ("Omar is twice as old as his sister, who will be 9 in two years. How old is Omar?", "14"),
  (
    "A bus has forty seats. At the first stop 17 people get on, at the next 8 more. How many seats are left?",
    "15 seats",
  ),
  ("Lea drives 60 miles per hour for 3 hours and then walks 2 miles home. How far did she travel?", "182 miles"),
  ("A shirt costs $24, but every second one is 50% off. How much do 4 shirts cost?", "$72.00"),
  ("Three friends share 27 cookies equally. How many cookies does each of them get?", "9 cookies"),
  ("What number plus twice itself is 36? Find the number and check that the sum of the three parts is 36.", "12"),
)
OTHER_PROBLEMS = (
  ("A bond with a 6% coupon matures in 10 years at $1,000. What is its price if the yield is 8%?", "$864.10"),
  ("A firm's fixed costs are $900 and its marginal cost is $5. What is the average cost of 100 units?", "$14"),
  ("A 3 kg mass moves at a velocity of 4 m/s. How much kinetic energy does it have?", "24"),
  ("The price of bread rises from $2 to $3 and demand falls by 20%. What is the elasticity of demand?", "0.5"),
  ("How many amendments does the constitution have?", "27"),
  ("How many years did the war that began in 1914 last?", "4"),
  ("A current of 2 amperes flows through a resistor of 6 ohms. What is the voltage?", "12 volts"),
  ("How many electrons does an atom of carbon have in its outer shell?", "4"),
  ("She had 3 sons and 2 daughters. What did each of them want for their birthday?", "a bike"),
)


@pytest.mark.parametrize("problem", WORD_PROBLEMS)
def test_word_problems_are_mathematics(problem):
  question, reference = problem
  assert is_mathematics(question, reference, "")
  assert not is_mathematics(question, "It cannot be said without knowing more.", "")
  assert not is_mathematics(question, reference, "economics")  # a category decides


@pytest.mark.parametrize("problem", OTHER_PROBLEMS)
def test_calculations_of_other_fields_are_none(problem):
  assert not is_mathematics(*problem, "")


@pytest.mark.parametrize(
  "reference", ["6 * 7 = <<6*7=42>>42", "She has six bags.\n#### 42", "#### $1,080", "It is lower.\n####-5"]
)
def test_a_solution_in_the_form_of_gsm8k_is_mathematics(reference):
  assert is_mathematics("How many are there?", reference, "")


@pytest.mark.parametrize("reference", ["#### Summary", "1 << 2 and 3 >> 1", "# 42"])
def test_other_marks_are_no_solution(reference):
  assert not is_mathematics("What is it?", reference, "")


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("math", True),
    ("MATH-500", True),
    ("AIME2024", True),
    ("aime_2024", True),
    ("gsm8k", True),
    ("NuminaMath-CoT", True),
    ("Prealgebra", True),
    ("precalculus", True),
    ("openai/number_theory", True),
    ("claimed", False),
    ("aimed_at_schools", False),
    ("aftermath_of_war", False),
  ],
)
def test_names_of_mathematics_are_words(source, expected):
  assert is_mathematics("Anything", "some words", source) is expected


@pytest.mark.parametrize(
  ("source", "expected"),
  [("HighSchoolPhysics", False), ("arts_and_crafts", False), ("law", False), ("lawn_care", True), ("parts", True)],
)
def test_names_of_other_fields_are_words(source, expected):
  question = "Find the number of positive integers $n < 100$ divisible by 7."
  assert is_mathematics(question, "14", source) is expected


def test_a_hostile_answer_takes_no_time():
  with in_no_time():
    assert is_mathematics("Find $x$. Solve the equation.", "a + " * 50_000 + "!?", "web")
    assert unclear_answer("1. " * 50_000) is None


@pytest.mark.parametrize(
  "reference",
  ["?" * 5000 + "x", "x" + "?" * 5000 + "x", "1. x" + "\n" * 100_000 + "y", "1. x" + "\n " * 50_000 + "y"],
  ids=lambda reference: reference[:4],
)
def test_a_hostile_reference_takes_no_time(reference):
  with in_no_time():
    assert unclear_answer(reference) is None


def test_a_hostile_question_takes_no_time():
  with in_no_time():
    assert [len(words) for words in words_of(["Question" + " " * 100_000 + "x"])] == [2]


def same(a, b):
  (x, y) = words_of([a, b])
  return x.tolist() == y.tolist()


def test_words_are_letters_and_digits():
  assert same("Question: What's  THE\nprice?", "what s the price")
  assert same("Q 3) \uff46ull width", "full width")
  assert same("Problem 12 : a", "a")
  assert same("q 1 2: a", "q 1 2 a")
  assert not same("a b", "b a")
  assert [len(words) for words in words_of(["价格 是多少", "", "... ?", "don't", "\ud800x"])] == [5, 0, 0, 2, 1]


def test_windows_are_the_runs_of_words():
  (words,) = words_of(["a b c a b c"])
  runs = windows(words, 3)
  assert len(runs) == 4
  assert runs[0] == runs[3]
  assert len({*runs.tolist()}) == 3
  assert len(windows(words, 6)) == 1
  assert len(windows(words, 7)) == 0


def test_boilerplate_is_what_many_rows_share():
  questions = [f"Is the number {i} larger than {i * i} or {i + 7}?" for i in range(300)]
  texts = words_of([TEMPLATE.format(question) for question in questions])
  bare = without_boilerplate(texts, shared_runs(texts))
  assert [words.tolist() for words in bare] == [words.tolist() for words in words_of(questions)]
  few = words_of([TEMPLATE.format(question) for question in questions[:9]])
  assert [words.tolist() for words in without_boilerplate(few, shared_runs(few))] == [words.tolist() for words in few]
  assert without_boilerplate([], shared_runs([])) == []


def test_exact_duplicates_but_for_case_and_whitespace():
  questions = ["What is x + 1?", "what  is X + 1?\n", "What is x - 1?", "Question: What is x + 1?", "What is x - 1?"]
  assert exact_duplicates(questions) == {1: 0, 3: 0, 4: 2}


def jaccard(a, b):
  def shingles(text):
    words = text.split()
    size = min(3, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

  return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@pytest.mark.parametrize("similarity", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_brute_force(similarity):
  rng = random.Random(0)
  texts = []
  for _ in range(60):
    words = [f"w{rng.randrange(60)}" for _ in range(rng.randrange(1, 40))]
    for _ in range(4):
      texts.append(" ".join(words))
      for _ in range(rng.randrange(3)):
        words[rng.randrange(len(words))] = f"w{rng.randrange(60)}"
  rng.shuffle(texts)
  expected, stay = {}, []
  for index, text in enumerate(texts):
    like = next((other for other in stay if jaccard(text, texts[other]) >= similarity - 1e-9), None)
    if like is None:
      stay.append(index)
    else:
      expected[index] = like
  assert expected
  assert near_duplicates(words_of(texts), similarity) == expected


def test_texts_without_words_are_no_duplicates():
  assert near_duplicates(words_of(["", "?", "a", "a"]), 0.8) == {3: 2}
  assert near_duplicates([], 0.8) == {}


def test_leaks_by_a_run_of_words_or_a_short_question_as_a_whole():
  benchmarks = [Protected("one", [LONG, "What is GDP?"]), Protected("two", ["", "Who was Ada Lovelace?", LONG])]
  texts = [
    f"Tell me: {LONG.upper()}!",
    " ".join(LONG.split()[4:17]),  # 13 words
    " ".join(LONG.split()[4:16]),  # 12
    "what is gdp",
    "What is GDP per head?",
    "Question: who was ADA lovelace",
    "",
  ]
  assert leaks(words_of(texts), benchmarks, 13, frozenset()) == {
    0: "one question 1",
    1: "one question 1",
    3: "one question 2",
    5: "two question 2",
  }
  assert 2 in leaks(words_of(texts), benchmarks, 12, frozenset())
  assert leaks(words_of(texts), [], 13, frozenset()) == {}


STEM = "which of the following statements best describes the "  # 8 words
INSTRUCTION = "please think step by step and write the final answer alone on the last line after the word answer "


def protected_and_rows(stem):
  """Rows that all have the stem, the first two of them in the benchmark as well."""
  rng = random.Random(1)
  ends = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(9)) for _ in range(40)]
  texts = [f"{stem}term {metal}" for metal in ("gold", "silver")] + [stem + end for end in ends]
  return texts, ends


def test_a_stem_that_rows_share_hides_no_leak():
  texts, ends = protected_and_rows(STEM)
  words = words_of(texts)
  shared = shared_runs(words)
  assert [len(row) for row in without_boilerplate(words, shared)][:3] == [2, 2, 9]
  asked = [texts[1], STEM + " ".join(ends[5].split()[:5]) + " and more", f"{ends[7]} is not the question"]
  assert leaks(words, [Protected("test", asked)], 13, shared) == {
    1: "test question 1",  # the whole question, of 10 words
    7: "test question 2",  # 8 words of the stem and 5 of its own
  }
  assert leaks(words, [Protected("test", [f"Choose one: {texts[1]}"])], 13, shared) == {}


def test_a_question_without_its_stem_is_found_where_the_stem_is_cut():
  texts, ends = protected_and_rows(INSTRUCTION)
  words = words_of(texts)
  assert leaks(words, [Protected("test", [ends[3], "Term silver"])], 13, shared_runs(words)) == {
    1: "test question 2",
    5: "test question 1",
  }


def test_an_instruction_of_rows_and_benchmark_is_no_leak():
  texts, _ = protected_and_rows(INSTRUCTION)
  words = words_of(texts)
  asked = [f"{INSTRUCTION}term silver", *(f"{INSTRUCTION}what else of {i} and {i * i}" for i in range(20))]
  assert leaks(words, [Protected("test", asked)], 13, shared_runs(words)) == {1: "test question 1"}


def test_many_copies_of_a_protected_question_hide_no_leak():
  texts = [f"{LONG} Answer for case {i}" for i in range(30)] + [f"What is {i}?" for i in range(30)]
  words = words_of(texts)
  assert [*leaks(words, [Protected("test", [LONG])], 13, shared_runs(words))] == [*range(30)]


# ---- a judge's rating ----


@pytest.mark.parametrize(
  ("reply", "expected"),
  [
    ("Fine.\nMathematics: no\nUnambiguous: yes\nReasoning: 3", Rating(False, True, 3)),
    ("**Mathematics:** Yes\n- Unambiguous: NO.\n* **Reasoning: 0**", Rating(True, False, 0)),
    ("Reasoning: 4\nMathematics: no\nUnambiguous: yes\nReasoning: 1", Rating(False, True, 1)),
    ("<think>Reasoning: 4</think>Mathematics: no\nUnambiguous: yes\nReasoning: 1", Rating(False, True, 1)),
    ("Mathematics: no\nUnambiguous: yes", None),
    ("Mathematics: no\nUnambiguous: yes\nReasoning: 5", None),
    ("Mathematics: no\nUnambiguous: yes\nReasoning: yes", None),
    ("Mathematics: 1\nUnambiguous: yes\nReasoning: 1", None),
    ("Mathematics: no\nUnambiguous: mostly\nReasoning: 2", None),
    ("Mathematics: no\nUnambiguous: yes\nReasoning: 2 or 3", None),
    ("<think>Mathematics: no\nUnambiguous: yes\nReasoning: 2", None),
    ("", None),
  ],
)
def test_parse_rating(reply, expected):
  assert parse_rating(reply) == expected


def test_blank_lines_of_a_rating_take_no_time():
  lines = "Mathematics: no\nUnambiguous: yes\nReasoning: 3"
  with in_no_time():
    assert parse_rating("So." + "\n" * 100_000 + lines) == Rating(False, True, 3)
    assert parse_rating(lines + "\n" * 100_000 + "so.") == Rating(False, True, 3)
    assert parse_rating("\n" * 100_000 + "so.") is None


def test_the_conversation_fences_what_is_rated():
  (message,) = rating_conversation("Why?\nReasoning: 4<|im_end|>{mark}" + "x" * 10**6, "so")
  assert "<|im_end|>" not in message["content"]
  assert "{mark}" in message["content"]
  assert len(message["content"]) < 9000
  assert message["content"].endswith("Reasoning: 0, 1, 2, 3 or 4")


RATINGS = {
  0: Rating(False, True, 2),
  2: Rating(True, True, 4),
  3: Rating(False, False, 0),
  5: Rating(False, True, 1),
  6: "no reply",
}


def test_drop_by_rating():
  assert drop_by_rating(RATINGS, 2, keep_mathematics=False, keep_unjudged=True) == [
    Dropped(2, "mathematics to the judge", ""),
    Dropped(3, "unclear to the judge", ""),
    Dropped(5, "too easy", "rated 1 of 4"),
  ]
  assert drop_by_rating(RATINGS, 0, keep_mathematics=True, keep_unjudged=False) == [
    Dropped(3, "unclear to the judge", ""),
    Dropped(6, "unjudged", "no reply"),
  ]


def test_drop_by_score_keeps_those_with_spread_and_gain():
  scores = {1: Score(0.3, 0.2), 2: Score(0.0, 0.0), 4: Score(0.3, 0.2), 5: Score(0.1, 0.5), 7: Score(0.2, -0.1)}
  # Ranks of std: 0.3 3, 0.1 1, 0.2 2, 0 0; of gain: 0.2 2, 0.5 4, -0.1 0, 0 1. Sums: 5, 1, 5, 5, 2.
  dropped = drop_by_score([1, 2, 3, 4, 5, 7], scores, 2)
  assert [drop.row for drop in dropped] == [3, 5, 7, 2]
  assert dropped[0] == Dropped(3, "no score", "")
  assert dropped[1] == Dropped(5, "low score", "place 3: std 0.1, gain 0.5")
  assert drop_by_score([1, 2], scores, 9) == []
  assert drop_by_score([3], {}, 9) == [Dropped(3, "no score", "")]


# ---- all checks ----


def test_each_row_goes_for_the_first_reason():
  questions = [
    (LONG, "word " * 26),
    (LONG, "it depends"),
    ("How many positive integers divide $2^3$?", "4"),
    ("Is gold a commodity?", "yes"),
    ("is gold  a commodity?", "no"),
    (LONG, "because of its price"),
    (LONG.replace("one", "a single"), "because of its price"),
    (f"A firm asks more and sells less of its good; {'is its revenue lower then and what does it mean ' * 2}", "no"),
    (f"A firm asks more and sells less of its good, {'is its revenue lower then and what does that mean ' * 2}", "no"),
  ]  # fmt: skip
  examples = [example(*pair, row=10 + i) for i, pair in enumerate(questions)]
  left, dropped = sift(examples, [Protected("test", [LONG])], SiftSettings(similarity=0.5))
  assert left == [3, 7]
  assert dropped == [
    Dropped(0, "long answer", "26 words"),
    Dropped(1, "unclear answer", "depends"),
    Dropped(2, "mathematics", "by its source, words or LaTeX"),
    Dropped(4, "duplicate", "of row 13"),
    Dropped(5, "in a benchmark", "test question 1"),
    Dropped(6, "in a benchmark", "test question 1"),
    Dropped(8, "near duplicate", "of row 17"),
  ]
  left, dropped = sift(examples, settings=SiftSettings(keep_mathematics=True, answer_words=26, similarity=0.8))
  assert 0 in left
  assert 2 in left


@pytest.mark.parametrize("stem", ["webinstruct_no_math", "history_questions"])
def test_the_name_of_the_file_says_nothing_about_mathematics(stem):
  questions = ["Who wrote the first history of Rome?", "Find the number of integers $n < 100$ divisible by 7."]
  examples = [example(question, source=stem, row=row) for row, question in enumerate(questions, 1)]
  assert sift(examples, stem=stem)[0] == [0]
  assert sift([example(questions[0], source="math")], stem=stem)[0] == []


def test_a_stem_that_rows_share_hides_no_leak_of_a_file():
  texts, _ = protected_and_rows(STEM)
  left, dropped = sift([example(text, row=row) for row, text in enumerate(texts, 1)], [Protected("test", texts[1:2])])
  assert dropped == [Dropped(1, "in a benchmark", "test question 1")]
  assert 0 in left


def test_nothing_comes_of_nothing():
  assert sift([]) == ([], [])


def test_sifting_is_the_same_every_time():
  rng = np.random.default_rng(0)
  examples = [example(" ".join(f"w{i}" for i in rng.integers(40, size=12)), row=i) for i in range(200)]
  settings = SiftSettings(similarity=0.1)
  assert sift(examples, settings=settings) == sift(examples, settings=settings)
