"""quick-GELU and its derivative on a GPU, each as one Triton kernel. In and out: tensors in bf16, fp16 or fp32 of any shape.

Three kernels of torch move 48 C bytes a token and block, forward and backward; one kernel each moves 16 C. Both compute in
float32 and round once: a result differs from the exact one by at most a rounding in bf16 and fp16, and by 8e-6 of it in fp32 (or
1e-6, near zero). That is tested by TRITON_INTERPRET=1 on a CPU, and never yet on a GPU. model/fused.py imports this file where
Triton is installed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # numbers that one program computes


@triton.jit
def _forward(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (x * tl.sigmoid(1.702 * x)).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _backward(g_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(1.702 * x)
    tl.store(dx_ptr + i, (g * s * (1.0 + 1.702 * x * (1.0 - s))).to(dx_ptr.dtype.element_ty), mask=i < n)


def _launch(kernel: Any, *tensors: Tensor) -> Tensor:
    """Runs a kernel over all numbers of the tensors; the last one is the result."""
    n, device = tensors[0].numel(), tensors[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()  # Triton launches on the current device
    if n:
        with torch.cuda.device(device) if elsewhere else nullcontext():
            kernel[(triton.cdiv(n, _BLOCK),)](*tensors, n, BLOCK=_BLOCK)
    return tensors[-1]


def forward(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    x = x.contiguous()
    return _launch(_forward, x, torch.empty_like(x))


def backward(g: Tensor, x: Tensor) -> Tensor:
    """The derivative of `forward` at x, times g."""
    x = x.contiguous()
    return _launch(_backward, g.contiguous(), x, torch.empty_like(x))
