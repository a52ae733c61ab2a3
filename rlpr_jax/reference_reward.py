"""RLPR's reward for other people's trainers: they say how probable tokens are, and this does the rest.

`examples/in_trl.py`, `examples/in_tunix.py` and `examples/in_verl.py` call it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from rlpr_jax import rewards, splicing

# Of texts and what follows each: log-probabilities of the latter's tokens, given all before them. float[N] of each.
LogProbabilities = Callable[[Sequence[list[int]], Sequence[list[int]]], Sequence[np.ndarray]]


class ReferenceReward:
  """What responses are worth by the reference answers (RLPR, sections 3.1, 3.2 and 3.4).

  The filter of groups and the repetition penalty are not part of it.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
  >>> reward = ReferenceReward(tokenizer, lambda texts, ends: [np.full(len(end), np.log(0.5)) for end in ends])
  >>> reward([ids("6 * 7?")], [ids("<think> 42 </think> <answer> 41 </answer>")], ["42"]).tolist()  # r = r' = 1/2
  [0.1]
  """

  def __init__(
    self,
    tokenizer: PreTrainedTokenizerBase,
    log_probabilities: LogProbabilities,
    template: str = "think",
    format_coefficient: float = 0.1,
  ):
    """
    Args:
      log_probabilities: of the policy as it is now, whenever it is called.
      template: think | answer_only, the tags that responses are to have.
      format_coefficient: c of `rewards.combine`.

    Raises:
      InputError: the tokenizer changes texts that it encodes and decodes.
    """
    splicing.check_tokenizer(tokenizer)
    self._tokenizer, self._log_probabilities = tokenizer, log_probabilities
    self._template, self._format_coefficient = template, format_coefficient
    self._baselines: dict[tuple[tuple[int, ...], str], float] = {}  # by the policy as it was when a pair first came

  def __call__(
    self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], answers: Sequence[str]
  ) -> Float[np.ndarray, "B"]:
    """Of each response; one that the reference cannot be put into has r = 0.

    Args:
      prompts: token ids, as the policy read them.
      responses: token ids, with the EOS that ended them or without.
      answers: the reference of each.
    """
    texts = [list(map(int, prompt)) for prompt in prompts]
    keys = [(tuple(text), answer) for text, answer in zip(texts, answers, strict=True)]
    new = [key for key in dict.fromkeys(keys) if key not in self._baselines]
    alone = [(list(text), *splicing.baseline_suffix(self._tokenizer, answer)) for text, answer in new]
    self._baselines |= dict(zip(new, self._probabilities(alone).tolist(), strict=True))
    found = np.zeros(len(texts))
    splices = {}
    for row, (text, response, answer) in enumerate(zip(texts, responses, answers, strict=True)):
      if spliced := splicing.splice(self._tokenizer, text, response, answer, self._template):
        kept = text + list(map(int, response[: spliced.prefix_length]))
        splices[row] = kept, spliced.suffix_ids, spliced.answer_mask
    found[list(splices)] = self._probabilities(list(splices.values()))
    gained = rewards.debias(found, np.array([self._baselines[key] for key in keys]))
    written = [self._text(text, response) for text, response in zip(texts, responses, strict=True)]
    well_formed = np.array([rewards.format_score(text, self._template) for text in written])
    return np.asarray(rewards.combine(gained, well_formed, self._format_coefficient))

  def _probabilities(self, rows: Sequence[tuple[list[int], list[int], list[bool]]]) -> np.ndarray:
    """Of each row a text, what follows it, and which tokens of that are the reference's: their mean probability."""
    if not rows:
      return np.zeros(0)
    texts, suffixes, masks = zip(*rows, strict=True)
    longest = max(map(len, suffixes))
    logps, mask = np.zeros((len(rows), longest)), np.zeros((len(rows), longest), bool)
    for row, (of_suffix, is_reference) in enumerate(zip(self._log_probabilities(texts, suffixes), masks, strict=True)):
      logps[row, : len(is_reference)], mask[row, : len(is_reference)] = of_suffix, is_reference
    return np.asarray(rewards.reference_probability(logps, mask))

  def _text(self, prompt: list[int], response: Sequence[int]) -> str:
    """A response without its EOS, behind the tag with which its prompt may begin it."""
    ids = list(map(int, response))
    if ids and ids[-1] == self._tokenizer.eos_token_id:
      ids.pop()
    text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return f"{splicing.prompt_opening(self._tokenizer, prompt)}{text}"
