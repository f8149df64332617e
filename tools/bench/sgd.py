"""Measures the SGD probe beside a plain torch loop on all cores. Exit status: 1 if the bar is missed.

The unit is images per second; an image counts once for four rates. Our probe fits the rates together, the peer one after another.
The features are in a file, as if they were larger than memory. In a second row the peer has all features in memory. --toy runs
everything in seconds, without a bar.

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

with lazy.imports():
    import torch

    from igpt_ds.evaluate.probes.rows import Blocks
    from igpt_ds.evaluate.probes.sgd import MOMENTUM, Sgd, cosine


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
