# ruff: noqa: RUF001 the signs of other scripts
r"""Responses as models write them to public suites, by kind, and whether each is right.

The forms are those of lm-evaluation-harness (GSM8K, MMLU-Pro, BBH), simple-evals (MMLU and MGSM in many languages),
MMLU-Pro's and TheoremQA's own evaluations and the outputs published with them; every text is written anew.
"""

from rlpr_jax.grading.inference import as_question
from rlpr_jax.grading.question import Question

FOUR = ("Rome", "Paris", "Oslo", "Bern")
TEN = ("12 N", "14 N", "16 N", "18 N", "20 N", "22 N", "24 N", "26 N", "28 N", "30 N")


def number(reference, rtol=0.0, rounded=False):
  return Question("1", "How many?", reference, "", "number", rtol=rtol, rounded=rounded)


def math(reference):
  return Question("1", "Solve.", reference, "", "math")


def text(reference):
  return Question("1", "Who?", reference, "", "text")


def choice(reference, options=FOUR):
  return Question("1", "Which?", reference, "", "multiple_choice", tuple(options))


def own(reference, question="What is it?"):
  """A row of a file that says no more than question and answer."""
  return as_question("1", question, [reference])


def each(question, responses, right):
  return [(question, response, right) for response in responses]


NEXT = "Question: Tom has 7 pens and buys 4 more. How many has he?\nAnswer: 7 + 4 = 11. The answer is 11."

# kind -> question, response, right
FREE_TEXT = {
  "statements about correctness": [
    *each(
      number("18"),
      (
        "The answer is 18. This answer is correct.",
        "The answer is 18. So the answer is correct.",
        "The answer is 18.\n\nThis answer is reasonable, since 18 < 20.",
        "So the answer is 18. I checked, and my answer is right.",
        "The answer is **18**.\nThe answer is verified.",
        "The answer is 18. Let me check: 9 * 2 = 18. The answer is consistent with the question.",
        "We get 9 * 2 = 18. This answer is correct.",
        "The answer is 18. This answer is not wrong.",
        "The answer is 18. The answer is obvious.",
        "Answer: 18\nThe above answer is accurate.",
      ),
      True,
    ),
    *each(
      number("True"),
      (
        "The answer is False. This answer is correct.",
        "The answer is False. The answer is correct.",
        "The answer is 18. This answer is correct.",
        "The answer is no. I hope my answer is right.",
        "This answer is correct.",
      ),
      False,
    ),
    *each(
      number("True"), ("The answer is True. The answer is correct.", "The answer is yes.\nThis answer is right."), True
    ),
    (text("valid"), "So the answer is valid.", True),
    (text("Paris"), "The answer is Paris. This answer is correct.", True),
    (choice("B"), "The answer is (B). This answer is correct.", True),
    (choice("B"), "The answer is (B). The answer is a capital.", True),
  ],
  "unfinished statements": [
    (number("18"), "The answer is 18.\nThe answer is 18.\nThe answer is", True),
    (number("18"), "The answer is 18.\nThe answer is 18.\nThe answer is 1", True),
    (number("88.33", 0.04), "So the answer is 88.\n```\nThe answer is 88.\n```\nThe answer", True),
    (number("True"), "The answer is True.\n```\nThe answer is True.\n```\nThe answer is Tr", True),
    (choice("C"), "The answer is (C).\n```lean\nThe answer is (C).\n```\n```lean\nThe answer is (", True),
    (choice("C"), "The answer is (C).\n```lean\nThe answer is (c", True),
    (math("x^2"), "The answer is $x^2$. The answer is $", True),
    (text("Paris"), "The answer is Paris.\n\nThe answer is", True),
    (number("18"), "The answer is:", False),
    (number("7"), "First 7 + 11. The answer is 18. The answer is", False),
    (number("17"), "The answer is 17. No, the answer is 18.", False),
    (number("18"), "The answer is 17. No, the answer is 18.", True),
    (number("5"), "The answer is found by dividing 10 by 2, which gives 5", True),
    (number("5"), "The answer is 5 because 10 / 2 = 5.", True),
    (number("5"), "The answer to the question is 5.", True),
    (number("5"), "The correct answer should be 5.", True),
    (number("5"), "The answer is not 4. It is 5.", True),
    (number("4"), "The answer is not 4. It is 5.", False),
    (number("5"), "The answer is 5. The answer is not 4.", True),
  ],
  "a new question ends the response": [
    *((number("18"), f"9 * 2 = 18. The answer is 18.\n\n{NEXT}", right) for right in (True,)),
    (number("11"), f"9 * 2 = 18. The answer is 18.\n\n{NEXT}", False),
    (number("18"), f"9 * 2 = 18\n#### 18\n\n{NEXT}\n#### 11", True),
    (number("11"), f"9 * 2 = 18\n#### 18\n\n{NEXT}\n#### 11", False),
    (number("18"), f"So she has 9 * 2 = 18 eggs.\n\n{NEXT}", True),
    *(
      (number("18"), f"The answer is 18.\n\n{mark} Tom has 7 pens.\nThe answer is 7.", True)
      for mark in (
        "Q:",
        "Question:",
        "Question 2:",
        "**Question:**",
        "### Question\n",
        "Problem:\n",
        "Problem 3.",
        "## Problem 3\n",
        "### Instruction:\n",
        "Human:",
        "User:",
        "USER:",
        "[INST]",
        "<|im_start|>user\n",
        "<start_of_turn>user\n",
        "问题：",
        "Frage:",
        "Pregunta:",
        "Question :",
        "<|start_header_id|>user<|end_header_id|>",
      )
    ),
    (choice("B"), "The answer is (B).\n\nQuestion: Who?\nOptions:\nA. I\nB. you\nAnswer: The answer is (A).", True),
    (choice("A"), "The answer is (B).\n\nQuestion: Who?\nOptions:\nA. I\nB. you\nAnswer: The answer is (A).", False),
    (number("18"), "Question: Ann has 9 hens with 2 eggs each.\nAnswer: The answer is 18.", True),
    (number("18"), "Sure, here is my solution.\n\nQuestion: Ann has 9 hens.\n\nThe answer is 18.", True),
    (number("18"), "<think> hm </think> <answer> 18 \n\nQuestion: Tom has 7 pens. <answer> 7", True),
    (number("18"), "The question: how many eggs? The answer is 18.", True),
    (
      text("] }"),
      "So we need ] and }. So the answer is ] }.\n\nQ: Complete the rest. Input: [ (\nA: So the answer is ) ].",
      True,
    ),
    (
      number("[1, 2]"),
      "Therefore the vector is [1, 2].\nThe answer is [1, 2]\n\nProblem:\nFind x.\nSolution\nThe answer is 3",
      True,
    ),
  ],
  "GSM8K's mark": [
    (number("18"), "9 * 2 = $<<9*2=18>>18 a day.\n#### 18", True),
    (number("1080"), "She earns 1,080.\n#### 1,080", True),
    (number("1080"), "#### $1,080", True),
    (number("-5"), "He is down by 5.\n#### -5", True),
    (number("7.5"), "#### 7.50", True),
    (number("18"), "####18", True),
    (number("18"), "#### 18.", True),
    (number("18"), "#### 18 eggs", True),
    (number("18"), "It is 18.\nA: 18", True),
    (number("18"), "A: First 9. Then 9 * 2 = 18. The answer is 18.", True),
    (number("18"), "#### Step 1: take 9\nThen 9 * 2 = 18.\n#### Answer: 18\nDone in 2 steps.", True),
    (number("18"), "#### 1. Take 9\nText.\n#### 2. Double it\nThis gives 18", True),
    (number("18"), "The answer is 17.\n#### 18", True),
    (number("17"), "The answer is 17.\n#### 18", False),
  ],
  "several boxes": [
    (math("1, -2"), "So $x = \\boxed{1}$ or $x = \\boxed{-2}$.", True),
    (math("1"), "So $x = \\boxed{1}$ or $x = \\boxed{-2}$.", False),
    (math("-2"), "So $x = \\boxed{1}$ or $x = \\boxed{-2}$.", False),
    (number("[3, 5]"), "The values are $\\boxed{3}$ and $\\boxed{5}$.", True),
    (number("5"), "The values are $\\boxed{3}$ and $\\boxed{5}$.", False),
    (number("[3, 5, 7]"), "\\boxed{3}, \\boxed{5}, \\boxed{7}", True),
    (number("5"), "First $\\boxed{3}$ apples. With two more that is $\\boxed{5}$.", True),
    (number("5"), "So $\\boxed{5}$, $\\boxed{5}$.", True),
    (text("red, blue"), "They are \\boxed{red} and \\boxed{blue}.", True),
  ],
  "a letter and a box of working": [
    (choice("B", TEN), "The force is $\\boxed{14.0}$. The answer is (B).", True),
    (choice("B", TEN), "The answer is (B), since $F = ma = \\boxed{14.02}$.", True),
    (choice("B", TEN), "$F = \\boxed{7 \\cdot 2}$\n\n**B**", True),
    (choice("B", TEN), "So $F = \\boxed{14 N}$.", True),
    (choice("B", TEN), "The answer is (C). So $\\boxed{B}$.", True),
    (choice("B", TEN), "The force is $\\boxed{99}$. Option B is too small.", False),
    (choice("B"), "The answer is Paris.", True),
    (choice("B"), "The answer is Rome. It is not Paris.", False),
  ],
}

# As MGSM's examples in each language end, and as simple-evals asks for it.
LANGUAGES = {
  "markers in other languages": [
    *(
      (number("11"), f"5 + 6 = 11. {marker} 11", True)
      for marker in (
        "Antwort:",
        "Respuesta:",
        "Réponse :",
        "Risposta:",
        "Resposta:",
        "Ответ:",
        "答案：",
        "答案:",
        "答え：",
        "答え:",
        "回答：",
        "解答:",
        "답변:",
        "정답:",
        "답:",
        "উত্তর:",
        "उत्तर:",
        "الإجابة:",
        "الجواب:",
        "الإجابة النهائية:",
        "Jawaban:",
        "Jibu:",
        "Ìdáhùn:",
        "คำตอบ:",
        "సమాధానం:",
      )
    ),
    *each(
      number("11"),
      (
        "5 + 6 = 11. Die Antwort ist 11.",
        "5 + 6 = 11. La respuesta es 11.",
        "5 + 6 = 11. La réponse est 11.",
        "5 + 6 = 11. La risposta è 11.",
        "5 + 6 = 11. A resposta é 11.",
        "5 + 6 = 11. Ответ — 11.",
        "5 + 6 = 11。答案是 11。",
        "5 + 6 = 11。因此答案为11。",
        "5 + 6 = 11。答えは11です。",
        "5 + 6 = 11. คำตอบคือ 11",
        "5 + 6 = 11. Jibu ni 11.",
        "5 + 6 = 11. 답은 11입니다.",
        "Respuesta: 11\n\nPregunta: Tom tiene 7.\nRespuesta: 7",
      ),
      True,
    ),
    *(
      (number("5"), f"5 + 6 = 11. {marker} 11", False)
      for marker in ("Antwort:", "Respuesta:", "答案是", "Ответ:", "Jibu ni")
    ),
    *(
      (choice("B"), response, True)
      for response in (
        "Antwort: B",
        "Respuesta: (B)",
        "答案：B",
        "答案是（B）。",
        "答え：Ｂ",
        "정답: B",
        "الإجابة: ب",
        "উত্তর: ব",
        "Réponse : **B**",
        "Ответ: B. Париж",
      )
    ),
    *((choice("C"), response, True) for response in ("الإجابة الصحيحة هي: ج", "উত্তরঃ ড", "回答：Ｃ")),
    *((choice("B"), response, False) for response in ("الإجابة: أ", "উত্তর: ঢ", "答案：Ａ", "Antwort: C")),
    (text("Paris"), "Es liegt in Frankreich. Die Antwort ist Paris.", True),
  ],
}

# TheoremQA's prompts end in "The answer is ..."; what follows is what base models go on with.
THEOREMQA = {
  "TheoremQA's outputs": [
    (
      number("11760", rounded=True),
      "There are 429 ways.\nThe answer is 429\n\nProblem:\nFind B.\nSolution\nThe answer is [[1, 2], [3, 4]]",
      False,
    ),
    (
      number("11760", rounded=True),
      "There are 11760 ways.\nThe answer is 11760\n\nProblem:\nFind x.\nSolution:\nThe answer is 3",
      True,
    ),
    (number("9.87", 0.04), "So it is $\\pi^2$.\n\nThe answer is $\\pi^2$", True),
    (number("0.373", 0.04), "The wavelength is 0.373 nm.\nThe answer is 0.373 nm.", True),
    (number("150", rounded=True), "Both choose $150.\n\nThe answer is $150.", True),
    (number("0", rounded=True), "Both choose $150.\n\nThe answer is $150.", False),
    (number("[4, 1, 2, 0]"), "The shortest path is [4, 3, 0].\n\nThe answer is [4, 3, 0]", False),
    (number("[0, 5]"), "The total distance is 1.\nThe answer is [0, 5].\n\n", True),
    (number("[0, 5]"), "The answer is (0, 5).", True),
    (number("False"), "The answer is no.\n\nTo prove this, we use Fermat's theorem. Hence there is no such c.", True),
    (
      number("True"),
      "True.\n\nThe maximum is concave. Therefore, the answer is True.\nThe answer is True.\nThe answer is True",
      True,
    ),
    (
      number("88.33", 0.04),
      "so it is $88.33.\n\nTherefore, the answer is 88.\nThe answer is 88.\nThe answer is 88.\nThe answer is",
      True,
    ),
    (choice("B", ()), "which is its inverse.\nThe answer is (b).\n\n", True),
    (choice("D", ()), "which is its inverse.\nThe answer is (b).\n\n", False),
    (number("2.7182818", 0.04), "Hence g(x)/x tends to e.\nThe answer is e.", True),
    (number("1", rounded=True), "The answer is 1.4", True),
    (number("1", rounded=True), "The answer is 1.5", False),
    (number("2", rounded=True), "The answer is 1.5", True),
    (number("0.5", 0.04), "The answer is 1/2.", True),
    (number("0.5", 0.04), "The answer is \\frac{1}{2}\n\n### Instruction:\nThe answer is 3.", True),
    (number("1000000", rounded=True), "The answer is 10^6", True),
    (number("3.5e-05", 0.04), "The answer is 3.5 * 10^-5 m", True),
    (number("5", rounded=True), "To find it we sum and then the result is 5", True),
  ],
}

DRESSINGS_OF_A_LETTER = (
  "B", "b", "(B)", "[B]", "{B}", "<B>", '"B"', "'B'", "“B”", "«B»", "`B`", "*B*", "**B**", "_B_", "***B***", "B.", "B)",
  "B:", "B,", "(B).", "(B):", "(B.)", "Ｂ", "（Ｂ）", "【B】", "「B」",
  "$B$", "$(B)$", "\\(B\\)", "\\[B\\]", "\\text{B}",
  "\\mathrm{B}", "\\mathbf{(B)}", "\\textbf{(B)}", "$\\boxed{B}$", "\\boxed{\\text{(B)}}", "\\boxed{\\textbf{(B) }}",
  "<b>B</b>", "Option B", "option (B)", "Choice B", "choice: B", "Letter B", "B is correct", "(B) is correct",
  "(B) is correct.", "B is the correct answer", "B is right.", "Option B is correct.", "**(B)** is the answer",
  "The answer is B.", "The correct answer is (B).", "Answer: (B)", "ANSWER: B", "Final answer: **B**", "I choose B.",
  "It is B", "It's (B).", "B!", "must be B", "(B. Paris)", "(B) Paris", "(B) Paris.", "B. Paris", "B) Paris",
  "B - Paris", "B – Paris", "B: Paris", "**B. Paris**", "**B**: Paris", "B\nParis", '"B. Paris"', "B (Paris)",
  "[B] Paris", "B, Paris", "\\boxed{B. Paris}", "\\boxed{\\text{B. Paris}}", "Option B: Paris", "Paris", '"Paris"',
  "*Paris*", "Paris (B)", "Ｂ．Paris", "$\\textbf{(B)}\\ \\text{Paris}$", "Paris, option B",
)  # fmt: skip
REASONS = (
  "B because A is wrong", "B, since (A) is not in France", "(B), not (A)", "B rather than A", "B (not A)",
  "B. A is in Italy.", "(B). Option A is the capital of Italy.", "B, because Rome is the capital of Italy",
  "(B) since neither Rome nor Oslo is in France", "The answer is B. A, C and D are wrong.",
  "The answer is (B), as (A) and (C) are wrong.", "B. Paris, because Rome (A) is not in France",
  "(B) Paris. Options A and C are not in France.", "B is correct; A is not.", "B; the others, A and D, are wrong",
  "The answer is B, because A or C would be too far south.", "B. The capital is Paris, unlike Rome.",
)  # fmt: skip
SEVERAL = (
  "A", "(A)", "A or B", "(B) or (C)", "B, C", "B and D", "B/C", "not B", "not (B)", "B is wrong", "(B) is incorrect",
  "B is not correct", "B is false", "Rome", "A. Paris", "B. Rome", "Paris or Rome", "either B or C", "B or maybe C",
  "\\boxed{A} or \\boxed{B}", "A. No, B", "neither A nor B", "[B] or [C]", '"A"', "*C*", "Ａ", "(A. Rome)", "Because",
  "Both B and C", "A, B", "B & C", "all of A, B and C", "Option A is correct, not B", "A, not B", "A rather than B",
)  # fmt: skip
CHOICES = {
  "dressings of a letter": [
    *((choice("B"), f"<answer> {dress} </answer>", True) for dress in DRESSINGS_OF_A_LETTER),
    *(
      (choice("B"), f"I see.\n\nThe answer is {dress}", True) for dress in DRESSINGS_OF_A_LETTER if "nswer" not in dress
    ),
    *((choice("C"), f"<answer> {dress} </answer>", False) for dress in DRESSINGS_OF_A_LETTER),
  ],
  "reasons that mention other options": [
    *((choice("B"), f"<answer> {answer} </answer>", True) for answer in REASONS),
    *((choice("A"), f"<answer> {answer} </answer>", False) for answer in REASONS),
  ],
  "several options or another one": [(choice("B"), f"<answer> {answer} </answer>", False) for answer in SEVERAL],
}

INFERRED = {
  "matrices and lists": [
    *each(
      own("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
      (
        "<answer>\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}</answer>",
        "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}",
      ),
      True,
    ),
    *each(
      own("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
      ("\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}}", "1"),
      False,
    ),
    *each(
      own("6 and 8"),
      (
        "<answer>8 and 6</answer>",
        "\\boxed{6, 8}",
        "The answer is 6 and 8.",
        "<answer>6,8</answer>",
        "\\boxed{6} and \\boxed{8}",
      ),
      True,
    ),
    *each(
      own("6 and 8"),
      ("<answer>6</answer>", "<answer>6 and 9</answer>", "<answer>6, 8, 9</answer>", "<answer>68</answer>"),
      False,
    ),
    *each(own("1, 2, 3"), ("<answer>1, 2 and 3</answer>", "<answer>3, 2, 1</answer>"), True),
    *each(
      own("100,200,300"),
      ("<answer>100, 200, 300</answer>", "<answer>100,200,300</answer>", "<answer>100, 200 and 300</answer>"),
      True,
    ),
    *each(
      own("100,200,300"),
      ("<answer>100, 200</answer>", "<answer>100</answer>", "<answer>600</answer>", "<answer>100, 200, 301</answer>"),
      False,
    ),
    *each(own("1,234,567"), ("<answer>1234567</answer>", "<answer>1,234,567</answer>"), True),
    *each(own("1,234,567"), ("<answer>1, 234, 567</answer>", "<answer>1234568</answer>"), False),
    (own("150,000"), "<answer>150000</answer>", True),
  ],
  "ranges and dates": [
    *each(
      own("10-20"),
      (
        "<answer>10-20</answer>",
        "<answer>10 - 20</answer>",
        "<answer>10–20</answer>",
        "<answer>10 to 20</answer>",
        "The answer is 10-20.",
        "<answer>between 10 and 20</answer>",
      ),
      True,
    ),
    *each(
      own("10-20"),
      (
        "<answer>-10</answer>",
        "<answer>10</answer>",
        "<answer>20</answer>",
        "<answer>10-30</answer>",
        "<answer>15</answer>",
        "<answer>20-10</answer>",
      ),
      False,
    ),
    *each(own("10%-20%"), ("<answer>10%-20%</answer>",), True),
    *each(own("$5-$10"), ("<answer>$5-$10</answer>", "<answer>$5 to $10</answer>"), True),
    *each(own("2023-01-05"), ("<answer>2023-01-05</answer>", "<answer> 2023-01-05. </answer>"), True),
    *each(own("2023-01-05"), ("<answer>2017</answer>", "<answer>2023-01-06</answer>", "<answer>2023</answer>"), False),
    *each(own("12/25/2023"), ("<answer>12/25/2023</answer>",), True),
    *each(own("12/25/2023"), ("<answer>0.000237</answer>", "<answer>12/24/2023</answer>"), False),
    *each(
      own("1914-1918"),
      ("<answer>1914-1918</answer>", "<answer>1914 to 1918</answer>", "<answer>from 1914 to 1918</answer>"),
      True,
    ),
    *each(own("1914-1918"), ("<answer>-4</answer>", "<answer>1914</answer>"), False),
    *each(own("3/4"), ("<answer>0.75</answer>", "<answer>\\frac{3}{4}</answer>"), True),
    *each(own("-10"), ("<answer>-10</answer>",), True),
    *each(own("7:40"), ("<answer>7:40</answer>",), True),
    *each(own("7:40"), ("<answer>7:41</answer>",), False),
  ],
  "number words": [
    *each(
      own("two"), ("<answer>2</answer>", "<answer>two</answer>", "<answer>Two.</answer>", "The answer is two."), True
    ),
    *each(
      own("two"),
      ("<answer>3</answer>", "<answer>twelve</answer>", "<answer>two or three</answer>", "<answer>22</answer>"),
      False,
    ),
    *each(own("2"), ("<answer>two</answer>", "The answer is two.", "<answer>two apples</answer>"), True),
    *each(
      own("2"), ("<answer>twenty</answer>", "<answer>less than two</answer>", "<answer>two thirds</answer>"), False
    ),
    *each(own("twenty-five"), ("<answer>25</answer>", "<answer>twenty five</answer>"), True),
    *each(
      own("125"), ("<answer>one hundred and twenty-five</answer>", "<answer>one hundred twenty-five</answer>"), True
    ),
    *each(own("3500"), ("<answer>three thousand five hundred</answer>",), True),
    *each(own("three apples"), ("<answer>3</answer>", "<answer>3 apples</answer>", "<answer>three</answer>"), True),
    *each(own("three apples"), ("<answer>3 pears</answer>", "<answer>4 apples</answer>"), False),
    *each(own("Seven Samurai"), ("<answer>Seven Samurai</answer>",), True),
    *each(own("Seven Samurai"), ("<answer>7</answer>",), False),
  ],
}

DYCK = ("]", "] }", "} ]", ") > ]", "> } } ]", ") ) ]", "] ] >", "} > ) ] ]")
TEXTS = {
  "brackets of BBH": [
    *((text(reference), f"We need to pop them. So the answer is {reference}.", True) for reference in DYCK),
    *((text(reference), f"<answer> {reference}. </answer>", True) for reference in DYCK),
    *((text(reference), f"<answer>{reference.replace(' ', '')}</answer>", True) for reference in DYCK),
    *((text(reference), f"So the answer is {reference} ].", False) for reference in DYCK),
    *((text(reference), f"So the answer is ( {reference}.", False) for reference in DYCK),
  ],
  "currencies": [
    *each(
      text("$50"),
      ("<answer>$50</answer>", "<answer>50</answer>", "<answer>$50.00</answer>", "<answer>50 dollars</answer>"),
      True,
    ),
    *each(
      text("$50"),
      ("<answer>€50</answer>", "<answer>£50</answer>", "<answer>50 euros</answer>", "<answer>$51</answer>"),
      False,
    ),
    *each(text("€50 million"), ("<answer>€50 million</answer>", "<answer>50 million</answer>"), True),
    *each(text("€50 million"), ("<answer>$50 million</answer>", "<answer>¥50 million</answer>"), False),
    *each(number("$50"), ("<answer>$50</answer>", "<answer>50 dollars</answer>", "<answer>\\$50</answer>"), True),
    *each(number("$50"), ("<answer>€50</answer>", "<answer>50 euros</answer>", "<answer>£ 50</answer>"), False),
    *each(own("£50"), ("<answer>£50</answer>", "<answer>50 pounds</answer>"), True),
    *each(own("£50"), ("<answer>$50</answer>", "<answer>¥50</answer>"), False),
  ],
  "signs that are part of a name": [
    *each(text("C"), ("<answer>C</answer>", "<answer>C.</answer>", "<answer>the C</answer>"), True),
    *each(text("C"), ("<answer>C#</answer>", "<answer>C++</answer>"), False),
    *each(text("C#"), ("<answer>C#</answer>", "<answer>c#.</answer>"), True),
    *each(text("C#"), ("<answer>C</answer>", "<answer>C++</answer>"), False),
    *each(text("C++"), ("<answer>C</answer>", "<answer>C#</answer>"), False),
    *each(text("A+ students"), ("<answer>A students</answer>", "<answer>A- students</answer>"), False),
    *each(text("x ≤ 5 always"), ("<answer>x ≥ 5 always</answer>", "<answer>x 5 always</answer>"), False),
    *each(text("Na+ ions"), ("<answer>Na+ ions</answer>",), True),
    *each(text("AT&T"), ("<answer>AT&T</answer>", "<answer>at&t.</answer>"), True),
    *each(
      text('"Emma" by Jane Austen'),
      ("<answer>Emma by Jane Austen</answer>", "<answer>*Emma* by Jane Austen.</answer>"),
      True,
    ),
    *each(
      text("New York"),
      ("The answer is New York.", "So the answer is: **New York**.", "<answer>New York!</answer>"),
      True,
    ),
  ],
}

HEDGED = (
  "anything but {}", "any number but {}", "all but {}", "everything except {}", "any number other than {}",
  "less than {}", "more than {}", "fewer than {} apples", "greater than {}", "at least {}", "at most {}", "up to {}",
  "under {}", "over {}", "above {}", "below {}", "no more than {}", "not {}", "it isn't {}", "it is never {}",
  "it cannot be {}", "{} or more", "{} or less", "at least {} apples", "a number below {}", "it exceeds {}",
  "{} is wrong", "the number is smaller than {}", "it is not equal to {}", "{} at most", "more than {} apples",
  "instead of {}", "without {}", "{} and above", "between {} and 9",
)  # fmt: skip
MEANT = (
  "{}", "it is {}", "about {}", "exactly {} apples", "there are {} apples", "she has {} apples left", "x = {}", "={}",
  "approximately {}", "{} apples more than Tom", "in total {}", "over the week she ate {} apples", "{}.", "**{}**",
  "It is hard, but she has {} apples", "the sum is {}", "{} because it is even",
)  # fmt: skip
NUMBERS = {
  "hedged numbers": [
    *((number(n), f"<answer> {form.format(n)} </answer>", False) for form in HEDGED for n in ("5", "4")),
    *((number(n), f"The answer is {form.format(n)}.", False) for form in HEDGED for n in ("5",)),
    *((number(n), f"<answer> {form.format(n)} </answer>", True) for form in MEANT for n in ("5", "1,250", "2.5")),
  ],
  "rounded to an integer": [
    *((number("1", rounded=True), f"<answer> {n} </answer>", True) for n in ("1", "1.0", "1.2", "0.9", "1.49")),
    *((number("1", rounded=True), f"<answer> {n} </answer>", False) for n in ("1.5", "0.5", "0.4", "2", "1.6", "-1")),
    *((number("1"), f"<answer> {n} </answer>", False) for n in ("1.5", "1.1", "0.9")),
    *((own("1"), f"<answer> {n} </answer>", False) for n in ("1.5", "1.1", "0.9")),
  ],
}

KINDS = {**FREE_TEXT, **LANGUAGES, **THEOREMQA, **CHOICES, **INFERRED, **TEXTS, **NUMBERS}
