"""Supervised steps against sums in float64, packed and not; the program, killed and gone on."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlpr_jax import config as configs
from rlpr_jax import fields
from rlpr_jax import sft as program
from rlpr_jax.errors import InputError
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.training import supervised
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.training.supervised import Demonstration
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, optimizer_step

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  return [
    Demonstration(rng.integers(0, 64, n).tolist(), rng.integers(0, 64, m).tolist())
    for n, m in ((3, 1), (5, 9), (1, 4), (7, 2), (2, 12))
  ]


def test_loss_is_the_mean_over_the_tokens_of_the_responses(policy, batch):
  """In float64, sequence by sequence; the gradient is that of the loss, and packing does not matter."""
  alone = [supervised.pack([Demonstration(prompt, response)], 1, 16) for prompt, response in batch]
  of_rows = jax.jit(lambda params, rows: row_logprobs(policy.model, params, rows, 1.0)[0])

  def logps_of(params):
    """Of each response's tokens."""
    found = zip(batch, alone, strict=True)
    return [of_rows(params, rows)[0, len(prompt) : len(prompt) + len(response)] for (prompt, response), rows in found]

  logps = np.concatenate([np.asarray(x, np.float64) for x in logps_of(policy.params)])
  results = []
  for length, micro_batch_rows in ((14, 5), (30, 2), (64, 1)):
    rows = supervised.pack(batch, 6 if micro_batch_rows == 2 else 5, length)
    params, gradient = jax.tree.map(jnp.copy, policy.params), optax.sgd(-1.0)
    settings = UpdateSettings(1.0, 0.0, 0.0, 0.0, micro_batch_rows)
    (after, _), metrics = optimizer_step(
      UpdateProgram(policy.model, gradient, settings), {}, Trainable(params, gradient.init(params)), rows
    )
    assert float(metrics["answer_loss"]) == pytest.approx(-np.mean(logps), rel=1e-5)
    results.append(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after, policy.params))
  for other in results[1:]:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), results[0], other)

  def loss(params):
    return -jnp.mean(jnp.concatenate(logps_of(params)))

  expected = jax.grad(loss)(policy.params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), results[0], expected)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 4), (4, 4)])
def test_every_epoch_has_every_row_at_most_once_in_another_order(count, size):
  rows = [Demonstration([i], [i]) for i in range(count)]
  stream = supervised.batches(rows, size, seed=1)
  each = max(count // size, 1)
  epochs = [[row.prompt[0] for _ in range(each) for row in next(stream)] for _ in range(3)]
  for epoch in epochs:
    assert len(set(epoch)) == len(epoch) == each * min(size, count)
  assert epochs[0] != epochs[1]
  again = supervised.batches(rows, size, seed=1)
  assert [row.prompt[0] for _ in range(each) for row in next(again)] == epochs[0]


def config(path=""):
  c = configs.default()
  c.compilation_cache = ""
  c.model.embed_dim, c.model.mlp_dim, c.model.num_layers, c.model.num_heads, c.model.head_dim = 16, 32, 1, 2, 8
  c.data.instruction, c.data.prompt_limit, c.rollout.max_response_length = "", 14, 32
  c.training.micro_batch_rows = 4
  c.warm_start.steps, c.warm_start.batch_size, c.warm_start.path = 6, 8, str(path)
  c.log.checkpoint_every, c.log.keep_checkpoints = 2, 10
  return c


ROWS = [{"question": f"{i}+{i}", "response": f"<think>{i}</think><answer> {2 * i} </answer>"} for i in range(12)]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def losses(workdir):
  return [json.loads(line)["sft/loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_program_learns_from_a_file_and_goes_on_where_it_stopped(tmp_path):
  path = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "1" * 30, "response": "x"}])
  program.sft(config(path), tmp_path / "whole")
  whole = losses(tmp_path / "whole")
  assert len(whole) == 6
  assert whole[-1] < whole[0]
  code = (
    "import sys; sys.path.insert(0, '.'); from tests.training.test_supervised import *\n"
    f"program.sft(config({str(path)!r}), pathlib.Path({str(tmp_path / 'killed')!r}))"
  )
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
  deadline = time.monotonic() + 120
  while not (tmp_path / "killed/checkpoints/2").exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  program.sft(config(path), tmp_path / "killed")
  assert losses(tmp_path / "killed") == whole


def test_messages_as_prompts_and_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  messages = [[{"role": "user", "content": row["question"]}] for row in ROWS]
  table = pa.table({"prompt": messages, "completion": [row["response"] for row in ROWS]})
  pa.parquet.write_table(table, tmp_path / "rows.parquet")
  c = config(tmp_path / "rows.parquet")
  tokenizer = program.load_policy(c).tokenizer
  plain, dropped = supervised.load(config(write(tmp_path / "rows.jsonl", ROWS)), tokenizer)
  assert supervised.load(c, tokenizer) == (plain, dropped) == (plain, [])
  prompt, response = plain[1]
  assert tokenizer.decode(prompt) == "<q>1+1<a>"
  assert tokenizer.decode(response) == "<think>1</think><answer> 2 </answer><end>"


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ([{"question": "1", "answer": "2"}], "expected a column response or completion or output"),
    ([{"question": "1", "response": " "}], "row 1, column response: expected non-empty text"),
    (
      [{"question": "1" * 30, "response": "x"}],
      "none of 1 rows is left: 1 prompts are over config.data.prompt_limit",
    ),
    ([{"question": "1", "response": "x" * 40}], "1 responses over config.rollout.max_response_length 32"),
    ([], "expected at least one row"),
  ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, said):
  path = write(tmp_path / "rows.jsonl", rows)
  with pytest.raises(InputError) as error:
    program.sft(config(path), tmp_path / "run")
  assert said in str(error.value)
  assert str(path) in str(error.value)
  assert not list((tmp_path / "run").iterdir())


def test_rows_of_no_use_are_named_in_the_directory(tmp_path):
  rows = [*ROWS[:5], {"question": "1", "response": "\u200b"}, *ROWS[5:]]
  c = config(write(tmp_path / "rows.jsonl", rows))
  c.warm_start.steps, c.data.max_dropped = 1, 0.1
  program.sft(c, tmp_path / "run")
  assert [json.loads(line) for line in (tmp_path / "run/dropped_rows.jsonl").read_text().splitlines()] == [
    {
      "field": "config.warm_start.path",
      "file": str(tmp_path / "rows.jsonl"),
      "row": 6,
      "reason": "response: empty",
      "detail": "column response: expected non-empty text, found '\\u200b'",
    }
  ]


def test_weights_of_demonstrations(tmp_path):
  one, two = write(tmp_path / "one.jsonl", ROWS[:2]), write(tmp_path / "two.jsonl", ROWS[2:4])
  c = config(f"{one},{two}:2")
  tokenizer = program.load_policy(c).tokenizer
  found, _ = supervised.load(c, tokenizer)
  assert [tokenizer.decode(prompt) for prompt, _ in found] == [f"<q>{i}+{i}<a>" for i in (0, 1, 2, 3, 2, 3)]


@pytest.mark.parametrize(("kind", "rate"), [pytest.param("muon", 1e38, marks=pytest.mark.slow), ("adam", 1e38)])
def test_a_rate_that_is_too_high_leaves_no_parameters_that_are_not_finite(tmp_path, monkeypatch, kind, rate):
  monkeypatch.setitem(fields.LARGEST, float, 1e38)  # or the highest ones would be refused
  c = config(write(tmp_path / "rows.jsonl", ROWS))
  c.warm_start.optimizer, c.warm_start.learning_rate, c.warm_start.adam_learning_rate = kind, rate, rate
  c.warm_start.steps, c.log.checkpoint_every = c.guards.max_skipped, 1
  with pytest.raises(InputError, match=r"checkpoints: the parameters of step \d+ are not finite and not saved"):
    program.sft(c, tmp_path / "run")
  for directory in (tmp_path / "run/checkpoints").iterdir():
    _, params = restore_params(tmp_path / "run", int(directory.name), program.load_policy(c).trained)
    assert np.isfinite(optax.tree.norm(params))


def test_steps_are_needed(tmp_path):
  c = config()
  c.warm_start.steps = 0
  with pytest.raises(InputError, match=r"config\.warm_start\.steps: 0"):
    program.sft(c, tmp_path)
