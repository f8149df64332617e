#!/usr/bin/env bash
# How fast this machine trains iGPT-S on 32x32 tokens: some steps on the bundled digits, enlarged. Every GPU, or two CPU
# processes where there is none. The last lines tell images/s, MFU and memory; everything lies in runs/bench.
#     make bench
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((ranks > 0)); then
    steps=30 micro_batch=16 ds_config=ds_configs/zero3_bf16.json
else
    ranks=2 steps=2 micro_batch=1 ds_config=ds_configs/zero3_fp32.json
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

rm -rf runs/bench
python tools/fit_palette.py --source digits: --n_colors 16 --out runs/bench/palette.npy
python tools/make_shards.py --source digits: --palette runs/bench/palette.npy --n_px 32 --out runs/bench/shards
deepspeed --num_gpus "$ranks" train.py --recipe igpt_s_ar_32 --n_vocab 16 --data runs/bench/shards --run_dir runs/bench/run \
    --ds_config "$ds_config" --micro_batch "$micro_batch" --batch_images $((ranks * micro_batch)) \
    --steps "$steps" --warmup_steps 1 --log_every $((steps / 2)) --val_images "$((ranks * micro_batch))" --save_every 1000000
rm -rf runs/bench/run/checkpoints # nobody goes on from here
