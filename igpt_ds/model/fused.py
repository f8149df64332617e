"""What makes a training step fast: products, norm and quick-GELU with hand-written derivatives; recomputation of the rest.

Tensors enter and leave; `model/transformer.py` calls, each function inside the module that owns the weight, because ZeRO-3
gathers weights for a module at a time. Where torch has one kernel for it (a GPU's norm and products) that kernel is called.
None of the three can be differentiated twice. `run_block` is activation checkpointing, which decides what a block keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

_SLOPE = 1.702  # quick-GELU's: x * sigmoid(1.702 x)

# oneDNN's product x [..., n_in] @ weight [n_out, n_in].T, whatever the strides. torch's own float32 products on a CPU go to MKL,
# which takes 2.2 times as long on a core of an AMD EPYC with AVX-512. The name is not public: where it is missing, this is None.
ONEDNN_PRODUCT = (
    getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if torch.backends.mkldnn.is_available()
    else None
)


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
    """x [..., n_in], weight [n_out, n_in] -> x @ weight.T [..., n_out]: oneDNN's product for float32 on a CPU, else torch's."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return _Linear.apply(x, weight) if plain and ONEDNN_PRODUCT is not None else F.linear(x, weight)


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
    """x * rsqrt(mean(x^2) + eps) * gain over the last dimension: [..., C], [C] -> [..., C]. Keeps x and a number for each row."""
    plain = x.device.type == "cpu" and x.dtype == gain.dtype and x.dtype in (torch.float32, torch.float64)
    return _RMSNorm.apply(x, gain, eps) if plain else F.rms_norm(x, gain.shape, gain, eps=eps)


class _QuickGELU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # silu(z) = z sigmoid(z), so with z = 1.702 x the function is silu(z) / 1.702 and its derivative silu'(z), one kernel.
        z = x * _SLOPE
        ctx.save_for_backward(z)
        return F.silu(z).mul_(1 / _SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g, z)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), elementwise. Keeps 1.702 x alone."""
    return _QuickGELU.apply(x)


_ATTENTION = {  # every kernel of scaled_dot_product_attention that a device may choose and that holds no T x T numbers
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def _is_kept(operation: object, args: tuple[Any, ...]) -> bool:
    """What "selective" keeps: attention, and those products that widen, C -> 3 C and C -> 4 C; their inputs are cheap.

    C -> C costs one of the twelve C^2 of a block to recompute and would keep 1 C more; the result of 4 C -> C nobody asks for.
    """
    if operation is torch.ops.aten.mm.default:  # x [N, n_in] @ weight.T [n_in, n_out]
        return bool(args[1].size(1) > args[1].size(0))
    if ONEDNN_PRODUCT is not None and operation is ONEDNN_PRODUCT:  # x, and weight [n_out, n_in]
        return bool(args[1].size(0) > args[1].size(1))
    return operation in _ATTENTION


class _Selective(TorchDispatchMode):
    """Keeps the results of some operations, or gives them back in the same order instead of computing them again.

    torch's own `create_selective_checkpoint_contexts` wants every operation to come again, which those that gather weights under
    ZeRO-3 do not: what was gathered ahead in the forward pass is gathered at another place in the backward pass.
    """

    def __init__(self, kept: list[Any], replays: bool) -> None:
        super().__init__()
        self.kept, self.replays = kept, replays

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(operation, args):
            return operation(*args, **(kwargs or {}))
        # Detached: autograd makes the tensor that it gets a part of the graph, which would then hold itself.
        if self.replays:
            return tree_map_only(Tensor, torch.detach, self.kept.pop(0))
        result = operation(*args, **(kwargs or {}))
        self.kept.append(tree_map_only(Tensor, torch.detach, result))
        return result


def _selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _Selective(kept, replays=False), _Selective(kept, replays=True)


def run_block(block: nn.Module, h: Tensor, activation_checkpointing: str) -> Tensor:
    """block(h), with as many of its activations kept for one backward pass as the mode says; h [B, T, C].

    "none": all, 16 C a token; "selective": h and what `_is_kept` names, 9 C; "full": h alone. The results are the same bits.
    """
    if activation_checkpointing == "none" or not torch.is_grad_enabled():
        return cast(Tensor, block(h))
    more: dict[str, Any] = {"context_fn": _selective_contexts} if activation_checkpointing == "selective" else {}
    return cast(Tensor, checkpoint(block, h, use_reentrant=False, preserve_rng_state=False, **more))
