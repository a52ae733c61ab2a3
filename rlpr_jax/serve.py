"""An OpenAI-compatible server: `rlpr serve --model=PATH_OR_REPO --port=8001`.

Chat and plain completions, streamed or not, from a Hugging Face directory, a name on the hub or the directory of a run.
"""

import math
import signal
import socket
from collections.abc import Sequence

from absl import flags

from rlpr_jax import command_line
from rlpr_jax.compilation import keep_programs
from rlpr_jax.errors import InputError, exit_with_one_line, needs_extra, setting_names
from rlpr_jax.judging.client import read_key
from rlpr_jax.runs import trained
from rlpr_jax.runs.storage import reason
from rlpr_jax.serving.loop import Loop

SIZES = {"slots": "--slots", "prompt_limit": "--prompt_limit", "max_response_length": "--response_limit"}


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    serve(command_line.parse(define_flags(), argv, __doc__))


def serve(given: flags.FlagValues) -> None:
  """Serves until a signal says to stop; then what runs is finished.

  Raises:
    InputError: flags, a model or a port that cannot be.
  """
  if not given.model:
    raise InputError("--model: missing, expected a Hugging Face directory, a name on the hub or the directory of a run")
  for name in ("slots", "prompt_limit", "response_limit", "max_body_kib", "time_limit"):
    if not given[name].value > 0:  # NaN is not
      raise InputError(f"--{name}: {given[name].value}, expected more than 0")
  if given.max_waiting < 0:
    raise InputError(f"--max_waiting: {given.max_waiting}, expected 0 or more")
  with needs_extra("serve"):
    import uvicorn

    from rlpr_jax.serving.app import Limits, create_app
  key = read_key(given.key_variable) if given.key_variable else None
  listening = listen(given.host, given.port)
  keep_programs(given.compilation_cache)
  policy = trained.load(trained.find(given.model, given.step), given.dtype)
  with setting_names(SIZES):
    engine = trained.create_engine(policy, given.slots, given.prompt_limit, given.response_limit)
    print("compiling", flush=True)
    engine.device.compile_programs(policy.params, scoring=False)
  loop = Loop(engine, policy.params, given.max_waiting)
  limits = Limits(given.max_body_kib * 1024, given.time_limit)
  name = given.name or given.model
  application = create_app(
    engine, loop, name, limits, key=key, origins=given.allowed_origins, raw_logprobs=given.logprobs == "raw"
  )
  # A client that no longer reads may not hold up the end for longer than a request may take.
  patience = math.ceil(given.time_limit)
  config = uvicorn.Config(application, log_config=None, server_header=False, timeout_graceful_shutdown=patience)
  # The server handles these itself, and raises them once more when all is done: then they are to do nothing.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  host, port = listening.getsockname()[:2]
  print(f"serving {name} at http://{host}:{port}/v1", flush=True)
  uvicorn.Server(config).run([listening])
  if loop.error:  # of a thread
    raise loop.error


def listen(host: str, port: int) -> socket.socket:
  """Opens a socket that clients can connect to from now on; a port of 0 is any that is free.

  Raises:
    InputError: it cannot be had.
  """
  try:
    return socket.create_server((host, port))
  except (OSError, OverflowError) as error:
    raise InputError(f"--host {host} --port {port}: cannot be listened on ({reason(error)})") from None


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string(
    "model", None, "Hugging Face directory, name on the hub, or directory of a run.", flag_values=given
  )
  flags.DEFINE_integer("step", None, "Checkpoint of a run; the newest if not given.", flag_values=given)
  flags.DEFINE_string("name", "", "Name of the model in requests; as in --model if not given.", flag_values=given)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and computation.", flag_values=given)
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all networks.", flag_values=given)
  flags.DEFINE_integer("port", 8001, "Port; 0 for any that is free.", flag_values=given)
  flags.DEFINE_string(
    "key_variable", "", "Environment variable with the key that clients must send; none if empty.", flag_values=given
  )
  flags.DEFINE_integer("slots", 32, "Responses that are sampled at once.", flag_values=given)
  flags.DEFINE_integer(
    "max_waiting", 256, "Responses that may wait for a slot; beyond, clients get 429.", flag_values=given
  )
  flags.DEFINE_integer("prompt_limit", 2048, "Tokens of a prompt, at most.", flag_values=given)
  flags.DEFINE_integer("response_limit", 3072, "Tokens of a response, at most.", flag_values=given)
  flags.DEFINE_integer("max_body_kib", 1024, "Size of a request, at most.", flag_values=given)
  flags.DEFINE_float(
    "time_limit", 600.0, "Seconds that a request may take, its time in the queue included.", flag_values=given
  )
  flags.DEFINE_enum(
    "logprobs",
    "raw",
    ["raw", "tempered"],
    "Log-probabilities that are told of sampled tokens: the model's own, or at the temperature and with penalties.",
    flag_values=given,
  )
  flags.DEFINE_list(
    "allowed_origins", [], "Origins of web pages that may ask (CORS), * for all; none if empty.", flag_values=given
  )
  flags.DEFINE_string(
    "compilation_cache", "~/.cache/rlpr_jax", "Compiled programs are kept here; empty for nowhere.", flag_values=given
  )
  return given


if __name__ == "__main__":
  main()
