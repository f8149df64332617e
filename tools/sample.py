"""Samples images from a model and completes real ones, as a PNG or an animated GIF; maps the loss of each pixel.

    python tools/sample.py --model models/s --data shards/cifar10_32 --out samples.png
    python tools/sample.py --model models/s --rows 0 --images cat.jpg dog.png --prefix_rows 12 --out completed.png --gif drawn.gif
    python tools/sample.py --model models/s --data shards/cifar10_32 --split test --ids 3 14 15 --heat_map costs.png

The upper rows of the PNG are samples without a prefix. With --data or --images, the lower rows are the originals, their prefixes
(the upper half, or --prefix_rows), and one row per completion. Each row has its label, each original its file name, or its id and
class. --heat_map shows each original beside the negative log-likelihood of each pixel in nats, given the pixels before it. The
same seed gives the same images for every --batch.
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
from igpt_ds.data.grids import BACKGROUND, CELL, Texts, cell_scale, save_gif, save_grid
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import PRECISIONS
from igpt_ds.evaluate.report.figures import heat_maps
from igpt_ds.files import check_writable

with lazy.imports():
    import torch

    from igpt_ds.api.found import model_dir
    from igpt_ds.evaluate.features.network import model_images, model_palette, pick_device
    from igpt_ds.evaluate.likelihood import pixel_nats
    from igpt_ds.model.sampling import Filter, sample
    from igpt_ds.model.store import load_model
    from igpt_ds.model.transformer import Transformer


NOT_GIVEN = 200  # grey level of pixels to come
GIF_FRAMES = 64


@dataclass(frozen=True)
class Row:
    """One row of the grid: images, uint8 [N, n_px, n_px, 3], and how many pixels of each are shown from the start, int64 [N]."""

    label: str
    images: np.ndarray
    given: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Originals:
    """The images to complete or to map: tokens int64 [N, T], and a name for each."""

    tokens: torch.Tensor
    names: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model, samples, writes the files."""
    args = parse(argv)
    lazy.load()
    args.model_dir = model_dir(args.model)
    check_writable(args.out, args.gif, args.heat_map)
    args.device = pick_device(args.device)
    model, info = load_model(args.model_dir, "ar")
    palette = model_palette(args.model_dir, info)
    Filter(args.temperature, args.top_k, args.top_p).check(info.config.n_vocab)
    n_px = model.config.n_px
    rows = n_px // 2 if args.prefix_rows is None else args.prefix_rows
    if not 1 <= rows < n_px:
        raise InputError(f"--prefix_rows {rows} must lie between 1 and {n_px - 1}; the model's images are {n_px}x{n_px}")
    model = model.to(args.device)
    originals = given_images(model, palette, args)
    scale = args.scale or cell_scale(n_px)
    about = f", {args.completions} completions of {len(originals.names)} images" if originals else ""
    if args.out or args.gif:
        rows_shown = list(sample_rows(decode(draw_from_nothing(model, args), palette, n_px), args.columns))
        if originals:
            rows_shown += completions(model, palette, originals, rows, args)
        grid = np.concatenate([row.images for row in rows_shown])
        texts = Texts([text for row in rows_shown for text in row.captions], [row.label for row in rows_shown])
        if args.out:
            save_grid(args.out, grid, args.columns, scale, texts)
            print(f"{args.out}: {args.rows * args.columns} samples{about}")
        if args.gif:
            given = np.concatenate([row.given for row in rows_shown])
            save_gif(args.gif, frames(grid, given), args.columns, scale, texts)
            print(f"{args.gif}: {args.rows * args.columns} samples{' and completions' if originals else ''} drawn")
    if args.heat_map and originals:
        parts = tqdm(originals.tokens.split(args.batch), "likelihood", unit=" batches", leave=False, disable=None)
        nats = np.concatenate([pixel_nats(model, part.to(args.device)) for part in parts])
        heat_maps(decode(originals.tokens, palette, n_px), nats.reshape(-1, n_px, n_px), originals.names, args.heat_map)
        print(f"{args.heat_map}: {len(nats)} images, {nats.mean(dtype=np.float64):.4f} nats per token")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir, run dir or checkpoint")
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
    parser.add_argument("--scale", type=int, help=f"screen pixels per image pixel (default: images of at least {CELL})")
    parser.add_argument("--batch", type=int, default=64, help="images per batch (default: 64)")
    cli.add_device(parser)
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


def given_images(model: Transformer, palette: Palette, args: argparse.Namespace) -> Originals | None:
    """The images to complete or to map; None without --data and --images."""
    n_px = model.config.n_px
    if args.images:
        images = model_images(args.model_dir, args.images)
        images.print_left_out()
        drawn = images.tokens(np.arange(images.n_images)).reshape(images.n_images, -1).astype(np.int64)
        return Originals(torch.from_numpy(drawn), [Path(key).name for key in images.keys])
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
    tokens = torch.from_numpy(shards.tokens(ids).reshape(len(ids), -1).astype(np.int64))
    labels = [shards.classes[label] if 0 <= label < len(shards.classes) else "" for label in shards.labels(ids)]
    return Originals(tokens, [f"{number}: {label}" for number, label in zip(ids, labels, strict=True)])


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
    with tqdm(total=len(prefix) * (T - P), desc=what, unit=" pixels", unit_scale=True, leave=False, disable=None) as bar:

        def positions(images: int) -> Iterator[int]:
            for position in range(P, T):
                yield position
                bar.update(images)

        for part in prefix.split(args.batch) if len(prefix) else ():
            progress = positions(len(part))
            drawn.append(sample(model, part.to(args.device), generator, keep, progress=progress, dtype=dtype).cpu())
    return torch.cat(drawn)


def sample_rows(images: np.ndarray, columns: int) -> Iterator[Row]:
    """The rows of the samples without a prefix."""
    for start in range(0, len(images), columns):
        yield Row("sample", images[start : start + columns], np.zeros(columns, dtype=np.int64), ("",) * columns)


def completions(model: Transformer, palette: Palette, originals: Originals, rows: int, args: argparse.Namespace) -> Iterator[Row]:
    """For each row of originals: originals, prefixes, completions. Empty places fill the last row."""
    n_px, N = model.config.n_px, len(originals.names)
    drawn = draw(model, originals.tokens[:, : rows * n_px].repeat(args.completions, 1), args, "completions")
    whole = decode(originals.tokens, palette, n_px)
    upper = whole.copy()
    upper[:, rows:] = NOT_GIVEN
    bands = [("original", whole, n_px**2), (f"given: {rows} of {n_px} rows", upper, n_px**2)]
    for number, part in enumerate(drawn.split(N), start=1):
        bands.append((f"completion {number}", decode(part, palette, n_px), rows * n_px))
    for start in range(0, N, args.columns):
        names = originals.names[start : start + args.columns]
        empty = args.columns - len(names)
        blank = np.full((empty, n_px, n_px, 3), BACKGROUND, dtype=np.uint8)
        for label, images, given in bands:
            captions = (*(names if label == "original" else [""] * len(names)), *[""] * empty)
            shown = np.array([given] * len(names) + [n_px**2] * empty)
            yield Row(label, np.concatenate([images[start : start + args.columns], blank]), shown, captions)


def frames(images: np.ndarray, given: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of the GIF, uint8 [N, n_px, n_px, 3] each: every image grows evenly from its prefix to the whole."""
    n_px = images.shape[1]
    for number in range(GIF_FRAMES + 1):
        frame = images.copy()
        for image, first in zip(frame, given, strict=True):
            image.reshape(-1, 3)[first + (n_px**2 - first) * number // GIF_FRAMES :] = NOT_GIVEN
        yield frame


def decode(tokens: torch.Tensor, palette: Palette, n_px: int) -> np.ndarray:
    """tokens [B, T] -> uint8 [B, n_px, n_px, 3]."""
    return palette.decode(tokens.numpy().reshape(-1, n_px, n_px))


if __name__ == "__main__":
    cli.run(main)
