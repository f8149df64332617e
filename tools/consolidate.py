"""Gathers a sharded checkpoint into a model dir: config.json, model.safetensors (float32), palette.npy.

    python tools/consolidate.py --run_dir runs/s --out models/s

takes the newest complete checkpoint; --step takes another. Needs no GPU, no DeepSpeed and no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from igpt_ds import cli
from igpt_ds.config import recipe_from_dict
from igpt_ds.data.palette import load_palette
from igpt_ds.model.store import read_info, save_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.checkpoint import checkpoint_name, damaged_files, newest_checkpoint, read_manifest
from igpt_ds.train.zero_files import whole_tensors


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the checkpoint's files, gathers the tensors, writes the model dir."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run_dir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--out", type=Path, required=True, help="the model dir to make")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest complete one when left out")
    args = parser.parse_args(argv)

    directory = args.run_dir / "checkpoints"
    if args.step is None:
        newest = newest_checkpoint(directory)
        if newest is None:
            raise ValueError(f"{directory} holds no complete checkpoint; train first, or name another --run_dir")
        checkpoint, manifest = newest
    else:
        checkpoint = directory / checkpoint_name(args.step)
        manifest = read_manifest(checkpoint)
    if damaged := damaged_files(checkpoint, manifest["files"]):
        raise ValueError(f"{checkpoint / damaged[0]} is damaged (sha256 differs); choose another --step")

    recipe = recipe_from_dict(manifest["recipe"], str(checkpoint / "manifest.json"))
    palette = args.run_dir / "palette.npy"
    if load_palette(palette).hash != manifest["data"]["palette_hash"]:
        raise ValueError(f"{palette} is not the palette of the training shards; copy theirs to {args.run_dir}")
    weights = dict(whole_tensors(checkpoint, manifest["world_size"]))
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in Transformer(recipe.model, objective=recipe.objective).state_dict().items()
        }
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ValueError(f"{checkpoint} does not hold the tensors of its own recipe; it was written by other code")
    info = {
        "config": recipe.model,
        "recipe": recipe.name,
        "objective": recipe.objective,
        "mask_prob": recipe.mask_prob if recipe.objective == "bert" else None,
        "init": recipe.init,
        "palette_hash": manifest["data"]["palette_hash"],
        "dataset_hash": manifest["data"]["dataset_hash"],
        "step": manifest["step"],
        "images_seen": manifest["images_seen"],
    }
    save_model(args.out, weights, info, palette)
    size = sum(tensor.numel() for tensor in weights.values())
    print(f"{args.out}: step {manifest['step']}, {size:,} parameters, sha256 {read_info(args.out).model_hash[:16]}")


if __name__ == "__main__":
    cli.run(main)
