"""What is minimised: a network and tokens enter, nats per token leave. Called by the training loop and by every evaluation.

Two objectives (paper 2.1): "ar", the log-likelihood of each pixel given those before it, and "bert", that of randomly masked
pixels given all others. The masks are a pure function of (seed, number of the image, pixel): the same after a resume, on any
ranks, for any micro batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from igpt_ds.counter_random import random_words
from igpt_ds.model.ulysses import part

_MASK, _FORCED = 7, 8  # purposes of random words

# (network, tokens [B, T] int64, numbers [B] int64) -> nats per token of each image [B], float32
ImageLoss = Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood of each token, in nats: logits [B, T, V], tokens [B, T] -> [B, T], float32."""
    B, T, V = logits.shape
    return F.cross_entropy(logits.float().view(B * T, V), tokens.reshape(-1), reduction="none").view(B, T)


def image_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood per token of each image, in nats: logits [B, T, V], tokens [B, T] -> [B], float32."""
    return token_nats(logits, tokens).mean(dim=1)


def autoregressive_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """gen_loss of paper 2.1 as the released code scales it: the mean over all B * T tokens, in nats per token."""
    return image_nats(logits, tokens).mean()


def masked_nats(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The same over each image's masked tokens alone: mask [B, T] bool, at least one True in each row -> [B], float32.

    As the released code scales it: first the mean over the masked tokens of an image, then (by the caller) that over images.
    """
    return torch.where(mask, token_nats(logits, tokens), 0.0).sum(dim=1) / mask.sum(dim=1)


def draw_masks(seed: int, numbers: np.ndarray, T: int, mask_prob: float) -> Tensor:
    """Which pixels of some images are hidden, each one independently with probability mask_prob (paper 2.1).

    Args:
        numbers: int64 [B]; in training the images' positions in the endless stream, else their numbers in the split.

    Returns:
        bool [B, T] on the CPU, True where hidden. Where nothing would be (0.85^16 of 4x4 images, 0.85^1024 of 32x32 ones), one
        pixel is, drawn from the same seed and number: the mean over no pixels is not a number.
    """
    words = random_words(seed, _MASK, numbers[:, None], np.arange(T))
    mask = words < np.uint64(mask_prob * 2.0**64)
    empty = np.flatnonzero(~mask.any(axis=1))
    mask[empty, (random_words(seed, _FORCED, numbers[empty]) % np.uint64(T)).astype(np.int64)] = True
    return torch.from_numpy(mask)


def image_loss(objective: str, seed: int, mask_prob: float, group: ProcessGroup | None = None) -> ImageLoss:
    """The loss of each image under an objective, with the masks of this seed; "ar" draws nothing.

    In a sequence group (see `ulysses`) the network returns the logits of this rank's tokens, and this the sum of their nats over
    a rank's equal share of what the whole image counts, however many of them are here: the mean over the ranks of the group is
    the image's loss. So the mean over all ranks, which ZeRO takes of gradients and the loop of losses, is the batch's.
    """

    def autoregressive(network: Callable[..., Tensor], tokens: Tensor, numbers: Tensor) -> Tensor:
        if group is None:
            return image_nats(network(tokens), tokens)
        T = tokens.size(1)
        return token_nats(network(tokens), tokens[:, part(group, T)]).sum(dim=1) * (group.size() / T)

    def masked(network: Callable[..., Tensor], tokens: Tensor, numbers: Tensor) -> Tensor:
        mask = draw_masks(seed, numbers.numpy(), tokens.size(1), mask_prob).to(tokens.device, non_blocking=True)
        logits = network(tokens, mask)
        if group is None:
            return masked_nats(logits, tokens, mask)
        here = part(group, tokens.size(1))
        nats = torch.where(mask[:, here], token_nats(logits, tokens[:, here]), 0.0).sum(dim=1)
        return nats * group.size() / mask.sum(dim=1)

    return {"ar": autoregressive, "bert": masked}[objective]
