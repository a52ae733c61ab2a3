"""RLPR's reward in verl: no verifier, a served model's probability of the reference answer after the reasoning.

    pip install .   # in a checkout of rlpr_jax
    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo ... \
      reward.reward_manager.source=importlib reward.reward_manager.name=ReferenceRewardManager \
      reward.reward_manager.module.path=examples/in_verl.py \
      reward.custom_reward_function.path=examples/in_verl.py reward.custom_reward_function.name=log_probabilities \
      reward.reward_model.enable=True reward.reward_model.model_path=MODEL reward.reward_model.rollout.name=vllm

verl's workers of the reward cannot reach the policy that is trained, so that the probabilities are those of a frozen
copy, which is `reward.scorer=initial` of our own trainer: MODEL is what the training begins with, and verl serves it.
In the place of the last line any server can be named that gives `prompt_logprobs` as vLLM does, as `rlpr serve` does:

      +reward.custom_reward_function.reward_kwargs.address=HOST:PORT

Rows of the data have the reference answer where verl wants it, `reward_model.ground_truth`.
"""

import functools
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import numpy as np
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from rlpr_jax.reference_reward import ReferenceReward


def log_probabilities(
  texts: Sequence[list[int]], suffixes: Sequence[list[int]], *, address: str | None, timeout: float = 600
) -> list[np.ndarray]:
  """Of each suffix's tokens, given the text before it and those before them.

  Args:
    address: host:port of the server.
    timeout: seconds for all of them.
  """
  if address is None:
    raise ValueError("no server: expected reward.reward_model.enable or custom_reward_function.reward_kwargs.address")
  rows = [text + suffix for text, suffix in zip(texts, suffixes, strict=True)]
  url = f"http://{address}/v1/completions"
  asked = json.dumps({"prompt": rows, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}).encode()
  request = urllib.request.Request(url, asked, {"Content-Type": "application/json"})
  try:
    with urllib.request.urlopen(request, timeout=timeout) as answer:
      choices = sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])
  except urllib.error.HTTPError as error:
    raise RuntimeError(f"{url}: {error.code}, {error.read().decode(errors='replace')}") from None
  told = [choice["prompt_logprobs"] for choice in choices]
  return [
    np.array([places[at][str(row[at])]["logprob"] for at in range(len(text), len(row))])
    for text, row, places in zip(texts, rows, told, strict=True)
  ]


class ReferenceRewardManager(RewardManagerBase):
  """One of verl's: it is given a response at a time."""

  def __init__(
    self,
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    compute_score: Callable[..., list[np.ndarray]],
    reward_router_address: str | None = None,
    reward_model_tokenizer: PreTrainedTokenizerBase | None = None,
  ):
    """
    Args:
      compute_score: `log_probabilities`, with the reward_kwargs of the config.
      reward_router_address: of the model that verl serves; an address in the config counts more.
      reward_model_tokenizer: must be the policy's, in whose ids the server is asked.
    """
    super().__init__(config, tokenizer, compute_score)
    if reward_model_tokenizer is not None and reward_model_tokenizer.get_vocab() != tokenizer.get_vocab():
      raise ValueError("reward.reward_model.model_path: its tokenizer differs from the policy's")
    self._reward = ReferenceReward(tokenizer, functools.partial(compute_score, address=reward_router_address))

  async def run_single(self, data: DataProto) -> dict:
    row = data[-1:][0]  # of several turns the last
    tokens = {name: row.batch[name] for name in ("prompts", "responses")}
    places = row.batch["attention_mask"].bool().split([len(ids) for ids in tokens.values()])
    prompt, response = (ids[real].tolist() for ids, real in zip(tokens.values(), places, strict=True))
    answer = str(row.non_tensor_batch["reward_model"]["ground_truth"])
    scores = await self.loop.run_in_executor(None, self._reward, [prompt], [response], [answer])
    return {"reward_score": float(scores[0]), "reward_extra_info": {}}
