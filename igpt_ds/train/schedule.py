"""The learning rate as a function of the step alone: linear warm-up, then a cosine to 0, or none in fine-tuning (paper 3.4)."""

from __future__ import annotations

import math

from igpt_ds.config import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step number `step` (0-based).

    Step 0 takes 1 / warmup_steps of the peak, step warmup_steps - 1 all of it; the cosine would reach 0 at step `steps`.
    Fine-tuning stays at the peak.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.finetune is not None:
        return recipe.lr
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * done))
