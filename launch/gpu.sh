#!/usr/bin/env bash
# One host with GPUs: one process that has all of them. In the foreground; started again when it crashes.
#
#   launch/gpu.sh --config=FILE --workdir=DIR [--dry-run] [flags] [--config.field=value ...] [-- more flags of the program]
#
#   --config=FILE    recipe
#   --workdir=DIR    the run's directory
#   --gpus=0,1       those of the host's GPUs that are used (all)
#   --python=FILE    the Python that runs it (.venv/bin/python of the repository, where there is one)
#   --module=NAME    the program (rlpr_jax.train)
#   --restarts=N     so many restarts after crashes (10); a run goes on from its last checkpoint
#   --backoff=S      seconds before the first of them (10); the pause doubles, up to 300
#   --grace=S        seconds that the run may take to save in when it is told to stop (300); then it is killed
#   --dry-run        prints what would be run
#
# Ctrl-C, SIGTERM and SIGHUP are passed on: the run saves and stops, and is not started again. A second Ctrl-C stops it at
# once, a second SIGTERM is as patient as the first. A run whose launcher was killed saves and stops by itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

main() {
  parse_arguments "gpus= python= restarts=10 backoff=10 grace=300" "$@"
  expect_number restarts 0
  expect_number backoff 0
  expect_number grace 1
  if [[ -n ${OPTION[gpus]} ]]; then
    expect_match gpus '[0-9]+(,[0-9]+)*' "numbers as nvidia-smi lists them, such as 0,1"
  fi
  check_gpus
  set_program "$(local_python)" "${OPTION[config]}"
  local environment=("PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}" "XLA_FLAGS=$(gpu_flags)"
    "XLA_PYTHON_CLIENT_MEM_FRACTION=$GPU_MEMORY_SHARE")
  if [[ -n ${OPTION[gpus]} ]]; then environment+=("CUDA_VISIBLE_DEVICES=${OPTION[gpus]}"); fi
  keep_running wait_for env "${environment[@]}" "${PROGRAM[@]}"
}

check_gpus() {
  local found index
  if dry_run; then
    show nvidia-smi --list-gpus
    return
  fi
  expect_program nvidia-smi "NVIDIA's driver on this host"
  found=$(nvidia-smi --list-gpus) || fail "nvidia-smi: $(tail -n 1 <<<"$found"), expected the list of GPUs"
  [[ -n $found ]] || fail "nvidia-smi: lists no GPU, expected one at least"
  for index in ${OPTION[gpus]//,/ }; do
    grep -q "^GPU $index:" <<<"$found" || fail "--gpus: no GPU $index here, expected some of $(grep -c ^GPU <<<"$found")"
  done
}

main "$@"
