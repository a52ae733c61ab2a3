"""Which answer is found in a response, by which path, and that the search is linear and never raises."""

import time

import pytest

from rlpr_jax.grading.extraction import boxed, extract

# text, grader, answer, path
CASES = [
  ("<think> 6*7 </think> <answer> 42 </answer>", "number", "42", "answer_tag"),
  ("<answer>\n42\n</answer>", "text", "42", "answer_tag"),
  ("<answer> 41 </answer> <answer> 42 </answer>", "number", "41", "answer_tag"),
  ("<answer> 41 </answer> then <answer> 42", "number", "41", "answer_tag"),
  ("<answer></answer> The answer is 42.", "number", "", "answer_tag"),
  ("<think> <answer> 41 </answer> </think> <answer> 42 </answer>", "number", "42", "answer_tag"),
  ("<answer> \\boxed{7} </answer>", "math", "\\boxed{7}", "answer_tag"),
  ("</answer> <answer> 42 </answer>", "number", "42", "answer_tag"),
  ("<think> hm </think> <answer> 42", "number", "42", "open_answer_tag"),
  ("<answer> <answer> 42", "number", "42", "open_answer_tag"),
  ("</answer> <answer> 42", "number", "42", "open_answer_tag"),
  ("So $\\boxed{42}$.", "number", "42", "boxed"),
  ("So \\boxed{1} and then \\boxed{\\frac{1}{2}}. The answer is 3", "math", "\\frac{1}{2}", "boxed"),
  ("\\boxed {x} cm", "math", "x", "boxed"),
  ("\\fbox{5}", "number", "5", "boxed"),
  ("\\boxed{\\boxed{5} + 1}", "math", "\\boxed{5} + 1", "boxed"),
  ("\\boxed{\\{1, 2\\}}", "math", "\\{1, 2\\}", "boxed"),
  ("\\boxed{4} or \\boxed{5", "number", "4", "boxed"),
  ("{ \\boxed{5}", "number", "5", "boxed"),
  ("\\boxed{5", "text", None, "none"),
  ("<think> \\boxed{4} </think> The answer is 5.", "number", "5", "answer_is"),
  ("<think> \\boxed{4} and no end. The answer is 5.", "number", "4", "boxed"),
  ("The answer is 42.", "number", "42", "answer_is"),
  ("The answer is 4.2. Then some more.", "number", "4.2", "answer_is"),
  ("Final Answer: The final answer is $42$. I hope it is correct.", "math", "$42$", "answer_is"),
  ("**Answer:** 42", "number", "42", "answer_is"),
  ("the ANSWER is: 42", "number", "42", "answer_is"),
  ("The answer is 41. No, the answer is 42.", "number", "42", "answer_is"),
  ("The answer is:\n\n\\[ x^2 \\]\n", "math", "\\[ x^2 \\]", "answer_is"),
  ("The answer is $$\nx^2\n$$.", "math", "$$\nx^2\n$$", "answer_is"),
  ("The answer is $5$ cm, or so.", "number", "$5$ cm, or so", "answer_is"),
  ("The answer is M*.", "math", "M*", "answer_is"),
  ("The answer is **M**", "math", "M", "answer_is"),
  ("The answer is .5", "number", ".5", "answer_is"),
  ("The answer is B. Paris", "multiple_choice", "B. Paris", "answer_is"),
  ("The answer is St. Paul. It is a city.\n\nBye.", "text", "St. Paul. It is a city.", "answer_is"),
  ("We take A first.\n\n**B**\n", "multiple_choice", "B", "letter"),
  ("(c)", "multiple_choice", "C", "letter"),
  ("A\nthe option B.", "multiple_choice", "B", "letter"),
  ("So option D fits, not the others.", "multiple_choice", "D", "letter"),
  ("The correct choice is (D) here.", "multiple_choice", "D", "letter"),
  ("a dog and I", "multiple_choice", None, "none"),
  ("first 41, then 42 apples", "number", "42", "last_number"),
  ("it is -1,000.5", "math", "-1,000.5", "last_number"),
  ("we get 5-3", "number", "3", "last_number"),
  ("it is 3/4 then", "math", "3/4", "last_number"),
  ("it is $-\\frac{3}{4}$", "math", "-\\frac{3}{4}", "last_mathematics"),
  ("so the pair $(x, y)$ is $(7, 6)$.", "math", "(7, 6)", "last_mathematics"),
  ("so the pair $(x, y)$ is $(7, 6)$.", "number", "6", "last_number"),
  ("it costs $5, not 6$", "math", "5", "last_number"),
  ("it costs $5 and $6", "math", "6", "last_number"),
  ("it is 1.5 \\times 10^{-3} m", "number", "1.5\\times10^{-3}", "last_number"),
  ("about 1.5e-3 m", "number", "1.5e-3", "last_number"),
  ("about 10\\,000 m", "number", "10\\,000", "last_number"),
  ("about 10~000{,}000 m", "number", "10~000{,}000", "last_number"),
  ("about 25\\% of it", "number", "25\\%", "last_number"),
  ("4 of 5", "text", None, "none"),
  ("", "number", None, "none"),
  ("no idea", "math", None, "none"),
  ("\ud800\udfff", "math", None, "none"),
]


@pytest.mark.parametrize(("text", "grader", "answer", "path"), CASES)
def test_cases(text, grader, answer, path):
  assert extract(text, grader) == (answer, path)


def test_the_order_of_the_paths():
  pieces = ["<answer> 1 </answer>", "<answer> 2", "\\boxed{3}", "The answer is 4.", "5"]
  paths = ["answer_tag", "open_answer_tag", "boxed", "answer_is", "last_number"]
  for i, path in enumerate(paths):
    assert extract("\n".join(reversed(pieces[i:])), "number").path == path


def test_boxes():
  assert boxed("no box") is None
  assert boxed("\\boxed{1}, \\boxed{2} and $x = \\boxed{3}$") == "1, 2, 3"
  assert boxed("\\boxed{1}. Then \\boxed{2}") == "2"
  assert boxed("\\boxed{1}\n\\boxed{1}") == "1"
  assert boxed("\\boxed{a{b}{c{d}}}") == "a{b}{c{d}}"
  assert boxed("} \\boxed{a} }") == "a"


OPTIONS = {"A": "12 N", "B": "14 N"}


@pytest.mark.parametrize(
  ("text", "answer", "path"),
  [
    ("\\boxed{7} and so the answer is (B).", "(B)", "answer_is"),
    ("\\boxed{14 N} and so the answer is (A).", "14 N", "boxed"),  # the first path that names an option
    ("The answer is 15 N.\n\nB", "B", "letter"),
    ("The answer is 15 N. Option B is too small.", "15 N. Option B is too small", "answer_is"),
    ("\\boxed{7}", "7", "boxed"),
  ],
)
def test_options_of_the_question(text, answer, path):
  assert extract(text, "multiple_choice", OPTIONS) == (answer, path)


def test_a_repeated_question_does_not_end_the_response():
  asked = "Question: 6 * 7?\n"
  assert extract(f"{asked}The answer is 42.", "number").answer == "42"
  assert extract(f"Let me see.\n{asked}The answer is 42.", "number").answer == "42"
  assert extract(f"{asked}The answer is 42.\n\n{asked}The answer is 43.", "number").answer == "42"
  assert extract(f"6 * 7 = 42\n{asked}The answer is 43.", "number").answer == "42"


MILLION = 1_000_000
LONG = {
  name: (text * (MILLION // len(text) + 1))[:MILLION]
  for name, text in {
    "open braces": "{",
    "closing braces": "}",
    "boxes": "\\boxed{",
    "empty boxes": "\\boxed{}",
    "answers": "answer is ",
    "next questions": "Question:\n",
    "marks of GSM8K": "#### 1\n",
    "displayed": "the answer is \\[ ",
    "open tags": "<answer>",
    "closing tags": "</answer>",
    "thoughts": "<think></think>",
    "spaces": " ",
    "line ends": "\n",
    "dots": ". ",
    "letters": "A\n",
    "options": "option ",
    "digits": "9",
    "commas": "999,",
    "fractions": "\\frac{1}{2",
    "minuses": "-",
    "powers": "1 x 10^",
    "stars": "*",
    "dollars": "$",
    "zero width": "\u200b",
    "surrogates": "\ud800",
  }.items()
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts(name):
  """A million characters, twice: time grows with the length, not with its square."""
  for text in (LONG[name], f"<answer>{LONG[name]}</answer>", f"The answer is {LONG[name]}"):
    start = time.process_time()
    for grader in ("multiple_choice", "number"):
      extract(text, grader)
    assert time.process_time() - start < 10
