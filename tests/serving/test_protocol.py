"""Pieces of text that are never taken back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpr_jax.serving.protocol import TextStream


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
