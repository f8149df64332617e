# shellcheck shell=bash disable=SC2034 # batch scripts read what it sets
# The environment of every job; a batch script sources it at the repository root. What you have set already stays.

# The cluster's own values, see cluster.example.sh.
IGPT_DS_CLUSTER=${IGPT_DS_CLUSTER:-slurm/cluster.sh}
# shellcheck source=slurm/cluster.example.sh
[[ ! -e $IGPT_DS_CLUSTER ]] || source "$IGPT_DS_CLUSTER"

# python, deepspeed, and ninja for the operators that deepspeed compiles.
[[ ! -d $PWD/.venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"

# Threads of each rank for CPU work. Without it every rank takes all cores, and eight of them fight over each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Minutes until a collective that some rank does not join is an error. DeepSpeed's 10 are less than a large checkpoint may take.
export DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-30}"

# GPU memory in segments that grow, so that the all-gathers' changing sizes do not leave holes.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Megatron's users set it to 1. Then all kernels wait in one queue, and ZeRO-3 cannot fetch the next layer beside the present one.
unset CUDA_DEVICE_MAX_CONNECTIONS

# Compiled operators and kernels on the node's own disk: on a shared home the ranks of all nodes race for the same files.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/$(id -un)-torch-extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/$(id -un)-triton}"

# A rank that crashes in native code says where, and what Python prints is in the log when it is printed.
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1

# NCCL reports what went wrong, and not each thing that went well.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# When a collective hangs, each rank writes its last 2000 to a file (launch.sh says where): which rank failed to join which.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

flag() { # NAME WORD...: the value of a flag among the words; status 1 where it is not among them
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
