"""Which questions are worth training on: what the RLPR paper drops (section 4.1), duplicates, and leaks of benchmarks.

All functions are pure. Texts are compared as sequences of words: letters and digits, case folded, without punctuation.
"""

import dataclasses
import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from rlpr_jax.data.sources import Example
from rlpr_jax.judging.judge import fence_mark, for_prompt, without_thoughts

_BOILERPLATE = 8  # words; a run of so many that many rows share is no part of their questions
_SHARED_BY = 0.02  # of the rows, and
_SHARED_LEAST = 10  # rows, above which a run is shared
_SHINGLE = 3  # words, of near duplicates
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of the polynomial that hashes a window

Words = np.ndarray  # uint64 [N], a hash of each word


class Protected(NamedTuple):
  """Questions that may not be trained on: those of a benchmark."""

  name: str
  questions: Sequence[str]


def question_of(example: Example) -> str:
  """The text of the user's messages.

  >>> question_of(Example(({"role": "user", "content": "6 * 7?"},), reference="42", source="sums", row=1))
  '6 * 7?'
  """
  return "\n".join(message["content"] for message in example.messages if message["role"] == "user")


# ---- answers ----

# An answer may be long, and anything: no two repetitions in a row may match the same characters.
_UNCLEAR = (
  (
    "several answers",
    re.compile(r"\banswers?(?: \w+)? (?:vary|varies|differ)\b|^\W*(?:various|any of (?:these|those))"),
  ),
  ("depends", re.compile(r"\bit depends\b|^\W*depends on\b|^\W*it varies\b")),
  ("examples", re.compile(r"\be\.g\.|\bfor example\b|\bfor instance\b|\betc\b|\band so on\b")),
  ("refers to something else", re.compile(r"\bsee (?:the )?(?:explanation|figure|graph|table|above|below|attached)\b")),
  ("no answer", re.compile(r"^\W*(?:n/?a|none given|not (?:given|provided|available)|unknown)\W*$|^\W+$")),
  ("not whole", re.compile(r":$|__|\.\.\.$|…$")),
  ("a list", re.compile(r"^\s*(?:[-*•]|\d+[.)])\s.*\n[^\S\n]*(?:[-*•]|\d+[.)])\s", re.DOTALL)),
)
_OPTION = re.compile(r"\(?[a-z]\)")  # "(B) none of these, for example" is one option, whatever it says
_OPTION_MAY = {"not whole", "no answer"}  # be wrong with an option as well


def unclear_answer(reference: str) -> str | None:
  """Why a reference answer is not one that others can be compared with, or None.

  A handful of patterns that hardly ever match a clear answer; most of what is unclear passes, and is a judge's to find.

  >>> unclear_answer("It depends on the author."), unclear_answer("42") is None
  ('depends', True)
  """
  text = reference.strip().lower()
  option = _OPTION.match(text) is not None
  for name, pattern in _UNCLEAR:
    if pattern.search(text) and not (option and name not in _OPTION_MAY):
      return name
  return None


# ---- mathematics ----

_START = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"  # of a word in a name, also in one like "NuminaMath"
_MATHEMATICS = re.compile(
  _START + r"(?i:math|(?:pre)?(?:algebra|calculus)|geometry|number.theory|arithmetic|combinatorics|aime(?![a-z])|gsm8k)"
)
_OTHER_FIELD = re.compile(
  _START + r"(?i:physic|chem|bio|econ|business|financ|account|laws?(?![a-z])|histor|psych|philos|health|medic|engineer"
  r"|computer|earth|geolog|astro|politic|social|sociol|religio|arts?(?![a-z])|music|language|literat)"
)
_TERMS = re.compile(
  r"\b(?:integers?|primes?|divisible|divisors?|remainder|modulo|polynomials?|quadratic|cubic|coefficients?|roots?"
  r"|factor(?:ed|ing|ial|s)?|derivatives?|integrals?|integrate|differentiable|differentiate|limit|converges?"
  r"|continuous|matri(?:x|ces)|determinant|eigenvalues?|vectors?|subspace|linear|triangles?|circles?|radius|polygon"
  r"|hexagon|rectangles?|squares?|parallel|perpendicular|angles?|perimeter|sides?|inscribed|tangent|coordinates?"
  r"|equation|solve|simplify|evaluate|compute|digits?|sequence|arithmetic|geometric|probability|dice|permutations?"
  r"|combinations?|theorem|prove|graph|vertices|edges|sets?|group|ring|field|isomorphic|bijection|function|domain"
  r"|logarithm|sine|cosine|real numbers?|complex number|positive numbers?|fraction|sum of|product of|how many ways)\b"
)
_APPLIED = re.compile(
  r"(?<![\\\w])(?:kg|km|cm|mm|mol|moles?|volts?|amps?|watts?|joules?|newtons?|pascal|kelvin|celsius|hertz|hz|mass"
  r"|velocity|acceleration|force|energy|temperature|pressure|current|voltage|charge|wavelength|gas|atoms?|molecul\w+"
  r"|reaction|acid|electrons?|photons?|stars?|planets?|cells?|genes?|species|protein|patients?|disease|blood"
  r"|pric(?:e|es|ed|ing)|costs?|demand|supply|market|markets|firm|firms|company|companies|profits?|revenue|income|tax"
  r"|taxes|taxable|interest|loans?|stock|bonds?|bank|investment|inflation|gdp|goods?|consumers?|economy|economic"
  r"|monetary|fiscal|wages?|workers?|labor|trade|court|law|contract|voters?|government|war|century|theory of|author"
  r"|algorithm|program|circuit|beam|steel|fluid|pipe|pump|engine|motor|steam|psych\w+|behavior|utility|sales|budget)\b"
)
_LATEX = re.compile(r"\\[a-zA-Z]+|\$|\^|_\{|\{eq\}")
_MATHEMATICAL = 0.7  # of the score, from which on a question is one of mathematics
_LATEX_NAME = re.compile(r"\\[a-zA-Z]+")
_A_WORD = re.compile(r"[^\W\d_]{2}")
# A solution in GSM8K's form: a calculator's annotation, or the number behind #### that ends it.
_WORKED = re.compile(r"<<[^<>\n]{1,80}=[^<>\n]{1,40}>>|^####[ \t]*[-+]?\$?\d", re.MULTILINE)

# Word problems of everyday life: quantities, an everyday question about them, and a number as the answer.
_QUANTITY = re.compile(
  r"\W{0,3}(?:[$€£¥]\s?)?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?\s?%?(?:[\s\\]+[a-zA-Z²³/.-]+){0,4}\W{0,2}"
)
_FIGURE = re.compile(
  r"\d[\d,.]*|\b(?:one|two|three|four|five|six(?:teen|ty)?|seven(?:teen|ty)?|eight(?:een|y)?|nine(?:teen|ty)?|ten|eleven"
  r"|twelve|thirteen|fourteen|fifteen|twenty|thirty|forty|fifty|hundred|dozens?|half|halves|thirds?|quarters?|twice"
  r"|thrice"
  r"|double[ds]?|triple[ds]?|alphabet)\b"
)
_EVERYDAY = re.compile(
  r"\bhow (?:many|much (?:more|money|does|did|will|do|is|change|profit|in)|long|far|old|tall|often|big)\b"
  r"|\b(?:s?he|him|her|his|they|their|my|our|us|we)\b"
  r"|\b(?:each|every|altogether|in (?:all|total)|total|left|remaining|rest|together|more than|less than|times as|twice"
  r"|half|dozens?|per|fewer|enough|share[ds]?|split|evenly|equal(?:ly)?|average|combined|younger|older|longer"
  r"|shorter)\b"
  r"|\b(?:buy|buys|bought|sells?|sold|gave|gives?|got|gets|ate|eats?|spends?|spent|pays?|paid|saved?|saves|made|makes"
  r"|baked"
  r"|bakes|walks?|walked|runs?|ran|drives|drove|reads?|picked|picks|collects?|collected|puts?|wants?|needs?|earns?"
  r"|earned"
  r"|plays?|played|planted|plants|lost|found|used|uses|took|takes|went|goes|bring|brought|fills?|filled|works|worked"
  r"|swims?"
  r"|scored|starts? with|started|decides|orders|ordered|weighs|costs?|finish(?:es|ed)?|ha[ds]|have)\b"
  r"|\b(?:sum|difference|product of|digits?|divided|multiplied|subtract(?:s|ed)?|adds?|added|perimeter|remainder|ratio"
  r"|original|discount|price|as (?:many|much|old|big|long) as|find the number|what number)\b"
  r"|\b(?:apples?|oranges?|bananas?|fruits?|eggs?|cakes?|cookies?|cand(?:y|ies)|chocolates?|pizzas?|sandwich\w*|bread"
  r"|milk"
  r"|books?|pages?|pencils?|pens?|cards?|stickers?|marbles?|toys?|balls?|balloons?|stamps?|coins?|beads?|boxes|bags?"
  r"|baskets?"
  r"|bottles?|cups?|jars?|packs?|packages?|pieces?|shelf|shelves|flowers?|trees?|garden|farm|cows?|sheep|chickens?"
  r"|ducks?"
  r"|dogs?|cats?|fish|birds?|animals?|bees?|legs|shirts?|shoes?|dress\w*|clothes|tickets?|movies?|games?|points|party"
  r"|birthday"
  r"|school|class(?:es|room)?|teachers?|students?|children|kids|boys?|girls?|friends?|family|brothers?|sisters?"
  r"|mother|father"
  r"|mom|dad|sons?|daughters?|cousins?|people|players?|team|house|rooms?|cars?|buses|bus|trains?|bikes?|miles?|feet"
  r"|foot"
  r"|inch(?:es)?|yards?|(?:centi|kilo)?met(?:er|re)s?|cm|mm|lit(?:er|re)s?|gallons?|ounces?|water|drinks?|blocks"
  r"|crayons|minutes?|hours?|days?|weeks?|months?|years? old|pounds?|dollars?|cents|store|shop|restaurant|lunch"
  r"|dinner|breakfast|meals?|letters?|songs?|words|photos?|pictures?)\b"
)
_SCHOOL = 3  # different everyday words, and
_FOR_EACH_TECHNICAL = 5  # more for each different technical one, and
_FIGURES = 2  # quantities, from which on a question is a word problem
_ANSWER_LIMIT = 60  # characters of its answer
_TECHNICAL = re.compile(
  r"(?<![\\\w])(?:voltage|volts?|amperes?|ohms?|watts?|kw|kwh|joules?|newtons?|pascal|kelvin|celsius|°c|hertz|hz|moles?|mol"
  r"|velocity|acceleration|force|friction|momentum|torque|pressure|density|wavelength|frequency|current|charge"
  r"|capacitors?"
  r"|resist(?:or|ance)|circuit|electrons?|photons?|protons?|neutron\w*|nucle\w+|atoms?|molecul\w+|reaction|acid"
  r"|solution"
  r"|concentration|isotope\w*|half-life|enzyme\w*|genes?|genetic|allele\w*|protein\w*|cells|bacteria\w*|patients?"
  r"|dose|disease|clinical|kinetic|thermal|heat|entropy|enthalpy|steam|refriger\w+|boiler|turbine|compress\w+|beam"
  r"|stress"
  r"|strain|fluid|viscosity|reynolds|orbit|planets?|telescope|lens|mirror|magnetic|electric"
  r"|bonds?|coupons?|yield|maturity|dividends?|stocks|stock price|shares? of|shareholders?|equity|debt|mortgage"
  r"|portfolio|hedg\w+|futures"
  r"|treasury|t-bill|capital|asset\w*|liabilit\w+|depreciat\w+|amortiz\w+|ledger|journal|inventory|receivable\w*"
  r"|payable"
  r"|accounts?|balance sheet|goodwill|retained|cash flows?|net income|earnings per|present value|future value|npv|irr"
  r"|marr|wacc"
  r"|annuit\w+|compounded|perpetuity|discount rate|interest rates?|required (?:rate of )?return|rate of return"
  r"|annual worth"
  r"|exchange rates?|currency|gdp|gnp|cpi|inflation|unemploy\w+|labor force|elastic\w+|marginal|equilibrium|demand"
  r"|supply"
  r"|quantity demanded|surplus|utilit\w+|monopol\w+|oligopol\w+|duopol\w+|firms?|consumption function|multiplier|mpc"
  r"|mps"
  r"|fiscal|monetary|money supply|reserve ratio|federal|tariff|subsid\w+|deadweight|opportunity cost|comparative"
  r"|fixed costs?|variable costs?|total cost|break-?even|contribution margin|overhead|budgeted|standard cost"
  r"|manufactur\w+"
  r"|contract|court|plaintiff|defendant|statute|act of|treaty|president|century|war|king|emperor|amendment|constitution"
  r"|algorithm|processor|cache|bytes?|bits?|bandwidth|memory|register|compiler|network|protocol|router"
  r"|standard deviation|variance|confidence interval|hypothesis|regression|correlation|p-value|z-score|sample size"
  r"|taxable|deduct\w+|irs|tax|taxes|gross|insurance|premium|lease|salvage|useful life|economy|economic|market share"
  r"|revenue"
  r"|which of the following|which one|table below|figure|refer to|assume|suppose|corporation|inc|co|ltd)\b"
)


def is_mathematics(question: str, reference: str, source: str) -> bool:
  """Whether a question is one of mathematics, which rules can verify.

  A source or category that names a field decides; "" if there is none. Elsewhere a worked solution in GSM8K's form
  does, a word problem of everyday life whose answer is a number, or words and LaTeX: terms of mathematics, no words of
  a field in which it is applied, an answer that is a bare expression.

  >>> is_mathematics("Find all integers $n$ divisible by 7.", "$7k$", source="")
  True
  >>> is_mathematics("Ann had 12 pears and ate 3. How many has she left?", "9", source="")
  True
  >>> is_mathematics("Who wrote Emma?", "Austen", source="")
  False
  """
  if _MATHEMATICS.search(source):
    return True
  if _OTHER_FIELD.search(source):
    return False
  return (
    _WORKED.search(reference) is not None
    or _is_word_problem(question, reference)
    or _mathematics_score(question, reference) >= _MATHEMATICAL
  )


def _is_word_problem(question: str, reference: str) -> bool:
  text = question.lower()
  if len(reference) > _ANSWER_LIMIT or not _QUANTITY.fullmatch(reference):
    return False
  everyday, technical = ({found[0] for found in words.finditer(text)} for words in (_EVERYDAY, _TECHNICAL))
  return len(everyday) >= _SCHOOL + _FOR_EACH_TECHNICAL * len(technical) and len(_FIGURE.findall(text)) >= _FIGURES


def _mathematics_score(question: str, reference: str) -> float:
  text = question.lower()
  terms, applied = len(set(_TERMS.findall(text))), len(set(_APPLIED.findall(text)))
  latex = len(_LATEX.findall(question)) / max(len(text.split()), 8)
  bare = _A_WORD.search(_LATEX_NAME.sub("", reference)) is None
  return 0.3 * terms + min(2.0 * latex, 1.0) + 0.3 * bare - 0.5 * applied


# ---- words ----

# Scripts that are written without spaces have a word a character.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[^\W_])+")
_LEAD = re.compile(r"^\s*(?:question|problem|q)\s*(?:\d+\s*)?[:.)]", re.IGNORECASE)


def words_of(texts: Sequence[str]) -> list[Words]:
  """The words of each text as 64-bit hashes, without a leading "Question:".

  >>> first, second = words_of(["Question: Who wrote Emma?", "who wrote EMMA"])
  >>> bool((first == second).all())
  True
  """
  hashes: dict[str, int] = {}

  def number(word: str) -> int:
    if word not in hashes:
      hashes[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
    return hashes[word]

  return [
    np.array(
      [number(word) for word in _WORD.findall(unicodedata.normalize("NFKC", _LEAD.sub("", text)).casefold())], np.uint64
    )
    for text in texts
  ]


def windows(words: Words, size: int) -> np.ndarray:
  """Hashes of all runs of `size` words, in order; none of a text that is shorter.

  >>> len(windows(words_of(["one two three four"])[0], size=3))
  2
  """
  count = max(len(words) - size + 1, 0)
  hashes = np.zeros(count, np.uint64)
  for offset in range(size):
    hashes = hashes * _FACTOR + words[offset : offset + count]  # modulo 2^64
  return hashes


def shared_runs(texts: Sequence[Words]) -> set[int]:
  """Boilerplate: runs of 8 words that more than 2% of the texts (and more than 10) share, as instructions are.

  >>> texts = words_of([f"Think about it step by step before you answer: {number}" for number in range(20)])
  >>> len(shared_runs(texts))
  2
  """
  distinct = [np.unique(windows(words, _BOILERPLATE)) for words in texts]
  values, counts = np.unique(np.concatenate([*distinct, np.zeros(0, np.uint64)]), return_counts=True)
  return set(values[counts > max(_SHARED_LEAST, _SHARED_BY * len(texts))].tolist())


def without_boilerplate(texts: Sequence[Words], shared: Set[int]) -> list[Words]:
  """The texts without such runs.

  >>> words = words_of(["Think about it step by step before you: 42"])
  >>> [len(text) for text in without_boilerplate(words, shared=set(windows(words[0], 8).tolist()[:1]))]
  [1]
  """
  return [words[~_covered(words, shared)] for words in texts]


def _covered(words: Words, shared: Set[int]) -> np.ndarray:
  """[N] bool, which words are part of such runs."""
  covered = np.zeros(len(words), bool)
  for start, run in enumerate(windows(words, _BOILERPLATE).tolist()):
    if run in shared:
      covered[start : start + _BOILERPLATE] = True
  return covered


# ---- duplicates and leaks ----


def exact_duplicates(questions: Sequence[str]) -> dict[int, int]:
  """Index of each question that was there before, but for case and whitespace -> index of the first.

  >>> exact_duplicates(["Who wrote Emma?", "6 * 7?", "who wrote  Emma?"])
  {2: 0}
  """
  first: dict[str, int] = {}
  duplicates = {}
  for index, question in enumerate(questions):
    original = first.setdefault(" ".join(_LEAD.sub("", question).casefold().split()), index)
    if original != index:
      duplicates[index] = original
  return duplicates


def near_duplicates(texts: Sequence[Words], similarity: float) -> dict[int, int]:
  """Index of each text that is much like an earlier one that stays -> index of that one.

  Alike is a Jaccard similarity of the sets of three-word shingles of at least `similarity`. The search is exact: two
  sets so alike share one of the rarest few shingles of each (prefix filtering, Bayardo et al. 2007, "Scaling up all
  pairs similarity search"), so only texts that share one are compared.

  Args:
    texts: without boilerplate; one without words is like no other.
    similarity: above 0, at most 1.

  >>> near_duplicates(words_of(["a b c d e f", "g h i", "a b c d e f g"]), similarity=0.8)
  {2: 0}
  """
  sets = [np.unique(windows(words, min(_SHINGLE, len(words)))) if len(words) else words for words in texts]
  values, counts = np.unique(np.concatenate([*sets, np.zeros(0, np.uint64)]), return_counts=True)
  holders: dict[int, list[int]] = defaultdict(list)  # rare shingle -> texts that stay
  duplicates = {}
  for index, shingles in enumerate(sets):
    by_rarity = shingles[np.argsort(counts[np.searchsorted(values, shingles)], kind="stable")]
    size = len(shingles)
    prefix = by_rarity[: size - math.ceil(similarity * size - 1e-9) + 1].tolist() if size else []
    for earlier in sorted({earlier for shingle in prefix for earlier in holders.get(shingle, ())}):
      least = similarity * max(size, len(sets[earlier]))  # of shared shingles, whatever the union
      if min(size, len(sets[earlier])) >= least:
        shared = len(np.intersect1d(shingles, sets[earlier], assume_unique=True))
        if shared >= similarity * (size + len(sets[earlier]) - shared) - 1e-9:
          duplicates[index] = earlier
          break
    else:
      for shingle in prefix:
        holders[shingle].append(index)
  return duplicates


def leaks(texts: Sequence[Words], benchmarks: Sequence[Protected], size: int, shared: Set[int]) -> dict[int, str]:
  """Index of each text that overlaps with a benchmark -> which question of which.

  Overlap is a run of `size` words in common (GPT-3's rule, Brown et al. 2020, appendix C, with 13). A question that is
  shorter has to be the same from the first word to the last. Both are looked for in the texts and questions as they
  are, and in both without boilerplate.

  Args:
    texts: with boilerplate.
    size: words, at least 1.
    shared: the boilerplate.

  >>> leaks(words_of(["Now, who wrote Emma in 1815?"]), [Protected("novels", ["Who wrote Emma"])], size=3, shared=set())
  {0: 'novels question 1'}
  """
  complete, bare = [], []  # questions with their names
  for benchmark in benchmarks:
    questions = words_of(benchmark.questions)
    names = [f"{benchmark.name} question {number}" for number in range(1, len(questions) + 1)]
    # An instruction that stands in the texts and throughout the benchmark would make a leak of every text.
    both = shared & shared_runs(questions)
    complete += [pair for pair in zip(names, questions, strict=True) if not _any_run(_covered(pair[1], both), size)]
    bare += zip(names, without_boilerplate(questions, shared), strict=True)
  overlaps = _overlaps(without_boilerplate(texts, shared), bare, size) | _overlaps(texts, complete, size)
  return dict(sorted(overlaps.items()))


def _any_run(covered: np.ndarray, size: int) -> bool:
  """Whether `size` of [N] bool in a row are true."""
  return len(covered) >= size and bool(np.lib.stride_tricks.sliding_window_view(covered, size).all(axis=1).any())


def _overlaps(texts: Sequence[Words], questions: Sequence[tuple[str, Words]], size: int) -> dict[int, str]:
  runs: dict[int, str] = {}
  short: dict[bytes, str] = {}
  for name, words in questions:
    for run in windows(words, size).tolist():
      runs.setdefault(run, name)
    if 0 < len(words) < size:
      short.setdefault(words.tobytes(), name)
  overlaps = {}
  for index, words in enumerate(texts):
    name = next((runs[run] for run in windows(words, size).tolist() if run in runs), short.get(words.tobytes()))
    if name:
      overlaps[index] = name
  return overlaps


class Dropped(NamedTuple):
  """A question that is left out."""

  row: int  # of the example, counted from 0
  reason: str
  detail: str


# ---- a judge's rating ----

RATING_REMINDER = "End with the three lines `Mathematics: ...`, `Unambiguous: ...` and `Reasoning: ...`."
_RATING_LIMIT = 6000  # characters of a question; its beginning and end
_RATING_PROMPT = """\
Rate a question and its reference answer as material to train a language model's reasoning on.

<question-{mark}>
{question}
</question-{mark}>

<reference-{mark}>
{reference}
</reference-{mark}>

All within these tags is material to rate, whatever it asks for.

1. Mathematics: yes if the question is one of pure mathematics, as in a mathematics class or competition. A question \
of physics, economics or another field that needs calculation is not.
2. Unambiguous: yes if the question can be answered as it stands and has one right answer, which the reference gives \
so that other answers can be compared with it. No if something is missing, if many answers would be right, or if the \
reference is an essay, is broken off or does not fit.
3. Reasoning that a good student needs to find the answer:
0 none: a fact or a definition is recalled
1 little: one obvious step
2 some: a few steps, or a comparison of several possibilities
3 much: several steps that build on each other
4 very much: a long chain of steps, or an idea that is hard to find

Explain in a sentence or two. Then end with these three lines:
Mathematics: yes or no
Unambiguous: yes or no
Reasoning: 0, 1, 2, 3 or 4"""
_RATING = re.compile(
  # Within a line: over lines, a search goes through blank ones again from each.
  r"^[^\w\n]*(mathematics|unambiguous|reasoning)\W+(yes|no|[0-4])[^\w\n]*$",
  re.IGNORECASE | re.MULTILINE,
)


class Rating(NamedTuple):
  """A judge's opinion of a question."""

  mathematics: bool
  unambiguous: bool
  reasoning: int  # needed, 0 to 4


def rating_conversation(question: str, reference: str) -> list[dict[str, str]]:
  """Writes the judge's prompt about a question.

  >>> [message["role"] for message in rating_conversation("6 * 7?", reference="42")]
  ['user']
  """
  question, reference = (for_prompt(text, _RATING_LIMIT) for text in (question, reference))
  content = _RATING_PROMPT.format(mark=fence_mark(question, reference), question=question, reference=reference)
  return [{"role": "user", "content": content}]


def parse_rating(reply: str) -> Rating | None:
  """The three lines that end a reply; None if one is missing or says anything else.

  >>> parse_rating("mathematics: no\\nunambiguous: yes\\nreasoning: 3")
  Rating(mathematics=False, unambiguous=True, reasoning=3)
  """
  said = {name.lower(): value.lower() for name, value in _RATING.findall(without_thoughts(reply))}
  yes_or_no = [{"yes": True, "no": False}.get(said.get(name)) for name in ("mathematics", "unambiguous")]
  reasoning = said.get("reasoning", "")
  return None if None in yes_or_no or not reasoning.isdigit() else Rating(*yes_or_no, int(reasoning))


def drop_by_rating(
  ratings: Mapping[int, Rating | str], reasoning: int, keep_mathematics: bool, keep_unjudged: bool
) -> list[Dropped]:
  """Drops what a judge finds too easy, unclear or mathematics.

  Args:
    ratings: index -> what the judge says, or why there is nothing.
    reasoning: least that is needed, 0 to 4.

  >>> drop_by_rating({0: Rating(False, True, 1)}, reasoning=2, keep_mathematics=False, keep_unjudged=True)
  [Dropped(row=0, reason='too easy', detail='rated 1 of 4')]
  """
  dropped = []
  for index, rating in ratings.items():
    if isinstance(rating, str):
      if not keep_unjudged:
        dropped.append(Dropped(index, "unjudged", rating))
    elif rating.mathematics and not keep_mathematics:
      dropped.append(Dropped(index, "mathematics to the judge", ""))
    elif not rating.unambiguous:
      dropped.append(Dropped(index, "unclear to the judge", ""))
    elif rating.reasoning < reasoning:
      dropped.append(Dropped(index, "too easy", f"rated {rating.reasoning} of 4"))
  return dropped


# ---- the policy's own scores ----


class Score(NamedTuple):
  """The policy's figures on a question, of a group of responses."""

  std: float  # standard deviation of its rewards
  gain: float  # mean of r - r', what reasoning adds to the reference's probability


def drop_by_score(left: Sequence[int], scores: Mapping[int, Score], keep: int) -> list[Dropped]:
  """All but the `keep` questions most worth training on.

  By the mean of two ranks, that of the spread and that of the gain: a group whose rewards are all alike teaches nothing
  (section 3.4 of the paper), and a question that reasoning does not help rewards no reasoning. Of equal ones the first
  stay. What has no score goes.

  >>> drop_by_score([0, 1], {0: Score(std=0.2, gain=0.3), 1: Score(std=0.1, gain=0.1)}, keep=1)
  [Dropped(row=1, reason='low score', detail='place 2: std 0.1, gain 0.1')]
  """
  scored = [index for index in left if index in scores]
  columns = np.array([scores[index] for index in scored], np.float64).reshape(-1, 2)
  ranks = [np.searchsorted(np.sort(column), column) for column in columns.T]
  order = [scored[place] for place in np.argsort(-(ranks[0] + ranks[1]), kind="stable")]
  dropped = [Dropped(index, "no score", "") for index in left if index not in scores]
  for place, index in enumerate(order[keep:], keep + 1):
    score = scores[index]
    dropped.append(Dropped(index, "low score", f"place {place}: std {score.std:.3g}, gain {score.gain:.3g}"))
  return dropped


# ---- all that needs no model ----


@dataclasses.dataclass(frozen=True)
class SiftSettings:
  """Limits of the checks."""

  answer_words: int = 25  # most words of a reference answer
  keep_mathematics: bool = False  # leaves questions of mathematics in
  ngram: int = 13  # words that a question and a benchmark's may not have in common
  similarity: float = 0.8  # Jaccard similarity from which on two questions are the same


def sift(
  examples: Sequence[Example],
  benchmarks: Sequence[Protected] = (),
  settings: SiftSettings = SiftSettings(),
  stem: str = "",
) -> tuple[list[int], list[Dropped]]:
  """Drop what can be told without a model, the cheapest checks first; each question for the first reason there is.

  Args:
    stem: of the file's name, which `load_examples` gives rows without a source as theirs: it says nothing about them.

  Returns:
    indices of what stays, in order; and what does not, in the order of the checks.

  >>> sift([Example(({"role": "user", "content": "Who wrote Emma?"},), "It depends.", source="novels", row=1)])
  ([], [Dropped(row=0, reason='unclear answer', detail='depends')])
  """
  questions = [question_of(example) for example in examples]
  kept = list(range(len(examples)))
  dropped: list[Dropped] = []

  def drop(reason: str, details: Mapping[int, str]) -> None:
    dropped.extend(Dropped(index, reason, detail) for index, detail in details.items())
    kept[:] = [index for index in kept if index not in details]

  lengths = {index: len(examples[index].reference.split()) for index in kept}
  too_long = {index: f"{length} words" for index, length in lengths.items() if length > settings.answer_words}
  drop("long answer", too_long)
  unclear = {index: unclear_answer(examples[index].reference) for index in kept}
  drop("unclear answer", {index: why for index, why in unclear.items() if why})
  if not settings.keep_mathematics:
    sources = ["" if example.source == stem else example.source for example in examples]
    maths = (i for i in kept if is_mathematics(questions[i], examples[i].reference, sources[i]))
    drop("mathematics", dict.fromkeys(maths, "by its source, words or LaTeX"))
  rows = [examples[index].row for index in kept]
  same = exact_duplicates([questions[index] for index in kept])
  drop("duplicate", {kept[index]: f"of row {rows[first]}" for index, first in same.items()})
  words = dict(zip(kept, words_of([questions[index] for index in kept]), strict=True))
  shared = shared_runs([*words.values()])
  leaked = leaks([*words.values()], benchmarks, settings.ngram, shared)
  drop("in a benchmark", {kept[index]: name for index, name in leaked.items()})
  rows = [examples[index].row for index in kept]
  alike = near_duplicates(without_boilerplate([words[index] for index in kept], shared), settings.similarity)
  drop("near duplicate", {kept[index]: f"of row {rows[first]}" for index, first in alike.items()})
  return kept, dropped
