# shellcheck shell=bash
# The environment of every rank under SLURM; a batch script sources it at the repository root. What you have set already stays.

# deepspeed, and ninja for the operators that it compiles.
export PATH="$PWD/.venv/bin:$PATH"

# Threads of each rank for CPU work. Without it every rank takes all cores, and eight of them fight over each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Minutes until a collective that some rank does not join is an error. DeepSpeed's 10 are less than a large checkpoint may take.
export DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-30}"

# GPU memory in segments that grow, so that the all-gathers' changing sizes do not leave holes.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Compiled operators and kernels on the node's own disk: on a shared home the ranks of all nodes race for the same files.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/$(id -un)-torch-extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/$(id -un)-triton}"

# A rank that crashes in native code says where.
export PYTHONFAULTHANDLER=1

# NCCL reports what went wrong, and not each thing that went well.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Where a node has several networks, name the one between the nodes:
# export NCCL_SOCKET_IFNAME=ib0
