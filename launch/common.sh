#!/usr/bin/env bash
# What the scripts of launch/ share; they source it.
#
# Wrong input ends a script with one line on stderr and status 2, before anything is started. With --dry-run every
# command is printed as it could be pasted, and no command is run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2
  exit 2
fi

SCRIPT=launch/$(basename "$0")
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
USAGE=2              # exit status of wrong input, here as in rlpr_jax/errors.py,
INTERRUPTED=130      # and of Ctrl-C: a run that ends with one of them is not started again
MOUNT=/mnt/rlpr_jax  # where a bucket lies on the machines that run
declare -A OPTION=() # the script's flags, by name
OVERRIDES=()         # what is passed on to the program as it stands
CHILD=""             # process id of what is waited for, and of its process group
WHOLE_GROUP=""       # not empty: signals go to the group
STOPPED=""           # the signal that asked to stop
SIGNALS=0            # how many came
INTERRUPTS=0         # how many of them were Ctrl-C
KILLER=""            # process id, and group, of what ends a run that has not saved within --grace seconds
exec 3>&1            # so that a command in $(...) can be shown as well

fail() { # LINE: wrong input
  echo "$SCRIPT: $*" >&2
  exit "$USAGE"
}

say() { # nobody may be there to read it
  echo "$SCRIPT: $*" >&2 || true
}

help() { # the comment at the head of the script
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$0"
}

# --- arguments -------------------------------------------------------------------------------------------------------

# parse_arguments "NAME=DEFAULT ..." "$@": fills OPTION and OVERRIDES. A flag whose default is true or false needs no
# value; underscores and dashes in names are one.
parse_arguments() {
  local word name value
  local -A boolean=()
  for word in config= workdir= module=rlpr_jax.train dry-run=false $1; do
    name=${word%%=*}
    OPTION[$name]=${word#*=}
    [[ ${OPTION[$name]} != true && ${OPTION[$name]} != false ]] || boolean[$name]=1
  done
  shift
  while (($#)); do
    case $1 in
      --help | -h)
        help
        exit 0
        ;;
      --)
        shift
        OVERRIDES+=("$@")
        break
        ;;
      --config.*=*) OVERRIDES+=("$1") ;;
      --config.*) fail "$1: no value, expected $1=VALUE" ;;
      --*)
        name=${1#--}
        name=${name%%=*}
        name=${name//_/-}
        [[ -n ${OPTION[${name:-?}]+x} ]] || fail "--$name: no such flag, expected one of those that --help lists"
        if [[ $1 == *=* ]]; then
          value=${1#*=}
        elif [[ -n ${boolean[$name]:-} ]]; then
          value=true
        else
          (($# > 1)) || fail "--$name: no value, expected --$name=VALUE"
          shift
          value=$1
        fi
        if [[ -n ${boolean[$name]:-} && $value != true && $value != false ]]; then
          fail "--$name: $value, expected true or false"
        fi
        OPTION[$name]=$value
        ;;
      *) fail "$1: not a flag, expected --config=FILE --workdir=DIR [--config.field=value ...]" ;;
    esac
    shift
  done
  check_config
  [[ -n ${OPTION[workdir]} ]] || fail "--workdir: missing, expected the run's directory"
}

check_config() {
  local file=${OPTION[config]%%:*} # a recipe may take an argument, file.py:argument
  [[ -n $file ]] || fail "--config: missing, expected a recipe such as configs/quickstart.py"
  if [[ ! -f $file && $file != */* && -f $ROOT/configs/$file.py ]]; then # by its name
    OPTION[config]=$ROOT/configs/$file.py${OPTION[config]#"$file"}
    return
  fi
  [[ -f $file ]] || fail "--config: $file: no such file"
}

expect_number() { # FLAG LEAST
  local value=${OPTION[$1]}
  if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2)); then
    fail "--$1: ${value:-missing}, expected a number from $2 on"
  fi
  OPTION[$1]=$((10#$value))
}

expect_match() { # FLAG REGEX WHAT
  [[ ${OPTION[$1]} =~ ^($2)$ ]] || fail "--$1: ${OPTION[$1]:-missing}, expected $3"
}

expect_program() { # NAME WHERE: nothing is asked of it in a dry run
  dry_run || command -v "$1" >/dev/null || fail "$1: not found, expected $2"
}

is_true() { [[ ${OPTION[$1]} == true ]]; }
dry_run() { is_true dry-run; }

# The recipe as the copied code knows it: relative to the root of the repository.
config_in_repository() {
  local given=${OPTION[config]} file directory
  file=${given%%:*}
  directory=$(cd "$(dirname "$file")" && pwd -P)
  file=$directory/$(basename "$file")
  [[ $file == "$ROOT"/* ]] || fail "--config: $given lies outside $ROOT, which is all that the machines get"
  file=${file#"$ROOT"/}
  git -C "$ROOT" ls-files --error-unmatch -- "$file" >/dev/null 2>&1 ||
    fail "--config: $file is not tracked, expected 'git add $file': what git tracks is all that the machines get"
  if [[ $given == *:* ]]; then file+=:${given#*:}; fi
  echo "$file"
}

# --- the program -----------------------------------------------------------------------------------------------------

# set_program PYTHON CONFIG FLAG...: the array PROGRAM, what each process runs.
set_program() {
  local python=$1 config=$2
  shift 2
  PROGRAM=("$python" -m "${OPTION[module]}" "--config=$config" "--workdir=${OPTION[workdir]}" "$@")
  PROGRAM+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

# With several slices the data axis is the slices: only gradients, once an update, then go over the network between
# them. A config.mesh.data that is given stays.
slices_along_data() {
  local given
  ((OPTION[slices] > 1)) || return 0
  for given in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    [[ $given != --config.mesh.data=* ]] || return 0
  done
  OVERRIDES+=("--config.mesh.data=${OPTION[slices]}")
}

local_python() { # the project's own environment, where there is one
  if [[ -n ${OPTION[python]} ]]; then
    echo "${OPTION[python]}"
  elif [[ -x $ROOT/.venv/bin/python ]]; then
    echo "$ROOT/.venv/bin/python"
  else
    echo python3
  fi
}

# --- showing and running ---------------------------------------------------------------------------------------------

quote() { # WORD...: as a shell reads them back
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      line+=" $word"
    elif [[ $word =~ ^(--?[A-Za-z0-9_.-]+=)(.*)$ ]]; then
      line+=" ${BASH_REMATCH[1]}${BASH_REMATCH[2]@Q}"
    else
      line+=" ${word@Q}"
    fi
  done
  echo "${line# }"
}

show() { quote "$@" >&3; }
comment() { if dry_run; then echo "# $*" >&3; fi; }

run() { # COMMAND...: runs it, or shows it
  if dry_run; then show "$@"; else "$@" 3>&-; fi
}

show_file() { # PATH TEXT: a generated file, in full
  printf 'cat > %s <<'\''END_OF_FILE'\''\n%s\nEND_OF_FILE\n' "$(quote "$1")" "$2" >&3
}

# --- code ------------------------------------------------------------------------------------------------------------

# pack_code FILE: what git tracks, as it lies in the working tree, changes that are not committed included.
pack_code() {
  local file
  comment "$1: what git tracks, as it lies in the working tree"
  if dry_run; then
    echo "(cd $(quote "$ROOT") && git ls-files -z | tar --null -T - -cf $(quote "$1"))" >&3
    return
  fi
  (
    cd "$ROOT" || exit
    git ls-files -z | while IFS= read -r -d '' file; do
      # A file may be deleted and not yet so in git; tar would stop there.
      if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
    done | tar --null -T - -cf "$1"
  )
}

# --- running on ------------------------------------------------------------------------------------------------------

# wait_for COMMAND...: in the foreground for whoever looks on, but in a process group of its own: a terminal's Ctrl-C
# would reach it a second time, and a second one means "at once".
wait_for() {
  local status before
  if dry_run; then
    show "$@"
    return
  fi
  [[ -z $STOPPED ]] || return 143 # told to stop before this step
  set -m
  RLPR_LAUNCHER=$$ "$@" </dev/null 3>&- & # by which the program notices that this script is gone
  CHILD=$!
  set +m
  # A signal that comes in between ends `wait` with a status that is not the command's.
  while true; do
    before=$SIGNALS status=0
    wait "$CHILD" || status=$?
    ((SIGNALS != before)) || break
  done
  CHILD=""
  if [[ -n $KILLER ]]; then kill -TERM -- "-$KILLER" 2>/dev/null || true; fi
  KILLER=""
  return "$status"
}

# pass_on SIGNAL: as SIGTERM, after which the run saves and stops, within --grace seconds where there is such a flag.
# Another SIGTERM or SIGHUP changes nothing; a second Ctrl-C ends it at once.
pass_on() {
  local waited
  STOPPED=$1 SIGNALS=$((SIGNALS + 1))
  if [[ $1 == INT ]]; then INTERRUPTS=$((INTERRUPTS + 1)); fi
  if ((INTERRUPTS > 1)); then
    say "SIGINT again: ending the run at once"
    end_child
    return 0 # the status is said: in a trap it would be that of what was interrupted
  fi
  say "SIG$1: passed on, waiting for the run to save and stop"
  if [[ -z $CHILD ]]; then return 0; fi
  kill -TERM -- "${WHOLE_GROUP:+-}$CHILD" 2>/dev/null || true
  if [[ -n ${OPTION[grace]:-} && -z $KILLER ]]; then
    set -m
    {
      for ((waited = 0; waited < OPTION[grace]; waited++)); do
        sleep 1
        kill -0 $$ 2>/dev/null || exit 0 # the script was killed, and the run saves by itself
      done
      say "not saved within --grace=${OPTION[grace]} s: ending the run"
      end_child
    } </dev/null >/dev/null 3>&- &
    KILLER=$!
    set +m
  fi
}

end_child() {
  if [[ -n $CHILD ]]; then kill -KILL -- "-$CHILD" 2>/dev/null || true; fi
}

# Without a terminal or a connection the run would go on here, where nobody looks on. Scripts whose run is elsewhere have
# one of their own.
hang_up() { pass_on HUP; }

# is_over STATUS: whether another try would not help.
is_over() { (($1 == 0 || $1 == USAGE || $1 == INTERRUPTED)); }

# keep_running COMMAND...: again after a crash, with a pause that doubles. Ends with status 0, with wrong input, which
# another try does not mend, when told to stop, or after --restarts tries.
keep_running() {
  local status tries=0 pause=${OPTION[backoff]} began waited
  trap 'pass_on INT' INT
  trap 'pass_on TERM' TERM
  trap hang_up HUP # under nohup it is ignored, and stays so
  trap : PIPE      # of those who read the output
  comment "until it ends with status 0, $USAGE or $INTERRUPTED; after anything else again, ${OPTION[restarts]} times at most:"
  while true; do
    began=$SECONDS status=0
    "$@" || status=$?
    if dry_run || [[ -n $STOPPED ]] || is_over "$status"; then return "$status"; fi
    if ((SECONDS - began >= 1800)); then tries=0 pause=${OPTION[backoff]}; fi # that was another trouble
    if ((tries >= OPTION[restarts])); then
      say "ended with status $status, after ${OPTION[restarts]} restarts: giving up"
      return "$status"
    fi
    tries=$((tries + 1))
    say "ended with status $status, restart $tries of ${OPTION[restarts]} in $pause s"
    waited=0
    while ((waited < pause)) && [[ -z $STOPPED ]]; do
      sleep 1
      waited=$((waited + 1))
    done
    [[ -z $STOPPED ]] || return "$status"
    pause=$((pause * 2 > 300 ? 300 : pause * 2))
  done
}
