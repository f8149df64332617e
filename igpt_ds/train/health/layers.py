"""Norms by layer: of gradients, of weights, and the scale of activations. In: an engine in a step. Out: values for the curves.

A layer is a block, or one of wte, wpe, sos, ln_f and the heads. Each rank sums the squares of its own parts, and one all-reduce
adds up all layers. So the norms are those of the whole tensors: the gradients as the update gets them, before clipping, and the
weights with which the model computes, before the update. The activation is the residual stream after a block, as the root of its
mean square over all images of the step.

Called by train/loop.py. Nothing here changes what is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from igpt_ds import dist
from igpt_ds.train.cadence import Cadence
from igpt_ds.train.engine_protocol import Engine

_GRADIENT, _WEIGHT, _ACTIVATION, _COUNT = range(4)  # columns


class LayerScales:
    """Measures the steps that are due. Every rank calls every method.

    Args:
        cadence: `norms_every`, and the last step.
    """

    def __init__(self, engine: Engine, cadence: Cadence) -> None:
        self._engine, self._cadence = engine, cadence
        names = [_layer(name) for name, _ in engine.module.named_parameters()]
        self._layers = list(dict.fromkeys(names))
        self._layer_of = [self._layers.index(name) for name in names]
        self._sums: Tensor | None = None  # [layers, 4] float64 of this rank

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Encloses a step; if it is due, the outputs of the blocks are measured."""
        self._sums = None
        if not self._cadence.norms_every or not self._cadence.due(self._cadence.norms_every, step):
            yield
            return
        self._sums = torch.zeros(len(self._layers), 4, dtype=torch.float64, device=self._engine.device)
        blocks: Any = self._engine.module.blocks
        with ExitStack() as stack:
            for number, block in enumerate(blocks):
                row = self._sums[self._layers.index(f"blocks.{number:02}")]
                stack.callback(block.register_forward_hook(_activation_hook(row)).remove)
            yield

    def before_update(self) -> None:
        """Between the backward pass of the last micro batch and the update: the norms of gradients and weights."""
        if self._sums is None:
            return
        of = {weight: row for row, (_, weight) in zip(self._layer_of, self._engine.module.named_parameters(), strict=True)}
        for column, parts in ((_GRADIENT, gradients(self._engine)), (_WEIGHT, weights(self._engine))):
            rows, norms = [], []
            for weight, part in parts:
                rows.append(of[weight])
                norms.append(torch.linalg.vector_norm(part.detach(), dtype=torch.float32).to(self._sums.device))
            if rows:
                where = torch.tensor(rows, device=self._sums.device)
                self._sums[:, column].index_add_(0, where, torch.stack(norms).double().square())

    def values(self) -> dict[str, float]:
        """After the step: "grad_norm/LAYER", "weight_norm/LAYER" and "activation_rms/LAYER"; {} if the step was not due."""
        if self._sums is None:
            return {}
        sums = dist.sum_over_ranks(self._sums)
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))  # of fp16, which the gradients still have
        roots = torch.cat([sums[:, :2], sums[:, 2:3] / sums[:, 3:]], dim=1).sqrt().tolist()
        found: dict[str, float] = {}
        for layer, (gradient, weight, activation) in zip(self._layers, roots, strict=True):
            found |= {f"grad_norm/{layer}": gradient / scale, f"weight_norm/{layer}": weight}
            if layer.startswith("blocks."):
                found[f"activation_rms/{layer}"] = activation
        return found


def _layer(name: str) -> str:
    """The layer of a weight: "blocks.3.attn.c_attn.weight" -> "blocks.03", so that names sort."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return f"blocks.{int(block[1]):02}" if block else name.partition(".")[0]


def _activation_hook(row: Tensor) -> Any:
    # A block that activation checkpointing computes twice counts twice, in the sum and in the number.
    def hook(block: nn.Module, inputs: object, output: Tensor) -> None:
        row[_ACTIVATION] += torch.linalg.vector_norm(output.detach(), dtype=torch.float32).double().square()
        row[_COUNT] += output.numel()

    return hook


def gradients(engine: Engine) -> Iterator[tuple[Any, Tensor]]:
    """This rank's part of each averaged gradient, with its weight, from the backward pass to the update."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for weight in engine.module.parameters():
            yield weight, optimizer.get_local_fp32_grad_for_param(weight)
    elif getattr(optimizer, "cpu_offload", False):
        for group in optimizer.params_in_partition:
            yield from (
                (weight, weight._hp_mapping.get_lp_grad_fragment(weight._index_in_param_group))
                for weight in group
                if weight._hp_mapping is not None
            )
    elif hasattr(optimizer, "averaged_gradients"):
        for number, group in enumerate(optimizer.params_in_partition):
            parts = [part for part in optimizer.averaged_gradients[number] if not getattr(part, "_zero_padding", False)]
            yield from zip(group, parts, strict=False)
    elif dist.rank() == 0:  # each rank has the whole gradients
        for weight in engine.module.parameters():
            whole = weight.grad if getattr(weight, "_hp_grad", None) is None else weight._hp_grad  # type: ignore[attr-defined]
            if whole is not None:
                yield weight, whole


def weights(engine: Engine) -> Iterator[tuple[Any, Tensor]]:
    """This rank's part of each weight."""
    rank, ranks = dist.rank(), dist.world_size()
    weight: Any
    for weight in engine.module.parameters():
        if hasattr(weight, "ds_tensor"):
            flat, size, first = weight.ds_tensor, weight.ds_tensor.ds_numel, 0
            size = min(size, max(0, weight.ds_numel - weight.ds_zero_partition_rank * size))  # the rest is padding
        else:
            flat, part = weight.data.view(-1), -(-weight.numel() // ranks)
            first = min(rank * part, weight.numel())
            size = min(part, weight.numel() - first)
        yield weight, flat.view(-1).narrow(0, first, size)
