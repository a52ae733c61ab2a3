"""Forms of responses: whatever a model would write, its text follows the schema."""

import json
import sys

import jsonschema
import numpy as np
import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.serving import forms

SCHEMA = {
  "type": "object",
  "properties": {
    "verdict": {"enum": ["correct", "incorrect"]},
    "points": {"type": "integer", "minimum": 0, "maximum": 10},
  },
  "required": ["verdict", "points"],
  "additionalProperties": False,
}


@pytest.fixture(scope="module")
def made(across_words):
  pytest.importorskip("llguidance")
  return forms.Forms(across_words, (across_words.eos_token_id,), len(across_words) + 50)


def write(form, tokenizer, rng, most=400):
  """A text of tokens that are drawn from the allowed ones, the end as soon as it may come; None if it does not."""
  ids = []
  for _ in range(most):
    allowed = np.flatnonzero(np.unpackbits(form.allowed().view(np.uint8), bitorder="little"))
    assert allowed.size
    assert allowed.max() < len(tokenizer)
    if tokenizer.eos_token_id in allowed:
      return tokenizer.decode(ids)
    ids.append(int(rng.choice(allowed)))
    form.take(ids[-1])
  return None


def test_any_text_follows_its_schema(made, across_words):
  make, rng = made.compile(SCHEMA), np.random.default_rng(0)
  texts = [write(make(), across_words, rng) for _ in range(20)]
  for text in texts:
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_model_that_writes_nothing_but_space_where_it_may_comes_to_an_end(made, across_words):
  form, text = made.compile(SCHEMA)(), ""
  ids = across_words.convert_tokens_to_ids(across_words.tokenize("\n \t"))
  for _ in range(400):
    allowed = np.flatnonzero(np.unpackbits(form.allowed().view(np.uint8), bitorder="little"))
    if across_words.eos_token_id in allowed:
      break
    token = next((id for id in ids if id in allowed), int(allowed[0]))
    text += across_words.decode([token])
    form.take(token)
  jsonschema.validate(json.loads(text), SCHEMA)
  assert text.count(" ") + text.count("\t") > 5


def test_an_object_is_an_object(made, across_words):
  make, rng = made.compile({"type": "object"}), np.random.default_rng(0)
  found = [text for text in (write(make(), across_words, rng) for _ in range(20)) if text]
  assert found
  assert all(isinstance(json.loads(text), dict) for text in found)


def test_schemas_that_cannot_be(made):
  with pytest.raises(InputError, match="not a JSON schema that can be followed"):
    made.compile({"type": "nonsense"})


def test_without_the_library_it_is_said_what_to_install(across_words, monkeypatch):
  monkeypatch.setitem(sys.modules, "llguidance", None)
  with pytest.raises(InputError, match=r"llguidance: not installed, expected the extra: .*rlpr_jax\[structured\]"):
    forms.Forms(across_words, (1,), 700).compile({"type": "object"})
