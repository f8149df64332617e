"""The spike guard. In: the loss of each step. Out: a verdict. Called by train/loop.py on every rank.

The loss of a calm run stays near its running mean. A loss that stays far above the mean is what the paper calls an irrecoverable
spike (A.1: too high a learning rate). The recipe defines far: `spike_sigmas` standard deviations of the last `spike_window` calm
losses, for `spike_patience` steps in a row. A single bad batch is ignored. DeepSpeed skips the update of a step whose loss or
gradient is not finite, on all ranks. A few skipped steps are harmless; after MAX_SKIPS in a row the run is lost.
"""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import dataclass

from igpt_ds.config import Recipe
from igpt_ds.errors import InputError

MAX_SKIPS = 10  # in a row
MAX_SKIPS_FP16 = 40  # the loss scale begins at 2^16 and is halved by skipping
LEAST_DEVIATION = 0.01  # of the mean: the loss of a run that memorized its images hardly varies
WORSE_THAN_CHANCE = 0.5  # nats above the loss of chance: an outlier whatever the window is
LEAST_WINDOW = 16  # calm losses that mean and deviation need

LOWER = "start again with a lower --lr in another --run_dir (paper A.1: too high a rate gives an irrecoverable spike)"


def advice(rollbacks: int, most: int, good: bool) -> str:
    """What the user can do about a lost run that is not rolled back.

    Args:
        rollbacks: their number so far.
        most: the allowed number; 0: rollbacks are off.
        good: whether there is a checkpoint from before the spike. Without one --resume auto would be lost again.
    """
    if not good:
        return f"{LOWER}, with a --save_every that leaves a checkpoint before that step"
    if not most:
        return f"{LOWER}, or continue with --resume auto --on_spike rollback"
    if rollbacks >= most:
        return f"{LOWER}, or continue with --resume auto and more --max_rollbacks than {most}"
    return LOWER


def chance_loss(recipe: Recipe) -> float:
    """The loss of a model that gives all colours (and in fine-tuning all classes) the same probability, as `recipe` counts it."""
    gen, finetune = math.log(recipe.model.n_vocab), recipe.finetune
    if finetune is None:
        return gen
    if finetune.gen_scale == "sum":
        gen *= recipe.model.n_ctx * (recipe.mask_prob if recipe.objective == "bert" else 1.0)
    return (finetune.loss != "clf") * gen + (finetune.loss != "gen") * math.log(finetune.n_classes)


@dataclass(frozen=True, kw_only=True)
class SpikeState:
    """What a guard knows, as a checkpoint's manifest stores it. The fields are those of `Guard`."""

    losses: tuple[float, ...] = ()  # the last calm ones, in nats per token
    spiked: int = 0  # outliers in a row
    skips_in_a_row: int = 0
    skipped: int = 0  # steps skipped since step 0
    since: int | None = None  # the first step in doubt

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.losses)):
            raise InputError("losses that are not finite")


class Verdict(enum.Enum):
    """The guard's judgement of a step."""

    CALM = "calm"
    DOUBTFUL = "doubtful"  # not saved, because its checkpoint would replace a good one
    LOST = "lost"


class Guard:
    """Judges the losses of one run. The same losses give the same verdicts, on every rank and after any interruption.

    Args:
        recipe: spike_window, spike_sigmas (0: watch for skipped steps only), spike_patience.
        state: what `state` returned when the checkpoint was saved; None for a new run.

    Attributes:
        skipped: steps skipped since step 0.
        since: the first step in doubt, or None if the run is calm.
        why: why the run is lost, as text.
    """

    def __init__(self, recipe: Recipe, precision: str, state: SpikeState | None = None) -> None:
        self.recipe, self.chance_loss = recipe, chance_loss(recipe)
        self.max_skips = MAX_SKIPS_FP16 if precision == "fp16" else MAX_SKIPS
        self.restore(state or SpikeState())

    def restore(self, state: SpikeState) -> None:
        """Returns to an earlier state; `SpikeState()` is that of a new run."""
        self.window = list(state.losses)
        self.spiked, self.skips_in_a_row, self.skipped = state.spiked, state.skips_in_a_row, state.skipped
        self.since, self.why = state.since, ""

    def state(self) -> SpikeState:
        """Everything it knows."""
        return SpikeState(
            losses=tuple(self.window),
            spiked=self.spiked,
            skips_in_a_row=self.skips_in_a_row,
            skipped=self.skipped,
            since=self.since,
        )

    def limit(self) -> float:
        """The loss above which a step is an outlier, in nats per token; infinite if spike_sigmas is 0."""
        if not self.recipe.spike_sigmas:
            return math.inf
        above_chance = self.chance_loss + WORSE_THAN_CHANCE
        if len(self.window) < min(LEAST_WINDOW, self.recipe.spike_window):
            return above_chance
        mean = statistics.fmean(self.window)
        deviation = max(statistics.pstdev(self.window, mean), LEAST_DEVIATION * mean)
        return min(above_chance, mean + self.recipe.spike_sigmas * deviation)

    def see(self, step: int, loss: float, skipped: bool) -> Verdict:
        """Judges a step.

        Args:
            step: its number, 1 for the first.
            loss: its mean over all ranks, in nats per token, finite or not.
            skipped: whether DeepSpeed skipped its update.
        """
        if skipped or not math.isfinite(loss):
            self.skipped += skipped
            self.skips_in_a_row += 1
            return self._doubt(step, self.skips_in_a_row >= self.max_skips, f"{self.skips_in_a_row} steps in a row were skipped")
        self.skips_in_a_row = 0
        limit = self.limit()
        if loss > limit:
            self.spiked += 1
            lost = self.spiked >= self.recipe.spike_patience
            return self._doubt(step, lost, f"it was above {limit:.4f} for {self.spiked} steps in a row")
        self.spiked, self.since = 0, None
        self.window = [*self.window, loss][-self.recipe.spike_window :]
        return Verdict.CALM

    def _doubt(self, step: int, lost: bool, why: str) -> Verdict:
        self.since = step if self.since is None else self.since
        self.why = why if lost else ""
        return Verdict.LOST if lost else Verdict.DOUBTFUL
