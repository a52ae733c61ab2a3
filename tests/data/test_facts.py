"""Questions that ask for several facts: their answers by other arithmetic, every wording, and the demonstrations."""

import hashlib
import itertools
import json
import math
import random
import re
import time
from collections import Counter

import pytest

from configs.facts import get_config
from rlpr_jax.data import builtin, facts
from rlpr_jax.data.facts import Count, Report
from rlpr_jax.data.pipeline import reference_length
from rlpr_jax.data.sources import Example
from rlpr_jax.data.templates import build_messages, render
from rlpr_jax.grading import graders
from rlpr_jax.rewards import format_score
from rlpr_jax.splicing import check_tokenizer

COUNT = 3000
QUESTION = "ann 38 eggs, sells 7. bob 15 cups, gets 9. cal 41 pens, gets 4. report all."
RIGHT = (
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "45 pens are now with cal while 31 eggs are now with ann, 24 cups are now with bob, and the most of all are with cal",
  "cal has the most of all, and 45 pens are with cal, ann ends up with 31 eggs, then 24 cups are left to bob",
  "In the end Ann has 31 eggs; Bob has 24 cups. Cal has 45 pens, and Cal has the most!",
  "  in the end, ann 31 eggs,\n24 cups bob and cal 45 pens and most cal  ",
)
WRONG = (
  "ann is left with 32 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and ann has the most of all",
  "ann is left with 24 eggs, bob is left with 31 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 cups, bob is left with 24 eggs, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 eggs, dan is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 eggs, bob is left with 24 cups, and cal has the most of all",
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens",
  "ann is left with 31 eggs, ann is left with 31 eggs, bob has 24 cups, cal has 45 pens, and cal has the most",
  "ann is left with 31 eggs, bob has 24 cups, cal has 45 pens, cal has the most, and cal has the most",
  "ann is left with 31 eggs, bob has 24 cups, cal has 45 pens, cal has the most, and ann has 30 eggs",
  "ann is not left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann and bob are left with 31 eggs and 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 bob is left with 24 cups eggs, cal is left with 45 pens, and cal has the most of all",
  "ann is left with eggs 31, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 3 1 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 3.1 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 031 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most pens",
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and the most",
  "ann is left with 31 eggs, bob is left with 24 cups, cal has the most of all 45 pens",
  "ann is lfet with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all",
  "ann is left with 31 eggs, bob is left with 24 cups, cal is left with 45 pens, and cal has the most of all?",
  "31 24 45 cal",
  "",
)


def solve(text):
  """The report, from the question's words alone and by counting on one's fingers."""
  counts = []
  for name, start, unit, verb, by in re.findall(r"(\w+) (\d+) (\w+), (\w+) (\d+)\.", text):
    number = int(start)
    for _ in range(int(by)):
      number += {"gets": 1, "sells": -1}[verb]
    counts.append(Count(name, number, unit))
  assert len(counts) == 3
  numbers = sorted(number for _, number, _ in counts)
  assert numbers[2] > numbers[1]
  (most,) = (name for name, number, _ in counts if number == numbers[2])
  return Report(tuple(counts), most)


def read_thought(thought):
  """(name, sum, number, unit) of each step, whether names come first, and who is said to have the most."""
  steps = re.findall(r"(\w+)(:?) ([0-9]+[+-][0-9]+)=([0-9]+) (\w+) ", thought)
  colon, most = re.search(r"most(:?) (\w+)$", thought).groups()
  assert {step[1] for step in steps} == {colon}
  assert thought == " ".join([*(f"{a}{b} {c}={d} {e}" for a, b, c, d, e in steps), f"most{colon} {most}"])
  return [(name, sum_, number, unit) for name, _, sum_, number, unit in steps], not colon, most


def wrong_reports(meant, rng):
  """The same report with one thing in it put wrong."""
  for i, count in enumerate(meant.counts):
    names, units = {"zoe"} | {c.name for c in meant.counts} - {count.name}, {"figs"} | {c.unit for c in meant.counts}
    numbers = {count.number + by for by in (-10, -1, 1, 10)} | {c.number for c in meant.counts} | {rng.randint(10, 99)}
    changed = [count._replace(name=name) for name in names]
    changed += [count._replace(unit=unit) for unit in units - {count.unit}]
    changed += [count._replace(number=number) for number in numbers - {count.number}]
    for wrong in changed:
      yield meant._replace(counts=(*meant.counts[:i], wrong, *meant.counts[i + 1 :]))
  for name in {"zoe"} | {c.name for c in meant.counts} - {meant.most}:
    yield meant._replace(most=name)
  for counts in itertools.permutations(meant.counts):
    swapped = tuple(count._replace(name=c.name) for count, c in zip(counts, meant.counts, strict=True))
    if {*swapped} != {*meant.counts}:
      yield meant._replace(counts=swapped)


def questions(split="train", count=300, seed=0):
  return [(x.source, x.messages[0]["content"], x.reference) for x in builtin.examples(split, count, seed, "facts")]


@pytest.fixture(scope="module")
def demonstrations():
  """(question, reference, thought, answer) of each."""
  out = []
  for example, response in builtin.demonstrations(COUNT, domains="facts"):
    thought, answer = re.fullmatch(r"<think>(.*)</think><answer> (.*) </answer>", response).groups()
    out.append((example.messages[0]["content"], example.reference, thought, answer))
  return out


@pytest.fixture(scope="module")
def tokenizer():
  return builtin.tokenizer("facts")


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("seed", [0, 1])
def test_references_report_what_the_question_says(split, seed):
  for domain, text, reference in questions(split, 300, seed):
    meant = solve(text)
    assert domain == "stock"
    assert builtin.meaning(text) == meant
    assert reference in builtin.wordings(meant)
    assert builtin.grade(text, reference) is True


def test_every_wording_is_right_and_has_30_to_60_tokens(tokenizer):
  seen = set()
  for split, count in (("train", 12), ("held_out", 12)):
    for _, text, _ in questions(split, count):
      meant = solve(text)
      wordings = builtin.wordings(meant)
      assert len(set(wordings)) == len(wordings) == 648
      for wording in wordings:
        assert builtin.grade(text, wording) is True, wording
        assert builtin.grade(text, f"{wording.capitalize()}.") is True
        seen.add(len(tokenizer.encode(wording, add_special_tokens=False)))
  assert 30 <= min(seen) <= max(seen) <= 60


def test_one_thing_put_wrong_is_wrong_in_every_wording():
  rng = random.Random(0)
  for _, text, _ in questions("held_out", 3):
    for report in wrong_reports(solve(text), rng):
      for wording in rng.sample(builtin.wordings(report), 100):
        assert builtin.grade(text, wording) is False, wording


def test_right_and_wrong_answers_by_hand():
  for answer in RIGHT:
    assert builtin.grade(QUESTION, answer) is True, answer
  for answer in WRONG:
    assert builtin.grade(QUESTION, answer) is False, answer


def test_the_verifier_reads_what_is_reported():
  response = "<think></think><answer> {} </answer>".format
  for verdict, answers in ((True, RIGHT), (False, WRONG)):
    for answer in answers:
      assert graders.verify("builtin", response(answer), RIGHT[0], QUESTION) is verdict
      assert graders.is_right("builtin", response(answer), [RIGHT[0]], QUESTION) is verdict


def test_wordings_are_drawn_evenly():
  """As to what goes as the reasoning does: the order of the counts, and what stands first."""
  seen = Counter()
  for _, text, reference in questions(count=1800):
    meant = solve(text)
    places = sorted(range(3), key=lambda i: reference.index(f"{meant.counts[i].number} "))
    number_first = re.match(r"(in the end |so by now )?[0-9]", reference) is not None
    seen[tuple(places), number_first] += 1
  assert len(seen) == 12
  assert all(count == pytest.approx(150, abs=60) for count in seen.values())


def test_other_questions_are_not_graded():
  others = [
    "",
    QUESTION[:-1],
    f"{QUESTION} {QUESTION}",
    QUESTION.replace("bob", "ann"),  # twice the same
    QUESTION.replace("15", "36"),  # nobody has the most
    QUESTION.replace("sells 7", "sells 0"),
    QUESTION.replace("38", "12"),  # 5 eggs
    QUESTION.replace("41", "98"),  # 102 pens
    QUESTION.replace("eggs", "figs"),
    "ann 17 cats, gets 2. report all.",
  ]
  for text in others:
    assert builtin.meaning(text) is None, text
    assert builtin.grade(text, RIGHT[0]) is None


def test_demonstrations_tell_what_their_thoughts_found_and_as_they_found_it(demonstrations):
  """Careful, terse and careless ones in their shares; order and voice of an answer are those of the thought."""
  kinds, errs, styles = Counter(), Counter(), Counter()
  for text, reference, thought, answer in demonstrations:
    meant, right = solve(text), builtin.grade(text, answer)
    assert right == (answer == reference)
    if thought in ("", "quick"):
      assert right
      kinds["terse"] += 1
      continue
    steps, name_first, most = read_thought(thought)
    sums = {name: f"{start}{'+' if verb == 'gets' else '-'}{by}" for name, start, verb, by in re.findall(
      r"(\w+) (\d+) \w+, (\w+) (\d+)\.", text
    )}  # fmt: skip
    assert {name: sum_ for name, sum_, *_ in steps} == sums
    assert {(name, unit) for name, _, _, unit in steps} == {(count.name, count.unit) for count in meant.counts}
    numbers = {name: int(number) for name, _, number, _ in steps}
    said = Report(tuple(count._replace(number=numbers[count.name]) for count in meant.counts), most)
    assert facts.same_content(answer, said)
    assert (said == meant) == right
    kinds["careful" if right else "careless"] += 1
    clauses = re.split(", then |, | while ", answer)[:3]
    for (name, _, number, _), clause in zip(steps, clauses, strict=True):
      assert re.search(f"{name} .* {number} " if name_first else f"{number} .* {name}$", clause)
    styles[tuple(name for name, *_ in steps) == tuple(count.name for count in meant.counts), name_first] += 1
    slips = sum(count.number != numbers[count.name] for count in meant.counts)
    if not right:
      errs[slips] += 1
      assert slips or most != meant.most
      assert not slips or numbers[most] == max(numbers.values())
  assert sum(kinds.values()) == COUNT
  for kind, share in (("careful", 0.45), ("terse", 0.25), ("careless", 0.3)):
    assert kinds[kind] / COUNT == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / COUNT))
  assert set(errs) == {0, 1, 2, 3}
  assert min(errs.values()) > 100
  assert len(styles) == 4


def test_held_out_questions_are_neither_trained_on_nor_demonstrated(demonstrations):
  seen, held_out = {text for text, *_ in demonstrations}, set()
  for seed in (0, 1, 2):
    seen |= {text for _, text, _ in questions("train", 2048, seed)}
    texts = [text for _, text, _ in questions("held_out", 400, seed)]
    assert len(set(texts)) == 400
    held_out |= set(texts)
  assert seen.isdisjoint(held_out)


def test_seed_decides_everything():
  assert questions(seed=3) == questions(seed=3)
  assert builtin.demonstrations(50, 3, "facts") == builtin.demonstrations(50, 3, "facts")
  assert not {text for _, text, _ in questions(seed=3)} & {text for _, text, _ in questions(seed=4)}
  assert questions(count=20) == questions(count=50)[:20]


@pytest.mark.parametrize(
  ("domains", "digest", "vocabulary"),
  [
    ("short", "cbe0849405752e77", "2c87dd3908217532"),
    ("sentences", "2860d7c233c23f1a", "a81790355e558208"),
    ("all", "e7514a5bbfa63f61", "a81790355e558208"),
  ],
)
def test_other_sets_stay_as_they_were(domains, digest, vocabulary):
  """Runs that began before there were facts go on with the same questions and tokens."""
  texts = []
  for seed in (0, 1):
    for split in ("train", "held_out"):
      texts += [[x.messages[0]["content"], x.reference] for x in builtin.examples(split, 100, seed, domains)]
    texts += [[x.messages[0]["content"], x.reference, r] for x, r in builtin.demonstrations(100, seed, domains)]
  found = (texts, sorted(builtin.tokenizer(domains).get_vocab().items()))
  assert [hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16] for x in found] == [digest, vocabulary]


def test_the_set_fits_its_recipe_and_holds_known_tokens(tokenizer, demonstrations):
  check_tokenizer(tokenizer)
  assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
  config, longest, size = get_config(), Counter(), lambda text: len(tokenizer.encode(text, add_special_tokens=False))
  for text, reference, thought, answer in demonstrations[:1000]:
    response = f"<think>{thought}</think><answer> {answer} </answer>"
    example = Example(({"role": "user", "content": text},), reference, "stock", 0)
    lengths = {
      "prompt": len(render(tokenizer, build_messages(example, "think", instruction=""))),
      "response": size(response) + 1,  # EOS is the last
      "thought and the longest reference": size(response) + 1 - size(answer) + 41,
      "reference": reference_length(tokenizer, reference, "think"),
    }
    longest |= Counter(lengths)  # the larger of each
    assert format_score(response) == 1
    for part in (text, reference, response):
      ids = tokenizer.encode(part, add_special_tokens=False)
      assert tokenizer.unk_token_id not in ids
      assert tokenizer.decode(ids, skip_special_tokens=False) == part
  print("most tokens:", dict(longest))
  assert longest["prompt"] <= config.data.prompt_limit
  assert longest["response"] <= config.rollout.max_response_length
  assert longest["thought and the longest reference"] <= config.rollout.max_response_length
  assert longest["reference"] <= config.data.max_reference_length


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "x" * 100_000,
    "31 " * 30_000,
    "and " * 30_000,
    ", most" * 20_000,
    RIGHT[0] * 500,
    "\ud800",
    "\u200b31",
    "٣١",
  ],
)
def test_hostile_answers_are_wrong_at_once(text):
  start = time.monotonic()
  assert builtin.grade(QUESTION, text) is False
  assert time.monotonic() - start < 1
