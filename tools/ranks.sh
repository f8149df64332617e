# shellcheck shell=bash disable=SC2154 # `repo` is set by whoever sources this
# What story.sh and paper.sh share: training on every GPU, or on two CPU processes where there is none. Sourced, with `repo` set.
# Sets `ranks` and `ds_config`.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus > 0)); then
  # shellcheck disable=SC2034 # whoever sources this reads it
  ranks=$gpus ds_config=$repo/ds_configs/zero3_bf16.json
else
  # shellcheck disable=SC2034
  ranks=2 ds_config=$repo/ds_configs/zero3_fp32.json
  export DS_ACCELERATOR=cpu
  threads=1 # for each rank: two ranks take two cores
fi

on_ranks() { # PROGRAM FLAG...: the program on all ranks
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  OMP_NUM_THREADS=${threads:-${OMP_NUM_THREADS:-8}} deepspeed --num_gpus "$ranks" --master_port "$port" --log_level warning "$@"
}

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
