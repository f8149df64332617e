#!/usr/bin/env bash
# Submits a batch script with the values of slurm/cluster.sh, at the repository root:
#
#     bash slurm/submit.sh [--sbatch_option=value ...] NAME [FLAG ...]
#     bash slurm/submit.sh pretrain --recipe igpt_xl_ar_64 --data shards/imagenet_64 --run_dir runs/xl
#
# NAME: pretrain, finetune, sweep_lr, make_shards, extract_features, probe, tool. The FLAGs go to the program. Logs are in LOGS.
# Prints the name and number of each job. A job that needs the result of another waits for it, and is cancelled if that job fails.
# A training whose RUN_DIR a queued job uses is refused. RUN_DIR/submitted has the number of each job that was submitted for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh
usage() { # [WHY]
  echo "${1:+error: $1; }usage: bash slurm/submit.sh [--sbatch_option=value ...] pretrain|finetune|sweep_lr|make_shards|extract_features|probe|tool [FLAG ...]" >&2
  exit 2
}
[[ -f $IGPT_DS_CLUSTER ]] || { echo "error: $IGPT_DS_CLUSTER is not there; cp slurm/cluster.example.sh slurm/cluster.sh, and change its values" >&2; exit 2; }

asked=()
while (($#)) && [[ $1 == -* ]]; do
  case $1 in
    -N?*) asked+=(--nodes="${1#-N}") ;; # the rest of the script looks for --nodes
    *) asked+=("$1") ;;
  esac
  shift
done
(($#)) || usage
name=$1
shift
[[ -f slurm/$name.sbatch ]] || usage "'$name' is no job; an option of sbatch is one word, --sbatch_option=value"
mkdir -p "${LOGS:=runs/logs}"

resources() { # NAME: sets `ours` to the sbatch options of NAME.sbatch
  ours=(--partition="$PARTITION" --time="$TIME")
  local gpus='' more=("${GPU_OPTIONS[@]}")
  case $1 in
    pretrain | finetune) ours+=(--nodes="$NODES") gpus=$GPUS_PER_NODE ;;
    sweep_lr) gpus=$GPUS_PER_NODE ;;
    extract_features | probe) ours+=(--cpus-per-task="$CPUS") gpus=${GPUS_PER_NODE:+1} ;;
    *) ours=(--partition="$CPU_PARTITION" --time="$TIME" --cpus-per-task="$CPUS") more=() ;;
  esac
  [[ -z $gpus || ${GPUS_PER_NODE:-0} == 0 ]] || ours+=(--gpus-per-node="$gpus")
  [[ -z ${ACCOUNT:-} ]] || ours+=(--account="$ACCOUNT")
  ours+=("${OPTIONS[@]}" "${more[@]}")
}

job='' after=afterok
put() { # [--sbatch_option ...] -- WORD...: submits one job, which waits for the previous one
  local options=() log=$LOGS/%x-%j.out ours signal
  resources "$name"
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  [[ $name != sweep_lr && " ${options[*]} ${asked[*]}" != *' --array='* ]] || log=$LOGS/%x-%A_%a.out
  [[ -z $job ]] || options+=(--dependency="$after:$job" --kill-on-invalid-dep=yes)
  # ops/restarts.py needs the fewest nodes of the job and its --signal; SLURM tells neither to a job.
  LEAST_NODES=$(flag --nodes "${ours[@]}" "${asked[@]}" | grep -oE '^[0-9]+') || true # without --nodes the job has one node
  ! signal=$(flag --signal "${ours[@]}" "${asked[@]}") || export SBATCH_SIGNAL=$signal
  export LEAST_NODES
  job=$(sbatch --parsable --output="$log" "${ours[@]}" "${asked[@]}" "${options[@]}" "slurm/$name.sbatch" "$@")
  job=${job%%;*} # with several clusters the name of the cluster follows
  echo "$(flag --job-name "${asked[@]}" || echo "$name") $job"
}
wants() { # FLAG...: whether the command line has one of these flags or sbatch options
  local one
  for one in "$@"; do
    ! flag "$one" "${asked[@]}" "${words[@]}" >/dev/null || return 0
  done
  return 1
}

in_use() { # RUN_DIR: prints "JOB (STATE)" of the job in the queue that uses the directory; status 1 without one
  local job state jobs
  mapfile -t jobs < <(cat "$1/submitted" "$1/owner" 2>/dev/null | grep -oE '^[0-9]+' | sort -u)
  for job in "${jobs[@]}"; do
    state=$(timeout 20 squeue -h -j "$job" -o '%A %T' 2>/dev/null | awk -v job="$job" '$1 == job && $2 != "COMPLETING" {print $2; exit}') || true
    [[ -z $state ]] || { echo "$job ($state)" && return; }
  done
  return 1
}

words=("$@")
case $name in
  pretrain | finetune)
    run_dir=$(flag --run_dir "$@") || true
    # A job with a --dependency waits until the directory is free.
    if [[ -n $run_dir ]] && ! flag --dependency "${asked[@]}" >/dev/null && busy=$(in_use "$run_dir"); then
      echo "submit.sh: error: job $busy uses $run_dir; wait for it, scancel ${busy%% *}, or choose another --run_dir" >&2
      exit 2
    fi
    put -- "$@"
    if [[ -n $run_dir ]]; then mkdir -p "$run_dir" && echo "$job" >>"$run_dir/submitted"; fi
    ;;
  make_shards)
    if wants --stage --array; then
      put -- "$@"
    else
      put -- --stage list "$@"
      put --array=0-$((PARTS - 1)) -- --stage write "$@"
      put -- --stage merge "$@"
    fi
    ;;
  extract_features)
    if wants --pixels --part --merge --array; then # pixels need no parts, they are fast
      put -- "$@"
    else
      put --array=0-$((PARTS - 1)) -- "$@"
      put -- --merge "$PARTS" --out "$(flag --out "$@")"
    fi
    ;;
  sweep_lr)
    rates=$(flag --max_rates "$@") || rates=8 # all at once, one array task each
    wants --array || asked+=(--array="0-$((rates - 1))")
    put -- "$@"
    name=tool after=afterany asked=(--job-name=sweep_table) # the table shows the rates that finished
    put -- tools/sweep_lr.py --collect --max_rates "$rates" --out "$(flag --out "$@")"
    ;;
  *) put -- "$@" ;;
esac
