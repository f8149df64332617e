"""What this processor does fastest, by short measurements. Called at the start of a run on rank 0 alone.

In: a model's shape. Out: the name of a float32 product, or of a precision. Nothing here draws from torch's generators.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ds.config import ModelConfig
from igpt_ds.errors import InputError
from igpt_ds.model.cpu_kernels import ONEDNN_PRODUCT, onednn_linear
from igpt_ds.model.transformer import Block, init_std
from igpt_ds.threads import threads_for

PRODUCTS: dict[str, Callable[..., Tensor]] = {"torch": F.linear, "onednn": onednn_linear}
PRODUCT_VARIABLE = "IGPT_DS_CPU_PRODUCT"  # of the environment
PRODUCT_MARGIN = 1.15  # oneDNN's product must be this much faster than torch's own, which is right for all shapes
PRECISION_MARGIN = 1.25  # a precision must be this much faster in a block to be advised: the rest of a step is alike in both
_REPEATS = 8
_ROWS = 512  # of the measured product: some 3 ms a pass
_TOKENS = 1024  # of the measured block, fewer for widths above 512: some 20 ms a pass for a width of 128


def product_of_new_run() -> str:
    """The float32 product "onednn" or "torch": the one that IGPT_DS_CPU_PRODUCT names, or the fastest.

    The two differ in their last bits. Runs that shall agree in every bit name one: a busy machine may measure wrongly.

    Raises:
        ValueError: the variable names an unknown product.
    """
    named = os.environ.get(PRODUCT_VARIABLE)
    if named and named not in PRODUCTS:
        raise InputError(
            f"{PRODUCT_VARIABLE} is {named!r}; known: {', '.join(PRODUCTS)}; unset, a new run measures the faster one"
        )
    return named or fastest_product()


@cache
def fastest_product() -> str:
    """The faster float32 product of this machine, "onednn" or "torch": its time in a forward and a backward pass."""
    if ONEDNN_PRODUCT is None:
        return "torch"
    x, weight = (torch.linspace(-1, 1, rows * 256).view(rows, 256).requires_grad_() for rows in (_ROWS, _ROWS))
    g = torch.ones(len(x), len(weight))

    def both_ways(product: Callable[..., Tensor]) -> None:
        torch.autograd.grad(product(x, weight), (x, weight), g)

    seconds = _shortest({name: partial(both_ways, product) for name, product in PRODUCTS.items()})
    return "onednn" if seconds["onednn"] * PRODUCT_MARGIN < seconds["torch"] else "torch"


def faster_precision(config: ModelConfig, precision: str, causal: bool, micro_batch: int) -> tuple[str, float] | None:
    """(the other one of "fp32" and "bf16", how many times as fast a block is in it), or None if it is not clearly faster."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        return None
    passes, tokens = {}, _TOKENS * 512 // max(512, config.n_embd)
    T = min(config.n_ctx, tokens)  # a part of long images
    with torch.random.fork_rng(devices=[]):
        for name, dtype in dtypes.items():
            block = Block(config, init_std(config), causal).to(dtype)
            h = torch.randn(min(micro_batch, tokens // T), T, config.n_embd).to(dtype)
            passes[name] = partial(_pass, block, h)
    try:
        seconds = _shortest(passes)
    except RuntimeError:  # this processor's torch has no attention in bf16
        return None
    (other,) = dtypes.keys() - {precision}
    ratio = seconds[precision] / seconds[other]
    return (other, ratio) if ratio >= PRECISION_MARGIN else None


def _pass(block: Block, h: Tensor) -> None:
    block(h).sum().backward()


def _shortest(passes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of one thread in each pass. They take turns, and the time of other programs does not count."""
    found = dict.fromkeys(passes, float("inf"))
    with threads_for(0):
        for turn in range(1 + _REPEATS):  # the first warms up
            for name, run in passes.items():
                start = time.thread_time()
                run()
                if turn:
                    found[name] = min(found[name], time.thread_time() - start)
    return found
