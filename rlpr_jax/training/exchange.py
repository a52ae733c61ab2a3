"""Each response's own answer behind each reasoning of its group, for the reward that looks at it (CER).

In rows of stems and branches: a stem is a prompt and a response up to its answer, its branches are the reference and
every different answer of the group, all with the `</answer>` that ends them, since "1" begins "14". This takes one more
pass over the responses, forwards alone, and no slot of the rollout waits for the others of its group.
"""

from collections.abc import Sequence

import numpy as np

from rlpr_jax import splicing
from rlpr_jax.sampling.engine import Draws, Engine
from rlpr_jax.splicing import OwnAnswer, Place, Splice
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.types import ExchangedAnswers, Prompt, Rollouts

_REFERENCE = -1  # in the place of the number of a response whose answer it is


def exchange_answers(
  scorer: TextScorer, engine: Engine, numbered: Draws, rollouts: Rollouts, most: int = 0, seed: int = 0
) -> ExchangedAnswers:
  """Measures how probable each own answer and the reference are after each reasoning of the group.

  Answers of the same text are scored once, an answer after its own reasoning in the ids that were sampled. An answer
  that is empty, or longer than references may be, counts as none.

  Args:
    scorer: with room in a row for a prompt, a response and an answer.
    numbered: the prompts of the rollouts, with their numbers in the stream of draws.
    most: after how many reasonings each answer is scored, at most: first those that led to it, then others as `seed`
      and the number decide. 0 for all.
  """
  samples = len(rollouts.lengths) // max(len(numbered), 1)
  shape = (len(numbered), samples)
  reference_logps = np.zeros(shape, np.float32)
  answer_logps, pairs = np.zeros((*shape, samples), np.float32), np.zeros((*shape, samples), bool)
  trees: list[Tree] = []
  scored: list[tuple[int, int, list[list[int]]]] = []  # of each tree: prompt, response, whose answers its branches are
  for p, (number, prompt) in enumerate(numbered):
    responses = [rollouts.tokens[i, : rollouts.lengths[i]] for i in range(p * samples, (p + 1) * samples)]
    places = [
      splicing.find_place(engine.tokenizer, prompt.ids, response, engine.template)
      if rollouts.scorable[p * samples + k]
      else None
      for k, response in enumerate(responses)
    ]
    answers = [
      splicing.own_answer(rollouts.texts[p * samples + j]) if place else None for j, place in enumerate(places)
    ]
    rng = np.random.default_rng([seed, number])
    chosen = choose_pairs(answers, [place is not None for place in places], most, rng)
    for k, (place, response) in enumerate(zip(places, responses, strict=True)):
      if place is None:
        continue
      branches = _branches(
        engine, prompt, response, place, [a if chosen[k, j] else None for j, a in enumerate(answers)], k
      )
      stem = np.concatenate([prompt.ids, response[: place.prefix_length]]).astype(np.int32)
      trees.append(Tree(stem, [branch for branch, _ in branches]))
      scored.append((p, k, [whose for _, whose in branches]))
  for (p, k, of_branches), tree, logps in zip(scored, trees, scorer.logprobs(trees), strict=True):
    for whose, branch, of_branch in zip(of_branches, tree.branches, logps, strict=True):
      assert of_branch is not None
      total = of_branch[branch.mask].sum()
      if whose == [_REFERENCE]:
        reference_logps[p, k] = total
      else:
        answer_logps[p, k, whose], pairs[p, k, whose] = total, True
  return ExchangedAnswers(reference_logps, answer_logps, answered=np.asarray(pairs.any(axis=1)), pairs=pairs)


def choose_pairs(
  answers: Sequence[OwnAnswer | None], has_place: Sequence[bool], most: int, rng: np.random.Generator
) -> np.ndarray:
  """bool[G, G]: after which reasonings (rows) each answer (columns) is scored. Equal answers have equal columns.

  >>> answers = [OwnAnswer("8", "</answer>"), OwnAnswer("9", "</answer>"), OwnAnswer("", "</answer>"), None]
  >>> choose_pairs(answers, [True, True, True, False], 0, np.random.default_rng(0)).astype(int).tolist()
  [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
  """
  chosen = np.zeros((len(answers), len(answers)), bool)
  possible = np.flatnonzero(has_place)
  for answer in dict.fromkeys(answer for answer in answers if answer and answer.text):
    whose = [j for j, other in enumerate(answers) if other == answer]
    others = rng.permutation(np.setdiff1d(possible, whose))
    after = np.concatenate([whose, others])[: most or len(possible)].astype(int)
    chosen[after[:, None], whose] = True
  return chosen


def _branches(
  engine: Engine,
  prompt: Prompt,
  response: np.ndarray,
  place: Place,
  answers: Sequence[OwnAnswer | None],
  own: int,
) -> list[tuple[Branch, list[int]]]:
  """What stands behind a response's reasoning, and the numbers of the responses whose answer it is.

  Args:
    own: the response's number.
  """
  limit = engine.device.shapes.suffix_length

  def branch(spliced: Splice) -> Branch:
    ids, mask = spliced.suffix_ids[:-1], spliced.answer_mask[:-1]  # EOS is not asked for
    return Branch.of_tokens(np.array(ids, np.int32), np.array(mask, bool))

  reference = splicing.with_ending(place.splice(engine.tokenizer, prompt.reference, eos_id=engine.eos_id))
  branches = [(branch(reference), [_REFERENCE])]
  for answer in dict.fromkeys(answer for answer in answers if answer):
    spliced = place.splice(engine.tokenizer, answer.text, answer.closing, engine.eos_id)
    others = [j for j, other in enumerate(answers) if other == answer]
    if own in others:
      spliced = splicing.as_sampled(engine.tokenizer, response, spliced)
    else:
      spliced = splicing.with_ending(spliced)
    if len(spliced.suffix_ids) <= limit and any(spliced.answer_mask):
      branches.append((branch(spliced), others))
  return branches
