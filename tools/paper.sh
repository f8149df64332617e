#!/usr/bin/env bash
# From images to tables on this machine: every stage of a scale, one after another, on every GPU or on two CPU processes.
#
#     bash tools/paper.sh SCALE OUT [DATA] [more flags of tools/paper_plan.py]
#     bash tools/paper.sh own runs/photos imagefolder:photos --test_fraction 0.1 -- --recipe cifar10_nano_ar_16 --lr 0.001
#     bash tools/paper.sh tiny runs/paper_tiny
#     bash tools/paper.sh cifar runs/paper_cifar cifar10:cifar-10-batches-bin
#
# --dry_run prints each stage, its command and about how long it takes, and runs nothing.
#
# Scale own trains one model on your images; flags of train.py follow "--". With test images (--test_fraction, a folder "test" or
# imagefolder:DIR,test=DIR2), probes are fitted on all others, choose layer and penalty on a tenth of them, and read the test images
# at the end. Finished stages are skipped, and an interrupted training continues from its newest checkpoint: the same command
# finishes the work. Paths are relative to the repository root.
set -euo pipefail
if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# < 2)); then
  echo "usage: bash tools/paper.sh SCALE OUT [DATA] [more flags of tools/paper_plan.py]; --help explains" >&2
  exit 2
fi
scale=$1 out=$2
shift 2
data=()
if (($#)) && [[ $1 != -* ]]; then
  data=(--data "$1")
  shift
fi
cd "$(dirname "$0")/.."
[[ -d .venv/bin ]] && PATH=$PWD/.venv/bin:$PATH
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that wait leave their core to others: igpt_ds/threads.py
gpus=0 gpu=() precision=() # torch counts them, which takes seconds, where a GPU's device file exists
if [[ ${DS_ACCELERATOR:-} != cpu ]] && { compgen -G '/dev/nvidia*' >/dev/null || compgen -G '/dev/nvhost*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]]; }; then
  gpus=$(python -c 'from igpt_ds import cli, devices; cli.run(lambda argv: print(devices.usable_gpus()))') || exit 2
fi
if ((gpus > 0)); then
  ranks=$gpus ds_config=ds_configs/zero3_bf16.json
else
  ranks=2 gpu=(--gpu cpu) ds_config=ds_configs/zero3_fp32.json
  # The models of scale cifar train 1.5 times as fast in bf16 on a processor that has it, the digits' no faster: docs/measured.md
  # Their features take half of the time.
  [[ $scale == cifar ]] && grep -qs avx512_bf16 /proc/cpuinfo && ds_config=ds_configs/zero3_bf16.json precision=(--precision bf16)
  export DS_ACCELERATOR=cpu
  threads=1 # of each rank: two ranks use two cores
fi

lasted() { # SECONDS: prints a duration
  python -c "from igpt_ds.console import duration; print(duration($1))"
}

last_line() { # LOG: what the stage said last, a row of training under the names of its columns
  sed -E '/^(next|or): /d' "$1" | awk '
    /^ *step +loss/ { columns = $0 "\n" }
    { last = $0; row = $1 ~ /^[0-9,]+\/[0-9,]+$/ }
    END { if (NR) print (row ? columns : "") last }'
}

on_ranks() { # [TOOL FLAG... --] PROGRAM FLAG...: the program on all ranks, started by the tool if there is one
  local port before=()
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  if [[ $1 == tools/* ]]; then
    before=(python)
    while [[ $1 != -- ]]; do
      before+=("$1")
      shift
    done
    before+=(--)
    shift
  fi
  export OMP_NUM_THREADS=${threads:-${OMP_NUM_THREADS:-8}}
  "${before[@]}" deepspeed --num_gpus "$ranks" --master_port "$port" --log_level warning "$@"
}

asked=(--scale "$scale" "${data[@]}" --out "$out" --gpus "$ranks" "${gpu[@]}" "${precision[@]}" --ds_config "$ds_config")
if [[ " $* " == *' --dry_run '* ]]; then
  exec python tools/paper_plan.py "${asked[@]}" "$@"
fi
plan=$(python tools/paper_plan.py "${asked[@]}" --commands "$@")
mkdir -p "$out/log"
interrupted=0
trap 'interrupted=1' INT
number=0 total=$(grep -c . <<<"$plan" || true)
((total)) || echo "everything is there already"
while IFS=$'\x1f' read -r -a fields <&3; do
  ((${#fields[@]})) || continue # the only line of an empty plan
  name=${fields[0]} job=${fields[1]} printed=${fields[3]} purpose=${fields[4]} words=("${fields[@]:5}")
  printf '\n== %s (%s)\n%s\n' "$((++number)) of $total: $name" "after $(lasted "$SECONDS")" "$purpose"
  log=$out/log/$name.log status=0
  # Ctrl-C ends `deepspeed` before its ranks have saved. The writer of the log ends when every rank has.
  exec 4> >(trap '' INT && exec cat >"$log")
  writer=$!
  case $job in
    pretrain | finetune | sweep_lr) on_ranks "${words[@]}" >&4 2>&1 4>&- || status=$? ;;
    *) python "${words[@]}" >&4 2>&1 4>&- || status=$? ;;
  esac
  exec 4>&-
  ((interrupted == 0)) || echo "paper.sh: Ctrl-C: waiting until $name has saved and ended"
  while kill -0 "$writer" 2>/dev/null; do # a signal ends `wait`
    wait "$writer" 2>/dev/null || sleep 0.1
  done
  if ((interrupted)); then
    saved=$(sed -n 's/.*\(everything is saved\).*/; \1/p' "$log" | tail -n 1)
    echo "paper.sh: stopped by Ctrl-C in $name$saved; the same command continues from there"
    exit 130
  fi
  if ((status)); then
    tail -n 20 "$log" >&2
    echo "paper.sh: error: $name ended with status $status; its output is in $log. The same command continues from there" >&2
    exit "$status"
  fi
  if [[ -z $printed ]]; then
    last_line "$log"
  else
    mv "$log" "$printed"
    echo "$printed"
  fi
done 3<<<"$plan"
echo
for left in tables.md figures report.html card.md; do
  [[ ! -e $out/$left ]] || printf '%s: %s\n' "${left%.*}" "$out/$left"
done
