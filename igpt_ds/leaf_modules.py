"""ZeRO-3's leaf modules: blocks that DeepSpeed hooks, gathers and reduces as one. Called where a recipe meets a ds_config.

A block has nine modules. Hooks on each of them cost more time of the host than everything else that it does in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from igpt_ds.config import Recipe

BLOCK = "igpt_ds.model.transformer.Block"


def with_leaf_modules(recipe: Recipe, zero: Mapping[str, Any]) -> dict[str, Any]:
    """The section zero_optimization of a run: at stage 3 each block is a leaf, unless the ds_config has its own leaf_module.

    A classifier whose head reads n^layer below the top uses a norm of that block outside the block. DeepSpeed reduces the
    gradients of a leaf when its backward pass ends, and would lose the part from outside. So that block is no leaf.
    """
    if zero.get("stage") != 3 or "leaf_module" in zero:
        return dict(zero)
    blocks, finetune = recipe.model.n_layer, recipe.finetune
    if finetune is None or finetune.layer == blocks:
        return {**zero, "leaf_module": {"classes": [BLOCK]}}
    return {**zero, "leaf_module": {"classes": [], "names": [f"blocks.{l}" for l in range(blocks) if l != finetune.layer]}}  # noqa: E741
