"""The functions that replace DeepSpeed's give the same bits, and step aside where DeepSpeed is another."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igpt_ds.train import ds_faster, ds_patches
from igpt_ds.train.engine import _quiet

_quiet()
import deepspeed.comm as comm  # noqa: E402
from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402
from deepspeed.runtime.zero import linear, partition_parameters  # noqa: E402

AVAILABLE, INFLIGHT = partition_parameters.ZeroParamStatus.AVAILABLE, partition_parameters.ZeroParamStatus.INFLIGHT
SIZES = st.lists(st.sampled_from([(1,), (5,), (16,), (3, 7), (8, 8), (5, 12)]), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def test_every_patch_fits_this_deepspeed_and_steps_aside_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ds_patches.patches()
    for patch in known:
        assert ds_patches.digest(patch.sources) == patch.digest, f"the source of {patch.name} changed"
    put: list[str] = []
    tried = [replace(patch, put=lambda name=patch.name: put.append(name)) for patch in known]
    monkeypatch.setattr(ds_patches, "patches", lambda: [replace(tried[0], sources=(test_product,)), *tried[1:]])
    (said, aside) = ds_patches.put_in_place(ds_patches.VERSION)
    assert put == [patch.name for patch in known[1:]]
    assert all(name in said for name in put)
    assert known[0].name in aside
    assert known[0].name not in said
    assert ds_patches.put_in_place(f"{ds_patches.VERSION}+1a2b3c")[0].endswith(said.partition("has")[2])
    assert ds_patches.digest([len]) == ds_patches.digest([eval("lambda: 0")]) == ""
    (line,) = ds_patches.put_in_place("0.20.0")
    assert "0.20.0" in line
    monkeypatch.setattr(ds_patches, "patches", lambda: coalesced_collectives.renamed)
    (line,) = ds_patches.put_in_place(ds_patches.VERSION)
    assert "renamed" in line


@given(shapes=SIZES, ranks=st.integers(1, 9), dtype=DTYPES, data=st.data())
@settings(max_examples=60)
def test_reduce_scatter(shapes: list[tuple[int, ...]], ranks: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """The message that a rank sends is the same up to the padding, and so is the part that the rank takes from what arrives."""
    rank = data.draw(st.integers(0, ranks - 1))
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    sent: list[Tensor] = []

    def arrives(out: Tensor, message: Tensor, **named: Any) -> None:
        sent.append(message.clone())
        out.mul_(3)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comm, "get_rank", lambda group=None: rank)
        patched.setattr(comm, "get_world_size", lambda group=None: ranks)
        patched.setattr(comm, "reduce_scatter_fn", arrives)
        theirs = ds_patches._undecorated(coalesced_collectives.reduce_scatter_coalesced)
        expected = theirs([grad.clone() for grad in grads])
        found = ds_faster.reduce_scatter_coalesced([grad.clone() for grad in grads])
    assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))
    sizes = [-(-grad.numel() // ranks) for grad in grads]
    real = (
        torch.cat([_rows(torch.ones(grad.shape), ranks, size) for grad, size in zip(grads, sizes, strict=True)], 1).view(-1) > 0
    )
    assert torch.equal(sent[0][real], sent[1][real])


def _rows(whole: Tensor, ranks: int, size: int) -> Tensor:
    """A row a rank, padded with zeros."""
    return torch.nn.functional.pad(whole.reshape(-1), (0, ranks * size - whole.numel())).view(ranks, size)


@given(shapes=SIZES, ranks=st.integers(2, 9), dtype=DTYPES)
@settings(max_examples=60)
def test_gathering(shapes: list[tuple[int, ...]], ranks: int, dtype: torch.dtype) -> None:
    """Weights put together from what all ranks send are the whole weights, with the bits of DeepSpeed's own handle."""
    wholes = [torch.randn(shape).to(dtype) for shape in shapes]
    rows = [_rows(whole, ranks, -(-whole.numel() // ranks)) for whole in wholes]
    message = torch.cat(rows, 1).view(-1)
    parts = list(message.clone().split(message.numel() // ranks))
    params = [_sharded(number, whole, row, ranks) for number, (whole, row) in enumerate(zip(wholes, rows, strict=True))]
    done = SimpleNamespace(wait=lambda: None)

    def gather(out: Tensor, mine: Tensor, **named: Any) -> Any:
        assert torch.equal(mine, parts[1])
        out.copy_(message)
        return done

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comm, "allgather_fn", gather)
        ours = ds_faster.Gathering(params)
    assert all(param.ds_status is INFLIGHT for param in params)
    ours.wait()
    ours.wait()  # each weight of a message waits for it
    found = [param.data for param in params]
    for param in params:
        param.ds_status = INFLIGHT
    partition_parameters.AllGatherCoalescedHandle(done, params, parts, ranks).wait()
    for param, whole, weight in zip(params, wholes, found, strict=True):
        assert param.ds_status is AVAILABLE
        assert torch.equal(weight, whole)
        assert torch.equal(weight, param.data)


def _sharded(number: int, whole: Tensor, row: Tensor, ranks: int) -> Any:
    weight: Any = torch.nn.Parameter(torch.empty(0, dtype=whole.dtype))
    weight.ds_tensor = row[1].clone()
    weight.ds_tensor.ds_numel = row.size(1)
    weight.ds_id, weight.ds_numel, weight.ds_shape, weight.ds_process_group = number, whole.numel(), whole.shape, None
    weight.ds_zero_partition_rank, weight.ds_zero_partition_world_size = 1, ranks
    return weight


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_product(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [torch.randn(shape), torch.randn(5, 6), torch.randn(5)][: 3 if bias else 2]
    results = []
    for product in (linear.zero3_linear_wrap, ds_faster.product(linear.LinearFunctionForZeroStage3)):
        given_ = [value.clone().requires_grad_() for value in inputs]
        y = product(*given_)
        y.square().sum().backward()
        results.append([y, *(value.grad for value in given_)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
