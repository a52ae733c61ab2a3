"""Evaluations from questions to figures: with our own engine and with endpoints, interrupted, judged, compared."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from starlette.responses import JSONResponse

from rlpr_jax import evaluate as program
from rlpr_jax import huggingface
from rlpr_jax import train as training
from rlpr_jax.errors import InputError, MachineError
from rlpr_jax.evaluation import benchmarks, responses
from rlpr_jax.evaluation.config import benchmark, default, model, validate
from rlpr_jax.grading import mathverify
from rlpr_jax.judging.judge import JudgeItem, conversation
from tests.chat_server import completion, serving
from tests.tiny_run import tiny

QUESTIONS = [("1+1", "2", "small"), ("2+3", "5", "small"), ("9+8", "17", "large"), ("7*7", "49", "large")]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(policy, tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  huggingface.save_pretrained(path, policy.config, policy.params, policy.tokenizer)
  return path


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.jsonl"
  rows = [{"question": question, "answer": answer, "source": source} for question, answer, source in QUESTIONS]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def recipe(file, samples=3, **by_name):
  c = default()
  c.compilation_cache = ""
  c.benchmarks.mine = benchmark(path=str(file), samples=samples)
  for name, settings in by_name.items():
    c.models[name] = settings
  return c


def ours(directory, **changes):
  return model(path=str(directory), slots=4, prompt_limit=16, max_tokens=12, decode_steps=4, instruction="", **changes)


def theirs(url, **changes):
  return model(url=url, name="m", instruction="", **changes)


def read(workdir):
  samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
  return samples, json.loads((workdir / "summary.json").read_text())


def answers(*by_question):
  """A server's replies: the answers of each question in turns."""
  asked: dict[str, int] = {}

  def reply(body, _):
    question = body["messages"][-1]["content"]
    place = next(i for i, row in enumerate(QUESTIONS) if row[0] == question)
    turn = asked[question] = asked.get(question, -1) + 1
    options = by_question[place]
    return f"<think> so </think> <answer> {options[turn % len(options)]} </answer>"

  return reply


def test_our_engine_from_questions_to_a_page(directory, file, tmp_path):
  settings = recipe(file, policy=ours(directory), warm=ours(directory, temperature=0.5, stop=("1",)))
  program.evaluate(settings, tmp_path / "out")
  samples, summary = read(tmp_path / "out")
  assert len(samples) == 2 * 4 * (3 + 1)
  for name in ("policy", "warm"):
    for mode, count in (("sampled", 3), ("greedy", 1)):
      rows = [row for row in samples if (row["model"], row["mode"]) == (name, mode)]
      figures = summary["models"][name]["mine"][mode]
      assert [row["sample"] for row in rows] == list(range(count)) * 4
      assert figures["rule"]["avg"] == pytest.approx(np.mean([row["rule"] for row in rows]))
      assert figures["tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
      assert figures["cut_off"] == pytest.approx(np.mean([not row["finished"] for row in rows]))
      assert sum(figures["found_by"].values()) == len(rows)
      assert {name: row["questions"] for name, row in figures["categories"].items()} == {"large": 2, "small": 2}
  texts = {name: [row["text"] for row in samples if row["model"] == name] for name in ("policy", "warm")}
  assert texts["policy"] != texts["warm"]
  assert not any("1" in text for row, text in zip(samples[16:], texts["warm"], strict=True) if row["mode"] == "sampled")
  assert {row["model"] for row in summary["differences"]} == {"warm"}
  page = (tmp_path / "out" / "summary.md").read_text()
  assert all(text in page for text in ("## policy", "## warm", "| mine | sampled | 4 | 3 |", "## Differences"))
  assert (tmp_path / "out" / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_evaluation_goes_on_and_a_larger_one_does_only_what_is_new(
  directory, file, tmp_path, monkeypatch
):
  settings, added = recipe(file, policy=ours(directory)), []
  honest = responses.Store.add

  def add(store, key, found):
    if len(added) == 3:
      raise KeyboardInterrupt
    added.append(key)
    honest(store, key, found)

  program.evaluate(settings, tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(responses.Store, "add", add)
    with pytest.raises(KeyboardInterrupt):
      program.evaluate(settings, tmp_path / "cut")
  with (tmp_path / "cut" / "responses.jsonl").open("a") as half:
    half.write('{"key": "5f')  # killed while it wrote
  monkeypatch.setattr(responses.Store, "add", lambda store, key, found: (added.append(key), honest(store, key, found)))
  program.evaluate(settings, tmp_path / "cut")
  assert len(added) == len(set(added)) == 8
  assert read(tmp_path / "cut") == read(tmp_path / "whole")

  settings.benchmarks.mine.samples = 2  # other samples; the greedy ones are there
  program.evaluate(settings, tmp_path / "cut")
  assert len(added) == 12
  settings.models.policy.slots = 2  # only faster or slower
  program.evaluate(settings, tmp_path / "cut")
  assert len(added) == 12


@pytest.mark.slow
def test_a_kill_changes_nothing(directory, file, tmp_path):
  path = tmp_path / "recipe.py"
  path.write_text(f"""
from rlpr_jax.evaluation.config import benchmark, default, model
def get_config():
  c = default()
  c.models.policy = model(path={str(directory)!r}, slots=2, prompt_limit=16, max_tokens=200, decode_steps=1)
  c.models.policy.instruction = ""
  c.benchmarks.mine = benchmark(path={str(file)!r}, samples=40)
  return c
""")

  def start(workdir):
    command = [sys.executable, "-m", "rlpr_jax.evaluate", f"--config={path}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT)

  assert start(tmp_path / "whole").wait() == 0
  process, written = start(tmp_path / "cut"), tmp_path / "cut" / "responses.jsonl"
  while not written.exists() or not written.stat().st_size:
    assert process.poll() is None
  process.kill()
  process.wait()
  assert not (tmp_path / "cut" / "summary.json").exists()
  assert start(tmp_path / "cut").wait() == 0
  assert read(tmp_path / "cut") == read(tmp_path / "whole")


def test_figures_by_hand(file, tmp_path):
  """Four questions, four samples: all right, half right, one right, none; greedy: the first turn."""
  with serving(answers(["2"], ["5", "6"], ["1", "17", "2", "3"], ["0", "1", "1", "2"])) as server:
    settings = recipe(file, 4, m=theirs(server.url, concurrency=1))
    settings.greedy = False
    program.evaluate(settings, tmp_path / "out")
  _, summary = read(tmp_path / "out")
  rule = summary["models"]["m"]["mine"]["sampled"]["rule"]
  assert rule["avg"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
  assert rule["pass"] == {
    "1": pytest.approx(0.4375),
    "2": pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4),
    "4": pytest.approx(0.75),
  }
  assert rule["majority"] == pytest.approx((1 + 1 + 0 + 0) / 4)  # of a tie the first seen
  assert rule["low"] < rule["avg"] < rule["high"]
  assert all(body["temperature"] == 1.0 and body["max_tokens"] == 3072 for body in server.bodies)
  assert len({body["seed"] for body in server.bodies}) == 16


def test_a_judge_decides_where_the_rule_says_wrong(file, tmp_path):
  judged = []

  def judge(body, _):
    judged.append(body["messages"][-1]["content"])
    if "fifty minus one" in judged[-1]:
      return "They are equal.\nJudgement: correct"
    return "Judgement: maybe" if "seventh prime" in judged[-1] else "Judgement: incorrect"

  with (
    serving(answers(["2"], ["five and a half"], ["the seventh prime"], ["fifty minus one"])) as server,
    serving(judge) as other,
  ):
    settings = recipe(file, 2, m=theirs(server.url))
    settings.judge.update(url=other.url, model="j")
    program.evaluate(settings, tmp_path / "out")
    samples, summary = read(tmp_path / "out")
    assert all("1+1" not in text for text in judged)
    assert {row["reference"]: row.get("judge", "not asked") for row in samples} == {
      "2": "not asked",
      "5": False,
      "17": None,
      "49": True,
    }
    figures = summary["models"]["m"]["mine"]["sampled"]
    assert figures["rule"]["avg"] == 0.25
    assert figures["judge"]["avg"] is None  # a quarter is unjudged
    assert figures["judge"]["bounds"] == [0.5, 0.75]
    assert figures["unjudged"] == 2
    assert summary["judge"]["requests"] == other.requests
    settings.judge.when = "always"
    before = other.requests
    program.evaluate(settings, tmp_path / "out")
    asked = {text for text in judged[before:] if "seventh prime" not in text}  # what was not understood is asked again
    assert asked == {conversation(JudgeItem("1+1", "2", "2"))[0]["content"]}
    assert re.search(r"by judge", (tmp_path / "out" / "summary.md").read_text())
    assert any("response_format" in body for body in other.bodies)
    before, settings.judge.response_format = other.requests, "text"
    program.evaluate(settings, tmp_path / "other")
    assert other.requests > before
    assert not any("response_format" in body for body in other.bodies[before:])


def test_comparisons_that_took_too_long_are_shown(file, tmp_path, monkeypatch, capsys):
  def late(answer, reference):
    mathverify.process.timeouts += 1
    return False

  monkeypatch.setattr(mathverify.process, "ask", late)
  rows = [{"problem": "add", "answer": "\\sum_{k=1}^{7} k", "subject": "s", "level": 1, "unique_id": "1"}]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  said = "comparisons of answer and reference took too long"
  with serving(lambda *_: "<answer> \\sum_{k=1}^{8} k </answer>") as server:
    settings = recipe(file, 2, m=theirs(server.url))
    del settings.benchmarks.mine
    settings.benchmarks.math500 = benchmark(path=str(file), samples=2)
    for count in (3, 3):  # two samples and a greedy one; of each run its own
      program.evaluate(settings, tmp_path / "out")
      assert read(tmp_path / "out")[1]["timeouts"] == count
      assert f"{count} {said}; they are wrong by rule" in (tmp_path / "out" / "summary.md").read_text()
      assert f"{count} comparisons of mathematical answers took too long" in capsys.readouterr().out
    server.reply = lambda *_: "<answer> \\sum_{k=1}^{7} k </answer>"
    program.evaluate(settings, tmp_path / "other")
  assert read(tmp_path / "other")[1]["timeouts"] == 0
  assert said not in (tmp_path / "other" / "summary.md").read_text()


def test_an_endpoint_that_dies_is_asked_again_for_what_is_missing(file, tmp_path):
  """Also of a question some of whose samples are there."""
  with serving(lambda body, number: completion("<answer>2</answer>") if number < 6 else server.die() or 9.0) as server:
    settings = recipe(file, 2, m=theirs(server.url, concurrency=1, time_limit=0.3, attempts=1))
    with pytest.raises(MachineError, match=r"of 8 questions got no response .* the same command asks again"):
      program.evaluate(settings, tmp_path / "out")
  assert not (tmp_path / "out" / "summary.json").exists()
  with serving(lambda body, _: "<answer>2</answer>") as server:
    settings.models.m.url = server.url
    program.evaluate(settings, tmp_path / "out")
    assert server.requests == 4 * (2 + 1) - 5


def test_sizes_that_cannot_be_are_called_as_in_the_config(directory, file, tmp_path):
  settings = recipe(file, small=ours(directory))
  for changes, says in (
    (
      {"slots": 10**6, "max_tokens": 10**6},
      r"small\.slots: 1000000 is too much .* each of config\.models\.small\.slots",
    ),
    ({"slots": 0}, r"small\.slots: 0, expected"),
  ):
    settings.models.small.update(changes)
    with pytest.raises(InputError, match=rf"^config\.models\.{says}"):
      program.evaluate(settings, tmp_path / "out")


def test_prompts_over_the_limit_are_counted_and_leave_no_figure(directory, file, tmp_path):
  settings = recipe(file, 1, policy=ours(directory))
  settings.models.policy.prompt_limit = 4
  program.evaluate(settings, tmp_path / "out")
  samples, summary = read(tmp_path / "out")
  figures = summary["models"]["policy"]["mine"]["sampled"]
  assert (figures["refused"], figures["rule"]["avg"]) == (4, None)
  assert not any(row["rule"] for row in samples)


@pytest.mark.slow
def test_the_newest_checkpoint_of_a_run_as_it_was_trained(file, tmp_path):
  """Its template and instruction are the run's own; another checkpoint is another model."""
  config = tiny()
  config.steps, config.warm_start.steps, config.evaluation.prompts, config.log.keep_checkpoints = 1, 0, 0, 9
  config.data.template, config.data.instruction = "answer_only", "sum"
  training.train(config, tmp_path / "run")
  settings = recipe(file, 1, policy=model(path=str(tmp_path / "run"), slots=4, prompt_limit=32, max_tokens=4))
  program.evaluate(settings, tmp_path / "out")
  asked = responses.open_model(settings.models.policy)
  assert asked.source.step == 1
  question = benchmarks.load("own", str(file))[0][0]
  assert asked.messages(question) == [{"role": "system", "content": "sum"}, {"role": "user", "content": "1+1"}]
  tasks = [responses.Task("mine", question, "sampled", 1)]
  before = responses.keys(asked, 0, tasks)
  config.steps = 2
  training.train(config, tmp_path / "run")
  assert responses.keys(responses.open_model(settings.models.policy), 0, tasks).keys() != before.keys()
  settings.models.policy.step = 1
  assert responses.keys(responses.open_model(settings.models.policy), 0, tasks).keys() == before.keys()
  settings.models.policy.step = 7
  with pytest.raises(InputError, match="no checkpoint of step 7"):
    program.evaluate(settings, tmp_path / "out")


def test_other_files_are_another_model(directory, file, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)  # with its times
  question = benchmarks.load("own", str(file))[0][0]

  def key(path):
    return next(iter(responses.keys(responses.open_model(ours(path)), 0, [responses.Task("m", question, "greedy", 1)])))

  assert key(copy) == key(directory)
  (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
  assert key(copy) != key(directory)


def test_the_first_model_is_what_others_are_compared_with(file, tmp_path):
  with serving(answers(["2"], ["5"], ["1"], ["2"])) as server:
    settings = recipe(file, 1, zeta=theirs(server.url), alpha=theirs(server.url, temperature=0.5))
    program.evaluate(settings, tmp_path / "out")
  _, summary = read(tmp_path / "out")
  assert {(row["model"], row["base"]) for row in summary["differences"]} == {("alpha", "zeta")}
  assert summary["averages"]["zeta"]["sampled"] == {"benchmarks": 1, "rule": 0.5, "judge": None}


def test_a_judge_that_is_not_there_leaves_all_unjudged(file, tmp_path):
  with serving(answers(["2"], ["5"], ["1"], ["2"])) as server:
    settings = recipe(file, 1, m=theirs(server.url))
    settings.judge.update(url="http://127.0.0.1:9/v1", model="j", attempts=1, time_limit=0.5)
    program.evaluate(settings, tmp_path / "out")
  samples, summary = read(tmp_path / "out")
  figures = summary["models"]["m"]["mine"]["sampled"]
  assert (figures["rule"]["avg"], figures["judge"]["avg"], figures["unjudged"]) == (0.5, None, 2)
  assert figures["judge"]["bounds"] == [0.5, 1.0]
  assert all(row["judge"] is None and row["judge_why"] for row in samples if not row["rule"])


def refusing(questions):
  def reply(body, _):
    if body["messages"][-1]["content"] in questions:
      return JSONResponse({"error": {"message": "filtered"}}, 400)
    return "<answer>2</answer>"

  return reply


def test_questions_that_an_endpoint_refuses_are_counted_and_asked_again(file, tmp_path, capsys):
  """A quarter of them leaves no figure."""
  with serving(refusing(["7*7"])) as server:
    settings = recipe(file, 2, m=theirs(server.url))
    settings.judge.update(url=server.url, model="j")
    program.evaluate(settings, tmp_path / "out")
    summary = read(tmp_path / "out")[1]
    figures = summary["models"]["m"]["mine"]["sampled"]
    assert (figures["refused"], figures["cut_off"], figures["rule"]["avg"]) == (2, 0.0, None)
    assert (figures["judge"]["avg"], summary["averages"]["m"]["sampled"]["rule"]) == (None, None)
    assert "m, mine, sampled: - by rule, - by judge (4 unjudged), 2 of 8 samples refused" in capsys.readouterr().out
    assert "| mine | sampled | 4 | 2 | - | -" in (tmp_path / "out" / "summary.md").read_text()
    server.reply, before = refusing([]), server.requests
    settings.judge.update(url="", model="")
    program.evaluate(settings, tmp_path / "out")
    assert server.requests == before + 3
  figures = read(tmp_path / "out")[1]["models"]["m"]["mine"]["sampled"]
  assert (figures["refused"], figures["rule"]["avg"]) == (0, 0.25)


def test_a_few_refused_questions_are_wrong(tmp_path):
  path = tmp_path / "many.jsonl"
  rows = [{"question": f"{i} + 0", "answer": "2" if i < 20 else "3"} for i in range(40)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with serving(refusing(["0 + 0", "1 + 0"])) as server:
    program.evaluate(recipe(path, 1, m=theirs(server.url)), tmp_path / "out")
  figures = read(tmp_path / "out")[1]["models"]["m"]["mine"]["sampled"]
  assert (figures["refused"], figures["rule"]["avg"]) == (2, pytest.approx(18 / 40))


@pytest.mark.parametrize(
  ("field", "said"),
  [
    ("max_tokens", "max_tokens: 3072, expected 1 to 2048"),  # our own server
    ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),  # OpenAI's o1 and others
    ("max_tokens", "'max_tokens' or 'max_completion_tokens' is too large: 3072. This model's maximum context length is"
                   " 2048 tokens and your request has 21 input tokens."),  # vLLM
  ],
)  # fmt: skip
def test_settings_that_an_endpoint_refuses_end_the_evaluation_in_its_words(file, tmp_path, field, said):
  def reply(body, _):
    has_limit = "max_tokens" in body or "max_completion_tokens" in body
    refused = {"temperature": body["temperature"] == 0, "max_tokens": has_limit}[field]
    return JSONResponse({"error": {"message": said}}, 400) if refused else "<answer>2</answer>"

  with serving(reply) as server:
    with pytest.raises(InputError, match=rf"config\.models\.m: .*max_tokens 3072 .*{re.escape(said)}"):
      program.evaluate(recipe(file, 2, m=theirs(server.url)), tmp_path / "out")
    assert server.requests < 60
  assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"models.policy.stop": ("",)}, "config.models.policy.stop"),
    ({"models.policy.dtype": "int4"}, r"config.models.policy.dtype: 'int4'"),
    ({"models.policy.url": "http://x/v1"}, "config.models.policy: expected a path, or the url"),
    ({"models.policy.path": "", "models.policy.url": "http://x/v1"}, "config.models.policy.name: missing"),
    ({"models.policy.path": "", "models.policy.url": "http://x/v1", "models.policy.name": "m",
      "models.policy.top_k": 4}, "top_k: 4, an endpoint is not asked for that"),
    ({"models.policy.top_p": 1.5}, "config.models.policy.top_p: 1.5"),
    ({"benchmarks.mine.path": ""}, "config.benchmarks.mine.path: missing"),
    ({"benchmarks.mine.limit": -1}, "config.benchmarks.mine.limit: -1"),
    ({"judge.url": "http://x/v1"}, "config.judge: expected both"),
    ({"judge.when": "never"}, "config.judge.when: 'never'"),
    ({"judge.response_format": "xml"}, "config.judge.response_format: 'xml', expected json_schema or text"),
    ({"resamples": 3}, "config.resamples: 3"),
  ],
)  # fmt: skip
def test_settings_that_cannot_be(file, change, says):
  settings = recipe(file, policy=ours("somewhere"))
  settings.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=says):
    validate(settings)


NUMBERS = [
  (f"{group}.{name}", value)
  for group, fields in (
    ("", default()), ("judge", default().judge), ("models.policy", model()), ("benchmarks.mine", benchmark())
  )
  for name, value in fields.items()
  if type(value) in (int, float)
]  # fmt: skip


@pytest.mark.parametrize(("field", "default"), NUMBERS)
def test_numbers_that_cannot_be(file, field, default):
  for value in (math.nan, math.inf, -math.inf, -2.0, 1e300, 2**63) if type(default) is float else (-2, 2**31, 2**63):
    if field == ".seed" and value == 2**31:
      continue
    settings = recipe(file, policy=ours("somewhere"))
    settings.update_from_flattened_dict({field.removeprefix("."): value})
    with pytest.raises(InputError, match=rf"^config\.{field.removeprefix('.')}: \S+, expected [^\n]+$"):
      validate(settings)


def test_settings_that_nobody_reads(file):
  settings = recipe(file, policy=ours("somewhere"))
  settings.models.policy.unlock()
  settings.models.policy.beams = 4
  with pytest.raises(InputError, match=r"config.models.policy.beams: unknown"):
    validate(settings)
  for change, named in (({"judge": {"modle": "x"}}, "config.judge.modle"), ({"resampels": 10}, "config.resampels")):
    misspelt = recipe(file, policy=ours("somewhere"))
    misspelt.update(change)
    with pytest.raises(InputError, match=f"{named}: unknown"):
      validate(misspelt)
  for field in ("models", "benchmarks"):
    empty = recipe(file, policy=ours("somewhere"))
    empty[field] = {}
    with pytest.raises(InputError, match=f"config.{field}: empty"):
      validate(empty)
