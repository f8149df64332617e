"""Measures the data wing against its peers, side by side on one core: medians of interleaved repetitions.

Exits with status 1 when a bar is missed. --quick takes one to two minutes, most of it scikit-learn's k-means; --images is any
folder of JPEGs, photographs of 200 px or more.

    python tools/bench_data.py --images ILSVRC2012/train --quick --out bench_data.json
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.data.images import DEFAULT_FILTER, decode_image, square
from igpt_ds.data.kmeans import kmeans
from igpt_ds.data.palette import ColorCounts, Palette, fit_palette, prepare_table, save_palette
from igpt_ds.data.palette_table import build_table, nearest
from igpt_ds.files import write_json
from igpt_ds.provenance import git_commit

_N_COLORS = 512  # the paper's (3.2)
_PACKAGES = ("numpy", "torch", "pillow", "simplejpeg", "scikit-learn", "scipy", "faiss-cpu", "webdataset")


@dataclass(frozen=True)
class Row:
    """One comparison. Where more is better `bar` is the least ratio ours / peer; `at_most` turns it round."""

    what: str
    unit: str
    ours: float
    peer_name: str
    peer: float
    ratio: float
    bar: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bar is met; a row without a bar informs only."""
        return self.bar is None or (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar)


@dataclass(frozen=True)
class World:
    """What all measurements share: JPEG files, the palette fitted to them, how long to measure."""

    files: list[bytes]
    palette: Palette
    quick: bool

    @property
    def repetitions(self) -> int:
        """How often each contender runs."""
        return 5 if self.quick else 15


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen measurements, prints the table, writes the JSON, exits 1 when a bar is missed."""
    measures: dict[str, Callable[[World], list[Row]]] = {"quantise": quantise, "palette": palette_fit, "jpeg": jpeg}
    parser = cli.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs, searched through all its folders")
    parser.add_argument("--max_images", type=int, default=1000, help="read at most this many of them, in order of their paths")
    parser.add_argument("--only", choices=list(measures), nargs="+", default=list(measures), help="these measurements alone")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=Path, help="also write the rows and the machine's facts as this JSON")
    args = parser.parse_args(argv)

    from threadpoolctl import threadpool_limits
    from torch import set_num_threads

    set_num_threads(1)
    with threadpool_limits(limits=1), tempfile.TemporaryDirectory() as directory:
        world = _world(args.images, args.max_images, args.quick, Path(directory))
        rows = [row for name in args.only for row in measures[name](world)]
    _print(rows)
    if args.out:
        write_json(args.out, {"facts": _facts(args.quick), "rows": [asdict(row) | {"holds": row.holds} for row in rows]})
    if not all(row.holds for row in rows):
        sys.exit(1)


def _world(directory: Path, max_images: int, quick: bool, work: Path) -> World:
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:max_images]
    if not paths:
        raise ValueError(f"images={directory} holds no .jpg or .jpeg file; name a folder of JPEGs")
    files = [path.read_bytes() for path in paths]
    pixels = np.concatenate([square(decode_image(data), 64).reshape(-1, 3) for data in files[:100]])
    palette, report = fit_palette(pixels, _N_COLORS)
    save_palette(work / "palette.npy", palette, report)
    return World(files, prepare_table(work / "palette.npy"), quick)


def _medians(contenders: dict[str, Callable[[], Any]], repetitions: int, warm: bool = True) -> dict[str, float]:
    """Seconds of each contender: they take turns, so that whatever else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(repetitions + 1), leave=False, disable=None):
        for name, run in contenders.items():
            if warm:
                run()  # untimed: the one before has filled the caches with its own
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first turn warms up


# --------------------------------------------------------------------------------------------------- measurements


def quantise(world: World) -> list[Row]:
    """Tokens of 32x32 images, in one batch as HF's processor takes them, and one at a time; the same 512 colours for all."""
    files = world.files[: 16 if world.quick else 64]
    batch = np.stack([square(decode_image(data), 32) for data in files])
    colors = world.palette.colors.astype(np.float64)

    def hf(a: np.ndarray) -> np.ndarray:
        """The formula of Hugging Face's ImageGPTImageProcessor, on pixels that are normalised already."""
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
        rate = {name: len(batch) / value for name, value in _medians(contenders, world.repetitions).items()}
        ours = rate.pop("ours")
        for name, value in rate.items():
            bar = 200.0 if (name, how) == ("HF formula", "in a batch") else None
            rows.append(Row("quantise 32x32", "images/s", ours, name, value, ours / value, bar, note=how))
    start = time.perf_counter()
    build_table(world.palette.colors)
    seconds_built = time.perf_counter() - start
    rows.append(Row("table of 256^3", "s", seconds_built, "", 1.0, seconds_built, 1.0, at_most=True, note="bar: a second"))
    return rows


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
    if index := _faiss_index(palette.colors):
        contenders["faiss IndexFlatL2"] = lambda: [index.search(a.astype(np.float32), 1) for a in points]
    return contenders


def _faiss_index(colors: np.ndarray) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its build tools
            import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(3)
    index.add(colors)
    return index


def palette_fit(world: World) -> list[Row]:
    """512 colours of 1,000,000 pixels: k-means from the same first centres, and how good it is."""
    from sklearn.cluster import KMeans, kmeans_plusplus

    random = np.random.default_rng(0)
    pixels = np.concatenate([square(decode_image(data), 96).reshape(-1, 3) for data in world.files])
    pixels = pixels[random.permutation(len(pixels))[:1_000_000]]
    points = pixels / 127.5 - 1
    init, _ = kmeans_plusplus(points[:50_000], _N_COLORS, random_state=0)  # scikit-learn's own, on a part
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        counts = ColorCounts()
        counts.add(pixels)
        colors, weights = counts.weighted()
        found["ours"] = kmeans(colors / 127.5 - 1, weights.astype(np.float64), _N_COLORS, init=init)

    def sklearn() -> None:
        model = KMeans(_N_COLORS, init=init, n_init=1, algorithm="lloyd")
        found["sklearn"] = model.fit(points).cluster_centers_

    mine = _medians({"ours": ours}, 1 if world.quick else 3, warm=False)["ours"]
    start = time.perf_counter()  # once: it takes minutes, and the bar is far from its noise
    sklearn()
    theirs = time.perf_counter() - start
    inertia = {name: _inertia(points, pixels, centres) for name, centres in found.items()}
    ratio = inertia["ours"] / inertia["sklearn"]
    size = f"{len(pixels):,} pixels, k = {_N_COLORS}"
    return [
        Row(
            "palette fit",
            "pixels/s",
            len(pixels) / mine,
            "sklearn KMeans lloyd",
            len(pixels) / theirs,
            theirs / mine,
            10.0,
            note=size,
        ),
        Row("palette inertia", "", inertia["ours"], "sklearn KMeans lloyd", inertia["sklearn"], ratio, 1.005, at_most=True),
    ]


def _inertia(points: np.ndarray, pixels: np.ndarray, centres: np.ndarray) -> float:
    palette = Palette(centres.clip(-1, 1).astype(np.float32))
    tokens = np.concatenate([palette.encode(part) for part in np.array_split(pixels, 10)])
    return float(((points - palette.colors[tokens]) ** 2).sum())


def jpeg(world: World) -> list[Row]:
    """JPEG bytes to 64x64 tokens: ours against PIL's decode and resize with the same filter, crop and quantiser."""
    import io

    from PIL import Image

    files = world.files[: 32 if world.quick else 160]

    def by_pil(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
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
    seconds = _medians(contenders, world.repetitions)
    mine, theirs = (len(files) / seconds[name] for name in ("ours", "PIL"))
    note = f"{DEFAULT_FILTER}; at most {max(differences)} grey level(s) apart"
    return [Row("JPEG to 64x64 tokens", "images/s/core", mine, "PIL", theirs, mine / theirs, 1.5, note=note)]


# --------------------------------------------------------------------------------------------------- report


def _print(rows: list[Row]) -> None:
    print(f"{'what':22} {'ours':>12} {'peer':>12} {'unit':14} {'ratio':>9} {'bar':>10}  peer; note")
    for row in rows:
        bar = "" if row.bar is None else f"{'<=' if row.at_most else '>='} {row.bar:g}{'' if row.holds else ' MISSED'}"
        remark = "; ".join(part for part in (row.peer_name, row.note) if part)
        print(f"{row.what:22} {row.ours:12.4g} {row.peer:12.4g} {row.unit:14} {row.ratio:9.4g} {bar:>10}  {remark}")


def _facts(quick: bool) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": git_commit(),
        "quick": quick,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    cli.run(main)
