#!/usr/bin/env bash
# Cloud TPU VMs, one or a pod slice or several slices: copies the code to all workers and runs it on them.
#
#   launch/tpu.sh --name=TPU --config=FILE --workdir=DIR [--dry-run] [flags] [--config.field=value ...] [-- more flags]
#
#   --config=FILE            recipe, of those that git tracks
#   --workdir=DIR            the run's directory, on storage that all workers see: under /mnt/rlpr_jax with --bucket, else
#                            a shared disk that is mounted at the same place everywhere
#   --name=NAME              of the TPU VM, or of the queued resource
#   --project=, --zone=      where (as gcloud is configured)
#   --bucket=NAME            a Cloud Storage bucket, which gcsfuse mounts at /mnt/rlpr_jax on each worker
#   --accelerator-type=TYPE  such as v5litepod-16, v5p-128, v6e-64: the TPU is a queued resource, created if it is not
#                            there, waited for, and created anew when it was preempted. Without it the TPU VM has to be
#                            there and READY, and is never created or deleted
#   --version=IMAGE          runtime (v2-alpha-tpuv5, v2-alpha-tpuv5-lite, v2-alpha-tpuv6e or tpu-ubuntu2204-base, by type)
#   --slices=N               slices (1); the data axis of the mesh is then the slices: --config.mesh.data=N
#   --spot                   preemptible capacity
#   --reserved               capacity of the project's reservation
#   --reservation=NAME       capacity of that reservation (gcloud alpha)
#   --internal-ip            ssh to internal addresses; --iap: through Identity-Aware Proxy
#   --module=NAME            the program (rlpr_jax.train)
#   --restarts=N             so many restarts after crashes and preemptions (100)
#   --backoff=S              seconds before the first of them (10); the pause doubles, up to 300
#   --poll=S                 seconds between two looks at a queued resource (30)
#   --dry-run                prints what would be run
#
# The run goes on when the connection breaks, the terminal closes or this script is killed; the same command stops what
# still runs, copies the code anew and goes on from the last checkpoint. Ctrl-C and SIGTERM are passed on: the run saves
# and stops. The TPU stays and costs until it is deleted (gcloud compute tpus queued-resources delete NAME --force).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

PROBE_SECONDS=180 # for `true` on all workers
CODE=rlpr_jax_code # under the home directory of each worker
WORKER=$CODE/launch/worker.sh
ARCHIVE=rlpr_jax_code.tar
STOP="test ! -e $WORKER || bash $WORKER stop"

main() {
  parse_arguments "name= project= zone= bucket= accelerator-type= version= slices=1 spot=false reserved=false
    reservation= internal-ip=false iap=false restarts=100 backoff=10 poll=30" "$@"
  check_flags
  CONFIG=$(config_in_repository)
  slices_along_data
  # Many processes find each other by what the machine knows of its slice.
  set_program python "$CONFIG" --distributed
  expect_program gcloud "the Google Cloud CLI"
  set_place
  WHOLE_GROUP=yes # gcloud and the ssh that it started
  DIRECTORY=/tmp LAUNCH=launch
  if ! dry_run; then
    LAUNCH=$(date +%s)-$$
    DIRECTORY=$(mktemp -d)
    trap 'rm -rf "$DIRECTORY"' EXIT
  fi
  if ! is_queued; then check_vm; elif [[ -n ${OPTION[reservation]} ]]; then check_reservation; fi
  local status=0
  keep_running attempt || status=$?
  if [[ -n $STOPPED ]] && ((attempts)); then
    STOPPED="" # a second signal ends this wait as well
    say "the run on the workers saves and stops"
    on_workers "$STOP" || say "the workers do not answer; the run there may go on"
  fi
  exit "$status"
}

# The run is on the workers, and goes on there.
hang_up() {
  end_child
  exit 129
}

# --- what is asked for -----------------------------------------------------------------------------------------------

check_flags() {
  local type=${OPTION[accelerator-type]}
  expect_match name '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "the TPU's name, lower-case letters, digits and dashes"
  expect_number slices 1
  expect_number restarts 0
  expect_number backoff 0
  expect_number poll 0
  expect_match workdir '/.*' "an absolute path, the same on all workers"
  if [[ -n ${OPTION[bucket]} ]]; then
    expect_match bucket '[a-z0-9][a-z0-9._-]+[a-z0-9]' "a bucket's name, without gs://"
    expect_match workdir "$MOUNT/.+" "a directory under $MOUNT, where the bucket is mounted"
  fi
  if [[ -n $type ]]; then
    check_accelerator_type "$type"
  elif is_true spot || is_true reserved || [[ -n ${OPTION[reservation]}${OPTION[version]} ]] || ((OPTION[slices] > 1)); then
    fail "--accelerator-type: missing, expected one such as v5p-128 with --spot, --reserved, --version or --slices"
  fi
  if is_true internal-ip && is_true iap; then fail "--internal-ip: together with --iap, expected one of them"; fi
  if is_true spot && { is_true reserved || [[ -n ${OPTION[reservation]} ]]; }; then
    fail "--spot: together with a reservation, expected one of them"
  fi
}

# Counts chips for v5e and v6e, cores, two a chip, for the others. Gives --version its default.
check_accelerator_type() {
  local version="" size=${1##*-}
  local small=' 1 4 8 16 32 64 128 256 '
  if [[ $1 =~ ^(v5litepod|v6e)-[0-9]+$ && $small == *" $size "* ]]; then
    version=$([[ $1 == v6e* ]] && echo v2-alpha-tpuv6e || echo v2-alpha-tpuv5-lite)
  elif [[ $1 =~ ^v5p-[1-9][0-9]{0,4}$ ]] && ((size % 8 == 0)); then
    version=v2-alpha-tpuv5
  elif [[ $1 =~ ^v[234]-[1-9][0-9]{0,4}$ ]] && ((size % 8 == 0)); then
    version=tpu-ubuntu2204-base
  else
    fail "--accelerator-type: $1, expected one such as v4-8, v5litepod-16, v5p-128 or v6e-64"
  fi
  OPTION[version]=${OPTION[version]:-$version}
}

set_place() { # project and zone, for every gcloud command
  local flag property
  for flag in project=core/project zone=compute/zone; do
    property=${flag#*=} flag=${flag%%=*}
    if [[ -z ${OPTION[$flag]} ]] && command -v gcloud >/dev/null; then
      # shellcheck disable=SC2004
      OPTION[$flag]=$(gcloud config get-value "$property" 2>/dev/null || true)
    fi
    [[ -n ${OPTION[$flag]} ]] || fail "--$flag: unset, expected --$flag or gcloud config set $property"
  done
  PLACE=("--project=${OPTION[project]}" "--zone=${OPTION[zone]}")
  SSH=("${PLACE[@]}" --worker=all --quiet)
  REACH=(gcloud compute tpus tpu-vm)
  if is_queued; then
    REACH=(gcloud compute tpus queued-resources)
    SSH+=(--node=all)
  elif is_true iap; then
    REACH=(gcloud alpha compute tpus tpu-vm)
  fi
  if is_true internal-ip; then SSH+=(--internal-ip); fi
  if is_true iap; then SSH+=(--tunnel-through-iap); fi
}

is_queued() { [[ -n ${OPTION[accelerator-type]} ]]; }

# --- the TPU ---------------------------------------------------------------------------------------------------------

# ask FORMAT COMMAND...: what gcloud says, nothing where there is no such thing. Any other answer is wrong input the
# first time, such as a project that may not be looked at; later on it is trouble that passes.
ask() {
  local found
  if dry_run; then
    show gcloud "${@:2}" "--format=$1"
  elif found=$(gcloud "${@:2}" "--format=$1" 2>&1 </dev/null); then
    tail -n 1 <<<"$found" # gcloud may say other things before it
  elif [[ $found != *NOT_FOUND* && $found != *"not found"* ]]; then
    say "gcloud: $(grep -m 1 ERROR <<<"$found" || tail -n 1 <<<"$found")"
    return $((answered ? 1 : USAGE))
  fi
}
answered=0

state() {
  if is_queued; then
    ask "value(state.state)" compute tpus queued-resources describe "${OPTION[name]}" "${PLACE[@]}"
  else
    ask "value(state)" compute tpus tpu-vm describe "${OPTION[name]}" "${PLACE[@]}"
  fi
}

check_vm() {
  local found
  found=$(state)
  answered=1
  dry_run || [[ $found == READY ]] ||
    fail "--name: TPU VM ${OPTION[name]} in ${OPTION[zone]} is ${found:-not there}, expected READY"
}

check_reservation() {
  local found
  found=$(ask "value(name)" compute reservations describe "${OPTION[reservation]}" "${PLACE[@]}")
  dry_run || [[ -n $found ]] || fail "--reservation: no ${OPTION[reservation]} in ${OPTION[zone]} of ${OPTION[project]}"
}

create() {
  local command=(gcloud)
  if [[ -n ${OPTION[reservation]} ]]; then command+=(alpha); fi
  command+=(compute tpus queued-resources create "${OPTION[name]}" "${PLACE[@]}" --quiet
    "--accelerator-type=${OPTION[accelerator-type]}" "--runtime-version=${OPTION[version]}")
  if ((OPTION[slices] > 1)); then
    command+=("--node-count=${OPTION[slices]}" "--node-prefix=${OPTION[name]}")
  else
    command+=("--node-id=${OPTION[name]}")
  fi
  if is_true spot; then command+=(--spot); fi
  if is_true reserved || [[ -n ${OPTION[reservation]} ]]; then command+=(--reserved); fi
  if [[ -n ${OPTION[reservation]} ]]; then command+=("--reservation=${OPTION[reservation]}"); fi
  if [[ -n ${OPTION[bucket]} ]]; then command+=(--scopes=https://www.googleapis.com/auth/cloud-platform); fi
  run "${command[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "${OPTION[name]}" "${PLACE[@]}" --force --quiet
}

# Until the queued resource is ACTIVE. One that was preempted is SUSPENDED and does not come back: it is deleted, and
# asked for again under the same name.
make_active() {
  local found before="none yet"
  if dry_run; then
    state
    comment "where there is none:"
    create
    comment "where it is SUSPENDED (preempted) or FAILED, before that:"
    delete
    comment "looked at every ${OPTION[poll]} s until it is ACTIVE"
    return
  fi
  while [[ -z $STOPPED ]]; do
    found=$(state) || return
    answered=1
    if [[ $found != "$before" ]]; then say "${OPTION[name]} is ${found:-not there}"; fi
    before=$found
    case $found in
      ACTIVE) return ;;
      "") create || return $((attempts ? 1 : USAGE)) ;; # gcloud has said why
      SUSPENDED | FAILED) delete || return 1 ;;
    esac
    wait_for sleep "${OPTION[poll]}" || true
  done
  return 1
}

# --- the run ---------------------------------------------------------------------------------------------------------

on_workers() { # COMMAND: on all of them at once; the status of the first that failed
  wait_for "${REACH[@]}" ssh "${OPTION[name]}" "${SSH[@]}" "--command=$1"
}

attempts=0
attempt() {
  # `keep_running ... ||` switches set -e off in here: every step says itself that it failed.
  if is_queued; then
    make_active || return
  elif ((attempts)) && [[ $(state) != READY ]]; then
    say "${OPTION[name]} is not READY any more"
    return 1
  fi
  check_workers || return
  attempts=$((attempts + 1))
  on_workers "$STOP" || return 1
  pack_code "$DIRECTORY/$ARCHIVE" || return 1
  wait_for "${REACH[@]}" scp "$DIRECTORY/$ARCHIVE" "${OPTION[name]}:" "${SSH[@]}" || return 1
  on_workers "rm -rf $CODE && mkdir $CODE && tar -xf $ARCHIVE -C $CODE && bash $WORKER setup ${OPTION[bucket]}" || return 1
  # Each attempt has a name: gcloud tries a broken connection again, which must not start a second run.
  on_workers "bash $WORKER start $LAUNCH.$attempts $(quote env "LIBTPU_INIT_ARGS=$(tpu_flags "${OPTION[slices]}")" "${PROGRAM[@]}")" ||
    return 1
  # Apart from the start: gcloud goes to 64 workers at a time, and all must run before the first one ends.
  on_workers "bash $WORKER follow"
}

check_workers() {
  local command=("${REACH[@]}" ssh "${OPTION[name]}" "${SSH[@]}" --command=true)
  if command -v timeout >/dev/null; then command=(timeout "$PROBE_SECONDS" "${command[@]}"); fi
  if wait_for "${command[@]}"; then return; fi
  if [[ -z $STOPPED ]]; then say "--name: not all workers of ${OPTION[name]} answer ssh, expected 'true' to run within $PROBE_SECONDS s"; fi
  # At first it is a firewall, a key or an address; later on, a machine that is being mended.
  return $((attempts ? 1 : USAGE))
}

main "$@"
