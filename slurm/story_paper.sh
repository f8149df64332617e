#!/usr/bin/env bash
# The whole paper on a cluster. Every stage of a scale is a job that waits for the jobs whose results it needs.
#
#     bash slurm/story_paper.sh SCALE OUT DATA [more flags of tools/paper_plan.py]
#     bash slurm/story_paper.sh full runs/paper /data
#     SUBMIT=1 bash slurm/story_paper.sh full runs/paper /data --gpu h200-141g
#
# Prints the plan: stages, and at full scale GPU-hours and disk, on the GPUs of slurm/cluster.sh. SUBMIT=1 submits all jobs at once. If
# a job fails, the jobs that need its result are cancelled. The same command again submits the stages without a result. DATA of scale
# full is the directory that holds ILSVRC2012, CIFAR-10, CIFAR-100 and STL-10. Scale tiny has no DATA: give ''.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash slurm/story_paper.sh SCALE OUT DATA [more flags of tools/paper_plan.py]" >&2
  exit 2
fi
scale=$1 out=$(realpath -m "$2") data=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh
source slurm/chain.sh

nodes=${NODES:-8} a_node=${GPUS_PER_NODE:-${RANKS_PER_NODE:-8}}
if ((a_node > 0)); then
  machine=(--node_gpus "$a_node")
else # a cluster without GPUs
  a_node=${RANKS_PER_NODE:-1} machine=(--ds_config ds_configs/zero3_fp32.json)
fi
plan() { # [--commands]
  python tools/paper_plan.py --scale "$scale" --data "$data" --out "$out" --gpus $((${nodes##*-} * a_node)) "${machine[@]}" "$@"
}
plan "$@"
if [[ ${SUBMIT:-} != 1 ]]; then
  echo "nothing was submitted; to do so: SUBMIT=1 before the same command"
  exit
fi

nothing_waits
commands=$(plan "$@" --commands)
if [[ -z $commands ]]; then
  echo "nothing was submitted: everything is there already, the tables in $out/tables.md, the report in $out/report.html"
  exit
fi
: >"$out/jobs.txt"
declare -A job_of # stage -> number of its last job
while IFS='|' read -r name job needs printed words <&3; do
  eval "words=($words)" # paper_plan.py has quoted the words
  last='' options=(--job-name="$name")
  for need in ${needs//,/ }; do
    last+=${last:+:}${job_of[$need]}
  done
  [[ -z $printed ]] || options+=(--output="$printed")
  if [[ $job == gpu_tool ]]; then # these options override those of submit.sh for a tool
    options+=(--partition="$PARTITION" "${GPU_OPTIONS[@]}")
    [[ ${GPUS_PER_NODE:-0} == 0 ]] || options+=(--gpus-per-node=1)
  fi
  case $job in
    tool | gpu_tool) submit '' "${options[@]}" tool "${words[@]}" ;;
    *) submit '' "${options[@]}" "$job" "${words[@]:1}" ;;
  esac
  job_of[$name]=$last
done 3<<<"$commands"
echo "the tables will be in $out/tables.md, the report in $out/report.html"
