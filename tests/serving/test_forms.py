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
  assert sum(text is not None for text in texts) > 10  # the others write spaces without an end
  for text in filter(None, texts):
    jsonschema.validate(json.loads(text), SCHEMA)


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
