"""Draws images from a model dir, and completes the lower halves of real ones, as one PNG.

    python tools/sample.py --model models/s --data shards/cifar10_32 --out samples.png

Above, images drawn from nothing. Below, with --data: a row of originals from the split, what the model is given of each
(the upper half), and one row for each completion.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.data.images import save_grid
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.data.shards import ShardSet
from igpt_ds.evaluate.features import pick_device
from igpt_ds.model.sampling import sample
from igpt_ds.model.store import load_model
from igpt_ds.model.transformer import Transformer


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, draws, writes the PNG."""
    args = parse(argv)
    model, info = load_model(args.model)
    palette = load_palette(args.model / "palette.npy")
    if palette.hash != info.palette_hash:
        raise ValueError(f"{args.model / 'palette.npy'} is not the palette the model was trained with; consolidate again")
    model = model.to(args.device)
    columns = args.columns
    grid = decode(draw(model, torch.zeros(args.rows * columns, 0, dtype=torch.int64), args, "samples"), palette, model)
    if args.data:
        grid = np.concatenate([grid, completions(model, palette, args)])
    save_grid(args.out, grid, columns, args.scale or max(1, 64 // model.config.n_px))
    print(
        f"{args.out}: {args.rows * columns} samples"
        + (f", {args.completions} completions of {columns} images" if args.data else "")
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--data", type=Path, help="shards whose images are completed; none when left out")
    parser.add_argument("--split", default="val", help="split of --data")
    parser.add_argument("--rows", type=int, default=4, help="rows of samples")
    parser.add_argument("--columns", type=int, default=8, help="images in a row")
    parser.add_argument("--completions", type=int, default=2, help="completions of each image")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest colours only; all when left out")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--scale", type=int, help="screen pixels for each image pixel; as many as make 64 when left out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    for name in ("rows", "columns", "completions", "scale"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def draw(model: Transformer, prefix: torch.Tensor, args: argparse.Namespace, what: str) -> torch.Tensor:
    """Continues the prefixes [B, P] to images [B, T]."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    positions = tqdm(range(prefix.size(1), model.config.n_ctx), desc=what, unit="pixel", disable=None)
    return sample(model, prefix.to(args.device), generator, args.temperature, args.top_k, progress=positions).cpu()


def completions(model: Transformer, palette: Palette, args: argparse.Namespace) -> np.ndarray:
    """Rows of originals, of their given halves, and of completions: uint8 [(2 + completions) * columns, n_px, n_px, 3]."""
    shards = ShardSet(args.data, args.split)
    n_px = model.config.n_px
    if shards.palette_hash != palette.hash or shards.n_px != n_px:
        raise ValueError(
            f"{args.data} ({shards.n_px}x{shards.n_px}, palette {shards.palette_hash[:8]}) does not fit the model "
            f"{args.model} ({n_px}x{n_px}, palette {palette.hash[:8]}); name the shards it was trained on"
        )
    if shards.n_images < args.columns:
        raise ValueError(f"{args.data} split {args.split!r} has {shards.n_images} images; --columns {args.columns} needs more")
    ids = np.linspace(0, shards.n_images - 1, args.columns).astype(np.int64)  # spread over the classes
    originals = torch.from_numpy(shards.tokens(ids).reshape(args.columns, -1).astype(np.int64))
    half = n_px // 2 * n_px
    drawn = draw(model, originals[:, :half].repeat(args.completions, 1), args, "completions")
    given = decode(originals, palette, model)
    given_half = given.copy()
    given_half[:, n_px // 2 :] = 200  # not given
    return np.concatenate([given, given_half, decode(drawn, palette, model)])


def decode(tokens: torch.Tensor, palette: Palette, model: Transformer) -> np.ndarray:
    """tokens [B, T] -> uint8 [B, n_px, n_px, 3]."""
    n_px = model.config.n_px
    return palette.decode(tokens.numpy().reshape(-1, n_px, n_px))


if __name__ == "__main__":
    cli.run(main)
