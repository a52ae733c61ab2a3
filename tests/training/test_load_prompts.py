"""Questions of files as a run takes them: what is dropped, said and written, and what is refused."""

import json

import pytest

from rlpr_jax import config as configs
from rlpr_jax import train as program
from rlpr_jax.data import builtin
from rlpr_jax.data.sources import DroppedRow
from rlpr_jax.errors import InputError
from rlpr_jax.runs.dropped_rows import write_dropped_rows
from rlpr_jax.training.run import load_prompts
from tests import tiny_run


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def rows(count, bad=()):
  return [{"question": f"{i}+{i}", "answer": "" if i in bad else 2 * i} for i in range(count)]


def load(c):
  return load_prompts(c, c.data, builtin.tokenizer(), builtin_split="train", count=0)


def config(path):
  c = configs.default()
  c.data.path, c.data.instruction = str(path), ""
  return c


def test_one_empty_answer_does_not_refuse_a_file(tmp_path, capsys):
  path = write(tmp_path / "a.jsonl", rows(40, bad=[7]))
  prompts, dropped = load(config(path))
  assert [prompt.reference for prompt in prompts] == [str(2 * i) for i in range(40) if i != 7]
  assert dropped == [DroppedRow(path, 8, "answer: empty", "column answer: expected non-empty text, found ''")]
  assert capsys.readouterr().out.splitlines() == [
    f"{path}: reading",
    f"{path}: 39 prompts, dropped: {{'prompt_too_long': 0, 'reference_too_long': 0}}; 1 unusable, named in"
    " dropped_rows.jsonl: {'answer: empty': 1}",
  ]


def test_too_many_bad_rows_are_refused(tmp_path):
  path = write(tmp_path / "a.jsonl", rows(40, bad=[7, 9, 11]))
  with pytest.raises(InputError, match=r"3 of 40 rows cannot be used, expected at most 5% \(max_dropped\); 3 of them"):
    load(config(path))
  c = config(path)
  c.data.max_dropped = 0.1
  assert len(load(c)[1]) == 3


def test_several_references_are_said(tmp_path, capsys):
  prompts, _ = load(config(write(tmp_path / "a.jsonl", [{"question": "1+1", "answer": ["2", "two"]}, *rows(2)])))
  assert prompts[0].reference == "2"
  said = "a.jsonl: 1 rows have several references, the first of each counts; config.reward.references=best or mean"
  assert f"{said} takes all\n" in capsys.readouterr().out


def test_a_system_message_of_the_config(tmp_path):
  c = config(write(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "1+1"}], "answer": 2}]))
  c.data.system = "be brief"
  tokenizer = builtin.tokenizer()
  tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
  (prompt,), _ = load_prompts(c, c.data, tokenizer, builtin_split="train", count=0)
  assert tokenizer.decode(prompt.ids) == "system: be brief user: 1+1 "


def test_weights(tmp_path):
  one, two = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(1))
  assert [prompt.question for prompt in load(config(f"{one}:1,{two}:2"))[0]] == ["0+0", "1+1", "2+2", "0+0", "0+0"]


def test_progress_is_shown_of_many_rows(tmp_path, capsys):
  load(config(write(tmp_path / "a.jsonl", rows(1500))))
  assert "a.jsonl: tokenised 1500/1500    in " in capsys.readouterr().out


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_each_field_are_written_once(tmp_path):
  row, other = (
    DroppedRow("a.csv", 1, "answer: empty", "found ''"),
    DroppedRow("é.csv", 2, "answer: empty", "\\ud83d\\u2028"),
  )
  write_dropped_rows(tmp_path, "config.data.path", [], 0)
  assert list(tmp_path.iterdir()) == []
  write_dropped_rows(tmp_path, "config.data.path", [row], 0)
  write_dropped_rows(tmp_path, "config.evaluation.path", [other], 0)
  write_dropped_rows(tmp_path, "config.data.path", [row], 0)
  path = tmp_path / "dropped_rows.jsonl"
  assert read(path) == [
    {"field": "config.evaluation.path", **other._asdict()},
    {"field": "config.data.path", **row._asdict()},
  ]
  write_dropped_rows(tmp_path, "config.data.path", [], 0)
  write_dropped_rows(tmp_path, "config.evaluation.path", [], 0)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_names_the_rows_that_it_dropped(tmp_path):
  c = tiny_run.tiny()
  c.steps, c.warm_start.steps, c.data.max_dropped = 1, 1, 0.1
  c.data.path = write(tmp_path / "a.jsonl", rows(40, bad=[7]))
  c.evaluation.path = write(tmp_path / "b.jsonl", rows(20, bad=[3]))
  told = [{"prompt": "1+1", "response": "<think></think><answer> 2 </answer>"}] * 20
  c.warm_start.path = write(tmp_path / "c.jsonl", [*told, {"prompt": "1+1"}])
  program.train(c, tmp_path / "run")
  assert [(row["field"], row["row"]) for row in read(tmp_path / "run" / "dropped_rows.jsonl")] == [
    ("config.data.path", 8),
    ("config.evaluation.path", 4),
    ("config.warm_start.path", 21),
  ]


def test_a_run_that_is_refused_writes_nothing(tmp_path):
  c = tiny_run.tiny()
  c.data.path = write(tmp_path / "a.jsonl", rows(4, bad=[3]))
  with pytest.raises(InputError, match="1 of 4 rows cannot be used"):
    program.train(c, tmp_path / "run")
  assert list((tmp_path / "run").iterdir()) == []
