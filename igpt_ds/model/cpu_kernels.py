"""float32 on a CPU: the matrix product that this machine's processor runs fastest, and an RMS norm with its own derivative.

In and out: tensors. Called by `model/transformer.py`, `model/fused.py` and `model/sampling.py`. The two products round
differently, so one run uses one of them: training records its name in run.json, and a resumed run passes it to `use`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

PRODUCTS = ("onednn", "torch")

# oneDNN's product x [..., n_in] @ weight [n_out, n_in].T for any strides; None where torch lacks it, since the name is private.
ONEDNN_PRODUCT = (
    getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if torch.backends.mkldnn.is_available()
    else None
)
_used: str | None = None  # None until `use` is called: the machine's own


@cache
def fastest() -> str:
    """The product to use on this machine, "onednn" or "torch".

    torch's own goes to MKL, which favours Intel's processors. A training step of L=4, C=512, T=1024 on one core takes 0.735 s
    with MKL and 0.768 s with oneDNN on an Intel Xeon with AMX, 0.990 s and 0.570 s on an AMD EPYC with AVX-512. The vendor
    decides and not a measurement: equal commands then give equal bits on equal machines.
    """
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        intel = False
    return "torch" if intel or ONEDNN_PRODUCT is None else "onednn"


def use(product: str) -> None:
    """Fixes the product of this process; torch's own replaces a oneDNN product that this torch does not have."""
    global _used
    assert product in PRODUCTS, product
    _used = "torch" if ONEDNN_PRODUCT is None else product


def used() -> str:
    """The product in use, "onednn" or "torch"."""
    return _used or fastest()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    assert ONEDNN_PRODUCT is not None
    return ONEDNN_PRODUCT(x, weight, None, "none", [], "")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = _product(g, weight.t()) if ctx.needs_input_grad[0] else None
        rows, columns = g.reshape(-1, g.size(-1)), x.reshape(-1, x.size(-1))
        return dx, _product(rows.t(), columns.t()) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., n_in], weight [n_out, n_in] -> x @ weight.T [..., n_out], in float32 on a CPU by the product in use."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return _Linear.apply(x, weight) if plain and used() == "onednn" else F.linear(x, weight)


def packed_linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A function x [rows, n_in] -> x @ weight.T for few rows and many calls; no derivative.

    In float32 on a CPU it holds a copy of the weight in oneDNN's own layout. The products of 16 weights of L=4, C=512 take 9.0
    instead of 10.0 ms for 4 rows on one core of an Intel Xeon, 14.1 instead of 19.5 ms for 32; more is gained on an AMD EPYC.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and ONEDNN_PRODUCT is not None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: _product(x, packed)
    return lambda x: F.linear(x, weight)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (x * scale).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = gain x s with s = (mean(x^2) + eps)^-0.5, so dx = s (u - n mean(u n)) with n = x s and u = g gain.
        x, gain, scale = ctx.saved_tensors
        n = x * scale
        weighted = g * n
        d_gain = weighted.flatten(0, -2).sum(dim=0)
        mean = torch.mv(weighted.flatten(0, -2), gain).div_(x.size(-1)).view(scale.shape)
        return torch.addcmul(g * gain, n, mean, value=-1).mul_(scale), d_gain, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * gain over the last dimension: [..., C], [C] -> [..., C]. Keeps x and one number a row.

    In float32 and float64 on a CPU with the derivative above, 4 % of a training step faster there; elsewhere torch's own.
    """
    plain = x.device.type == "cpu" and x.dtype == gain.dtype and x.dtype in (torch.float32, torch.float64)
    return _RMSNorm.apply(x, gain, eps) if plain else F.rms_norm(x, gain.shape, gain, eps=eps)
