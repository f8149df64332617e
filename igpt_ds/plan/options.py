"""Chooses among the ways to run a recipe on a number of GPUs. In: a `Request`. Out: estimates, the best first.

Called by command.py, recipes.py and paper/budget.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from igpt_ds.config import Recipe
from igpt_ds.ds_config import DsConfig, Run, join
from igpt_ds.errors import InputError
from igpt_ds.plan.costs import LIVE_PARAMETERS
from igpt_ds.plan.estimate import Estimate, Price, estimate
from igpt_ds.plan.shipped import shipped
from igpt_ds.plan.step_time import Cluster

# A plan with hpZ, or with ZeRO stage 1 or 2, must win by more than this share of the time: both have trained wrongly. Kept
# weights must win by more than this, because they fill the memory.
MARGINS = {"hpz": 0.10, "sharded less": 0.05, "kept weights": 0.02}


@dataclass(frozen=True)
class Request:
    """What to plan: a recipe on a number of GPUs. What is None is chosen by the plan."""

    recipe: Recipe
    gpus: int
    cluster: Cluster
    ds_configs: dict[str, DsConfig] = field(default_factory=shipped)  # candidates by file name
    micro_batch: int | None = None
    sequence_parallel: int | None = None
    price: Price = field(default_factory=Price)


def options(request: Request) -> list[Estimate]:
    """For each ds_config its fastest layout that fits, or if none fits the one that needs least memory; the best first.

    It tries every number of ranks per image that divides ranks and heads, and every micro batch that divides the batch.

    Raises:
        ValueError: no layout multiplies out to the batch; the message names the nearest numbers of GPUs with one.
    """
    recipe, gpus, node_gpus = request.recipe, request.gpus, request.cluster.node_gpus
    found = []
    for name, values in request.ds_configs.items():
        tried = [estimate(run, name, request.cluster, request.price) for run in _runs(request, values)]
        if tried:
            found.append(min(tried, key=_rank))
    if not found:
        nearest = [n for n in (*range(gpus, 0, -1), *range(gpus, 8 * gpus + 65)) if _splits(recipe, n, node_gpus)]
        below, above = (next((n for n in nearest if (n < gpus) == less), None) for less in (True, False))
        named = " or ".join(str(n) for n in (below, above) if n)
        raise InputError(f"a batch of {recipe.batch_images} images does not divide over {gpus} GPUs; numbers that do: {named}")
    return sorted(found, key=_rank)


def _rank(one: Estimate) -> tuple[bool, bool, float, float]:
    # The order of preference: fits; sums gradients in fp32; time, with the margins added; memory.
    risks = {"hpz": one.layout.hpz > 1, "sharded less": one.run.stage < 3, "kept weights": one.layout.live > LIVE_PARAMETERS}
    margin = sum(MARGINS[name] for name, taken in risks.items() if taken)
    fits = one.fits
    seconds = float(f"{one.step.seconds * (1 + margin):.3g}") if fits else 0.0
    return not fits, one.half_precision_sum, seconds, one.memory.total


def _splits(recipe: Recipe, gpus: int, node_gpus: int) -> list[int]:
    """Numbers of ranks per image, within a node, that divide ranks and heads and whose groups divide the batch."""
    config = recipe.model
    fewest = {p: config.n_ctx - (p - 1) * -(-config.n_ctx // p) for p in range(1, node_gpus + 1)}  # tokens of the last rank
    parts = (p for p, tokens in fewest.items() if tokens > 0 and not (gpus % p or config.n_head % p))
    return [p for p in parts if recipe.batch_images % (gpus // p) == 0]


def _runs(request: Request, values: DsConfig) -> list[Run]:
    recipe, gpus = request.recipe, request.gpus
    chosen = request.sequence_parallel
    runs = []
    for parts in [chosen] if chosen else _splits(recipe, gpus, request.cluster.node_gpus):
        share = recipe.batch_images // (gpus // parts) if gpus >= parts else 0
        for micro_batch in [request.micro_batch] if request.micro_batch else range(1, share + 1):
            if request.micro_batch or share % micro_batch == 0:
                runs.append(join(recipe, values, gpus, micro_batch, parts))
    return runs
