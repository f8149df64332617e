"""What is minimised: logits and tokens enter, nats per token leave. Called by the training loop and by validation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def image_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood per token of each image, in nats: logits [B, T, V], tokens [B, T] -> [B], float32."""
    B, T, V = logits.shape
    return F.cross_entropy(logits.float().view(B * T, V), tokens.reshape(-1), reduction="none").view(B, T).mean(dim=1)


def autoregressive_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """gen_loss of paper 2.1 as the released code scales it: the mean over all B * T tokens, in nats per token."""
    return image_nats(logits, tokens).mean()
