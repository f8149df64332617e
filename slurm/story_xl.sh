#!/usr/bin/env bash
# From images to tables: palette -> shards -> training -> model dir -> features -> probes -> tables and figures, each a job that
# waits for the one before.
#
#     bash slurm/story_xl.sh RECIPE SOURCE OUT [more flags of train.py]
#     bash slurm/story_xl.sh igpt_xl_ar_64 imagenet:/data/ILSVRC2012 runs/xl --ds_config ds_configs/zero3_bf16_full_checkpointing.json
#
# Submits all jobs at once, with the values of slurm/cluster.sh, and prints their numbers. When one fails, those that need its
# result are cancelled; the same command again submits what has no result yet. A palette of your own: OUT/palette.npy.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash slurm/story_xl.sh RECIPE SOURCE OUT [more flags of train.py]" >&2
  exit 2
fi
recipe=$1 source=$2 out=$(realpath -m "$3")
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh
asked="recipe $recipe, source $source, flags: $*"
mkdir -p "$out"
if [[ -e $out/story.txt && $(<"$out/story.txt") != "$asked" ]]; then
  echo "story_xl.sh: error: $out holds another story ($(<"$out/story.txt")); choose another directory, or remove this one" >&2
  exit 2
fi
if [[ -s $out/jobs.txt ]] && waiting=$(squeue -h -u "$(id -un)" -o '%A' | grep -xFf <(awk '{print $NF}' "$out/jobs.txt") | sort -un | paste -sd ' '); then
  echo "story_xl.sh: error: jobs of $out are still queued: $waiting; wait for them, or scancel $waiting" >&2
  exit 2
fi
read -r n_px n_colors < <("${INSIDE[@]}" python -c 'import sys
from igpt_ds.config import get_recipe
model = get_recipe(sys.argv[1]).model
print(model.n_px, model.n_vocab)' "$recipe")
[[ -n ${n_colors:-} ]] || exit 2 # python said why
printf '%s\n' "$asked" >"$out/story.txt"
: >"$out/jobs.txt"

last='' # the job that the next one waits for
submit() { # RESULT WORD...: the jobs of one stage, unless its result is there
  local result=$1 options=()
  shift
  if [[ -e $result ]]; then
    echo "there already: $result"
    return
  fi
  [[ -z $last ]] || options=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
  bash slurm/submit.sh "${options[@]}" "$@" | tee -a "$out/jobs.txt"
  last=$(tail -n 1 "$out/jobs.txt" | awk '{print $NF}')
}
tool() { # RESULT NAME FLAG...: one tool, with its name as that of the job
  submit "$1" --job-name="$2" tool "tools/$2.py" "${@:3}"
}

tool "$out/palette.npy" fit_palette --source "$source" --n_px "$n_px" --n_colors "$n_colors" --out "$out/palette.npy"
submit "$out/shards" make_shards --source "$source" --n_px "$n_px" --palette "$out/palette.npy" --name "${recipe%%_*}" --out "$out/shards"
submit "$out/FINISHED" pretrain --recipe "$recipe" --data "$out/shards" --run_dir "$out" "$@"
tool "$out/model" consolidate --run_dir "$out" --out "$out/model"
submit "$out/features/trained" extract_features --model "$out/model" --data "$out/shards" --out "$out/features/trained"
submit "$out/features/untrained" extract_features --model "$out/model" --untrained 0 --data "$out/shards" --out "$out/features/untrained"
submit "$out/features/pixels" extract_features --pixels --data "$out/shards" --out "$out/features/pixels"
# From here on all is quick to make again, and made of rows that may have changed: it has no result that would stand for it.
submit '' probe --features "$out/features/trained" "$out/features/untrained" "$out/features/pixels" --out "$out/results.jsonl"
submit '' --output="$out/tables.md" --job-name=tables tool tools/tables.py --run_dir "$out" --results "$out/results.jsonl"
tool '' figures layers --results "$out/results.jsonl" --out "$out/layers.png"
tool '' figures training "$out" --out "$out/training.png"
echo "the tables will be in $out/tables.md"
