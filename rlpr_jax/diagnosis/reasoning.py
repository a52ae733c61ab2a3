"""Whether the reasoning matters: references and own answers scored again, with other reasoning and without any.

All of it is one pass of the policy over texts that stand behind their prompts, by `training.logprobs.TextScorer`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlpr_jax import rewards, splicing
from rlpr_jax.diagnosis import statistics, texts
from rlpr_jax.diagnosis.statistics import Interval
from rlpr_jax.runs.metrics import Progress
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.types import Prompt


class Reasoned(NamedTuple):
  """A scorable response to a prompt."""

  prompt: Prompt
  ids: np.ndarray  # int32[N] of the response, EOS included where it was sampled


class Text(NamedTuple):
  """What is scored behind a prompt."""

  ids: np.ndarray  # int32[N]
  mask: np.ndarray  # bool[N] whose log-probabilities are asked for

  def branch(self) -> Branch:
    return Branch.of_tokens(self.ids, self.mask)


def spliced(engine: Engine, prompt: Prompt, response: Sequence[int] | np.ndarray, answer: str) -> Text | None:
  """A response with `answer` in the place of its own, whose tokens are asked for; None if it is not scorable."""
  found = splicing.splice(engine.tokenizer, prompt.ids, response, answer, engine.template, engine.eos_id)
  if found is None:
    return None
  kept = np.asarray(response[: found.prefix_length], np.int32)
  mask = np.concatenate([np.zeros(kept.size, bool), np.array(found.answer_mask, bool)])
  return Text(np.concatenate([kept, np.array(found.suffix_ids, np.int32)]), mask)


def straight(engine: Engine, answer: str) -> Text:
  """`answer` straight behind the prompt, as r' is scored."""
  ids, mask = splicing.baseline_suffix(engine.tokenizer, answer, engine.baseline_prefix, engine.eos_id)
  return Text(np.array(ids, np.int32), np.array(mask, bool))


def variants(engine: Engine, response: Reasoned, other: Reasoned, seed: int) -> dict[str, Text | None]:
  """The reference behind a response's own reasoning, and behind what could stand in its place.

  Args:
    other: a response to another prompt.

  Returns:
    by name; None where there is no such text, as of reasoning of a single sentence that is to be shuffled.
  """
  tokenizer, prompt, ids = engine.tokenizer, response.prompt, response.ids
  begin, end = texts.reasoning_span(tokenizer, ids, engine.template)
  reasoning = engine.decode_text(ids[begin:end])

  def with_words(text: str | None) -> Text | None:
    if text is None:
      return None
    inside = reasoning.strip()
    before, _, behind = reasoning.partition(inside) if inside else ("", "", "")
    inner = np.array(tokenizer.encode(f"{before}{text}{behind}", add_special_tokens=False), np.int32)
    return spliced(engine, prompt, np.concatenate([ids[:begin], inner, ids[end:]]), prompt.reference)

  return {
    "own": spliced(engine, prompt, ids, prompt.reference),
    "other": spliced(engine, prompt, other.ids, prompt.reference),
    "sentences": with_words(texts.shuffle(texts.sentences(reasoning), seed)),
    "words": with_words(texts.shuffle(reasoning.split(), seed)),
    "none": spliced(engine, prompt, np.concatenate([ids[:begin], ids[end:]]), prompt.reference),
    "straight": straight(engine, prompt.reference),
  }


def pair_with_others(responses: Sequence[Reasoned], seed: int) -> list[int]:
  """For each response the number of one to another prompt; of all prompts the same its own number.

  >>> a, b = (Reasoned(Prompt(ids=np.array([i])), np.array([0])) for i in (5, 6))
  >>> pair_with_others([a, b], seed=0), pair_with_others([a, a], seed=0)
  ([1, 0], [0, 1])
  """
  rng = np.random.default_rng(seed)
  out = []
  for i, response in enumerate(responses):
    others = [j for j, other in enumerate(responses) if not np.array_equal(other.prompt.ids, response.prompt.ids)]
    out.append(int(rng.choice(others)) if others else i)
  return out


def score_variants(
  scorer: TextScorer, engine: Engine, responses: Sequence[Reasoned], aggregate: str, limit: int, seed: int
) -> dict[str, np.ndarray]:
  """r of the reference with each kind of reasoning in the place of the response's own.

  Args:
    aggregate: of token probabilities, as in `rewards.reference_probability`.
    limit: tokens of a prompt and what stands behind it; longer texts are left out.

  Returns:
    by the names of `variants`, float64[N]; NaN where there is no such text.
  """
  pairs = pair_with_others(responses, seed)
  named = [
    variants(engine, response, responses[other], seed + i)
    for i, (response, other) in enumerate(zip(responses, pairs, strict=True))
  ]
  for i, other in enumerate(pairs):
    if other == i:
      named[i]["other"] = None
  names = list(named[0]) if named else []
  logps = score_texts(
    scorer, [(each.prompt, list(of.values())) for each, of in zip(responses, named, strict=True)], limit, "texts of"
  )
  return {
    name: np.array([aggregated(of_response[k], aggregate) for of_response in logps], np.float64)
    for k, name in enumerate(names)
  }


def score_texts(
  scorer: TextScorer, behind: Sequence[tuple[Prompt, Sequence[Text | None]]], limit: int, label: str
) -> list[list[np.ndarray | None]]:
  """Log-probabilities of the tokens that texts ask for, each behind its prompt, float32[A]; None where there is none.

  Args:
    limit: tokens of a prompt and a text behind it; a longer one counts as none.
    label: of the line of progress, before "prompt".
  """
  progress, out = Progress(f"scored, {label} prompt"), []
  size = scorer.program.micro_batch_rows
  for first in range(0, len(behind), size):
    part = behind[first : first + size]
    usable = [
      [
        text if text is not None and text.mask.any() and prompt.ids.size + text.ids.size <= limit else None
        for text in of
      ]
      for prompt, of in part
    ]
    trees = [
      Tree(np.asarray(prompt.ids, np.int32), [text.branch() for text in of if text is not None])
      for (prompt, _), of in zip(part, usable, strict=True)
    ]
    for of, scored in zip(usable, scorer.logprobs(trees), strict=True):
      values = iter(scored)
      out.append([None if text is None else _known(next(values))[text.mask] for text in of])
    progress(min(first + size, len(behind)), len(behind))
  return out


def _known(logps: np.ndarray | None) -> np.ndarray:
  assert logps is not None
  return logps


def aggregated(logps: np.ndarray | None, aggregate: str) -> float:
  """r of an answer's tokens; NaN of none.

  >>> aggregated(np.log(np.array([0.5, 0.9])), "mean_prob")
  0.7
  """
  if logps is None:
    return np.nan
  return float(rewards.reference_probability(jnp.asarray(logps), jnp.ones(logps.size, bool), aggregate))


def compare_variants(scored: dict[str, np.ndarray], groups: np.ndarray, seed: int) -> dict[str, Any]:
  """Means of what `score_variants` gave, and how far each is below that of the response's own reasoning.

  Args:
    groups: int[N] of the responses, from 0.

  Returns:
    by name {r, loss, helped}: `loss` is the mean of r with its own reasoning less this one, over the responses that
    have both, `helped` the share of them in which its own gives more, where a tie counts half.

  >>> scored = {"own": np.array([0.9, 0.5]), "none": np.array([0.2, 0.6])}
  >>> found = compare_variants(scored, np.array([0, 1]), seed=0)["none"]
  >>> found["r"].value, found["loss"].value, found["helped"].value
  (0.40, 0.30, 0.50)
  """
  draws, out = statistics.resample(int(groups.max(initial=-1)) + 1, seed=seed), {}
  for name, values in scored.items():
    loss = scored["own"] - values
    helped = np.where(np.isfinite(loss), np.sign(loss) / 2 + 0.5, np.nan)
    out[name] = {
      key: statistics.mean_interval(measured, groups, draws)
      for key, measured in (("r", values), ("loss", loss), ("helped", helped))
      if key == "r" or name != "own"
    }
  return out


def measure_information(
  scorer: TextScorer, engine: Engine, responses: Sequence[Reasoned], limit: int, seed: int
) -> dict[str, Any]:
  """Mutual information of prompts and reasoning (RAGEN-2): each reasoning is scored behind each prompt.

  Args:
    responses: one a prompt; those without reasoning are left out.
    limit: as for `score_texts`.

  Returns:
    {}: of fewer than two prompts. Else `information` in nats and `per_token`, of mean log-probabilities, whose columns
    a long text does not drive apart; `most`, the logarithm of the number of prompts; `retrieval`; `entropy`: nats a
    token of the reasoning behind its own prompt.
  """
  reasoned = []
  for response in responses:
    begin, end = texts.reasoning_span(engine.tokenizer, response.ids, engine.template)
    if end > begin:
      mask = np.zeros(end, bool)
      mask[begin:] = True
      reasoned.append((response.prompt, Text(response.ids[:end].astype(np.int32), mask)))
  everything = [text for _, text in reasoned]
  rows = score_texts(scorer, [(prompt, everything) for prompt, _ in reasoned], limit, "reasoning behind")
  whole = [i for i in range(len(reasoned)) if all(of_prompt[i] is not None for of_prompt in rows)]
  if len(whole) < 2:
    return {}
  logps = np.array([[np.sum(_known(of_prompt[i]), dtype=np.float64) for of_prompt in rows] for i in whole])
  tokens = np.array([everything[i].mask.sum() for i in whole])
  own, prompts = np.array(whole), [prompt.ids for prompt, _ in reasoned]
  equal = np.array([[np.array_equal(a, b) for b in prompts] for a in prompts])
  groups, draws = np.arange(len(whole)), statistics.resample(len(whole), seed=seed)

  def mean(values: np.ndarray) -> Interval | None:
    return statistics.mean_interval(values, groups, draws)

  return {
    "prompts": len(prompts),
    "most": float(np.log(len(prompts))),
    "information": mean(statistics.information_terms(logps, own)),
    "per_token": mean(statistics.information_terms(logps / tokens[:, None], own)),
    "retrieval": statistics.mutual_information(logps, own, equal)[1],
    "entropy": mean(-logps[np.arange(len(whole)), own] / tokens),
  }


def token_maps(
  scorer: TextScorer, engine: Engine, responses: Sequence[Reasoned], limit: int
) -> list[dict[str, list[dict[str, Any]]]]:
  """Of each response, how probable each token of the reference and of its own answer is with its reasoning and without.

  Returns:
    {`reference`, `own`: [{token, with, without}]}; empty where there is none, or where the two texts are tokenised in
    different ways.
  """
  behind: list[tuple[Prompt, list[Text | None]]] = []
  for prompt, ids in responses:
    texts_of: list[Text | None] = []
    for answer in (prompt.reference, splicing.extract_answer(engine.response_text(ids))):
      texts_of += [spliced(engine, prompt, ids, answer), straight(engine, answer)] if answer else [None, None]
    behind.append((prompt, texts_of))
  scored = score_texts(scorer, behind, limit, "answers of")
  return [
    {
      name: _token_map(engine, of[first : first + 2], logps[first : first + 2])
      for name, first in (("reference", 0), ("own", 2))
    }
    for (_, of), logps in zip(behind, scored, strict=True)
  ]


def _token_map(engine: Engine, pair: Sequence[Text | None], logps: Sequence[np.ndarray | None]) -> list[dict[str, Any]]:
  if any(x is None for x in (*pair, *logps)):
    return []
  tokens, others = (text.ids[text.mask].tolist() for text in pair if text is not None)
  if tokens != others:
    return []
  after, before = (np.exp(values.astype(np.float64)).tolist() for values in logps if values is not None)
  return [
    {"token": engine.decode_text([token]), "with": p, "without": q}
    for token, p, q in zip(tokens, after, before, strict=True)
  ]
