"""Measures the probes beside their peers on all cores. Exit status: 1 if a bar is missed.

The features are random with correlated columns, like those of a layer. --features takes the normed layers of real features.
scikit-learn fits one value of the grid after another, each with the loosest tolerance that reaches our objective to 1e-5. It is
timed on a few values and layers, and the note of each row gives their number; the time of the others is extrapolated. Extraction
beside HF ImageGPT is in tools/bench/model.py. --quick takes two minutes; --toy runs everything in seconds, without bars.

    python tools/bench/probe.py --quick --out bench_probe.json
    python tools/bench/probe.py --show docs/bench_probe.json
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.evaluate.features.files import FeatureSet, FeatureWriter, open_features
from igpt_ds.evaluate.features.manifest import FeatureManifest, FeatureSplit, Origin

with lazy.imports():
    import torch

    from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe, stratified_order
    from igpt_ds.evaluate.probes.logistic import fit_logistic


PACKAGES = ("torch", "scikit-learn", "numpy")
SKLEARN = "scikit-learn LogisticRegression, one value after another"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # 1e-2 is never sufficient
LAYERS = 25


@dataclass
class World:
    """The sizes and the features."""

    quick: bool
    toy: bool
    features: Path
    tolerances: dict[float, float] = field(default_factory=dict)  # of scikit-learn, for each measured value of the grid

    @property
    def grid(self) -> tuple[float, ...]:
        """The values of C."""
        return tuple(np.logspace(-5, 3, 5 if self.toy else 20))

    @property
    def timed(self) -> tuple[float, ...]:
        """The values that scikit-learn is timed on, spread over the grid."""
        return self.grid[4::10] if self.quick else self.grid[1::3]

    @property
    def kind(self) -> str:
        """The kind of features that is probed."""
        return "normed"

    def open(self, split: str) -> FeatureSet:
        """A split of the features."""
        return open_features(self.features, split)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen measurements, prints the table, writes the JSON."""
    measures: dict[str, Callable[[World], list[BenchRow]]] = {one.__name__: one for one in (grid, layers, memory)}
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "fewer turns, values and layers", measures)
    parser.add_argument(
        "--features", type=Path, help="feature directory to probe, with splits train and val (default: random features)"
    )
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory of the measured processes returns to the system at once
    with tempfile.TemporaryDirectory() as directory:
        features = args.features or draw_features(Path(directory) / "drawn", args.quick, args.toy)
        world = World(args.quick or args.toy, args.toy, features)
        rows = [row for name in args.only or measures for row in measures[name](world)]
    cores = torch.get_num_threads()
    harness.finish([replace(row, bar=None) for row in rows] if args.toy else rows, args.out, args.quick, PACKAGES, cores)


# --------------------------------------------------------------------------------------------------- features


def draw_features(path: Path, quick: bool, toy: bool) -> Path:
    """A feature directory of 45,000 x 512 x 10 classes: columns are mixed from directions whose variances follow a power law."""
    sizes, width = ({"train": 400, "val": 50}, 16) if toy else ({"train": 45_000, "val": 5_000}, 512)
    depth = 2 if toy else 1 if quick else 3
    manifest = FeatureManifest(
        dataset="drawn",
        origin=Origin("trained", palette_hash=""),
        layers=list(range(depth)),
        kinds=["normed"],
        n_features=width,
        splits={split: FeatureSplit(N, split, mask_draws=0) for split, N in sizes.items()},
        classes=[str(k) for k in range(10)],
    )
    writer, labels = FeatureWriter(path, manifest), {}
    for number, (split, N) in enumerate(sizes.items()):
        random = np.random.default_rng(number)
        labels[split] = random.permutation(np.arange(N) % 10)
        for layer in range(depth):
            fixed = np.random.default_rng([99, layer])  # the same for both splits
            mix = np.linalg.qr(fixed.normal(size=(width, width)))[0] * (np.arange(1, width + 1) ** -0.7)[:, None]
            centres = fixed.normal(size=(10, width)) * (fixed.random(width) < 0.15) * 0.3
            for start in range(0, N, 5000):
                some = labels[split][start : start + 5000]
                values = (random.normal(size=(len(some), width)) + centres[some]) @ mix
                writer.write(split, start, (layer, "normed", None), values.astype(np.float32))
        writer.save(split, N)
    writer.finish(labels)
    return path


def standardised_layer(features: FeatureSet, layer: int, kind: str) -> np.ndarray:
    """A whole layer in memory, float32 [N, C]."""
    x = np.array(features.layer(layer, kind), dtype=np.float32)
    x -= x.mean(0, dtype=np.float64)
    return x / x.std(0, dtype=np.float64).astype(np.float32)


class Peer:
    """scikit-learn's fit of standardised features for one value of C."""

    def __init__(self, C: float, tol: float) -> None:
        from sklearn.linear_model import LogisticRegression

        self.model = LogisticRegression(C=C, tol=tol, max_iter=10_000)

    def fit(self, x: np.ndarray, y: np.ndarray) -> Peer:
        """Fits without warnings on convergence, because the objective is compared."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.fit(x, y)
        return self

    def objective(self, x: np.ndarray, y: np.ndarray) -> float:
        """scikit-learn's objective of its solution, in float64."""
        from sklearn.metrics import log_loss

        nats = log_loss(y, self.model.predict_proba(x.astype(np.float64)), normalize=False)
        return float(self.model.C * nats + 0.5 * np.square(self.model.coef_.astype(np.float64)).sum())


# --------------------------------------------------------------------------------------------------- measurements


def grid(world: World) -> list[BenchRow]:
    """A whole grid on one layer, features standardised beforehand, at equal objective."""
    train = world.open("train")
    layer = train.layers[len(train.layers) // 2]
    x, y = standardised_layer(train, layer, world.kind), train.labels
    ours, found = shortest(lambda: fit_logistic(torch.from_numpy(x), y, world.grid), 1 if world.toy else 2)
    assert found.converged.all()
    seconds, worst = [], 0.0
    for C, target in zip(world.grid, found.objective, strict=True):
        if C in world.timed:
            world.tolerances[C], spent, above = loosest(x, y, C, float(target))
            seconds.append(spent)
            worst = max(worst, above)
    peer = sum(seconds) * len(world.grid) / len(seconds)
    N, width = x.shape
    what = f"grid of {len(world.grid)} values, {N:,} x {width} x {len(found.classes)}"
    note = f"scikit-learn timed on {len(seconds)} values; its objective at most {worst:.0e} above ours"
    return [BenchRow(what, "grids/min", 60 / ours, 60 / peer, SKLEARN, 5.0, note=note)]


def shortest(run: Callable[[], Any], turns: int) -> tuple[float, Any]:
    """The seconds of the fastest call, and its result. Other work on the machine only adds time."""
    best, found = float("inf"), None
    for _ in range(turns):
        start = time.perf_counter()
        found = run()
        best = min(best, time.perf_counter() - start)
    return best, found


def loosest(x: np.ndarray, y: np.ndarray, C: float, target: float) -> tuple[float, float, float]:
    """scikit-learn's loosest tolerance within 1e-5 of the objective, the seconds of that fit, and its relative gap."""
    for tol in TOLERANCES:
        start = time.perf_counter()
        peer = Peer(C, tol).fit(x, y)
        seconds = time.perf_counter() - start
        above = peer.objective(x, y) / target - 1
        if above <= 1e-5:
            break
    return tol, seconds, above


def layers(world: World) -> list[BenchRow]:
    """From feature files to accuracies: standardise, search, fit again, predict; the same steps by scikit-learn."""
    train, val = world.open("train"), world.open("val")
    some = train.layers[: 1 if world.quick else 3]
    start = time.perf_counter()
    accuracies = [linear_probe(train, val, layer, world.kind, ProbeSettings.of(world.grid)) for layer in some]
    ours = (time.perf_counter() - start) / len(some)
    peer, timed = peer_layer(world, train, val, some[0])
    what = f"probes of {LAYERS} layers, from files to accuracies"
    note = f"timed on {len(some)} layers, scikit-learn on 1 and {timed} values; accuracy {100 * accuracies[0].accuracy:.1f} %"
    return [BenchRow(what, "min", LAYERS * ours / 60, LAYERS * peer / 60, SKLEARN, 1 / 8, at_most=True, note=note)]


def peer_layer(world: World, train: FeatureSet, val: FeatureSet, layer: int) -> tuple[float, int]:
    """The extrapolated seconds of one layer by scikit-learn, and the number of timed values."""
    from sklearn.preprocessing import StandardScaler

    x, y = (np.asarray(one.layer(layer, world.kind), dtype=np.float32) for one in (train, val)), train.labels
    fitted, tested = x
    order = stratified_order(y, 0)
    held_out, rest = order[: len(y) // 10], np.sort(order[len(y) // 10 :])

    def once(C: float, ids: np.ndarray, seen: np.ndarray) -> float:
        start = time.perf_counter()
        scaler = StandardScaler().fit(fitted[ids])
        peer = Peer(C, world.tolerances.get(C, 1e-4)).fit(scaler.transform(fitted[ids]), y[ids])
        peer.model.predict(scaler.transform(seen))
        return time.perf_counter() - start

    search = [once(C, rest, fitted[held_out]) for C in world.timed]
    last = once(world.timed[len(world.timed) // 2], np.arange(len(y)), tested)
    return sum(search) * len(world.grid) / len(search) + last, len(search)


def memory(world: World) -> list[BenchRow]:
    """The peak memory of the probe of one layer, beside the size of its features in float32."""
    train = world.open("train")
    size = len(train.labels) * train.manifest.n_features * 4 / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        most = pool.apply(probe_memory, (world.features, world.kind, world.grid)) / 2**20
    return [BenchRow("memory of a probe", "MiB", most, size, "the features of one layer", 1.5, at_most=True)]


def probe_memory(features: Path, kind: str, values: Sequence[float]) -> float:
    """The peak bytes of a probe of a layer beyond the memory after a small probe."""
    train, val = open_features(features, "train"), open_features(features, "val")
    linear_probe(train, val, train.layers[0], kind, ProbeSettings.of(values[:3]), max_train=max(100, len(train.labels) // 50))
    return harness.peak_beyond(lambda: linear_probe(train, val, train.layers[0], kind, ProbeSettings.of(values)))


if __name__ == "__main__":
    cli.run(main)
