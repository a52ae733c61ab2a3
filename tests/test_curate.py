"""The program `rlpr_jax.curate`: files in, files out, a judge that fails, runs that are killed."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.responses import JSONResponse

from rlpr_jax.curate import Options, curate, read_benchmark, read_scores, score
from rlpr_jax.curation.checks import Score
from rlpr_jax.data.sources import Example, load_examples
from rlpr_jax.errors import InputError, MachineError
from rlpr_jax.judging.client import Endpoint
from tests.chat_server import serving

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("Ada", "Bob", "Cai", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea", "Max", "Ned", "Ola", "Pam",
         "Quy", "Ray", "Sue", "Tom")  # fmt: skip


def questions(count):
  """Questions that are not alike."""
  return [
    f"{NAMES[i % 20]} has {i} {NAMES[i // 20]} coins and wants {i * i}. Which tax does she pay?" for i in range(count)
  ]


def write(path, texts, **columns):
  rows = [
    {"question": text, "answer": f"tax {i}", **{name: values[i] for name, values in columns.items()}}
    for i, text in enumerate(texts)
  ]
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return path


def dropped(out):
  return {row["row"]: row["reason"] for row in map(json.loads, (out / "dropped.jsonl").read_text().split("\n")[:-1])}


def rate(body, _=0):
  """As much reasoning as the number of coins modulo 5; 7 coins are unclear, 8 are mathematics."""
  coins = int(re.search(r"has (\d+)", body["messages"][0]["content"])[1])
  return (
    f"So.\nMathematics: {'yes' if coins == 8 else 'no'}\nUnambiguous: {'no' if coins == 7 else 'yes'}\n"
    f"Reasoning: {coins % 5}"
  )


@pytest.fixture
def options(tmp_path):
  return Options(write(tmp_path / "in.jsonl", questions(40), category=["Law"] * 40), tmp_path / "out")


def judged_by(options, server, **settings):
  endpoint = Endpoint(server.url, "judge", **{"pause": 0.01, "time_limit": 5.0, "concurrency": 4, **settings})
  return dataclasses.replace(options, judge=endpoint)


def test_what_is_written_is_what_training_reads(options, capsys):
  curate(options)
  path = options.out / "train.parquet"
  before, after = load_examples(options.path), load_examples(path)
  assert [(e.messages, e.reference, e.source) for e in after] == [(e.messages, e.reference, e.source) for e in before]
  rows = pq.read_table(path).to_pylist()
  assert rows[3] == {
    "data_source": "Law",
    "prompt": [{"role": "user", "content": questions(4)[3]}],
    "ability": "Law",
    "reward_model": {"style": "rule", "ground_truth": "tax 3"},
    "extra_info": {"index": 3, "row": 4, "split": "train", "reasoning": None},
  }
  assert (options.out / "dropped.jsonl").read_text() == ""
  record = json.loads((options.out / "curation.json").read_text())
  assert record["finished"]
  assert record["counts"] == {"read": 40, "dropped": {}, "unjudged": 0, "kept": 40}
  assert "40 of 40 kept" in capsys.readouterr().out


def test_rows_keep_their_own_data_source(tmp_path, capsys):
  """As the RLPR training set has it; a row that does not say has another column's, and without one the file's stem."""
  own = ["WebInstruct", "Textbooks", None, "", "WebInstruct"]
  rows = [
    {
      "data_source": source,
      "prompt": [{"role": "user", "content": text}],
      "ability": "Law",
      "reward_model": {"style": "rule", "ground_truth": f"tax {i}"},
      "extra_info": {"index": i},
      "source": "a page" if i == 4 else None,
      "category": "Taxes" if i in (1, 3) else None,
    }
    for i, (source, text) in enumerate(zip(own, questions(5), strict=True))
  ]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rlpr_train.parquet")
  expected = ["WebInstruct", "Textbooks", "rlpr_train", "Taxes", "WebInstruct"]
  curate(Options(tmp_path / "rlpr_train.parquet", tmp_path / "out"))
  written = tmp_path / "out" / "train.parquet"
  assert [row["data_source"] for row in pq.read_table(written).to_pylist()] == expected
  assert [example.source for example in load_examples(written)] == expected
  curate(Options(written, tmp_path / "again"))
  assert [row["data_source"] for row in pq.read_table(tmp_path / "again" / "train.parquet").to_pylist()] == expected


def test_dropped_rows_are_kept_with_their_reasons(tmp_path, options, capsys):
  texts = questions(30)
  texts[5] = texts[2].upper()
  texts[9] = "How many integers $n$ divide $60$?"
  write(options.path, texts)
  benchmark = tmp_path / "held_out.json"
  benchmark.write_text(json.dumps([{"Question": texts[11]}, {"Question": "Else?"}]))
  curate(dataclasses.replace(options, benchmarks=(benchmark,), ngram=8))
  assert dropped(options.out) == {6: "duplicate", 10: "mathematics", 12: "in a benchmark"}
  assert [e.reference for e in load_examples(options.out / "train.parquet")] == [
    f"tax {i}" for i in range(30) if i not in (5, 9, 11)
  ]
  page = (options.out / "report.html").read_text()
  for text in ("held_out question 1", "of row 3", "27", "In a benchmark", "in.jsonl"):
    assert text in page
  assert "1 duplicate" in capsys.readouterr().out


def test_what_questions_say_cannot_become_html(options):
  texts = questions(20)
  texts[1] = texts[2] = "<script>alert(1)</script> &amp; {curly} </style>"
  write(options.path, texts)
  curate(options)
  page = (options.out / "report.html").read_text()
  assert "<script" not in page
  assert "&lt;script&gt;" in page


def test_a_judge_drops_what_is_easy_unclear_or_mathematics(options, capsys):
  with serving(rate) as server:
    curate(judged_by(options, server))
  expected = {i + 1: "too easy" for i in range(40) if i % 5 < 2}
  expected |= {8: "unclear to the judge", 9: "mathematics to the judge"}
  assert dropped(options.out) == expected
  info = [row["extra_info"]["reasoning"] for row in pq.read_table(options.out / "train.parquet").to_pylist()]
  assert info == [i % 5 for i in range(40) if i % 5 >= 2 and i not in (7, 8)]
  assert "judge: 40 requests, 0 ratings from disk, 400 prompt and 200 completion tokens" in capsys.readouterr().out
  assert "4 of 4" in (options.out / "report.html").read_text()


@pytest.mark.parametrize("unjudged", ["keep", "drop"])
def test_rows_without_a_rating(options, unjudged):
  def reply(body, number):
    return "I do not know." if "has 12 " in body["messages"][0]["content"] else rate(body)

  with serving(reply) as server:
    curate(dataclasses.replace(judged_by(options, server), unjudged=unjudged))
  assert dropped(options.out).get(13) == {"keep": None, "drop": "unjudged"}[unjudged]
  assert json.loads((options.out / "curation.json").read_text())["counts"]["unjudged"] == 1


@pytest.mark.parametrize(("status", "kind"), [(404, InputError), (503, MachineError)])
def test_a_judge_that_dies_costs_nothing_that_it_has_said(options, status, kind):
  def reply(body, number):
    return rate(body) if number <= 15 else JSONResponse({"error": {"message": "gone"}}, status)

  with serving(reply) as server:
    with pytest.raises(kind, match=r"--judge_url: 15 of 40 rows rated, then given up .*; the same command goes"):
      curate(judged_by(options, server))
    assert not (options.out / "train.parquet").exists()
    server.reply, before = rate, server.requests
    curate(judged_by(options, server))
    assert server.requests - before == 25
  assert len(dropped(options.out)) == 18


@pytest.mark.slow
def test_a_killed_run_asks_only_what_is_missing(options):
  with serving(rate) as server:
    server.delay = 0.1
    command = [
      sys.executable, "-m", "rlpr_jax.curate", f"--path={options.path}", f"--out={options.out}",
      f"--judge_url={server.url}", "--judge_model=judge", "--judge_concurrency=2",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while server.requests < 12 and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = server.requests
    assert 12 <= before <= 20
    assert sorted(path.name for path in options.out.iterdir()) == ["curation.json", "ratings"]
    server.delay = 0.0
    curate(judged_by(options, server))
    assert 40 <= server.requests <= 42  # what was on its way is asked again
    # And a finished one asks nothing.
    curate(judged_by(options, server))
    assert server.requests <= 42
  assert len(load_examples(options.out / "train.parquet")) == 22


def test_scores_of_the_policy_choose(options, tmp_path):
  scores = tmp_path / "scores.csv"
  scores.write_text("row,std,gain,else\n" + "".join(f"{row},{row / 100},{row / 50},x\n" for row in range(1, 39)))
  curate(dataclasses.replace(options, scores=scores, keep=10))
  assert [e.reference for e in load_examples(options.out / "train.parquet")] == [f"tax {i}" for i in range(28, 38)]
  reasons = dropped(options.out)
  assert (reasons[1], reasons[39], reasons[40]) == ("low score", "no score", "no score")


def test_scores_of_a_row_that_comes_twice_are_averaged(tmp_path):
  path = tmp_path / "scores.jsonl"
  path.write_text(
    '{"row": 3, "std": 0.1, "gain": 1}\n{"row": 3, "std": 0.3, "gain": 0}\n{"row": 1, "std": 0, "gain": 0}\n'
  )
  assert read_scores(path) == {3: Score(0.2, 0.5), 1: Score(0.0, 0.0)}


def test_scores_of_a_run_are_told_by_the_question(tmp_path):
  examples = [Example(({"role": "user", "content": text},), "x", "", row) for row, text in enumerate("abc", 1)]
  (tmp_path / "rollouts").mkdir()
  rows = [("b", 0.5, 0.25, 0.1), ("b", 0.75, 0.25, 0.1), ("a", 0.125, 0.25, 0.0), ("z", 1, 0, 0)]
  names = "question", "reward_reference", "reward_baseline", "group_std"
  for step in (1, 2):
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows[2 * step - 2 : 2 * step]]
    (tmp_path / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join(lines))
  assert score(examples, tmp_path) == {1: Score(0.1, 0.375), 0: Score(0.0, -0.125)}
  with pytest.raises(InputError, match="expected scores of some of the questions, found none"):
    score(examples[2:], tmp_path)


ROLLOUT = {"question": "a", "reward_reference": 0.5, "reward_baseline": 0.25, "group_std": 0.1}


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"reward_reference": float("nan")}, "column reward_reference: expected a number, found nan"),
    ({"reward_baseline": float("inf")}, "column reward_baseline: expected a number, found inf"),
    ({"reward_baseline": None}, "column reward_baseline: expected a number, found None"),
    ({"group_std": float("-inf")}, "column group_std: expected a number, found -inf"),
    ({"group_std": 10**400}, "column group_std: expected a number, found 1000"),
    ({"question": ["a"]}, "column question: expected text, found ['a']"),
  ],
)
def test_scores_of_a_run_that_cannot_be(tmp_path, change, said):
  (tmp_path / "rollouts").mkdir()
  rows = [ROLLOUT, {**ROLLOUT, **change}]
  (tmp_path / "rollouts" / "step_000001.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  with pytest.raises(InputError) as raised:
    score([Example(({"role": "user", "content": "a"},), "x", "", 1)], tmp_path)
  assert f"step_000001.jsonl: row 2, {said}" in str(raised.value)
  assert "\n" not in str(raised.value)


def test_how_many_questions_have_a_score_is_said(options, tmp_path, capsys):
  (tmp_path / "run" / "rollouts").mkdir(parents=True)
  rows = [{**ROLLOUT, "question": text} for text in questions(7)]
  (tmp_path / "run" / "rollouts" / "step_000001.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  curate(dataclasses.replace(options, scores=tmp_path / "run", keep=5))
  assert "7 of 40 questions have a score\n" in capsys.readouterr().out


def test_the_name_of_the_file_is_no_source(tmp_path):
  path = write(tmp_path / "webinstruct_no_math.jsonl", questions(20))
  curate(Options(path, tmp_path / "out"))
  assert dropped(tmp_path / "out") == {}


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("s.csv", "row,std\n1,2\n", "row 1, column gain: expected a number, found None"),
    ("s.csv", "row,std,gain\n1,2,3\n2,nan,3\n", "row 2, column std: expected a number, found 'nan'"),
    ("s.jsonl", '{"row": null, "std": 1, "gain": 1}\n', "row 1, column row: expected a number, found None"),
    ("s.jsonl", "{", "row 1: expected JSON"),
    ("s.jsonl", "[1]\n", "row 1: expected a JSON object"),
    ("s.txt", "", "expected a file named"),
  ],
)
def test_scores_that_cannot_be(tmp_path, name, content, said):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(InputError, match=rf"{name}: .*{re.escape(said)}|{re.escape(f'{name}: {said}')}"):
    read_scores(path)


@pytest.mark.parametrize("column", ["question", "Question", "problem", "Problem", "prompt"])
def test_layouts_of_benchmarks(tmp_path, column):
  rows = [{"id": 1, column: "Why?\u2028Really?"}, {"id": 2, column: "Who?"}]
  expected = [row[column] for row in rows]
  (tmp_path / "b.json").write_text(json.dumps(rows))
  (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
  (tmp_path / "b.csv").write_text(f'id,{column}\n1,"{expected[0]}"\n2,Who?\n')
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
  for suffix in ("json", "jsonl", "csv", "parquet"):
    assert read_benchmark(tmp_path / f"b.{suffix}") == (expected, expected)


def test_a_benchmark_of_chat_messages(tmp_path):
  pq.write_table(pa.Table.from_pylist([{"prompt": [{"role": "user", "content": "Why?"}]}]), tmp_path / "b.parquet")
  assert read_benchmark(tmp_path / "b.parquet")[0] == ["Why?"]


@pytest.mark.parametrize("column", ["options", "choices"])
def test_a_short_question_is_found_with_its_options(options, tmp_path, column):
  texts = questions(20)
  listed = ["money that banks hold at the central bank", "gold that nobody may sell", "land"]
  texts[4] = "Which is it?\n(A) money that banks hold at the central bank\n(B) gold that nobody may sell\n(C) land"
  texts[5] = "Which is it?"
  texts[6] = "Which is it? Explain."
  write(options.path, texts)
  rows = [{"question": "Which is it?", column: listed}, {"question": "Why?", column: None}]
  (tmp_path / "b.json").write_text(json.dumps(rows))
  assert read_benchmark(tmp_path / "b.json")[0] == ["Which is it?", "Why?"]
  curate(dataclasses.replace(options, benchmarks=(tmp_path / "b.json",)))
  assert dropped(options.out) == {5: "in a benchmark", 6: "in a benchmark"}


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ('[{"text": "Why?"}]', "b.json: expected a column question or Question"),
    ("[]", "b.json: expected a column question"),
    ('[{"question": ""}]', "row 1, column question: expected a question, found ''"),
    ('{"question": "Why?"}', "b.json: expected"),
    ("nothing", "b.json: expected"),
  ],
)
def test_benchmarks_that_cannot_be(tmp_path, content, said):
  (tmp_path / "b.json").write_text(content)
  with pytest.raises(InputError, match=re.escape(said)):
    read_benchmark(tmp_path / "b.json")


def test_a_finished_directory_is_for_the_same_curation_alone(options, capsys):
  curate(options)
  before = (options.out / "train.parquet").stat().st_mtime_ns
  curate(options)
  assert "is finished" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"holds another curation \(similarity differs\)"):
    curate(dataclasses.replace(options, similarity=0.7))
  write(options.path, questions(39))
  with pytest.raises(InputError, match=r"holds another curation \(input differs\)"):
    curate(options)
  assert (options.out / "train.parquet").stat().st_mtime_ns == before


def test_directories_of_others_are_left_alone(options):
  options.out.mkdir()
  (options.out / "thesis.tex").write_text("mine")
  with pytest.raises(InputError, match="holds other files, expected a new or empty directory"):
    curate(options)
  (options.out / "curation.json").write_text("[]")
  with pytest.raises(InputError, match="expected the record of a curation"):
    curate(options)
  with pytest.raises(InputError, match="cannot be written"):
    curate(dataclasses.replace(options, out=options.path / "out"))


def test_nothing_left_is_an_error(options):
  with pytest.raises(InputError, match=r"no row is left of 40: 40 long answer"):
    curate(dataclasses.replace(options, answer_words=1))
  assert not (options.out / "train.parquet").exists()


def test_files_and_keys_that_are_not_there(options, monkeypatch):
  monkeypatch.delenv("NO_KEY", raising=False)
  none = options.path.parent / "none.csv"
  for change, said in (
    ({"path": none}, "none.csv: expected a file, found none"),
    ({"benchmarks": (none,)}, "none.csv: expected a file, found none"),
    ({"scores": none, "keep": 1}, "none.csv: expected a file, found none"),
    ({"judge": Endpoint("http://x/v1", "m", "NO_KEY")}, "environment variable NO_KEY: not set"),
  ):
    with pytest.raises(InputError, match=said):
      curate(dataclasses.replace(options, **change))
  assert not options.out.exists()


def test_wrong_use_is_said_in_one_line(options):
  command = [sys.executable, "-m", "rlpr_jax.curate", f"--path={options.path}", f"--out={options.out}"]
  done = subprocess.run(
    [*command, "--judge_model=m"],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr == "error: --judge_model: given without --judge_url, expected both or neither\n"
  assert not options.out.exists()
