"""The table of logical axes, and models on a mesh of eight devices against one device.

The eight are CPU devices, which XLA makes when it is told so, in a process of its own: eight_devices.py.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rlpr_jax import models, sharding
from rlpr_jax.errors import InputError
from tests import eight_devices
from tests.models import cases

ROOT = pathlib.Path(__file__).parents[1]
# Compiling is nearly all of its time, and nothing is run often.
FLAGS = ("force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true")
LLAMA = cases.config("llama")  # 8 query heads, 2 key/value heads, embed 48, mlp 80, vocabulary 96


def mesh(data, fsdp, tensor):
  """A mesh without devices: enough for all but arrays."""
  return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


# --- the table ---


@pytest.mark.parametrize(
  ("axes", "expected"),
  [
    (("batch", "sequence", "embed"), P(("data", "fsdp"), None, None)),  # fsdp is taken by the rows
    (("batch", "sequence", "heads", None), P(("data", "fsdp"), None, ("tensor",), None)),
    (("vocab", "embed"), P(("tensor",), ("fsdp",))),
    (("embed", "heads", "head_dim"), P(("fsdp",), ("tensor",), None)),
    (("layers", "mlp", "embed"), P(None, ("tensor",), ("fsdp",))),
    (("layers", "batch", "kv_heads", None, None), P(None, ("data", "fsdp"), ("tensor",), None, None)),
    (("heads", "mlp"), P(("tensor",), None)),  # a mesh axis is used once
    ((None, "unheard_of"), P(None, None)),
    ((), P()),
  ],
)
def test_spec(axes, expected):
  assert sharding.create(mesh(2, 2, 2)).spec(axes) == expected


def test_rules_of_ones_own():
  """What they do not name stays as it is in the table."""
  where = sharding.create(mesh(2, 2, 2), {"embed": ("fsdp", "tensor"), "batch": ["data"], "vocab": ()})
  assert where.spec(("batch", "sequence", "embed")) == P(("data",), None, ("fsdp", "tensor"))
  assert where.spec(("vocab", "embed")) == P(None, ("fsdp", "tensor"))
  assert where.spec(("embed", "mlp")) == P(("fsdp", "tensor"), None)
  assert where.spec(("heads",)) == P(("tensor",))
  assert [where.num_shards(axis) for axis in ("batch", "embed", "vocab", "heads")] == [2, 4, 1, 2]
  assert hash(where) == hash(
    sharding.create(mesh(2, 2, 2), {"vocab": (), "batch": ["data"], "embed": ("fsdp", "tensor")})
  )


def test_ways_multiply():
  where = sharding.create(mesh(2, 3, 5))
  assert {axis: where.num_shards(axis) for axis in sharding.RULES} == {
    "batch": 6, "sequence": 1, "embed": 3, "heads": 5, "kv_heads": 5, "mlp": 5, "vocab": 5, "layers": 1,
  }  # fmt: skip
  assert where.replicate("kv_heads").num_shards("kv_heads") == 1
  assert where.replicate("kv_heads").num_shards("heads") == 5


@pytest.mark.parametrize(
  ("rules", "expected"),
  [
    ({"hedas": ("tensor",)}, "hedas: unknown axis, expected one of batch, sequence, embed, heads,"),
    ({"heads": ("tensr",)}, "heads: 'tensr', expected axes of the mesh: data, fsdp, tensor"),
  ],
)
def test_rules_that_cannot_be(rules, expected):
  with pytest.raises(InputError, match=f"^{expected}"):
    sharding.create(mesh(2, 2, 2), rules)


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ((2, 2, 3), "do not multiply to the 8 devices that are there"),
    ((1, 1, 4), "do not multiply to the 8 devices"),  # four would be idle
    ((3, -1, 1), "do not multiply to the 8 devices"),
    ((-1, -1, 1), "expected positive numbers and at most one -1"),
    ((0, 8, 1), "expected positive numbers"),
    ((-2, -4, 1), "expected positive numbers"),
  ],
)
def test_meshes_that_cannot_be(sizes, expected):
  with pytest.raises(InputError, match=f"^sizes .*{expected}"):
    sharding.create_mesh(*sizes, devices=[jax.devices()[0]] * 8)


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a TPU's device as a mesh asks for: of a slice of 4x4x2 chips, hosts of 2x2x1."""

  id: int
  coords: tuple[int, int, int]
  process_index: int
  slice_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"


def chips(slices=1):
  """Host by host, as jax lists them."""
  places = [(2 * hx + x, 2 * hy + y, z) for z in range(2) for hy in range(2) for hx in range(2)
            for y in range(2) for x in range(2)]  # fmt: skip
  return [
    Chip(32 * k + x + 4 * y + 16 * z, (x, y, z), 8 * k + i // 4, k)
    for k in range(slices)
    for i, (x, y, z) in enumerate(places)
  ]


def test_parts_lie_as_in_the_torus():
  """Also where hosts do not: they have the corners of squares."""
  found = sharding.create_mesh(devices=chips()).devices
  assert [chip.coords for chip in found.ravel()] == sorted((c.coords for c in chips()), key=lambda place: place[::-1])
  assert [chip.process_index for chip in found.ravel()[:8]] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(("tensor", "slices"), [(2, 1), (4, 1), (4, 2)])
def test_what_is_split_along_tensor_is_one_hosts(tensor, slices):
  found = sharding.create_mesh(data=slices, tensor=tensor, devices=chips(slices)).devices
  parts = found.reshape(-1, tensor)
  assert all(len({chip.process_index for chip in part}) == 1 for part in parts)
  firsts = [(part[0].slice_index, *part[0].coords[::-1]) for part in parts]
  assert firsts == sorted(firsts)
  assert all({chip.slice_index for chip in part.ravel()} == {i} for i, part in enumerate(found))


def test_all_of_a_host_together():
  found = sharding.create_mesh(devices=chips(), together=True).devices
  assert [chip.process_index for chip in found.ravel()] == [i // 4 for i in range(32)]


def test_which_parameters_each_process_can_have_whole():
  table = sharding.create(mesh(1, 4, 2))
  assert table.splits_params
  assert not table.replicate("embed").splits_params
  assert sharding.create(mesh(1, 4, 2), {"mlp": ("data",)}).replicate("embed").splits_params


def test_one_device_is_no_mesh():
  where = sharding.create(sharding.create_mesh(devices=jax.devices()[:1]))
  assert where == sharding.Sharding()
  assert where.named(("batch",)) is None
  assert where.num_shards("batch") == 1
  x = jnp.ones((3, 5))
  assert where.constrain(x, "batch", "embed") is x
  assert {leaf.sharding for leaf in jax.tree.leaves(models.abstract_params(LLAMA, where))} == {None}


@pytest.mark.parametrize(
  ("change", "shape", "expected"),
  [
    ({"num_heads": 6}, (1, 2, 4), "the model's 6 heads cannot be split 4 ways by the mesh, expected one of 1, 2, 3, 6"),
    ({"num_heads": 6, "num_kv_heads": 3}, (2, 2, 2),
     "3 kv_heads cannot be split 2 ways by the mesh, expected one of 1, 3"),
    ({"embed_dim": 49}, (1, 2, 1), "49 embed cannot be split 2 ways by the mesh, expected one of 1"),
    ({"mlp_dim": 81}, (1, 1, 2), "81 mlp cannot be split 2 ways by the mesh, expected one of 1"),
    ({"vocab_size": 100}, (1, 1, 8), "100 vocab cannot be split 8 ways by the mesh, expected one of 1, 2, 4, 5"),
  ],
)  # fmt: skip
def test_sizes_that_do_not_divide(change, shape, expected):
  config, where = dataclasses.replace(LLAMA, **change), sharding.create(mesh(*shape))
  for make in (lambda: models.definition(config, models.Runtime("float32", "xla", sharding=where)),
               lambda: models.abstract_params(config, where)):  # fmt: skip
    with pytest.raises(InputError) as caught:
      make()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("kv_heads", "tensor", "kept"), [(1, 2, ()), (2, 4, ()), (2, 2, ("tensor",)), (4, 2, ("tensor",))]
)
def test_fewer_key_value_heads_than_parts_are_on_every_device(kv_heads, tensor, kept):
  config = dataclasses.replace(LLAMA, num_kv_heads=kv_heads)
  leaves = models.abstract_params(config, sharding.create(mesh(1, 1, tensor)))["layers"]
  assert leaves["key"]["weight"].sharding.spec == P(None, ("fsdp",), kept or None, None)
  assert leaves["query"]["weight"].sharding.spec == P(None, ("fsdp",), ("tensor",), None)


# --- eight devices against one ---


@pytest.fixture
def eight(request):
  """What tests/eight_devices.py found: once for the slow tests, once for the others."""
  return run_on_eight(slow=request.node.get_closest_marker("slow") is not None)


@functools.cache
def run_on_eight(slow: bool) -> dict:
  flags = " ".join([os.environ["XLA_FLAGS"], *(f"--xla_{flag}" for flag in FLAGS)])
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
  done = subprocess.run(
    [sys.executable, "-m", "tests.eight_devices", *(["slow"] if slow else [])],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    capture_output=True,
    text=True,
    timeout=1200,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


MESHES = ("2 key/value heads on 8", "3 key/value heads on 4", "parameters alone", "places", "activations")


def named(*names):
  """Parameters of tests, some of them slow."""
  slow = {True: [pytest.mark.slow], False: []}
  return [pytest.param(*name, marks=slow[name[-1] in eight_devices.SLOW], id=" ".join(name)) for name in names]


CASES = [("cases", name) for name in eight_devices.CASES]
SAMPLED = named(*CASES, *(("meshes", name) for name in MESHES[:2]))


@pytest.mark.parametrize(("kind", "name"), named(*CASES, *(("meshes", name) for name in MESHES)))
def test_gradients_are_those_of_one_device(eight, kind, name):
  """Of the loss of training/update.py, by every parameter."""
  result = eight[kind][name]
  assert result["gradient_size"] > 0.1
  assert result["gradient"] < 1e-5


@pytest.mark.parametrize(("kind", "name"), SAMPLED)
def test_prefill_and_extend_are_those_of_one_device(eight, kind, name):
  assert eight[kind][name]["logits"] < 1e-5


@pytest.mark.parametrize(("kind", "name"), SAMPLED)
def test_samples_are_those_of_one_device(eight, kind, name):
  results = [value for key, value in eight[kind][name].items() if key.startswith("temperature")]
  assert len(results) == (2 if kind == "cases" else 1)  # greedy, too
  for result in results:
    assert result["tokens"] == result["expected"]
    assert result["counts"][0] == result["counts"][1]
    assert result["logprobs"] < 1e-5
  assert len({token for result in results for row in result["tokens"] for token in row}) > 15


@pytest.mark.parametrize(("kind", "name"), SAMPLED)
def test_scores_are_those_of_one_device(eight, kind, name):
  """Each part of the mesh scores suffixes after rows of its own; one device has them in another order."""
  for key, result in eight[kind][name].items():
    if key.startswith("temperature"):
      assert result["scores"] < 1e-5
      assert result["num_shards"] == {"2 key/value heads on 8": 1, "3 key/value heads on 4": 2}.get(name, 4)


@pytest.mark.parametrize(("kind", "name"), named(*CASES))
def test_cache_is_split_by_rows_and_key_value_heads(eight, kind, name):
  """Rows over data and fsdp, heads over tensor unless there is but one."""
  config = cases.config(name)
  for result in (eight[kind][name], eight[kind][name]["temperature 1"]):
    layers, rows, heads, slots, head_dim = result["cache"]
    assert heads == config.num_kv_heads
    assert result["cache_part"] == [layers, rows // 4, max(1, heads // 2), slots, head_dim]


@pytest.mark.parametrize(("kind", "name"), named(*(("meshes", name) for name in MESHES[:2])))
def test_a_cache_of_few_key_value_heads_is_split_by_rows_alone(eight, kind, name):
  rows_and_heads = {"2 key/value heads on 8": [4, 2], "3 key/value heads on 4": [2, 3]}[name]
  assert eight[kind][name]["cache_part"][1:3] == rows_and_heads


def test_parameters_are_split(eight):
  """Qwen2 with 8 query and 2 key/value heads of 6, data=2, fsdp=2, tensor=2: embed in two, heads, mlp, vocab in two."""
  norm, column = [[4, 48], [4, 48]], [[4, 48, 80], [4, 24, 40]]
  kv, kv_bias = [[4, 48, 2, 6], [4, 24, 1, 6]], [[4, 2, 6], [4, 1, 6]]
  assert eight["parts"]["parts"] == {
    "embedding": [[96, 48], [48, 24]],
    "head": [[96, 48], [48, 24]],
    "final_norm/scale": [[48], [48]],
    "layers/attention_norm/scale": norm,
    "layers/mlp_norm/scale": norm,
    "layers/query/weight": [[4, 48, 8, 6], [4, 24, 4, 6]],
    "layers/query/bias": [[4, 8, 6], [4, 4, 6]],
    "layers/key/weight": kv,
    "layers/key/bias": kv_bias,
    "layers/value/weight": kv,
    "layers/value/bias": kv_bias,
    "layers/out/weight": [[4, 8, 6, 48], [4, 4, 6, 24]],
    "layers/gate/weight": column,
    "layers/up/weight": column,
    "layers/down/weight": [[4, 80, 48], [4, 40, 24]],
  }
  assert eight["parts"]["init"] == 0  # the same random parameters, whatever the mesh


def test_rows_are_decoded_without_a_word_between_devices(eight):
  """Where the mesh splits nothing else. Once a call they ask whether anyone truncates, and after a token nothing."""
  assert eight["decoding"] == {"all-reduce": 1}


def test_policy_of_fewer_key_value_heads_than_parts(eight):
  """Loaded, with the optimiser's state: those heads on every device, all else split; moments as their parameters."""
  found = eight["few_heads"]
  for name, expected in {
    "layers/key/weight": [[2, 16, 2, 4], [2, 8, 2, 4]],
    "layers/value/weight": [[2, 16, 2, 4], [2, 8, 2, 4]],
    "layers/query/weight": [[2, 16, 4, 4], [2, 8, 1, 4]],
    "layers/up/weight": [[2, 16, 16], [2, 8, 4]],
    "layers/value/lora_b": [[2, 2, 2, 4], [2, 2, 2, 4]],
    "layers/query/lora_b": [[2, 2, 4, 4], [2, 2, 1, 4]],
  }.items():
    assert found[name] == [expected] * 3  # the parameter and its two moments


def test_whole_updates_are_those_of_one_device(eight):
  """Two steps of two micro-batches, then scores from the cache of the updated policy."""
  for name, result in eight["update"].items():
    # The second step's are of parameters that AdamW, as said below, has moved by rounding: on one kind of CPU the loss
    # is 1.3e-5 apart, where parameters are 1.3e-4.
    rel = 1e-4 if name == "adamw" else 1e-5
    assert result["metrics"] == pytest.approx(result["expected_metrics"], rel=rel, abs=1e-6)
    assert 0.1 < result["metrics"]["clip_fraction"] < 0.9
    assert result["state"] < 1e-5  # moments, or momentum
    assert result["scores"] < 1e-3  # AdamW divides the smallest gradients, which are rounding, by their own size
    assert result["stayed"]  # where they lay
  assert eight["update"]["momentum"]["moved"] > 1e-2
  assert eight["update"]["momentum"]["params"] < 1e-5
  assert eight["update"]["momentum"]["scores"] < 1e-5


@pytest.mark.parametrize("name", named(*((name,) for name in eight_devices.OPTIMIZERS)))
def test_every_optimizer_steps_on_a_mesh_as_on_one_device(eight, name):
  """Two steps; the large moments are split, of whatever rank they are."""
  result = eight["optimizers"][name]
  assert result["metrics"] == pytest.approx(result["expected_metrics"], rel=1e-4, abs=1e-5)
  assert result["moved"] > 1e-4
  assert result["scores"] < 1e-3
  if name != "adamw":  # of whose steps the rounding of small gradients decides; its moments are compared above
    assert result["params"] < 2e-5
  assert result["stayed"]
  large = max(math.prod(whole) for whole, _ in result["places"])
  split = {math.prod(whole) / math.prod(part) for whole, part in result["places"] if math.prod(whole) == large}
  assert split == {4.0}
  # Beside those of a parameter's shape (adafactor's of what is too narrow to be factored, sm3's momentum) there are
  # moments of columns alone, which are split as the columns are.
  columns = {"adafactor": [[3, 256], [3, 128]], "sm3": [[256], [128]]}.get(name)
  assert columns is None or columns in result["places"]


def test_meshes_of_eight_devices(eight):
  assert eight["sizes"] == {
    "()": [1, 8, 1], "(2, -1, 2)": [2, 2, 2], "(1, 1, -1)": [1, 1, 8], "(4, 2, 1)": [4, 2, 1],
  }  # fmt: skip
