"""nanoGPT's transformer, which tools/bench/model.py compares with; `ours` has our norm and activation as plain operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ds.config import ModelConfig


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, ours: bool) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.ours = config.n_head, ours
        self.ln_1, self.ln_2 = _norm(C, ours), _norm(C, ours)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        y = self.c_fc(self.ln_2(x))
        return x + self.mlp_proj(y * torch.sigmoid(1.702 * y) if self.ours else F.gelu(y))


class Plain(nn.Module):
    """nanoGPT without biases and without a start of sequence: tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig, ours: bool) -> None:
        super().__init__()
        C = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.n_vocab, C), nn.Embedding(config.n_ctx, C)
        self.blocks = nn.Sequential(*(_Block(config, ours) for _ in range(config.n_layer)))
        self.ln_f, self.lm_head = _norm(C, ours), nn.Linear(C, config.n_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of each next token."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1)))
        return self.lm_head(self.ln_f(self.blocks(x)))


def _norm(C: int, ours: bool) -> nn.Module:
    return nn.RMSNorm(C, eps=1e-5) if ours else nn.LayerNorm(C, bias=False)
