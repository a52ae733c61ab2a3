"""The server with OpenAI's own client, over a real socket."""

import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2
import jax
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn
from flax import nnx

import rlpr_jax
from rlpr_jax import huggingface
from rlpr_jax.data.templates import render
from rlpr_jax.errors import InputError
from rlpr_jax.judging.client import Client, Endpoint
from rlpr_jax.judging.judge import JudgeItem, judge_all
from rlpr_jax.models import ModelConfig, definition, init_params
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine, SampleOptions
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Extras, Scheduler
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.serve import listen
from rlpr_jax.serving.app import Limits, create_app
from rlpr_jax.serving.loop import Job, Loop
from rlpr_jax.types import Prompt

KEY, LIMIT = "sk-of-the-tests", 120
SHAPES = Shapes(
  slots=8,
  prompt_limit=24,
  max_response_length=LIMIT,
  suffix_length=1,
  steps=4,
  prefill_rows=4,
  score_rows=4,
  insert_rows=4,
)


@pytest.fixture(scope="module")
def engine(policy):
  """Of a random policy that seldom ends; each letter is a token."""
  settings = DecodeSettings(SHAPES.steps, (policy.tokenizer.eos_token_id,))
  return Engine(Device(policy.model, settings, SHAPES), policy.tokenizer, "think", baseline_prefix="bare")


class Served:
  """A server in a thread of its own."""

  def __init__(self, engine, params, waiting=64, seconds=600.0, body=4096, **options):
    self.loop = Loop(engine, params, waiting)
    app = create_app(engine, self.loop, "tiny", Limits(body, seconds), KEY, **options)
    self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None))
    self._thread = threading.Thread(target=self._server.run)
    self._thread.start()
    while not self._server.started:
      time.sleep(0.01)
    host, port = self._server.servers[0].sockets[0].getsockname()
    self.url = f"http://{host}:{port}"

  def client(self, key=KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

  def get(self, path: str) -> httpx2.Response:
    return httpx2.get(self.url + path)

  def idle(self) -> bool:
    """Whether all slots and queues become empty within some seconds."""
    return wait(lambda: (self.loop.waiting, self.loop.running) == (0, 0))

  def stop(self) -> None:
    self._server.should_exit = True
    self._thread.join()


def wait(condition, seconds=120.0) -> bool:
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      return False
    time.sleep(0.02)
  return True


@pytest.fixture(scope="module")
def served(engine, policy):
  served = Served(engine, policy.params)
  yield served
  served.stop()


@contextlib.contextmanager
def other(engine, policy, **options):
  served = Served(engine, policy.params, **options)
  try:
    yield served
  finally:
    served.stop()


def chat(text="1+2"):
  return {"model": "tiny", "messages": [{"role": "user", "content": text}]}


def expected(engine, policy, text, seed, samples=1, limit=LIMIT, sampling=SamplingParams(), stop=()):
  """What the engine alone samples."""
  ids = render(policy.tokenizer, [{"role": "user", "content": text}])
  prompt = Prompt(ids=np.array(ids, np.int32))
  alone = dataclasses.replace(engine, sampling=sampling)
  options = SampleOptions(limits=[limit] * samples, stop=stop)
  return alone.sample(policy.params, [(seed, prompt)], jax.random.key(0), samples, options)


def test_32_streams_at_once_are_what_the_engine_alone_samples(engine, policy, served):
  """In eight slots, each with its own temperature, limit and seed."""
  asked = [(f"{i}+{i}", i, LIMIT - i, (1.0, 0.0, 0.7)[i % 3]) for i in range(32)]

  async def one(client, text, seed, limit, temperature):
    stream = await client.chat.completions.create(
      **chat(text), seed=seed, max_tokens=limit, temperature=temperature, stream=True,
      stream_options={"include_usage": True},
    )  # fmt: skip
    pieces = [piece async for piece in stream]
    (reason,) = [piece.choices[0].finish_reason for piece in pieces if piece.choices and piece.choices[0].finish_reason]
    roles = [piece.choices[0].delta.role for piece in pieces if piece.choices]
    assert roles == ["assistant", *[None] * (len(roles) - 1)]
    text = "".join(piece.choices[0].delta.content for piece in pieces if piece.choices)
    return text, reason, pieces[-1].usage, len(pieces)

  async def everything():
    async with served.client() as client:
      return await asyncio.gather(*(one(client, *row) for row in asked))

  most = 0
  for (text, seed, limit, temperature), found in zip(asked, asyncio.run(everything()), strict=True):
    alone = expected(engine, policy, text, seed, limit=limit, sampling=SamplingParams(temperature))
    assert found[0] == alone.texts[0]
    assert found[1] == ("stop" if alone.finished[0] else "length")
    assert found[2].completion_tokens == alone.lengths[0]
    most = max(most, found[3])
  assert most > 5  # it came in pieces
  assert served.idle()


def test_whole_responses_samples_stops_and_log_probabilities(engine, policy, served):
  async def ask():
    async with served.client() as client:
      whole = await client.chat.completions.create(**chat(), n=3, seed=5, logprobs=True, top_p=0.9, max_tokens=30)
      again = await client.chat.completions.create(**chat(), n=3, seed=5, top_p=0.9, max_tokens=30)
      stopped = await client.chat.completions.create(**chat(), n=3, seed=5, top_p=0.9, max_tokens=30, stop=["1", "b"])
      plain = await client.completions.create(
        model="tiny", prompt=["12", [5, 6, 7]], n=2, seed=1, max_tokens=6, logprobs=0
      )
      return whole, again, stopped, plain, await client.models.list()

  whole, again, stopped, plain, listed = asyncio.run(ask())
  alone = expected(engine, policy, "1+2", 5, 3, 30, SamplingParams(top_p=0.9))
  for i, choice in enumerate(whole.choices):
    assert (choice.index, choice.message.content) == (i, alone.texts[i])
    length = alone.lengths[i]  # with EOS, as vLLM counts
    np.testing.assert_allclose([x.logprob for x in choice.logprobs.content], alone.logprobs[i, :length], atol=1e-5)
    end = policy.tokenizer.eos_token if alone.finished[i] else ""
    assert "".join(x.token for x in choice.logprobs.content) == alone.texts[i] + end
  assert whole.usage.completion_tokens == alone.lengths.sum()
  assert [x.message.content for x in again.choices] == alone.texts
  halted = expected(engine, policy, "1+2", 5, 3, 30, SamplingParams(top_p=0.9), ["1", "b"])
  assert [x.message.content for x in stopped.choices] == halted.texts != alone.texts
  assert "stop" in {x.finish_reason for x in stopped.choices}
  assert [x.index for x in plain.choices] == [0, 1, 2, 3]
  assert len({x.text for x in plain.choices}) > 1
  assert all(len(x.logprobs.tokens) <= 6 for x in plain.choices)
  assert [model.id for model in listed.data] == ["tiny"]


def post(served, path, body, **headers):
  headers = {"Authorization": f"Bearer {KEY}", **headers}
  return httpx2.post(served.url + path, json=body, headers=headers, timeout=600)


def prompt_logprobs(policy, ids):
  """float64[N - 1, V] by one forward pass over the prompt: of the tokens after the first."""
  decoder = nnx.merge(policy.model, policy.params)
  logits = np.asarray(decoder.logits(decoder.prefill(np.array([ids], np.int32))[0])[0, :-1], np.float64)
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_prompts_are_echoed_with_log_probabilities_as_lm_eval_asks_for_them(policy, served):
  """The bodies that lm-eval's `local-completions` sends for a loglikelihood, and what it reads of the answer."""
  prompts = [[4, 20, 21, 22, 23], [4, 30, 31]]
  asked = {
    "model": "tiny",
    "prompt": prompts,
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
  }
  choices = post(served, "/v1/completions", asked).json()["choices"]
  for ids, choice in zip(prompts, sorted(choices, key=lambda choice: choice["index"]), strict=True):
    told, expected = choice["logprobs"], prompt_logprobs(policy, ids)
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids) + 1
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1:-1], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    for value, top, row in zip(told["token_logprobs"][1:-1], told["top_logprobs"][1:-1], expected, strict=True):
      assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
      assert value in top.values()  # to the last bit: that is how it is seen whether a token is the greedy one
    assert choice["text"].startswith(policy.tokenizer.decode(ids))
    assert told["text_offset"] == np.cumsum([0, *map(len, told["tokens"])])[:-1].tolist()
  nothing = post(served, "/v1/completions", asked | {"max_tokens": 0, "prompt": prompts[0]}).json()
  (choice,) = nothing["choices"]
  assert choice["text"] == policy.tokenizer.decode(prompts[0])
  assert choice["logprobs"]["token_logprobs"] == choices[0]["logprobs"]["token_logprobs"][:-1]
  assert nothing["usage"]["completion_tokens"] == 0
  pieces = post(served, "/v1/completions", asked | {"prompt": "12", "stream": True}).text
  texts = [json.loads(line[6:])["choices"][0] for line in pieces.splitlines() if line.startswith("data: {")]
  whole = post(served, "/v1/completions", asked | {"prompt": "12"}).json()["choices"][0]
  assert "".join(piece["text"] for piece in texts) == whole["text"]
  streamed = [value for piece in texts for value in piece["logprobs"]["token_logprobs"]]
  assert streamed == whole["logprobs"]["token_logprobs"]


def test_prompt_logprobs_are_those_of_vllm(policy, served):
  body = post(served, "/v1/completions", {"prompt": [4, 20, 21], "max_tokens": 1, "prompt_logprobs": 2}).json()
  first, *told = body["choices"][0]["prompt_logprobs"]
  assert first is None
  for token, place, row in zip([20, 21], told, prompt_logprobs(policy, [4, 20, 21]), strict=True):
    best = np.argsort(-row)[:2].tolist()
    assert set(place) == {str(token), *map(str, best)}
    for name, entry in place.items():
      assert entry["logprob"] == pytest.approx(row[int(name)], abs=1e-4)
      assert entry["rank"] == 1 + np.sum(row > row[int(name)])
      assert entry["decoded_token"] == policy.tokenizer.decode([int(name)])
  chats = post(served, "/v1/chat/completions", chat() | {"max_tokens": 1, "prompt_logprobs": 0}).json()
  assert len(chats["prompt_logprobs"]) == chats["usage"]["prompt_tokens"]


def test_the_most_probable_tokens_are_told(policy, served):
  asked = chat() | {"max_tokens": 8, "logprobs": True, "top_logprobs": 4, "temperature": 0.5, "seed": 3}
  (choice,) = post(served, "/v1/chat/completions", asked).json()["choices"]
  response = policy.tokenizer.convert_tokens_to_ids([each["token"] for each in choice["logprobs"]["content"]])
  ids = [*render(policy.tokenizer, asked["messages"]), *response]
  rows = prompt_logprobs(policy, ids)[-len(response) :]  # the model's own: at temperature 1
  for token, told, row in zip(response, choice["logprobs"]["content"], rows, strict=True):
    assert told["logprob"] == pytest.approx(row[token], abs=1e-4)
    assert [each["logprob"] for each in told["top_logprobs"]] == pytest.approx(-np.sort(-row)[:4], abs=1e-4)
  lines = post(served, "/v1/chat/completions", asked | {"stream": True}).text.splitlines()
  pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
  streamed = [each for piece in pieces if piece["logprobs"] for each in piece["logprobs"]["content"]]
  assert streamed == choice["logprobs"]["content"]


def test_tempered_log_probabilities(engine, policy):
  with other(engine, policy, raw_logprobs=False) as served:
    asked = chat() | {"max_tokens": 8, "logprobs": True, "temperature": 0.5, "seed": 3}
    (choice,) = post(served, "/v1/chat/completions", asked).json()["choices"]
  alone = expected(engine, policy, "1+2", 3, limit=8, sampling=SamplingParams(0.5))
  found = [each["logprob"] for each in choice["logprobs"]["content"]]
  np.testing.assert_allclose(found, alone.logprobs[0, : alone.lengths[0]], atol=1e-5)


def test_what_is_asked_of_tokens_is_done(policy, served):
  def text(**fields):
    body = post(served, "/v1/chat/completions", chat() | {"max_tokens": 12, "seed": 1} | fields).json()
    return body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]

  (seven, eight), end = policy.tokenizer.convert_tokens_to_ids(["7", "8"]), policy.tokenizer.eos_token_id
  assert text(logit_bias={str(seven): 100}) == ("7" * 12, "length")
  assert text(logit_bias={str(seven): 100}, stop_token_ids=[seven]) == ("", "stop")
  assert text(logit_bias={str(seven): 100}, stop_token_ids=[seven], min_tokens=2)[1] == "stop"
  assert text(logit_bias={str(end): 100}) == ("", "stop")
  shown = policy.tokenizer.eos_token * 12
  assert text(logit_bias={str(end): 100}, ignore_eos=True) == (shown, "length")
  assert text(logit_bias={str(end): 100}, ignore_eos=True, skip_special_tokens=True) == ("", "length")
  assert set(text(allowed_token_ids=[seven, eight])[0]) == {"7", "8"}
  greedy = {"temperature": 0, "allowed_token_ids": [seven, eight]}
  alternating, _ = text(**greedy, frequency_penalty=2, presence_penalty=2, repetition_penalty=1.0)
  assert {alternating.count("7"), alternating.count("8")} != {0, 12}
  lines = post(
    served, "/v1/chat/completions", chat() | {"logit_bias": {str(seven): 100}, "max_tokens": 12, "stream": True}
  ).text.splitlines()
  pieces = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
  assert "".join(piece["content"] for piece in pieces) == "7" * 12
  assert served.idle()


def test_responses_follow_a_json_schema(across_words):
  """Of a random policy, that would write anything; beside one that does."""
  pytest.importorskip("llguidance")
  size = len(across_words)
  config = ModelConfig(size, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
  params = init_params(config, seed=0)
  settings = DecodeSettings(SHAPES.steps, (across_words.eos_token_id,))
  engine = Engine(Device(definition(config), settings, SHAPES), across_words, "think", baseline_prefix="bare")
  properties = {"verdict": {"enum": ["correct", "incorrect"]}, "sure": {"type": "boolean"}}
  schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
  asked = {"prompt": "1", "seed": 0, "max_tokens": LIMIT}
  form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
  served = Served(engine, params)
  try:
    plain = post(served, "/v1/completions", asked).json()["choices"][0]
    body = post(served, "/v1/completions", asked | {"response_format": form, "n": 4}).json()
    assert post(served, "/v1/completions", asked).json()["choices"][0] == plain
  finally:
    served.stop()
  for choice in body["choices"]:
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["text"]), schema)


@pytest.mark.slow
def test_a_judge_that_would_write_anything_gives_verdicts(across_words, monkeypatch, tmp_path):
  """Of a random policy: whatever it says is understood, and asked for once."""
  pytest.importorskip("llguidance")
  monkeypatch.setenv("JUDGE_KEY", KEY)
  tokenizer, size = copy.deepcopy(across_words), len(across_words)
  tokenizer.chat_template = "{{ messages[0]['content'] }}\n"
  config = ModelConfig(size, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
  settings = DecodeSettings(SHAPES.steps, (across_words.eos_token_id,))
  shapes = dataclasses.replace(SHAPES, prompt_limit=2048, max_response_length=1024)
  engine = Engine(Device(definition(config), settings, shapes), tokenizer, "think", baseline_prefix="bare")
  served, told = Served(engine, init_params(config, seed=0), body=2**20), []
  try:

    def verdicts(response_format):
      endpoint = Endpoint(
        f"{served.url}/v1", "tiny", "JUDGE_KEY", temperature=1.0, max_tokens=1024, response_format=response_format
      )
      client = Client(endpoint, told.append)
      return judge_all([JudgeItem(f"{n} + 1?", str(n + 1), "2") for n in range(3)], client), client.usage.requests

    formed, requests = verdicts("json_schema")
    free, _ = verdicts("text")
  finally:
    served.stop()
  assert all(verdict.right is not None for verdict in formed), formed
  assert (requests, told) == (3, [])
  assert all(verdict.right is None for verdict in free)


def test_a_seed_is_that_of_each_prompt_of_a_list(served):
  asked = {"prompt": ["12", "12", "3"], "max_tokens": 20, "n": 2}
  seeded = [choice["text"] for choice in post(served, "/v1/completions", asked | {"seed": 7}).json()["choices"]]
  assert seeded[:2] == seeded[2:4]
  assert seeded[0] != seeded[1]
  alone = post(served, "/v1/completions", asked | {"seed": 7, "prompt": "3"}).json()["choices"]
  assert [choice["text"] for choice in alone] == seeded[4:]
  without = [choice["text"] for choice in post(served, "/v1/completions", asked).json()["choices"]]
  assert len(set(without[:4])) == 4


def test_fields_that_ask_for_nothing_are_taken(served):
  """Those of OpenAI and vLLM at their defaults, and null, which many clients send for what they do not set."""
  neutral = {
    "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "use_beam_search": False,
    "best_of": None, "length_penalty": 1.0, "early_stopping": False, "tool_choice": "none", "tools": None,
    "prediction": None,
    "reasoning_effort": None, "audio": None, "modalities": ["text"], "logit_bias": {}, "stop": [], "stop_token_ids": [],
    "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": False,
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None, "prompt_logprobs": None, "echo": False,
    "add_special_tokens": False, "documents": None, "chat_template": None, "chat_template_kwargs": None, "top_k": -1,
    "min_p": 0.0, "guided_json": None, "structured_outputs": None, "priority": 0, "bad_words": [], "user": "me",
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0,
    "some_future_field": None, "stream_options": None, "max_tokens": None, "max_completion_tokens": 5, "seed": 4,
    "include_reasoning": True, "return_token_ids": None, "cache_salt": "x", "request_id": "y",
    "allowed_token_ids": None,
  }  # fmt: skip
  asked = {"messages": chat()["messages"]}  # without a model
  plain = post(served, "/v1/chat/completions", asked | {"max_tokens": 5, "seed": 4}).json()
  found = post(served, "/v1/chat/completions", asked | neutral).json()
  assert found["choices"] == plain["choices"]
  assert found["model"] == "tiny"
  fewer = {"suffix": None, "best_of": 1, "logprobs": None, "prompt": "12", "max_tokens": 5, "add_special_tokens": True}
  assert post(served, "/v1/completions", fewer).status_code == 200


def test_chats_of_any_roles(policy, served):
  def tokens(messages, **fields):
    body = post(served, "/tokenize", {"messages": messages, **fields}).json()
    return "".join(policy.tokenizer.convert_ids_to_tokens(body["tokens"]))

  user, nothing, begun = (
    {"role": "user", "content": "1"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": "2"}
  )  # fmt: skip
  assert tokens([{"role": "system", "content": "be brief"}]) == "<a>"  # the template leaves it out
  assert tokens([user, nothing, user]) == "<q>1<a><end><q>1<a>"
  assert tokens([user, nothing]) == tokens([user]) == "<q>1<a>"
  assert tokens([user, begun]) == "<q>1<a>2"
  assert tokens([user, begun], continue_final_message=False) == "<q>1<a>2<end><a>"
  assert tokens([user, begun], add_generation_prompt=True) == "<q>1<a>2<end><a>"
  assert tokens([user, begun], add_generation_prompt=False) == "<q>1<a>2"
  assert tokens([user], add_generation_prompt=False) == "<q>1"
  assert tokens([user], continue_final_message=True) == "<q>1"
  assert post(served, "/v1/chat/completions", {"messages": [user, nothing]}).status_code == 200
  tool = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function"}]}
  refused = post(served, "/v1/chat/completions", {"messages": [user, tool, user]})
  assert (refused.status_code, "messages[1].tool_calls: not supported" in refused.text) == (400, True)


def test_tokens_and_texts(policy, served):
  found = post(served, "/tokenize", {"prompt": "1+2", "return_token_strs": True}).json()
  assert found == {
    "count": 3,
    "max_model_len": SHAPES.longest,
    "tokens": policy.tokenizer.encode("1+2"),
    "token_strs": ["1", "+", "2"],
  }
  assert post(served, "/detokenize", {"model": "tiny", "tokens": found["tokens"]}).json() == {"prompt": "1+2"}
  assert post(served, "/detokenize", {"tokens": [64]}).status_code == 400
  assert post(served, "/tokenize", {}).status_code == 400
  info = httpx2.get(f"{served.url}/tokenizer_info", headers={"Authorization": f"Bearer {KEY}"}).json()
  assert (info["eos_token"], info["chat_template"]) == ("<end>", policy.tokenizer.chat_template)
  for method, path in (("GET", "/tokenizer_info"), ("POST", "/tokenize"), ("POST", "/detokenize")):
    assert httpx2.request(method, served.url + path).status_code == 401


def test_the_small_routes(served):
  async def ask():
    async with served.client() as client:
      return await client.models.retrieve("tiny"), (await client.models.list()).data

  card, cards = asyncio.run(ask())
  assert [card] == cards
  assert card.created <= time.time() < card.created + 3600
  assert card.max_model_len == SHAPES.longest
  headers = {"Authorization": f"Bearer {KEY}"}
  assert httpx2.get(f"{served.url}/v1/models/other", headers=headers).status_code == 404
  assert served.get("/version").json() == {"version": rlpr_jax.__version__}
  assert served.get("/ping").status_code == httpx2.post(f"{served.url}/ping").status_code == 200


def test_requests_have_names(served):
  sent = httpx2.get(f"{served.url}/health", headers={"X-Request-Id": "mine-1"})
  assert sent.headers["x-request-id"] == "mine-1"
  own = {served.get("/health").headers["x-request-id"] for _ in range(3)}
  assert len(own) == 3
  assert post(served, "/v1/chat/completions", {"messages": 5}).headers["x-request-id"]
  assert "access-control-allow-origin" not in served.get("/health").headers


def test_web_pages_may_ask_where_a_flag_says_so(engine, policy):
  asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
  with other(engine, policy, origins=["https://page.example"]) as served:
    answer = httpx2.request("OPTIONS", f"{served.url}/v1/chat/completions", headers=asks)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    refused = httpx2.request("OPTIONS", f"{served.url}/v1/models", headers=asks | {"Origin": "https://else.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_openais_helper_puts_a_stream_together(served):
  async def ask():
    async with served.client() as client, client.chat.completions.stream(**chat(), seed=2, max_tokens=30) as stream:
      return await stream.get_final_completion()

  (choice,) = asyncio.run(ask()).choices
  whole = post(served, "/v1/chat/completions", chat() | {"seed": 2, "max_tokens": 30}).json()["choices"][0]
  assert (choice.message.role, choice.message.content) == ("assistant", whole["message"]["content"])


def test_streams_that_are_left_free_their_slots(engine, policy, monkeypatch):
  """Clients that go away, while they stream and while they wait for the whole; left alone it would take 30 seconds."""
  begun = threading.Event()

  async def leave(served):
    async with served.client() as client:
      streams = [await client.chat.completions.create(**chat(), stream=True, n=2) for _ in range(10)]
      begun.set()
      for stream in streams:
        await anext(aiter(stream))
        await stream.close()
      waiting = [asyncio.ensure_future(client.chat.completions.create(**chat(), n=4)) for _ in range(5)]
      while len({id(job) for job in list(served.loop.jobs.values()) if not job.stream}) < len(waiting):
        await asyncio.sleep(0.01)
      for task in waiting:
        task.cancel()
      await asyncio.gather(*waiting, return_exceptions=True)

  honest, seen = Scheduler.round, []

  def slow_round(scheduler):
    seen.append(scheduler)
    begun.wait(60)
    time.sleep(0.2)
    return honest(scheduler)

  monkeypatch.setattr(Scheduler, "round", slow_round)
  with other(engine, policy) as served:
    asyncio.run(leave(served))
    assert wait(lambda: (served.loop.waiting, served.loop.running) == (0, 0), 5)
    assert not served.loop.jobs
    assert sorted(seen[-1].free) == list(range(SHAPES.slots))
    assert wait(lambda: 'rlpr_requests_total{status="499"} 15.0' in served.get("/metrics").text)


@pytest.mark.parametrize(
  ("change", "error", "says"),
  [
    ({"model": "other"}, openai.NotFoundError, "model 'other'"),
    ({"messages": []}, openai.BadRequestError, "messages: expected one or more"),
    ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, r"messages\[0\].role"),
    ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, r"messages\[0\].content"),
    ({"messages": [{"role": "user", "content": "x" * 40}]}, openai.BadRequestError, "tokens, expected at most 24"),
    ({"max_tokens": LIMIT + 1}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": True}, openai.BadRequestError, "max_tokens: expected int"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature: expected float"),
    ({"top_p": 1.5}, openai.BadRequestError, "top_p"),
    ({"n": 100}, openai.BadRequestError, "n: 100"),
    ({"stop": ["a"] * 65}, openai.BadRequestError, "stop"),
    ({"top_logprobs": 30, "logprobs": True}, openai.BadRequestError, "top_logprobs: 30, expected 0 to 20"),
    ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs: expected logprobs"),
    ({"presence_penalty": 3}, openai.BadRequestError, "presence_penalty: 3, expected -2 to 2"),
    ({"logit_bias": {"64": 1}}, openai.BadRequestError, "logit_bias: 64, expected ids of tokens, 0 to 63"),
    ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias: expected numbers by ids"),
    ({"extra_body": {"stop_token_ids": [64]}}, openai.BadRequestError, "stop_token_ids: expected ids"),
    ({"extra_body": {"min_tokens": 200}}, openai.BadRequestError, "min_tokens: 200, expected 0 to 120"),
    ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty: 0"),
    ({"extra_body": {"echo": True}}, openai.BadRequestError, "echo: not supported in chats"),
    ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError, "use_beam_search: not supported"),
    ({"extra_body": {"guided_regex": "a+"}}, openai.BadRequestError, "guided_regex: not supported"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, openai.BadRequestError, "kwargs.tokenize: not"),
    (
      {"extra_body": {"add_generation_prompt": True, "continue_final_message": True}},
      openai.BadRequestError,
      "continue_final_message: expected add_generation_prompt",
    ),
    ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type: expected text"),
    (  # whose letters no library takes for bytes
      {"response_format": {"type": "json_object"}},
      openai.BadRequestError,
      "response_format: (not supported with this tokenizer|llguidance: not installed)",
    ),
    (
      {"response_format": {"type": "json_schema"}},
      openai.BadRequestError,
      "json_schema.schema: expected a JSON schema",
    ),
    ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, openai.BadRequestError, "prompt_logprobs: not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools: not supported"),
    ({"extra_body": {"beam_width": 4}}, openai.BadRequestError, "'beam_width': unknown field"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.APIStatusError, "body: over 4096 bytes"),
  ],
)
def test_requests_that_cannot_be_served_say_why(served, change, error, says):
  with pytest.raises(error, match=says):
    asyncio.run(served.client().chat.completions.create(**{**chat(), **change}))
  assert served.idle()


@pytest.mark.parametrize(
  "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b'{"model": "tiny"}', b'{"messages": "\\ud800"}']
)
def test_malformed_bodies_are_refused(served, body):
  headers = {"Authorization": f"Bearer {KEY}"}
  for path in ("/v1/chat/completions", "/v1/completions"):
    answer = httpx2.post(served.url + path, content=body, headers=headers)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]
  surrogate = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}).encode()
  assert httpx2.post(f"{served.url}/v1/chat/completions", content=surrogate, headers=headers).status_code == 400


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x"])
def test_the_key_is_needed(served, key):
  headers = {"Authorization": f"Bearer {key}"} if key else {}
  for answer in (
    httpx2.get(f"{served.url}/v1/models", headers=headers),
    httpx2.post(f"{served.url}/v1/chat/completions", json=chat(), headers=headers),
  ):
    assert answer.status_code == 401
    assert KEY not in answer.text
  assert served.get("/health").json() == {"status": "ok"}


def test_a_full_queue_and_a_time_limit(engine, policy):
  async def ask(served, count):
    async with served.client() as client:
      calls = (client.chat.completions.create(**chat(), n=4) for _ in range(count))
      return await asyncio.gather(*calls, return_exceptions=True)

  with other(engine, policy, waiting=4) as served:
    found = asyncio.run(ask(served, 12))
    full = [x for x in found if isinstance(x, openai.RateLimitError)]
    assert 0 < len(full) < 12
    assert full[0].response.headers["retry-after"] == "1"
    assert all(len(x.choices) == 4 for x in found if x not in full)
    assert served.idle()
  with other(engine, policy, seconds=0.001) as served:
    (found,) = asyncio.run(ask(served, 1))
    assert found.status_code == 408
    assert served.idle()


def test_requests_that_come_together_begin_together(engine, policy, monkeypatch):
  """An idle engine waits a moment for the others: none of them decodes with idle slots first."""
  begun, inner, told = [], Scheduler.round, []

  def round_(scheduler):
    begun.append(len(scheduler.waiting))
    return inner(scheduler)

  monkeypatch.setattr(Scheduler, "round", round_)
  monkeypatch.setattr("rlpr_jax.serving.loop._APART", 1.0)  # however busy the machine is
  monkeypatch.setattr("rlpr_jax.serving.loop._GATHERED", 60.0)
  loop = Loop(engine, policy.params, most_waiting=64)
  for seed in range(5):
    prompt = Prompt(ids=np.arange(1, 4 + seed, dtype=np.int32))
    loop.submit(Job(prompt, [4], SamplingParams(), Extras(), (), seed, stream=False, tell=told.append))
    time.sleep(0.01)
  assert wait(lambda: len(told) == 5)
  loop.close()
  assert begun[0] == 5


def test_an_engine_that_fails_leaves_nobody_waiting(engine, policy, monkeypatch):
  monkeypatch.setattr(threading, "excepthook", lambda *_: None)  # it is also printed
  with other(engine, policy) as served:
    monkeypatch.setattr(Scheduler, "round", lambda scheduler: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the engine has failed"):
      asyncio.run(served.client().chat.completions.create(**chat()))
    assert served.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="shutting down or has failed"):
      asyncio.run(served.client().chat.completions.create(**chat()))


def start(directory, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "rlpr_jax.serve", f"--model={directory}", "--port=0", *arguments],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
  )  # fmt: skip


def test_the_program_serves_and_finishes_what_runs_when_told_to_stop(policy, tmp_path):
  directory = tmp_path / "model"
  huggingface.save_pretrained(directory, policy.config, policy.params, policy.tokenizer)
  process = start(
    directory, "--name=tiny", "--prompt_limit=24", "--response_limit=120", "--slots=4", "--key_variable=TEST_KEY",
    "--compilation_cache=", TEST_KEY=KEY,
  )  # fmt: skip
  try:
    line = next(line for line in process.stdout if line.startswith("serving tiny at "))
    url = line.split()[-1]

    async def stream():
      async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        pieces = await client.chat.completions.create(**chat(), stream=True, n=4, seed=0, extra_body={"min_p": 0.0})
        reasons = []
        async for piece in pieces:
          if not reasons:
            process.send_signal(signal.SIGTERM)
          reasons.append(piece.choices[0].finish_reason)
        return [reason for reason in reasons if reason]

    # Where some clients put a key, and a body that is none.
    assert httpx2.get(f"{url}/models?api_key={KEY}").status_code == 401
    assert httpx2.get(f"{url}/{KEY}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404
    refused = httpx2.post(f"{url}/completions", content=f"{{{KEY}", headers={"Authorization": f"Bearer {KEY}"})
    assert refused.status_code == 400
    assert KEY not in refused.text
    assert len(asyncio.run(stream())) == 4
    out, errors = process.communicate(timeout=30)
    assert KEY not in out + errors
    assert process.returncode == 0
  finally:
    process.kill()


@pytest.mark.slow
def test_slots_that_do_not_fit_are_called_as_the_flag(policy, tmp_path):
  huggingface.save_pretrained(tmp_path, policy.config, policy.params, policy.tokenizer)
  process = start(tmp_path, "--slots=1000000", "--response_limit=1000000", "--compilation_cache=")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  assert re.search(r"^error: --slots: 1000000 is too much .*; each of --slots takes [\d.]+ MiB$", errors, re.MULTILINE)


def test_a_port_that_is_taken(served):
  port = int(served.url.rsplit(":", 1)[1])
  for other in (port, 70_000):
    with pytest.raises(InputError, match=f"--port {other}: cannot be listened on"):
      listen("127.0.0.1", other)


@pytest.mark.slow
def test_wrong_flags_are_one_line(tmp_path):
  process = start(tmp_path, "--key_variable=NOT_SET_ANYWHERE")
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  assert "NOT_SET_ANYWHERE: not set" in errors.strip().splitlines()[-1]
