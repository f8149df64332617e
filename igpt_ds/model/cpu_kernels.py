"""On a CPU: the float32 matrix product that the processor runs fastest, and fast derivatives of RMS norm and attention.

In and out: tensors. Called by `model/transformer.py`, `model/fused.py` and `model/sampling.py`. The two products round
differently, so one run uses one of them: training records its name in run.json, and a resumed run passes it to `use`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

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
_used: str | None = None  # None until `use` is called


@cache
def usual() -> str:
    """The product of programs that measure nothing, "onednn" or "torch"; equal commands then give equal bits.

    On AMD's processors torch's own, which goes to MKL, takes 0.990 s for a training step of L=4, C=512, T=1024 on a core with
    AVX-512, and oneDNN 0.570 s. Elsewhere torch's own: on an Intel Xeon with AMX it takes 0.735 s, and oneDNN 0.768 s. A training
    run measures (`cpu_speed.fastest_product`).
    """
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        amd = False
    return "onednn" if amd and ONEDNN_PRODUCT is not None else "torch"


def use(product: str) -> None:
    """Fixes the product of this process; torch's own replaces a oneDNN product that this torch does not have."""
    global _used
    assert product in PRODUCTS, product
    _used = "torch" if ONEDNN_PRODUCT is None else product


def used() -> str:
    """The product in use, "onednn" or "torch"."""
    return _used or usual()


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


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., n_in], weight [n_out, n_in] -> x @ weight.T [..., n_out] by oneDNN, in float32 on a CPU."""
    return cast(Tensor, _Linear.apply(x, weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., n_in], weight [n_out, n_in] -> x @ weight.T [..., n_out], in float32 on a CPU by the product in use."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return onednn_linear(x, weight) if plain and used() == "onednn" else F.linear(x, weight)


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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the sums are at least in float32, as torch's own
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = gain x s with s = (mean(x^2) + eps)^-0.5, so dx = s (u - n mean(u n)) with n = x s and u = g gain.
        x, gain, scale = ctx.saved_tensors
        n, g, wide_gain = x.to(scale.dtype) * scale, g.to(scale.dtype), gain.to(scale.dtype)
        weighted = g * n
        d_gain = weighted.flatten(0, -2).sum(dim=0)
        mean = torch.mv(weighted.flatten(0, -2), wide_gain).div_(x.size(-1)).view(scale.shape)
        dx = torch.mul(g, wide_gain, out=weighted).addcmul_(n, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), d_gain.to(gain.dtype), None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * gain over the last dimension: [..., C], [C] -> [..., C]. Keeps x and one number a row.

    On a CPU with the derivative above, 4 % of a training step faster in float32 and 8 % in bfloat16; elsewhere torch's own.
    """
    plain = x.device.type == "cpu" and x.dtype == gain.dtype
    return _RMSNorm.apply(x, gain, eps) if plain else F.rms_norm(x, gain.shape, gain, eps=eps)


_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_WIDE_BACKWARD = 1 << 14  # the largest tokens x head dimension for which the derivative in float32 is the faster one


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert _FLASH is not None
        y, log_sums = _FLASH(q, k, v, 0.0, causal)
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        assert _FLASH_BACKWARD is not None
        *sides, log_sums = ctx.saved_tensors
        found = _FLASH_BACKWARD(*(side.float() for side in (g, *sides)), log_sums, 0.0, ctx.causal)
        dq, dk, dv = (side.to(g.dtype) for side in found)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, torch's own: q, k, v [B, H, T, D] -> [B, H, T, D].

    In bfloat16 on a CPU the derivative for short images is computed in float32, because torch's in bfloat16 is slow there: 22.3
    against 2.7 ms for 32 images of T=64 D=12 and 79 against 40 ms for T=256 D=32, on one core of an Intel Xeon with AMX. It is
    the faster one from T=512 D=64 on.
    """
    narrow = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    flash = None not in (_FLASH, _FLASH_BACKWARD) and torch.backends.cuda.flash_sdp_enabled()  # the switch of CPUs as well
    if narrow and flash and torch.is_grad_enabled() and q.size(-2) * q.size(-1) <= _WIDE_BACKWARD:
        return _Attention.apply(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
