"""Runs of many processes on this machine, as pods run them, against the same run of one."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import processes
from rlpr_jax.errors import InputError
from rlpr_jax.policy import load_policy
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.runs.lock import is_alive

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = (
  "--config.rollout.prompts_per_draw=6", "--config.rollout.prefill_prompts=4", "--config.training.micro_batch_rows=4",
  "--config.filter.start=2", "--config.log.checkpoint_every=1",
)  # fmt: skip


def start(recipe, workdir, count, *overrides, devices=1):
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
  }
  command = [sys.executable, "launch/local.py", f"--processes={count}", "--", f"--config={recipe}"]
  command += [f"--workdir={workdir}", *SETTINGS, *overrides]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def run(*arguments, **options) -> str:
  process = start(*arguments, **options)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return out


@pytest.fixture(scope="module")
def begun(recipe, tmp_path_factory):
  """A run of one process before its first step."""
  workdir = tmp_path_factory.mktemp("runs") / "begun"
  run(recipe, workdir, 1, "--config.steps=0")
  return workdir


@pytest.fixture(scope="module")
def alone(recipe, begun):
  """Three steps of one process."""
  return go_on(recipe, begun, "alone", 1)


def go_on(recipe, begun, name, count, devices=1):
  workdir = begun.with_name(name)
  shutil.copytree(begun, workdir)
  run(recipe, workdir, count, "--config.steps=3", devices=devices)
  return workdir


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(row):
  return {name: x for name, x in row.items() if "second" not in name and name != "compilations"}


def params(workdir):
  config = configs.read(workdir / "config.json")
  step, found = restore_params(workdir, None, load_policy(config).trained)
  return step, [np.asarray(x) for x in jax.tree.leaves(found)]


def assert_same_run(found, expected):
  """Rewards, kept prompts, rollouts and parameters."""
  for ours, theirs in zip(rows(found / "metrics.jsonl"), rows(expected / "metrics.jsonl"), strict=True):
    assert timeless(ours) == pytest.approx(timeless(theirs), rel=1e-5, abs=1e-5)
  files = sorted(path.name for path in (expected / "rollouts").iterdir())
  assert len(files) == 3
  for name in files:
    for ours, theirs in zip(rows(found / "rollouts" / name), rows(expected / "rollouts" / name), strict=True):
      for field, value in theirs.items():
        about = isinstance(value, float) or field in ("reference_probs", "baseline_probs")
        # An advantage is a difference of rewards over their spread: rounding is larger there.
        assert ours[field] == (pytest.approx(value, rel=1e-4, abs=1e-4) if about else value), field
  (step, ours), (expected_step, theirs) = params(found), params(expected)
  assert step == expected_step == 3
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does(recipe, begun, alone):
  """From one process's checkpoint on, so that a run goes on with another number of them too; two devices each."""
  assert_same_run(go_on(recipe, begun, "two", 2, devices=2), alone)
  moved = [np.abs(x - y).max() for x, y in zip(params(alone)[1], params(begun)[1], strict=True)]
  assert max(moved) > 1e-3  # far more than what is allowed between them
  assert any(row["filter/kept"] < row["filter/drawn"] for row in rows(alone / "metrics.jsonl")[1:])


@pytest.mark.slow
def test_two_processes_carry_the_same_responses_as_one(recipe, tmp_path):
  carries = [
    "--config.rollout.carry=partial", "--config.rollout.carry_tokens=12", "--config.training.importance_cap=2.0",
    "--config.max_draws=1", "--config.steps=3",
  ]  # fmt: skip
  one, two = tmp_path / "one", tmp_path / "two"
  run(recipe, one, 1, *carries)
  run(recipe, two, 2, *carries)
  assert_same_run(two, one)
  assert any(row.get("rollout/stale_tokens") for row in rows(one / "metrics.jsonl"))


@pytest.mark.slow
def test_four_processes_do_what_one_does_and_one_goes_on(recipe, begun, alone):
  four = go_on(recipe, begun, "four", 4)
  assert_same_run(four, alone)
  run(recipe, four, 1, "--config.steps=4")
  run(recipe, alone, 1, "--config.steps=4")
  for ours, theirs in zip(params(four)[1], params(alone)[1], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def members(launcher):
  """Process ids of a launcher's children, in order."""
  return sorted(map(int, subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True).split()))


def wait_for_step(process, step):
  for line in process.stdout:
    if line.startswith(f"step {step}/"):
      return
  raise AssertionError(process.stderr.read())


def begin_two(recipe, begun, tmp_path, step):
  """A launcher of two processes that have come to this step, and the run's directory."""
  workdir = tmp_path / "run"
  shutil.copytree(begun, workdir)
  launcher = start(recipe, workdir, 2, "--config.steps=1000")
  wait_for_step(launcher, step)
  return launcher, workdir


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_others(recipe, begun, tmp_path, dead):
  """The launcher itself is stopped first, so that the processes have nothing but each other."""
  launcher, workdir = begin_two(recipe, begun, tmp_path, step=2)
  pids = members(launcher)
  os.kill(launcher.pid, signal.SIGSTOP)
  os.kill(pids[dead], signal.SIGKILL)
  other, begin = pids[1 - dead], time.monotonic()
  while "\nState:\tZ" not in pathlib.Path(f"/proc/{other}/status").read_text():
    assert time.monotonic() - begin < 60
    time.sleep(0.5)
  os.kill(launcher.pid, signal.SIGCONT)
  _, err = launcher.communicate(timeout=60)
  assert launcher.returncode != 0
  assert "another" in err
  assert run(recipe, workdir, 2, "--config.steps=3")  # what was saved is whole


@pytest.mark.slow
def test_a_signal_to_one_process_stops_and_saves_all(recipe, begun, tmp_path):
  launcher, _ = begin_two(recipe, begun, tmp_path, step=1)
  os.kill(members(launcher)[1], signal.SIGTERM)
  out, err = launcher.communicate(timeout=120)
  assert launcher.returncode == 0, err
  assert "the same command goes on from there" in out


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_run_along(recipe, begun, tmp_path):
  """Saved; and the same command at once, while the first run still saves, waits for it and goes on."""
  launcher, workdir = begin_two(recipe, begun, tmp_path, step=2)
  pids = members(launcher)
  launcher.kill()
  again = start(recipe, workdir, 2, "--config.steps=1000")
  for line in again.stdout:
    if line.startswith("resumed after step"):
      break
  else:
    raise AssertionError(again.stderr.read())
  assert not any(is_alive(pid) for pid in pids)
  again.terminate()
  _, err = again.communicate(timeout=120)
  assert again.returncode == 0, err
  steps = [row["step"] for row in rows(workdir / "metrics.jsonl")]
  assert steps == list(range(len(steps)))


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, False),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # the batch script itself, not a step of it
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "16"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, True),
  ],
)
def test_what_is_announced(environment, expected):
  assert processes.announced(environment) is expected


SLURM = {
  "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip
OPEN_MPI_5 = {
  "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "{i}", "OMPI_COMM_WORLD_LOCAL_RANK": "{i}",
}  # fmt: skip
OPEN_MPI_4 = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.0.0.1:34911"}
MEET = """
import sys
from rlpr_jax import processes
processes.start(coordinator=sys.argv[1] if sys.argv[1:] else None)
import jax, numpy as np
me = jax.process_index()
rows = processes.gather({"x": np.full(len(processes.share(range(3))), me, np.int32)}, 3)["x"].tolist()
print(me, jax.process_count(), processes.any_of(me == 1), processes.any_of(False), rows, file=sys.stderr)
"""


@pytest.mark.parametrize(
  ("variables", "arguments"),
  [
    (SLURM, []),
    pytest.param(OPEN_MPI_4, [], marks=pytest.mark.slow),
    pytest.param(OPEN_MPI_5, ["localhost:45671"], marks=pytest.mark.slow),
  ],
  ids=["slurm", "open mpi 4", "open mpi 5"],
)
def test_processes_meet_by_what_the_cluster_says(variables, arguments):
  """With the variables that srun and mpirun set; both processes on this machine."""
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", MEET, *arguments],
      env=os.environ | {"PYTHONPATH": str(ROOT)} | {name: x.format(i=i) for name, x in variables.items()},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for i, process in enumerate(pair):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"{i} 2 True False [0, 0, 1]" in err


MEET_AT = """
import pathlib, sys
from rlpr_jax import processes
processes.start(coordinator="localhost:{port}", count=2, index={index})
port = {port}
"""
LISTENING = """
lines = [line.split() for file in ("tcp", "tcp6") for line in pathlib.Path("/proc/net", file).read_text().splitlines()]
places = [words[1].split(":") for words in lines if words[3] == "0A"]  # 0A: listening
print(*(host for host, number in places if int(number, 16) == port), file=sys.stderr)
processes.any_of(False)  # none ends before all have looked
"""


def test_the_coordinator_listens_where_it_was_named():
  """On the loopback, not on all networks of the machine; two processes, as `launch/local.py` starts them."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", MEET_AT.format(port=port, index=index) + LISTENING],
      env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )
    for index in range(2)
  ]  # fmt: skip
  errors = [process.communicate(timeout=120)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], errors
  listening = errors[0].splitlines()[-1].split()
  # As /proc/net/tcp and tcp6 have them, bytes of an address by words of the machine's order.
  loopbacks = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}
  assert listening
  assert set(listening) <= loopbacks


KEEP = """
import sys
from rlpr_jax import processes
from rlpr_jax.compilation import keep_programs
if {count} > 1:
  processes.start(coordinator="localhost:{port}", count={count}, index={index})
import jax
jax.numpy.ones(3).block_until_ready()  # a program that is compiled before the directory is named
keep_programs(sys.argv[1])
program = lambda x: [x := jax.numpy.sin(x) @ x for _ in range(200)][-1]  # takes a while to compile
jax.jit(program)(jax.numpy.ones((8, 8))).block_until_ready()
"""


@pytest.mark.parametrize("count", [1, 2])
def test_processes_on_cpus_share_no_compiled_programs(tmp_path, count):
  """Read ones run collectives in another order than those compiled now: the two would wait for each other for ever."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  named, of_environment = tmp_path / "named", tmp_path / "environment"
  all_of_them = [
    subprocess.Popen(
      [sys.executable, "-c", KEEP.format(port=port, count=count, index=index), str(named)],
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(of_environment)},
      stderr=subprocess.PIPE, text=True,
    )
    for index in range(count)
  ]  # fmt: skip
  errors = [process.communicate(timeout=120)[1] for process in all_of_them]
  assert [process.returncode for process in all_of_them] == [0] * count, errors
  kept = [file for directory in (named, of_environment) for file in directory.glob("*")]
  assert bool(kept) == (count == 1)


@pytest.mark.parametrize(
  ("host", "found", "bound"),
  [
    ("localhost", None, "localhost:1"),
    ("127.0.0.2", None, "127.0.0.2:1"),
    ("::1", None, "[::1]:1"),
    ("10.255.255.1", None, None),  # of another machine, or of a load balancer
    ("me", ["127.0.1.1"], None),  # as Debian has a machine's own name, which others know as another address
    ("me", ["127.0.0.1", "10.0.0.3"], None),
    ("nowhere.invalid", [], None),
  ],
)
def test_bind_addresses(monkeypatch, host, found, bound):
  def look_up(*_, **__):
    if not found:
      raise OSError
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, 0)) for place in found]

  if found is not None:
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
  if host == "::1" and not processes._is_here("::1"):
    bound = None
  assert processes.bind_address(host, 1) == bound


def test_a_name_of_an_address_of_this_machine_is_bound(monkeypatch):
  monkeypatch.setattr(processes, "_is_here", lambda address: address == "10.0.0.3")
  places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.3", 0))]
  monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
  assert processes.bind_address("node3", 1) == "node3:1"


@pytest.mark.parametrize(
  "address", ["localhost", "localhost:", ":8476", "localhost:port", "localhost:70000", "::1:8476"]
)
def test_coordinators_that_cannot_be(address):
  with pytest.raises(InputError, match=r"^--coordinator: .* expected "):
    processes.start(coordinator=address, count=2, index=0)


@pytest.mark.slow
def test_flags_that_do_not_fit(recipe, tmp_path):
  command = [sys.executable, "-m", "rlpr_jax.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
  for arguments, said in (
    (["--processes=2"], "--coordinator, --process: missing"),
    (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process: 2, expected a number under"),
  ):
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")


def test_shares_and_what_is_gathered(monkeypatch):
  """Contiguous, in order, together all of it, whatever the number of processes."""
  items = list(range(11))
  for count in (1, 2, 3, 4, 11, 16):
    monkeypatch.setattr(jax, "process_count", lambda count=count: count)
    shares = []
    for index in range(count):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      shares.append(processes.share(items))
    assert [item for part in shares for item in part] == items
    assert max(map(len, shares)) == -(-11 // count)
