"""The built-in questions: their answers by other arithmetic, their split, and the demonstrations' mixture."""

import math
import re
from collections import Counter

import pytest

from rlpr_jax.data import builtin
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
