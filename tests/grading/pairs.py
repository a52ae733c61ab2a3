"""Answers that are right and wrong, on which the graders of benchmarks and the rule verifiers are tested."""

from rlpr_jax.evaluation.benchmarks import Question

CITIES = ("Rome", "Paris", "a dog", "A bigger, better dog", "$x^2$ metres", "None of these", "7.5", "1", "no", "Yes")


def ask(grader, reference, options=(), rtol=0.0, atol=0.0):
  return Question("1", "q", reference, "", grader, tuple(options), 1, rtol, atol)


CHOICE = ask("multiple_choice", "B", CITIES)
BARE_CHOICE = ask("multiple_choice", "B")
FLOAT = ask("number", "2.5", rtol=0.04)
INTEGER = ask("number", "5", atol=0.5)
EXACT = ask("number", "204")
HUGE = ask("number", "4.5e33", rtol=0.01)
SMALL = ask("number", "3e-36", rtol=0.04)
LIST = ask("number", "[0.5, -2.0]", rtol=0.04)
TRUE, FALSE = ask("number", "True"), ask("number", "False")
HALF = ask("math", "\\frac{1}{2}")
LABELLED = ask("text", "(B) quasi-public good.")
CITY = ask("text", "The New York Times")
YES = ask("text", "Yes")

# question, content of <answer>
RIGHT = [
  *((CHOICE, text) for text in ("B", "b", "(B)", "B.", "**B**", "$\\boxed{\\text{B}}$", "[B]", "{B}", "B: Paris")),
  *((CHOICE, text) for text in ("Paris", "paris.", "**B.** Paris", "\\text{B}. Paris", "B - Paris", "Option B")),
  *((CHOICE, text) for text in ("B because it is", "B, since A is not", "B is correct", "The answer is (B).")),
  *((BARE_CHOICE, text) for text in ("B", "(b)", "B. Paris")),
  *((CHOICE, text) for text in ("B. the capital of France", "B. London")),  # the letter decides where the text is none
  (ask("multiple_choice", "J", CITIES), "J"),
  (ask("multiple_choice", "J", CITIES), "yes"),
  (ask("multiple_choice", "C", CITIES), "dog"),
  (ask("multiple_choice", "D", CITIES), "A bigger,  better dog."),
  (ask("multiple_choice", "E", CITIES), "x^2 metres"),
  (ask("multiple_choice", "H", CITIES), "H. 1"),
  (ask("multiple_choice", "B", ("G", "S")), "S"),  # no option's letter, but an option's text
  (ask("multiple_choice", "B", ("[a / b]", "[b] / [a]", "c")), "B. [b] / [a]"),
  (ask("multiple_choice", "B", ("[b - a]", "[a - b]")), "The answer is B. [a - b]"),  # in brackets itself
  *(
    (FLOAT, text) for text in ("2.5", "2.5 m", "$2.50$", "\\frac{5}{2}", "5/2", "2.45", "2.6", "about 2.5 cm.", "x=2.5")
  ),
  *((FLOAT, text) for text in ("2\\frac{1}{2}", "\\sqrt{6.25}", "250\\%", "2.5 \\text{ kg}", "2.5 \\mathrm{~m/s}")),
  *((INTEGER, text) for text in ("5", "5.0", "5.4", "\\frac{10}{2}", "5 \\text{ units}", "\\boxed{5}", "5 apples")),
  *((EXACT, text) for text in ("204", "204.0", "0204", "\\boxed{204}", "204 minutes", "408/2", "2 \\cdot 102")),
  *((HUGE, text) for text in ("4.5e33", "4.5 \\times 10^{33}", "4.52 x 10^33 erg/s", "4.5·10³³", "45e32")),
  *((SMALL, text) for text in ("3e-36", "3.1 \\cdot 10^{-36}")),
  *((LIST, text) for text in ("[0.5, -2.0]", "(0.5,-2)", "\\{-2, \\frac{1}{2}\\}", "x=0.5, y=-2", "0.5 and -2")),
  *((LIST, text) for text in ("\\[ [0.5, -2] \\]", "\\begin{pmatrix} 0.5 \\\\ -2 \\end{pmatrix}", "$(0.51, -2)$")),
  *((TRUE, text) for text in ("True", "true.", "Yes", "yes, it is", "\\text{True}", "The answer is True.")),
  *((FALSE, text) for text in ("False", "no", "\\boxed{\\text{False}}")),
  *((HALF, text) for text in ("\\frac{1}{2}", "\\dfrac12", "$\\frac 12$", "1/2", "0.5", "\\left(\\frac{1}{2}\\right)")),
  *(
    (HALF, text) for text in ("x = \\frac{1}{2}", "The answer is $\\frac{1}{2}$.", "\\frac{2}{4}", "\\[ 0.5 \\]", ".5")
  ),
  (ask("math", "\\frac{2}{3} x"), "\\frac{2x}{3}"),
  (ask("math", "(3,4]"), "\\left(3, 4\\right]"),
  (ask("math", "1,-2"), "-2, 1"),
  (ask("math", "90^\\circ"), "90"),
  (ask("math", "90"), "90^{\\circ}"),
  (ask("math", "10,\\!080"), "10080"),
  (ask("math", "\\$18.90"), "18.9 dollars"),
  (ask("math", "864 \\mbox{ inches}^2"), "864"),
  (ask("math", "\\text{Evelyn}"), "evelyn."),
  (ask("math", "137 \\frac{1}{2}"), "137.5"),
  (ask("math", "y = 2x + 3"), "y=3+2x"),
  (ask("math", "6 - 5i"), "-5i + 6"),
  (ask("math", "x^2y^2"), "y^2x^2"),
  (ask("math", "x^2 e^{-x^2}"), "e^{-x^{2}} x^{2}"),
  (ask("math", "x^2 + 1"), "1 + x**2"),
  (ask("math", "3^n + 2^{n-1}"), "2^{n - 1} + 3^{n}"),
  (ask("math", "(n+1)!"), "(1+n)!"),
  (ask("math", "M*"), "The answer is M*."),
  (ask("math", "\\text{even}"), "The answer is \\text{even}."),
  (ask("math", ".35625"), "the answer is .35625"),
  (ask("math", "\\begin{pmatrix} 1/5 \\\\ 2 \\end{pmatrix}"), "\\begin{pmatrix} \\frac{1}{5} \\\\ 2 \\end{pmatrix}"),
  *((CITY, text) for text in ("The New York Times", "new york times", "New York\u00a0Times.", "N\u200bew  York Times")),
  *(
    (CITY, text)
    for text in ("\\boxed{\\text{New York Times}}", "The answer is the New York Times.", "\uff2eew York times")
  ),
  *((LABELLED, text) for text in ("(B) quasi-public good.", "quasi public good", "B", "(B)", "b. Quasi-public good")),
  *((YES, text) for text in ("Yes", "yes.", "Yes, because it is.", "**Yes**")),
  *((FALSE, text) for text in ("False, because it is not correct", "No, it is not true", "false; no")),
  *((TRUE, text) for text in ("True, since it is not false", "Yes. It is not incorrect")),
  *((ask("number", "5 m"), text) for text in ("5", "5 m", "5m", "5 meters", "5 \\text{ metres}", "5 \\mathrm{~m}")),
  *((ask("number", "50 cm"), text) for text in ("50 centimeters", "50 \\text{ cm}", "the length is 50 cm")),
  *((ask("number", "3 m/s"), text) for text in ("3 m s^{-1}", "3 meters per second", "3 \\text{ m}/\\text{s}")),
  *((ask("number", "9 m^2"), text) for text in ("9 square meters", "9 \\text{ m}^2", "9 metres squared")),
  *((ask("number", "30^\\circ"), text) for text in ("30", "30 degrees", "30°", "30 \\text{ deg}")),
  *((ask("number", "20 °C"), text) for text in ("20 degrees Celsius", "20^\\circ\\mathrm{C}", "20")),
  *((ask("number", "3 boxes"), text) for text in ("3 box", "3 big boxes", "3 units", "3")),
  *((ask("number", "3 cars"), text) for text in ("3", "3 red cars", "3 car", "three = 3 cars")),
  *((ask(kind, "50%"), text) for kind in ("number", "math") for text in ("0.5", "1/2", "50", "50\\%", "50 percent")),
  *((ask(kind, "50\\%"), text) for kind in ("number", "math") for text in ("0.5", "\\frac{1}{2}", "50%")),
  *(
    (ask(kind, "10000"), text)
    for kind in ("number", "math")
    for text in ("10\\,000", "10~000", "10 000", "10\u202f000", "10{,}000", "10\\ 000 \\text{ units}")
  ),
  (EXACT, "it is 204"),
  (ask("number", "1234567.5"), "1 234 567.5"),
  *((ask(kind, "1.5"), text) for kind in ("number", "math") for text in ("1 1/2", "1 \\frac12", "x = 1 1/2")),
  (ask("number", "-1.5"), "-1 1/2 cups"),
  *((ask(kind, "2^{100}"), str(2**100)) for kind in ("number", "math")),
  (ask("number", "2^{100}-1"), str(2**100 - 1)),
  (ask("number", str(2**53 + 1)), f"{2**53 + 1}.0"),
  (ask("number", "20!"), f"{20 * 19}*18!"),
  (ask("number", "4"), "2^{3}\\frac{1}{2}"),
  *((ask("number", "5"), text) for text in ("f(1, 2) = 5", "P(X > 3) = 5", "m + n = 2 + 3 = 5", "5! / 4! = 5", "5=5")),
  *((ask("number", "120"), text) for text in ("5! = 120", "5!=120", "\\sum_{i=1}^n i = 120", "n = 5 m = 120")),
  *((ask("math", text), text) for text in ("2^{2024}", "2014!", "5x - 7y + 11z + 4 = 0", "8m", "2^{2m}", "6xy")),
  (ask("math", "6xy"), "6yx"),
  (ask("math", "2^{2m}"), "4^m"),
  (ask("math", "8m"), "10m - 2m"),
  (ask("math", "\\frac{37}{4} m"), "\\frac{37m}{4}"),
  (ask("math", "\\frac12 m g"), "0.5gm"),
  (ask("math", "15\\mbox{ cm}^2"), "15 cm^2"),
  (ask("math", "15\\mbox{ cm}^2"), "15 \\text{ square centimeters}"),
  (ask("math", "6"), "6 \\text{ kg}"),
  (ask("text", "> } } ]"), ">}}]"),
  *((ask("text", "> } } ]"), text) for text in (" > }  } ] ", "> } } ].", "> } } ] .")),
  (ask("text", "+"), "+"),
  (ask("text", "(2) 2.6%"), "2.60%"),
  (ask("text", "a and d"), "A and D"),
]
WRONG = [
  *(
    (CHOICE, text) for text in ("A", "Rome", "A. Paris", "B. Rome", "A or B", "B, C", "not B", "Because", "", "Z", "2")
  ),
  *((CHOICE, text) for text in ("\\boxed{A} or \\boxed{B}", "The answer is A", "Paris or Rome", "K", "A bigger dog")),
  *((BARE_CHOICE, text) for text in ("A", "Paris")),
  *((FLOAT, text) for text in ("2.39", "2.61", "-2.5", "25", "2.5x", "2 or 3", "2, 5", "two", "2.5e1", "2.5 + x", "i")),
  *((INTEGER, text) for text in ("4.4", "6", "5 or 6", "5x", "[5]  6", "-5", "fifty", "5e5", "9^{9^{9^9}}", "1/0")),
  *((EXACT, text) for text in ("205", "204.5", "20", "1204", "204i", "20 4", "\\frac{204}{0}")),
  *((HUGE, text) for text in ("4.5", "4.6e33", "4.5e32", "4.5 \\times 10^{-33}", "\\infty")),
  *((SMALL, text) for text in ("0", "3e-35", "3")),
  *((LIST, text) for text in ("[0.5]", "[0.5, 2.0]", "0.5", "[0.5, -2, 1]", "[a, b]", "[]", "[0.5, -2")),
  *((TRUE, text) for text in ("False", "no", "maybe", "True or False", "not true", "1", "")),
  *((FALSE, text) for text in ("True", "yes", "0")),
  *((HALF, text) for text in ("2", "\\frac{1}{3}", "-\\frac{1}{2}", "\\frac{1}{2}x", "1", "half", "\\frac{1}{2", "12")),
  (ask("math", "(3,4]"), "[3,4]"),
  (ask("math", "x+1"), "x-1"),
  (EXACT, "9" * 400 + "%"),
  (EXACT, "9" * 400 + " million"),
  (EXACT, "9" * 200 + "*" + "9" * 200 + "%"),
  (ask("math", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"), "2"),
  (ask("math", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"), "\\hbar P_{0}^{2 / 5} (n-\\frac{2}{5} z)."),
  (ask("math", "2"), "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2 m}"),
  (ask("math", "2k"), "2"),
  (ask("math", "\\frac{37}{4} m"), "9.25"),
  (ask("math", "\\text{Evelyn}"), "Briana"),
  (ask("math", "1,-2"), "1,2"),
  (ask("math", "1.39e-10"), "0"),
  *((CITY, text) for text in ("New York", "York New Times", "The Times", "the", "", "New York Times 2")),
  *((LABELLED, text) for text in ("A", "(C)", "(C) quasi-public good", "(B) public good", "good", "")),
  *((YES, text) for text in ("No", "No, yes", "Yesterday", "Maybe yes")),
  *(
    (CHOICE, text)
    for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "B; C", "[B] or [C]", "The answer is B. or C.")
  ),
  *((BARE_CHOICE, text) for text in ("(B) or (C)", "(B), (C)", "(B) and (D)", "B. or C.", "(B) (C)", "B/C")),
  *((CHOICE, text) for text in ("(B) Paris or (C) a dog", "B. Paris and Rome")),
  *((TRUE, text) for text in ("False, because it is not true", "True, or False", "True, False", "No, it is true")),
  *((FALSE, text) for text in ("True, because it is not false", "not false")),
  *((ask(kind, "5"), text) for kind in ("number", "math") for text in ("5ab", "5 ab", "5xy", "5 x", "5^{2m}")),
  *((ask(kind, "8"), text) for kind in ("number", "math") for text in ("10-2m", "8/\\omega", "8 \\tau")),
  *(
    (ask(kind, "5"), text)
    for kind in ("number", "math")
    for text in ("x >= 5", "x <= 5", "x != 5", "x \\ne 5", "x \\geq 5", "x > 5", "x = 2 or x = 5", "x \u2265 5")
  ),
  *((ask("number", "5"), text) for text in ("x = 2 \\text{ or } x = 5", "x=2\nx=5", "x = 2 \\quad x = 5", "not 5")),
  *((ask("number", "0"), text) for text in ("x^2 - 4 = 0", "5x - 7y = 0")),
  (ask("math", "5x - 7y + 11z + 4 = 0"), "0"),
  (ask("math", "5x - 7y + 11z + 4 = 0"), "x - y = 0"),
  (ask("math", "x + 2y = 5"), "5"),
  *((ask("number", "5 m"), text) for text in ("5 km", "5 s", "5 m^2", "5 m/s", "5 cars", "the length is 5 km")),
  *((ask("number", "50 cm"), text) for text in ("50 m", "50 \\text{ m}", "50 mm")),
  *((ask("number", "3 cars"), text) for text in ("3 trucks", "3 km")),
  (ask("number", "30^\\circ"), "30 radians"),
  (ask("math", "5 \\text{ m}"), "5 \\text{ km}"),
  *((ask("math", "6xy"), text) for text in ("6", "6ab", "6x")),
  *((ask("math", "\\frac12 m g"), text) for text in ("0.5", "\\frac12", "\\frac12 m", "0.5 N s")),
  *((ask("math", "2^{2m}"), text) for text in ("2", "4", "2^{2n}")),
  *((ask("math", "8m"), text) for text in ("10-2m", "8", "8s")),
  *((ask("math", "2^{2024}"), text) for text in ("2^{2025}", "2", "2024", "\\infty")),
  (ask("math", "2014!"), "2015!"),
  *((ask(kind, "2^{100}-1"), "2^{100}") for kind in ("number", "math")),
  (ask("number", str(2**53 + 1)), str(2**53)),
  (ask("number", str(2**53 + 1)), "2^{53}"),
  (ask("number", "25!"), "25! + 1"),
  *((ask(kind, "50%"), text) for kind in ("number", "math") for text in ("0.05", "5000", "1/20", "5%")),
  *((ask("number", "10000"), text) for text in ("10 00", "10 0000", "1 000", "10, 000")),
  (ask("number", "1.5"), "11/2"),
  *((ask("text", "> } } ]"), text) for text in (">", "> } ]", "> } } ] ]", "}", "> } } ]..", "> } } ]!")),
  (ask("text", "+"), "-"),
  (ask("text", "b and d"), "a and d"),
  (ask("text", "-0.5"), "0.5"),
  (ask("text", "5%"), "6%"),
]

MATH = [
  ("42", "42", True),
  ("$42$", "42", True),
  ("\\boxed{42}", "42", True),
  ("42.0", "42", True),
  ("The answer is 42", "42", True),
  ("42 apples", "42", True),
  ("\\frac{1}{2}", "0.5", True),
  ("1/2", "\\frac{1}{2}", True),
  ("2/4", "1/2", True),
  ("\\dfrac{3}{6}", "$\\frac{1}{2}$", True),
  (".5", "0.5", True),
  ("-3", "-3", True),
  ("1,000", "1000", True),
  ("2^{10}", "1024", True),
  ("2^10", "1024", True),
  ("\\sqrt{8}", "2\\sqrt{2}", True),
  ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", True),
  ("x+1", "1+x", True),
  ("(x+1)^2", "x^2+2x+1", True),
  ("x(x-1)", "x^2 - x", True),
  ("$2\\pi$", "\\pi \\cdot 2", True),
  ("x=5", "5", True),
  ("x = 5", "x=5", True),
  ("$x = \\frac{5}{1}$", "5", True),
  ("50\\%", "50\\%", True),
  ("0.333333", "\\frac{1}{3}", True),
  ("(1, 2)", "(1,2)", True),
  ("[0, 1)", "[0,1)", True),
  ("\\{1, 2\\}", "\\{2, 1\\}", True),
  ("1.5e3", "1500", True),
  ("1.5 \\times 10^3", "1.5e3", True),
  ("\\sin(x)", "\\sin{x}", True),
  ("\\log_2 8", "3", True),
  ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True),
  ("yes", "Yes", True),  # the same text, even if it is no mathematics
  ("41", "42", False),
  ("-42", "42", False),
  ("", "42", False),
  ("no idea", "42", False),
  ("$$", "42", False),
  ("\\frac{1}{2", "0.5", False),
  ("0.3", "\\frac{1}{3}", False),
  ("x", "y", False),
  ("x+1", "x-1", False),
  ("(x+1)^2", "x^2+1", False),
  ("\\sqrt{2}", "2", False),
  ("2xy", "2", False),
  ("2", "2xy", False),
  ("(2, 1)", "(1, 2)", False),
  ("[0, 1]", "[0, 1)", False),
  ("\\{1, 2, 3\\}", "\\{1, 2\\}", False),
  ("1", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", False),
  ("1.5e3", "1.5", False),
  ("no", "Yes", False),
  ("\u200b", "42", False),
]
