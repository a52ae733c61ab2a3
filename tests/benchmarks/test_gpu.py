"""benchmarks.gpu without a GPU: the runner and what goes wrong, tables, traces, formulas, the scripts around it."""

import gzip
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.gpu import __main__, measure, runner, shapes, table, trace
from benchmarks.gpu.parts import kernels, update
from benchmarks.gpu.report import Job, Report, events_file, read
from benchmarks.gpu.runner import Part
from rlpr_jax import models
from rlpr_jax.errors import InputError
from rlpr_jax.planning import flops
from rlpr_jax.training.packing import Branch, Tree, pack_trees

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [ROOT / "tools" / name for name in ("gpu_wheels.sh", "on_gpu.sh")]

# --- parts, played by a few lines ---------------------------------------------------------------------------------

BEGIN = """
import sys, time, json, os, subprocess
from benchmarks.gpu.report import Job, Report
report = Report(Job(**json.loads(sys.argv[1])))
"""
FAKES = {
  "good": "report.row('speeds', {'n': 1, 'ms': 2.5}); report.value('rate', 7.0); report.note('a note')",
  "asks": "report.row('asked', {'rate': report.earlier('good', 'rate'), 'none': report.earlier('good', 'other')})",
  "raises": "report.row('speeds', {'n': 1}); print('on the way'); raise ValueError('two times two is five')",
  "dies": "report.row('speeds', {'n': 1}); print('the device is gone', flush=True); os.abort()",
  "hangs": "report.row('speeds', {'n': 1}); subprocess.Popen(['sleep', '600']); time.sleep(600)",
  "stops": "report.row('speeds', {'n': 1}); os.kill(os.getppid(), 15); time.sleep(600)",
  "wrong": "report.row('close', {'distance': 0.1}, ok=True); report.row('close', {'distance': 9.0}, ok=False)",
  "lacks": "report.skipped('torch is not installed')",
  "refuses": "report.refused('no GPU: expected one'); sys.exit(2)",
}


@pytest.fixture
def play(tmp_path):
  """Runs fakes by their names."""

  def run(*names, minutes=1.0):
    said = []
    results = runner.run_all(
      [Part(name, 10) for name in names], tmp_path, minutes, "", False,
      lambda job: [sys.executable, "-c", BEGIN + FAKES[job.part], json.dumps(job._asdict())], said.append,
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text() == table.render(results)
    return results, said

  return run


def test_parts_tell_what_they_find(play):
  results, said = play("good", "asks", "lacks")
  good, asks, lacks = results["parts"].values()
  assert good["status"] == asks["status"] == runner.PASSED
  assert good["tables"] == {"speeds": [{"n": 1, "ms": 2.5}]}
  assert good["notes"] == ["a note"]
  assert asks["tables"]["asked"] == [{"rate": 7.0, "none": None}]
  assert (lacks["status"], lacks["error"]) == (runner.SKIPPED, "torch is not installed")
  assert runner.passed(results)
  assert said[-1] == "lacks: skipped, torch is not installed"


@pytest.mark.parametrize(
  ("name", "status", "error"),
  [
    ("raises", runner.FAILED, "ValueError: two times two is five"),
    ("dies", runner.FAILED, "ended by signal 6: the device is gone"),
    ("wrong", runner.FAILED, "1 rows do not meet their bound"),
  ],
)
def test_failed_part_costs_itself_alone(play, tmp_path, name, status, error):
  results, _ = play(name, "good")
  failed = results["parts"][name]
  assert (failed["status"], failed["error"]) == (status, error)
  assert failed["tables"]  # what it had told before
  assert results["parts"]["good"]["status"] == runner.PASSED
  assert not runner.passed(results)
  assert f"===== {name}" in (tmp_path / "log.txt").read_text()


def test_hanging_part_is_ended_with_what_it_started(play, monkeypatch):
  monkeypatch.setattr(runner, "LEAST", 1.0)
  began = time.time()
  results, _ = play("hangs", "good", minutes=8 / 60)
  hung = results["parts"]["hangs"]
  assert hung["status"] == runner.TIMED_OUT
  assert hung["error"] == "ended after 4 s"
  assert hung["tables"] == {"speeds": [{"n": 1}]}
  assert results["parts"]["good"]["status"] == runner.PASSED
  assert time.time() - began < 9


def test_no_time_left(play):
  results, _ = play("good", minutes=0.2)  # less than a part needs at least
  assert results["parts"]["good"]["status"] == runner.NO_TIME
  assert not runner.passed(results)


def test_refusal_ends_everything(play):
  with pytest.raises(InputError, match="no GPU: expected one"):
    play("refuses", "good")


def test_sigterm_keeps_what_was_found(play):
  results, _ = play("good", "stops", "asks")
  assert [part["status"] for part in results["parts"].values()] == [runner.PASSED, runner.TIMED_OUT, runner.NO_TIME]
  assert results["parts"]["stops"]["error"] == results["parts"]["asks"]["error"] == "stopped"
  assert results["parts"]["stops"]["tables"]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_shares_of_the_time():
  parts = [Part("a", 20), Part("b", 60), Part("c", 120)]
  assert runner.allot(400.0, parts) == 40
  assert runner.allot(300.0, parts[1:]) == 100  # what a did not use is there for the others
  assert runner.allot(50.0, parts) == runner.LEAST
  assert runner.allot(runner.LEAST - 1, parts) == 0
  assert runner.allot(90.0, parts[2:]) == 90


def test_parts_by_name():
  assert [part.name for part in runner.choose(["decode", "about"])] == ["about", "decode"]
  assert runner.choose([]) == list(runner.PARTS)
  for part in runner.PARTS:
    assert (ROOT / f"benchmarks/gpu/parts/{part.name}.py").exists()


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("--out=x", "--only=decode,spped"), "--only: no part 'spped', expected some of about, ceilings,"),
    (("--only=decode",), "--out: missing, expected a directory"),
    (("--out=x", "decode"), "decode: unexpected argument, expected flags"),
    (("--out=x", "--outt=y"), "Unknown command line flag 'outt'"),
    (("--out=x", "--minutes=0"), "flag --minutes=0"),
  ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, flags, said):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as ended:
    __main__.main(["gpu", *flags])
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert said in error
  assert error.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_part_without_a_gpu(tmp_path):
  """The process of a real part."""
  job = Job("about", str(tmp_path), str(tmp_path), time.time() + 60, str(tmp_path / "programs"), False)
  done = subprocess.run(runner.child(job), cwd=ROOT, capture_output=True, timeout=60, check=False)
  assert done.returncode == 2, done.stderr
  ((kind, what),) = read(events_file(job, "about"))
  assert kind == "refused"
  assert what.endswith("runs on cpu, expected gpu, or --rehearse")


# --- what is told -------------------------------------------------------------------------------------------------


def test_report_keeps_numbers_as_json_takes_them(tmp_path):
  job = Job("a", str(tmp_path), str(tmp_path), time.time() + 60, "", True)
  report = Report(job)
  report.row("t", {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": None}, ok=np.bool_(True))
  file = events_file(job, "a")
  file.write_text(file.read_text() + '{"row": {"cut')
  assert read(file) == [("row", {"table": "t", "columns": {"a": 0.5, "b": 3, "c": "nan", "d": None, "ok": True}})]
  assert 50 < report.left() <= 60


def test_document():
  part = {"status": "passed", "error": "", "seconds": 1.5, "limit": 20.0, "values": {}, "notes": ["a | b"]}
  results = {
    "title": "benchmarks.gpu",
    "rehearsal": True,
    "parts": {
      "one": part | {"tables": {"one": [{"n": 1}, {"n": 123456.7, "why": "x | y\nz"}]}},
      "two": part | {"tables": {}, "notes": [], "status": "FAILED", "error": "ValueError: no"},
    },
  }
  assert table.render(results).splitlines() == [
    "# benchmarks.gpu",
    "",
    table.REHEARSAL,
    "",
    "| part | result | s | of s | why |",
    "|---|---|---|---|---|",
    "| one | passed | 1.5 | 20 |  |",
    "| two | FAILED | 1.5 | 20 | ValueError: no |",
    "",
    "## one (REHEARSAL)",
    "",
    "| n | why |",
    "|---|---|",
    "| 1 |  |",
    "| 123457 | x \\| y z |",
    "",
    "- a | b",
  ]
  assert "REHEARSAL" not in table.render(results | {"rehearsal": False})


# --- traces -------------------------------------------------------------------------------------------------------


def write_trace(directory, lines, events):
  """A trace as jax.profiler writes it: `lines` are (process, thread, name), `events` (line, start, length, name)."""
  told = []
  for pid, process in enumerate(dict.fromkeys(process for process, _ in lines)):
    told.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}})
    for tid, (other, name) in enumerate(lines):
      if other == process:
        told.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
        told += [
          {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": dur, "name": what, "args": {"name": f"jit(f)/{what}"}}
          for line, ts, dur, what in events
          if line == tid
        ]
  file = directory / "plugins/profile/2026_01_01/host.trace.json.gz"
  file.parent.mkdir(parents=True)
  file.write_bytes(gzip.compress(json.dumps({"traceEvents": told}).encode()))
  return file


def test_trace_of_a_gpu(tmp_path):
  """Streams alone count; operations and modules say the same once more, and the host waits."""
  lines = [
    ("/device:GPU:0", "Stream #7(Compute)"), ("/device:GPU:0", "Stream #8(MemcpyD2D)"), ("/device:GPU:0", "XLA Ops"),
    ("/host:CPU", "python"),
  ]  # fmt: skip
  events = [
    (0, 0, 10, "gemm"), (0, 10, 5, "loop_fusion"), (0, 20, 30, "gemm"), (1, 0, 7, "MemcpyD2D"), (2, 0, 45, "fusion.1"),
    (3, 0, 60, "wait"),
  ]  # fmt: skip
  file = write_trace(tmp_path, lines, events)
  assert trace.find(tmp_path) == file
  found = trace.kernels(file)
  assert [(kernel.name, kernel.runs, round(kernel.seconds * 1e6)) for kernel in found] == [
    ("gemm", 2, 40), ("MemcpyD2D", 1, 7), ("loop_fusion", 1, 5),
  ]  # fmt: skip
  assert found[0].source == "jit(f)/gemm"


def test_trace_of_a_cpu_counts_nothing_twice(tmp_path):
  lines = [("/host:CPU", "tf_XLAEigen/1"), ("/host:CPU", "python")]
  events = [(0, 0, 100, "loop"), (0, 10, 20, "dot"), (0, 40, 20, "dot"), (0, 100, 5, "copy"), (1, 0, 200, "wait")]
  found = trace.kernels(write_trace(tmp_path, lines, events))
  assert {kernel.name: round(kernel.seconds * 1e6) for kernel in found} == {"loop": 60, "dot": 40, "copy": 5}


def test_trace_without_kernels(tmp_path):
  with pytest.raises(ValueError, match=r"no plugins/profile"):
    trace.find(tmp_path)
  file = write_trace(tmp_path, [("/device:GPU:0", "Queue 1")], [(0, 0, 1, "gemm")])
  with pytest.raises(ValueError, match=r"no events on lines Stream\*.*\['Queue 1'\]"):
    trace.kernels(file)


def test_trace_of_this_jax(tmp_path):
  with jax.profiler.trace(str(tmp_path)):
    jax.block_until_ready(jax.jit(lambda x: x @ x)(np.ones((200, 200), np.float32)))
  assert sum(kernel.seconds for kernel in trace.kernels(trace.find(tmp_path))) > 0


# --- formulas -----------------------------------------------------------------------------------------------------

# Two layers of width 4: 2 query heads and 1 key/value head of 2, an MLP of 3, 10 tokens.
CONFIG = models.ModelConfig(
  vocab_size=10, embed_dim=4, mlp_dim=3, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, biases=("query",)
)
LAYER = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3  # query; key and value; out; gate, up and down


def test_bytes_of_a_decode_step():
  norms, biases = 2 * (4 + 4) + 4, 2 * 4
  parameters = 2 * LAYER + biases + norms + 10 * 4  # the head; of the embedding a row a token, which is nothing
  assert shapes.weight_bytes(CONFIG, 2) == 2 * parameters
  assert shapes.token_bytes(CONFIG, 2) == 2 * 2 * 1 * 2 * 2  # keys and values, layers, heads, size, bytes
  assert shapes.decode_bytes(CONFIG, rows=3, tokens=5, itemsize=2) == 2 * parameters + 3 * 5 * 16
  tied = models.ModelConfig(10, 4, 3, 2, 2, 1, 2, biases=("query",), tie_embeddings=True)
  assert shapes.weight_bytes(tied, 2) == 2 * parameters


def test_sizes_of_qwen():
  """As published: 1.54 and 7.62 billion parameters; keys and values of 28 and 56 KiB a token."""
  counts = [
    sum(x.size for x in jax.tree.leaves(models.abstract_params(config)))
    for config in (shapes.QWEN2_5_1_5B, shapes.QWEN2_5_7B)
  ]
  assert counts == [1_543_714_304, 7_615_616_512]
  assert [shapes.token_bytes(config, 2) // 1024 for config in (shapes.QWEN2_5_1_5B, shapes.QWEN2_5_7B)] == [28, 56]


def test_operations_of_an_update():
  weights = 2 * LAYER + 10 * 4
  assert shapes.product_weights(CONFIG) == weights
  pairs = (1 + 2 + 3) + (1 + 2)  # of a token and those that it sees
  assert shapes.forward_flops(CONFIG, [3, 2]) == 2 * weights * 5 + 4 * 2 * 2 * 2 * pairs
  branches = [Branch.of_tokens(np.arange(n), np.ones(n, bool)) for n in (3, 2)]
  rows = pack_trees([Tree(np.arange(4), branches)], rows=1, row_length=16)
  head = CONFIG.vocab_size * CONFIG.embed_dim
  pairs = 4 * 5 // 2 + (5 + 6 + 7) + (5 + 6)
  expected = 2 * (weights - head) * 9 + 2 * head * 5 + 4 * 2 * 2 * 2 * pairs
  assert shapes.update_flops(CONFIG, rows) == 3 * expected


def test_operations_as_counted():
  """Of the traced forward pass of one sequence, whose scores are computed for pairs that do not see each other too."""
  length, model = 8, models.definition(CONFIG, models.Runtime(attention="xla"))

  def forward(params, tokens):
    decoder = nnx.merge(model, params)
    return decoder.logits(decoder(tokens, tokens, tokens))

  counted = flops.count(forward, models.abstract_params(CONFIG), jax.ShapeDtypeStruct((1, length), np.int32))
  unseen = length * (length - 1) // 2
  assert counted == shapes.forward_flops(CONFIG, [length]) + 4 * 2 * 2 * 2 * unseen


def test_rows_of_the_update():
  rows = update.packed_rows(20, 256)
  assert rows.positions.max() < 256
  assert rows.mask.any(axis=1).sum() == (rows.positions >= 0).any(axis=1).sum()
  assert 18 <= rows.mask.any(axis=1).sum() <= 22
  assert rows.padding() < 0.1


def test_published_rates_are_of_the_same_card():
  assert measure.published("NVIDIA H100 80GB HBM3").flops == 989e12
  for kind in ("NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB", "cpu", "TPU v5p"):
    assert measure.published(kind) is None, kind


def test_distance_is_the_worst():
  truth = (np.array([1.0, -4.0], np.float32), np.array([0.5], np.float32))
  assert kernels.distance((np.array([1.0, -3.0]), np.array([0.5])), truth) == 0.25
  assert np.isnan(kernels.distance((np.array([1.0, -3.0]), np.array([np.nan])), truth))


# --- scripts ------------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
  path = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}")
  if not path:
    pytest.skip("no shellcheck: pip install -r requirements-dev.txt")
  done = subprocess.run([path, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ("script", "arguments", "said"),
  [
    ("gpu_wheels.sh", (), "DIR: missing, expected DIR [--tokamax] [--server]"),
    ("gpu_wheels.sh", ("a", "b"), "b: a second directory, expected DIR [--tokamax] [--server]"),
    ("gpu_wheels.sh", ("a", "--torch"), "--torch: no such flag, expected DIR [--tokamax] [--server]"),
    ("gpu_wheels.sh", ("full",), "full: has wheels already, expected a new or empty directory"),
    ("on_gpu.sh", ("a",), "1 arguments, expected WHEELS_DIR OUT [flags]"),
    ("on_gpu.sh", ("a", "b"), "a: no wheels there, expected a directory that tools/gpu_wheels.sh made, or -"),
  ],
)
def test_scripts_refuse_in_one_line(tmp_path, script, arguments, said):
  (tmp_path / "full").mkdir()
  (tmp_path / "full/x-1-py3-none-any.whl").touch()
  done = subprocess.run(
    [ROOT / "tools" / script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == 2
  assert done.stderr.startswith(f"tools/{script}: {said}")
  assert done.stderr.count("\n") == 1


def test_wheels_are_pinned_as_the_lock_says(tmp_path):
  """By what pip is asked for; nothing is fetched."""
  pip = tmp_path / "python"
  pip.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{tmp_path}/asked\ntouch {tmp_path}/wheels/x.whl\n')
  pip.chmod(0o755)
  done = subprocess.run(
    [SCRIPTS[0], "wheels", "--tokamax"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(pip)},
    capture_output=True, text=True, timeout=60, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("1 wheels, 0.0 MiB\n")
  asked = (tmp_path / "asked").read_text().splitlines()
  locked = (ROOT / "requirements-newest.txt").read_text().splitlines()
  assert {line for line in locked if line.startswith(("grain=", "datasets=", "ml_collections="))} <= set(asked)
  assert [word for word in asked if word.startswith("tokamax==")]
  assert "xprof" in asked
  assert "starlette" not in "".join(asked)


# --- everything, on a CPU -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", [part.name for part in runner.PARTS if part.name != "quickstart"])
def test_rehearsal(tmp_path, part):
  """`parity` is skipped where torch is not installed. The quickstart has tests of its own."""
  command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", f"--only={part}", f"--out={tmp_path}", "--minutes=5"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=330, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert table.REHEARSAL in done.stdout
