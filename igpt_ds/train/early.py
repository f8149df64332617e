"""Early stopping (paper 3.4, 4.5). In: each validation. Out: whether to continue, and which step was the best.

"We ... early stop once we reach the maximum validation accuracy": the run ends after `patience` validations in a row that were
not better than the best. Each checkpoint stores its state, so an interruption changes nothing. Called by train/loop.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from igpt_ds.errors import InputError


@dataclass(frozen=True)
class EarlyState:
    """What early stopping knows, as a checkpoint's manifest stores it."""

    best_step: int | None = None  # completed steps at the best validation
    best: dict[str, float] = field(default_factory=dict)  # what it measured
    worse: int = 0  # validations since then


class EarlyStop:
    """Watches the validations of one run.

    Args:
        measure: what is watched: "val_accuracy", the higher the better, or "val_loss", the lower the better.
        patience: number of validations without a new best that ends the run; 0: the run never ends early.
        state: what `state` returned when the checkpoint was saved; None for a new run.
        keep_best: False takes the last step as the best one, because training uses the validation images.

    Attributes:
        best_step: completed steps at the best validation, the first of equals; None before the first one.
        best: what was measured there.
    """

    def __init__(self, measure: str, patience: int, state: EarlyState | None = None, keep_best: bool = True) -> None:
        assert measure in ("val_accuracy", "val_loss")
        self.measure, self.patience, self.keep_best = measure, patience, keep_best
        self.restore(state or EarlyState())

    def restore(self, state: EarlyState) -> None:
        """Returns to an earlier state; `EarlyState()` is that of a new run.

        Raises:
            ValueError: the state has a best step, and not what is watched there.
        """
        if state.best_step is not None and self.measure not in state.best:
            raise InputError(
                f"the checkpoint's best validation, of step {state.best_step}, has no {self.measure}; move the checkpoint away"
            )
        self.best_step, self.best, self.worse = state.best_step, dict(state.best), state.worse

    def state(self) -> EarlyState:
        """The present state."""
        return EarlyState(self.best_step, dict(self.best), self.worse)

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return 0 < self.patience <= self.worse

    def see(self, step: int, measured: Mapping[str, float]) -> None:
        """Records a validation after `step` completed steps. Step 0, before any training, does not count."""
        if step == 0 or step == self.best_step:
            return
        sign = 1 if self.measure == "val_accuracy" else -1
        better = self.best_step is None or sign * measured[self.measure] > sign * self.best[self.measure]
        if better or not self.keep_best:
            self.best_step, self.best, self.worse = step, dict(measured), 0
        else:
            self.worse += 1
