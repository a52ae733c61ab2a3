"""Many processes, one program: how they find each other, who does which part, and what they tell each other.

Every process holds the whole data set, draws the same prompts in the same order and samples its share of them on its
own devices. What came of it is gathered, so that from there on all decide alike, and the update runs on all devices.
With one process nothing is sent.
"""

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlpr_jax.errors import Ending, InputError, MachineError

T = TypeVar("T")

_HEARTBEAT = 30  # seconds without a sign of life after which a process is taken for dead, and the others end


def start(
  distributed: bool = False, coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
  """Joins the other processes, if there are any; to be called before anything asks jax for its devices.

  From then on only process 0 prints. A process that dies ends the others.

  Args:
    distributed: there are others, whom jax is to find, even where the environment says nothing of them.
    coordinator: HOST:PORT of process 0.
    count: how many processes there are.
    index: which of them this one is.

  Raises:
    InputError: arguments that do not fit together.
    MachineError: the other processes cannot be reached.
  """
  given = {"--coordinator": coordinator, "--processes": count, "--process": index}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) in (1, 2) and not announced(os.environ):
    raise InputError(f"{', '.join(missing)}: missing, expected --coordinator, --processes and --process together")
  if len(missing) == 3 and not distributed and not announced(os.environ):
    return
  if count is not None and index is not None and not missing and index >= count:
    raise InputError(f"--process: {index}, expected a number under --processes {count}")
  bind = None
  if coordinator is not None:
    host, port = split_address(coordinator)
    if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
      bind = bind_address(host, port)
  local_devices = None
  # jax knows Open MPI by a variable of its version 4. Later ones tell no address, which has to be given.
  if "OMPI_COMM_WORLD_SIZE" in os.environ and missing == ["--processes", "--process"]:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    count, index, local_device = (int(os.environ[name]) for name in names)
    local_devices = [local_device]
  try:
    jax.distributed.initialize(
      coordinator,
      count,
      index,
      local_devices,
      coordinator_bind_address=bind,
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    kind = MachineError if isinstance(error, jax.errors.JaxRuntimeError) else InputError
    raise kind(f"--distributed: {' '.join(str(error).split())[:300]}") from None
  if jax.default_backend() == "cpu":
    # There a program's collectives run in the order in which it was compiled, and one that a process reads, for only
    # the first one writes, has another than one that the others compile: they would wait for each other for ever. To be
    # said before anything is compiled, since jax asks once.
    jax.config.update("jax_enable_compilation_cache", False)
  print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices", flush=True)
  if jax.process_index():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split_address(address: str) -> tuple[str, int]:
  """Host and port of `--coordinator`.

  Raises:
    InputError: not such an address.

  >>> split_address("localhost:8476"), split_address("[::1]:8476")
  (('localhost', 8476), ('::1', 8476))
  """
  host, colon, port = address.rpartition(":")
  bracketed = host.startswith("[") and host.endswith("]")
  if not colon or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise InputError(f"--coordinator: {address}, expected HOST:PORT")
  if ":" in host and not bracketed:
    raise InputError(f"--coordinator: {address}, expected [HOST]:PORT for an address with colons")
  return host.strip("[]"), int(port)


def bind_address(host: str, port: int) -> str | None:
  """Where process 0 listens for the others: at the address that was named, not on every network of its machine.

  Returns:
    an address; None, which is all networks, for a name that another machine may know as another address than this one
    does: one that stands for this machine's loopback here, or for a load balancer.

  >>> bind_address("localhost", 8476), bind_address("127.0.0.1", 8476)
  ('localhost:8476', '127.0.0.1:8476')
  """
  named = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
  if host == "localhost":
    return named
  try:
    found = {place[4][0] for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
  except OSError:
    return None  # jax says what is wrong with it
  is_name = host not in found
  if is_name and any(ipaddress.ip_address(str(place).partition("%")[0]).is_loopback for place in found):
    return None
  return named if all(_is_here(str(place)) for place in found) else None


def _is_here(address: str) -> bool:
  """Whether an address is one of this machine's."""
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
      probe.bind((address, 0))
    except OSError:
      return False
  return True


@contextlib.contextmanager
def end_together(ending: Ending) -> Iterator[None]:
  """With many processes, an error ends this one at once, so that the others notice; they would wait for it for ever.

  Args:
    ending: how the program ends.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
      raise
    who = f"process {jax.process_index()} of {jax.process_count()}: "
    status = ending.say(error, who, "perhaps since another process died")
    os._exit(status)  # not by way of a shutdown that waits for the others


def announced(environment: Mapping[str, str]) -> bool:
  """Whether the environment was set up for more than one process: by srun, mpirun, or GKE's TPU workers.

  >>> announced({"SLURM_STEP_NUM_TASKS": "4"}), announced({"OMPI_COMM_WORLD_SIZE": "1"})
  (True, False)
  """
  names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
  counts = [environment.get(name, "1") for name in names]
  workers = [environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")]
  return any("," in names for names in workers) or any(count.isdigit() and int(count) > 1 for count in counts)


def is_first() -> bool:
  """Whether this process writes and prints."""
  return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
  """The part of a sequence that is this process's; `gather` puts what came of the parts back in order.

  >>> share([5, 6, 7])  # of one process
  [5, 6, 7]
  """
  size = -(-len(items) // jax.process_count())
  return items[jax.process_index() * size :][:size]


def gather(tree: Any, total: int) -> Any:
  """Numpy arrays whose rows belong to this process's `share` of `total` things, as arrays of all.

  Args:
    tree: arrays [share, ...] of at most 32 bits a number.

  Returns:
    arrays [total, ...], the same on every process.

  >>> gather(np.array([5, 6, 7]), total=3).tolist()
  [5, 6, 7]
  """
  if jax.process_count() == 1:
    return tree
  size = -(-total // jax.process_count())

  def gather_rows(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
    return np.asarray(multihost_utils.process_allgather(padded, tiled=True))[:total]

  return jax.tree.map(gather_rows, tree)


def any_of(flag: bool) -> bool:
  """Whether the flag is up on some process. All of them must ask."""
  return bool(flag) if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(bool(flag))).any())
