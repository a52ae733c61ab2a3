#!/usr/bin/env bash
# What runs on the machines themselves; launch/tpu.sh, launch/gke.sh and launch/slurm.sh call it.
#
#   worker.sh setup [BUCKET]      the environment in ~/rlpr_jax_venv, the bucket at /mnt/rlpr_jax
#   worker.sh start ID COMMAND... runs it in that environment, apart from the connection; nothing where ID was started
#   worker.sh follow              shows its log, and ends with its status
#   worker.sh stop                tells what was started to save and stop, and waits for it
#   worker.sh run COMMAND...      runs it here. Told to stop, it ends with 143 whatever the command says: the program
#                                 has saved and ends with 0, but the run is not finished
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$HOME/rlpr_jax_venv
STATE=$HOME/rlpr_jax_state
MOUNT=/mnt/rlpr_jax
PATIENCE=${WORKER_PATIENCE:-300} # seconds to save in, before it is killed
STOPPED=143                      # 128 + SIGTERM

setup() {
  local lock=$CODE/requirements.txt
  if [[ ! -x $VENV/bin/python ]]; then
    # The image's own Python may be another than the one that the versions were tested with; uv brings that.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python "$(sed -n '1s/.*Python \([0-9]*\.[0-9]*\).*/\1/p' "$lock")" "$VENV"
  fi
  # Installs nothing where the versions are there already.
  if ! cmp --silent "$lock" "$VENV/requirements.txt"; then
    python3 -m uv pip install --quiet --python "$VENV/bin/python" --constraint "$lock" "${CODE}[tpu]"
    cp "$lock" "$VENV/requirements.txt"
  fi
  if [[ -n ${1:-} ]]; then mount_bucket "$1"; fi
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null && ! sudo apt-get -qq install -y gcsfuse; then
    echo "worker.sh: gcsfuse: not installed on this machine, and apt has none: expected Google's package sources" >&2
    exit 2
  fi
  if mountpoint --quiet "$MOUNT"; then return; fi
  sudo mkdir -p "$MOUNT"
  sudo chown "$(id -u):$(id -g)" "$MOUNT"
  # A checkpoint is a directory that gets its name when it is whole, and all hosts must see at once that it is there.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "$1" "$MOUNT"
}

alive() { # whether what was started is there
  [[ -e $STATE/pid ]] && { tr '\0' ' ' <"/proc/$(<"$STATE/pid")/cmdline"; } 2>/dev/null | grep -q "worker.sh run"
}

start() {
  local id=$1 tries=0
  shift
  mkdir -p "$STATE"
  if [[ -e $STATE/id && $(<"$STATE/id") == "$id" ]]; then return; fi
  stop
  rm -f "$STATE/status" "$STATE/shown" "$STATE/pid"
  echo "$id" >"$STATE/id"
  cd "$CODE"
  # A session of its own: a connection that breaks does not end it. Its process id is its group's.
  # shellcheck disable=SC2016
  PATH=$VENV/bin:$PATH setsid bash -c 'echo $$ >"$1/pid"; exec bash "${@:2}"' - "$STATE" "$CODE/launch/worker.sh" run "$@" \
    </dev/null >"$STATE/log" 2>&1 &
  until alive || [[ -e $STATE/status ]] || ((++tries > 100)); do sleep 0.1; done
}

follow() {
  local from=+1
  if [[ -e $STATE/shown ]]; then from=0; fi # before a connection broke
  touch "$STATE/shown"
  if alive; then
    tail -n "$from" -f --pid="$(<"$STATE/pid")" "$STATE/log"
  elif [[ $from != 0 ]]; then
    cat "$STATE/log"
  fi
  exit "$(cat "$STATE/status" 2>/dev/null || echo 1)" # none: killed
}

stop() {
  local pid waited=0
  alive || return 0
  pid=$(<"$STATE/pid")
  kill -TERM "$pid" 2>/dev/null || true
  while alive && ((waited < PATIENCE)); do
    sleep 1
    waited=$((waited + 1))
  done
  if alive; then kill -KILL -- "-$pid" 2>/dev/null || true; fi
}

run() {
  local status before told=0 child=""
  trap 'told=$((told + 1)); [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  RLPR_LAUNCHER=$$ "$@" & # by which the program notices that this script was killed
  child=$!
  if ((told)); then kill -TERM "$child" 2>/dev/null || true; fi
  # A signal that comes in between ends `wait` with a status that is not the command's.
  while true; do
    before=$told status=0
    wait "$child" || status=$?
    ((told != before)) || break
  done
  if ((told && status == 0)); then status=$STOPPED; fi
  if [[ -e $STATE/pid && $(<"$STATE/pid") == "$$" ]]; then echo "$status" >"$STATE/status"; fi
  exit "$status"
}

case ${1:-} in
  setup | start | follow | stop | run) "$@" ;;
  *)
    echo "worker.sh: ${1:-nothing}, expected setup, start, follow, stop or run" >&2
    exit 2
    ;;
esac
