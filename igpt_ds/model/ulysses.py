"""Sequence parallelism, as in DeepSpeed-Ulysses (arXiv 2309.14509): several ranks share the tokens of the same images.

Rank k of a sequence group of sp ranks holds the k-th t = T/sp consecutive tokens of each image. All layers except attention act
on single tokens. Attention needs all tokens but treats heads separately. So before it an all-to-all turns each rank's share of
the tokens into a share of the heads, and after it another reverses this. In: tensors and the process group. Out:
tensors. Called by `model/transformer.py` and `model/objectives.py`. A group of None is one rank that holds everything.

DeepSpeed's `DistributedAttention` does the same with four messages per block, and the model would depend on DeepSpeed. Here one
message carries queries, keys and values in the layout that attention reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


class _Exchange(Function):
    """x [sp, ...] -> [sp, ...]: sends part k to rank k of the group and puts what rank k sent at k. It is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        td.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(g, ctx.group), None


class _Mean(Function):
    """The mean over the ranks of a group, on each of them. It is its own adjoint, since each rank has its own loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        mean = x.clone(memory_format=torch.contiguous_format)
        td.all_reduce(mean, group=group)
        return mean.div_(group.size())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Mean.apply(g, ctx.group), None


def part(group: ProcessGroup | None, T: int) -> slice:
    """The tokens of T that this rank holds: T/sp, rounded up; the last rank has fewer if sp does not divide T."""
    if group is None:
        return slice(0, T)
    t = -(-T // group.size())
    assert (group.size() - 1) * t < T, "a rank without tokens: ds_config.join refuses it"
    return slice(group.rank() * t, min((group.rank() + 1) * t, T))


def to_heads(qkv: Tensor, T: int, group: ProcessGroup) -> Tensor:
    """A share of the T tokens, [B, t, 3, H, D] -> a share of the heads, [3, B, H/sp, T, D]."""
    B, t, _, H, D = qkv.shape
    sp, most = group.size(), -(-T // group.size())
    if t < most:  # all messages have one length; the padding of the last rank follows all tokens and is cut off
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, most - t))
    sent = qkv.view(B, most, 3, sp, H // sp, D).permute(3, 0, 1, 2, 4, 5)
    received = _Exchange.apply(sent, group)  # [sp, B, t, 3, h, D]; dimension 0 is now the share of the tokens
    return received.permute(3, 1, 4, 0, 2, 5).reshape(3, B, H // sp, sp * most, D)[:, :, :, :T]


def to_tokens(y: Tensor, group: ProcessGroup) -> Tensor:
    """A share of the heads, [B, H/sp, T, D] -> a share of the tokens, [B, t, H, D]."""
    B, h, T, D = y.shape
    sp, here = group.size(), part(group, T)
    most = -(-T // sp)
    if sp * most > T:
        y = F.pad(y, (0, 0, 0, sp * most - T))
    sent = y.view(B, h, sp, most, D).permute(2, 0, 3, 1, 4)
    received = _Exchange.apply(sent, group)  # [sp, B, t, h, D]; dimension 0 is now the share of the heads
    return received.permute(1, 2, 0, 3, 4).reshape(B, most, sp * h, D)[:, : here.stop - here.start]


def mean_over_tokens(x: Tensor, T: int, group: ProcessGroup | None) -> Tensor:
    """[B, t, C] -> [B, C] float32, the mean over all T tokens of each image, the same on every rank of the group.

    If every rank computes a loss from it, the mean of the ranks' gradients, which ZeRO takes, is the gradient of that loss.
    """
    if group is None:
        return x.mean(1, dtype=torch.float32)
    return _Mean.apply(x.sum(1, dtype=torch.float32) * (group.size() / T), group)
