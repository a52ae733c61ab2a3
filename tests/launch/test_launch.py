"""The launch scripts: what they would run, what they refuse, and what they do with programs that stand in for gcloud,
kubectl, sbatch and nvidia-smi. None of these was the real one; tests/launch/test_slurm.py has a real Slurm."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from rlpr_jax import errors
from rlpr_jax.runs.lock import is_alive
from tests.models import tpu_compile
from tests.tiny_run import RECIPE

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
STARTERS = ("tpu", "gke", "slurm", "gpu")
CONFIG = "--config=configs/quickstart.py"
TPU = (CONFIG, "--workdir=/mnt/rlpr_jax/a", "--name=t1", "--project=p", "--zone=z")
GKE = (
  CONFIG, "--workdir=/mnt/rlpr_jax/a", "--name=r1", "--image=i:1", "--accelerator=tpu-v5p-slice", "--topology=2x2x4",
  "--bucket=b",
)  # fmt: skip
LOCAL = (CONFIG, "--workdir=runs/a")
# What a script may count on; gcloud, kubectl, sbatch and nvidia-smi are not among it.
PLAIN = (
  "awk", "basename", "bash", "cat", "chmod", "cp", "cut", "cmp", "date", "dirname", "env", "git", "grep", "head", "id",
  "mkdir", "mktemp", "paste", "rm", "sed", "setsid", "sleep", "sort", "tail", "tar", "timeout", "touch", "tr", "wc",
)  # fmt: skip


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
  """A directory of nothing but the plain programs."""
  directory = tmp_path_factory.mktemp("bin")
  for name in PLAIN:
    (directory / name).symlink_to(shutil.which(name))
  return directory


@pytest.fixture
def launch(plain, tmp_path):
  """Calls a script; `fakes` is where stand-ins for other programs can be written."""

  class Launch:
    def __init__(self):
      self.fakes = tmp_path / "fakes"
      self.root = ROOT
      self.environment = {"HOME": str(tmp_path), "PATH": f"{self.fakes}:{plain}", "FAKE": str(tmp_path)}

    def fake(self, name, text):
      self.fakes.mkdir(exist_ok=True)
      path = self.fakes / name
      path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$FAKE/calls"\n{text}\n')
      path.chmod(0o755)
      return path

    def calls(self):
      path = tmp_path / "calls"
      return path.read_text().splitlines() if path.exists() else []

    def begin(self, script, *arguments, prefix=()):
      # What a shell runs in the background, these tests perhaps, ignores SIGINT, and its children would with it.
      before = signal.signal(signal.SIGINT, signal.default_int_handler)
      try:
        return subprocess.Popen(
          [*prefix, self.root / f"launch/{script}.sh", *arguments], cwd=self.root, env=self.environment, text=True,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
      finally:
        signal.signal(signal.SIGINT, before)

    def __call__(self, script, *arguments, status=0):
      process = self.begin(script, *arguments)
      out, err = process.communicate(timeout=60)
      assert process.returncode == status, out + err
      return subprocess.CompletedProcess(process.args, status, out, err)

  return Launch()


def commands(text):
  """The lines of a dry run that are no comments, as words."""
  return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def program(words):
  """What follows `python -m`."""
  return words[words.index("-m") :]


# --- the files -----------------------------------------------------------------------------------------------------


def tool(name):
  path = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  return path or pytest.skip(f"no {name}: pip install -r requirements-dev.txt")


def test_shellcheck_finds_nothing():
  done = subprocess.run([tool("shellcheck"), *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing():
  done = subprocess.run([tool("hadolint"), LAUNCH / "Containerfile"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", STARTERS)
def test_help_has_every_flag(launch, script):
  shown = launch(script, "--help").stdout
  source = (LAUNCH / f"{script}.sh").read_text()
  declared = re.search(r'parse_arguments "([^"]*)"', source)[1].split()
  for name in ("config", "workdir", "module", "dry-run", *(word.partition("=")[0] for word in declared)):
    # Those of no use but to tests are left out.
    assert f"--{name}" in shown or (script, name) == ("gke", "poll"), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_say_what_they_are(script):
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n# ")
  assert "set -euo pipefail" in text or script.name in ("common.sh", "flags.sh")


def flags_of(function):
  command = f"unset LIBTPU_INIT_ARGS XLA_FLAGS; source {LAUNCH / 'flags.sh'}; {function}"
  return subprocess.check_output(["bash", "-c", command], text=True).split()


def test_jax_takes_the_gpu_flags():
  """XLA knows them without a GPU as well, and ends a program with one that it does not know."""
  code = "import jax; jax.devices()"
  for flags, status in ((flags_of("gpu_flags"), 0), (["--xla_gpu_no_such_flag=1"], 1)):
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


def test_libtpu_takes_the_tpu_flags():
  """It reads them without a TPU as well, when it is asked to describe one."""
  if not tpu_compile.LIBRARY.exists():
    pytest.skip("no TPU compiler under .cache: run make libtpu")
  code = (
    "from jax.experimental import topologies; topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
  )
  for flags, status in ((flags_of("tpu_flags 2"), 0), (["--xla_tpu_no_such_flag=true"], 1)):
    environment = tpu_compile.environment() | {"LIBTPU_INIT_ARGS": " ".join(flags)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
  assert len(flags_of("tpu_flags 1")) < len(flags_of("tpu_flags 2"))


# --- dry runs ------------------------------------------------------------------------------------------------------


def test_tpu_dry_run(launch):
  """A queued resource of two slices, all of it without gcloud."""
  done = launch(
    "tpu", *TPU, "--dry-run", "--accelerator-type=v5p-128", "--slices=2", "--spot", "--bucket=runs-1",
    "--config.data.instruction=It's $HOME", "--", "--log_dir=x",
  )  # fmt: skip
  lines = commands(done.stdout)
  assert [line[3:5] for line in lines if line[0] == "gcloud" and "scp" not in line and "ssh" not in line] == [
    ["queued-resources", "describe"], ["queued-resources", "create"], ["queued-resources", "delete"],
  ]  # fmt: skip
  create = next(line for line in lines if "create" in line)
  assert {
    "t1", "--project=p", "--zone=z", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--node-count=2",
    "--node-prefix=t1", "--spot",
  } <= set(create)  # fmt: skip
  remote = [word.partition("=")[2] for line in lines for word in line if word.startswith("--command=")]
  assert remote[0] == "true"
  assert remote[-3].endswith("worker.sh setup runs-1")
  assert remote[-1] == "bash rlpr_jax_code/launch/worker.sh follow"
  words = shlex.split(remote[-2])
  assert words[:3] == ["bash", "rlpr_jax_code/launch/worker.sh", "start"]
  assert program(words) == [
    "-m", "rlpr_jax.train", CONFIG, "--workdir=/mnt/rlpr_jax/a", "--distributed",
    "--config.data.instruction=It's $HOME", "--log_dir=x", "--config.mesh.data=2",
  ]  # fmt: skip
  init = next(word for word in words if word.startswith("LIBTPU_INIT_ARGS="))
  assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in init
  for line in lines:
    if {"ssh", "scp"} & set(line):
      assert {"--worker=all", "--node=all"} <= set(line)
  assert launch.calls() == []


@pytest.mark.parametrize(
  ("kind", "version"),
  [
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-64", "v2-alpha-tpuv6e"),
  ],
)
def test_runtime_by_type(launch, kind, version):
  done = launch("tpu", *TPU, "--dry-run", f"--accelerator-type={kind}", "--reservation=r9")
  create = next(line for line in commands(done.stdout) if "create" in line)
  assert f"--runtime-version={version}" in create
  assert {"alpha", "--node-id=t1", "--reserved", "--reservation=r9"} <= set(create)
  assert "--config.mesh.data" not in done.stdout


def test_tpu_dry_run_of_a_vm_that_is_there(launch):
  done = launch("tpu", *TPU, "--dry_run=true", "--iap", "--config.mesh.data=4")
  lines = commands(done.stdout)
  assert lines[0][1:5] == ["compute", "tpus", "tpu-vm", "describe"]
  assert not any("queued-resources" in line for line in lines)
  assert all("--tunnel-through-iap" in line for line in lines if {"ssh", "scp"} & set(line))


def test_a_mesh_that_is_given_stays(launch):
  done = launch("tpu", *TPU, "--dry-run", "--accelerator-type=v5p-128", "--slices=2", "--config.mesh.data=4")
  assert done.stdout.count("--config.mesh.data=4") == 1
  assert "--config.mesh.data=2" not in done.stdout


@pytest.mark.parametrize(
  ("script", "arguments"), [("tpu", [*TPU[1:], "--accelerator-type=v5p-128"]), ("slurm", LOCAL[1:])]
)
def test_what_stands_behind_a_recipe_is_passed_on(launch, script, arguments):
  recipe = "--config=configs/rlpr_qwen2_5_7b.py:v5p:4x4x4"
  assert "/rlpr_qwen2_5_7b.py:v5p:4x4x4 --" in launch(script, recipe, *arguments, "--dry-run").stdout


def test_gpu_dry_run(launch):
  done = launch("gpu", *LOCAL, "--dry-run", "--gpus=0,1", "--config.steps=2", "--python=/opt/python")
  look, start = commands(done.stdout)
  assert look == ["nvidia-smi", "--list-gpus"]
  assert f"PYTHONPATH={ROOT}" in start
  assert "CUDA_VISIBLE_DEVICES=0,1" in start
  assert program(start) == ["-m", "rlpr_jax.train", *LOCAL, "--config.steps=2"]
  assert start[start.index("-m") - 1] == "/opt/python"


def test_slurm_dry_run(launch):
  done = launch("slurm", *LOCAL, "--dry-run", "--nodes=2", "--partition=gpu", "--time=1-00:00:00", "--config.steps=2")
  *_, script = re.search(r"cat > (\S+job.sh) <<'END_OF_FILE'\n(.*)\nEND_OF_FILE\nsbatch", done.stdout, re.S).groups()
  for line in (
    "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--time=1-00:00:00", "--requeue",
    "--signal=B:USR1@120", "--open-mode=append",
  ):  # fmt: skip
    assert f"#SBATCH {line}\n" in script
  assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
  start = next(shlex.split(line) for line in script.splitlines() if line.startswith("env "))
  assert "--gpu-bind=none" in start
  assert program(start)[:-1] == [
    "-m", "rlpr_jax.train", f"--config={ROOT}/configs/quickstart.py", f"--workdir={ROOT}/runs/a", "--config.steps=2",
  ]  # fmt: skip
  assert commands(done.stdout)[-1] == ["sbatch", "--parsable", f"{ROOT}/runs/a/slurm/job.sh"]


def test_slurm_dry_run_without_gpus(launch):
  text = launch("slurm", *LOCAL, "--dry-run", "--gpus-per-node=0", "--tasks-per-node=4").stdout
  assert "#SBATCH --ntasks-per-node=4\n" in text
  assert "gpu" not in text.replace("gpus-per-node=0", "")


def manifest(text):
  return yaml.safe_load(re.search(r"<<'END_OF_FILE'\n(.*)\nEND_OF_FILE", text, re.S)[1])


@pytest.mark.parametrize(
  ("accelerator", "topology", "more", "nodes", "chips"),
  [
    ("tpu-v5p-slice", "4x4x4", ("--slices=2", "--spot"), 16, 4),
    ("tpu-v5-lite-podslice", "2x4", ("--reservation=r9",), 1, 8),
    ("tpu-v6e-slice", "16x16", ("--slices=4", "--service-account=me"), 64, 4),
    ("tpu-v6e-slice", "1x1", ("--claim=disk", "--bucket="), 1, 1),
    ("tpu-v4-podslice", "2x2x1", ("--namespace=team",), 1, 4),
  ],
)
def test_manifests_fit_the_schemas(launch, accelerator, topology, more, nodes, chips):
  """Of JobSet's custom resource, and of Kubernetes for the jobs that it makes."""
  jsonschema = pytest.importorskip("jsonschema")
  kubernetes = pytest.importorskip("kubernetes_validate")
  text = 'two\nlines "quoted" \\ $(HOME) @NAME@ # if spot'
  arguments = (*GKE, f"--accelerator={accelerator}", f"--topology={topology}", "--dry-run", *more)
  done = launch("gke", *arguments, f"--config.data.instruction={text}")
  found = manifest(done.stdout)
  jsonschema.validate(found, json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text()))
  (slices,) = found["spec"]["replicatedJobs"]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": slices["template"]["spec"]}
  kubernetes.validate(job, kubernetes.latest_version(), strict=True)
  options = dict(word[2:].partition("=")[::2] for word in more)
  assert slices["replicas"] == int(options.get("slices", 1))
  assert slices["template"]["spec"]["parallelism"] == slices["template"]["spec"]["completions"] == nodes
  template = slices["template"]["spec"]["template"]
  pod = template["spec"]
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  selector = pod["nodeSelector"]
  assert selector.pop("cloud.google.com/gke-tpu-accelerator") == accelerator
  assert selector.pop("cloud.google.com/gke-tpu-topology") == topology
  assert selector == (
    ({"cloud.google.com/gke-spot": "true"} if "spot" in options else {})
    | ({"cloud.google.com/reservation-name": "r9"} if "reservation" in options else {})
  )
  # Kubernetes reads $$( as $(.
  instruction = f"--config.data.instruction={text.replace('$(', '$$(')}"
  assert instruction in container["args"]
  assert ("--config.mesh.data=" in " ".join(container["args"])) == ("slices" in options)
  (volume,) = pod["volumes"]
  assert ("csi" in volume) == ("claim" not in options) == ("annotations" in (template["metadata"] or {}))
  assert found["spec"]["failurePolicy"]["maxRestarts"] == 100
  (rule,) = slices["template"]["spec"]["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [errors.USAGE, errors.INTERRUPTED]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("script", "arguments", "line"),
  [
    ("gpu", ["--workdir=x"], "--config: missing, expected a recipe such as configs/quickstart.py"),
    ("gpu", ["--config=configs/nope.py", "--workdir=x"], "--config: configs/nope.py: no such file"),
    ("gpu", [CONFIG], "--workdir: missing, expected the run's directory"),
    ("gpu", [*LOCAL, "--gpu=1"], "--gpu: no such flag, expected one of those that --help lists"),
    ("gpu", [*LOCAL, "--config.steps"], "--config.steps: no value, expected --config.steps=VALUE"),
    ("gpu", [*LOCAL, "--restarts=many"], "--restarts: many, expected a number from 0 on"),
    ("gpu", [*LOCAL, "--dry-run=maybe"], "--dry-run: maybe, expected true or false"),
    ("gpu", [*LOCAL, "x"], "x: not a flag, expected --config=FILE --workdir=DIR [--config.field=value ...]"),
    ("gpu", LOCAL, "nvidia-smi: not found, expected NVIDIA's driver on this host"),
    ("slurm", LOCAL, "sbatch: not found, expected Slurm's commands on this host"),
    ("slurm", [*LOCAL, "--tasks-per-node=0"], "--tasks-per-node: 0, expected a number from 1 on"),
    ("slurm", [*LOCAL, "--time=1 day"], "--time: 1 day, expected a word as sbatch takes it"),
    ("gke", GKE, "kubectl: not found, expected the Kubernetes CLI"),
    ("gke", [*GKE, "--accelerator=v5p"], "--accelerator: v5p, expected one of tpu-v4-podslice, tpu-v5-lite-podslice, "),
    ("gke", [*GKE, "--topology=3x3x3"], "--topology: 3x3x3, expected three numbers such as 2x2x4"),
    ("gke", [*GKE, "--accelerator=tpu-v6e-slice"], "--topology: 2x2x4, expected one of 1x1 2x2 2x4"),
    ("gke", [*GKE, "--claim=c"], "--bucket, --claim: expected one of them"),
    ("gke", [*GKE, "--workdir=/runs"], "--workdir: /runs, expected a directory under /mnt/rlpr_jax"),
    ("gke", [*GKE, "--topology=2x2x1", "--slices=2"], "--slices: 2 of one node each, expected slices of several nodes"),
    ("gke", [*GKE, "--chips-per-node=3"], "--chips-per-node: 3, expected a divisor of the 16 chips of 2x2x4"),
    ("tpu", TPU, "gcloud: not found, expected the Google Cloud CLI"),
    ("tpu", [*TPU[:3], "--dry-run"], "--project: unset, expected --project or gcloud config set core/project"),
    ("tpu", [*TPU[:4], "--dry-run"], "--zone: unset, expected --zone or gcloud config set compute/zone"),
    ("tpu", [*TPU, "--accelerator-type=v5p-13"], "--accelerator-type: v5p-13, expected one such as v4-8"),
    ("tpu", [*TPU, "--accelerator-type=v7-8"], "--accelerator-type: v7-8, expected one such as v4-8"),
    ("tpu", [*TPU, "--slices=2"], "--accelerator-type: missing, expected one such as v5p-128 with"),
    ("tpu", [*TPU, "--bucket=b-1", "--workdir=/runs"], "--workdir: /runs, expected a directory under /mnt/rlpr_jax"),
    ("tpu", [*TPU, "--accelerator-type=v6e-8", "--spot", "--reserved"], "--spot: together with a reservation"),
    ("tpu", [*TPU, "--config=/etc/passwd"], f"--config: /etc/passwd lies outside {ROOT}"),
  ],
)
def test_wrong_input_is_one_line(launch, script, arguments, line):
  done = launch(script, *arguments, status=2)
  assert done.stderr.startswith(f"launch/{script}.sh: {line}")
  assert done.stderr.count("\n") == 1
  assert done.stdout == ""


# --- running on, by launch/gpu.sh ----------------------------------------------------------------------------------

GPUS = 'printf "GPU 0: H100\\nGPU 1: H100\\n"'
# Ends as the plan says, line by line.
PLANNED = """
echo start
next=$(head -n 1 "$HOME/plan")
sed -i 1d "$HOME/plan"
if [[ $next == preempted ]]; then
  echo SUSPENDED >"$FAKE/state"
  exit 1
elif [[ $next == forever ]]; then
  trap 'echo saved >>"$HOME/saved"; exit 0' TERM
  # A signal that comes just before bash waits is seen only when the wait is over: so short ones.
  for ((i = 0; i < 1000; i++)); do sleep 0.1 >/dev/null 2>&1 & wait $!; done
fi
exit "$next"
"""


@pytest.fixture
def gpu(launch, tmp_path):
  launch.fake("nvidia-smi", GPUS)
  python = launch.fake("python", PLANNED)
  launch.arguments = (*LOCAL, f"--python={python}", "--backoff=0")
  launch.plan = lambda *ends: (tmp_path / "plan").write_text("".join(f"{end}\n" for end in ends))
  return launch


def test_a_crash_is_tried_again(gpu):
  gpu.plan(1, 139, 0)
  done = gpu("gpu", *gpu.arguments, "--config.steps=3")
  assert done.stdout == "start\n" * 3
  assert done.stderr.splitlines() == [
    "launch/gpu.sh: ended with status 1, restart 1 of 10 in 0 s",
    "launch/gpu.sh: ended with status 139, restart 2 of 10 in 0 s",
  ]
  assert gpu.calls()[1:] == [f"python -m rlpr_jax.train {' '.join(LOCAL)} --config.steps=3"] * 3


@pytest.mark.parametrize("status", [errors.USAGE, errors.INTERRUPTED])
def test_what_another_try_does_not_mend_is_not_tried_again(gpu, status):
  gpu.plan(status)
  assert gpu("gpu", *gpu.arguments, status=status).stdout == "start\n"


def test_trouble_of_the_machine_and_faults_are_tried_again(gpu):
  gpu.plan(errors.MACHINE, errors.FAULT, 128 + signal.SIGABRT, 0)
  assert gpu("gpu", *gpu.arguments).stdout == "start\n" * 4


def test_restarts_end(gpu):
  gpu.plan(3, 3, 4, 0)
  done = gpu("gpu", *gpu.arguments, "--restarts=2", status=4)
  assert done.stderr.endswith("ended with status 4, after 2 restarts: giving up\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(gpu, tmp_path, number):
  gpu.plan("forever", 0)
  process = gpu.begin("gpu", *gpu.arguments)
  assert process.stdout.readline() == "start\n"
  time.sleep(0.3)  # until its trap is set
  process.send_signal(number)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 0, err
  assert out == ""  # not started again
  assert (tmp_path / "saved").read_text() == "saved\n"


@pytest.fixture
def stopping(gpu):
  """In the place of the program, one that takes a while to save: begins it with these flags of the script."""
  python = gpu.fake("python", f"exec {sys.executable} -m tests.stopping_program")

  def begin(*arguments, saving=1, prefix=()):
    gpu.environment["SAVING"] = str(saving)
    process = gpu.begin("gpu", *LOCAL, f"--python={python}", "--backoff=0", *arguments, prefix=prefix)
    assert process.stderr.readline() == "ready\n"
    return process

  return begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_second_sigterm_is_as_patient_as_the_first(stopping, number):
  process = stopping()
  process.send_signal(number)
  err = "".join(process.stderr.readline() for _ in range(2))
  process.send_signal(signal.SIGTERM)
  _, rest = process.communicate(timeout=20)
  assert process.returncode == 0
  assert "saving\n" in err
  assert rest.endswith("saved\n")


def test_a_second_interrupt_ends_it_at_once(stopping):
  process = stopping(saving=100)
  process.send_signal(signal.SIGINT)
  assert "saving\n" in [process.stderr.readline() for _ in range(2)]
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGKILL
  assert "SIGINT again: ending the run at once" in err
  assert "saved" not in err


def test_what_does_not_save_within_its_grace_is_killed(stopping):
  process = stopping("--grace=1", saving=100)
  process.terminate()
  _, err = process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGKILL
  assert "not saved within --grace=1 s: ending the run" in err
  assert "saved\n" not in err


def test_under_nohup_a_terminal_that_closes_changes_nothing(stopping):
  process = stopping(prefix=(shutil.which("nohup"),))
  process.send_signal(signal.SIGHUP)
  time.sleep(0.5)
  assert process.poll() is None
  process.terminate()
  _, err = process.communicate(timeout=20)
  assert process.returncode == 0
  assert err.endswith("saved\n")


def test_a_run_saves_and_ends_when_its_script_is_killed(stopping):
  process = stopping()
  process.kill()
  assert process.communicate(timeout=20)[1] == "saving\nsaved\n"  # the program's too: it ends with it


def test_a_run_saves_when_nobody_reads_the_script_any_more(stopping, tmp_path):
  """As under `| tee log` in a terminal that closes: a line of its own must not end the script first."""
  process = stopping()
  process.stderr.close()
  process.send_signal(signal.SIGHUP)
  assert process.wait(timeout=20) == 0


def test_gpus_that_are_not_there(gpu):
  done = gpu("gpu", *gpu.arguments, "--gpus=0,5", status=2)
  assert done.stderr == "launch/gpu.sh: --gpus: no GPU 5 here, expected some of 2\n"
  gpu.fake("nvidia-smi", "")
  assert "lists no GPU" in gpu("gpu", *gpu.arguments, status=2).stderr


# --- launch/tpu.sh, with a gcloud whose workers are directories -----------------------------------------------------

# Answers as gcloud does. The first line of $FAKE/state is the state; the others come to it look by look.
GCLOUD = """
for word in "$@"; do
  case $word in --command=*) command=${word#--command=} ;; esac
done
case "$*" in
  "config get-value"*) cat "$FAKE/property" 2>/dev/null ;;
  *describe*reserv* | *reserv*describe*)
    if [[ -e $FAKE/reservation ]]; then cat "$FAKE/reservation"; exit; fi
    echo "ERROR: (gcloud.compute.reservations.describe) Could not fetch resource:" >&2
    echo " - The resource 'projects/p/zones/z/reservations/r9' was not found" >&2
    exit 1 ;;
  *describe*)
    if [[ -e $FAKE/refused ]]; then
      echo "ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: Cloud TPU API has not been used in project p" >&2
      exit 1
    elif [[ ! -e $FAKE/state ]]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/t1'" >&2
      exit 1
    fi
    head -n 1 "$FAKE/state"
    if (($(wc -l <"$FAKE/state") > 1)); then sed -i 1d "$FAKE/state"; fi ;;
  *create*) printf 'WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE\\n' >"$FAKE/state" ;;
  *delete*) rm "$FAKE/state" ;;
  *scp*)
    for home in "$FAKE"/worker?; do cp "$5" "$home"; done ;;
  *ssh*)
    if [[ -e $FAKE/unreachable ]]; then exit 255; fi
    jobs=() status=0
    for home in "$FAKE"/worker?; do
      (cd "$home" && HOME=$home bash -c "$command") &
      jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done
    exit $status ;;
esac
"""


@pytest.fixture
def tpu(launch, tmp_path):
  """Two workers, whose environment is installed already; a repository of what is needed."""
  launch.fake("gcloud", GCLOUD)
  launch.environment |= {"TMPDIR": str(tmp_path)}
  launch.root = repository = tmp_path / "repository"
  shutil.copytree(LAUNCH, repository / "launch")
  (repository / "configs").mkdir()
  for name in ("configs/quickstart.py", "requirements.txt"):
    shutil.copy(ROOT / name, repository / name)
  subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)
  subprocess.run(["git", "add", "."], cwd=repository, check=True)
  launch.homes = [tmp_path / f"worker{i}" for i in range(2)]
  for home in launch.homes:
    (home / "rlpr_jax_venv/bin").mkdir(parents=True)
    python = launch.fake("python", 'echo "$LIBTPU_INIT_ARGS" >"$HOME/flags"; pwd >"$HOME/where"' + PLANNED)
    python.rename(home / "rlpr_jax_venv/bin/python")
    shutil.copy(ROOT / "requirements.txt", home / "rlpr_jax_venv")

  def plan(*ends):
    for home in launch.homes:
      (home / "plan").write_text("".join(f"{end}\n" for end in ends))

  launch.plan = plan
  launch.arguments = (*TPU, "--backoff=0", "--poll=0")
  return launch


def verbs(launch):
  """What gcloud was asked to do, without looks at the state."""
  found = [call.split()[4] for call in launch.calls() if call.startswith("gcloud compute")]
  return [verb for verb in found if verb != "describe"]


def test_a_vm_that_is_there_is_given_the_code_and_runs_it(tpu, tmp_path):
  (tmp_path / "state").write_text("READY\n")
  (tpu.root / "configs/quickstart.py").write_text("# not committed\n")
  (tpu.root / "untracked").touch()
  (tpu.root / "requirements-old.txt").touch()
  subprocess.run(["git", "add", "requirements-old.txt"], cwd=tpu.root, check=True)
  (tpu.root / "requirements-old.txt").unlink()
  tpu.plan(0)
  done = tpu("tpu", *tpu.arguments, "--config.steps=3")
  assert done.stdout == "start\n" * 2
  assert verbs(tpu) == ["ssh", "ssh", "scp", "ssh", "ssh", "ssh"]
  for home in tpu.homes:
    code = home / "rlpr_jax_code"
    assert (code / "configs/quickstart.py").read_text() == "# not committed\n"
    assert not (code / "untracked").exists()
    assert (home / "where").read_text() == f"{code}\n"
    assert "xla_tpu_enable_async_collective_fusion" in (home / "flags").read_text()
  starts = [call for call in tpu.calls() if call.startswith("python")]
  assert starts == [f"python -m rlpr_jax.train {CONFIG} --workdir=/mnt/rlpr_jax/a --distributed --config.steps=3"] * 2
  assert not list(tmp_path.glob("tmp.*"))


def test_a_queued_resource_is_created_and_again_when_preempted(tpu):
  tpu.plan("preempted", 0)
  done = tpu("tpu", *tpu.arguments, "--accelerator-type=v5litepod-16", "--spot")
  start = ["ssh", "ssh", "scp", "ssh", "ssh", "ssh"]
  assert verbs(tpu) == ["create", *start, "delete", "create", *start]
  states = re.findall(r"t1 is (.+)", done.stderr)
  once = ["not there", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  assert states == [*once, "SUSPENDED", *once]
  assert "ended with status 1, restart 1 of 100" in done.stderr


@pytest.mark.parametrize("status", [errors.USAGE, errors.INTERRUPTED])
def test_what_another_try_does_not_mend_ends_it_on_the_workers(tpu, tmp_path, status):
  (tmp_path / "state").write_text("READY\n")
  tpu.plan(status)
  assert tpu("tpu", *tpu.arguments, status=status).stdout == "start\n" * 2


def begin_on_workers(tpu, tmp_path, *plan):
  """The script, with a program on each worker that has begun."""
  (tmp_path / "state").write_text("READY\n")
  tpu.plan(*plan)
  process = tpu.begin("tpu", *tpu.arguments)
  assert [process.stdout.readline() for _ in tpu.homes] == ["start\n"] * 2
  time.sleep(0.3)
  return process


def test_a_signal_stops_the_workers(tpu, tmp_path):
  process = begin_on_workers(tpu, tmp_path, "forever")
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=20)
  assert "the run on the workers saves and stops" in err
  for home in tpu.homes:
    assert (home / "saved").read_text() == "saved\n"
    assert (home / "rlpr_jax_state/status").read_text() == "143\n"  # saved, not finished


def test_a_run_outlives_its_connection_and_the_next_launch_stops_it(tpu, tmp_path):
  process = begin_on_workers(tpu, tmp_path, "forever", 0)
  process.kill()
  process.wait()
  assert not any((home / "saved").exists() for home in tpu.homes)
  tpu("tpu", *tpu.arguments)
  assert all((home / "saved").exists() for home in tpu.homes)


def test_a_run_outlives_the_terminal_of_its_launch(tpu, tmp_path):
  """It is elsewhere: what follows it here ends, and it goes on."""
  process = begin_on_workers(tpu, tmp_path, "forever")
  process.send_signal(signal.SIGHUP)
  assert process.wait(timeout=20) == 128 + signal.SIGHUP
  process.communicate(timeout=20)  # to the end of the output: nothing of it is left here
  home = tpu.homes[0]
  assert is_alive(int((home / "rlpr_jax_state/pid").read_text()))
  assert not (home / "saved").exists()
  for home in tpu.homes:
    command = ["bash", home / "rlpr_jax_code/launch/worker.sh", "stop"]
    subprocess.run(command, env=tpu.environment | {"HOME": str(home)}, check=True)


def test_a_run_saves_and_ends_when_its_worker_script_is_killed(tmp_path):
  """Or the next one would begin beside it."""
  command = ["bash", LAUNCH / "worker.sh", "run", sys.executable, "-m", "tests.stopping_program"]
  environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
  assert process.stderr.readline() == "ready\n"
  process.kill()
  assert process.communicate(timeout=20)[1] == "saving\nsaved\n"


@pytest.mark.parametrize(
  ("files", "arguments", "line"),
  [
    ({}, [], "--name: TPU VM t1 in z is not there, expected READY"),
    ({"state": "STOPPED\n"}, [], "--name: TPU VM t1 in z is STOPPED, expected READY"),
    ({"state": "READY\n", "unreachable": ""}, [], "--name: not all workers of t1 answer ssh, expected 'true' to run"),
    ({"refused": ""}, [], "gcloud: ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: Cloud TPU API has not"),
    ({"refused": ""}, ["--accelerator-type=v6e-8"], "gcloud: ERROR: (gcloud.compute.tpus) PERMISSION_DENIED"),
    ({}, ["--accelerator-type=v6e-8", "--reservation=r9"], "--reservation: no r9 in z of p"),
    ({}, ["--project="], "--project: unset, expected --project or gcloud config set core/project"),
  ],
)
def test_a_tpu_that_cannot_be_used(tpu, tmp_path, files, arguments, line):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  done = tpu("tpu", *tpu.arguments, *arguments, status=2)
  assert done.stderr.splitlines()[-1].startswith(f"launch/tpu.sh: {line}")
  assert "start" not in done.stdout
  assert not {"create", "scp"} & set(verbs(tpu))


def test_project_and_zone_of_gcloud(tpu, tmp_path):
  (tmp_path / "property").write_text("mine\n")
  done = tpu("tpu", *TPU[:3], "--dry-run")
  assert "--project=mine --zone=mine" in done.stdout


def test_a_recipe_that_git_does_not_know_is_refused(tpu):
  (tpu.root / "configs/new.py").touch()
  done = tpu("tpu", *TPU, "--config=configs/new.py", "--dry-run", status=2)
  assert done.stderr.startswith("launch/tpu.sh: --config: configs/new.py is not tracked, expected 'git add")


def test_worker_shows_a_run_again_to_a_connection_that_was_tried_again(tpu):
  """gcloud does so by itself; a second run must not begin."""
  home = tpu.homes[0]
  shutil.copytree(LAUNCH, home / "rlpr_jax_code/launch")
  tpu.plan("forever")
  environment = tpu.environment | {"HOME": str(home), "PATH": os.environ["PATH"]}
  command = ["bash", home / "rlpr_jax_code/launch/worker.sh"]
  start, follow, stop = [*command, "start", "launch.1", "python", "x"], [*command, "follow"], [*command, "stop"]
  subprocess.run(start, env=environment, check=True)
  first = subprocess.Popen(follow, env=environment, stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == "start\n"
  first.kill()
  subprocess.run(start, env=environment, check=True)
  again = subprocess.Popen(follow, env=environment, stdout=subprocess.PIPE, text=True)
  time.sleep(0.3)
  subprocess.run(stop, env=environment, check=True)
  assert again.communicate(timeout=20)[0] == ""  # what was shown before is not shown twice
  assert again.returncode == 143
  assert tpu.calls() == ["python x"]


# --- launch/gke.sh, with a kubectl that stands in -------------------------------------------------------------------

KUBECTL = """
case "$*" in
  "config current-context") [[ -e $FAKE/context ]] && cat "$FAKE/context" ;;
  *"get crd"*)
    if [[ ! -e $FAKE/crd ]]; then
      echo 'Error from server (NotFound): customresourcedefinitions.apiextensions.k8s.io "jobsets" not found' >&2
      exit 1
    fi ;;
  *"get jobset"*) if [[ -e $FAKE/conditions ]]; then head -n 1 "$FAKE/conditions"; sed -i 1d "$FAKE/conditions"; fi ;;
  *apply*) cat >"$FAKE/manifest" ;;
  *logs*) echo "step 1" ;;
esac
"""


@pytest.fixture
def gke(launch, tmp_path):
  launch.fake("kubectl", KUBECTL)
  (tmp_path / "context").write_text("cluster\n")
  (tmp_path / "crd").touch()
  return launch


@pytest.mark.parametrize(("end", "status"), [("Completed", 0), ("Failed", 1)])
def test_the_manifest_is_applied_and_followed(gke, tmp_path, end, status):
  # No JobSet yet; then one that runs, restarts and ends.
  (tmp_path / "conditions").write_text(f"\nStartupPolicyCompleted\n\n{end}\n")
  done = gke("gke", *GKE, "--poll=0", "--config.steps=2", status=status)
  assert done.stdout == "step 1\n" * 3
  assert done.stderr.endswith(f"r1: {end}\n")
  dry = gke("gke", *GKE, "--dry-run", "--config.steps=2")
  assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest(dry.stdout)
  assert not any("delete" in call for call in gke.calls())


def test_a_jobset_that_has_ended_is_started_anew(gke, tmp_path):
  (tmp_path / "conditions").write_text("Failed\nCompleted\n")
  gke("gke", *GKE, "--poll=0")
  verbs = [call.split()[2] for call in gke.calls() if "namespace" in call]
  assert verbs == ["get", "get", "delete", "apply", "logs", "get"]


@pytest.mark.parametrize(
  ("gone", "line"),
  [
    ("context", "--context: kubectl has none, expected gcloud container clusters get-credentials CLUSTER"),
    ("crd", "JobSet is not installed in the cluster, expected its release's manifests to be applied"),
  ],
)
def test_a_cluster_that_cannot_be_used(gke, tmp_path, gone, line):
  (tmp_path / gone).unlink()
  done = gke("gke", *GKE, status=2)
  assert done.stderr.startswith(f"launch/gke.sh: {line}")
  assert not (tmp_path / "manifest").exists()


# --- launch/slurm.sh, with an sbatch that stands in ------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, errors.USAGE, errors.INTERRUPTED, errors.MACHINE, errors.FAULT])
def test_the_batch_script_asks_for_another_try_where_one_may_help(launch, tmp_path, status):
  launch.fake("sbatch", 'cp "$2" "$FAKE/submitted"; echo 77')
  launch("slurm", CONFIG, f"--workdir={tmp_path}/run", "--gpus-per-node=0")
  launch.fake("srun", f"exit {status}")
  launch.fake("scontrol", "")
  launch.fake("sleep", "")
  environment = launch.environment | {"SLURM_JOB_ID": "77"}
  done = subprocess.run(["bash", tmp_path / "submitted"], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == status, done.stderr
  asked = "scontrol requeue 77" in launch.calls()
  assert asked == (status in (errors.MACHINE, errors.FAULT))


def test_a_job_is_submitted(launch, tmp_path):
  launch.fake("sbatch", 'cp "$2" "$FAKE/submitted"; echo "77;cluster"')
  launch.fake("sinfo", 'case "$*" in *=gpu*) echo "gpu*" ;; *partition*) ;; *) printf "gpu\\ncpu\\ngpu\\n" ;; esac')
  arguments = (CONFIG, f"--workdir={tmp_path}/run")
  done = launch("slurm", *arguments, "--partition=gpu")
  assert done.stdout == f"submitted job 77; its logs: {tmp_path}/run/slurm/77-*.log; scancel 77 stops it\n"
  dry = launch("slurm", *arguments, "--partition=gpu", "--dry-run").stdout
  assert (tmp_path / "submitted").read_text() in dry
  refused = launch("slurm", *arguments, "--partition=tpu", status=2)
  assert refused.stderr == "launch/slurm.sh: --partition: no tpu here, expected one of cpu gpu\n"
  launch.fake("sbatch", 'echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1')
  assert "launch/slurm.sh: sbatch: refused" in launch("slurm", *arguments, status=2).stderr


# --- launch/local.py ------------------------------------------------------------------------------------------------


def local(*arguments, **options):
  return subprocess.run(
    [sys.executable, "launch/local.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False,
    env=os.environ | {"PYTHONPATH": str(ROOT)}, **options,
  )  # fmt: skip


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
@pytest.mark.parametrize("mark", [["--"], []])
def test_local_dry_run(flag, mark):
  done = local("--processes=2", flag, *mark, *LOCAL, "--config.steps=2")
  *lines, last = commands(done.stdout)
  assert last == ["wait"]
  for i, words in enumerate(lines):
    assert f"--process={i}" in words
    assert words[-4:] == [*LOCAL, "--config.steps=2", "&"]
  assert len(lines) == 2


@pytest.mark.parametrize(
  ("argument", "line"),
  [
    ("--config=nope.py", "--config: nope.py: no such file"),
    ("--processes=0", "flag --processes=0: 0 is not a positive integer"),
  ],
)
def test_local_refuses_wrong_input(argument, line):
  done = local(argument, "--workdir=x")
  assert (done.returncode, done.stderr) == (2, f"launch/local.py: {line}\n")


def begin_local(directory, *arguments, saving=1):
  """Two programs that take a while to save; their process ids are the names of the files of `directory`."""
  directory.mkdir()
  process = subprocess.Popen(
    [sys.executable, "launch/local.py", "--processes=2", "--module=tests.stopping_program", *arguments], cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "SAVING": str(saving), "DIRECTORY": str(directory)},
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert [process.stderr.readline() for _ in range(2)] == ["ready\n"] * 2
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_local_passes_signals_on_and_waits(tmp_path, number):
  process = begin_local(tmp_path / "ids")
  process.send_signal(number)
  lines = [process.stderr.readline() for _ in range(2)]
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=20)
  assert (process.returncode, "".join(lines) + err) == (0, "saving\n" * 2 + "saved\n" * 2)


def test_local_programs_save_and_end_when_it_is_killed(tmp_path):
  process = begin_local(tmp_path / "ids")
  process.kill()
  assert sorted(process.communicate(timeout=20)[1].split()) == ["saved"] * 2 + ["saving"] * 2
  assert not any(is_alive(int(path.name)) for path in (tmp_path / "ids").iterdir())


@pytest.mark.parametrize(("arguments", "again"), [(["--grace=1"], None), ([], signal.SIGINT)])
def test_local_ends_what_does_not_save(tmp_path, arguments, again):
  """After its grace, or at a second Ctrl-C."""
  process = begin_local(tmp_path / "ids", *arguments, saving=100)
  process.send_signal(signal.SIGINT)
  assert [process.stderr.readline() for _ in range(2)] == ["saving\n"] * 2
  if again:
    process.send_signal(again)
  _, err = process.communicate(timeout=20)
  assert process.returncode > 0
  assert "saved" not in err


@pytest.mark.slow
def test_local_trains(tmp_path):
  """The quickstart's recipe on two processes, with a short warm start and few prompts."""
  done = local(
    "--processes=2", "--", CONFIG, f"--workdir={tmp_path / 'run'}", "--config.steps=2", "--config.warm_start.steps=5",
    "--config.evaluation.prompts=0", "--config.prompts_per_step=8", "--config.rollout.prompts_per_draw=8", timeout=1200,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 2


@pytest.mark.slow
def test_gpu_script_trains_on_the_cpu(launch, tmp_path):
  """With a stand-in for nvidia-smi alone; the program is the real one."""
  launch.fake("nvidia-smi", GPUS)
  (tmp_path / "tiny.py").write_text(RECIPE)
  launch.environment = os.environ | launch.environment | {"JAX_PLATFORMS": "cpu"}
  process = launch.begin(
    "gpu", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", f"--python={sys.executable}",
    "--config.steps=2", "--config.warm_start.steps=2", "--config.evaluation.prompts=0",
  )  # fmt: skip
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 2
