"""The built-in questions: their answers by other arithmetic, their split, and the demonstrations' mixture."""

import hashlib
import itertools
import json
import math
import random
import re
import time
from collections import Counter

import pytest

from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import reference_length
from rlpr_jax.data.templates import build_messages, render
from rlpr_jax.errors import InputError
from rlpr_jax.rewards import format_score
from rlpr_jax.splicing import check_tokenizer

DOMAINS = ("addition", "weekday", "letters", "price", "chain")
PROMPT_LIMIT, RESPONSE_LIMIT = 14, 32  # of configs/quickstart.py
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
COUNT = 4000


def solve(domain, text):
  """The answer, from the question's text alone and by another way than the questions are made."""
  if domain in ("addition", "chain"):
    return str(sum(int(number) for number in re.findall(r"[+-]?\d+", text)))
  if domain == "weekday":
    day, days = text.split("+")
    for _ in range(int(days)):
      day = DAYS[(DAYS.index(day) + 1) % 7]
    return day
  if domain == "letters":
    letter, word = text.split(" in ")
    return NUMBERS[len(re.findall(letter, word))]
  a, b, c = map(int, re.fullmatch(r"(\d+)\*(\d+)\+(\d+) coins", text).groups())
  gold = 0
  silver = c + sum(a for _ in range(b))
  while silver >= 10:
    gold, silver = gold + 1, silver - 10
  return f"{gold}g {silver}s"


def check_thought(domain, text, thought):
  """Every step of a careful thought is true, and the last one leads to the answer."""
  answer = solve(domain, text)
  if domain == "addition":
    ones, tens = thought.split(" ")
    assert all(sum(map(int, left.split("+"))) == int(right) for left, right in (x.split("=") for x in (ones, tens)))
    assert tens.split("=")[1] + ones[-1] == answer
  elif domain == "weekday":
    days, weeks, rest, start, again, day = re.fullmatch(r"(\d+)-(\d+)=(\d) (\w{3})(\d)=(\w{3})", thought).groups()
    assert f"{start}+{days}" == text
    assert (int(weeks) % 7, int(days) - int(weeks), rest) == (0, int(rest), again)
    assert int(rest) < 7
    assert day == answer == solve(domain, f"{start}+{rest}")
  elif domain == "letters":
    letter, word = text.split(" in ")
    assert "".join(part[0] for part in thought.split(" ")) == word
    counts = [part for part in thought.split(" ") if part[0] == letter]
    assert counts == [f"{letter}{i + 1}" for i in range(len(counts))]
    assert all(len(part) == 1 for part in thought.split(" ") if part[0] != letter)
  elif domain == "price":
    a, b, product, again, c, total = map(int, re.fullmatch(r"(\d)\*(\d)=(\d+) (\d+)\+(\d)=(\d+)", thought).groups())
    assert (a * b, again, product + c) == (product, product, total)
    assert text == f"{a}*{b}+{c} coins"
    assert answer == f"{total // 10}g {total % 10}s"
  else:
    start, *steps = (int(number) for number in re.findall(r"[+-]?\d+", text))
    totals = [start + sum(steps[: i + 1]) for i in range(len(steps))]
    assert thought == " ".join(map(str, totals))


@pytest.fixture(scope="module")
def demonstrations():
  """(domain, question, reference, thought, answer) of each."""
  out = []
  for example, response in builtin.demonstrations(COUNT):
    thought, answer = re.fullmatch(r"<think>(.*)</think><answer> (.*) </answer>", response).groups()
    (message,) = example.messages
    assert message["role"] == "user"
    out.append((example.source, message["content"], example.reference, thought, answer))
  return out


@pytest.fixture(scope="module")
def tokenizer():
  return builtin.tokenizer()


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("seed", [0, 1])
def test_references_are_right(split, seed):
  examples = builtin.examples(split, 500, seed)
  assert [example.source for example in examples] == [DOMAINS[i % 5] for i in range(500)]
  for example in examples:
    assert example.reference == solve(example.source, example.messages[0]["content"])
  assert [example.row for example in examples] == list(range(500))


def test_references_of_demonstrations_are_right(demonstrations):
  for domain, question, reference, _, _ in demonstrations:
    assert reference == solve(domain, question)
  assert Counter(domain for domain, *_ in demonstrations) == dict.fromkeys(DOMAINS, COUNT // 5)


def test_mixture_of_careful_terse_and_careless(demonstrations):
  """Right answers come with thoughts that are right step by step, or with none; wrong ones follow from a slip."""
  kinds = {domain: Counter() for domain in DOMAINS}
  for domain, question, reference, thought, answer in demonstrations:
    if answer != reference:
      kind = "careless"
      with pytest.raises((AssertionError, AttributeError, ValueError)):
        check_thought(domain, question, thought)
    elif thought in ("", "quick"):
      kind = "terse"
    else:
      kind = "careful"
      check_thought(domain, question, thought)
    kinds[domain][kind] += 1
  for counts in kinds.values():
    for kind, share in (("careful", 0.45), ("terse", 0.25), ("careless", 0.3)):
      spread = math.sqrt(share * (1 - share) / (COUNT / 5))
      assert counts[kind] / (COUNT / 5) == pytest.approx(share, abs=4 * spread)


def test_careless_thoughts_lead_to_their_answers(demonstrations):
  """A slip is in the thought, and the answer follows from the thought: that is what makes it a lesson."""
  for domain, _, reference, thought, answer in demonstrations:
    if answer == reference:
      continue
    if domain == "addition":
      ones, tens = thought.split(" ")
      assert answer == tens.split("=")[1] + ones[-1]
    elif domain == "weekday":
      assert answer == thought[-3:]
    elif domain == "letters":
      counts = re.findall(r"\d", thought)
      assert answer == NUMBERS[int(counts[-1])]
    elif domain == "price":
      total = int(thought.split("=")[-1])
      assert answer == f"{total // 10}g {total % 10}s"
    else:
      assert answer == thought.split(" ")[-1]


def test_held_out_questions_are_neither_trained_on_nor_demonstrated(demonstrations):
  def texts(split, count, seed):
    found = [example.messages[0]["content"] for example in builtin.examples(split, count, seed)]
    assert len(set(found)) == count  # each once
    return set(found)

  seen = {question for _, question, *_ in demonstrations}
  for seed in (0, 1, 2):
    seen |= texts("train", 2048, seed)
    seen |= {example.messages[0]["content"] for example, _ in builtin.demonstrations(3000, seed)}
  for seed in (0, 1, 2):
    assert seen.isdisjoint(texts("held_out", 400, seed))


def test_seed_decides_everything():
  assert builtin.examples("train", 50, 3) == builtin.examples("train", 50, 3)
  assert builtin.demonstrations(50, 3) == builtin.demonstrations(50, 3)
  for make in (lambda seed: builtin.examples("train", 50, seed), lambda seed: builtin.demonstrations(50, seed)):
    texts = [[str(x) for x in make(seed)] for seed in (3, 4)]
    assert len(set(texts[0]) & set(texts[1])) < 25
  assert builtin.examples("train", 50, 3) == builtin.examples("train", 100, 3)[:50]


def test_more_questions_than_there_are():
  with pytest.raises(InputError, match=r"1500 held_out questions were asked for, only [0-9]+ could be made"):
    builtin.examples("held_out", 1500)
  for make, count in ((lambda n: builtin.examples("train", n), 20_000), (builtin.demonstrations, 2**31)):
    before = time.monotonic()
    with pytest.raises(InputError, match=f"built-in questions: {count} "):
      make(count)
    assert time.monotonic() - before < 30  # where a hundred tries for each took ten minutes


# --- tokenizer ---


def test_one_token_a_character_and_one_a_tag(tokenizer):
  check_tokenizer(tokenizer)
  assert len(tokenizer) == 64
  assert sorted(tokenizer.get_vocab().values()) == list(range(64))
  text = "<think>7+5=12 (ok?)</think><answer> 1g 2s </answer>"
  ids = tokenizer.encode(text, add_special_tokens=False)
  names = tokenizer.convert_ids_to_tokens(ids)
  assert names == ["<think>", *"7+5=12 (ok?)", "</think>", "<answer>", *" 1g 2s ", "</answer>"]
  assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_everything_comes_back(tokenizer, demonstrations):
  for text in ("<answer", "< answer>", "think>", "a  b ", " a", "<<think>>", "#%><!;$/"):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
  for domain, question, reference, thought, answer in demonstrations[:500]:
    for text in (question, reference, f"<think>{thought}</think><answer> {answer} </answer>"):
      ids = tokenizer.encode(text, add_special_tokens=False)
      assert tokenizer.decode(ids, skip_special_tokens=False) == text, domain
      assert tokenizer.unk_token_id not in ids


def test_chat_template(tokenizer):
  messages = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "a"},
  ]
  ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert tokenizer.convert_ids_to_tokens(ids) == ["<q>", *"1+1", "<a>", "2", "<end>", "<q>", "a", "<a>"]


def test_prompts_and_demonstrations_fit_the_quickstart(tokenizer):
  for make in (builtin.demonstrations(COUNT), [(example, "") for example in builtin.examples("held_out", 400)]):
    for example, response in make:
      prompt = render(tokenizer, build_messages(example, "think", instruction=""))
      assert len(prompt) <= PROMPT_LIMIT
      ids = tokenizer.encode(response, add_special_tokens=False)
      assert len(ids) + 1 <= RESPONSE_LIMIT  # EOS is the last
      assert not response or format_score(response) == 1


# --- sentences ---

SENTENCES = ("gap", "late", "order")
SENTENCE_PROMPT, SENTENCE_RESPONSE, SENTENCE_REFERENCE = 24, 56, 24  # tokens, of configs/sentences.py
QUESTIONS = {  # one of each domain, and answers by hand
  "gap": "ann 17 cats, bob 31. who has more?",
  "late": "bus due 7:40, 25 min late. when?",
  "order": "run after tea. nap before tea. order?",
}
RIGHT = {
  "gap": (
    "bob has 14 more cats than ann",
    "bob holds 14 cats more than ann",
    "ann has 14 fewer cats than bob",
    "ann owns 14 cats fewer than bob",
    "bob leads ann by 14",
    "bob tops ann by 14 cats",
    "bob is 14 ahead of ann",
    "bob is 14 cats above ann",
    "bob is 14 up on ann",
    "ann trails bob by 14 cats",
    "ann follows bob by 14",
    "ann is 14 cats behind bob",
    "ann is 14 down on bob",
    "Bob has 14 more cats than Ann.",
    "  bob   leads ann,\nby 14!",
    "by 14 cats, bob leads ann",  # no wording of the grammar's, and still right
    "bob has 14 more than ann",
    "ann has 14 fewer than bob; ",
  ),
  "late": (
    "the bus comes at 8:05",
    "it gets in at 8:05",
    "at 8:05 the bus turns up",
    "at 5 past 8 it arrives",
    "expect the bus at 5 past 8",
    "look for it at 8:05",
    "the bus will be there at 8:05",
    "it will be in at 5 past 8",
    "The bus pulls in at 8:05.",
    "at 05 past 8",
    "8:05",
    "meet the bus, 8:05",
  ),
  "order": (
    "nap, then tea, then run",
    "first nap, then tea, next run",
    "begin with nap, then tea and then run",
    "it is nap, then tea, next run",
    "nap is before tea, then run",
    "nap was before tea and then run",
    "run is after tea, which is after nap",
    "run comes after tea, itself after nap",
    "run follows tea, which comes after nap",
    "run follows tea, which follows nap",
    "First nap, then tea, then run!",
    "nap before tea before run",
  ),
}
WRONG = {
  "gap": (
    "ann has 14 more cats than bob",
    "bob has 14 fewer cats than ann",
    "ann leads bob by 14",
    "bob trails ann by 14 cats",
    "bob is 14 behind ann",
    "ann is 14 ahead of bob",
    "bob has 13 more cats than ann",
    "bob has 140 more cats than ann",
    "bob has 1 4 more cats than ann",
    "bob has 014 more cats than ann",
    "bob has 1.4 more cats than ann",
    "bob has more cats than ann",
    "bob has 14 14 more cats than ann",
    "bob has 14 more cats than ann or 13",
    "bob has 14 more cups than ann",
    "bob has 14 more cats cats than ann",
    "bob has 14 more cats cups than ann",
    "bob has 14 more cats than cal",
    "cal has 14 more cats than ann",
    "bob has 14 more cats than bob",
    "bob has 14 more cats than",
    "has 14 more cats",
    "bob leads by 14",
    "bob ann 14",  # who leads?
    "bob has 14 cats, ann 0",
    "bob has 14 more, fewer cats than ann",
    "bob does not have 14 more cats than ann",
    "bob has not 14 more cats than ann",
    "bob has 14 mroe cats than ann",
    "bob hsa 14 more cats than ann",
    "bobhas 14 more cats than ann",
    "bob has -14 more cats than ann",
    "bob has 14 more cats than ann?",
    "bob has fourteen more cats than ann",
    "14",
    "bob",
    "",
  ),
  "late": (
    "the bus comes at 8:06",
    "the bus comes at 7:05",
    "the bus comes at 7:65",
    "the bus comes at 8:5",
    "the bus comes at 18:05",
    "the bus comes at 8:050",
    "the bus comes at 8.05",
    "the bus comes at 8 past 5",
    "the bus comes at 5 past 7",
    "the bus comes at 5 to 8",
    "the bus comes at 8:05 past 8",
    "the bus comes at 8:05 or 8:06",
    "the bus comes at 8:05 and 8:05",
    "the bus comes at 8:05, 5 past 8",
    "the cab comes at 8:05",
    "the bus bus comes at 8:05",
    "the bus never comes at 8:05",
    "the bus comes",
    "bus",
    "",
  ),
  "order": (
    "tea, then nap, then run",
    "nap, then run, then tea",
    "run, then tea, then nap",
    "first run, then tea, then nap",
    "nap comes after tea, which comes after run",
    "nap follows tea, which follows run",
    "nap, then tea",
    "nap, then tea, then zoo",
    "nap, then tea, then run, then nap",
    "nap, then tea, then run, then zoo",
    "nap, then nap, then run",
    "nap tea run",  # in which direction?
    "nap, tea, run",
    "first nap, after tea, then run",
    "first run, after tea, after nap",
    "not nap, then tea, then run",
    "nap, thne tea, then run",
    "naps, then tea, then run",
    "",
  ),
}


def solve_sentence(domain, text):
  """What a right answer means, from the question's words alone."""
  words = text.replace(",", " ").replace(".", " ").replace("?", " ").split()
  if domain == "gap":
    one, count, unit, other, other_count = words[:5]
    counts = {one: int(count), other: int(other_count)}
    leader = max(counts, key=counts.get)
    trailer = min(counts, key=counts.get)
    return builtin.Meaning("gap", (leader, trailer), str(len(range(counts[trailer], counts[leader]))), unit)
  if domain == "late":
    hour, minute = map(int, words[2].split(":"))
    for _ in range(int(words[3])):
      hour, minute = (hour + 1, 0) if minute == 59 else (hour, minute + 1)
    return builtin.Meaning("late", (), f"{hour}:{minute:02}", words[0])
  orders = [
    order
    for order in itertools.permutations({*words} - {"before", "after", "order"})
    if all((order.index(x) < order.index(y)) == (how == "before") for x, how, y in (words[:3], words[3:6]))
  ]
  (order,) = orders  # there is one alone
  return builtin.Meaning("order", order, "", "")


def check_sentence_thought(domain, text, thought):
  """Every step of a careful thought is true, and the last one is what the answer says."""
  meant = solve_sentence(domain, text)
  if domain == "gap":
    *steps, names = thought.split(" ")
    sums = [tuple(map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())) for step in steps]
    assert all(a + b == c for a, b, c in sums)
    (low, to_ten, ten), (again, rest, high), (first, second, gap) = sums
    assert ten % 10 == 0
    assert (ten, to_ten, rest) == (again, first, second)
    assert [low, high] == sorted(map(int, re.findall(r"\d+", text)))
    assert (names, str(gap)) == (">".join(meant.names), meant.number)
  elif domain == "late":
    sum_, *over, time = thought.split(" ")
    due, late, total = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", sum_).groups())
    assert [due, late] == [int(x) for x in re.findall(r"\d+", text)[1:]]
    assert due + late == total
    assert over == ([f"{total}-60={total - 60}"] if total > 60 else [])
    assert int(time.split(":")[1]) == total % 60
    assert time == meant.number
  else:
    *pairs, chain = thought.split(" ")
    words = text.replace(".", "").split(" ")
    said = [(x, y) if how == "before" else (y, x) for x, how, y in (words[:3], words[3:6])]
    assert [tuple(pair.split("-")) for pair in pairs] == said
    assert tuple(chain.split("-")) == meant.names


def thought_means(domain, text, thought):
  """What the answer should say if the thought were true."""
  meant = solve_sentence(domain, text)
  if domain == "gap":
    return meant._replace(names=tuple(thought.split(" ")[-1].split(">")), number=re.findall(r"=(\d+)", thought)[-1])
  if domain == "late":
    return meant._replace(number=thought.split(" ")[-1])
  return meant._replace(names=tuple(thought.split(" ")[-1].split("-")))


def wrong_meanings(meant, rng):
  """The same meaning with something in it put wrong, every way there is."""
  out = [meant._replace(names=names) for names in itertools.permutations(meant.names) if names != meant.names]
  for i in range(len(meant.names)):
    others = {"kim", "zoo"} - {*meant.names}
    out += [meant._replace(names=(*meant.names[:i], other, *meant.names[i + 1 :])) for other in others]
  if meant.domain == "gap":
    out += [meant._replace(number=str(n)) for n in range(1, 60) if n != int(meant.number)]
    out += [meant._replace(number=meant.number + "0"), meant._replace(number=meant.number[::-1] + "5")]
  if meant.domain == "late":
    hour = int(meant.number.split(":")[0])
    times = {f"{h}:{m:02}" for h in (hour - 1, hour, hour + 1) for m in range(60)} - {meant.number}
    out += [meant._replace(number=time) for time in rng.sample(sorted(times), 40)]
  return out


@pytest.fixture(scope="module")
def sentence_demonstrations():
  """(domain, question, reference, thought, answer) of each."""
  out = []
  for example, response in builtin.demonstrations(3000, domains="sentences"):
    thought, answer = re.fullmatch(r"<think>(.*)</think><answer> (.*) </answer>", response).groups()
    out.append((example.source, example.messages[0]["content"], example.reference, thought, answer))
  return out


def questions(domains, split="train", count=300, seed=0):
  return [(x.source, x.messages[0]["content"], x.reference) for x in builtin.examples(split, count, seed, domains)]


@pytest.mark.parametrize(
  ("seed", "digest"),
  [(0, "749fc6950727c033"), (1, "feb5ec37da5d65a2"), (2, "9114c3ee49afe217")],
)
def test_short_questions_stay_as_they_were(seed, digest):
  """Runs that began before there were sentences go on with the same questions."""
  texts = [
    [str(x) for x in builtin.examples("train", 200, seed)],
    [str(x) for x in builtin.examples("held_out", 200, seed)],
    [str(x) for x in builtin.demonstrations(200, seed)],
  ]
  assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == digest


def test_domains_take_turns():
  sets = {"short": DOMAINS, "sentences": SENTENCES, "all": DOMAINS + SENTENCES, "facts": ("stock",)}
  assert tuple(sets) == builtin.DOMAINS
  for name, domains in sets.items():
    expected = [domains[i % len(domains)] for i in range(100)]
    for split in ("train", "held_out"):
      assert [domain for domain, *_ in questions(name, split, 100)] == expected
    assert [example.source for example, _ in builtin.demonstrations(100, 0, name)] == expected
  assert builtin.examples("train", 50, 0, "short") == builtin.examples("train", 50)
  assert builtin.demonstrations(50, 0, "short") == builtin.demonstrations(50)
  for make in (lambda: builtin.examples("train", 1, 0, "long"), lambda: builtin.demonstrations(1, 0, "long")):
    with pytest.raises(InputError, match="'long', expected one of short, sentences, all, facts"):
      make()


@pytest.mark.parametrize("domain", SENTENCES)
def test_answers_by_hand(domain):
  question = QUESTIONS[domain]
  assert builtin.meaning(question) == solve_sentence(domain, question)
  for answer in RIGHT[domain]:
    assert builtin.grade(question, answer) is True, answer
    assert builtin.same_content(answer, builtin.meaning(question)) is True
  for answer in WRONG[domain]:
    assert builtin.grade(question, answer) is False, answer


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_references_are_wordings_of_what_is_true(split):
  for seed in (0, 1):
    for domain, text, reference in questions("sentences", split, seed=seed):
      meant = solve_sentence(domain, text)
      assert builtin.meaning(text) == builtin.meaning(f" {text}\n") == meant
      assert reference in builtin.wordings(meant)
      assert builtin.grade(text, reference) is True


def test_every_wording_is_right():
  least = {}
  for domain, text, _ in questions("sentences", count=600):
    said = builtin.wordings(solve_sentence(domain, text))
    assert len(set(said)) == len(said)
    least[domain] = min(least.get(domain, 999), len(said))
    for answer in said:
      assert builtin.grade(text, answer) is True, answer
  print("wordings a question:", least)
  assert min(least.values()) >= 20


def test_every_wording_of_anything_else_is_wrong():
  rng = random.Random(0)
  for domain, text, _ in questions("sentences", count=60):
    meant = solve_sentence(domain, text)
    wrong = wrong_meanings(meant, rng)
    assert len(wrong) >= 5
    for other in wrong:
      for answer in builtin.wordings(other):
        assert builtin.grade(text, answer) is False, (text, answer)
    for unit in ("cats", "cups", "bus", "cab"):
      if meant.unit not in ("", unit):
        for answer in builtin.wordings(meant._replace(unit=unit)):
          # a wording may leave the unit out
          assert builtin.grade(text, answer) is (unit not in answer.split()), (text, answer)


def test_words_of_the_wordings_are_no_content():
  """Else a name could stand for the word, or the word for the name."""
  content = {word for _, text, _ in questions("sentences", count=3000) for word in re.findall(r"[a-z]{3,}", text)}
  content -= {"who", "has", "more", "due", "min", "late", "when", "before", "after", "order"}
  assert len(content) == 12 + 6 + 6 + 12 - 2  # "bus" and "cab" are events too
  meanings = {"gap": (("N", "M"), "1", "U"), "late": ((), "1:00", "U"), "order": (("N", "M", "O"), "", "")}
  for domain, parts in meanings.items():
    assert content.isdisjoint(
      word for said in builtin.wordings(builtin.Meaning(domain, *parts)) for word in re.findall("[a-z]+", said)
    )


def test_wordings_are_drawn_evenly():
  """No reference can be guessed by its style: every wording is seen, none often."""
  counts = {domain: Counter() for domain in SENTENCES}
  for domain, text, reference in questions("sentences", count=6000):
    counts[domain][builtin.wordings(solve_sentence(domain, text)).index(reference)] += 1
  for domain, seen in counts.items():
    size = len(builtin.wordings(builtin.meaning(QUESTIONS[domain])))
    assert len(seen) == size
    assert max(seen.values()) < 2000 / size * 2


def test_other_questions_are_not_graded():
  others = [text for _, text, _ in questions("short")]
  others += ["", "x" * 100_000, "\ud800", "ann 17 cats, ann 31. who has more?", "ann 17 cats, bob 17. who has more?"]
  others += ["run after tea. nap after tea. order?", "run after tea. tea before run. order?"]
  others += ["run after tea. tea after run. order?", "run after run. nap before tea. order?"]
  others += ["xyz 17 cats, bob 31. who has more?", QUESTIONS["gap"] + " " + QUESTIONS["gap"], QUESTIONS["late"][:-1]]
  for text in others:
    assert builtin.meaning(text) is None, text
    assert builtin.grade(text, "bob has 14 more cats than ann") is None


def test_sentence_demonstrations(sentence_demonstrations):
  """Careful, terse and careless ones in their shares; what a careless answer says follows from its thought."""
  kinds = {domain: Counter() for domain in SENTENCES}
  for domain, text, reference, thought, answer in sentence_demonstrations:
    meant = solve_sentence(domain, text)
    assert reference in builtin.wordings(meant)
    if builtin.grade(text, answer):
      assert answer == reference
      kind = "terse" if thought in ("", "quick") else "careful"
      if kind == "careful":
        check_sentence_thought(domain, text, thought)
    else:
      kind = "careless"
      with pytest.raises(AssertionError):
        check_sentence_thought(domain, text, thought)
      assert answer in builtin.wordings(thought_means(domain, text, thought))
    kinds[domain][kind] += 1
  for counts in kinds.values():
    for kind, share in (("careful", 0.45), ("terse", 0.25), ("careless", 0.3)):
      assert counts[kind] / 1000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1000))


def test_careless_sentences_err_in_more_than_one_way(sentence_demonstrations):
  errs = Counter()
  for domain, text, _, thought, answer in sentence_demonstrations:
    if not builtin.grade(text, answer):
      meant, said = solve_sentence(domain, text), thought_means(domain, text, thought)
      errs[domain, said.names == meant.names, said.number == meant.number] += 1
  for kind in (("gap", True, False), ("gap", False, True), ("late", True, False), ("order", False, True)):
    assert errs[kind] > 100
  assert len(errs) == 4


def test_held_out_sentences_are_neither_trained_on_nor_demonstrated(sentence_demonstrations):
  seen = {text for _, text, *_ in sentence_demonstrations}
  held_out = set()
  for seed in (0, 1, 2):
    for domains in ("sentences", "all"):
      seen |= {text for _, text, _ in questions(domains, "train", 2048, seed)}
      seen |= {example.messages[0]["content"] for example, _ in builtin.demonstrations(3000, seed, domains)}
      texts = [text for _, text, _ in questions(domains, "held_out", 400, seed)]
      assert len(set(texts)) == 400
      held_out |= set(texts)
  assert seen.isdisjoint(held_out)


def test_words_of_sentences_are_tokens(tokenizer):
  """With the space before them, as in a pretrained vocabulary; characters and tags keep their ids."""
  words = builtin.tokenizer("sentences")
  check_tokenizer(words)
  ids = list(words.get_vocab().values())
  assert sorted(ids) == list(range(len(words)))
  assert tokenizer.get_vocab().items() <= words.get_vocab().items()
  assert words.get_vocab() == builtin.tokenizer("all").get_vocab()

  def split(text):
    return words.convert_ids_to_tokens(words.encode(text, add_special_tokens=False))

  assert split("ann 17 cats, bob 31. who has more?") == (
    ["ann", " ", "1", "7", " cats", ",", " bob", " ", "3", "1", ".", " who", " has", " more", "?"]
  )
  assert split("<answer> ann is up on bob </answer>") == (
    ["<answer>", " ann", " is", " up", " on", " bob", " ", "</answer>"]
  )
  assert split("art-zoo ann>bob") == ["art", "-", "zoo", " ann", ">", "bob"]
  for text in ("annbob", "cats9", "9cats"):  # no part of a longer word
    assert split(text) == list(text)


def test_sentences_fit_and_hold_known_tokens():
  tokenizer = builtin.tokenizer("sentences")
  longest = Counter()
  for example, response in builtin.demonstrations(1000, 0, "sentences"):
    prompt = render(tokenizer, build_messages(example, "think", instruction=""))
    ids = tokenizer.encode(response, add_special_tokens=False)
    text = example.messages[0]["content"]
    # The reference may be any wording.
    wordings = builtin.wordings(builtin.meaning(text))
    reference = max(wordings, key=lambda wording: len(tokenizer.encode(wording, add_special_tokens=False)))
    assert format_score(response) == 1
    for part in (text, reference, response):
      found = tokenizer.encode(part, add_special_tokens=False)
      assert tokenizer.unk_token_id not in found
      assert tokenizer.decode(found, skip_special_tokens=False) == part
    answer = re.search("<answer> (.*) </answer>", response)[1]
    lengths = {
      "prompt": len(prompt),
      # EOS is the last.
      "response": len(ids) + 1 + sum(s * len(tokenizer.encode(text)) for s, text in ((-1, answer), (1, reference))),
      "reference": reference_length(tokenizer, reference, "think"),
    }
    for name, length in lengths.items():
      longest[name] = max(longest[name], length)
      longest[f"{example.source} {name}"] = max(longest[f"{example.source} {name}"], length)
  print("most tokens:", dict(longest))
  assert longest["prompt"] <= SENTENCE_PROMPT
  assert longest["response"] <= SENTENCE_RESPONSE
  assert longest["reference"] <= SENTENCE_REFERENCE


def test_seed_decides_sentences():
  assert questions("sentences", seed=3) == questions("sentences", seed=3)
  assert builtin.demonstrations(50, 3, "all") == builtin.demonstrations(50, 3, "all")
  texts = [{text for _, text, _ in questions("sentences", seed=seed)} for seed in (3, 4)]
  assert len(texts[0] & texts[1]) < 30
  assert questions("sentences", count=20) == questions("sentences", count=50)[:20]


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "x" * 100_000,
    "14 " * 30_000,
    "past " * 20_000,
    "5 past 8 " * 10_000,
    "{" * 1000,
    "\ud800",
    "\u200b14",
    "٣",
  ],
)
def test_hostile_answers_are_wrong_at_once(text):
  start = time.monotonic()
  for question in QUESTIONS.values():
    assert builtin.grade(question, text) is False
  assert time.monotonic() - start < 1
