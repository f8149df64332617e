"""Measures the data code beside its peers on one core, as medians of turns. Exit status: 1 if a bar is missed.

--images is a directory of JPEG photographs of at least 200 px. --quick takes about a minute.

    python tools/bench/data.py --images ILSVRC2012/train --quick --out bench_data.json
    python tools/bench/data.py --show docs/bench_data.json
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import BenchRow, medians

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.images import DEFAULT_FILTER, decode_image, square
from igpt_ds.data.kmeans import kmeans
from igpt_ds.data.palette import ColorCounts, Palette, fit_palette, prepare_table, save_palette
from igpt_ds.data.palette_table import build_table, nearest
from igpt_ds.data.shards.build import copy_images, write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.errors import InputError

with lazy.imports():
    import torch

    from igpt_ds.data.loader import BatchLayout, Loader


N_COLORS = 512  # the paper's (3.2)
BATCH = 128  # images
# Runs a program and prints its peak memory; getrusage would include the memory of its parent.
PEAK = """import atexit, runpy, sys
atexit.register(lambda: print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]))
runpy.run_path(sys.argv.pop(1), run_name="__main__")"""
MAX_IMAGES = 1000  # largest number of JPEGs to read, the first by path
PACKAGES = ("numpy", "torch", "pillow", "simplejpeg", "scikit-learn", "scipy", "faiss-cpu", "webdataset")


@dataclass(frozen=True)
class World:
    """The common inputs of all measurements: JPEG files, their palette, the number of turns."""

    files: list[bytes]
    palette: Palette
    quick: bool
    work: Path  # an empty folder

    @property
    def turns(self) -> int:
        """The number of turns of each contender."""
        return 5 if self.quick else 15


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen measurements, prints the table, writes the JSON."""
    measures = {function.__name__: function for function in (quantise, palette, jpeg, loader, memory)}
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--images", type=Path, help="directory of JPEG files, searched recursively")
    harness.add_flags(parser, "fewer turns", measures, toy=False)
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    if args.images is None:
        raise InputError("--images is needed: a folder of JPEGs")
    lazy.load()
    with harness.one_core(), tempfile.TemporaryDirectory() as directory:
        world = open_world(args.images, args.quick, Path(directory))
        rows = [row for name in args.only or measures for row in measures[name](world)]
    harness.finish(rows, args.out, args.quick, PACKAGES)


def open_world(directory: Path, quick: bool, work: Path) -> World:
    """Reads the JPEGs and fits their palette."""
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:MAX_IMAGES]
    if not paths:
        raise InputError(f"images={directory} holds no .jpg or .jpeg file; name a folder of JPEGs")
    files = [path.read_bytes() for path in paths]
    pixels = np.concatenate([square(decode_image(data), 64).reshape(-1, 3) for data in files[:100]])
    save_palette(work / "palette.npy", *fit_palette(pixels, N_COLORS))
    return World(files, prepare_table(work / "palette.npy"), quick, work)


def quantise(world: World) -> list[BenchRow]:
    """Tokens of 32x32 images, in one batch as for HF's processor, and one at a time, with the same 512 colours."""
    files = world.files[: 16 if world.quick else 64]
    batch = np.stack([square(decode_image(data), 32) for data in files])
    colors = world.palette.colors.astype(np.float64)

    def hf(a: np.ndarray) -> np.ndarray:
        """The formula of Hugging Face's ImageGPTImageProcessor, on normalised pixels."""
        b = colors.T
        distance = np.sum(np.square(a), axis=1)[:, None] - 2 * np.matmul(a, b) + np.sum(np.square(b), axis=0)[None, :]
        return np.argmin(distance, axis=1)

    rows = []
    for how, images in (("in a batch", [batch]), ("one at a time", list(batch))):
        points = [image.reshape(-1, 3) / 127.5 - 1 for image in images]
        for image, a in zip(images, points, strict=True):
            tokens = world.palette.encode(image).ravel()
            assert (tokens == nearest(image.reshape(-1, 3), world.palette.colors)[0]).all()
            assert (tokens == hf(a)).mean() > 0.999
        contenders = _quantisers(world.palette, images, points, hf)
        rate = {name: len(batch) / value for name, value in medians(contenders, world.turns).items()}
        ours = rate.pop("ours")
        bars = {"HF formula": 200.0} if images[0] is batch else {}  # it takes images in batches
        rows += [
            BenchRow("quantise 32x32", "images/s", ours, value, name, bars.get(name), note=how) for name, value in rate.items()
        ]
    built = medians({"table": partial(build_table, world.palette.colors)}, world.turns)["table"]
    return [*rows, BenchRow("table of 256^3 colours", "s", built, 1.0, "a second", 1.0, at_most=True)]


def _quantisers(
    palette: Palette, images: list[np.ndarray], points: list[np.ndarray], hf: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Callable[[], Any]]:
    from sklearn.metrics import pairwise_distances_argmin

    colors = palette.colors.astype(np.float64)
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: [palette.encode(image) for image in images],
        "HF formula": lambda: [hf(a) for a in points],
        "sklearn pairwise_distances_argmin": lambda: [pairwise_distances_argmin(a, colors) for a in points],
    }
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")  # of its build tools
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatL2(3)
        index.add(palette.colors)
        contenders["faiss IndexFlatL2"] = lambda: [index.search(a.astype(np.float32), 1) for a in points]
    return contenders


def palette(world: World) -> list[BenchRow]:
    """512 colours of 1,000,000 pixels by k-means from the same first centres: speed and inertia."""
    from sklearn.cluster import KMeans, kmeans_plusplus

    random = np.random.default_rng(0)
    pixels = np.concatenate([square(decode_image(data), 96).reshape(-1, 3) for data in world.files])
    pixels = pixels[random.permutation(len(pixels))[:1_000_000]]
    points = pixels / 127.5 - 1
    init, _ = kmeans_plusplus(points[:50_000], N_COLORS, random_state=0)  # scikit-learn's own, on a part
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        counts = ColorCounts()
        counts.add(pixels)
        colors, weights = counts.weighted()
        found["ours"] = kmeans(colors / 127.5 - 1, weights.astype(np.float64), N_COLORS, init=init)

    def sklearn() -> None:
        model = KMeans(N_COLORS, init=init, n_init=1, algorithm="lloyd")
        found["sklearn"] = model.fit(points).cluster_centers_

    seconds = medians({"ours": ours, "sklearn": sklearn}, 1 if world.quick else 3, warm_up=False)
    inertia = {name: _inertia(points, pixels, centres) for name, centres in found.items()}
    N, peer = len(pixels), "sklearn KMeans lloyd, same first centres"
    size = f"{N:,} pixels, k = {N_COLORS}"
    return [
        BenchRow("palette fit", "pixels/s", N / seconds["ours"], N / seconds["sklearn"], peer, 10.0, note=size),
        BenchRow("palette inertia", "", inertia["ours"], inertia["sklearn"], peer, 1.005, at_most=True),
    ]


def _inertia(points: np.ndarray, pixels: np.ndarray, centres: np.ndarray) -> float:
    fitted = Palette(centres.clip(-1, 1).astype(np.float32))
    return float(((points - fitted.colors[fitted.encode(pixels)]) ** 2).sum())


def jpeg(world: World) -> list[BenchRow]:
    """JPEG bytes to 64x64 tokens: ours against PIL's decode and resize with the same filter, crop and quantiser."""
    from PIL import Image, ImageOps

    files = world.files[: 32 if world.quick else 160]

    def by_pil(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        short = min(image.size)
        width, height = (round(side * 64 / short) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling[DEFAULT_FILTER.upper()]))
        top, left = (height - 64) // 2, (width - 64) // 2
        return resized[top : top + 64, left : left + 64]

    differences = [int(np.abs(square(decode_image(data), 64).astype(int) - by_pil(data)).max()) for data in files]
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: [world.palette.encode(square(decode_image(data), 64)) for data in files],
        "PIL": lambda: [world.palette.encode(by_pil(data)) for data in files],
    }
    seconds = medians(contenders, world.turns)
    mine, theirs = (len(files) / seconds[name] for name in ("ours", "PIL"))
    note = f"{DEFAULT_FILTER}; at most {max(differences)} grey level(s) apart"
    return [BenchRow("JPEG to 64x64 tokens", "images/s", mine, theirs, "PIL alone", 1.5, note=note)]


def loader(world: World) -> list[BenchRow]:
    """Batches of 128 images of 1,024 and 4,096 tokens in random order, from shards in the page cache."""
    rows = []
    for n_px in (32, 64):
        n_images, source = 32768, open_source(f"imagefolder:{small_jpegs(world, 512, n_px)}")
        write_dataset(world.work / f"few{n_px}", source, world.palette, ShardOptions(n_px, val_fraction=0))
        few, path = ShardSet(world.work / f"few{n_px}", "train"), world.work / f"many{n_px}"
        copy_images(path, few, np.arange(n_images) % few.n_images, note={})
        verified = ShardSet(path, "train")
        verified.verify()
        flat = np.lib.format.open_memmap(path / "flat.npy", "w+", np.uint16, (n_images, n_px * n_px))
        flat[:] = verified.tokens(np.arange(n_images)).reshape(n_images, -1)
        n = 4 * n_images // BATCH  # four epochs
        contenders = {
            "ours": (n, partial(read_ours, verified, n)),
            "ours, unverified": (n // 4, partial(read_ours, path, n // 4)),
            "np.memmap gather": (n, partial(read_memmap, flat, n)),
            "webdataset .npy": (n // 32, partial(read_webdataset, path, n // 32)),
        }
        seconds = medians({name: run for name, (_, run) in contenders.items()}, world.turns, turn_seconds=0)
        rate = {name: BATCH * batches / seconds[name] for name, (batches, _) in contenders.items()}
        what, memmap, webdataset = f"loader, {n_px * n_px} tokens", "np.memmap gather", "webdataset .npy"
        rows.append(BenchRow(what, "images/s", rate["ours"], rate[webdataset], webdataset, 20.0))
        rows.append(BenchRow(what, "images/s", rate["ours"], rate[memmap], memmap, 0.7))
        rows.append(BenchRow(what, "images/s", rate["ours, unverified"], rate[memmap], memmap, note="first read, with checksums"))
    return rows


def small_jpegs(world: World, n_images: int, n_px: int) -> Path:
    """A folder to make shards of: one class of n_images small JPEGs."""
    from PIL import Image

    folder = world.work / f"{n_images}_of_{n_px}"
    (folder / "images").mkdir(parents=True)
    some = [Image.fromarray(square(decode_image(data), n_px)) for data in world.files[:100]]
    for number in range(n_images):
        some[number % len(some)].save(folder / "images" / f"{number:05d}.jpg")
    return folder


def read_ours(data: ShardSet | Path, n_batches: int) -> None:
    """The training loader. On unverified shards, which a path opens, each image is checked when it is read."""
    shards = ShardSet(data, "train") if isinstance(data, Path) else data
    for batch in islice(Loader(shards, BatchLayout(BATCH, BATCH), with_labels=False).stream(0), n_batches):
        assert batch.tokens.shape == (BATCH, shards.n_px**2)


def read_memmap(flat: np.ndarray, n_batches: int) -> None:
    """Random rows of one array on disk: the lower bound."""
    random, batches = np.random.default_rng(0), len(flat) // BATCH
    for batch in range(n_batches):
        if batch % batches == 0:
            order = random.permutation(len(flat))
        start = batch % batches * BATCH
        torch.from_numpy(flat[order[start : start + BATCH]])


def read_webdataset(path: Path, n_batches: int) -> None:
    """webdataset with its own .npy decoder, in the order of the files, which is faster than a random order."""
    import webdataset

    files = sorted(str(file) for file in path.glob("train-*.tar"))
    images = webdataset.WebDataset(files, shardshuffle=False).decode().to_tuple("npy", "cls").batched(BATCH, collation_fn=list)
    for batch in islice(images, n_batches):
        torch.from_numpy(np.stack([grid for grid, _ in batch]))


def memory(world: World) -> list[BenchRow]:
    """The peak memory of make_shards for 50,000 images (10,000 when quick), beside that for 1,000."""
    peak, counts = {}, (1_000, 10_000 if world.quick else 50_000)
    for n_images in counts:
        folder = small_jpegs(world, n_images, 32)
        tool = str(Path(__file__).parents[1] / "make_shards.py")
        command = [sys.executable, "-c", PEAK, tool, "--source", f"imagefolder:{folder}", "--workers", "1", "--n_px", "32"]
        command += ["--palette", str(world.work / "palette.npy"), "--out", str(world.work / f"shards{n_images}")]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace").stdout
        peak[n_images] = int(printed.split()[-2]) / 1024
    few, many = counts
    peer, note = f"itself for {few:,} images", f"{many:,} images"
    return [BenchRow("memory of make_shards", "MiB", peak[many], peak[few], peer, 1.1, True, note)]


if __name__ == "__main__":
    cli.run(main)
