#!/usr/bin/env bash
# From images to tables: palette -> shards -> training -> model dir -> features -> probes -> tables and figures. Each stage is a job
# that waits for the previous one.
#
#     bash slurm/story_xl.sh RECIPE SOURCE OUT [more flags of train.py]
#     bash slurm/story_xl.sh igpt_xl_ar_64 imagenet:/data/ILSVRC2012 runs/xl --ds_config ds_configs/zero3_bf16.json
#
# Submits all jobs at once, with the values of slurm/cluster.sh, and prints their numbers. If a job fails, the jobs that need its
# result are cancelled. The same command again submits the stages without a result. OUT/palette.npy may be your own palette, OUT/shards your
# own shards.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash slurm/story_xl.sh RECIPE SOURCE OUT [more flags of train.py]" >&2
  exit 2
fi
recipe=$1 source=$2 out=$(realpath -m "$3")
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh
source slurm/chain.sh
asked="recipe $recipe, source $source, flags: $*"
mkdir -p "$out"
if [[ -e $out/story.txt && $(<"$out/story.txt") != "$asked" ]]; then
  echo "story_xl.sh: error: $out holds another story ($(<"$out/story.txt")); choose another directory, or remove this one" >&2
  exit 2
fi
nothing_waits
read -r n_px n_colors < <(python -c 'import sys
from igpt_ds.config import get_recipe
model = get_recipe(sys.argv[1]).model
print(model.n_px, model.n_vocab)' "$recipe")
[[ -n ${n_colors:-} ]] || exit 2 # python has printed the error
name=${recipe%%_*} # the name of the images in the tables
[[ $name != igpt ]] || name=${source%%:*}
printf '%s\n' "$asked" >"$out/story.txt"
: >"$out/jobs.txt"

tool "$out/palette.npy" fit_palette --source "$source" --n_px "$n_px" --n_colors "$n_colors" --workers "${CPUS:-1}" --out "$out/palette.npy"
submit "$out/shards" make_shards --source "$source" --n_px "$n_px" --palette "$out/palette.npy" --name "$name" --out "$out/shards"
submit "$out/FINISHED" pretrain --recipe "$recipe" --data "$out/shards" --run_dir "$out" "$@"
tool "$out/model" consolidate --run_dir "$out" --out "$out/model"
submit "$out/features/trained" extract_features --model "$out/model" --data "$out/shards" --out "$out/features/trained"
submit "$out/features/untrained" extract_features --model "$out/model" --untrained 0 --data "$out/shards" --out "$out/features/untrained"
submit "$out/features/pixels" extract_features --pixels --data "$out/shards" --out "$out/features/pixels"
# The stages below always run: they are fast, and their rows may have changed.
submit '' probe --features "$out/features/trained" "$out/features/untrained" "$out/features/pixels" --out "$out/results.jsonl"
submit '' --output="$out/tables.md" --job-name=tables tool tools/tables.py --run_dir "$out" --results "$out/results.jsonl"
tool '' figures layers --results "$out/results.jsonl" --out "$out/layers.png"
tool '' figures training "$out" --out "$out/training.png"
echo "the tables will be in $out/tables.md"
