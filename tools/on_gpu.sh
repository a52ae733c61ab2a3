#!/usr/bin/env bash
# Runs benchmarks.gpu on a machine with a GPU and no network, with the compiler's flags and the share of memory that
# launch/gpu.sh gives a run.
#
#   tools/on_gpu.sh WHEELS_DIR OUT [flags of benchmarks.gpu]
#
#   WHEELS_DIR   what tools/gpu_wheels.sh made, installed aside: the machine's own packages stay as they are; - for none
#   OUT          directory for results.json, results.md, log.txt and traces
#
# PYTHON names another Python than python3.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
USAGE=2
source "$ROOT/launch/flags.sh"

fail() { # LINE
  echo "tools/on_gpu.sh: $*" >&2
  exit "$USAGE"
}

(($# >= 2)) || fail "$# arguments, expected WHEELS_DIR OUT [flags]"
python=${PYTHON:-python3} wheels=$1 out=$2
shift 2
path=$ROOT
if [[ $wheels != - ]]; then
  [[ -n $(find "$wheels" -name "*.whl" -print -quit 2>/dev/null) ]] ||
    fail "$wheels: no wheels there, expected a directory that tools/gpu_wheels.sh made, or -"
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$site" "$wheels"/*.whl
  path=$site:$path
fi
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} XLA_FLAGS=$(gpu_flags) XLA_PYTHON_CLIENT_MEM_FRACTION=$GPU_MEMORY_SHARE \
  "$python" -m benchmarks.gpu --out="$out" "$@"
