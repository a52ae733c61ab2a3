"""The server with other people's clients, the newest of the index, each installed into a place of its own."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import httpx2
import numpy as np
import pytest
import uvicorn
from flax import nnx

from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.serving.app import Limits, create_app
from rlpr_jax.serving.loop import Loop

pytestmark = pytest.mark.slow
SHAPES = Shapes(
  slots=8,
  prompt_limit=256,
  max_response_length=64,
  suffix_length=1,
  steps=4,
  prefill_rows=4,
  score_rows=4,
  insert_rows=4,
)


@pytest.fixture(scope="module")
def url(policy):
  """Of a server of a random policy; each letter is a token."""
  settings = DecodeSettings(SHAPES.steps, (policy.tokenizer.eos_token_id,))
  engine = Engine(Device(policy.model, settings, SHAPES), policy.tokenizer, "think", baseline_prefix="bare")
  app = create_app(engine, Loop(engine, policy.params, 64), "tiny", Limits(2**20, 300.0))
  server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None))
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  host, port = server.servers[0].sockets[0].getsockname()
  yield f"http://{host}:{port}"
  server.should_exit = True
  thread.join()


def run(directory, packages, script, url, *arguments):
  """What a script prints last, as JSON, in an environment that has some packages."""
  subprocess.run([sys.executable, "-m", "venv", directory / "own"], check=True)
  python = directory / "own" / "bin" / "python"
  install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
  done = subprocess.run(install, capture_output=True, text=True, check=False)
  if done.returncode:
    pytest.skip(f"{packages}: cannot be installed ({done.stderr.strip().splitlines()[-1]})")
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI"))}
  environment |= {"URL": url, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hub")}
  environment |= {"LOCAL_API_KEY": "none", "LOCAL_BASE_URL": f"{url}/v1", "INSPECT_DISPLAY": "none"}
  command = [python, "-c", textwrap.dedent(script), *map(str, arguments)]
  done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment, check=False)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.strip().splitlines()[-1])


def said(url, **fields):
  """What the server answers by itself."""
  asked = {"messages": [{"role": "user", "content": "1+2"}], "max_tokens": 12, "seed": 5, **fields}
  return httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=300).json()["choices"][0]["message"]["content"]


def test_openai(url, tmp_path):
  script = """
    import json, os, openai
    client = openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "1+2"}], "max_tokens": 12, "seed": 5}
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=5)
    with client.chat.completions.stream(**chat) as stream:
      final = stream.get_final_completion()
    echoed = client.completions.create(model="tiny", prompt="12", echo=True, logprobs=2, max_tokens=1)
    print(json.dumps([whole.choices[0].message.content, final.choices[0].message.role,
      final.choices[0].message.content, len(whole.choices[0].logprobs.content[0].top_logprobs),
      len(echoed.choices[0].logprobs.token_logprobs), client.models.retrieve("tiny").id]))
  """
  text = said(url)
  assert run(tmp_path, ["openai"], script, url) == [text, "assistant", text, 5, 3, "tiny"]


def test_litellm(url, tmp_path):
  script = """
    import json, os, litellm
    chat = {"model": "openai/tiny", "api_base": os.environ["URL"] + "/v1", "api_key": "none", "max_tokens": 12,
      "seed": 5, "messages": [{"role": "user", "content": "1+2"}]}
    pieces = litellm.completion(**chat, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    chat["model"] = "hosted_vllm/tiny"
    print(json.dumps([litellm.completion(**chat, frequency_penalty=0).choices[0].message.content, streamed]))
  """
  assert run(tmp_path, ["litellm"], script, url) == [said(url)] * 2


def test_langchain(url, tmp_path):
  script = """
    import json, os
    from langchain_openai import ChatOpenAI
    model = ChatOpenAI(model="tiny", base_url=os.environ["URL"] + "/v1", api_key="none", max_tokens=12, seed=5,
      temperature=1.0)
    print(json.dumps([model.invoke("1+2").content, "".join(piece.content for piece in model.stream("1+2"))]))
  """
  assert run(tmp_path, ["langchain-openai"], script, url) == [said(url)] * 2


def test_inspect(url, tmp_path):
  script = """
    import json
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate
    task = Task(dataset=[Sample(input="1+2", target="3")], solver=generate(), scorer=includes())
    (log,) = eval(task, model="openai-api/local/tiny", max_tokens=12, seed=5, log_dir="logs", display="none")
    print(json.dumps([log.status, log.samples[0].output.completion]))
  """
  assert run(tmp_path, ["inspect-ai", "openai"], script, url) == ["success", said(url)]


ROWS = [
  {"question": f"{a}+{b}=", "answer": 0, "choices": [f"{a + b}", f"{a * b + 10}", f"{b}"]}
  for a, b in ((1, 2), (3, 4), (5, 7), (9, 9))
]


def test_lm_eval(url, tmp_path, policy):
  """A task of log-likelihoods and one of texts; and the texts of a chat."""
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
  tasks = tmp_path / "tasks"
  tasks.mkdir()
  (tasks / "choices.yaml").write_text(
    f"task: choices{common}output_type: multiple_choice\ndoc_to_target: answer\n"
    'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
  )
  (tasks / "texts.yaml").write_text(
    f'task: texts{common}output_type: generate_until\ndoc_to_target: "{{{{choices[0]}}}}"\n'
    "generation_kwargs: {until: [z], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n"
  )
  script = """
    import json, os, sys
    import lm_eval
    from lm_eval.tasks import TaskManager
    url, manager = os.environ["URL"], TaskManager(include_path=sys.argv[1], include_defaults=False)
    def evaluate(model, path, tasks, **options):
      found = lm_eval.simple_evaluate(
        model=model,
        model_args={"model": "tiny", "base_url": url + path, "num_concurrent": 2, "max_retries": 1, **options},
        tasks=tasks, task_manager=manager, log_samples=True, apply_chat_template="chat" in model)
      return {name: [row["resps"] for row in rows] for name, rows in found["samples"].items()}
    plain = evaluate("local-completions", "/v1/completions", ["choices", "texts"], tokenizer_backend="remote",
      batch_size=4)
    chat = evaluate("local-chat-completions", "/v1/chat/completions", ["texts"])
    print(json.dumps([plain, chat]))
  """
  plain, chat = run(tmp_path, ["lm-eval[api]"], script, url, tasks)
  decoder = nnx.merge(policy.model, policy.params)
  for row, found in zip(ROWS, plain["choices"], strict=True):
    for choice, ((value, _),) in zip(row["choices"], found, strict=True):
      ids, start = policy.tokenizer.encode(row["question"] + choice), len(row["question"])
      logits = np.asarray(decoder.logits(decoder.prefill(np.array([ids], np.int32))[0])[0], np.float64)
      logps = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
      expected = sum(logps[place - 1, ids[place]] for place in range(start, len(ids)))
      assert value == pytest.approx(expected, abs=1e-3)
  for row, ((text,),) in zip(ROWS, chat["texts"], strict=True):
    messages = [{"role": "user", "content": row["question"]}]
    assert text == said(url, messages=messages, temperature=0, stop=["z"], seed=1234)
  assert len(plain["texts"]) == len(ROWS)
