#!/usr/bin/env bash
# From images to tables on a cluster. Every stage of a scale is a job that waits for the jobs whose results it needs.
#
#     bash slurm/story_paper.sh SCALE OUT DATA [more flags of tools/paper_plan.py]
#     bash slurm/story_paper.sh full runs/paper /data
#     SUBMIT=1 bash slurm/story_paper.sh full runs/paper /data --gpu h200-141g
#     SUBMIT=1 bash slurm/story_paper.sh own runs/xl imagenet:/data/ILSVRC2012 -- --recipe igpt_xl_ar_64
#
# Prints the plan: stages, and at full scale GPU-hours and disk, on the GPUs of slurm/cluster.sh. SUBMIT=1 submits all jobs at once. If
# a job fails, the jobs that need its result are cancelled. The same command again submits the stages without a result. DATA of scale
# full is the directory that holds ILSVRC2012, CIFAR-10, CIFAR-100 and STL-10. DATA of scale own is KIND:WHERE, and flags of train.py
# follow "--". Scale tiny has no DATA: give ''. OUT/jobs.txt holds the jobs of the last submission, a name and a number per line.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash slurm/story_paper.sh SCALE OUT DATA [more flags of tools/paper_plan.py]" >&2
  exit 2
fi
scale=$1 out=$(realpath -m "$2") data=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh

nodes=${NODES:-8} a_node=${GPUS_PER_NODE:-${RANKS_PER_NODE:-8}}
if ((a_node > 0)); then
  machine=(--node_gpus "$a_node")
else # a cluster without GPUs
  a_node=${RANKS_PER_NODE:-1} machine=(--ds_config ds_configs/zero3_fp32.json)
fi
plan() { # [FLAG ...] [-- FLAG of train.py ...]
  python tools/paper_plan.py --scale "$scale" --data "$data" --out "$out" --gpus $(((${nodes##*-} - ${SPARE_NODES:-0}) * a_node)) "${machine[@]}" "$@"
}
plan "$@"
if [[ ${SUBMIT:-} != 1 || " $* " == *' --dry_run '* ]]; then
  echo "nothing was submitted; to do so: SUBMIT=1 before the same command"
  exit
fi

if [[ -s $out/jobs.txt ]] && waiting=$(squeue -h -u "$(id -un)" -o '%A' | grep -xFf <(awk '{print $NF}' "$out/jobs.txt") | sort -un | paste -sd ' '); then
  echo "story_paper.sh: error: jobs of $out are still queued: $waiting; wait for them, or scancel $waiting" >&2
  exit 2
fi
commands=$(plan --commands "$@")
if [[ -z $commands ]]; then
  echo "nothing was submitted: everything is there already, the tables in $out/tables.md, the report in $out/report.html"
  exit
fi
: >"$out/jobs.txt"
declare -A job_of # stage -> number of its last job
while IFS=$'\x1f' read -r -a fields <&3; do
  name=${fields[0]} job=${fields[1]} needs=${fields[2]} printed=${fields[3]} words=("${fields[@]:5}")
  before='' options=(--job-name="$name")
  for need in ${needs//,/ }; do
    before+=${before:+:}${job_of[$need]}
  done
  [[ -z $before ]] || options=(--dependency="afterok:$before" --kill-on-invalid-dep=yes "${options[@]}")
  [[ -z $printed ]] || options+=(--output="$printed")
  if [[ $job == gpu_tool ]]; then # these options override those of submit.sh for a tool
    options+=(--partition="$PARTITION" "${GPU_OPTIONS[@]}")
    [[ ${GPUS_PER_NODE:-0} == 0 ]] || options+=(--gpus-per-node=1)
  fi
  case $job in
    tool | gpu_tool) options+=(tool) ;;
    *) options+=("$job") words=("${words[@]:1}") ;;
  esac
  bash slurm/submit.sh "${options[@]}" "${words[@]}" | tee -a "$out/jobs.txt"
  job_of[$name]=$(tail -n 1 "$out/jobs.txt" | awk '{print $NF}')
done 3<<<"$commands"
echo "the tables will be in $out/tables.md, the report in $out/report.html"
