# shellcheck shell=bash disable=SC2034 # batch scripts read what it sets
# Shared by the batch scripts that run one Python program as one process: `one_task tools/NAME.py FLAG...` is their last command.
set -uo pipefail
source slurm/env.sh
source slurm/caches.sh
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-$OMP_NUM_THREADS} # the one process has all cores of the job

part() { # sets `part` to the flag with which this task of an array makes one of PARTS parts; empty outside an array
  part=()
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || part=(--part "$SLURM_ARRAY_TASK_ID/${PARTS:?is not set; slurm/cluster.sh says how many parts there are}")
}

one_task() { # PROGRAM FLAG...
  [[ -f $1 ]] || { echo "error: $PWD holds no $1" >&2; exit 2; }
  local srun=(srun --ntasks=1 --cpu-bind=none)
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # not inherited since SLURM 22.05
  "${srun[@]}" python "$@"
}
