"""Prompts in token ids, and the order in which a run draws them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlpr_jax.data.sources import Example
from rlpr_jax.data.templates import build_messages, render_all
from rlpr_jax.errors import InputError
from rlpr_jax.splicing import count_baseline_tokens, count_suffix_tokens, prompt_opening
from rlpr_jax.types import Prompt

BATCH = 1024  # examples that are tokenised together


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings:
  """How a question becomes a prompt, and how long it may be."""

  template: str  # `think` or `answer_only`
  instruction: str | None  # system message for rows without one; None for the template's, "" for none
  worked_examples: Sequence[tuple[str, str]]  # pairs of user and assistant text, turns before each question
  prompt_limit: int  # most tokens of a prompt, after the chat template
  max_reference_length: int  # most tokens that scoring a reference may take, as `reference_length` counts them
  system: str = ""  # system message of every row, in the place of its own and of the instruction; "" leaves them
  seed: int = 0  # chooses which prompts of a weight that is no whole number come once more
  several_references: bool = False  # whether references beside a row's first count too


def prepare(
  examples: Sequence[Example],
  tokenizer: PreTrainedTokenizerBase,
  settings: PromptSettings,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
  """Turn questions into prompts and drop those that are too long.

  Args:
    tokenizer: a tokenizer that passed `splicing.check_tokenizer`, with a chat template.
    progress: is told of how many of how many examples are done, if it takes more than a moment.

  Returns:
    The prompts, in the order of the examples, those of more than the smallest weight once more behind them
    (`repeats`); and how many examples were dropped as `prompt_too_long` and, of the others, as `reference_too_long`,
    where one of several references is enough.

  Raises:
    InputError: no prompt is left.
  """
  prompts: list[Prompt] = []
  weights: list[float] = []
  dropped = {"prompt_too_long": 0, "reference_too_long": 0}
  for start in range(0, len(examples), BATCH):
    batch = examples[start : start + BATCH]
    chats = [
      build_messages(example, settings.template, settings.worked_examples, settings.instruction, settings.system)
      for example in batch
    ]
    rendered = zip(batch, render_all(tokenizer, chats, [example.origin for example in batch]), strict=True)
    fitting = [(example, ids) for example, ids in rendered if len(ids) <= settings.prompt_limit]
    dropped["prompt_too_long"] += len(batch) - len(fitting)
    several = settings.several_references
    references = [(example.reference, *(example.other_references if several else ())) for example, _ in fitting]
    texts = list(dict.fromkeys(itertools.chain(*references)))
    lengths = dict(zip(texts, reference_lengths(tokenizer, texts, settings.template), strict=True))
    for (example, ids), (reference, *others) in zip(fitting, references, strict=True):
      if max(lengths[text] for text in (reference, *others)) > settings.max_reference_length:
        dropped["reference_too_long"] += 1
        continue
      question = [message["content"] for message in example.messages if message["role"] == "user"][-1]
      prompts.append(
        Prompt(
          ids=np.array(ids, np.int32),
          reference=reference,
          alternatives=tuple(others),
          question=question,
          opening=prompt_opening(tokenizer, ids),
          source=example.source,
          row=len(prompts),
        )
      )
      weights.append(example.weight)
    if progress and len(examples) > BATCH:
      progress(start + len(batch), len(examples))
  if not prompts:
    raise InputError(
      f"none of {len(examples)} prompts is left: {dropped['prompt_too_long']} have over {settings.prompt_limit} tokens "
      f"(prompt_limit), {dropped['reference_too_long']} a reference over {settings.max_reference_length} "
      "(max_reference_length)"
    )
  again = repeats(weights, settings.seed)
  prompts += [dataclasses.replace(prompts[i], row=row) for row, i in enumerate(again, len(prompts))]
  return prompts, dropped


def repeats(weights: Sequence[float], seed: int) -> list[int]:
  """Which items come once more, and how often, so that each is there as often as its weight says.

  Args:
    weights: of the items, from 1 on. With 2.5 each item comes twice, and half of those with this weight, chosen by the
      seed, a third time.

  Returns:
    their indices, to stand behind all of them.

  >>> repeats([1, 1, 2, 3], seed=0)
  [2, 3, 3]
  """
  again: list[int] = []
  for weight in sorted(set(weights)):
    items = [i for i, one in enumerate(weights) if one == weight]
    whole = int(weight)
    again += items * (whole - 1)
    extra = round((weight - whole) * len(items))
    again += sorted(np.random.default_rng(seed).permutation(items)[:extra].tolist())
  return again


def reference_length(tokenizer: PreTrainedTokenizerBase, reference: str, template: str) -> int:
  """Tokens that scoring a reference takes: the `>` of `<answer>`, the reference, `</answer>` and EOS.

  Counted on a response with nothing in it but the template's tags, or on the longer baseline if that takes more. What
  a policy writes around `<answer>` moves this by a token or so, by more if it writes lines of whitespace.

  >>> from rlpr_jax.data import builtin
  >>> reference_length(builtin.tokenizer(), "42", "think")  # `>`, a space, 4, 2, a space, `</answer>`, EOS
  7
  """
  return reference_lengths(tokenizer, [reference], template)[0]


def reference_lengths(tokenizer: PreTrainedTokenizerBase, references: Sequence[str], template: str) -> list[int]:
  """`reference_length` of each."""
  spliced = count_suffix_tokens(tokenizer, references, template)
  return list(map(max, spliced, count_baseline_tokens(tokenizer, references)))


class PromptStream:
  """Draws prompts for ever: every prompt once an epoch, each epoch in another order.

  The order follows from the seed and the number of prompts alone, so `state` is a position and nothing more.
  """

  def __init__(self, prompts: Sequence[Prompt], seed: int):
    self._prompts = prompts
    self._seed = seed
    indices = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()
    # An index is in memory already: no threads, no buffer.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._draws = iter(indices.map_with_index(lambda draw, row: (draw, row)).to_iter_dataset(read_options))

  def next_batch(self, n: int) -> list[tuple[int, Prompt]]:
    """The next `n` draws: the draw's number, counted from 0 over the whole run, and its prompt."""
    return [(int(draw), self._prompts[row]) for draw, row in (next(self._draws) for _ in range(n))]

  def state(self) -> dict[str, Any]:
    """The position, as JSON can hold it."""
    return {"prompts": len(self._prompts), "seed": self._seed, "position": self._draws.get_state()}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on exactly where `state` was taken.

    Raises:
      InputError: the state is from another number of prompts or another seed, whose order was another.
    """
    for name, now in (("prompts", len(self._prompts)), ("seed", self._seed)):
      if state[name] != now:
        raise InputError(f"saved data position: expected {name} {now}, as in this run; found {state[name]}")
    self._draws.set_state(state["position"])
