"""Writes one HTML page about one run: pictures, tables and configuration in one file that needs no network.

    python tools/report.py --run_dir runs/s --out runs/s/report.html
    python tools/report.py --run_dir runs/s --results runs/s/results.jsonl --paper 1 4 5 --out report.html

Without --results the page shows RUN_DIR/results.jsonl. Without --pictures it shows the PNG files of RUN_DIR, except its curves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.figures import layer_curve, training_curve
from igpt_ds.evaluate.report.page import Picture, page
from igpt_ds.evaluate.report.results import by_layer, read_all
from igpt_ds.evaluate.report.row_types import Row
from igpt_ds.evaluate.report.run_files import CurveRow, ReportedRun, read_curve
from igpt_ds.evaluate.report.tables import TITLES
from igpt_ds.files import atomic_file, check_writable
from igpt_ds.markdown import as_table
from igpt_ds.ops.status_text import goodput_line, goodput_rows
from igpt_ds.plain_files import is_inside
from igpt_ds.train.ledger.goodput import read_goodput
from igpt_ds.train.run_dir import read_run

DRAWN = ("layers.png", "training.png")  # figures of these names are drawn again here


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the run, draws its curves, writes the page."""
    args = parse(argv)
    check_writable(args.out)
    run, training = ReportedRun.of(read_run(args.run_dir), args.run_dir / "run.json"), read_curve(args.run_dir)
    own = args.run_dir / "results.jsonl"
    results = read_all(args.results or ([own] if own.exists() else []))
    pictures = args.pictures
    if pictures is None:
        pictures = [path for path in sorted(args.run_dir.glob("*.png")) if path.name not in DRAWN]
        for path in [path for path in pictures if not is_inside(path, args.run_dir)]:
            print(f"left out: {path} is no file of {args.run_dir}; name it with --pictures to show it", file=sys.stderr)
            pictures.remove(path)
    name = args.title or args.run_dir.resolve().name
    with tempfile.TemporaryDirectory() as scratch:
        layers, losses = curves(Path(scratch), name, run.recipe.model.n_vocab, training, results)
        samples = [Picture.of(path) for path in pictures if "sample" in path.stem]
        others = [Picture.of(path) for path in pictures if "sample" not in path.stem]
        text = page(name, run, training, results, [*layers, *samples, *losses, *others], args.paper or (), goodput(args.run_dir))
    with atomic_file(args.out, "w") as file:
        file.write(text)
    drawn = len(layers) + len(losses)
    print(f"{args.out}: {drawn} curves, {len(results)} results, {len(pictures)} pictures, {len(text) / 2**20:.1f} MiB")


def goodput(run_dir: Path) -> str:
    """Where the wall clock of the run went, as Markdown; "" if nothing tells it."""
    try:
        found = read_goodput(run_dir)
    except InputError:
        return ""
    return f"{as_table(('category', 'seconds', '%'), goodput_rows(found))}\n\n- {goodput_line(found)}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.add_argument("--results", type=Path, nargs="+", help="results.jsonl files (default: RUN_DIR/results.jsonl)")
    parser.add_argument("--pictures", type=Path, nargs="*", help="PNG files to show (default: those in RUN_DIR)")
    parser.add_argument(
        "--paper",
        type=int,
        nargs="+",
        choices=sorted(TITLES),
        help="numbers of the paper's tables to show with our rows (default: none)",
    )
    parser.add_argument("--title", help="title of the page (default: the name of the run)")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {args.out} must end in .html or .htm")
    for picture in args.pictures or []:
        if not picture.is_file():
            raise InputError(f"--pictures {picture} does not exist; name an existing PNG file")
    return args


def curves(
    scratch: Path, name: str, n_vocab: int, training: list[CurveRow], results: list[Row]
) -> tuple[list[Picture], list[Picture]]:
    """Draws each figure that has rows: accuracies by layer, and losses."""
    layers, losses = list[Picture](), list[Picture]()
    probes = by_layer(results)
    for dataset in sorted({row.dataset for row in probes}):
        path = scratch / f"layers-{len(layers)}.png"
        layer_curve([row for row in probes if row.dataset == dataset], path, f"Linear probes on {dataset}")
        caption = f"Accuracy of a linear probe of each layer on {dataset}. A star marks the layer that held-out images choose"
        layers.append(Picture(path, caption, curve=True))
    if any(row.loss is not None or row.val_loss is not None for row in training):
        training_curve({name: training}, n_vocab, scratch / "training.png", f"Loss of {name}")
        caption = "Training and validation loss in nats per token against images seen; the dotted line is a uniform guess"
        losses.append(Picture(scratch / "training.png", caption, curve=True))
    return layers, losses


if __name__ == "__main__":
    cli.run(main)
