"""A fast training step: quick-GELU with its own derivative, and activation checkpointing, which chooses what a block keeps.

In and out: tensors. Called by `model/transformer.py` and `model/classifier.py`. `quick_gelu` cannot be differentiated twice.
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
from torch.utils.checkpoint import checkpoint, noop_context_fn

from igpt_ds.model.cpu_kernels import ONEDNN_PRODUCT

_SLOPE = 1.702  # quick-GELU's: x * sigmoid(1.702 x)


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
    """x * sigmoid(1.702 x), elementwise. Keeps only 1.702 x for the backward pass."""
    return _QuickGELU.apply(x)


_ATTENTION = {  # the kernels of scaled_dot_product_attention that store no T x T matrix
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def _is_kept(operation: object, args: tuple[Any, ...]) -> bool:
    """Whether "selective" keeps a result: that of attention and of the widening products, C -> 3 C and C -> 4 C.

    Recomputing C -> C costs one of a block's twelve C^2; keeping it costs 1 C more. The backward pass does not need 4 C -> C.
    """
    if operation is torch.ops.aten.mm.default:  # x [N, n_in] @ weight.T [n_in, n_out]
        return bool(args[1].size(1) > args[1].size(0))
    if operation is ONEDNN_PRODUCT:  # x, and weight [n_out, n_in]
        return bool(args[1].size(0) > args[1].size(1))
    return operation in _ATTENTION


class _Selective(TorchDispatchMode):
    """Keeps the results of some operations, or returns the kept results in the same order.

    torch's own `create_selective_checkpoint_contexts` expects every operation again in the recomputation. ZeRO-3 breaks this:
    weights that the forward pass gathered ahead are gathered elsewhere in the backward pass.
    """

    def __init__(self, kept: list[Any], replays: bool) -> None:
        super().__init__()
        self.kept, self.replays = kept, replays

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(operation, args):
            return operation(*args, **(kwargs or {}))
        # Detached: autograd adds the returned tensor to the graph, and the graph would keep itself alive.
        if self.replays:
            return tree_map_only(Tensor, torch.detach, self.kept.pop(0))
        result = operation(*args, **(kwargs or {}))
        self.kept.append(tree_map_only(Tensor, torch.detach, result))
        return result


def _selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _Selective(kept, replays=False), _Selective(kept, replays=True)


def run_block(block: nn.Module, h: Tensor, activation_checkpointing: str, *more: object) -> Tensor:
    """Computes block(h, *more) and keeps the activations of one checkpointing mode for the backward pass; h is [B, T, C].

    "none" keeps all, 16 C a token; "selective" keeps h and what `_is_kept` names, 9 C; "full" keeps h alone. The results are
    bit-identical. The block draws nothing from torch's generators: dropout's masks are a pure function.
    """
    if activation_checkpointing == "none" or not torch.is_grad_enabled():
        return cast(Tensor, block(h, *more))
    contexts = _selective_contexts if activation_checkpointing == "selective" else noop_context_fn
    return cast(Tensor, checkpoint(block, h, *more, use_reentrant=False, preserve_rng_state=False, context_fn=contexts))
