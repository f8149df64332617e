"""The search for a learning rate as in the paper (3.4): what is known of earlier rates enters, the next one to try leaves.

"We ... sequentially try the learning rates 0.01, 0.003, 0.001, 0.0003, ..., stopping once the final validation loss starts
increasing." A rate whose run was lost to a spike (A.1) is worse than any that ended. tools/sweep_lr.py calls; nothing runs here.

Of a fine-tuning the best validation accuracy counts, since that step is kept (4.5): the search stops once it falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.files import read_json, read_json_lines

MAX_RATES = 12  # down to 3e-8: by then it is not the rate


@dataclass(frozen=True)
class Result:
    """How the run of one rate ended."""

    lr: float
    val_loss: float | None  # nats per token at the last step, of a fine-tuning as minimised; None: lost to a spike
    lost_at: int | None  # the step at which it was
    val_accuracy: float | None = None  # of a fine-tuning: the best, in 0..1

    @property
    def rank(self) -> float:
        """The lower the better; a lost run is worse than all others."""
        if self.val_loss is None:
            return math.inf
        return self.val_loss if self.val_accuracy is None else 1 - self.val_accuracy

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
    trained = [float(row["val_accuracy"]) for row in rows if row.get("val_accuracy") is not None and row["step"] > 0]
    return Result(lr, float(rows[-1]["val_loss"]), None, max(trained, default=None))


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each rate, the best in bold."""
    chosen = best(results)
    classified = any(result.val_accuracy is not None for result in results)
    measured = "best validation accuracy" if classified else "final validation loss, nats per token"
    lines = [f"| learning rate | {measured} |", "|---|---|"]
    for result in results:
        text = str(result)
        lines.append(f"| **{result.lr:g}** | **{text}** |" if result is chosen else f"| {result.lr:g} | {text} |")
    return "\n".join(lines) + "\n"
