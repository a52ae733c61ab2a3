"""data/pipeline.py: which prompts are kept, and the order in which they are drawn."""

import collections
import copy
import dataclasses
import json

import numpy as np
import pytest

from rlpr_jax.data.pipeline import PromptSettings, PromptStream, prepare, reference_length, reference_lengths, repeats
from rlpr_jax.data.sources import Example
from rlpr_jax.errors import InputError
from rlpr_jax.splicing import baseline_suffix, splice
from rlpr_jax.types import Prompt

TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)
WIDE = {"prompt_limit": 10_000, "max_reference_length": 10_000}


@pytest.fixture(scope="module")
def chat(across_words):
  tokenizer = copy.copy(across_words)
  tokenizer.chat_template = TEMPLATE
  return tokenizer


def example(question, reference, row=1):
  return Example(({"role": "user", "content": question},), reference, "test", row)


def prepared(tokenizer, examples, **settings):
  defaults = {"template": "think", "instruction": "", "worked_examples": (), **WIDE}
  return prepare(examples, tokenizer, PromptSettings(**{**defaults, **settings}))


def test_prompts_hold_what_the_question_says(chat):
  shown = [("1 + 1?", "<answer> 2 </answer>")]
  row = Example(
    (
      {"role": "user", "content": "Hi."},
      {"role": "assistant", "content": "Hi."},
      {"role": "user", "content": "6 * 7?"},
    ),
    "42",
    "web",
    9,
  )
  (prompt,), dropped = prepared(chat, [row], instruction="Go.", worked_examples=shown)
  assert chat.decode(prompt.ids) == (
    "[system]Go.[user]Hi.[assistant]Hi.[user]1 + 1?[assistant]<answer> 2 </answer>[user]6 * 7?[go]"
  )
  assert prompt.ids.dtype == np.int32
  assert (prompt.reference, prompt.question, prompt.source, prompt.row) == ("42", "6 * 7?", "web", 0)
  assert dropped == {"prompt_too_long": 0, "reference_too_long": 0}


def test_the_template_chooses_the_instruction(chat):
  texts = [
    chat.decode(prepared(chat, [example("q", "a")], template=template, instruction=None)[0][0].ids)
    for template in ("think", "answer_only")
  ]
  assert "<think>" in texts[0]
  assert "<think>" not in texts[1]


def test_long_rows_are_dropped_and_counted(chat):
  rows = [example("short", "42", 1), example("long " * 50, "42", 2), example("short", "long " * 50, 3)]
  rows += [example("long " * 50, "long " * 50, 4), example("last", "42", 5)]
  prompts, dropped = prepared(chat, rows, prompt_limit=60, max_reference_length=60)
  assert dropped == {"prompt_too_long": 2, "reference_too_long": 1}
  assert [(prompt.question, prompt.row) for prompt in prompts] == [("short", 0), ("last", 1)]


def test_the_limits_are_the_longest_that_pass(chat):
  row = example("6 * 7?", "42")
  length = len(prepared(chat, [row])[0][0].ids)
  needed = reference_length(chat, "42", "think")
  assert len(prepared(chat, [row], prompt_limit=length, max_reference_length=needed)[0]) == 1
  with pytest.raises(InputError, match=rf"none of 1 prompts is left: 1 have over {length - 1} tokens \(prompt_limit\)"):
    prepared(chat, [row], prompt_limit=length - 1)
  with pytest.raises(InputError, match=rf"1 a reference over {needed - 1} \(max_reference_length\)"):
    prepared(chat, [row], max_reference_length=needed - 1)


@pytest.mark.parametrize("template", ["think", "answer_only"])
def test_reference_length_holds_what_is_scored(tokenizer, template):
  text = "<think> 中 </think> so <answer> 41 </answer>"
  for reference in ("42", "New  York", "\\frac{1}{2}", "北京", "x>"):
    room = reference_length(tokenizer, reference, template)
    spliced = splice(tokenizer, [], tokenizer.encode(text, add_special_tokens=False), reference, template)
    # Counted on another response than this one: with a space after the tag, both take the same.
    assert len(spliced.suffix_ids) <= room
    assert all(len(baseline_suffix(tokenizer, reference, prefix)[0]) <= room for prefix in ("bare", "tagged"))


@pytest.mark.parametrize("template", ["think", "answer_only"])
def test_reference_lengths_are_those_of_the_splices_one_by_one(tokenizer, template):
  """Of references that spell a control token too, which `splice` takes for text."""
  end = tokenizer.eos_token
  references = ["42", "New  York", "\\frac{1}{2}", "北京", "x>", f"a {end} b", "<answer>", "42", "é" * 40]
  tags = tokenizer.encode("<think></think><answer>" if template == "think" else "<answer>", add_special_tokens=False)
  assert reference_lengths(tokenizer, references, template) == [
    max(
      len(splice(tokenizer, [], tags, reference, template).suffix_ids),
      len(baseline_suffix(tokenizer, reference, "tagged")[0]),
    )
    for reference in references
  ]
  assert reference_lengths(tokenizer, [], template) == []


def test_prompts_of_many_examples_are_those_of_each(chat):
  rows = [example(f"{'why ' * (i % 7)}{i}?", "so " * (i % 5) + "42", i) for i in range(2500)]
  limits = {"prompt_limit": 30, "max_reference_length": 30}
  told = []
  prompts, dropped = prepare(
    rows,
    chat,
    PromptSettings(template="think", instruction="", worked_examples=(), **limits),
    progress=lambda done, total: told.append((done, total)),
  )
  alone = []
  for row in rows:
    try:
      alone += prepared(chat, [row], **limits)[0]
    except InputError:
      continue
  assert 0 < len(alone) == len(prompts) == 2500 - sum(dropped.values()) < 2500
  for i, (prompt, one) in enumerate(zip(prompts, alone, strict=True)):
    assert (prompt.ids.tolist(), prompt.question, prompt.reference) == (one.ids.tolist(), one.question, one.reference)
    assert prompt.row == i
  assert told == [(1024, 2500), (2048, 2500), (2500, 2500)]


def test_a_system_message_of_the_settings(chat):
  (prompt,), _ = prepared(chat, [example("q", "a")], instruction="Go.", system="Come.")
  assert chat.decode(prompt.ids) == "[system]Come.[user]q[go]"


def test_prompts_are_there_as_often_as_their_weight_says(chat):
  rows = [dataclasses.replace(example(f"{i}?", "42", i), weight=weight) for i, weight in enumerate([1, 3, 1, 2])]
  prompts, _ = prepared(chat, rows)
  assert [prompt.question for prompt in prompts[:4]] == ["0?", "1?", "2?", "3?"]
  assert sorted(prompt.question for prompt in prompts) == ["0?", *["1?"] * 3, "2?", *["3?"] * 2]
  assert [prompt.row for prompt in prompts] == list(range(7))


def test_a_part_of_the_rows_is_chosen_by_the_seed():
  weights = [1.0] * 10 + [2.5] * 100
  again = repeats(weights, seed=3)
  counts = collections.Counter(again)
  assert set(counts) == set(range(10, 110))
  assert collections.Counter(counts.values()) == {1: 50, 2: 50}
  assert repeats(weights, seed=3) == again
  assert repeats(weights, seed=4) != again
  assert len(repeats(weights, seed=4)) == len(again)


def some_prompts(count):
  return [
    Prompt(ids=np.arange(3, dtype=np.int32), reference="42", question=f"question {i}", source="test", row=i)
    for i in range(count)
  ]


def rows(batch):
  return [prompt.row for _, prompt in batch]


@pytest.mark.parametrize("count", [1, 2, 10, 257])
def test_every_epoch_holds_every_prompt_once(count):
  stream = PromptStream(some_prompts(count), seed=0)
  for _ in range(4):
    assert sorted(rows(stream.next_batch(count))) == list(range(count))


def test_epochs_differ_and_seeds_differ():
  stream = PromptStream(some_prompts(100), seed=0)
  epochs = [tuple(rows(stream.next_batch(100))) for _ in range(5)]
  assert len({*epochs, tuple(range(100))}) == 6
  assert tuple(rows(PromptStream(some_prompts(100), seed=1).next_batch(100))) not in epochs
  assert tuple(rows(PromptStream(some_prompts(100), seed=0).next_batch(100))) == epochs[0]


def test_batches_of_any_size_give_one_order():
  whole = PromptStream(some_prompts(10), seed=3).next_batch(35)
  parts = PromptStream(some_prompts(10), seed=3)
  pieces = [pair for size in (7, 1, 20, 0, 7) for pair in parts.next_batch(size)]
  assert [(draw, prompt.row) for draw, prompt in pieces] == [(draw, prompt.row) for draw, prompt in whole]


def test_draw_numbers_count_from_zero():
  stream = PromptStream(some_prompts(4), seed=0)
  draws = [draw for size in (3, 5, 2) for draw, _ in stream.next_batch(size)]
  assert draws == list(range(10))
  assert all(type(draw) is int for draw in draws)


@pytest.mark.parametrize("before", [0, 5, 10, 23])
def test_restore_goes_on_in_the_same_order(before):
  stream = PromptStream(some_prompts(10), seed=7)
  stream.next_batch(before)
  saved = json.loads(json.dumps(stream.state()))
  expected = [(draw, prompt.row) for draw, prompt in stream.next_batch(31)]
  assert expected[0][0] == before

  fresh = PromptStream(some_prompts(10), seed=7)
  fresh.next_batch(2)  # where it stood before does not matter
  fresh.restore(saved)
  assert [(draw, prompt.row) for draw, prompt in fresh.next_batch(31)] == expected


def test_restore_refuses_another_order():
  saved = PromptStream(some_prompts(10), seed=7).state()
  with pytest.raises(InputError, match="expected prompts 11, as in this run; found 10"):
    PromptStream(some_prompts(11), seed=7).restore(saved)
  with pytest.raises(InputError, match="expected seed 8, as in this run; found 7"):
    PromptStream(some_prompts(10), seed=8).restore(saved)
