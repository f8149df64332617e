"""The learning rate as a function of the step: linear warm-up, then a cosine to 0; constant in fine-tuning (paper 3.4)."""

from __future__ import annotations

import argparse
import math

from igpt_ds.config import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimizer step number `step` (0-based).

    Step 0 has 1 / warmup_steps of the peak, step warmup_steps - 1 the peak. The cosine would reach 0 at step `steps`.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.finetune is not None:
        return recipe.lr
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def shorter_warmup(warmup_steps: int, steps: int, planned: int) -> int:
    """A warm-up that was planned for a run of `planned` steps. In a run that is shorter than it, its share of the steps."""
    return warmup_steps if warmup_steps <= steps else max(1, round(warmup_steps * steps / planned))


def warmup_note(args: argparse.Namespace, planned: int, recipe: Recipe) -> str:
    """One line about a warm-up that `shorter_warmup` shortened; "" if it did not.

    Args:
        planned: the steps of the warm-up if no flag says anything.
    """
    if planned <= recipe.steps or any(getattr(args, name, None) is not None for name in ("warmup_steps", "warmup_epochs")):
        return ""
    return f"--steps {recipe.steps} is below the warm-up of {planned} steps, which is now {recipe.warmup_steps}, in proportion"
