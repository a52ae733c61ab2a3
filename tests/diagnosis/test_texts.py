"""Where the reasoning of a response is, in tokenizers whose tokens reach over words and tags."""

import pytest

from rlpr_jax.diagnosis import texts

RESPONSE = "<think> 6 * 7\nis 中文 42 </think> <answer> 42 </answer>"


@pytest.mark.parametrize(
  ("response", "template", "reasoning"),
  [
    (RESPONSE, "think", " 6 * 7\nis 中文 42 "),
    ("6 * 7 </think> <answer> 42 </answer>", "think", "6 * 7 "),  # the prompt has opened the thought
    ("6 * 7 = 42 <answer> 42 </answer>", "answer_only", "6 * 7 = 42 "),
    ("<think></think><answer> 42 </answer>", "think", ""),
    ("<answer> 42 </answer>", "think", ""),  # the prompt has closed it
  ],
)
def test_the_reasoning_is_found_in_the_tokens(tokenizer, response, template, reasoning):
  ids = tokenizer.encode(response, add_special_tokens=False)
  begin, end = texts.reasoning_span(tokenizer, ids, template)
  found = tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
  # A token that holds a character of a tag is no part of it.
  assert found.strip() == reasoning.strip() or (found in reasoning and _reaches_over(tokenizer, ids, begin, end))
  assert 0 <= begin <= end <= len(ids)


def _reaches_over(tokenizer, ids, begin, end):
  """Whether the tokens beside the reasoning hold more than tags."""
  beside = tokenizer.decode(ids[max(begin - 1, 0) : begin]) + tokenizer.decode(ids[end : end + 1])
  return "<" in beside or ">" in beside


def test_sentences_of_other_scripts():
  assert texts.sentences("先算。再加。 3.5 is one number") == ["先算。", "再加。", "3.5 is one number"]
  assert texts.sentences(" \n ") == []


@pytest.mark.parametrize("seed", range(20))
def test_a_shuffled_text_is_another_one_of_the_same_pieces(seed):
  pieces = ["a", "b", "a", "c"]
  shuffled = texts.shuffle(pieces, seed).split()
  assert shuffled != pieces
  assert sorted(shuffled) == sorted(pieces)


def test_pieces_without_another_order():
  assert texts.shuffle([], 0) is None
  assert texts.shuffle(["a"], 0) is None
