"""A fast training step: quick-GELU with its own derivative, attention's kernel, and what activation checkpointing keeps.

In and out: tensors. Called by `model/transformer.py` and `model/classifier.py`. `quick_gelu` cannot be differentiated twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
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


class _TritonGELU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu_kernels(x.device).forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gelu_kernels(x.device).backward(g, x)


@cache
def gelu_kernels(device: torch.device) -> Any:
    """The module of quick-GELU's Triton kernels; None where they do not work: without Triton, a GPU or a C compiler."""
    if device.type != "cuda":  # also ROCm
        return None
    try:
        from igpt_ds.model import triton_gelu

        x = torch.ones(2, device=device, dtype=torch.bfloat16)
        return triton_gelu if triton_gelu.backward(x, triton_gelu.forward(x)).isfinite().all() else None
    except Exception as error:  # an optional speed-up: whatever its compiler raises, torch's own operations do the same
        warnings.warn(f"quick-GELU by torch's operations, since Triton fails here: {error}", stacklevel=2)
        return None


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), elementwise. Keeps as many numbers as x has for the backward pass.

    On a GPU one Triton kernel each way; a compiled model fuses torch's operations by itself, and FakeTensors have no numbers.
    """
    plain = type(x) is Tensor and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    fast = x.is_cuda and plain and gelu_kernels(x.device) is not None
    return _TritonGELU.apply(x) if fast else _QuickGELU.apply(x)


# In the order in which they are asked for on GPUs from Hopper on. Older ones have FlashAttention-2 first, as torch itself.
_KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def choose_attention(shape: tuple[int, int, int, int], causal: bool, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that attention takes in training for queries of a shape [B, H, T, D]: "cudnn", "flash", "efficient" or "math".

    On an NVIDIA GPU from Hopper on, torch takes from now on the first of `_KERNELS` that computes both ways at this shape.
    Elsewhere torch chooses. "math" holds T x T numbers per head and is slow.
    """
    B, H, T, D = shape
    q, k, v = torch.empty(B, T, 3, H, D, device=device, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        works = first_that_works(_KERNELS, lambda kernel: _attend(kernel, (q, k, v), causal))
        order = [works, *(kernel for kernel in _KERNELS if kernel != works)]
        sdpa_kernel(order, set_priority=True).__enter__()  # for the rest of this process
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=causal))
    return str(choice.name).removesuffix("_ATTENTION").lower()


def first_that_works(kernels: Sequence[SDPBackend], attend: Callable[[SDPBackend], None]) -> SDPBackend:
    """The first kernel with which `attend` raises no RuntimeError; the last if all fail."""
    for kernel in kernels:
        try:
            attend(kernel)
        except RuntimeError:  # no kernel for this shape, device or build
            continue
        return kernel
    return kernels[-1]


def _attend(kernel: SDPBackend, qkv: tuple[Tensor, ...], causal: bool) -> None:
    """Attention both ways on random numbers.

    Raises:
        RuntimeError: the kernel cannot, or its numbers are not finite.
    """
    q, k, v = (torch.randn_like(side).requires_grad_() for side in qkv)
    with warnings.catch_warnings(), sdpa_kernel(kernel):
        warnings.simplefilter("ignore")  # torch says why a kernel cannot
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        gradients = torch.autograd.grad(y.float().sum(), (q, k, v))
    if not all(bool(found.isfinite().all()) for found in (y, *gradients)):
        raise RuntimeError(f"{kernel.name} is not finite")


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
