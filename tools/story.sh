#!/usr/bin/env bash
# The whole thread: images -> palette -> shards -> ZeRO-3 training -> model dir -> features -> probes -> pictures.
#
#     bash tools/story.sh RECIPE SOURCE OUT [more flags of train.py]
#     bash tools/story.sh digits_nano_ar_8 digits: runs/demo
#
# Trains on every GPU, or on two CPU processes where there is none. Each stage is skipped when its result is there, and an
# interrupted training goes on from its newest checkpoint, so the same command finishes what was begun.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash tools/story.sh RECIPE SOURCE OUT [more flags of train.py]" >&2
  exit 2
fi
recipe=$1 source=$2 out=$3
shift 3
repo=$(cd "$(dirname "$0")/.." && pwd)
[[ -d $repo/.venv/bin ]] && PATH=$repo/.venv/bin:$PATH
asked="recipe $recipe, source $source, flags: $*"
mkdir -p "$out"
if [[ -e $out/story.txt && $(<"$out/story.txt") != "$asked" ]]; then
  echo "story.sh: error: $out holds another story ($(<"$out/story.txt")); choose another directory, or remove this one" >&2
  exit 2
fi

source "$repo/tools/ranks.sh"
python -m igpt_ds.plan --recipe "$recipe" >/dev/null # stops here when there is no such recipe, and lists those there are
read -r n_px n_colors steps < <(python -c 'import sys
from igpt_ds.config import get_recipe
recipe = get_recipe(sys.argv[1])
print(recipe.model.n_px, recipe.model.n_vocab, recipe.steps)' "$recipe")

say "palette and shards: $source at ${n_px}x${n_px}, $n_colors colours"
[[ -e $out/palette.npy ]] || python "$repo/tools/fit_palette.py" --source "$source" --n_px "$n_px" --n_colors "$n_colors" --out "$out/palette.npy"
printf '%s\n' "$asked" >"$out/story.txt" # now that recipe and source are known to be there
name=${recipe%%_*} # what the tables call the images
[[ $name != igpt ]] || name=${source%%:*}
[[ -e $out/shards ]] || python "$repo/tools/make_shards.py" --source "$source" --n_px "$n_px" --palette "$out/palette.npy" \
  --name "$name" --out "$out/shards"

say "training: $recipe under ZeRO-3 on $ranks ranks"
[[ -e $out/FINISHED ]] || on_ranks "$repo/train.py" \
  --recipe "$recipe" --data "$out/shards" --run_dir "$out" --ds_config "$ds_config" --resume auto --val_every $((steps / 10)) --save_every $((steps / 4)) "$@"

say "model dir"
[[ -e $out/model ]] || python "$repo/tools/consolidate.py" --run_dir "$out" --out "$out/model"

say "features of every layer: trained, untrained, and the pixels alone"
features=("$out/features/trained" "$out/features/untrained" "$out/features/pixels")
[[ -e ${features[0]} ]] || python "$repo/tools/extract_features.py" --model "$out/model" --data "$out/shards" --out "${features[0]}"
[[ -e ${features[1]} ]] || python "$repo/tools/extract_features.py" --model "$out/model" --untrained 0 --data "$out/shards" --out "${features[1]}"
[[ -e ${features[2]} ]] || python "$repo/tools/extract_features.py" --pixels --data "$out/shards" --out "${features[2]}"

say "linear probes"
python "$repo/tools/linear_probe.py" --features "${features[@]}" --out "$out/results.jsonl"

say "pictures"
python "$repo/tools/figures.py" layers --results "$out/results.jsonl" --out "$out/layers.png"
python "$repo/tools/figures.py" training "$out" --out "$out/training.png"
python "$repo/tools/sample.py" --model "$out/model" --data "$out/shards" --out "$out/samples.png"

say "what came out"
python "$repo/tools/tables.py" --run_dir "$out" --results "$out/results.jsonl"
printf '\naccuracy by layer: %s\nsamples, and completions beside their originals: %s\n' "$out/layers.png" "$out/samples.png"
