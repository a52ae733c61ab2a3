"""Records of a step: its metrics, and some of its rollouts as they go to disk."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlpr_jax.grading.agreement import auc, group_auc, within_group_correlation
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.types import AnyArray, OwnAnswers, Rewards, RolloutBatch


def rollout_metrics(config: ConfigDict, batches: Sequence[RolloutBatch]) -> dict[str, float]:
  """Summarises everything that a step sampled, dropped groups included; {} if nothing has ended in it."""
  batches = [batch for batch in batches if batch.prompts]
  if not batches:  # what was carried over was enough, or all goes on
    return {}
  rollouts = [batch.rollouts for batch in batches]

  def everywhere(field: str) -> np.ndarray:
    return np.concatenate([getattr(part, field) for part in rollouts])

  seconds = {name: sum(part.seconds[name] for part in rollouts) for name in rollouts[0].seconds}
  sampling = seconds["prefill"] + seconds["decode"]
  busy, slots = np.sum([part.slot_steps for part in rollouts], axis=0)
  parts = [name for name in Rewards._fields if getattr(batches[0].rewards, name) is not None]
  return {
    **{f"reward/{name}": finite_mean([getattr(batch.rewards, name) for batch in batches]) for name in parts},
    "reward/gain": finite_mean([batch.rewards.reference for batch in batches])
    - finite_mean([batch.rewards.baseline for batch in batches]),
    "reward/group_std": finite_mean([batch.advantages.stds for batch in batches]),
    "reward/not_finite": int(sum((~np.isfinite(batch.rewards.total)).sum() for batch in batches)),
    "reward/not_finite_share": float(np.mean(np.concatenate([~np.isfinite(batch.rewards.total) for batch in batches]))),
    **answer_metrics(batches),
    **compare_rewards(batches, verifies=config.reward.verifier != "none"),
    **timeout_metrics(batches),
    "rollout/occupancy": busy / max(slots, 1),
    "rollout/response_length": float(np.mean(everywhere("lengths"))),
    "rollout/truncated": float(np.mean(~everywhere("finished"))),
    "rollout/scorable": float(np.mean(everywhere("scorable"))),
    "rollout/overlong_references": int(everywhere("overlong").sum()),
    "rollout/refused_prompts": int(everywhere("refused").sum()) // config.samples_per_prompt,
    **staleness_metrics(batches),
    "seconds/rollout": sampling,
    "seconds/prefill": seconds["prefill"],
    "seconds/score": seconds["score"],
    **({"seconds/exchange": seconds["exchange"]} if "exchange" in seconds else {}),
    "tokens_per_second/rollout": int(everywhere("lengths").sum()) / max(sampling, 1e-9),
  }


def staleness_metrics(batches: Sequence[RolloutBatch]) -> dict[str, float]:
  """How old the tokens of the responses are, where some were begun in an earlier step; {} where none ever is.

  `rollout/staleness`: mean of the steps since a token was sampled; `rollout/stale_tokens`: share of those with any.
  """
  ages = [
    batch.ages[np.arange(batch.ages.shape[1]) < batch.rollouts.lengths[:, None]]
    for batch in batches
    if batch.ages is not None
  ]
  if not ages or not (of_tokens := np.concatenate(ages)).size:
    return {}
  return {"rollout/staleness": float(of_tokens.mean()), "rollout/stale_tokens": float(np.mean(of_tokens > 0))}


def answer_metrics(batches: Sequence[RolloutBatch]) -> dict[str, float]:
  """What the policy answers itself, which a likelihood of the reference does not see.

  Shares of all responses: `answer/found`, `/empty` and `/exact` (the reference's very text). `answer/length`:
  characters of the answers over those of their references. `answer/agreement`: AUC, within groups, of the reference's
  score for exact answers; absent where no group has both kinds.
  """
  own = [batch.evidence.own for batch in batches]
  found, empty, exact, lengths, of_references = (
    np.concatenate([getattr(part, field) for part in own]) for field in OwnAnswers._fields
  )
  values = {"answer/found": found.mean(), "answer/empty": empty.mean(), "answer/exact": exact.mean()}
  if found.any():
    values["answer/length"] = lengths[found].sum() / max(of_references[found].sum(), 1)
  agreement = group_auc(np.concatenate([batch.rewards.reference for batch in batches]), exact)
  if agreement is not None:
    values["answer/agreement"] = agreement
  return {name: float(value) for name, value in values.items()}


def timeout_metrics(batches: Sequence[RolloutBatch]) -> dict[str, float]:
  """`reward/timeouts`: pairs of answer and reference that took a verifier of mathematics too long, and count as wrong.

  Without such a verifier {}.
  """
  counts = [batch.evidence.timeouts for batch in batches if batch.evidence.timeouts is not None]
  return {"reward/timeouts": int(sum(count.sum() for count in counts))} if counts else {}


def finite_mean(parts: Sequence[AnyArray]) -> float:
  """Mean of what is finite; 0 if nothing is.

  >>> finite_mean([np.array([1.0, np.nan]), np.array([[3.0, np.inf]])])
  2.0
  """
  values = np.concatenate([np.ravel(part) for part in parts])
  return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else 0.0


def compare_rewards(batches: Sequence[RolloutBatch], verifies: bool) -> dict[str, float]:
  """Compares each shadow reward with the one that is trained on, and both with the verifier, if there is one.

  AUCs say whether a reward tells right responses from wrong ones: of all prompts, and of one prompt's.
  """

  def everywhere(pick: Callable[[RolloutBatch], AnyArray]) -> np.ndarray:
    return np.concatenate([pick(batch) for batch in batches])

  def aucs(name: str, scores: np.ndarray) -> dict[str, float | None]:
    return {f"{name}/auc": auc(scores, right), f"{name}/group_auc": group_auc(scores, right)}

  total, right = everywhere(lambda batch: batch.rewards.total), everywhere(lambda batch: batch.evidence.verified)
  values: dict[str, float | None] = {}
  if verifies:
    values = {"reward/verified": float(right.mean()), **aucs("reward", total)}
  for name in batches[0].shadows:
    shadow = np.concatenate([batch.shadows[name].total for batch in batches])
    values |= {
      f"shadow/{name}/total": finite_mean([shadow]),
      f"shadow/{name}/group_std": finite_mean([np.std(shadow, axis=1, ddof=1)]) if shadow.shape[1] > 1 else 1.0,
      f"shadow/{name}/correlation": within_group_correlation(total, shadow),
      **aucs(f"shadow/{name}", shadow),
    }
  return {name: value for name, value in values.items() if value is not None}


def rollout_rows(batch: RolloutBatch, step: int, count: int, engine: Engine) -> list[dict[str, Any]]:
  """The first `count` responses of a batch with every part of their reward, as they go to disk.

  Of several references each has its r in `reward_each_reference`, None where it was not scored; `reference` and what is
  said of its tokens are the most probable one's. `baseline_probs` are those of its tokens without reasoning: as many as
  `reference_tokens` has, but where the two are tokenised otherwise or the rollout was not scored.
  """
  rows, samples = [], batch.advantages.advantages.shape[1]
  for i in range(min(count, len(batch.rollouts.lengths))):
    p, g = divmod(i, samples)
    prompt = batch.prompts[p]
    rewards = batch.rewards._asdict()
    each = rewards.pop("each_reference")
    parts = {f"reward_{name}": value for name, value in rewards.items() if value is not None}
    parts |= {f"shadow_{name}": shadow.total for name, shadow in batch.shadows.items()}
    tokens, logps, answer = (getattr(batch.rollouts, f"reference_{name}")[i] for name in ("tokens", "logps", "mask"))
    without = np.asarray(batch.evidence.baseline_logps[p])
    shown, several = 0, {}
    if each is not None:
      scores = np.asarray(each[p, g, : len(prompt.references)])
      shown = int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))
      tokens, logps, answer = tokens[shown], logps[shown], answer[shown]
      without = without[shown]
      found = [None if np.isnan(score) else float(score) for score in scores]
      several = {"references": list(prompt.references), "reward_each_reference": found}
    rows.append(
      {
        "step": step,
        "row": prompt.row,
        "source": prompt.source,
        "question": prompt.question,
        "reference": prompt.references[shown],
        **several,
        "response": engine.response_text(batch.rollouts.tokens[i, : batch.rollouts.lengths[i]].tolist()),
        "finish": "eos" if batch.rollouts.finished[i] else "length",
        "length": int(batch.rollouts.lengths[i]),
        "scorable": bool(batch.rollouts.scorable[i]),
        "reference_tokens": [engine.tokenizer.decode([token]) for token in tokens[answer]],
        "reference_probs": np.exp(logps[answer]).tolist(),
        "baseline_probs": np.exp(without[np.isfinite(without)]).tolist(),
        **{name: float(value[p] if value.ndim == 1 else value[p, g]) for name, value in parts.items()},
        "advantage": float(batch.advantages.advantages[p, g]),
        "group_std": float(batch.advantages.stds[p]),
        "kept": bool(batch.keep[p]),
      }
    )
  return rows
