#!/usr/bin/env bash
# The paper on this machine: every stage of a scale, one after another, on every GPU or on two CPU processes.
#
#     bash tools/paper.sh SCALE OUT [DATA] [more flags of tools/paper_plan.py]
#     bash tools/paper.sh tiny runs/paper_tiny
#     bash tools/paper.sh cifar runs/paper_cifar cifar10:cifar-10-batches-bin
#
# What is there is not done again, and an interrupted training goes on from its newest checkpoint: the same command finishes what
# was begun. Paths are taken from the repository root.
set -euo pipefail
if (($# < 2)); then
  echo "usage: bash tools/paper.sh SCALE OUT [DATA] [more flags of tools/paper_plan.py]" >&2
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
repo=.
[[ -d .venv/bin ]] && PATH=$PWD/.venv/bin:$PATH
source tools/ranks.sh
plan=$(python tools/paper_plan.py --scale "$scale" "${data[@]}" --out "$out" --gpus "$ranks" --ds_config "$ds_config" --commands "$@")
mkdir -p "$out/log"
number=0 total=$(grep -c . <<<"$plan" || true)
((total)) || echo "everything is there already"
while IFS='|' read -r name job _ printed words <&3; do
  [[ -n $name ]] || continue # the only line of an empty plan
  say "$((++number)) of $total: $name"
  eval "words=($words)" # quoted by paper_plan.py
  log=$out/log/$name.log status=0
  case $job in
    pretrain | finetune) on_ranks "${words[@]}" >"$log" 2>&1 || status=$? ;;
    *) python "${words[@]}" >"$log" 2>&1 || status=$? ;;
  esac
  if ((status)); then
    tail -n 20 "$log" >&2
    echo "paper.sh: error: $name ended with status $status; its output is in $log. The same command goes on from there" >&2
    exit "$status"
  fi
  tail -n 1 "$log"
  [[ -z $printed ]] || mv "$log" "$printed"
done 3<<<"$plan"
printf '\ntables: %s\nfigures: %s\nreport: %s\n' "$out/tables.md" "$out/figures" "$out/report.html"
