"""The losses. In: a network and tokens. Out: nats per token. Called by the training loop and by every evaluation.

Two objectives (paper 2.1): "ar", the log-likelihood of each pixel given those before it, and "bert", that of randomly masked
pixels given all others. The masks are a pure function of (seed, number of the image, pixel), so they do not depend on resumes,
ranks or the micro batch.
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
    """The same over only the masked tokens of each image: mask [B, T] bool with at least one True per row -> [B], float32.

    Scaled as in the released code: the mean over the masked tokens of an image, then (by the caller) the mean over images.
    """
    return torch.where(mask, token_nats(logits, tokens), 0.0).sum(dim=1) / mask.sum(dim=1)


def draw_masks(seed: int, numbers: np.ndarray, T: int, mask_prob: float) -> Tensor:
    """The hidden pixels of some images; each pixel is hidden independently with probability mask_prob (paper 2.1).

    Args:
        numbers: int64 [B]; in training the images' positions in the endless stream, otherwise their numbers in the split.

    Returns:
        bool [B, T] on the CPU, True where hidden. If no pixel is drawn (0.85^16 of 4x4 images, 0.85^1024 of 32x32 images), one
        pixel is hidden, drawn from the same seed and number, because the mean over no pixels is not a number.
    """
    words = random_words(seed, _MASK, numbers[:, None], np.arange(T))
    mask = words < np.uint64(mask_prob * 2.0**64)
    empty = np.flatnonzero(~mask.any(axis=1))
    mask[empty, (random_words(seed, _FORCED, numbers[empty]) % np.uint64(T)).astype(np.int64)] = True
    return torch.from_numpy(mask)


def draw_of_masks(seed: int, numbers: np.ndarray, draw: int, T: int, mask_prob: float | None) -> Tensor | None:
    """One of several masks of each image (paper 4.6), bool [B, T]; the masks of different draws are independent.

    Args:
        numbers: of the images in their split, int64 [B].
        mask_prob: None masks nothing; the result is None then.
    """
    return None if mask_prob is None else draw_masks(seed, numbers + (draw << 40), T, mask_prob)


def image_loss(objective: str, seed: int, mask_prob: float, group: ProcessGroup | None = None) -> ImageLoss:
    """The loss of each image under an objective, with the masks of this seed; "ar" has no masks.

    In a sequence group (see `ulysses`) the network returns the logits of this rank's tokens. The loss is then the sum of their
    nats divided by an equal share of the image's counted tokens, so the mean over the ranks of the group is the image's loss. The
    mean over all ranks, which ZeRO takes of gradients and the loop of losses, is then the loss of the batch.
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
