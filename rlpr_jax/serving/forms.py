"""Forms of responses by JSON schemas, as masks over tokens that llguidance computes."""

import functools
import json
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.errors import InputError, needs_extra
from rlpr_jax.sampling.adjustments import Form, everything

# Between two tokens of JSON: as formatters write it. Of spaces without an end a model that began them may find none.
_SPACE = r"( ?|\r?\n[ \t]{0,40})"


class Forms:
  """Makes forms of a tokenizer's texts. Needs the extra `structured`, once the first is asked for."""

  def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int], vocabulary: int):
    """`vocabulary`: tokens that the model knows."""
    self._tokenizer, self._eos_ids, self._vocabulary = tokenizer, sorted(eos_ids), vocabulary

  def compile(self, schema: dict[str, Any]) -> Callable[[], Form]:
    """Reads a JSON schema; returns what makes a form of each response that is to follow it.

    Raises:
      InputError: llguidance is not installed, or does not take the schema or the tokenizer.
    """
    with needs_extra("structured"):
      import llguidance
    tokenizer = self._of_llguidance
    try:
      grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _SPACE})
      first = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    except ValueError as error:
      raise InputError(f"not a JSON schema that can be followed ({_in_one_line(error)})") from None
    if first.is_error():
      raise InputError(f"not a JSON schema that can be followed ({_in_one_line(first.get_error())})")
    return lambda: _Followed(first.deep_copy(), self._vocabulary, self._eos_ids)

  @functools.cached_property
  def _of_llguidance(self) -> Any:
    import llguidance.hf

    try:
      return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos_ids)
    except ValueError as error:
      raise InputError(f"not supported with this tokenizer ({_in_one_line(error)})") from None


class _Followed:
  """A `Form` that a response has followed so far."""

  def __init__(self, matcher: Any, vocabulary: int, eos_ids: Collection[int]):
    self._matcher, self._vocabulary = matcher, vocabulary
    self._end = np.zeros_like(everything(1, vocabulary)[0])
    for token in eos_ids:
      self._end[token // 32] |= np.uint32(1 << token % 32)

  def allowed(self) -> np.ndarray:
    if self._matcher.is_error():  # it was too much for the library: a response that ends says so, by its text
      return self._end
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
    allowed = np.zeros(self._end.size * 4, np.uint8)
    allowed[: bits.size] = bits[: allowed.size]
    words = allowed.view("<u4").astype(np.uint32)
    return words if words.any() else self._end

  def take(self, token: int) -> None:
    self._matcher.consume_token(token)


def _in_one_line(error: object) -> str:
  return " ".join(str(error).split())[:300]
