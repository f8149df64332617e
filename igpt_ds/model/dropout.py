"""Dropout whose masks are a pure function. In: activations [B, t, C]. Out: the same with some numbers zeroed, the others scaled.

A mask depends on (seed, stream position of the image, place in the network) alone, as all other random draws for an image do. So
it does not depend on resumes, rollbacks, ranks, the micro batch or activation checkpointing, and the ranks of a sequence group
take their parts of one mask. Nothing is stored: the backward pass draws the mask again. A CPU and each model of GPU have masks of
their own.

The places are those of the authors' sibling code (openai/distribution_augmentation, train.py: embd_pdrop, resid_pdrop): the sum
of the embeddings, and the outputs of attention and of the MLP before they are added to the residual stream. The probabilities of
attention have none there, nor here: a fused kernel never stores them. The paper gives no places. Made by
train/engine.py for the losses of training, and by nothing else; applied by `model/transformer.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from igpt_ds.counter_random import random_words
from igpt_ds.model.ulysses import part

_DROPOUT = 11  # purpose of random words


class Dropout:
    """The masks of one micro batch.

    Args:
        rate: the probability that a number is zeroed, in [0, 1).
        seed: the recipe's.
        numbers: int64 [B], the images' positions in the endless stream.
        n_ctx: T, the tokens of an image; group: the ranks that share them.
    """

    def __init__(self, rate: float, seed: int, numbers: Tensor, n_ctx: int, group: ProcessGroup | None = None) -> None:
        self.rate, self.seed, self.numbers = rate, seed, numbers.numpy()
        self.n_ctx, self.here = n_ctx, part(group, n_ctx)

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """[B, t, C] -> [B, t, C]: zero, or x / (1 - rate)."""
        return _Drop.apply(x, self, place)

    def masked(self, x: Tensor, place: int) -> Tensor:
        """The same without a derivative."""
        return (x * self.kept(x, place)).mul_(1 / (1 - self.rate))

    def kept(self, x: Tensor, place: int) -> Tensor:
        """bool [B, t, C], True where x keeps its number. Each rank of a sequence group draws the mask of the whole image."""
        generator = torch.Generator(x.device)
        masks = torch.empty(len(x), self.n_ctx, x.size(2), dtype=torch.bool, device=x.device)
        for mask, word in zip(masks, random_words(self.seed, _DROPOUT, self.numbers, np.array([place])).tolist(), strict=True):
            mask.bernoulli_(1 - self.rate, generator=generator.manual_seed(word))
        return masks[:, self.here]


class _Drop(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, place: int) -> Tensor:
        ctx.dropout, ctx.place = dropout, place
        return dropout.masked(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dropout.masked(g, ctx.place), None, None
