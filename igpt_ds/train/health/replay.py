"""Computes a micro batch twice and compares to the bit. In: a step's first micro batch. Out: nothing, or an error with the ranks.

A GPU or a memory that is about to fail may give wrong numbers without an error. Every rank computes its own images, so a
difference is its own: no message of the replay carries a result from one rank to another, except in a sequence group.

The loss and the output of each block are compared, and the gradient of the embeddings, to which each block's backward pass
contributes. A GPU's backward pass of attention adds in any order, so its gradients are compared only with CUBLAS_WORKSPACE_CONFIG
set: torch then has deterministic kernels. The gradients do not reach the optimizer, so training gives the same bits as without.

Called by train/loop.py.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.data.loader import Batch
from igpt_ds.launcher import node_name
from igpt_ds.train.cadence import Cadence
from igpt_ds.train.engine import LossFunction
from igpt_ds.train.engine_protocol import Engine

_EMBEDDINGS = ("wte.weight", "wpe", "sos")
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of so many bytes


@dataclass(frozen=True)
class _Outcome:
    """The bits of one computation."""

    loss: Tensor
    blocks: Tensor  # int64 [L]: the sum of each output's bits as integers, which has no rounding
    gradients: dict[str, Tensor]


class Replay:
    """Checks the steps that are due. Every rank calls it.

    Args:
        cadence: `replay_every`, and the last step.
    """

    def __init__(self, engine: Engine, cadence: Cadence) -> None:
        self._engine, self._cadence = engine, cadence
        self._backward = engine.device.type == "cpu" or "CUBLAS_WORKSPACE_CONFIG" in os.environ

    def check(self, step: int, batch: Batch, loss_function: LossFunction) -> None:
        """Before a step that is due: computes its first micro batch twice.

        Raises:
            SharedError: on every rank, if the results of any rank differ.
        """
        every = self._cadence.replay_every
        if not every or not self._cadence.due(every, step):
            return
        with _deterministic(self._backward and self._engine.device.type != "cpu"):
            first, second = (self._computed(batch, loss_function) for _ in range(2))
        where = difference(first, second)
        if not int(dist.sum_over_ranks(torch.tensor(int(bool(where)), device=self._engine.device))):
            return
        host = node_name()
        found = dist.gather_objects((where, f"{host} ({device_name(self._engine.device)})", host))
        raise SharedError(report(step, (step - 1) // every * every, found))

    def _computed(self, batch: Batch, loss_function: LossFunction) -> _Outcome:
        module: Any = self._engine.module  # not the engine, which would count a backward pass
        sums = torch.zeros(len(module.blocks), dtype=torch.int64, device=self._engine.device)
        with ExitStack() as stack:
            stack.enter_context(_without_backward_hooks(module))
            for number, block in enumerate(module.blocks):
                stack.callback(block.register_forward_hook(_bits_hook(sums, number)).remove)
            if not self._backward:
                stack.enter_context(torch.no_grad())
            loss = loss_function(module, batch)
            weights = {name: weight for name, weight in module.named_parameters() if name in _EMBEDDINGS}
            found = torch.autograd.grad(loss, list(weights.values())) if self._backward else ()
        gradients = {name: bits(gradient) for name, gradient in zip(weights, found, strict=False)}
        return _Outcome(bits(loss), sums, gradients)


def bits(x: Tensor) -> Tensor:
    """The numbers of a tensor as integers, so that NaN equals itself and 0 differs from -0."""
    return x.detach().contiguous().view(_WHOLE[x.element_size()])


def _bits_hook(sums: Tensor, number: int) -> Any:
    def hook(block: nn.Module, inputs: object, output: Tensor) -> None:
        sums[number] += bits(output).sum(dtype=torch.int64)

    return hook


@contextmanager
def _without_backward_hooks(module: nn.Module) -> Iterator[None]:
    """Without DeepSpeed's hooks that reduce a leaf module's gradients, which the replay does not compute."""
    hooks = [(part, part._backward_hooks) for part in module.modules()]
    for part, _ in hooks:
        part._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for part, own in hooks:
            part._backward_hooks = own


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def difference(first: _Outcome, second: _Outcome) -> str:
    """The first place in the order of computation where two results differ; "" if none."""
    if differs := (first.blocks != second.blocks).nonzero().flatten().tolist():
        return f"the output of block {differs[0]}"
    if not torch.equal(first.loss, second.loss):
        return "the loss"
    differ = (name for name, value in first.gradients.items() if not torch.equal(value, second.gradients[name]))
    return next((f"the gradient of {name}" for name in differ), "")


def device_name(device: torch.device) -> str:
    """The device and what it is called."""
    return "CPU" if device.type == "cpu" else f"{device}, {torch.get_device_module(device).get_device_name(device)}"


def report(step: int, before: int, found: list[tuple[str, str, str]]) -> str:
    """The error in words.

    Args:
        before: the step of the check before this one.
        found: of each rank, where it differs ("" if nowhere), its host with its device, and its host.
    """
    ranks = [f"rank {rank} on {place} in {where}" for rank, (where, place, _) in enumerate(found) if where]
    hosts = list(dict.fromkeys(host for where, _, host in found if where))
    said = f"step {step}: a micro batch that was computed twice gave different bits: {', '.join(ranks)}"
    if len(ranks) == len(found) > 1:
        return f"{said}; all ranks differ, so a kernel that is not deterministic is likelier than hardware: omit --replay_every"
    doubtful = f"checkpoints of step {before} or later are doubtful: remove them first"
    exclude = f"leave it out (sbatch --exclude={','.join(hosts)}) and continue with --resume auto"
    return f"{said}; the hardware is suspected, memory or arithmetic: {exclude}; {doubtful}"
