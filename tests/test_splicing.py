"""splicing.py against the bytes each token stands for, on trained and on published tokenizers."""

import functools
import itertools
import random
import re
import unicodedata

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.splicing import (
  Splice,
  as_sampled,
  baseline_suffix,
  check_tokenizer,
  extract_answer,
  find_place,
  own_answer,
  prompt_opening,
  splice,
  with_ending,
)

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # ByteLevel's spelling of bytes
THOUGHT = "<think> 6 times 7: 中文 😀 </think> "
REFERENCES = [
  "42",
  "a",
  "1234567.89",
  "New  York",
  "two\n\nlines  \t here",
  "\\frac{\\pi}{2} \\left( 3, x^{2} \\right)",
  "$-\\$5$",
  "北京大学",
  "👩‍👩‍👧 and 𓀀",
  "ne\u0301e",  # a combining accent inside
  "cafe\u0301",  # and one as the last character, where NFC leaves a gap in the offsets
  "> 4 </",
  "</answer>",
  "é\u00a0%",
]
# What the policy wrote after `<answer>`.
TAILS = [
  " 41 </answer>",
  "41",
  "",
  " ",
  "\n41\n</answer>",
  "\n\n  </answer>",
  "$x$ </answer> </answer>",
  "> <a",
  "\u3000中",
]


@functools.cache
def token_bytes(tokenizer, token_id):
  """The bytes of one token, read off its spelling in the vocabulary."""
  added = tokenizer.added_tokens_decoder.get(token_id)
  if added is not None and added.special:
    return added.content.encode()
  piece = tokenizer.convert_ids_to_tokens(token_id)
  if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
    return bytes(BYTES[character] for character in piece)
  byte = re.fullmatch("<0x(..)>", piece)
  return bytes.fromhex(byte.group(1)) if byte else piece.replace("▁", " ").encode()


def byte_spans(tokenizer, ids):
  ends = list(itertools.accumulate((len(token_bytes(tokenizer, i)) for i in ids), initial=0))
  return list(itertools.pairwise(ends))


def normal(tokenizer, text):
  """`text` as it comes back from the tokenizer. Some bring it to NFC."""
  is_nfc = isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.NFC)
  return unicodedata.normalize("NFC", text) if is_nfc else text


def decode(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_in_pieces(tokenizer, text, rng):
  """Ids of `text` cut at random places: what a policy may sample, and no tokenizer would write."""
  ids = []
  while text:
    size = rng.randint(1, 5)
    ids += tokenizer.encode(text[:size], add_special_tokens=False)
    text = text[size:]
  return ids


def check_splice(tokenizer, ids, text, reference, template="think"):
  """Everything section 2 of the method asks of one splice; `text` is what the ids spell."""
  opened = text.index("<answer>") + len("<answer>")
  space = re.match(r"\s*", text[opened:]).group() or " "
  spans = byte_spans(tokenizer, ids)
  last = len(text[:opened].encode()) - 1  # byte of the `>` of `<answer>`
  holder = next(i for i, (start, end) in enumerate(spans) if start <= last < end)

  prefix_length, suffix_ids, mask = splice(tokenizer, [1, 2], ids, reference, template)

  assert prefix_length == holder
  whole = decode(tokenizer, ids[:prefix_length] + suffix_ids)
  assert whole == text[:opened] + normal(tokenizer, f"{space}{reference} </answer>") + tokenizer.eos_token
  assert suffix_ids[-1] == tokenizer.eos_token_id
  assert tokenizer.eos_token_id not in suffix_ids[:-1]
  start = last + 1 - spans[holder][0] + len(space.encode())
  end = start + len(normal(tokenizer, reference).encode())
  assert mask == [left < end and right > start for left, right in byte_spans(tokenizer, suffix_ids)]
  masked = [i for i, inside in zip(suffix_ids, mask, strict=True) if inside]
  assert normal(tokenizer, reference) in decode(tokenizer, masked)


@pytest.mark.parametrize("tail", TAILS)
def test_splice_puts_the_reference_after_the_tag(tokenizer, tail):
  text = f"{THOUGHT}<answer>{tail}"
  ids = tokenizer.encode(text, add_special_tokens=False)
  for reference in REFERENCES:
    check_splice(tokenizer, ids, text, reference)


def test_splice_keeps_sampled_ids_of_another_tokenisation(tokenizer):
  rng = random.Random(0)
  changed = 0
  for reference, tail in itertools.product(REFERENCES, TAILS):
    text = f"Hm, 12 🤔\n{THOUGHT}so \n<answer>{tail}"
    ids = encode_in_pieces(tokenizer, text, rng)
    changed += ids != tokenizer.encode(text, add_special_tokens=False)
    check_splice(tokenizer, ids, text, reference)
  assert changed > 100


def test_splice_finds_the_tag_far_from_the_end(tokenizer):
  text = f"{THOUGHT}<answer> 41 </answer>{' and so on 中' * 300}"
  check_splice(tokenizer, tokenizer.encode(text, add_special_tokens=False), text, "42")


def test_splice_with_the_tag_first(tokenizer):
  check_splice(tokenizer, tokenizer.encode("<answer>", add_special_tokens=False), "<answer>", "42", "answer_only")


def test_splice_takes_arrays(tokenizer):
  ids = tokenizer.encode(f"{THOUGHT}<answer> 41 </answer>", add_special_tokens=False)
  assert splice(tokenizer, [], np.array(ids, np.int32), "42") == splice(tokenizer, [], ids, "42")


@pytest.mark.parametrize("tail", ["", " ", " 41 </answer>"])
def test_special_tokens_after_the_tag_do_no_harm(tokenizer, tail):
  text = f"{THOUGHT}<answer>{tail}"
  ids = tokenizer.encode(text, add_special_tokens=False)
  ended = [*ids, tokenizer.eos_token_id, tokenizer.eos_token_id]
  check_splice(tokenizer, ended, text + 2 * tokenizer.eos_token, "42")
  assert splice(tokenizer, [], ended, "42") == splice(tokenizer, [], ids, "42")


def test_a_control_token_spelled_in_the_reference_is_text(tokenizer):
  text = f"{THOUGHT}<answer> 41"
  check_splice(tokenizer, tokenizer.encode(text, add_special_tokens=False), text, f"the {tokenizer.eos_token} token")


def test_a_tag_that_shares_its_token_with_what_follows(across_words):
  text = f"{THOUGHT}<answer> 41 </answer>"
  ids = across_words.encode(text)
  pieces = [across_words.decode([i]) for i in ids]
  assert not any(piece.endswith("<answer>") for piece in pieces)  # else this shows nothing
  check_splice(across_words, ids, text, "42")


def test_whitespace_that_offsets_leave_out_is_masked(across_words):
  encoded = across_words("> a   b </answer>", return_offsets_mapping=True)
  assert any(left == right for left, right in encoded["offset_mapping"])  # a token of spaces: an empty span
  text = "<answer>"
  for reference in ("a   b", "a b  c", "中   文"):
    check_splice(across_words, across_words.encode(text), text, reference, "answer_only")


def test_a_token_that_starts_inside_a_character():
  """It holds the last byte of 中 and the whole tag, so the splice starts with the whole character."""
  last = {byte: character for character, byte in BYTES.items()}["中".encode()[-1]]
  tag = [("<answer>"[:i], "<answer>"[i]) for i in range(1, 8)]
  merges = [*tag, (last, "<answer>")]
  words = [*sorted(BYTES), *(a + b for a, b in merges)]
  inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  inner.decoder = decoders.ByteLevel()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
  ids = tokenizer.encode("so 中<answer>41")
  assert token_bytes(tokenizer, ids[5]) == "中".encode()[-1:] + b"<answer>"

  prefix_length, suffix_ids, mask = splice(tokenizer, [], ids, "42", "answer_only")

  assert prefix_length == 3
  assert decode(tokenizer, ids[:3] + suffix_ids) == "so 中<answer> 42 </answer><|end|>"
  assert [tokenizer.decode(i) for i, inside in zip(suffix_ids, mask, strict=True) if inside] == ["4", "2"]


@pytest.mark.parametrize("where", ["thought", "tail"])
def test_broken_utf8_does_no_harm(tokenizer, where):
  """Half a character decodes to U+FFFD, and a cut at any token may make one."""
  hieroglyph = tokenizer.encode("𓀀", add_special_tokens=False)
  broken = hieroglyph[:-1]
  assert decode(tokenizer, broken).endswith("\ufffd")
  before, after = ("<think> ", "</think><answer>") if where == "thought" else ("<think></think><answer>", "")
  opening, closing = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
  ids = opening + broken + closing
  prefix_length, suffix_ids, _ = splice(tokenizer, [], ids, "42")
  text = decode(tokenizer, ids)
  assert decode(tokenizer, ids[:prefix_length] + suffix_ids) == (
    text[: text.index("<answer>")] + f"<answer> 42 </answer>{tokenizer.eos_token}"
  )
  held = decode(tokenizer, ids[prefix_length:])
  assert ">" in held
  assert ">" not in decode(tokenizer, ids[prefix_length + 1 :])


@pytest.mark.parametrize(
  ("text", "think", "answer_only"),
  [
    ("<think> a </think> <answer> 4 </answer>", True, True),
    ("Well. <think> a </think> so <answer>", True, True),
    ("<answer> 4 </answer>", False, True),
    ("a <answer> 4", False, True),
    ("<think> a <answer> 4 </answer>", False, True),
    ("a </think> <answer> 4 </answer>", False, True),
    ("</think> a <think> <answer> 4 </answer>", False, True),
    ("<answer> <think> a </think> 4 </answer>", False, True),
    ("<think> <think> a </think> <answer> 4 </answer>", False, True),
    ("<think> a </think> </think> <answer> 4 </answer>", False, True),
    ("<think> a </think> <answer> 4 </answer> <answer> 5 </answer>", False, False),
    ("<think> a </think> <answer> 4 </answer> <think>", False, True),
    ("<think> a </think> 4 </answer>", False, False),
    ("<Think> a </Think> <Answer> 4 </Answer>", False, False),
    ("<think> a </think> <answer", False, False),
    ("", False, False),
  ],
)
def test_scorable_responses(across_words, text, think, answer_only):
  ids = across_words.encode(text)
  assert (splice(across_words, [], ids, "42", "think") is not None) == think
  assert (splice(across_words, [], ids, "42", "answer_only") is not None) == answer_only


def test_a_special_token_inside_a_tag_breaks_it(tokenizer):
  start, end = (tokenizer.encode(part, add_special_tokens=False) for part in ("<think></think><answer", ">"))
  assert splice(tokenizer, [], start + end, "42") is not None
  assert splice(tokenizer, [], [*start, tokenizer.eos_token_id, *end], "42") is None


def test_tags_that_are_special_tokens():
  tokenizer = word_level(["?", "<end>", "4", "2", "5", " "], decoders.Fuse())
  tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
  ids = tokenizer.encode("5 <answer>5</answer><end>")
  prefix_length, suffix_ids, mask = splice(tokenizer, [], ids, "42", "answer_only")
  assert prefix_length == 2
  assert [tokenizer.decode(i) for i in suffix_ids] == ["<answer>", " ", "4", "2", " ", "</answer>", "<end>"]
  assert mask == [False, False, True, True, False, False, False]


def test_unknown_template_and_prefix(across_words):
  with pytest.raises(InputError, match="template 'r1': expected one of think, answer_only"):
    splice(across_words, [], [5], "42", "r1")
  with pytest.raises(InputError, match="baseline prefix 'tags': expected one of bare, tagged"):
    baseline_suffix(across_words, "42", "tags")


@pytest.mark.parametrize(("prefix", "before"), [("bare", " "), ("tagged", "<answer> ")])
def test_baseline_suffix(tokenizer, prefix, before):
  for reference in REFERENCES:
    ids, mask = baseline_suffix(tokenizer, reference, prefix)
    assert decode(tokenizer, ids) == f"{before}{normal(tokenizer, reference)} {tokenizer.eos_token}"
    assert ids[-1] == tokenizer.eos_token_id
    end = len(before) + len(normal(tokenizer, reference).encode())
    assert mask == [left < end and right > len(before) for left, right in byte_spans(tokenizer, ids)]


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<think> a </think> <answer> 42 </answer>", "42"),
    ("<answer>\n two\nlines \n</answer> more", "two\nlines"),
    ("<answer> 1 </answer> <answer> 2 </answer>", "1"),
    ("<answer> </answer>", ""),
    ("<answer> 42", None),
    ("42 </answer>", None),
    ("</answer> 42 <answer>", None),
    ("", None),
  ],
)
def test_extract_answer(text, answer):
  assert extract_answer(text) == answer


def byte_level(add_prefix_space, **tokens):
  inner = Tokenizer(models.BPE({character: i for i, character in enumerate(sorted(BYTES))}, []))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  inner.decoder = decoders.ByteLevel()
  return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)


def word_level(words, decoder=None):
  """One token a character, or a tag; anything else is `?`."""
  inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
  inner.pre_tokenizer = pre_tokenizers.Split(Regex("<answer>|."), "isolated")
  if decoder is not None:
    inner.decoder = decoder
  return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def test_check_tokenizer_accepts(tokenizer):
  check_tokenizer(tokenizer)


def test_check_tokenizer_accepts_tags_that_are_tokens():
  check_tokenizer(word_level(["?", "<end>", "<answer>", "</answer>", " ", "4"], decoders.Fuse()))


@pytest.mark.parametrize(
  ("tokenizer", "message"),
  [
    (ByT5Tokenizer(), "expected a fast tokenizer"),
    (byte_level(False), "expected an EOS token, found none"),
    (byte_level(True, eos_token="<end>"), "found ' <answer> <answe"),
    (word_level(["?", "<end>", "4"], decoders.Fuse()), r"found '\?\?'"),
    (word_level(["?", "<end>", "<answer>"]), "found '<answer> <answer>'"),
  ],
  ids=["slow", "no EOS", "space before a text", "unknown characters", "space between tokens"],
)
def test_check_tokenizer_rejects(tokenizer, message):
  with pytest.raises(InputError, match=message) as caught:
    check_tokenizer(tokenizer)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("prompt", "opening"),
  [
    ("Question<think>", "<think>"),
    ("Question<think>\n", "<think>"),
    ("Question<think>\n\n</think>\n\n", "<think></think>"),
    ("<think> what <think> is", ""),
    ("", ""),
  ],
)
def test_tags_that_the_prompt_ends_with_count(tokenizer, prompt, opening):
  prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
  assert prompt_opening(tokenizer, prompt_ids) == opening
  written = ("<think>", "6 * 7 ", "</think>", " <answer> 41 </answer>")
  response = "".join(part for part in written if part not in opening)
  ids = tokenizer.encode(response, add_special_tokens=False)
  spliced = splice(tokenizer, prompt_ids, ids, "42")
  alone = splice(tokenizer, [], ids, "42")
  assert spliced is not None
  assert (alone is None) == bool(opening)
  assert tokenizer.decode(ids[: spliced.prefix_length] + spliced.suffix_ids[:-1]).endswith("<answer> 42 </answer>")
  twice = tokenizer.encode("".join(written), add_special_tokens=False)
  assert (splice(tokenizer, prompt_ids, twice, "42") is None) == bool(opening)  # the tag is there twice


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("<answer>42</answer>", ("42", "</answer>")),
    ("x<answer>\n 4 2 \n</answer> y <answer>z</answer>", ("4 2", " \n</answer>")),
    ("<answer>  </answer>", ("", "  </answer>")),
    ("<answer>42", None),
    ("42</answer>", None),
  ],
)
def test_own_answer_and_what_ends_it(text, expected):
  assert own_answer(text) == expected
  assert extract_answer(text) == (expected and expected[0])


def test_an_own_answer_stays_in_the_ids_that_were_sampled():
  """A name that was spelled letter by letter, where the tokenizer has a word for it."""
  tokenizer = builtin.tokenizer("sentences")
  letters = [tokenizer.convert_tokens_to_ids(x) for x in "bob"]
  before, after = (tokenizer.encode(text) for text in ("<think>x</think><answer> ", "</answer>"))
  ids = [*before, *letters, *after, tokenizer.eos_token_id]
  place = find_place(tokenizer, [], ids)
  spliced = place.splice(tokenizer, "bob", "</answer>")
  found = as_sampled(tokenizer, ids, spliced)
  assert found.suffix_ids != spliced.suffix_ids
  assert ids[: found.prefix_length] + found.suffix_ids == ids
  assert [i for i, inside in zip(found.suffix_ids, found.answer_mask, strict=True) if inside] == [*letters, *after]
  # In the tokenizer's own ids there is nothing to put back.
  ids = [*tokenizer.encode("<think>x</think><answer> bob </answer>"), tokenizer.eos_token_id]
  spliced = find_place(tokenizer, [], ids).splice(tokenizer, "bob", " </answer>")
  assert as_sampled(tokenizer, ids, spliced) == with_ending(spliced)
  assert (
    tokenizer.decode([i for i, inside in zip(*with_ending(spliced)[1:], strict=True) if inside]) == " bob </answer>"
  )


def test_an_answer_without_tokens_of_its_own_has_no_ending():
  assert with_ending(Splice(0, [5, 6, 1], [False, False, False])).answer_mask == [False, False, False]
