"""Draws figures of probe results, training runs and plans.

    python tools/figures.py --out layers.png layers --results results.jsonl
    python tools/figures.py --out figure2.png datasets --results cifar10.jsonl cifar100.jsonl stl10.jsonl
    python tools/figures.py --out figure3.png loss --results s.jsonl m.jsonl
    python tools/figures.py --out figure4.png objectives --results ar.jsonl bert.jsonl
    python tools/figures.py --out confusion.png confusion --results results.jsonl --features features/s
    python tools/figures.py --out confusion.png confusion --counts confusion.json
    python tools/figures.py --out neighbours.png neighbours --results results.jsonl --features features/s --data shards/cifar32
    python tools/figures.py --out training.png training runs/a runs/b
    python tools/figures.py --out rates.png rates runs/sweep_ar/sweep.json runs/sweep_bert/sweep.json
    python tools/figures.py --out plan.png plan h100.json h200.json

`layers` draws every series of one data set. `datasets`, `loss` and `objectives` draw the paper's Figures 2, 3 and 4; `loss` needs
models with a probe and a likelihood (tools/evaluate.py --results). `confusion` and `neighbours` show the best probe of the model
of --features; `confusion` also draws the counts of tools/evaluate_classifier.py. `training` draws the losses of runs against
images seen. `rates` draws the results of tools/sweep_lr.py. `plan` draws the output of `python -m igpt_ds.plan --table --json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.grids import Texts, cell_scale, save_grid
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.report import figures_paper
from igpt_ds.evaluate.report.figures import layer_curve, plan_curve, rate_curve, training_curve
from igpt_ds.evaluate.report.results import best_row, by_layer, experiment, read_all
from igpt_ds.evaluate.report.row_types import ProbeRow
from igpt_ds.evaluate.report.run_files import PlanRow, ReportedRun, read_curve, read_plan
from igpt_ds.files import check_writable
from igpt_ds.train.run_dir import read_run
from igpt_ds.train.sweep import read_sweep

with lazy.imports():
    from igpt_ds.evaluate.classification import read_confusion
    from igpt_ds.evaluate.neighbours import nearest_images, probe_confusion
    from igpt_ds.evaluate.probes.linear import ProbeSettings


# What each figure reads: in words, the flags that it needs, and the flags that it allows besides --title and --out.
READS: dict[str, tuple[str, set[str], set[str]]] = {
    "layers": ("--results FILE and no run directories", {"results"}, {"dataset"}),
    "datasets": ("--results FILES and nothing else", {"results"}, set()),
    "loss": ("--results FILES, and --dataset where the probes are of several", {"results"}, {"dataset"}),
    "objectives": ("--results FILES and nothing else", {"results"}, set()),
    "confusion": ("--results FILES and --features DIR, or --counts FILE", {"results", "features"}, {"dataset", "kind"}),
    "neighbours": (
        "--results FILES, --features DIR and --data DIR",
        {"results", "features", "data"},
        {"dataset", "kind", "queries", "neighbours"},
    ),
    "training": ("run directories, and neither --results nor --dataset", {"runs"}, {"log"}),
    "rates": ("the sweep.json of tools/sweep_lr.py, of one or several, and no --results", {"runs"}, set()),
    "plan": ("files of `python -m igpt_ds.plan --table --json`, and neither --results nor --dataset", {"runs"}, set()),
}
FLAGS = ("runs", "results", "dataset", "features", "counts", "data", "kind", "queries", "neighbours", "log")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the chosen figure."""
    args = parse(argv)
    lazy.load()
    draw = {
        "layers": layers,
        "datasets": datasets,
        "loss": loss,
        "objectives": objectives,
        "confusion": confused,
        "neighbours": neighbours,
        "training": training,
        "rates": rates,
        "plan": planned,
    }
    check_writable(args.out)
    draw[args.figure](args)
    print(args.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("figure", choices=tuple(READS), help="the figure to draw, see above")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        help="training: run directories; rates: files of tools/sweep_lr.py; plan: files of igpt_ds.plan",
    )
    parser.add_argument("--results", type=Path, nargs="+", help="results.jsonl files to draw")
    parser.add_argument("--dataset", help="data set to draw, by its name in the results; required if they have several")
    parser.add_argument("--features", type=Path, help="confusion, neighbours: feature directory of the model")
    parser.add_argument("--counts", type=Path, help="confusion: file of tools/evaluate_classifier.py --confusion")
    parser.add_argument("--data", type=Path, help="neighbours: shard directory that the features were extracted from")
    parser.add_argument("--kind", help="confusion, neighbours: kind of features (default: that of the best probe)")
    parser.add_argument("--queries", type=int, help="neighbours: number of images whose neighbours are shown (default: 8)")
    parser.add_argument("--neighbours", type=int, help="neighbours: training images per query (default: 8)")
    parser.add_argument("--log", action="store_true", help="training: draw both axes logarithmically")
    parser.add_argument("--title", help="title of the figure (default: made from the data)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args(argv)
    words, needed, allowed = READS[args.figure]
    given = {name for name in FLAGS if getattr(args, name)}
    if args.figure == "confusion" and args.counts:
        needed, allowed = {"counts"}, set()
    if args.log and args.figure != "training":
        raise InputError(f"--log is only for the figure training; omit it for {args.figure}")
    if args.title and args.figure == "neighbours":
        raise InputError("the figure neighbours has captions and no --title; omit it")
    if needed - given or given - needed - allowed:
        raise InputError(f"{args.figure} reads {words}")
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out} must end in .png")
    return args


def layers(args: argparse.Namespace) -> None:
    """Accuracy by layer."""
    rows = experiment(read_all(args.results), args.dataset)
    row = rows[0]
    title = f"Linear probes on {row.dataset}: {row.n_train} training images, {row.n_eval} evaluated"
    layer_curve(rows, args.out, args.title or title)


def datasets(args: argparse.Namespace) -> None:
    """Figure 2."""
    figures_paper.dataset_curves(read_all(args.results), args.out, args.title or "Linear probe accuracy by layer")


def loss(args: argparse.Namespace) -> None:
    """Figure 3."""
    title = args.title or "Linear probe accuracy against generative loss; numbers are steps of training"
    figures_paper.loss_curves(read_all(args.results), args.out, title, args.dataset)


def objectives(args: argparse.Namespace) -> None:
    """Figure 4."""
    figures_paper.objective_bars(read_all(args.results), args.out, args.title or "Auto-regressive against BERT pre-training")


def best_probe(args: argparse.Namespace) -> ProbeRow:
    """The best probe, by the held-out images, of the features' model."""
    rows = by_layer(read_all(args.results), ["every_layer"])
    model_hash = open_features(args.features, rows[0].train_split if rows else "train").manifest.origin.model_hash
    rows = [row for row in rows if row.model_hash == model_hash and args.kind in (None, row.features)]
    if not rows:
        kind = f" of kind {args.kind}" if args.kind else ""
        raise InputError(f"the results hold no probe{kind} of the model of {args.features}; run tools/linear_probe.py on it")
    return best_row(experiment(rows, args.dataset))


def confused(args: argparse.Namespace) -> None:
    """A confusion matrix, of the best probe or of a fine-tuned model."""
    if args.counts:
        counted = read_confusion(args.counts)
        counts = np.array(counted.counts)
        name = args.title or f"{args.counts.stem}, {counted.split}"
        title = f"{name}: {100 * np.trace(counts) / counts.sum():.1f} % right"
        figures_paper.confusion_matrix(counts, counted.classes, args.out, title)
        return
    row = best_probe(args)
    train, evaluated = (open_features(args.features, split) for split in (row.train_split, row.eval_split))
    assert row.C is not None, "rows of every_layer have one"
    settings = ProbeSettings((row.C,), tol=row.tol, seed=row.seed, precision=row.precision)
    counts = probe_confusion(train, evaluated, row, settings)
    percent = 100 * np.trace(counts) / counts.sum()
    title = f"{row.dataset} {row.eval_split}, layer {row.layer} {row.features}: {percent:.1f} % right"
    figures_paper.confusion_matrix(counts, train.classes, args.out, args.title or title)


def neighbours(args: argparse.Namespace) -> None:
    """Each query and the training images nearest to it, drawn in the palette's colours, with their classes."""
    row = best_probe(args)
    sides = [(open_features(args.features, split), ShardSet(args.data, split)) for split in (row.train_split, row.eval_split)]
    for features, shards in sides:
        if features.dataset_hash != shards.dataset_hash:
            raise InputError(
                f"{args.features} does not hold features of the images in {args.data}; give the shards that it was extracted from"
            )
    (train, train_shards), (evaluated, shards) = sides
    Q = min(args.queries or 8, shards.n_images)
    queries = np.arange(Q) * shards.n_images // Q
    found = nearest_images(train, evaluated, queries, row.layer, row.features, args.neighbours or 8)
    pictures, captions = [], []
    for query, ids in zip(queries, found, strict=True):
        grids = np.concatenate([shards.tokens(np.array([query])), train_shards.tokens(ids)])
        pictures.append(shards.palette.decode(grids))
        captions += [f"{evaluated.classes[evaluated.labels[query]]}", *(train.classes[label] for label in train.labels[ids])]
    labels = [f"image {query}, then its neighbours" for query in queries]
    texts = Texts(captions, labels)
    save_grid(args.out, np.concatenate(pictures), found.shape[1] + 1, cell_scale(shards.n_px), texts)


def training(args: argparse.Namespace) -> None:
    """Loss by images seen."""
    vocabularies = {
        run_dir: ReportedRun.of(read_run(run_dir), run_dir / "run.json").recipe.model.n_vocab for run_dir in args.runs
    }
    if len(set(vocabularies.values())) > 1:
        sizes = ", ".join(f"{run_dir} {n_vocab}" for run_dir, n_vocab in vocabularies.items())
        raise InputError(f"losses over palettes of different sizes do not compare ({sizes}); draw one figure for each")
    names = [run_dir.resolve().name for run_dir in args.runs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in args.runs]
    runs = {name: read_curve(run_dir) for name, run_dir in zip(names, args.runs, strict=True)}
    title = args.title or f"Pre-training: {', '.join(names) if len(names) <= 3 else f'{len(names)} runs'}"
    training_curve(runs, vocabularies[args.runs[0]], args.out, title, args.log)


def rates(args: argparse.Namespace) -> None:
    """The results of each learning rate."""
    sweeps = {path: read_sweep(path) for path in args.runs}
    measured = sorted({words for _, words in sweeps.values()})
    if len(measured) > 1:
        raise InputError(f"sweeps of {' and '.join(measured)} do not share an axis; draw one figure for each")
    names = [path.resolve().parent.name if path.stem == "sweep" else path.stem for path in sweeps]
    if len(set(names)) < len(names):
        names = [str(path) for path in sweeps]
    named = {name: values for name, (values, _) in zip(names, sweeps.values(), strict=True)}
    rate_curve(named, measured[0], args.out, args.title or f"Learning rates: {', '.join(named)}")


def planned(args: argparse.Namespace) -> None:
    """Days by GPUs."""
    tables = {}
    for path in args.runs:
        rows = read_plan(path)
        known = next((row for row in rows if row.recipe), PlanRow(0, recipe=path.stem))
        tables[f"{known.recipe}, {known.gpu or ''}"] = rows
    plan_curve(tables, args.out, args.title or "Planned training: days, and MFU at each point")


if __name__ == "__main__":
    cli.run(main)
