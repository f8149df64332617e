"""The search for a learning rate as in the paper (3.4). In: the results of earlier rates. Out: the next rate to try.

"We ... sequentially try the learning rates 0.01, 0.003, 0.001, 0.0003, ..., stopping once the final validation loss starts
increasing." A rate whose loss diverged (A.1) is worse than all others. Called by tools/sweep_lr.py; no training runs here.

Fine-tuning keeps the best step (4.5), so its best validation accuracy counts and the search stops once it falls. With --loss gen,
which trains no class head, the lowest validation loss counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines, read_sealed
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format
from igpt_ds.train.run_dir import read_recipe

SWEEP = Format("igpt_ds.sweep", "sweep of learning rates", "make it with tools/sweep_lr.py", version=2, sealed=2, oldest=1)
SWEEP_FILE = "sweep.json"
MAX_RATES = 12  # down to 3e-8: smaller rates do not help


@dataclass(frozen=True)
class Result:
    """How the run of one rate ended."""

    lr: float
    val_loss: float | None  # at the last step, in nats per token, in fine-tuning as minimised; None if the loss diverged
    lost_at: int | None  # the step at which the loss diverged
    val_accuracy: float | None = None  # fine-tuning with a class loss: the best, in 0..1
    lowest: bool = False  # fine-tuning without a class loss: val_loss is the lowest of all steps
    step: int | None = field(default=None, compare=False)  # of the best validation in fine-tuning, else the last

    @property
    def rank(self) -> float:
        """Lower is better; a run whose loss diverged is worse than all others."""
        if self.val_loss is None:
            return math.inf
        return self.val_loss if self.val_accuracy is None else 1 - self.val_accuracy

    @property
    def measured(self) -> str:
        """The measure behind `rank`."""
        if self.val_accuracy is not None:
            return "best validation accuracy"
        return "best validation loss" if self.lowest else "final validation loss"

    def __str__(self) -> str:
        """The result in words."""
        if self.val_loss is None:
            return f"lost at step {self.lost_at}"
        return f"{self.val_loss:.4f}" if self.val_accuracy is None else f"{100 * self.val_accuracy:.2f} %"


@dataclass(frozen=True)
class _Report:
    """What the search needs of a LOST.json."""

    step: int


@dataclass(frozen=True)
class _CurveRow:
    """What the search needs of a row of train.jsonl."""

    step: int
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass(frozen=True)
class _RateRow:
    """A rate in sweep.json."""

    lr: float
    val_loss: float | None
    lost_at: int | None
    val_accuracy: float | None = None
    step: int | None = None  # files of earlier versions do not have it


@dataclass(frozen=True)
class _SweepFile:
    """The content of sweep.json, as its reader checks it."""

    results: list[_RateRow]
    measured: str = ""
    finished: bool = True


def rate(number: int) -> float:
    """The rate tried as number `number`, 0-based: 0.01, 0.003, 0.001, 0.0003, ..."""
    return float(f"{1 if number % 2 == 0 else 3}e-{2 + (number + 1) // 2}")


def finished(results: Sequence[Result], most: int = MAX_RATES) -> bool:
    """Whether the search is over: the last rate has a higher loss or a lower accuracy than the one before, or no rate is left.

    Args:
        results: those of the rates so far, in the order of `rate`.
        most: largest number of rates to try.
    """
    rises = len(results) > 1 and results[-1].rank > results[-2].rank
    return rises or len(results) >= most


def next_rate(results: Sequence[Result], most: int = MAX_RATES) -> float | None:
    """The rate to try next, or None when the search is over."""
    return None if finished(results, most) else rate(len(results))


def best(results: Sequence[Result]) -> Result | None:
    """The result with the lowest loss or the highest accuracy, the first of equal ones; None if every loss diverged."""
    ended = [result for result in results if result.val_loss is not None]
    return min(ended, key=lambda result: result.rank, default=None)


def run_name(lr: float) -> str:
    """The name of a rate's run directory."""
    return f"lr-{lr:g}"


def read_result(run_dir: Path, lr: float) -> Result | None:
    """The result of a rate's run; None while the run has not ended.

    Raises:
        ValueError: the run ended without a validation loss, or a file is damaged.
    """
    lost, curve, fix = run_dir / "LOST.json", run_dir / "train.jsonl", "remove the directory and try the rate again"
    if lost.exists():
        return Result(lr, None, record_from(_Report, read_sealed(lost, "report", fix), f"report {lost}", fix).step)
    if not (run_dir / "FINISHED").exists():
        return None
    lines = enumerate(read_json_lines(curve), start=1)
    rows = [record_from(_CurveRow, values, f"{curve} line {number}", fix) for number, values in lines]
    losses = [(row.step, row.val_loss) for row in rows if row.val_loss is not None]
    if not losses:
        raise InputError(f"{curve} has no validation loss; {fix}")
    if _generates(run_dir):
        trained = [(loss, step) for step, loss in losses if step > 0]
        loss, step = min(trained or [(loss, step) for step, loss in losses])
        return Result(lr, loss, None, lowest=True, step=step)
    accuracies = [(row.val_accuracy, -row.step) for row in rows if row.step > 0 and row.val_accuracy is not None]
    if not accuracies:
        return Result(lr, losses[-1][1], None, step=losses[-1][0])
    accuracy, step = max(accuracies)  # of equal ones the first
    return Result(lr, losses[-1][1], None, accuracy, step=-step)


def _generates(run_dir: Path) -> bool:
    """Whether the run is a fine-tuning with gen_loss alone, whose class head learns nothing."""
    if not (run_dir / "run.json").exists():
        return False
    finetune = read_recipe(run_dir / "run.json").finetune
    return finetune is not None and finetune.loss == "gen"


def measured(results: Sequence[Result]) -> str:
    """The measure that compares the results, with its unit."""
    what = next((result.measured for result in results if result.val_loss is not None), "final validation loss")
    return what + {"final validation loss": ", nats per token", "best validation loss": ", nats"}.get(what, "")


def table(results: Sequence[Result]) -> str:
    """A Markdown table with a row for each rate, the best in bold."""
    chosen = best(results)
    lines = [f"| learning rate | {measured(results)} |", "|---|---|"]
    for result in results:
        text = str(result)
        lines.append(f"| **{result.lr:g}** | **{text}** |" if result is chosen else f"| {result.lr:g} | {text} |")
    return "\n".join(lines) + "\n"


def write_sweep(path: Path, results: Sequence[Result], most: int = MAX_RATES) -> None:
    """Writes the results as JSON."""
    chosen = best(results)
    rows = [
        {"lr": result.lr, "val_loss": result.val_loss, "lost_at": result.lost_at}
        | ({} if result.val_accuracy is None else {"val_accuracy": result.val_accuracy})
        | ({} if result.step is None else {"step": result.step})
        for result in results
    ]
    found = {"finished": finished(results, most), "best_lr": chosen.lr if chosen else None, "measured": measured(results)}
    SWEEP.write(path, found | {"results": rows})


def points(results: Sequence[Result]) -> tuple[list[tuple[float, float | None]], str]:
    """(rate, its result) of each rate, where lower is better and None means that the loss diverged; and what was measured."""
    values = [(result.lr, None if result.val_loss is None else result.rank) for result in results]
    return values, measured(results).replace("accuracy", "error")


def read_sweep(path: Path) -> tuple[list[tuple[float, float | None]], str]:
    """The `points` of a file that `write_sweep` wrote.

    Raises:
        ValueError: there is no such file, it has another format or version, or a field is missing or has another type.
    """
    return points(_read(path)[0])


def best_of_search(directory: Path) -> Result:
    """The best rate of a finished search; `Result.step` is that of its best validation.

    Raises:
        ValueError: as `read_sweep`, or the search is not finished, or every rate diverged.
    """
    path = directory / SWEEP_FILE
    results, ended = _read(path)
    chosen = best(results)
    if chosen is None or not ended:
        why = "every rate diverged" if ended else "the search is not finished; finish it with tools/sweep_lr.py"
        raise InputError(f"--search {directory}: {why}, or give --lr")
    return chosen


def _read(path: Path) -> tuple[list[Result], bool]:
    """The results of a file that `write_sweep` wrote, and whether the search was finished."""
    found = record_from(_SweepFile, SWEEP.read(path), f"sweep of learning rates {path}", SWEEP.fix)
    lowest = found.measured.startswith("best validation loss")
    rows = [Result(row.lr, row.val_loss, row.lost_at, row.val_accuracy, lowest, row.step) for row in found.results]
    return rows, found.finished


def add_search_flag(group: argparse._ArgumentGroup, more: str = "") -> None:
    """--search, which replaces --lr."""
    found = f"finished search of tools/sweep_lr.py whose best learning rate is taken{more}; replaces --lr"
    group.add_argument("--search", type=Path, metavar="DIR", help=found)


def take_search(args: argparse.Namespace) -> Result | None:
    """Gives args the learning rate of --search; None without one.

    Raises:
        ValueError: --lr is given as well, or the search is not finished.
    """
    if args.search is None:
        return None
    if args.lr is not None:
        raise InputError(f"--lr {args.lr:g} and --search {args.search} both give a learning rate; leave out one of them")
    result = best_of_search(args.search)
    args.lr = result.lr
    return result
