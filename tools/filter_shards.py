"""Writes new shards with the candidate images that are most similar to a reference set, by the features of our own model.

    python tools/filter_shards.py --model models/s --reference shards/in32 --candidates shards/web --keep 0.1 --out shards/web_in

The paper trains its largest model on web images "filtered to be similar to ImageNet" and does not say how. Here a logistic
classifier on mean-pooled features of one layer separates reference images from candidates. The candidates with the highest log
odds are kept; no image is scored by a classifier that was fitted on it. OUT_report beside OUT has report.json, scores.npy
(float32, one per candidate), histogram.png and sheet.png (kept images above dropped images, each from high to low score).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.arrays import new_array
from igpt_ds.command_line import lazy
from igpt_ds.console import duration
from igpt_ds.data.grids import Texts, cell_scale, save_grid
from igpt_ds.data.shards.build import copy_images
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import PRECISIONS, Origin
from igpt_ds.evaluate.report.figures import score_histogram
from igpt_ds.files import move_dir, reserved, scratch_dir
from igpt_ds.json_files import write_json
from igpt_ds.plain_files import beside

with lazy.imports():
    from igpt_ds.api.found import model_dir
    from igpt_ds.evaluate.domain import Domain, FeatureReader, fit_domain, keep_best, n_to_keep
    from igpt_ds.evaluate.features.network import check_layers, open_model, pick_device


COLUMNS, ROWS = 8, 4  # of the sheet: rows of kept and of dropped images
DRAWN = 10_000  # kept and dropped images each; the sheet shows some of them, evenly spread by score


@dataclass(frozen=True)
class FilteredSet:
    """Images that the filter read."""

    name: str
    split: str
    n_images: int
    dataset_hash: str

    @staticmethod
    def of(shards: ShardSet) -> FilteredSet:
        """Those of a split."""
        return FilteredSet(shards.name, shards.split, shards.n_images, shards.dataset_hash)


@dataclass(frozen=True)
class FitReport:
    """What report.json, and "derived" in the index of the new shards, say of the classifiers."""

    reference: FilteredSet
    candidates: FilteredSet
    model_hash: str | None
    step: int | None
    layer: int
    precision: str
    n_fit: int  # images of each set
    C: float
    auc: float
    accuracy: float
    converged: bool
    seed: int


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, scores every candidate, writes report and shards."""
    args = parse(argv)
    lazy.load()
    args.model_dir = model_dir(args.model)
    reference, candidates = ShardSet(args.reference, args.reference_split), ShardSet(args.candidates, args.candidates_split)
    check(reference, candidates)
    written = candidates if args.write_from is None else same_images(candidates, args.write_from, args.candidates_split)
    n = n_to_keep(candidates.n_images, args.keep)
    with reserved(args.out, args.report), scratch_dir(args.report) as report:
        model, origin = open_model(args.model_dir, reference)
        deepest = model.config.n_layer
        layer = deepest // 2 if args.layer is None else check_layers([args.layer], deepest)[0]
        read = FeatureReader(model, layer, args.batch, pick_device(args.device), args.precision)
        domain = fit_domain(read, reference, candidates, fit_images=args.fit_images, seed=args.seed)
        say_how_well(domain, layer, deepest)
        start = time.perf_counter()
        scores = score_all(report / "scores.npy", read, domain, candidates)
        seconds = time.perf_counter() - start
        kept, threshold = keep_best(scores, n)
        title = f"{candidates.name}: {n} of {candidates.n_images} kept, like {reference.name}"
        groups = {"candidates": scores, "reference": domain.reference_scores}
        score_histogram(groups, threshold, report / "histogram.png", title)
        sheet(report / "sheet.png", candidates, scores, kept, args.seed)
        fitted = asdict(fit_report(reference, candidates, origin, domain, read))
        note = {"tool": "tools/filter_shards.py", **fitted, "keep": args.keep, "n_kept": n, "threshold": threshold}
        write_json(report / "report.json", note)
        move_dir(report, args.report)  # before the shards, which are there only if everything is
        copy_images(args.out, written, kept, note=note)
    print(f"{candidates.n_images} candidates scored in {duration(seconds)}, {candidates.n_images / seconds:.1f} images/s")
    print(f"{args.out}: {n} images ({n / candidates.n_images:.2%}), score {threshold:.3f} and above")
    print(f"{args.report}: report.json, scores.npy, histogram.png, sheet.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir, run dir or checkpoint")
    parser.add_argument(
        "--reference", type=Path, required=True, help="shard directory of images that the candidates should resemble"
    )
    parser.add_argument("--candidates", type=Path, required=True, help="shard directory to choose from")
    parser.add_argument("--reference_split", default="train", help="split of --reference")
    parser.add_argument("--candidates_split", default="train", help="split of --candidates")
    parser.add_argument("--keep", type=float, required=True, help="share of the candidates to keep, above 0 and at most 1")
    parser.add_argument("--out", type=Path, required=True, help="shard directory to write")
    sizes = "shards of the candidates at another size, from which the kept images are written (default: --candidates)"
    parser.add_argument("--write_from", type=Path, metavar="DIR", help=sizes)
    parser.add_argument("--report", type=Path, help="directory for report, scores and pictures (default: OUT_report)")
    parser.add_argument("--layer", type=int, help="layer whose features are used (default: the middle layer)")
    parser.add_argument("--fit_images", type=int, default=10_000, help="images of each set that the classifier is fitted on")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the fitted images, the folds and the sheet")
    parser.add_argument("--batch", type=int, default=32, help="images per forward pass")
    cli.add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the matrix products")
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise InputError(f"--batch {args.batch} must be at least 1")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} must be at least 0")
    args.report = args.report or beside(args.out, "_report")
    return args


def check(reference: ShardSet, candidates: ShardSet) -> None:
    """Refuses bad input before hours of scoring."""
    if reference.dataset_hash == candidates.dataset_hash:
        raise InputError(f"{reference.path} and {candidates.path} hold the same images; name two different sets")
    if (reference.n_px, reference.palette_hash) != (candidates.n_px, candidates.palette_hash):
        sides = " and ".join(f"{s.path} ({s.n_px}x{s.n_px}, palette {s.palette_hash[:8]})" for s in (reference, candidates))
        raise InputError(f"{sides} do not fit one model; make both with the n_px and palette.npy of --model")


def same_images(candidates: ShardSet, path: Path, split: str) -> ShardSet:
    """The candidates at another size: shards of the same source, whose keys are compared at a thousand places.

    Raises:
        ValueError: the shards hold other images, or another order of them.
    """
    other = ShardSet(path, split)
    places = np.unique(np.linspace(0, candidates.n_images - 1, 1000).astype(np.int64))
    keys = candidates.keys_of(places) if other.n_images == candidates.n_images else None
    if keys is None or keys != other.keys_of(places):
        fix = "make both from the same --source with the same flags but --n_px"
        raise InputError(f"--write_from {path} does not hold the images of {candidates.path} in their order; {fix}")
    return other


def say_how_well(domain: Domain, layer: int, deepest: int) -> None:
    """Prints one line on the classifiers before the scoring."""
    fitted = f"{domain.n_fit} images of each set, layer {layer} of 0..{deepest}, C {domain.C:g}"
    print(f"{fitted}: AUC {domain.auc:.4f}, accuracy {100 * domain.accuracy:.2f} % on images that were not fitted", flush=True)
    if not domain.converged:
        print("warning: a fit has not converged; its scores still order the candidates", file=sys.stderr)


def score_all(path: Path, read: FeatureReader, domain: Domain, candidates: ShardSet) -> np.ndarray:
    """Writes one score per candidate as .npy, float32 [N]; returns the memory map."""
    scores = new_array(path, np.dtype("<f4"), (candidates.n_images,))
    with tqdm(total=candidates.n_images, unit=" images", desc="scores", leave=False, disable=None) as bar:
        for start in range(0, candidates.n_images, 1 << 16):
            for ids, features in read(candidates, np.arange(start, min(start + (1 << 16), candidates.n_images))):
                scores[ids] = domain.score(ids, features)
                bar.update(len(ids))
    scores.flush()
    return scores


def fit_report(reference: ShardSet, candidates: ShardSet, origin: Origin, domain: Domain, read: FeatureReader) -> FitReport:
    """What the classifiers are of, and how well they tell the two sets."""
    return FitReport(
        reference=FilteredSet.of(reference),
        candidates=FilteredSet.of(candidates),
        model_hash=origin.model_hash,
        step=origin.step,
        layer=read.layer,
        precision=read.precision,
        n_fit=domain.n_fit,
        C=domain.C,
        auc=domain.auc,
        accuracy=domain.accuracy,
        converged=domain.converged,
        seed=domain.seed,
    )


def sheet(path: Path, candidates: ShardSet, scores: np.ndarray, kept: np.ndarray, seed: int) -> None:
    """Draws kept images above dropped images."""
    random = np.random.default_rng(seed)
    is_kept = np.zeros(len(scores), dtype=bool)
    is_kept[kept] = True
    shown, words = [], []
    for group, word in ((kept, "kept"), (np.flatnonzero(~is_kept), "dropped")):
        if len(group):
            drawn = random.choice(group, min(DRAWN, len(group)), replace=False)
            ranked = drawn[np.lexsort((drawn, -scores[drawn]))]
            n = min(COLUMNS * ROWS, len(ranked))
            n = n // COLUMNS * COLUMNS or n  # whole rows, so that the dropped images begin a new row
            shown.append(ranked[np.arange(n) * len(ranked) // n])
            words += [word] * n
    ids = np.concatenate(shown)
    captions = [f"{scores[number]:+.2f} {word}" for number, word in zip(ids, words, strict=True)]
    save_grid(path, candidates.palette.decode(candidates.tokens(ids)), COLUMNS, cell_scale(candidates.n_px), Texts(captions))


if __name__ == "__main__":
    cli.run(main)
