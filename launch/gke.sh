#!/usr/bin/env bash
# TPU slices of a GKE cluster, as a JobSet: fills in launch/jobset.yaml, applies it and follows its log.
#
#   launch/gke.sh --name=RUN --image=IMAGE --accelerator=KIND --topology=AxB --config=FILE --workdir=DIR
#     (--bucket=NAME | --claim=NAME) [--dry-run] [flags] [--config.field=value ...] [-- more flags of the program]
#
#   --config=FILE           recipe of this repository, as it is in the image
#   --workdir=DIR           the run's directory, under /mnt/rlpr_jax, where the storage is mounted
#   --name=NAME             of the JobSet
#   --image=IMAGE           built from launch/Containerfile with --build-arg=ACCELERATOR=tpu
#   --bucket=NAME           Cloud Storage bucket to mount (the cluster's Cloud Storage FUSE driver), or
#   --claim=NAME            PersistentVolumeClaim of storage that many nodes can write
#   --accelerator=KIND      tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology=AxB[xC]      chips of a slice, as its node pool has them: 4x4, 2x2x4
#   --chips-per-node=N      of that node pool (4, or all of a slice that is smaller; 8 for 2x4)
#   --slices=N              slices (1); the data axis of the mesh is then the slices: --config.mesh.data=N
#   --spot                  nodes of spot capacity; --reservation=NAME: of that reservation
#   --service-account=NAME  Kubernetes service account, which the bucket needs
#   --namespace=NAME        (default)
#   --context=NAME          of kubectl (the current one)
#   --grace=S               seconds that a pod has to save in when it is told to stop (300)
#   --module=NAME           the program (rlpr_jax.train)
#   --restarts=N            so many restarts of all pods after failures and preemptions (100)
#   --dry-run               prints the manifest, and what would be run
#
# The cluster restarts the run by itself, from its last checkpoint. Ctrl-C only ends the following; the same command
# follows it again, and starts a finished or failed one anew. kubectl delete jobset NAME stops it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

main() {
  parse_arguments "name= image= accelerator= topology= chips-per-node= slices=1 bucket= claim= service-account= spot=false
    reservation= namespace=default context= grace=300 restarts=100 poll=10" "$@"
  check_flags
  local config manifest
  config=$(config_in_repository)
  slices_along_data
  set_program python "$config"
  manifest=$(render)
  KUBECTL=(kubectl)
  if [[ -n ${OPTION[context]} ]]; then KUBECTL+=("--context=${OPTION[context]}"); fi
  KUBECTL+=("--namespace=${OPTION[namespace]}")
  check_cluster
  start "$manifest"
  follow
}

# --- what is asked for -----------------------------------------------------------------------------------------------

check_flags() {
  local label='[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?'
  expect_match name "$label" "the JobSet's name, lower-case letters, digits and dashes, 40 at most"
  expect_match namespace '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' "a namespace"
  expect_match image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "an image built from launch/Containerfile"
  expect_match workdir "$MOUNT/.+" "a directory under $MOUNT, where the storage is mounted"
  expect_number slices 1
  expect_number restarts 0
  expect_number grace 1
  expect_number poll 0
  if [[ -n ${OPTION[bucket]} && -n ${OPTION[claim]} || -z ${OPTION[bucket]}${OPTION[claim]} ]]; then
    fail "--bucket, --claim: expected one of them, the storage that all nodes see"
  fi
  if is_true spot && [[ -n ${OPTION[reservation]} ]]; then fail "--spot: together with --reservation, expected one of them"; fi
  local flag
  for flag in bucket claim service-account reservation; do
    if [[ -n ${OPTION[$flag]} ]]; then expect_match "$flag" '[a-z0-9][a-z0-9._-]*' "a name"; fi
  done
  check_topology
}

# The chips of a slice, and of each of its nodes.
check_topology() {
  local topology=${OPTION[topology]} flat=' 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 ' chips usual size
  case ${OPTION[accelerator]} in
    tpu-v5-lite-podslice | tpu-v6e-slice)
      [[ -n $topology && $flat == *" $topology "* ]] || fail "--topology: ${topology:-missing}, expected one of$flat"
      ;;
    tpu-v4-podslice | tpu-v5p-slice)
      if [[ ! $topology =~ ^[1-9][0-9]?x[1-9][0-9]?x[1-9][0-9]?$ ]] || ((${topology//x/*} % 4)); then
        fail "--topology: ${topology:-missing}, expected three numbers such as 2x2x4, a multiple of 4 chips"
      fi
      ;;
    *)
      fail "--accelerator: ${OPTION[accelerator]:-missing}, expected one of tpu-v4-podslice, tpu-v5-lite-podslice," \
        "tpu-v5p-slice, tpu-v6e-slice"
      ;;
  esac
  chips=$((${topology//x/*}))
  usual=$((chips < 4 ? chips : 4))
  if [[ $topology == 2x4 ]]; then usual=8; fi
  size=${OPTION[chips-per-node]:=$usual}
  expect_number chips-per-node 1
  ((chips % size == 0)) || fail "--chips-per-node: $size, expected a divisor of the $chips chips of $topology"
  NODES=$((chips / size))
  # GKE forms slices into one only where each has several hosts.
  ((OPTION[slices] == 1 || NODES > 1)) || fail "--slices: ${OPTION[slices]} of one node each, expected slices of several nodes"
}

# --- the manifest ----------------------------------------------------------------------------------------------------

yaml() { # TEXT: in double quotes; Kubernetes would put variables in the place of $(...)
  local text=${1//\\/\\\\}
  text=${text//\$(/\$\$(}
  text=${text//\"/\\\"}
  echo "\"${text//$'\n'/\\n}\""
}

yaml_list() {
  local word list=""
  for word in "$@"; do list+="${list:+, }$(yaml "$word")"; done
  echo "[$list]"
}

render() {
  local line word flag
  local -A value=(
    [NAME]=${OPTION[name]} [NAMESPACE]=${OPTION[namespace]} [RESTARTS]=${OPTION[restarts]} [SLICES]=${OPTION[slices]}
    [NODES]=$NODES [CHIPS]=${OPTION[chips-per-node]} [ACCELERATOR]=${OPTION[accelerator]} [TOPOLOGY]=${OPTION[topology]}
    [IMAGE]=$(yaml "${OPTION[image]}") [MOUNT]=$MOUNT [BUCKET]=$(yaml "${OPTION[bucket]}")
    [CLAIM]=$(yaml "${OPTION[claim]}") [SERVICE_ACCOUNT]=$(yaml "${OPTION[service-account]}")
    [RESERVATION]=$(yaml "${OPTION[reservation]}") [GRACE]=${OPTION[grace]} [ARGS]=$(yaml_list "${PROGRAM[@]}")
    [TPU_FLAGS]=$(yaml "$(tpu_flags "${OPTION[slices]}")")
  )
  tail -n +2 "$ROOT/launch/jobset.yaml" | while IFS= read -r line; do
    if [[ $line =~ ^(.*)\ \#\ if\ ([a-z-]+)$ ]]; then
      line=${BASH_REMATCH[1]} flag=${BASH_REMATCH[2]}
      if [[ -z ${OPTION[$flag]} || ${OPTION[$flag]} == false ]]; then continue; fi
    fi
    if [[ $line =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; then
      word=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}${value[$word]}${BASH_REMATCH[3]}
    fi
    echo "$line"
  done
}

# --- the cluster -----------------------------------------------------------------------------------------------------

check_cluster() {
  expect_program kubectl "the Kubernetes CLI"
  if dry_run; then
    if [[ -z ${OPTION[context]} ]]; then show kubectl config current-context; fi
    show "${KUBECTL[@]}" get crd jobsets.jobset.x-k8s.io
    return
  fi
  local said
  if [[ -z ${OPTION[context]} ]]; then
    kubectl config current-context >/dev/null 2>&1 ||
      fail "--context: kubectl has none, expected gcloud container clusters get-credentials CLUSTER"
  fi
  said=$("${KUBECTL[@]}" get crd jobsets.jobset.x-k8s.io 2>&1) || {
    if [[ $said == *NotFound* ]]; then
      fail "JobSet is not installed in the cluster, expected its release's manifests to be applied (jobset.sigs.k8s.io)"
    fi
    fail "kubectl: $(tail -n 1 <<<"$said")"
  }
}

jobset() { # PATH: a field of it, nothing where there is no such JobSet
  "${KUBECTL[@]}" get jobset "${OPTION[name]}" --ignore-not-found "--output=jsonpath=$1"
}

ended() { # prints Completed or Failed, if it is one of them
  local conditions
  conditions=$(jobset '{.status.conditions[?(@.status=="True")].type}') || return 0
  grep -o -w -m 1 -e Completed -e Failed <<<"$conditions" || true
}

start() { # MANIFEST
  if dry_run; then
    comment "a JobSet of this name that has ended is deleted first:"
    show "${KUBECTL[@]}" delete jobset "${OPTION[name]}"
    echo "$(quote "${KUBECTL[@]}" apply --filename=-) <<'END_OF_FILE'"$'\n'"$1"$'\n'END_OF_FILE >&3
    return
  fi
  if [[ -n $(ended) ]]; then "${KUBECTL[@]}" delete jobset "${OPTION[name]}"; fi
  "${KUBECTL[@]}" apply --filename=- <<<"$1" || fail "kubectl apply: refused, expected the cluster to take the manifest"
}

follow() { # the log of the first process, which alone prints, over all restarts
  local end="" selector="jobset.sigs.k8s.io/jobset-name=${OPTION[name]},jobset.sigs.k8s.io/job-index=0"
  selector+=,batch.kubernetes.io/job-completion-index=0
  local logs=("${KUBECTL[@]}" logs "--selector=$selector" --container=train --follow --tail=-1 --pod-running-timeout=24h)
  if dry_run; then
    comment "until the JobSet has ended:"
    show "${logs[@]}"
    return
  fi
  say "following; Ctrl-C ends that alone, $(quote "${KUBECTL[@]}" delete jobset "${OPTION[name]}") stops the run"
  while true; do
    "${logs[@]}" || true # there is no pod yet, or none any more
    end=$(ended)
    [[ -z $end ]] || break
    sleep "${OPTION[poll]}"
  done
  say "${OPTION[name]}: $end"
  [[ $end == Completed ]]
}

main "$@"
