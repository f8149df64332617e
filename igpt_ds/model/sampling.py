"""Images drawn from the model, pixel by pixel with a key-value cache. Called by tools/sample.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from igpt_ds.model.transformer import Transformer


def filter_logits(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """logits [B, V] / temperature, with all but the top_k largest of each row at -inf.

    Raises:
        ValueError: temperature is not positive, or top_k is not in 1..V.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")
    if top_k is not None and not 1 <= top_k <= logits.size(-1):
        raise ValueError(f"top_k={top_k} must lie between 1 and the number of colours, {logits.size(-1)}")
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return logits


@torch.inference_mode()
def sample(
    model: Transformer,
    prefix: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    use_cache: bool = True,
    progress: Iterable[int] | None = None,
) -> Tensor:
    """Continues each row of prefix [B, P] to a whole image [B, T]; P = 0 draws from nothing.

    Args:
        generator: the source of chance; equal seeds give equal images on one device.
        temperature, top_k: sharpen the distribution of each pixel; 1.0 and None sample the model as it is.
        use_cache: False computes every position anew for each pixel, as the released sampler does (for tests).
        progress: the positions P..T-1, wrapped in a progress bar by a caller that wants one.
    """
    B, P = prefix.shape
    T = model.config.n_ctx
    tokens = torch.empty(B, T, dtype=torch.int64, device=prefix.device)
    tokens[:, :P] = prefix
    caches = model.new_caches(B)
    for i in progress if progress is not None else range(P, T):
        if not use_cache:
            caches = model.new_caches(B)
        logits = filter_logits(model.next_logits(tokens[:, :i], caches), temperature, top_k)
        tokens[:, i] = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    return tokens
