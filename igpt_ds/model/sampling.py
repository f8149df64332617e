"""Samples images from an auto-regressive model, pixel by pixel. In: prefixes [B, P]. Out: images [B, T].

`Decoder` computes the transformer for one new position at a time, with keys and values that are allocated once. Called by
tools/sample.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ds.errors import InputError
from igpt_ds.model.cpu_kernels import packed_linear
from igpt_ds.model.transformer import Block, Transformer

_EPS = 1e-5  # of the norms, as in model/transformer.py
_COLDEST = 1e-9  # lowest temperature; differences of float32 logits still decide there


class _Layer:
    """One block's weights, and its keys and values [B, H, T, D]."""

    def __init__(self, block: Block, B: int, H: int, T: int, dtype: torch.dtype) -> None:
        self.ln_1, self.ln_2 = block.ln_1.weight, block.ln_2.weight
        names = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.weights = [module.weight.detach().to(dtype) for module in names]
        self.linears = [packed_linear(weight, B) for weight in self.weights]
        D = self.weights[1].size(0) // H
        self.keys, self.values = (self.weights[0].new_zeros(B, H, T, D) for _ in range(2))


class Decoder:
    """Computes the model's logits pixel by pixel: `prefill` once, then `step` for each pixel.

    Args:
        model: an auto-regressive transformer, on the device to sample on.
        B: number of images in the batch.
        dtype: dtype of the weights, keys, values and matrix products; the residual stream and the norms stay in float32.
    """

    def __init__(self, model: Transformer, B: int, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        self.model, self.dtype = model, dtype
        self.B, self.H, self.T, self.C = B, config.n_head, config.n_ctx, config.n_embd
        self.layers = [_Layer(cast(Block, block), B, self.H, self.T, dtype) for block in model.blocks]
        self.head = packed_linear(model.head.weight.detach().to(dtype), B)
        self.length = 0  # positions filled in the keys and values

    def prefill(self, tokens: Tensor) -> Tensor:
        """Reads the first P pixels [B, P] at once -> logits [B, V] of pixel P, float32. P may be 0."""
        model, P = self.model, tokens.size(1)
        assert self.length == 0
        assert 0 <= P < self.T
        sos = model.sos.expand(self.B, 1, -1)
        h = torch.cat([sos, model.wte(tokens)], dim=1) + model.wpe[: P + 1]
        for layer in self.layers:
            c_attn, c_proj, c_fc, mlp_proj = layer.weights
            q, k, v = self._heads(F.linear(self._norm(h, layer.ln_1), c_attn))
            layer.keys[:, :, : P + 1], layer.values[:, :, : P + 1] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=P > 0)
            h = h + F.linear(y.transpose(1, 2).reshape(h.shape), c_proj)
            x = F.linear(self._norm(h, layer.ln_2), c_fc)
            h = h + F.linear(x * torch.sigmoid(1.702 * x), mlp_proj)
        self.length = P + 1
        return self.head(self._norm(h[:, -1], model.ln_f.weight)).float()

    def step(self, token: Tensor) -> Tensor:
        """Reads the newest pixel [B] -> logits [B, V] of the next pixel, float32."""
        i = self.length
        assert 0 < i < self.T
        h = F.embedding(token, self.model.wte.weight) + self.model.wpe[i]
        for layer in self.layers:
            c_attn, c_proj, c_fc, mlp_proj = layer.linears
            q, k, v = self._heads(c_attn(self._norm(h, layer.ln_1))[:, None])
            layer.keys[:, :, i : i + 1], layer.values[:, :, i : i + 1] = k, v
            y = F.scaled_dot_product_attention(q, layer.keys[:, :, : i + 1], layer.values[:, :, : i + 1])
            h = h + c_proj(y.reshape(self.B, self.C))
            x = c_fc(self._norm(h, layer.ln_2))
            h = h + mlp_proj(x * torch.sigmoid(1.702 * x))
        self.length = i + 1
        return self.head(self._norm(h, self.model.ln_f.weight)).float()

    def _norm(self, h: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(h, gain.shape, gain, eps=_EPS).to(self.dtype)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, t, 3 C] -> three times [B, H, t, D]."""
        q, k, v = qkv.view(self.B, -1, 3, self.H, self.C // self.H).permute(2, 0, 3, 1, 4)
        return q, k, v


@dataclass(frozen=True)
class Filter:
    """How the distribution of each pixel is sharpened; the defaults sample the model as it is.

    Raises:
        ValueError: temperature is not a finite number of at least 1e-9, top_k is below 1, or top_p is outside (0, 1].
    """

    temperature: float = 1.0  # divides the logits
    top_k: int | None = None  # keeps the k likeliest colours, and those as likely as the last of them
    top_p: float | None = None  # keeps the fewest likeliest colours whose probabilities sum to at least p (nucleus sampling)

    def __post_init__(self) -> None:
        if not _COLDEST <= self.temperature < float("inf"):
            raise InputError(
                f"temperature={self.temperature} must be a finite number of at least {_COLDEST:g}; use top_k=1 to always take "
                "the likeliest colour"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be greater than 0 and at most 1")

    def check(self, V: int) -> None:
        """Raises a ValueError where top_k exceeds the number of colours V."""
        if self.top_k is not None and self.top_k > V:
            raise InputError(f"top_k={self.top_k} must lie between 1 and the number of colours, {V}")


def filter_logits(logits: Tensor, filter: Filter) -> Tensor:
    """Logits [B, V] with unlikely colours at -inf; equal to logits / temperature up to a constant a row.

    Raises:
        ValueError: top_k exceeds V.
    """
    filter.check(logits.size(-1))
    temperature, top_k, top_p = filter.temperature, filter.top_k, filter.top_p
    logits = logits.float()
    if temperature != 1:
        logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # subtract first: the quotient may overflow
    if top_k is not None:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None:
        falling, order = logits.sort(dim=-1, descending=True, stable=True)
        p = falling.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # likelier colours already reach top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def choose(logits: Tensor, u: Tensor) -> Tensor:
    """The colour of each row at a point u [B] of [0, 1) of its cumulative distribution: logits [B, V] -> int64 [B]."""
    heights = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(heights[:, :-1].contiguous(), u[:, None] * heights[:, -1:], right=True).squeeze(1)


_AS_IT_IS = Filter()


@torch.inference_mode()
def sample(
    model: Transformer,
    prefix: Tensor,
    generator: torch.Generator,
    filter: Filter = _AS_IT_IS,
    use_cache: bool = True,
    progress: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Completes each row of prefix [B, P] to a whole image [B, T]; P = 0 generates images without a prefix.

    Each pixel of each image takes one random number, image by image. The same seed therefore gives the same images in one batch
    or in several, and the same random numbers on every device.

    Args:
        generator: random generator on the CPU.
        filter: sharpens the distribution of each pixel.
        use_cache: False recomputes every position for each pixel, as the released sampler does (for tests).
        progress: the positions P..T-1; a caller may wrap them in a progress bar.
        dtype: dtype of the weights; bfloat16 halves the bytes that a GPU reads for each pixel.

    Raises:
        ValueError: the model's objective is not "ar", top_k exceeds the number of colours, or a logit is not finite.
    """
    if model.objective != "ar":
        raise InputError(f"sampling needs a model with objective 'ar'; this model has {model.objective!r}")
    B, P = prefix.shape
    T = model.config.n_ctx
    filter.check(model.config.n_vocab)
    u = torch.rand(B, T - P, generator=generator, dtype=torch.float64).T.contiguous().to(prefix.device)
    tokens = torch.zeros(B, T, dtype=torch.int64, device=prefix.device)
    tokens[:, :P] = prefix
    decoder, finite = Decoder(model, B, dtype), torch.ones((), dtype=torch.bool, device=prefix.device)
    for i in progress if progress is not None else range(P, T):
        if not use_cache:
            logits = model(tokens[:, : i + 1])[:, -1].float()  # the last token is no input of its own logits
        else:
            logits = decoder.prefill(tokens[:, :P]) if i == P else decoder.step(tokens[:, i - 1])
        finite &= logits.isfinite().all()  # read once at the end, so that a GPU does not wait at each pixel
        tokens[:, i] = choose(filter_logits(logits, filter), u[i - P])
    if not finite:
        raise InputError("the model's logits are not finite; check its weights, or sample in fp32")
    return tokens
