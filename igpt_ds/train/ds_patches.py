"""Replaces functions of DeepSpeed by those of `ds_faster`. Called by train/engine.py before it builds a model.

Each patch checks the version of DeepSpeed and the source of what it replaces. Where they differ the patch steps aside:
DeepSpeed's own function stays, and the log says so.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from igpt_ds import dist
from igpt_ds.train import ds_faster

VERSION = "0.19.8"  # of DeepSpeed, whose functions were read
_applied = False  # in this process


@dataclass(frozen=True)
class Patch:
    """One replacement."""

    name: str
    sources: tuple[Any, ...]  # DeepSpeed's functions and classes that it replaces or relies on
    digest: str  # of their sources
    put: Callable[[], None]  # replaces them


def apply() -> None:
    """Applies every patch, once in a process. Rank 0 prints one line, and one more for each patch that steps aside."""
    global _applied
    if not _applied:
        import deepspeed

        _applied = True
        for line in put_in_place(deepspeed.__version__):
            dist.say(line)


def put_in_place(version: str) -> list[str]:
    """Applies the patches that fit this version of DeepSpeed; returns the lines for the log."""
    import deepspeed.utils.nvtx as nvtx

    if version.partition("+")[0] != VERSION:  # a build of one's own has a "+" and the commit; the sources decide
        return [f"DeepSpeed {version} keeps its own, slower functions: the faster ones are for {VERSION}"]
    try:
        known = patches()
    except (ImportError, AttributeError) as error:
        return [f"DeepSpeed {version} keeps its own, slower functions: it is not the known {VERSION} ({error})"]
    nvtx.enable_nvtx = False  # marks for a profiler, at every call of 50 functions
    done, aside = [], []
    for patch in known:
        if digest(patch.sources) == patch.digest:
            patch.put()
            done.append(patch.name)
        else:
            aside.append(f"DeepSpeed keeps its own, slower function for {patch.name}: its source is not that of {VERSION}")
    return [f"DeepSpeed {version} has faster functions with the same results for: {', '.join(done)}", *aside] if done else aside


def digest(sources: Iterable[Any]) -> str:
    """A hash of the sources of functions and classes; "" if one has no source, as one in C or one that was removed."""
    try:
        text = "".join(inspect.getsource(_undecorated(source)) for source in sources)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _undecorated(source: Any) -> Any:
    # torch's decorators leave __wrapped__; DeepSpeed's `instrument_w_nvtx` keeps the function in its closure alone.
    while inner := getattr(source, "__wrapped__", None) or _closure(source).get("func"):
        source = inner
    return source


def _closure(source: Any) -> dict[str, Any]:
    cells = getattr(source, "__closure__", None)
    return dict(zip(source.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if cells else {}


def patches() -> list[Patch]:
    """Every patch."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import linear, partition_parameters, partitioned_param_coordinator, stage3

    product = linear.LinearFunctionForZeroStage3
    init, handle = partition_parameters.Init, partition_parameters.AllGatherCoalescedHandle
    coordinator, trace = partitioned_param_coordinator, partitioned_param_coordinator.PartitionedParameterCoordinator
    decide = trace._PartitionedParameterCoordinator__params_to_release

    def reductions() -> None:
        coalesced_collectives.reduce_scatter_coalesced = stage3.reduce_scatter_coalesced = ds_faster.reduce_scatter_coalesced

    def weights() -> None:
        init._convert_to_deepspeed_param = partial_method(ds_faster.convert_weight, init._convert_to_deepspeed_param)

    def products() -> None:
        partition_parameters.zero3_linear_wrap = ds_faster.product(product)

    def lists() -> None:
        coordinator.iter_params = ds_faster.weights_of

    def decisions() -> None:
        forget = _closure(decide)["func"].cache_clear
        trace._clear_trace_structures = partial_method(ds_faster.forget_decisions, trace._clear_trace_structures, forget)

    gathering = (init._convert_to_deepspeed_param, handle.wait, init._all_gather, init._allgather_params_coalesced)
    releasing = (init._partition, init._partition_param, partition_parameters.free_param)
    return [
        Patch("reduce-scatter", (coalesced_collectives.reduce_scatter_coalesced,), "d05c7b944514f710", reductions),
        Patch("gathering and release", gathering + releasing, "f91ed8727df4f38f", weights),
        Patch("matrix product", (product.forward, product.setup_context, linear.zero3_linear_wrap), "75b0eade431255a0", products),
        Patch("lists of weights", (coordinator.iter_params, coordinator.get_all_parameters), "0fb9a82130dc0a33", lists),
        Patch("release decisions", (trace._clear_trace_structures, decide), "5d6ef97c5197838c", decisions),
    ]


def partial_method(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """A method that calls function(*first, self, ...)."""

    def method(self: Any, *more: Any, **named: Any) -> Any:
        return function(*first, self, *more, **named)

    return method
