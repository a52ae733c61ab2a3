"""What trackers are told of a run; and that nothing that goes wrong with them reaches it."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from rlpr_jax import train as training_program
from rlpr_jax.config import to_json
from rlpr_jax.errors import InputError
from rlpr_jax.runs import trackers
from rlpr_jax.runs.metrics import MetricsWriter
from tests.tiny_run import RECIPE, ROOT, rows, tiny

ROLLOUT = {
  "question": "3+5?",
  "response": "<answer>8</answer>",
  "reward_total": 0.64,
  "reward_format": 1.0,
  "kept": True,
}


class Memory:
  """A tracker that keeps what it is told; `broken` has it raise."""

  place = "in memory"

  def __init__(self, about):
    self.about, self.logged, self.ended, self.broken = about, [], None, False

  def log(self, step, values, rollouts):
    if self.broken:
      raise ConnectionError("no route\nto host")
    self.logged.append((step, dict(values), [dict(row) for row in rollouts]))

  def finish(self, summary, failed):
    self.ended = (dict(summary), failed)


@pytest.fixture
def workdir(tmp_path):
  """Of a run that has taken two steps after an evaluation."""
  config = tiny()
  config.log.project = "sums"
  (tmp_path / "config.json").write_text(to_json(config))
  writer = MetricsWriter(tmp_path, None, retry_seconds=0)
  writer.write(0, {"held_out/accuracy": 0.25})
  take_steps(writer, 1, 2)
  return tmp_path


def take_steps(writer, *steps):
  for step in steps:
    writer.write_rollouts(step, [{"step": step, **ROLLOUT}])
    writer.write(step, {"reward/total": 0.1 * step, "seconds/step": 2.0})


def follower(workdir, made):
  """One that appends the trackers that it makes."""

  def create(about):
    made.append(Memory(about))
    return made[-1]

  return trackers.Follower(workdir, "memory", create)


def test_config_metrics_rollouts_and_summary(workdir):
  made = []
  following = follower(workdir, made)
  assert following.look() == "in memory"
  (tracker,) = made
  assert (tracker.about.name, tracker.about.project) == (workdir.name, "sums")
  assert tracker.about.config["model"]["embed_dim"] == 32
  assert tracker.logged == [
    (0, {"held_out/accuracy": 0.25}, []),
    (1, {"reward/total": 0.1, "seconds/step": 2.0}, [{"step": 1, **ROLLOUT}]),
    (2, {"reward/total": 0.2, "seconds/step": 2.0}, [{"step": 2, **ROLLOUT}]),
  ]
  tracker.logged.clear()
  assert following.look() is None
  assert not tracker.logged
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "held_out/')  # the run is writing
    file.flush()
    following.look()
    assert not tracker.logged
    file.write('accuracy": 0.5}\n')
  following.finish(failed=False)
  assert tracker.logged == [(3, {"held_out/accuracy": 0.5}, [])]
  summary = {"steps": 3, "seconds": 4.0, "accuracy_first": 0.25, "accuracy_last": 0.5, "accuracy_best": 0.5}
  assert tracker.ended == (summary, False)


def test_a_run_that_goes_on_is_the_same_there_and_no_step_comes_twice(workdir):
  made = []
  follower(workdir, made).look()
  writer = MetricsWriter(workdir, 1, retry_seconds=0)  # killed after step 2, the checkpoint is of step 1
  writer.amend(1, {"held_out/accuracy": 0.3})
  following = follower(workdir, made)
  following.look()
  take_steps(writer, 2, 3)
  following.look()
  assert made[0].about.key == made[1].about.key
  assert [step for step, *_ in made[1].logged] == [3]
  later = MetricsWriter(workdir, 3, retry_seconds=0)
  following = follower(workdir, made)
  following.look()
  later.amend(3, {"held_out/accuracy": 0.5})  # an evaluation that was cut short is made up for
  following.finish(failed=True)
  assert made[2].logged == [(3, {"held_out/accuracy": 0.5}, [])]
  assert made[2].ended[1]
  assert made[2].about.key == made[0].about.key


def test_a_tracker_that_comes_later_is_told_all(workdir):
  made = []
  (workdir / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text() + "no JSON\n[1]\n")
  follower(workdir, made).finish(failed=False)
  assert [step for step, *_ in made[0].logged] == [0, 1, 2]


def test_trouble_is_said_once_and_what_was_missed_is_sent_later(workdir):
  made, said, pauses = [], [], []

  def wait(seconds):
    pauses.append(seconds)
    if len(pauses) == 2:  # from here on it fails
      made[-1].broken = True
      take_steps(MetricsWriter(workdir, 2, retry_seconds=0), 3)
    if len(pauses) == 6:
      broken.clear()
    return "done" if len(pauses) == 8 else None

  broken = [True]

  def create(about):
    made.append(Memory(about))
    made[-1].broken = bool(broken) and len(made) > 1
    return made[-1]

  trackers.follow(trackers.Follower(workdir, "memory", create), wait, said.append)
  assert said == ["in memory", "no route to host; the run goes on without it, and it is tried again", "in memory"]
  assert [step for step, *_ in made[0].logged] == [0, 1, 2]
  assert [step for step, *_ in made[-1].logged] == [3]
  assert pauses[2:6] == sorted(pauses[2:6])  # ever longer
  assert made[-1].ended[1] is False


def test_trouble_at_the_end_is_said_and_ends(workdir):
  said = []

  def create(about):
    raise SystemExit("no account")

  trackers.follow(trackers.Follower(workdir, "memory", create), lambda seconds: "done", said.append)
  assert said == ["no account; the same command sends the rest"]


def test_texts_that_no_tracker_takes_are_spelt():
  rows = [{"question": "a\ud83d", "references": ["\udc00"], "kept": True}]
  assert trackers.table(rows)[1] == [["a\\ud83d", '["\\udc00"]', True]]


# --- What is named and not there ---


def test_a_package_that_is_missing_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
  (tmp_path / "wandb").mkdir()  # as wandb leaves it where a run was
  monkeypatch.syspath_prepend(str(tmp_path))
  config = tiny()
  config.log.trackers = ("tensorboard", "wandb")
  with pytest.raises(InputError, match=r"^config\.log\.trackers: wandb: not installed, .*'rlpr_jax\[wandb\]'$"):
    training_program.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("wandb,mlflow",), ("comet",), ("mlflow", "mlflow"), (3,)])
def test_trackers_that_are_none(tmp_path, names):
  config = tiny()
  config.log.trackers = names
  with pytest.raises(InputError, match=r"^config\.log\.trackers: .*, expected different ones of tensorboard, wandb"):
    training_program.train(config, tmp_path / "run")


def test_without_tensorboard_there_are_no_files_of_it(tmp_path):
  MetricsWriter(tmp_path, None, retry_seconds=0, tensorboard=False).write(1, {"x": 0.5})
  assert not (tmp_path / "tensorboard").exists()


def test_texts_of_tensorboard(workdir):
  """The config, and rollouts with the parts of their rewards."""
  texts = {}
  for event in events(workdir / "tensorboard"):
    for value in event.summary.value:
      if value.metadata.plugin_data.plugin_name == "text":
        texts[value.tag, event.step] = value.tensor.string_val[0].decode()
  assert '"embed_dim": 32' in texts["config/text_summary", 0]
  table = texts["rollouts/text_summary", 2]
  assert table.splitlines()[0] == "| step | question | response | reward_total | reward_format | kept |"
  assert "| 2 | 3+5? | &lt;answer>8&lt;/answer> | 0.64 | 1 | True |" in table


def events(directory):
  from tensorboardX.proto import event_pb2

  for path in directory.iterdir():
    content = path.read_bytes()
    while content:  # records: length, its checksum, the event, its checksum
      length = int.from_bytes(content[:8], "little")
      yield event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]


# --- Trackers that harm themselves alone ---

BAD = {
  "hangs": "import time; time.sleep(1000)",
  "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
  "refuses": "raise RuntimeError('no account')",
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ("hangs", "trackio: not ready 20 s after the run, and ended; the same command sends the rest"),
    ("dies", "trackio: ended with status -9, {}/trackers/trackio.log may say why; the same command sends the rest"),
    ("refuses", "trackio: no account; "),
  ],
)
def test_a_tracker_that_fails_neither_harms_nor_delays_the_run(tmp_path, monkeypatch, capfd, how, expected):
  (tmp_path / "site").mkdir()
  (tmp_path / "site/trackio.py").write_text(f"import sys\nif sys.argv[-1].endswith('run'):\n  {BAD[how]}\n")
  monkeypatch.syspath_prepend(str(tmp_path / "site"))
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
  config = tiny()
  config.steps, config.warm_start.steps, config.evaluation.prompts = 2, 0, 0
  config.log.trackers, config.log.tracker_seconds = ("trackio",), 20.0 if how == "hangs" else 300.0
  started = time.monotonic()
  training_program.train(config, tmp_path / "run")
  if how == "hangs":
    seconds = sum(row["seconds/step"] for row in rows(tmp_path / "run"))
    assert time.monotonic() - started - seconds > 20
  assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
  err = capfd.readouterr().err
  assert [line for line in err.splitlines() if line.startswith("trackio: ")] == [
    line for line in err.splitlines() if line.startswith(expected.format(tmp_path / "run"))
  ]
  assert err.count("trackio: ") == 1


# --- The trackers themselves ---


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """A directory with the packages, from the index: what is here already is as good a version as any."""
  directory = tmp_path_factory.mktemp("trackers") / "site"
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"--target={directory}"]
  packages = ["wandb", "trackio", "mlflow-skinny", "sqlalchemy", "alembic", "tensorboard"]
  done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
  if done.returncode:
    pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
  return directory


@pytest.fixture(scope="module")
def followed(site, tmp_path_factory):
  """A run that was killed and went on, its four trackers, and where they keep what they know."""
  home = tmp_path_factory.mktemp("followed")
  (home / "recipe.py").write_text(RECIPE)
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{site}",
    "WANDB_MODE": "offline",
    "TRACKIO_DIR": str(home / "trackio"),
    "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
  }
  command = [
    sys.executable, "-m", "rlpr_jax.train", f"--config={home / 'recipe.py'}", f"--workdir={home / 'run'}",
    "--config.log.trackers=('tensorboard', 'wandb', 'trackio', 'mlflow')", "--config.log.tracker_seconds=900",
    "--config.log.project=sums", "--config.steps=4", "--config.warm_start.steps=3", "--config.evaluation.prompts=4",
    "--config.evaluation.every=2",
  ]  # fmt: skip
  run = subprocess.Popen(command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  sent = [home / f"run/trackers/{name}.json" for name in ("wandb", "trackio", "mlflow")]
  deadline = time.monotonic() + 900
  while run.poll() is None and time.monotonic() < deadline:
    if (home / "run/checkpoints/2").exists() and all(path.exists() for path in sent):
      break
    time.sleep(0.1)
  run.send_signal(signal.SIGKILL)
  killed = run.communicate()[0].decode()
  assert (home / "run/checkpoints/2").exists(), killed
  done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "resumed after step" in done.stdout
  assert "going on without" not in done.stderr + killed
  return home, environment


def read_back(home, environment, code):
  """What a program of the tracker's own library prints, as JSON."""
  done = subprocess.run(
    [sys.executable, "-c", code, str(home)], env=environment, cwd=home, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def check_metrics(home, found):
  """Every metric of every step, once: those that depend on the clock are of one of the times that a step was taken."""
  expected = {row["step"]: row for row in rows(home / "run")}
  assert sorted(map(int, found)) == sorted(expected) == [0, 1, 2, 3, 4]
  clocks = ("seconds", "tokens_per_second", "compilations")
  for step, row in expected.items():
    values = {name: x for name, x in row.items() if name != "step" and not name.startswith(clocks)}
    assert {name: found[str(step)][name] for name in values} == pytest.approx(values)


PARTS = {
  "question",
  "reference",
  "response",
  "reward_reference",
  "reward_baseline",
  "reward_total",
  "advantage",
  "kept",
}

TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage as store
(name,) = store.get_runs("sums")
found = {}
for row in store.get_logs("sums", name):
  found.setdefault(row["step"], []).append(row)
print(json.dumps({"name": name, "config": store.get_run_config("sums", name), "rows": found}))
"""


@pytest.mark.slow
def test_trackio_keeps_one_run(followed):
  home, environment = followed
  found = read_back(home, environment, TRACKIO)
  assert found["name"].startswith("run-")
  assert found["config"]["log"]["project"] == "sums"
  rows_of = {step: [row for row in logged if "summary/steps" not in row] for step, logged in found["rows"].items()}
  assert {len(logged) for logged in rows_of.values()} == {1}  # though the run was killed
  check_metrics(home, {step: logged[0] for step, logged in rows_of.items()})
  table = rows_of["4"][0]["rollouts"]["_value"]
  assert table[0].keys() >= PARTS
  assert any("summary/accuracy_last" in row for row in found["rows"]["4"])


MLFLOW = """
import json, mlflow, sys
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("sums")
(run,) = client.search_runs([experiment.experiment_id])
found = {}
for name in run.data.metrics:
  for point in client.get_metric_history(run.info.run_id, name):
    found.setdefault(point.step, {}).setdefault(name, []).append(point.value)
table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/rollouts/step_000004.json")
print(json.dumps({"status": run.info.status, "name": run.info.run_name, "params": run.data.params, "rows": found,
                  "table": table}))
"""


@pytest.mark.slow
def test_mlflow_keeps_one_run(followed):
  home, environment = followed
  found = read_back(home, environment, MLFLOW)
  assert (found["status"], found["name"]) == ("FINISHED", "run")
  assert found["params"]["model.embed_dim"] == "32"
  steps = {step: {name: values[0] for name, values in row.items()} for step, row in found["rows"].items()}
  for row in found["rows"].values():
    assert all(len(values) == 1 for name, values in row.items() if not name.startswith("summary/"))
  check_metrics(home, steps)
  assert set(found["table"]["columns"]) >= PARTS
  assert len(found["table"]["data"]) == len((home / "run/rollouts/step_000004.jsonl").read_text().splitlines())


def wandb_records(path):
  """Records of a .wandb file: leveldb's log, blocks of 32 KiB of pieces with checksum, length and kind."""
  content, piece = path.read_bytes(), b""
  place = 7  # after its name and version
  while place + 7 <= len(content):
    left = 2**15 - place % 2**15
    if left < 7:
      place += left
      continue
    length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
    piece += content[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # whole, or the last piece
      yield piece
      piece = b""


WANDB = """
import base64, json, sys
from wandb.proto import wandb_internal_pb2 as proto
name = lambda item: ".".join(item.nested_key) or item.key
found = {"history": [], "ids": [], "config": {}, "projects": [], "summary": {}, "exits": []}
for line in sys.stdin:
  record = proto.Record.FromString(base64.b64decode(line))
  kind = record.WhichOneof("record_type")
  if kind == "run":
    found["ids"].append(record.run.run_id); found["projects"].append(record.run.project)
    found["config"] |= {item.key: item.value_json for item in record.run.config.update}
  elif kind == "history":
    found["history"].append({name(item): json.loads(item.value_json) for item in record.history.item})
  elif kind == "summary":
    found["summary"] |= {name(item): item.value_json for item in record.summary.update}
  elif kind == "exit":
    found["exits"].append(record.exit.exit_code)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_wandb_keeps_one_run(followed):
  import base64

  home, environment = followed
  files = sorted((home / "run/trackers/wandb").glob("offline-run-*/*.wandb"))
  assert len(files) == 2  # one each time that the run was started
  lines = b"".join(base64.b64encode(record) + b"\n" for path in files for record in wandb_records(path))
  done = subprocess.run([sys.executable, "-c", WANDB], env=environment, input=lines, capture_output=True, check=False)
  assert done.returncode == 0, done.stderr.decode()
  found = json.loads(done.stdout.splitlines()[-1])
  assert len(set(found["ids"])) == 1
  assert set(found["projects"]) == {"sums"}
  assert json.loads(found["config"]["model"])["embed_dim"] == 32
  assert len(found["history"]) == 5
  check_metrics(home, {str(row["step"]): row for row in found["history"]})
  last = next(row for row in found["history"] if row["step"] == 4)
  assert last["rollouts.nrows"] == len((home / "run/rollouts/step_000004.jsonl").read_text().splitlines())
  tables = list((home / "run/trackers/wandb").glob("offline-run-*/files/media/table/rollouts_*.table.json"))
  assert set(json.loads(tables[0].read_text())["columns"]) >= PARTS
  assert float(found["summary"]["steps"]) == 4
  assert found["exits"][-1] == 0


TENSORBOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1] + "/run/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
events.Reload()
found = {}
for name in events.Tags()["scalars"]:
  for point in events.Scalars(name):
    found.setdefault(point.step, {})[name] = point.value
texts = {name: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)]
         for name in events.Tags()["tensors"]}
print(json.dumps({"rows": found, "texts": texts}))
"""


@pytest.mark.slow
def test_tensorboard_shows_one_run(followed):
  home, environment = followed
  found = read_back(home, environment, TENSORBOARD)
  check_metrics(home, found["rows"])
  assert '"embed_dim": 32' in found["texts"]["config/text_summary"][-1]
  assert all(f" {part} " in found["texts"]["rollouts/text_summary"][-1].splitlines()[0] for part in PARTS)


@pytest.mark.slow
def test_of_many_processes_the_first_alone_tells(site, tmp_path):
  (tmp_path / "recipe.py").write_text(RECIPE)
  environment = os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "TRACKIO_DIR": str(tmp_path / "trackio")}
  command = [
    sys.executable, str(ROOT / "launch/local.py"), "--processes=2", "--", f"--config={tmp_path / 'recipe.py'}",
    f"--workdir={tmp_path / 'run'}", "--config.steps=1", "--config.warm_start.steps=0", "--config.evaluation.prompts=0",
    "--config.log.trackers=('trackio',)", "--config.log.tracker_seconds=900", "--config.log.project=sums",
  ]  # fmt: skip
  done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found = read_back(tmp_path, environment, TRACKIO)
  assert [len(logged) for logged in found["rows"].values()] == [2]  # the step and the summary
