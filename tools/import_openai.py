"""Imports a released checkpoint of openai/image-gpt (model.ckpt-N.index and .data-* files) as a model dir, without TensorFlow.

    python tools/import_openai.py --checkpoint igpt-s/model.ckpt-1000000 --palette kmeans_centers.npy --out models/igpt_s

The tensors give the shape and the objective. A checkpoint does not contain its palette. A model of 512 colours needs the
palette of the release; any other is refused. Optimizer state and classifier are not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.palette import OPENAI_PALETTE_HASH, load_palette
from igpt_ds.errors import InputError
from igpt_ds.files import check_writable

with lazy.imports():
    from igpt_ds.model.interchange.hf import save_imported
    from igpt_ds.model.interchange.openai import read_openai
    from igpt_ds.model.store import read_info


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the palette, reads the tensors, writes the model dir."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="path of the checkpoint without .index")
    parser.add_argument("--palette", type=Path, required=True, help="kmeans_centers.npy of the release")
    parser.add_argument("--out", type=Path, required=True, help="model dir to write")
    args = parser.parse_args(argv)
    lazy.load()
    check_writable(directories=[args.out])

    palette = load_palette(args.palette)
    imported = read_openai(args.checkpoint)
    if len(palette) != imported.config.n_vocab:
        raise InputError(f"--palette {args.palette} has {len(palette)} colours; {args.checkpoint} has {imported.config.n_vocab}")
    if len(palette) == 512 and palette.hash != OPENAI_PALETTE_HASH:
        raise InputError(f"--palette {args.palette} is not OpenAI's; give kmeans_centers.npy of the image-gpt release")
    save_imported(args.out, imported, args.palette, palette.hash)
    size = sum(tensor.numel() for tensor in imported.weights.values())
    about = f"objective {imported.objective}, step {imported.step}, {size:,} parameters, {palette.name}"
    print(f"{args.out}: {about}, sha256 {read_info(args.out).model_hash[:16]}")


if __name__ == "__main__":
    cli.run(main)
