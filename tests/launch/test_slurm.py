"""launch/slurm.sh on a Slurm of one node, set up here for the test: Debian's slurmctld and slurmd, as root."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny_run import RECIPE

ROOT = pathlib.Path(__file__).parents[2]
# auth/none: everybody is who he says he is, which needs no munge. The node may say it has what it has not.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol") if not shutil.which(name)]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client"),
  pytest.mark.skipif(os.geteuid() != 0, reason="a cluster of our own needs root"),
]


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """The environment in which Slurm's commands find the cluster."""
  path = tmp_path_factory.mktemp("slurm")
  host = socket.gethostname().split(".")[0]
  for name in ("state", "spool"):
    (path / name).mkdir()
  conf = path / "slurm.conf"
  conf.write_text(CONF.format(host=host, path=path, controller_port=free_port(), node_port=free_port()))
  environment = os.environ | {"SLURM_CONF": str(conf)}
  with contextlib.ExitStack() as stack:
    for command in (["slurmctld", "-D", "-c", "-f", str(conf)], ["slurmd", "-D", "-N", host, "-f", str(conf)]):
      daemon = stack.enter_context(
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
      )
      stack.callback(daemon.terminate)
    deadline = time.monotonic() + 60
    while "idle" not in ask(environment, "sinfo", "--noheader", "--format=%T"):
      assert time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for log in path.glob("*.log"))
      time.sleep(0.5)
    yield environment
    subprocess.run(["scancel", "--user=root"], env=environment, check=False)
    time.sleep(1)


def ask(environment, *command):
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def submit(environment, workdir, *arguments, status=0):
  done = subprocess.run(
    [ROOT / "launch/slurm.sh", f"--workdir={workdir}", "--gpus-per-node=0", f"--python={sys.executable}", *arguments],
    env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == status, done.stdout + done.stderr
  return done


def wait_for(environment, job, seconds):
  """Until the job has ended; its state."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    fields = dict(word.partition("=")[::2] for word in ask(environment, "scontrol", "show", "job", job).split())
    if fields.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"):
      return fields["JobState"]
    time.sleep(1)
  raise AssertionError(ask(environment, "scontrol", "show", "job", job))


def logs(workdir):
  return "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted((workdir / "slurm").glob("*.log")))


def test_two_tasks_train(cluster, tmp_path):
  recipe, workdir = tmp_path / "tiny.py", tmp_path / "run"
  recipe.write_text(RECIPE)
  done = submit(
    cluster, workdir, f"--config={recipe}", "--tasks-per-node=2", "--partition=test", "--config.steps=2",
    "--config.warm_start.steps=2", "--config.rollout.prefill_prompts=4", "--config.evaluation.prompts=0",
  )  # fmt: skip
  job = done.stdout.split()[2].rstrip(";")
  assert wait_for(cluster, job, 300) == "COMPLETED", logs(workdir)
  steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert steps[-2:] == [1, 2]
  first, second = (workdir / "slurm" / f"{job}-{task}.log" for task in (0, 1))
  assert "process 0 of 2" in first.read_text()
  assert "process 1 of 2" in second.read_text()


# Stands in for the program: crashes at its first start, has to be stopped at its second, ends by itself at its third.
# Where there is a file "slow" it saves for longer than KillWait.
PROGRAM = """
import pathlib, signal, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
starts = workdir / "starts"
count = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
  file.write("x\\n")
if count == 0:
  sys.exit(1)
def save(*_):
  time.sleep(8 if (workdir / "slow").exists() else 0)
  (workdir / "saved").touch()
  sys.exit(0)
signal.signal(signal.SIGTERM, save)
if count == 1:
  time.sleep(600)
"""


def test_crash_and_time_limit_put_the_job_in_the_queue_again(cluster, tmp_path):
  (tmp_path / "stand_in.py").write_text(PROGRAM)
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "slow").touch()
  done = submit(
    cluster | {"PYTHONPATH": str(tmp_path)}, workdir, "--config=configs/quickstart.py", "--module=stand_in", "--time=1",
    "--save-seconds=50",
  )  # fmt: skip
  job = done.stdout.split()[2].rstrip(";")
  for _ in range(400):
    # Slurm lets a requeued job wait for two minutes.
    subprocess.run(
      ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=cluster, capture_output=True, check=False
    )
    if (workdir / "starts").exists() and len((workdir / "starts").read_text().splitlines()) == 3:
      break
    time.sleep(1)
  assert wait_for(cluster, job, 60) == "COMPLETED", logs(workdir)
  assert (workdir / "saved").exists()
  assert (workdir / "slurm" / f"{job}.crashes").read_text() == "status 1\n"
  assert logs(workdir).count("in the queue again") == 2


def test_a_job_that_is_cancelled_saves_and_stays_so(cluster, tmp_path):
  (tmp_path / "stand_in.py").write_text(PROGRAM)
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "starts").write_text("x\n")
  done = submit(cluster | {"PYTHONPATH": str(tmp_path)}, workdir, "--config=configs/quickstart.py", "--module=stand_in")
  job = done.stdout.split()[2].rstrip(";")
  for _ in range(60):
    if len((workdir / "starts").read_text().splitlines()) == 2:
      break
    time.sleep(1)
  time.sleep(1)
  subprocess.run(["scancel", job], env=cluster, check=True)
  assert wait_for(cluster, job, 60) == "CANCELLED"
  assert (workdir / "saved").exists()
  assert "in the queue again" not in logs(workdir)


def test_an_unknown_partition_is_refused(cluster, tmp_path):
  done = submit(cluster, tmp_path / "run", "--config=configs/quickstart.py", "--partition=nosuch", status=2)
  assert done.stderr == "launch/slurm.sh: --partition: no nosuch here, expected one of test\n"
  assert not (tmp_path / "run").exists()
