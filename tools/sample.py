"""Samples images from a model and completes real ones, as a PNG or an animated GIF; maps the loss of each pixel.

    python tools/sample.py --model models/s --data shards/cifar10_32 --out samples.png
    python tools/sample.py --model models/s --rows 0 --images cat.jpg dog.png --prefix_rows 12 --out completed.png --gif drawn.gif
    python tools/sample.py --model models/s --data shards/cifar10_32 --split test --ids 3 14 15 --heat_map costs.png

The upper rows of the PNG are samples without a prefix. With --data or --images, the lower rows are the originals, their prefixes
(the upper half, or --prefix_rows), and one row per completion. --heat_map shows each original beside the negative log-likelihood
of each pixel in nats, given the pixels before it. The same seed gives the same images for every --batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.images import save_gif, save_grid
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import PRECISIONS
from igpt_ds.evaluate.report.figures import heat_maps
from igpt_ds.files import check_writable

with lazy.imports():
    import torch

    from igpt_ds.evaluate.features.network import model_images, model_palette, pick_device
    from igpt_ds.evaluate.likelihood import pixel_nats
    from igpt_ds.model.sampling import Filter, sample
    from igpt_ds.model.store import load_model
    from igpt_ds.model.transformer import Transformer


NOT_GIVEN, EMPTY = 200, 128  # grey levels of pixels to come, and of empty places
GIF_FRAMES = 64


@dataclass(frozen=True)
class Tile:
    """One image of the grid, uint8 [n_px, n_px, 3], and the number of its pixels that are prefix."""

    image: np.ndarray
    given: int


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model, samples, writes the files."""
    args = parse(argv)
    lazy.load()
    check_writable(args.out, args.gif, args.heat_map)
    args.device = pick_device(args.device)
    model, info = load_model(args.model, "ar")
    palette = model_palette(args.model, info)
    Filter(args.temperature, args.top_k, args.top_p).check(info.config.n_vocab)
    n_px = model.config.n_px
    rows = n_px // 2 if args.prefix_rows is None else args.prefix_rows
    if not 1 <= rows < n_px:
        raise InputError(f"--prefix_rows {rows} must lie between 1 and {n_px - 1}; the model's images are {n_px}x{n_px}")
    model = model.to(args.device)
    originals = given_images(model, palette, args)
    scale = args.scale or max(1, 64 // n_px)
    if args.out or args.gif:
        tiles = [Tile(image, 0) for image in decode(draw_from_nothing(model, args), palette, n_px)]
        if originals is not None:
            tiles += completions(model, palette, originals, rows, args)
        if args.out:
            save_grid(args.out, np.stack([tile.image for tile in tiles]), args.columns, scale)
            about = f", {args.completions} completions of {len(originals)} images" if originals is not None else ""
            print(f"{args.out}: {args.rows * args.columns} samples{about}")
        if args.gif:
            save_gif(args.gif, frames(tiles), args.columns, scale)
            print(f"{args.gif}: {args.rows * args.columns} samples{' and completions' if originals is not None else ''} drawn")
    if args.heat_map and originals is not None:
        nats = np.concatenate([pixel_nats(model, part.to(args.device)) for part in originals.split(args.batch)])
        heat_maps(decode(originals, palette, n_px), nats.reshape(-1, n_px, n_px), args.heat_map)
        print(f"{args.heat_map}: {len(nats)} images, {nats.mean(dtype=np.float64):.4f} nats per token")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir")
    parser.add_argument("--out", type=Path, help="PNG to write: samples, with completions below")
    parser.add_argument("--gif", type=Path, help="GIF to write: the same grid, pixel by pixel")
    parser.add_argument("--heat_map", type=Path, help="PNG to write: the given images and the nats of each pixel")
    parser.add_argument("--data", type=Path, help="shard directory with images to complete (default: none)")
    parser.add_argument("--split", default="val", help="split of --data (default: val)")
    parser.add_argument("--ids", type=int, nargs="+", help="ids of images in the split (default: --columns ids, evenly spread)")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="image files or folders to complete, cropped to their centre"
    )
    parser.add_argument(
        "--prefix_rows", type=int, help="upper pixel rows that a completion starts from (default: half of the image)"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of samples without a prefix (default: 4)")
    parser.add_argument("--columns", type=int, default=8, help="images per row (default: 8)")
    parser.add_argument("--completions", type=int, default=2, help="completions per image (default: 2)")
    parser.add_argument("--temperature", type=float, default=1.0, help="number that divides the logits (default: 1)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest colours only (default: all)")
    parser.add_argument(
        "--top_p", type=float, help="sample among the fewest colours whose probabilities sum to this (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: 0)")
    parser.add_argument("--scale", type=int, help="screen pixels per image pixel (default: images of at least 64 screen pixels)")
    parser.add_argument("--batch", type=int, default=64, help="images per batch (default: 64)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device; auto takes a GPU if one exists, else the CPU (default: auto)",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="precision of weights and matrix products (default: fp32)"
    )
    args = parser.parse_args(argv)
    least = {"rows": 0, "columns": 1, "completions": 1, "scale": 1, "batch": 1, "seed": 0}
    for name, smallest in least.items():
        if getattr(args, name) is not None and getattr(args, name) < smallest:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {smallest}")
    if args.seed >= 2**63:
        raise InputError(f"--seed {args.seed} must be below 2^63")
    if not (args.out or args.gif or args.heat_map):
        raise InputError("there is nothing to write; give --out, --gif or --heat_map")
    for name, suffix in (("out", ".png"), ("gif", ".gif"), ("heat_map", ".png")):
        if getattr(args, name) and getattr(args, name).suffix.lower() != suffix:
            raise InputError(f"--{name} {getattr(args, name)} has another suffix than its format; use {suffix}")
    if args.data and args.images:
        raise InputError("--data and --images both give images; give one of them")
    if args.ids and not args.data:
        raise InputError("--ids needs --data")
    if not (args.data or args.images) and (args.heat_map or not args.rows):
        raise InputError(f"{'--heat_map' if args.heat_map else '--rows 0'} needs images; give --data or --images")
    return args


def given_images(model: Transformer, palette: Palette, args: argparse.Namespace) -> torch.Tensor | None:
    """The images to complete or to map, int64 [N, T]; None without --data and --images."""
    n_px = model.config.n_px
    if args.images:
        images = model_images(args.model, args.images)
        images.print_left_out()
        return torch.from_numpy(images.tokens(np.arange(images.n_images)).reshape(images.n_images, -1).astype(np.int64))
    if not args.data:
        return None
    shards = ShardSet(args.data, args.split)
    if shards.palette_hash != palette.hash or shards.n_px != n_px:
        raise InputError(
            f"{args.data} ({shards.n_px}x{shards.n_px}, palette {shards.palette_hash[:8]}) does not fit the model "
            f"{args.model} ({n_px}x{n_px}, palette {palette.hash[:8]}); name the shards it was trained on"
        )
    ids = np.array(args.ids, dtype=np.int64) if args.ids else spread(shards.n_images, args)
    if outside := [str(number) for number in ids if not 0 <= number < shards.n_images]:
        raise InputError(f"--ids {' '.join(outside)} not in {args.data} split {args.split!r}: it has 0..{shards.n_images - 1}")
    return torch.from_numpy(shards.tokens(ids).reshape(len(ids), -1).astype(np.int64))


def spread(n_images: int, args: argparse.Namespace) -> np.ndarray:
    """The ids of one row of images, evenly spread over the split."""
    if n_images < args.columns:
        raise InputError(f"{args.data} split {args.split!r} has {n_images} images; --columns {args.columns} needs more")
    return np.linspace(0, n_images - 1, args.columns).astype(np.int64)


def draw_from_nothing(model: Transformer, args: argparse.Namespace) -> torch.Tensor:
    """Samples without a prefix, int64 [rows * columns, T]."""
    return draw(model, torch.zeros(args.rows * args.columns, 0, dtype=torch.int64), args, "samples")


def draw(model: Transformer, prefix: torch.Tensor, args: argparse.Namespace, what: str) -> torch.Tensor:
    """Completes the prefixes [B, P] to images [B, T], in batches of --batch."""
    generator = torch.Generator().manual_seed(args.seed)
    T, P, drawn = model.config.n_ctx, prefix.size(1), [torch.zeros(0, model.config.n_ctx, dtype=torch.int64)]
    keep = Filter(args.temperature, args.top_k, args.top_p)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    for part in prefix.split(args.batch) if len(prefix) else ():
        positions = tqdm(range(P, T), desc=what, unit="pixel", disable=None)
        drawn.append(sample(model, part.to(args.device), generator, keep, progress=positions, dtype=dtype).cpu())
    return torch.cat(drawn)


def completions(
    model: Transformer, palette: Palette, originals: torch.Tensor, rows: int, args: argparse.Namespace
) -> Iterator[Tile]:
    """For each row of originals [N, T]: originals, prefixes, completions. Empty tiles fill the last row."""
    n_px, N = model.config.n_px, len(originals)
    drawn = draw(model, originals[:, : rows * n_px].repeat(args.completions, 1), args, "completions")
    upper = decode(originals, palette, n_px)
    upper[:, rows:] = NOT_GIVEN
    bands = [(decode(originals, palette, n_px), n_px**2), (upper, n_px**2)]
    bands += [(decode(part, palette, n_px), rows * n_px) for part in drawn.split(N)]
    blank = Tile(np.full((n_px, n_px, 3), EMPTY, dtype=np.uint8), n_px**2)
    for start in range(0, N, args.columns):
        for images, given in bands:
            row = [Tile(image, given) for image in images[start : start + args.columns]]
            yield from row + [blank] * (args.columns - len(row))


def frames(tiles: Sequence[Tile]) -> Iterator[np.ndarray]:
    """The frames of the GIF, uint8 [N, n_px, n_px, 3] each: every image grows evenly from its prefix to the whole."""
    n_px = tiles[0].image.shape[0]
    for number in range(GIF_FRAMES + 1):
        frame = np.stack([tile.image for tile in tiles])
        for image, tile in zip(frame, tiles, strict=True):
            shown = tile.given + (n_px**2 - tile.given) * number // GIF_FRAMES
            image.reshape(-1, 3)[shown:] = NOT_GIVEN
        yield frame


def decode(tokens: torch.Tensor, palette: Palette, n_px: int) -> np.ndarray:
    """tokens [B, T] -> uint8 [B, n_px, n_px, 3]."""
    return palette.decode(tokens.numpy().reshape(-1, n_px, n_px))


if __name__ == "__main__":
    cli.run(main)
