#!/usr/bin/env bash
# Collects the wheels that a machine with a GPU, Python 3.12, JAX and torch, but no network, lacks for this project.
#
#   tools/gpu_wheels.sh DIR [--tokamax] [--server]
#
#   DIR         a new or empty directory
#   --tokamax   the attention kernels, and what they import
#   --server    rlpr_jax.serve
#
# Such a machine is taken to have what comes with jax[cuda13], flax, optax, orbax-checkpoint, transformers, torch, pandas,
# matplotlib and tensorboard. Versions are those of requirements-newest.txt and requirements-dev.txt, the newest of what
# they do not name. Prints the wheels and the sum of their sizes; more than 64 MiB is refused.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
MOST=$((64 * 1024 * 1024)) # bytes
USAGE=2

# What training imports, and what these import that such a machine lacks.
TRAINING=(grain array_record portpicker datasets dill multiprocess ml_collections tenacity tensorboardX)
# tokamax 0.0.17 wants jax 0.11.1 or later (0.0.12 fails on it) and imports xprof, nearly all of the size, and of that a
# part that needs no more than fire. It says that it needs more of xprof's own needs: nothing of this project does.
TOKAMAX=(tokamax einshape immutabledict qwix pydantic pydantic_core annotated-types typing-inspection typing_extensions
  xprof fire termcolor)
SERVER=(starlette uvicorn)

fail() { # STATUS LINE
  echo "tools/gpu_wheels.sh: $2" >&2
  exit "$1"
}

pin() { # NAME: ==VERSION as the locks have it for the newest Python, or nothing
  sed -nE "s/^${1//[-_]/[-_]}==([^; ]+)( *;.*>=.*)?$/==\1/Ip" "$ROOT/requirements-newest.txt" "$ROOT/requirements-dev.txt" |
    head -n 1
}

main() {
  local directory="" names=("${TRAINING[@]}") requirements=() wheels=() word bytes=0
  for word in "$@"; do
    case $word in
      --tokamax) names+=("${TOKAMAX[@]}") ;;
      --server) names+=("${SERVER[@]}") ;;
      -*) fail "$USAGE" "$word: no such flag, expected DIR [--tokamax] [--server]" ;;
      *)
        [[ -z $directory ]] || fail "$USAGE" "$word: a second directory, expected DIR [--tokamax] [--server]"
        directory=$word
        ;;
    esac
  done
  [[ -n $directory ]] || fail "$USAGE" "DIR: missing, expected DIR [--tokamax] [--server]"
  mkdir -p "$directory"
  [[ -z $(find "$directory" -name "*.whl" -print -quit) ]] ||
    fail "$USAGE" "$directory: has wheels already, expected a new or empty directory: two versions of one stop the install"
  for word in "${names[@]}"; do
    requirements+=("$word$(pin "$word")")
  done
  # pip takes these names of platforms by the letter.
  local platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
    manylinux1_x86_64)
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]/#/--platform=}" --dest "$directory" \
    "${requirements[@]}"
  for word in "$directory"/*.whl; do
    bytes=$((bytes + $(stat -c %s "$word")))
    wheels+=("$(basename "$word")")
  done
  printf '%s\n' "${wheels[@]}"
  awk -v bytes="$bytes" -v count="${#wheels[@]}" 'BEGIN { printf "%d wheels, %.1f MiB\n", count, bytes / 2 ^ 20 }'
  ((bytes <= MOST)) || fail 1 "$directory: more than 64 MiB, expected at most that"
}

main "$@"
