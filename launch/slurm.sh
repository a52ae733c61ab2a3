#!/usr/bin/env bash
# A Slurm cluster: writes a batch script and submits it. One task a GPU; each task's GPU is its number on the node.
#
#   launch/slurm.sh --config=FILE --workdir=DIR [--dry-run] [flags] [--config.field=value ...] [-- more flags of the program]
#
#   --config=FILE        recipe
#   --workdir=DIR        the run's directory, on storage that all nodes see; logs by task in DIR/slurm, as JOB-TASK.log
#   --nodes=N            (1)
#   --gpus-per-node=N    (8); 0 for processors alone
#   --tasks-per-node=N   processes a node (one a GPU; 1 without GPUs)
#   --cpus-per-task=N    (as the cluster has it)
#   --partition=, --account=, --qos=, --time=   as sbatch takes them (as the cluster has them)
#   --constraint=, --exclusive                  likewise
#   --job-name=NAME      (rlpr_jax)
#   --save-seconds=S     so long before the time limit the run is told to save, and is put in the queue again (120)
#   --python=FILE        the Python that runs it, on all nodes (.venv/bin/python of the repository, where there is one)
#   --module=NAME        the program (rlpr_jax.train)
#   --restarts=N         so often it is put in the queue again after crashes (10); time limits and preemption do not count
#   --dry-run            prints the batch script, and what would be run
#
# The job goes on from its last checkpoint after its time limit, preemption, a node's failure or a crash. `scancel JOB`
# has it save and stop, within the cluster's KillWait.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

main() {
  parse_arguments "nodes=1 gpus-per-node=8 tasks-per-node= cpus-per-task= partition= account= qos= time= constraint=
    exclusive=false job-name=rlpr_jax save-seconds=120 python= restarts=10" "$@"
  check_flags
  check_cluster
  # Jobs may start elsewhere: every path is a whole one.
  OPTION[config]=$(whole_path "${OPTION[config]}")
  OPTION[workdir]=$(whole_path "${OPTION[workdir]}")
  LOGS=${OPTION[workdir]}/slurm
  set_program "$(local_python)" "${OPTION[config]}"
  local script=$LOGS/job.sh text job
  text=$(batch_script)
  if dry_run; then
    show mkdir -p "$LOGS"
    show_file "$script" "$text"
    show sbatch --parsable "$script"
    return
  fi
  mkdir -p "$LOGS" || fail "--workdir: $LOGS cannot be made, expected a directory that can be written"
  echo "$text" >"$script"
  job=$(sbatch --parsable "$script") || fail "sbatch: refused $script, expected what the cluster allows"
  job=${job%%;*} # the cluster's name may follow
  echo "submitted job $job; its logs: $LOGS/$job-*.log; scancel $job stops it"
}

check_flags() {
  local flag
  expect_number nodes 1
  expect_number gpus-per-node 0
  OPTION[tasks-per-node]=${OPTION[tasks-per-node]:-$((OPTION[gpus-per-node] > 0 ? OPTION[gpus-per-node] : 1))}
  expect_number tasks-per-node 1
  if [[ -n ${OPTION[cpus-per-task]} ]]; then expect_number cpus-per-task 1; fi
  expect_number save-seconds 1
  expect_number restarts 0
  # They stand in the batch script's own lines, where a space would end them.
  for flag in partition account qos time constraint job-name; do
    if [[ -n ${OPTION[$flag]} ]]; then expect_match "$flag" '[][A-Za-z0-9_.,:&|*+-]+' "a word as sbatch takes it"; fi
  done
  [[ ${OPTION[workdir]} != *[[:space:]%\\]* ]] || fail "--workdir: ${OPTION[workdir]}, expected no space, % or \\ in it"
}

check_cluster() {
  expect_program sbatch "Slurm's commands on this host"
  if [[ -z ${OPTION[partition]} ]]; then return; fi
  local look=(sinfo --noheader "--partition=${OPTION[partition]}" --format=%P) found
  if dry_run; then
    show "${look[@]}"
    return
  fi
  found=$("${look[@]}" 2>&1) || fail "sinfo: $(tail -n 1 <<<"$found")"
  [[ -n $found ]] || fail "--partition: no ${OPTION[partition]} here, expected one of" \
    "$(sinfo --noheader --format=%R | sort -u | paste -sd ' ')"
}

whole_path() {
  if [[ $1 == /* ]]; then echo "$1"; else echo "$PWD/$1"; fi
}

directive() { # NAME FLAG: a line, where the flag is given
  if [[ -n ${OPTION[$2]} ]]; then echo "#SBATCH --$1=${OPTION[$2]}"; fi
}

batch_script() {
  local command=(srun --kill-on-bad-exit=1 "--output=$LOGS/%j-%t.log" --open-mode=append)
  local environment=("PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
  echo "#!/usr/bin/env bash"
  directive job-name job-name
  directive nodes nodes
  directive ntasks-per-node tasks-per-node
  if ((OPTION[gpus-per-node])); then
    # All of the node's GPUs for all of its tasks: each takes the one of its SLURM_LOCALID.
    directive gpus-per-node gpus-per-node
    environment+=("XLA_FLAGS=$(gpu_flags)" "XLA_PYTHON_CLIENT_MEM_FRACTION=$GPU_MEMORY_SHARE")
    command+=(--gpu-bind=none)
  fi
  directive cpus-per-task cpus-per-task
  if [[ -n ${OPTION[cpus-per-task]} ]]; then command+=("--cpus-per-task=${OPTION[cpus-per-task]}"); fi
  directive partition partition
  directive account account
  directive qos qos
  directive constraint constraint
  directive time time
  if is_true exclusive; then echo "#SBATCH --exclusive"; fi
  cat <<EOT
#SBATCH --output=$LOGS/%j-job.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@${OPTION[save-seconds]}
# Written by launch/slurm.sh. The time limit has a signal of its own, which reaches this script alone: SIGTERM is what
# scancel and preemption send, after which it must not put itself in the queue again.
set -uo pipefail
again="" stopped="" signals=0
# srun would end its tasks at once if it got SIGTERM itself.
trap 'again=yes signals=\$((signals + 1)); scancel --signal=TERM "\$SLURM_JOB_ID.0"' USR1
trap 'stopped=yes signals=\$((signals + 1))' TERM

$(quote env "${environment[@]}" "${command[@]}" "${PROGRAM[@]}") &
srun=\$!
# A signal that comes in between ends \`wait\` with a status that is not srun's.
while true; do
  before=\$signals status=0
  wait "\$srun" || status=\$?
  ((signals != before)) || break
done
echo "job \$SLURM_JOB_ID, restart \${SLURM_RESTART_COUNT:-0}: status \$status"

if [[ -n \$stopped ]]; then exit "\$status"; fi
# $USAGE is wrong input, which another try does not mend, and $INTERRUPTED an interruption.
if [[ -z \$again ]] && ((status != 0 && status != $USAGE && status != $INTERRUPTED)); then
  crashes=$(quote "$LOGS")/\$SLURM_JOB_ID.crashes
  echo "status \$status" >>"\$crashes"
  if ((\$(wc -l <"\$crashes") <= ${OPTION[restarts]})); then again=yes; fi
fi
if [[ -n \$again ]]; then
  echo "job \$SLURM_JOB_ID: in the queue again"
  scontrol requeue "\$SLURM_JOB_ID"
  sleep 60 # until it is ended for that
fi
exit "\$status"
EOT
}

main "$@"
