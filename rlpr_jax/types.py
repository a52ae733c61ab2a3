"""Types that travel through a training step, in the order in which they come up.

    Prompt -> Rollouts -> Evidence -> Rewards -> RolloutBatch -> Groups -> StepBatch -> PackedRows -> TrainState
              Unfinished

Shapes: P prompts of a draw, G responses a prompt, B = P * G of them with a prompt's together, K groups that were kept,
T tokens of a response, E of the text in which a reference answer is scored, A of a reference answer, R rows of L tokens
in an update, N prompts of the data set. Only lengths and masks say what is a token and what is padding. `*M` is an axis
of the M references that a prompt may have, the first at 0, where several are scored; where the first alone is scored
(`config.reward.references`), there is no such axis.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from rlpr_jax.filtering import FilterState

Params = dict[str, Any]  # nested dictionary of arrays, as `nnx.to_pure_dict` gives it
AnyArray = Array | np.ndarray  # on a device or on the host


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity: == on arrays has no single answer
class Prompt:
  """A question in token ids, ready to be answered.

  >>> prompt = Prompt(ids=np.array([5, 6, 7], np.int32), reference="8", alternatives=("eight",), question="3+5?")
  >>> prompt.references
  ('8', 'eight')
  """

  ids: np.ndarray  # int32[length], ending where the assistant begins to write
  reference: str = ""  # the reference answer
  alternatives: tuple[str, ...] = ()  # further ones, as right, where the config takes them
  question: str = ""  # text of the last user message
  opening: str = ""  # tags that its text ends with: they count as the response's first, as `<think>` in R1's template
  source: str = ""  # where the question comes from
  row: int = 0  # index into the data set's prompts, by which per-prompt state such as r' is kept

  @property
  def references(self) -> tuple[str, ...]:
    """All reference answers."""
    return (self.reference, *self.alternatives)


class Rollouts(NamedTuple):
  """Responses of a batch of prompts and, where they were scored, their reference answers. numpy.

  A response `<think> 3+5 </think> <answer> 9 </answer>` to a prompt with the reference 8 is scored as
  `<think> 3+5 </think> <answer> 8 </answer>`: the first `reference_starts` tokens of the response, then
  `reference_tokens`, of which `reference_mask` is true on 8 alone. Where nothing was to be scored, as in an evaluation,
  nothing is scorable and E is 0.
  """

  tokens: np.ndarray  # int32[B, T] EOS included where it was sampled
  lengths: np.ndarray  # int32[B]
  logprobs: np.ndarray  # float32[B, T] of the sampled tokens, at the sampling temperature; 0 beyond the length
  finished: np.ndarray  # bool[B] True: ended by EOS or a stop string; False: cut at its limit
  texts: list[str]  # [B] decoded, without the EOS or stop string
  refused: np.ndarray  # bool[B] the prompt is empty or over the limit: nothing was sampled
  seconds: dict[str, float]  # wall time of "prefill", "decode", "score"
  scorable: np.ndarray  # bool[B] the reference answer, or one of several, could be spliced in
  overlong: np.ndarray  # bool[B] it, or one of several, could have been, but did not fit
  reference_starts: np.ndarray  # int32[B] tokens of the response that stand before the suffix
  reference_tokens: np.ndarray  # int32[B, *M, E] the suffix that was scored
  reference_logps: np.ndarray  # float32[B, *M, E] of the reference answer's own tokens, else 0
  reference_mask: np.ndarray  # bool[B, *M, E] True on the reference answer's own tokens
  slot_steps: tuple[int, int] = (0, 0)  # steps of decoding, times slots with a response that went on, and times all


class Evidence(NamedTuple):
  """All that a reward can be made of, of P groups of G responses. Column k is the answer's k-th token. numpy or jax.

  Two responses to one question whose reference has two tokens, the second response without an answer:

      logps     [[[-0.1, -0.3], [0, 0]]]        scorable  [[True, False]]
      mask      [[[True, True], [False, False]]]  formats   [[1, 0]]

  With room for two references, of which the prompt has one:

      logps     [[[[-0.1, -0.3], [0, 0]], [[0, 0], [0, 0]]]]
  """

  logps: Float[AnyArray, "P G *M A"]  # of the reference after the reasoning
  mask: Bool[AnyArray, "P G *M A"]  # True on the answer's tokens; nowhere for a reference that was not scored
  scorable: Bool[AnyArray, "P G"]  # of several references one
  baseline_logps: Float[AnyArray, "P *M A"]  # of the reference without reasoning; NaN where there is no token
  formats: Float[AnyArray, "P G"]  # 1 where the tags are right
  repetition: Float[AnyArray, "P G"]  # -1 where the response repeats itself
  excess: Float[AnyArray, "P G"]  # how much longer than the longest reference the answer is: 0 to -1
  verified: Float[AnyArray, "P G"]  # 1 where the verifier finds the answer right, by any reference; 0 without one
  noise: Float[AnyArray, "P G"]  # uniform in [0, 1)
  own: "OwnAnswers | None" = None  # of all rewards the two-sided length term alone looks at it
  responses: "ResponseLengths | None" = None
  exchanged: "ExchangedAnswers | None" = None  # where a reward asks for it
  timeouts: Int[AnyArray, "P G"] | None = None  # of a verifier of mathematics: pairs that took it too long to compare


class ResponseLengths(NamedTuple):
  """How long whole responses are. numpy or jax. 50 and 95 of at most 100 tokens, the last 20 with a price: below.

  lengths [[50, 95]], overlong [[0, -0.75]]
  """

  lengths: Int[AnyArray, "P G"]  # tokens
  overlong: Float[AnyArray, "P G"]  # as of `rewards.overlong_penalty`


class ExchangedAnswers(NamedTuple):
  """The group's own answers after each other's reasoning: arguments of `rewards.conditional_expectation`. numpy or jax.

  Two responses that say 8 and 9, of which each finds its own answer the more probable one:

      answer_logps  [[[-0.1, -2.5], [-2.0, -0.2]]]    row k: after the reasoning of response k
  """

  reference_logps: Float[AnyArray, "P G"]  # log p(reference and what ends it)
  answer_logps: Float[AnyArray, "P G G"]  # row k, column j: of the answer of j after the reasoning of k, likewise
  answered: Bool[AnyArray, "P G"]  # whether there is an answer that can be scored
  pairs: Bool[AnyArray, "P G G"]  # True where answer_logps was measured


class OwnAnswers(NamedTuple):
  """What the responses have between `<answer>` and `</answer>`, beside the reference. numpy or jax.

  For "Paris" and a response that says " Paris" and one that says nothing: found [[1, 1]], empty [[0, 1]], exact
  [[1, 0]], lengths [[5, 0]], reference_lengths [[5, 5]].
  """

  found: Bool[AnyArray, "P G"]  # whether there is an answer, be it empty
  empty: Bool[AnyArray, "P G"]  # one that is empty once stripped
  exact: Bool[AnyArray, "P G"]  # one that is a reference's text, stripped
  lengths: Int[AnyArray, "P G"]  # characters, stripped
  reference_lengths: Int[AnyArray, "P G"]  # characters of the first reference, stripped


class Rewards(NamedTuple):
  """Every part of the reward, so that each can be logged and none is computed twice. numpy or jax.

  With r = 0.8 and 0.3, r' = 0.2, both well-formed, and the format's share 0.1: `debiased` is [[0.6, 0.1]] and `total`
  [[0.64, 0.19]].
  """

  reference: Float[AnyArray, "P G"]  # r: the reference answer's probability after the reasoning
  baseline: Float[AnyArray, "P *G"]  # r': the same without reasoning; of several references of those that r is of
  debiased: Float[AnyArray, "P G"]  # shaping(r - r')
  format: Float[AnyArray, "P G"]  # 1 where the tags of the template are all there, in order
  repetition: Float[AnyArray, "P G"]  # -1 where the response repeats itself, else 0
  length: Float[AnyArray, "P G"]  # at most 0: all penalties of lengths, of the answer and of the response
  total: Float[AnyArray, "P G"]  # what the policy is trained on
  each_reference: Float[AnyArray, "P G M"] | None = None  # r of each of several; NaN: not scored; None: the first alone
  conditional: Float[AnyArray, "P G"] | None = None  # of exchanged answers; None where these are no part of the reward


class Advantages(NamedTuple):
  """How a group's responses compare. numpy.

  Totals [[0.64, 0.19]] have the advantages [[0.71, -0.71]] and the spread [0.32].
  """

  advantages: np.ndarray  # float32[P, G] of each sampled token
  stds: np.ndarray  # float32[P] spread of the rewards, by which the filter decides; NaN for a prompt that was refused
  answer_weights: np.ndarray | None  # float32[P, G, A] of -log p of the reference's tokens in the loss; None: no term
  of_answer: np.ndarray | None = None  # float32[P, G] of the own answer's tokens; None where they have no other


class Unfinished(NamedTuple):
  """Groups with responses that go on in the next draw, under `config.rollout.carry`. numpy.

  A token belongs to the policy that sampled it: `logprobs` and `steps` are that one's.

  >>> Unfinished.empty(samples=2, response_limit=3).num_groups
  0
  """

  draws: np.ndarray  # uint32[K] numbers in the stream of draws
  rows: np.ndarray  # int32[K] of the data set's prompts
  parts: np.ndarray  # int32[K] draws that they were in
  tokens: np.ndarray  # int32[K, G, T]
  lengths: np.ndarray  # int32[K, G]
  logprobs: np.ndarray  # float32[K, G, T]
  steps: np.ndarray  # int32[K, G, T] training steps finished when the token was sampled
  finished: np.ndarray  # bool[K, G] those that have ended by EOS, and wait for others of their group
  # As in `Rollouts`, of those that have ended; *M and E are those of the references.
  scorable: np.ndarray  # bool[K, G]
  overlong: np.ndarray  # bool[K, G]
  reference_starts: np.ndarray  # int32[K, G]
  reference_tokens: np.ndarray  # int32[K, G, *M, E]
  reference_logps: np.ndarray  # float32[K, G, *M, E]
  reference_mask: np.ndarray  # bool[K, G, *M, E]

  @classmethod
  def empty(cls, samples: int, response_limit: int, suffix: tuple[int, ...] = (0,)) -> "Unfinished":
    """None of them; `suffix`: [*M, E]."""
    tokens, of_references = (0, samples, response_limit), (0, samples, *suffix)
    return cls(
      draws=np.zeros(0, np.uint32),
      rows=np.zeros(0, np.int32),
      parts=np.zeros(0, np.int32),
      tokens=np.zeros(tokens, np.int32),
      lengths=np.zeros((0, samples), np.int32),
      logprobs=np.zeros(tokens, np.float32),
      steps=np.zeros(tokens, np.int32),
      finished=np.zeros((0, samples), bool),
      scorable=np.zeros((0, samples), bool),
      overlong=np.zeros((0, samples), bool),
      reference_starts=np.zeros((0, samples), np.int32),
      reference_tokens=np.zeros(of_references, np.int32),
      reference_logps=np.zeros(of_references, np.float32),
      reference_mask=np.zeros(of_references, bool),
    )

  @property
  def num_groups(self) -> int:
    """K."""
    return len(self.draws)

  def take(self, which: slice | np.ndarray) -> "Unfinished":
    """The groups that an index, a slice or a mask over K selects."""
    return jax.tree.map(lambda field: field[which], self)


class RolloutBatch(NamedTuple):
  """Result of one draw of prompts, as far as groups have ended. `keep` says which of them are trained on."""

  prompts: list[Prompt]  # [P]
  rollouts: Rollouts  # [P * G]; of texts, this process's share
  evidence: Evidence
  rewards: Rewards  # [P, G]
  shadows: dict[str, Rewards]  # by name
  advantages: Advantages
  keep: np.ndarray  # bool[P]
  baselines: np.ndarray  # float32[N, *M, A] as in TrainState, with what this draw measured
  ages: np.ndarray | None = None  # int32[P * G, T] steps since each token was sampled; None where none is carried
  unfinished: Unfinished | None = None  # groups of the draw that have not ended; None where none is carried


class Answers(NamedTuple):
  """Reference answers in the place of the responses' own, for a gradient through them. numpy."""

  weights: np.ndarray  # float32[K, G, E] of -log p of the suffix' tokens; 0 off the mask
  starts: np.ndarray  # int32[K, G] tokens of the response that stand before the suffix
  tokens: np.ndarray  # int32[K, G, E] the suffix
  mask: np.ndarray  # bool[K, G, E] True on the answer's own tokens; nowhere if the response has no place for it


class AnswerCredit(NamedTuple):
  """What the tokens of the own answers are credited with, where that is not what the reasoning is. numpy.

  A response of 9 tokens whose answer begins with the 7th: starts [[6]], and those three tokens have its advantage here.
  """

  starts: np.ndarray  # int32[K, G] tokens before the answer; the response's length where it has none
  advantages: np.ndarray  # float32[K, G]


class Groups(NamedTuple):
  """Kept prompts and their G responses each, with all that an update needs to know of them. numpy.

  >>> Groups.empty(prompt_limit=4, samples=2, response_limit=3).num_groups
  0
  """

  prompt_tokens: np.ndarray  # int32[K, S]
  prompt_lengths: np.ndarray  # int32[K]
  tokens: np.ndarray  # int32[K, G, T]
  lengths: np.ndarray  # int32[K, G]
  logprobs: np.ndarray  # float32[K, G, T] under the policy that sampled
  advantages: np.ndarray  # float32[K, G]
  answers: Answers | None = None  # None where no gradient goes through them
  credit: AnswerCredit | None = None  # None where all tokens of a response have its advantage
  importance: np.ndarray | None = None  # float32[K, G, T] by which a token's advantage is multiplied; None: 1

  @classmethod
  def empty(
    cls,
    prompt_limit: int,
    samples: int,
    response_limit: int,
    answer_limit: int | None = None,
    credits_parts: bool = False,
    weighs_tokens: bool = False,
  ) -> "Groups":
    """No groups; with the shapes of answers if `answer_limit` says how long they may be, of credit and importance."""
    answers = None
    if answer_limit is not None:
      answers = Answers(
        weights=np.zeros((0, samples, answer_limit), np.float32),
        starts=np.zeros((0, samples), np.int32),
        tokens=np.zeros((0, samples, answer_limit), np.int32),
        mask=np.zeros((0, samples, answer_limit), bool),
      )
    return cls(
      prompt_tokens=np.zeros((0, prompt_limit), np.int32),
      prompt_lengths=np.zeros(0, np.int32),
      tokens=np.zeros((0, samples, response_limit), np.int32),
      lengths=np.zeros((0, samples), np.int32),
      logprobs=np.zeros((0, samples, response_limit), np.float32),
      advantages=np.zeros((0, samples), np.float32),
      answers=answers,
      credit=AnswerCredit(np.zeros((0, samples), np.int32), np.zeros((0, samples), np.float32))
      if credits_parts
      else None,
      importance=np.zeros((0, samples, response_limit), np.float32) if weighs_tokens else None,
    )

  @property
  def num_groups(self) -> int:
    """K."""
    return len(self.prompt_lengths)

  def take(self, which: slice | np.ndarray) -> "Groups":
    """The groups that an index, a slice or a mask over K selects."""
    return jax.tree.map(lambda field: field[which], self)


class StepBatch(NamedTuple):
  """Material of a step: what it trains on, what it leaves to the next, and what it saw."""

  groups: Groups  # kept, at most prompts_per_step
  carried: Groups  # kept beyond that
  carried_in: int  # how many of both are of the step before
  stds: np.ndarray  # float32[max_draws * P] spread of every prompt drawn; NaN where nothing was drawn
  baselines: np.ndarray  # float32[N, *M, A] as in TrainState, with what was learned of them
  metrics: dict[str, float]
  rollouts: list[dict[str, Any]]  # some of them, for the disk
  unfinished: Unfinished | None = None  # groups that go on in the next step; None where none is carried


class PackedRows(NamedTuple):
  """Token rows for the update. numpy or jax.

  A group is a stem (the prompt) and branches (its responses), each of which goes on from the stem's end. The prompt
  5 6 with the responses 7 2 and 9 2, and 8 with 4 2, in a row of ten places:

      tokens       5 6  7 2  9 2  8  4 2  0
      positions    0 1  2 3  2 3  0  1 2 -1
      segment_ids  1 1  2 2  3 3  4  5 5  0      0 is padding
      group_ids    1 1  1 1  1 1  2  2 2  0
      mask         . .  T T  T T  .  T T  .
  """

  tokens: np.ndarray  # int32[R, L]
  positions: np.ndarray  # int32[R, L] in the text, stem and branch; -1 where no token stands
  segment_ids: np.ndarray  # int32[R, L] counts the stems and branches of a row from 1; 0 is padding
  mask: np.ndarray  # bool[R, L] True on sampled tokens, EOS included
  old_logprobs: np.ndarray  # float32[R, L] of the token at the same place
  advantages: np.ndarray  # float32[R, L]
  weights: np.ndarray  # float32[R, L] loss = sum(weights * token loss), over the whole minibatch
  answer_weights: np.ndarray | None = None  # float32[R, L] loss -= sum(answer_weights * log p); None for no such term
  reference_logprobs: np.ndarray | None = None  # float32[R, L] under the initial policy; None without a KL term
  group_ids: np.ndarray | None = None  # int32[R, L] counts the groups of a row; None where each segment is alone

  @property
  def counted(self) -> AnyArray:
    """bool[R, L] the tokens whose log-probability matters: sampled ones, and those with a weight of their own."""
    return self.mask if self.answer_weights is None else self.mask | (self.answer_weights != 0)

  def padding(self, micro_batch_rows: int = 1) -> float:
    """Share of the places that are computed, so many rows at a time, and hold no token.

    >>> rows = PackedRows.empty(4, 8)
    >>> rows.padding()  # nothing is computed
    0.0
    >>> rows.positions[0, :4] = range(4)
    >>> rows.padding(), rows.padding(micro_batch_rows=2)
    (0.5, 0.75)
    """
    used = np.sum(np.any(self.positions >= 0, axis=1))
    computed = -(-used // micro_batch_rows) * micro_batch_rows * self.positions.shape[1]
    return float(1 - np.sum(self.positions >= 0) / computed) if computed else 0.0

  @classmethod
  def empty(cls, rows: int, length: int) -> "PackedRows":
    """Rows of padding, of groups.

    >>> PackedRows.empty(2, 8).tokens.shape
    (2, 8)
    """
    shape = (rows, length)
    return cls(
      tokens=np.zeros(shape, np.int32),
      positions=np.full(shape, -1, np.int32),
      segment_ids=np.zeros(shape, np.int32),
      group_ids=np.zeros(shape, np.int32),
      mask=np.zeros(shape, bool),
      old_logprobs=np.zeros(shape, np.float32),
      advantages=np.zeros(shape, np.float32),
      weights=np.zeros(shape, np.float32),
    )


class TrainState(NamedTuple):
  """The state between two training steps. Random keys are not here: they follow from the seed and the draw's number."""

  step: int  # training steps finished
  params: Params  # float32 masters of what is trained
  opt_state: optax.OptState
  filter: FilterState
  baselines: np.ndarray  # float32[N, *M, A] log-probs of each reference without reasoning; NaN: no token, unknown
  initial: Params  # the initial policy, for a KL term or as frozen scorer; else nothing
  lagged: Params  # the policy some steps ago, as scorer; else nothing
  averaged: Params  # a moving average of the policy's parameters, for r'; else nothing
  carried: Groups  # kept groups that the step before had no room for
  stream: dict[str, Any]  # position of the data stream
  unfinished: Unfinished | None = None  # groups that the step before has begun; None where none is carried
