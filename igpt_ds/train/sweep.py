"""The search for a learning rate as in the paper (3.4): what is known of earlier rates enters, the next one to try leaves.

"We ... sequentially try the learning rates 0.01, 0.003, 0.001, 0.0003, ..., stopping once the final validation loss starts
increasing." A rate whose run was lost to a spike (A.1) is worse than any that ended. tools/sweep_lr.py calls; nothing runs here.

Of a fine-tuning the best validation accuracy counts, since that step is kept (4.5): the search stops once it falls. With --loss
gen, which trains no class head, the lowest validation loss counts, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.files import read_json, read_json_lines, write_json
from igpt_ds.train.run_dir import read_recipe

FORMAT, VERSION = "igpt_ds.sweep", 1
MAX_RATES = 12  # down to 3e-8: by then it is not the rate


@dataclass(frozen=True)
class Result:
    """How the run of one rate ended."""

    lr: float
    val_loss: float | None  # nats per token at the last step, of a fine-tuning as minimised, in nats; None: lost to a spike
    lost_at: int | None  # the step at which it was
    val_accuracy: float | None = None  # of a fine-tuning with a class loss: the best, in 0..1
    lowest: bool = False  # val_loss is the lowest of all steps: of a fine-tuning without a class loss

    @property
    def rank(self) -> float:
        """The lower the better; a lost run is worse than all others."""
        if self.val_loss is None:
            return math.inf
        return self.val_loss if self.val_accuracy is None else 1 - self.val_accuracy

    @property
    def measured(self) -> str:
        """What `rank` goes by."""
        if self.val_accuracy is not None:
            return "best validation accuracy"
        return "best validation loss" if self.lowest else "final validation loss"

    def __str__(self) -> str:
        """What it came to, in words."""
        if self.val_loss is None:
            return f"lost at step {self.lost_at}"
        return f"{self.val_loss:.4f}" if self.val_accuracy is None else f"{100 * self.val_accuracy:.2f} %"


def rate(number: int) -> float:
    """The rate tried as number `number`, 0-based: 0.01, 0.003, 0.001, 0.0003, ..."""
    return float(f"{1 if number % 2 == 0 else 3}e-{2 + (number + 1) // 2}")


def finished(results: Sequence[Result]) -> bool:
    """Whether the search is over: from the last rate but one to the last the loss rose, or the accuracy fell; or no rate is left.

    Args:
        results: of the rates so far, in the order of `rate`.
    """
    rises = len(results) > 1 and results[-1].rank > results[-2].rank
    return rises or len(results) >= MAX_RATES


def next_rate(results: Sequence[Result]) -> float | None:
    """The rate to try next, or None when the search is over."""
    return None if finished(results) else rate(len(results))


def best(results: Sequence[Result]) -> Result | None:
    """The result with the lowest loss or the highest accuracy, the first of equals; None where every run was lost."""
    ended = [result for result in results if result.val_loss is not None]
    return min(ended, key=lambda result: result.rank, default=None)


def run_name(lr: float) -> str:
    """The name of a rate's run directory."""
    return f"lr-{lr:g}"


def read_result(run_dir: Path, lr: float) -> Result | None:
    """What the run of a rate left behind; None while it has not ended.

    Raises:
        ValueError: it ended without a validation loss.
    """
    lost = run_dir / "LOST.json"
    if lost.exists():
        return Result(lr, None, int(read_json(lost, "report")["step"]))
    if not (run_dir / "FINISHED").exists():
        return None
    rows = [row for row in read_json_lines(run_dir / "train.jsonl") if row.get("val_loss") is not None]
    if not rows:
        raise ValueError(f"{run_dir / 'train.jsonl'} has no validation loss; remove the directory and try the rate again")
    trained = [row for row in rows if row["step"] > 0]
    if _generates(run_dir):
        return Result(lr, min(float(row["val_loss"]) for row in trained or rows), None, lowest=True)
    accuracies = [float(row["val_accuracy"]) for row in trained if row.get("val_accuracy") is not None]
    return Result(lr, float(rows[-1]["val_loss"]), None, max(accuracies, default=None))


def _generates(run_dir: Path) -> bool:
    """Whether it is a fine-tuning by gen_loss alone, whose accuracies are those of a class head that learns nothing."""
    if not (run_dir / "run.json").exists():
        return False
    finetune = read_recipe(run_dir / "run.json").finetune
    return finetune is not None and finetune.loss == "gen"


def measured(results: Sequence[Result]) -> str:
    """What the results are compared by, with its unit."""
    what = next((result.measured for result in results if result.val_loss is not None), "final validation loss")
    return what + {"final validation loss": ", nats per token", "best validation loss": ", nats"}.get(what, "")


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each rate, the best in bold."""
    chosen = best(results)
    lines = [f"| learning rate | {measured(results)} |", "|---|---|"]
    for result in results:
        text = str(result)
        lines.append(f"| **{result.lr:g}** | **{text}** |" if result is chosen else f"| {result.lr:g} | {text} |")
    return "\n".join(lines) + "\n"


def write_sweep(path: Path, results: Sequence[Result]) -> None:
    """Writes what is known of the rates, for programs."""
    chosen = best(results)
    rows = [
        {"lr": result.lr, "val_loss": result.val_loss, "lost_at": result.lost_at}
        | ({} if result.val_accuracy is None else {"val_accuracy": result.val_accuracy})
        for result in results
    ]
    header = {"format": FORMAT, "version": VERSION, "finished": finished(results), "best_lr": chosen.lr if chosen else None}
    write_json(path, header | {"measured": measured(results), "results": rows})


def points(results: Sequence[Result]) -> tuple[list[tuple[float, float | None]], str]:
    """(rate, what it led to) of each rate, the lower the better and None where it was lost to a spike; and what was measured."""
    values = [(result.lr, None if result.val_loss is None else result.rank) for result in results]
    return values, measured(results).replace("accuracy", "error")


def read_sweep(path: Path) -> tuple[list[tuple[float, float | None]], str]:
    """The `points` of what `write_sweep` wrote.

    Raises:
        ValueError: no such file, or another format or version.
    """
    content = read_json(path, "sweep of learning rates")
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is not {FORMAT} version {VERSION}; make it with tools/sweep_lr.py")
    lowest = content.get("measured", "").startswith("best validation loss")
    rows = content["results"]
    return points([Result(row["lr"], row["val_loss"], row["lost_at"], row.get("val_accuracy"), lowest) for row in rows])
