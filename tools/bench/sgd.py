"""Measures the SGD probe beside a plain torch loop on all cores. Exit status: 1 if the bar is missed.

The unit is images per second; an image counts once for four rates. Our probe fits the rates together, the peer one after another.
The features are in a file, as if they were larger than memory. In a second row the peer has all features in memory. The last
rows read five layers side by side (paper 4.4): bytes per second beside random rows of five memory maps, and beside one file of
all five, which is a copy that our probe does not need. --toy runs everything in seconds, without a bar.

    python tools/bench/sgd.py --out bench_sgd.json
    python tools/bench/sgd.py --show docs/bench_sgd.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path

import harness
import numpy as np
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.evaluate.features.files import FeatureSet, FeatureWriter, open_features
from igpt_ds.evaluate.features.manifest import FeatureManifest, FeatureSplit, Origin

with lazy.imports():
    import torch

    from igpt_ds.evaluate.probes.rows import Blocks, FiniteRows
    from igpt_ds.evaluate.probes.sgd import MOMENTUM, Sgd, cosine
    from igpt_ds.evaluate.probes.variants import CONCATENATED


PACKAGES = ("torch", "numpy")
RATES, BATCH = (30.0, 10.0, 3.0, 1.0), 128
SIZES = ((45_000, 512, 10), (45_000, 512, 100), (45_000, 512, 1000))  # images, features, classes

Batches = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every size, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "only the first size, with fewer turns and steps")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    turns, steps = (1, 5) if args.toy else (1, 40) if args.quick else (3, 200)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "features.npy"
        sizes = ((400, 16, 10),) if args.toy else SIZES[:1] if args.quick else SIZES
        rows = [row for size in sizes for row in measure(file, *size, turns, steps)]
        rows += measure_layers(Path(directory), *((400, 16) if args.toy else (20_000, 512)), turns)
    rows = [replace(row, bar=None) for row in rows] if args.toy else rows
    harness.finish(rows, args.out, args.quick or args.toy, PACKAGES, torch.get_num_threads())


def measure(file: Path, N: int, width: int, K: int, turns: int, steps: int) -> list[BenchRow]:
    """Two rows of one size with random features in the file."""
    random = np.random.default_rng(0)
    np.save(file, random.standard_normal((N, width), dtype=np.float32) * np.float32(0.1))
    x, y = np.load(file, mmap_mode="r"), torch.from_numpy(random.integers(0, K, N))
    in_memory = torch.from_numpy(np.array(x))
    whole = N // BATCH  # one epoch, because our probe reads and shuffles whole windows
    contenders = {
        "ours": lambda: sgd_together(x, y, K, whole),
        "a DataLoader over the memory map, torch.optim.SGD": lambda: sgd_apart(map_batches(x, y), width, K, steps),
        "batches indexed in memory, torch.optim.SGD": lambda: sgd_apart(memory_batches(in_memory, y), width, K, steps),
    }
    ours, *peers = harness.medians(contenders, turns).values()
    what = f"SGD probe, {len(RATES)} rates, {N:,} x {width} x {K}"
    bars = (3.0 if K == 10 else None, None)
    rows = zip(list(contenders)[1:], peers, bars, strict=True)
    return [BenchRow(what, "images/s", whole * BATCH / ours, steps * BATCH / peer, name, bar) for name, peer, bar in rows]


def measure_layers(directory: Path, N: int, width: int, turns: int) -> list[BenchRow]:
    """Two rows: reading five layers side by side, in half precision, once through all images."""
    random = np.random.default_rng(0)
    sides = [random.standard_normal((N, width), dtype=np.float32).astype(np.float16) for _ in range(CONCATENATED)]
    apart, together = (write_features(directory / name, some) for name, some in (("apart", sides), ("all", [np.hstack(sides)])))
    maps = [np.load(apart.path / "train" / f"layer_{layer:02d}_normed.npy", mmap_mode="r") for layer in apart.layers]

    def blocks(features: FeatureSet) -> None:
        for _ in Blocks(FiniteRows(features, features.layers, "normed"), None, 0, 1 << 26).batches(0, N // BATCH, BATCH, "cpu"):
            pass

    def random_rows() -> None:
        for ids in np.array_split(random.permutation(N), N // BATCH):
            torch.from_numpy(np.concatenate([one[ids] for one in maps], axis=1, dtype=np.float32))

    contenders = {
        "ours": lambda: blocks(apart),
        "random rows of five memory maps": random_rows,
        "our reader, one file of all layers": lambda: blocks(together),
    }
    ours, *peers = harness.medians(contenders, turns).values()
    megabytes = 2e-6 * N * width * CONCATENATED
    what = f"reading {CONCATENATED} layers side by side, {N:,} x {width} in fp16"
    return [
        BenchRow(what, "MB/s", megabytes / ours, megabytes / peer, name)
        for name, peer in zip(list(contenders)[1:], peers, strict=True)
    ]


def write_features(path: Path, layers: Sequence[np.ndarray]) -> FeatureSet:
    """A feature directory with these layers of one split."""
    N, width = layers[0].shape
    origin, splits = Origin("trained", palette_hash="", dtype="fp16"), {"train": FeatureSplit(N, "train", mask_draws=0)}
    manifest = FeatureManifest(
        dataset="drawn",
        origin=origin,
        layers=list(range(len(layers))),
        kinds=["normed"],
        n_features=width,
        splits=splits,
        classes=["one", "other"],
    )
    writer = FeatureWriter(path, manifest)
    for layer, values in enumerate(layers):
        writer.write("train", 0, (layer, "normed", None), values)
    writer.save("train", N)
    writer.finish({"train": np.arange(N) % 2})
    return open_features(path, "train")


def sgd_together(x: np.ndarray, y: torch.Tensor, K: int, steps: int) -> None:
    """Our fit of all rates."""
    probe = Sgd(x.shape[1], K, RATES, "cpu")
    for step, (batch, ids) in enumerate(Blocks(x, None, 0, 1 << 30).batches(0, steps, BATCH, "cpu")):
        probe.step(batch, y[ids], cosine(step, steps))


def sgd_apart(batches: Batches, width: int, K: int, steps: int) -> None:
    """A plain torch loop for each rate."""
    for rate in RATES:
        model = torch.nn.Linear(width, K)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch, labels in islice(batches(), steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()
            schedule.step()


def map_batches(x: np.ndarray, y: torch.Tensor) -> Batches:
    """Endless shuffled batches by torch's DataLoader, which reads rows from the memory map."""

    class Rows(torch.utils.data.Dataset[tuple[np.ndarray, torch.Tensor]]):
        """One row and its label."""

        def __len__(self) -> int:
            return len(y)

        def __getitem__(self, index: int) -> tuple[np.ndarray, torch.Tensor]:
            return np.array(x[index]), y[index]

    loader = torch.utils.data.DataLoader(Rows(), BATCH, shuffle=True)
    return lambda: chain.from_iterable(repeat(loader))


def memory_batches(x: torch.Tensor, y: torch.Tensor) -> Batches:
    """Endless shuffled batches, gathered by index from a tensor in memory."""

    def forever() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for ids in torch.randperm(len(x)).split(BATCH):
                yield x[ids], y[ids]

    return forever


if __name__ == "__main__":
    cli.run(main)
