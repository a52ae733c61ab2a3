"""Pieces of text that are never taken back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from rlpr_jax.serving.answers import TextStream


def grown(tokenizer, ids, stop, cuts):
  """All that is told of a response whose tokens come in some pieces."""
  stream, text = TextStream(tokenizer, (tokenizer.eos_token_id,), stop), tokenizer.decode(ids)
  whole = text[: min((text.find(x) for x in stop if x in text), default=None)]
  pieces = [stream.grow(np.array(ids[:cut])) for cut in cuts]
  return [*pieces, stream.end(whole)], whole


@given(
  st.text(alphabet="aé中🙂 1<", max_size=20),
  st.lists(st.integers(0, 60), max_size=6),
  st.lists(st.text(alphabet="a1中<", min_size=1, max_size=3), max_size=2),
)
def test_pieces_are_the_text(across_words, text, cuts, stop):
  ids = across_words.encode(text, add_special_tokens=False)
  end = next((i for i in range(len(ids) + 1) if any(x in across_words.decode(ids[:i]) for x in stop)), len(ids))
  ids = ids[:end]  # the engine ends a response there
  cuts = sorted(cut for cut in cuts if cut < len(ids))
  pieces, whole = grown(across_words, ids, stop, cuts)
  assert "".join(pieces) == whole
  assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@pytest.mark.parametrize(
  ("stop", "held"), [((), "ab"), (("bc",), "a"), (("abc",), ""), (("xab",), "ab"), (("b",), "a")]
)
def test_what_may_begin_a_stop_string_waits(across_words, stop, held):
  stream = TextStream(across_words, (), stop)
  assert stream.grow(np.array(across_words.encode("ab"))) == held


# What is hard to cut: half an emoji, accents after their letters, spaces before and after, nothing that UTF-8 knows.
TEXTS = (
  "  two spaces first, then  more   \n\n\tand a tab ",
  "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 in a row🙂🙂",
  "中文的一句话没有空格日本語も한국어도",
  "e\u0301 a\u0308\u0323 o\u0302\u0301 combining\u0301",
  "\u2581 \ufffd \ufffd\ufffd <0xF0> 𓀀𒀀 ꙮ\u200b\u200d",
  "<think> 6 * 7 </think> <answer> 42 </answer>",
)


def whole_of(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def streamed(tokenizer, ids, rng, most):
  """Pieces of a response that comes in chunks of 1 to `most` tokens, but for what its end alone settles."""
  stream, cuts = TextStream(tokenizer, (), ()), [0]
  while cuts[-1] < len(ids):
    cuts.append(min(cuts[-1] + int(rng.integers(1, most + 1)), len(ids)))
  return stream, [stream.grow(np.array(ids[:cut])) for cut in cuts]


@pytest.mark.parametrize("most", [1, 9])
def test_pieces_are_what_the_whole_decodes_to(tokenizer, most):
  """Also of tokens in any order, whose bytes are seldom text, and of ids that the vocabulary does not have."""
  rng = np.random.default_rng(0)
  responses = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
  # Tokens of a byte, or a part of a character.
  vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
  odd = [
    i
    for i, name in enumerate(vocabulary)
    if name.startswith("<0x") or "\N{REPLACEMENT CHARACTER}" in whole_of(tokenizer, [i])
  ]
  for count in rng.integers(1, 40, 150):
    some = rng.integers(0, len(tokenizer) + 3, count)
    mixed = np.where(rng.random(count) < 0.5, rng.choice(odd or [0], count), some)
    cut = [token for text in TEXTS for token in tokenizer.encode(text, add_special_tokens=False) if rng.random() < 0.9]
    responses += [some.tolist(), mixed.tolist(), cut]
  for ids in responses:
    text = whole_of(tokenizer, ids)
    stream, pieces = streamed(tokenizer, ids, rng, most)
    said = "".join(pieces)
    assert text.startswith(said)
    assert stream.told == len(said)
    assert said + stream.end(text) == text


@pytest.mark.parametrize(
  "decoder",
  [
    None,  # tokens are joined by spaces
    decoders.Sequence(  # Llama 2: the first space of a text is none
      [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    decoders.Metaspace(),
    decoders.WordPiece(),
  ],
)
def test_spaces_are_those_of_the_whole(decoder):
  names = ["\u2581", "\u2581a", "b", "##c", ".", "\u2581\u2581", "中", "<0xE4>", "<0xB8>", "<0xAD>", "<0x41>", "\ufffd"]
  inner = Tokenizer(tokenizer_models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
  if decoder:
    inner.decoder = decoder
  tokenizer, rng = PreTrainedTokenizerFast(tokenizer_object=inner), np.random.default_rng(0)
  for _ in range(300):
    ids = rng.integers(0, len(names), rng.integers(1, 12)).tolist()
    stream, pieces = streamed(tokenizer, ids, rng, 3)
    assert "".join(pieces) + stream.end(whole_of(tokenizer, ids)) == whole_of(tokenizer, ids)


def test_nothing_waits_for_long(tokenizer):
  """What is told of ordinary text is behind by a character at most."""
  ids = tokenizer.encode("Some ordinary text, 中文 🙂 and more of it.", add_special_tokens=False)
  stream = TextStream(tokenizer, (), ())
  for end in range(1, len(ids) + 1):
    stream.grow(np.array(ids[:end]))
    settled = whole_of(tokenizer, ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert len(settled) - stream.told <= 1
  assert stream.told == len(whole_of(tokenizer, ids))


class Counting:
  """A tokenizer that counts the tokens it decodes."""

  def __init__(self, tokenizer):
    self._tokenizer, self.decoded = tokenizer, 0

  def decode(self, ids, **options):
    self.decoded += len(ids)
    return self._tokenizer.decode(ids, **options)

  def convert_ids_to_tokens(self, token):
    return self._tokenizer.convert_ids_to_tokens(token)


@pytest.mark.parametrize("most", [1, 16])
@pytest.mark.parametrize("kind", ["text", "parts"])
def test_the_work_of_a_token_does_not_grow(tokenizer, kind, most):
  """Whether characters end often, or never."""
  rng = np.random.default_rng(0)
  part = tokenizer.encode("🙂" if kind == "parts" else "Some text, 中文 e\u0301.\n", add_special_tokens=False)
  part = part[:1] if kind == "parts" and len(part) > 1 else part
  ids = (part * 3000)[:3000]
  counts = []
  for length in (1500, 3000):
    counting = Counting(tokenizer)
    streamed(counting, ids[:length], rng, most)
    counts.append(counting.decoded)
  assert counts[1] < 2.2 * counts[0]
  assert counts[1] < 10 * len(ids)
