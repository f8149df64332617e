# shellcheck shell=bash disable=SC2034 # batch scripts read what it sets
# The environment of every job. A batch script sources it at the repository root. Variables that you have set keep their values.

# The cluster's own values, see cluster.example.sh.
IGPT_DS_CLUSTER=${IGPT_DS_CLUSTER:-slurm/cluster.sh}
# shellcheck source=slurm/cluster.example.sh
[[ ! -e $IGPT_DS_CLUSTER ]] || source "$IGPT_DS_CLUSTER"

# python, deepspeed, and ninja for the operators that deepspeed compiles.
[[ ! -d $PWD/.venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"

# CPU threads of each rank. By default every rank uses all cores, so that the ranks of a node slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# GPU memory segments can grow, so that all-gathers of different sizes do not fragment the memory.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Megatron users set it to 1, which puts all kernels in one queue. ZeRO-3 then cannot fetch the next layer during the current one.
unset CUDA_DEVICE_MAX_CONNECTIONS

# A crash in native code prints a stack. Python's output reaches the log at once.
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1

# NCCL prints only warnings and errors.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

flag() { # NAME WORD...: prints the value of a flag among the words; status 1 if the flag is missing
  local name=$1 value='' found=1
  shift
  while (($#)); do
    case $1 in
      "$name") value=${2-} found=0 ;;
      "$name"=*) value=${1#*=} found=0 ;;
    esac
    shift
  done
  printf %s "$value"
  return $found
}
