"""Functions of DeepSpeed's ZeRO-3 with the same results in less time of the host. `ds_patches` puts them in place.

DeepSpeed 0.19 loops in Python over all ranks at each gathering and each reduction, and does much else for each weight.
`tools/bench/host.py` measures what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------- reductions


@torch.no_grad()
def reduce_scatter_coalesced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """DeepSpeed's function of this name: each tensor's mean over the ranks, of which each rank gets its part.

    One copy lays the tensors' parts side by side for each rank. DeepSpeed slices and pads each tensor for each rank.
    """
    import deepspeed.comm as comm

    rank, ranks = comm.get_rank(group), comm.get_world_size(group)
    sizes = [math.ceil(tensor.numel() / ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % ranks == 0:
        flat = tensors[0].view(-1)
    else:
        flat = torch._chunk_cat([tensor.view(-1) for tensor in tensors], 0, ranks).view(-1)
    flat.div_(ranks)
    mine = flat.narrow(0, rank * sum(sizes), sum(sizes))
    comm.reduce_scatter_fn(mine, flat, group=group, async_op=False)
    parts = []
    for tensor, size, part in zip(tensors, sizes, mine.split(sizes), strict=True):
        parts.append(part.narrow(0, 0, min(size, max(0, tensor.numel() - rank * size))))
    return parts


# ------------------------------------------------------------------------------------------------- gathering and release


def convert_weight(theirs: Callable[..., None], init: Any, weight: Any) -> None:
    """DeepSpeed's `Init._convert_to_deepspeed_param`, and then faster methods for what happens in each step."""
    theirs(init, weight)
    weight.all_gather_coalesced = partial(gather_coalesced, init, weight.all_gather_coalesced)
    weight.all_gather = partial(gather, init, weight, weight.all_gather)
    weight.partition = partial(release, init, weight, weight.partition)


def gather_coalesced(
    init: Any, theirs: Callable[..., Any], params: Iterable[Any], safe_mode: bool = False, quantize: bool = False
) -> Any:
    """Starts to gather weights in one message, and returns a handle to wait for. DeepSpeed's own function does rare cases."""
    params = list(params)
    if safe_mode or quantize or not _plain(init, params):
        return theirs(params, safe_mode=safe_mode, quantize=quantize)
    return Gathering(sorted(params, key=lambda param: param.ds_id))


def gather(
    init: Any,
    weight: Any,
    theirs: Callable[..., Any],
    param_list: list[Any] | None = None,
    async_op: bool = False,
    hierarchy: int = 0,
) -> Any:
    """Gathers weights and waits. After a step DeepSpeed does so with all norms, in a message for each."""
    missing = [param for param in param_list or () if param.ds_status.name == "NOT_AVAILABLE"]
    if async_op or not _plain(init, missing):
        return theirs(param_list, async_op=async_op, hierarchy=hierarchy)
    Gathering(missing).wait()
    return None


def _plain(init: Any, params: list[Any]) -> bool:
    """Whether the weights are several, sharded, at hand, and alike in type and ranks, with one shard each."""
    from deepspeed.runtime.torch_autocast import has_comm_dtype

    if len(params) < 2 or init.allgather_sequential or init.use_all_reduce_for_fetch_params:
        return False
    first = params[0]
    ranks, dtype = first.ds_process_group, first.ds_tensor.dtype
    return first.ds_zero_partition_world_size > 1 and all(
        param.ds_status.name == "NOT_AVAILABLE"
        and param.ds_secondary_tensor is None
        and param.nvme_swapper is None
        and param.ds_process_group is ranks
        and param.ds_tensor.dtype is dtype
        and not hasattr(param.ds_tensor, "ds_quant_scale")
        and not has_comm_dtype(param)
        for param in params
    )


class Gathering:
    """Weights on their way. DeepSpeed slices what arrives by weight and rank; here it is a matrix with a row a rank."""

    def __init__(self, params: list[Any]) -> None:
        from deepspeed.accelerator import get_accelerator
        from deepspeed.comm import allgather_fn
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        first, device = params[0], get_accelerator().current_device_name()
        rank, self.ranks = first.ds_zero_partition_rank, first.ds_zero_partition_world_size
        self.params, self.status = params, ZeroParamStatus
        self.sizes = [param.ds_tensor.ds_numel for param in params]
        size = sum(self.sizes)
        self.flat = torch.empty(size * self.ranks, dtype=first.ds_tensor.dtype, device=device)
        mine = self.flat.narrow(0, rank * size, size)
        torch.cat([param.ds_tensor.to(device) for param in params], out=mine)
        for param in params:
            param.ds_status = ZeroParamStatus.INFLIGHT
        self.handle = allgather_fn(self.flat, mine, group=first.ds_process_group, async_op=True)

    @property
    def complete(self) -> bool:
        """Whether the weights are in place."""
        return self.handle is None

    def wait(self, handle_dependency: bool = True) -> None:
        """Waits for the weights and puts them in place.

        Args:
            handle_dependency: False leaves it to DeepSpeed to keep what arrived until the copies are made.
        """
        if self.handle is None:
            return
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle

        self.handle.wait()
        self.handle = None
        pieces = [self.flat.new_empty(self.ranks, size) for size in self.sizes]
        torch.split_with_sizes_copy(self.flat.view(self.ranks, -1), self.sizes, dim=1, out=pieces)  # a kernel for all, on a GPU
        for param, piece in zip(self.params, pieces, strict=True):
            assert param.ds_status is self.status.INFLIGHT, param.ds_summary()
            param.data = piece.view(-1)[: param.ds_numel].view(param.ds_shape)
            param.ds_status = self.status.AVAILABLE
        if not get_accelerator().is_synchronized_device():
            if handle_dependency:
                self.flat.record_stream(get_accelerator().current_stream())
            else:
                AllGatherCoalescedHandle.data_buffer.append([self.flat])
        del self.flat


def release(
    init: Any,
    weight: Any,
    theirs: Callable[..., None],
    param_list: list[Any] | None = None,
    hierarchy: int = 0,
    has_been_updated: bool = False,
    free_data: bool = True,
) -> None:
    """Frees a gathered weight whose shard is unchanged; DeepSpeed's own function does the rest."""
    from deepspeed.runtime.zero.partition_parameters import free_param

    if (
        param_list is None
        and free_data
        and not has_been_updated
        and weight.ds_status.name == "AVAILABLE"
        and weight.ds_tensor is not None
        and weight.nvme_swapper is None
        and init.zero_param_process_group is None
    ):
        free_param(weight)
    else:
        theirs(param_list, hierarchy=hierarchy, has_been_updated=has_been_updated, free_data=free_data)


# ----------------------------------------------------------------------------------------------------------- the rest


def product(theirs: Any) -> Callable[..., Tensor]:
    """DeepSpeed's product, which holds a weight and not its gathered numbers for the backward pass.

    A separate `setup_context` makes torch look up the function's signature at each call.
    """

    class Product(theirs):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y: Tensor = theirs.forward(x, weight, bias)
            theirs.setup_context(ctx, (x, weight, bias), y)
            return y

        setup_context = torch.autograd.Function.setup_context

    def zero3_linear_wrap(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = Product.apply(input, weight, bias)
        return result

    return zero3_linear_wrap


def weights_of(module: nn.Module, recurse: bool = False) -> list[Any]:
    """DeepSpeed's `iter_params`: a module's weights, with its children's if it recurses, and those registered with it.

    torch walks through all children at each call; the answer is the same as long as the engine lives.
    """
    known = module.__dict__.setdefault("igpt_ds_weights", {})
    if recurse not in known:
        known[recurse] = [weight for _, weight in module.named_parameters(recurse=recurse)]
    return known[recurse] + [weight for _, weight in module.ds_external_parameters()]  # type: ignore[operator]


def forget_decisions(theirs: Callable[..., None], forget: Callable[[], None], coordinator: Any) -> None:
    """DeepSpeed's `_clear_trace_structures`; also forgets which weights to release after which module.

    DeepSpeed remembers that for each module and place for ever. After a validation before the first step it would gather weights
    of the training step again that are at hand.
    """
    theirs(coordinator)
    forget()


def forget_recomputed() -> None:
    """Removes the modules in forward passes that DeepSpeed still counts as running. To be called between two steps.

    Activation checkpointing ends a recomputation as soon as it has what it needs, before the hook that would remove the block.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    del FWD_MODULE_STACK[1:]
