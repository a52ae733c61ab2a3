"""What loading reads and holds, with one device, with several and with several processes: each in its own interpreter.

This file is also what they run: `python test_loading_memory.py measure|count DIRECTORY MESH DTYPE [PROCESS PORT]`.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlpr_jax import huggingface

MIB = 2**20
ONE, FSDP = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 1}
# Far more in a stacked parameter than in any tensor of the files: a host copy of one would be seen.
CONFIG = {
  "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8,
  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
# Beside the bound: the second copy of a layer's tensor that a CPU device has while it turns it, and the allocator.
SLACK = 16 * MIB


def shapes(config):
  width, mlp, heads, kv_heads, size = (
    config[name]
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
  )
  layer = {
    "input_layernorm": (width,), "post_attention_layernorm": (width,),
    "self_attn.q_proj": (heads * size, width), "self_attn.k_proj": (kv_heads * size, width),
    "self_attn.v_proj": (kv_heads * size, width), "self_attn.o_proj": (width, heads * size),
    "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp),
  }  # fmt: skip
  named = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
  for i in range(config["num_hidden_layers"]):
    named |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  return named


def write_model(directory, config, dtype):
  """A file for each layer, and one for the rest."""
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(config))
  weight_map = {}
  for name in shapes(config):
    parts = name.split(".")
    weight_map[name] = f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors"
  rng = np.random.default_rng(0)
  for file in sorted(set(weight_map.values())):
    held = {name: shape for name, shape in shapes(config).items() if weight_map[name] == file}
    save_file({name: rng.random(shape, np.float32).astype(dtype) for name, shape in held.items()}, directory / file)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return directory


def start(what, directory, mesh, dtype, devices, *process):
  flags = f"--xla_force_host_platform_device_count={devices}"
  # Large blocks go back to the system when they are freed, so that resident memory is what is in use.
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
  command = [sys.executable, __file__, what, str(directory), json.dumps(mesh), dtype, *map(str, process)]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, env=environment, **pipes)


def finish(child):
  out, errors = child.communicate(timeout=240)
  assert child.returncode == 0, errors[-3000:]
  return json.loads(out.splitlines()[-1])


# --- memory ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Directories of the same model by the dtype of their files."""
  root = tmp_path_factory.mktemp("models")
  made = {dtype: write_model(root / dtype, CONFIG, dtype) for dtype in ("float32", "bfloat16")}
  yield made
  for file in root.rglob("*.safetensors"):
    file.unlink()


def anonymous_bytes(pid):
  """Memory of a process that is not a file's."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
  ("stored", "dtype", "mesh", "devices"),
  [
    pytest.param("float32", "float32", ONE, 1, marks=pytest.mark.slow),
    ("float32", "bfloat16", ONE, 1),
    pytest.param("float32", "float32", FSDP, 4, marks=pytest.mark.slow),
    ("bfloat16", "float32", FSDP, 4),
  ],
)
def test_peak_memory(model, stored, dtype, mesh, devices):
  """At most the parameters, the largest tensor and the slack; sampled each millisecond from outside."""
  child = start("measure", model[stored], mesh, dtype, devices)
  assert child.stdout.readline() == "ready\n", child.communicate()[1][-3000:]
  before = peak = anonymous_bytes(child.pid)
  child.stdin.write("go\n")
  child.stdin.flush()
  os.set_blocking(child.stdout.fileno(), False)
  while not (line := child.stdout.readline()):
    assert child.poll() is None, child.communicate()[1][-3000:]
    peak = max(peak, anonymous_bytes(child.pid))
    time.sleep(0.001)
  after = anonymous_bytes(child.pid)
  child.stdin.write("end\n")
  child.communicate(timeout=60)
  sizes = [int(np.prod(shape)) for shape in shapes(CONFIG).values()]
  width = {"float32": 4, "bfloat16": 2}
  kept = sum(sizes) * width[dtype]
  assert json.loads(line) == kept
  assert after - before > 0.9 * kept  # what is measured is really there
  largest = max(sizes) * max(width[stored], width[dtype])
  stacked = CONFIG["num_hidden_layers"] * CONFIG["intermediate_size"] * CONFIG["hidden_size"] * width[dtype]
  print(f"{stored} as {dtype} on {devices}: kept {kept // MIB}, peak {(peak - before) // MIB} MiB")
  assert peak - before <= kept + largest + SLACK
  if dtype == "float32":
    assert largest + SLACK < stacked  # such a copy would not pass


# --- what is read ---

TINY = CONFIG | {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "head_dim": 6, "num_hidden_layers": 2}


def check_reads(reads, config, directory, parts):
  """`reads`: [name, shape of the file's tensor that was read, sum] of every read; `parts`: how often each was split."""
  whole = {}
  for file in directory.glob("*.safetensors"):
    whole |= load_file(file)
  by_name = {name: [read for read in reads if read[0] == name] for name in whole}
  assert sum(map(len, by_name.values())) == len(reads)
  for name, shape in shapes(config).items():
    expected = 1 if len(shape) == 1 else parts
    assert len(by_name[name]) == expected, name
    assert {int(np.prod(read[1])) for read in by_name[name]} == {int(np.prod(shape)) // expected}, name
    np.testing.assert_allclose(sum(read[2] for read in by_name[name]), whole[name].sum(dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize(
  ("mesh", "parts"),
  [
    pytest.param({"data": 1, "fsdp": 4, "tensor": 1}, 4, marks=pytest.mark.slow),
    pytest.param({"data": 1, "fsdp": 2, "tensor": 2}, 4, marks=pytest.mark.slow),
    pytest.param({"data": 1, "fsdp": 1, "tensor": 4}, 4, marks=pytest.mark.slow),
    ({"data": 2, "fsdp": 1, "tensor": 2}, 2),  # what two devices keep is read once
    pytest.param({"data": 4, "fsdp": 1, "tensor": 1}, 1, marks=pytest.mark.slow),
  ],
)
def test_devices_read_their_slices(mesh, parts, tmp_path):
  directory = write_model(tmp_path / "model", TINY, "float32")
  check_reads(finish(start("count", directory, mesh, "float32", 4)), TINY, directory, parts)


def test_processes_read_the_slices_of_their_devices(tmp_path):
  """Two processes of two devices: each reads half, and a norm, which every device keeps, once."""
  directory = write_model(tmp_path / "model", TINY, "float32")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  children = [start("count", directory, FSDP, "float32", 2, process, port) for process in range(2)]
  reads = [finish(child) for child in children]
  matrices = [[read for read in of_one if len(read[1]) == 2] for of_one in reads]
  vectors = [[read for read in of_one if len(read[1]) == 1] for of_one in reads]
  assert vectors[0] == vectors[1]
  assert len(matrices[0]) == len(matrices[1]) == 2 * len([shape for shape in shapes(TINY).values() if len(shape) == 2])
  check_reads(matrices[0] + matrices[1] + vectors[0], TINY, directory, 4)


# --- in the other interpreters ---


def load(directory, mesh, dtype):
  from rlpr_jax import sharding

  return huggingface.load_pretrained(directory, sharding.create_mesh(**mesh), dtype)


def measure(directory, mesh, dtype):
  import jax

  load(directory, mesh, dtype)  # imports and compiled programs stay
  print("ready", flush=True)
  input()
  _, params = load(directory, mesh, dtype)
  print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), flush=True)
  input()


def count(directory, mesh, dtype, *process):
  import jax

  if process:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{process[1]}", num_processes=2, process_id=int(process[0]))
  from rlpr_jax import models, sharding
  from rlpr_jax.huggingface import loading

  reads, read = [], loading._read

  def recorded(tensor, index):
    found = read(tensor, index)
    reads.append((tensor.name, found.shape, float(found.sum(dtype=np.float64))))
    return found

  loading._read = recorded
  config, params = load(directory, mesh, dtype)
  wanted = models.abstract_params(config, sharding.create(sharding.create_mesh(**mesh)))
  for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
  if not process:
    loading._read = read
    _, alone = huggingface.load_pretrained(directory)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
  print(json.dumps(reads), flush=True)


if __name__ == "__main__":
  {"measure": measure, "count": count}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
