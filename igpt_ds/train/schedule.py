"""The learning rate as a function of the step: linear warm-up, then a cosine to 0; constant in fine-tuning (paper 3.4)."""

from __future__ import annotations

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
