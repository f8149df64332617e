"""The transformer of Image GPT. In: tokens [B, T]. Out: logits [B, T, V]; the logits at position i predict pixel i.

It has one of two objectives: auto-regressive, or BERT's, which hides some pixels and predicts them from the others.

The arithmetic is that of the released code (openai/image-gpt src/model.py) and of HF's ImageGPT: RMS norm with only a gain,
quick-GELU, no biases, a learned start-of-sequence vector, learned positions, and an output matrix that is tied to wte only where
the config says so. Called by the training loop, by feature extraction and by sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from igpt_ds.config import CHECKPOINTING, OBJECTIVES, ModelConfig
from igpt_ds.model.cpu_kernels import attention, linear, rms_norm
from igpt_ds.model.fused import choose_attention, quick_gelu, run_block
from igpt_ds.model.ulysses import mean_over_tokens, part, to_heads, to_tokens

# (x [B, t, C], place) -> x with some numbers zeroed (`model/dropout.py`): the sum of the embeddings at place 0, and the
# outputs of attention and of the MLP of block l at places 2 l + 1 and 2 l + 2.
Dropout = Callable[[Tensor, int], Tensor]


def init_std(config: ModelConfig, init: str = "released", head_std: float = 0.0) -> dict[str, float]:
    """The standard deviation of each freshly drawn tensor; every distribution is N(0, std), and 0 means zeros.

    | tensor                   | "released"      | "sparse_transformer"  |
    |--------------------------|-----------------|-----------------------|
    | wte, sos                 | 0.02            | 0.01                  |
    | wpe                      | 0.01            | 0.01                  |
    | attn.c_attn (q, k, v)    | 1 / sqrt(C)     | sqrt(0.125 / C)       |
    | attn.c_proj              | 1 / sqrt(C * L) | 0.25 / sqrt(C * L)    |
    | mlp.c_fc                 | 0.02            | sqrt(0.125 / C)       |
    | mlp.c_proj               | 0.02            | 0.25 / sqrt(C * L)    |
    | head, class_head         | head_std        | head_std; with 0 the loss of step 0 is ln V |
    | ln_1, ln_2, ln_f (gains) | all 1           | all 1                 |

    "released", the default, is that of openai/image-gpt src/model.py, the code of the published weights. "sparse_transformer" is
    that of the paper (3.3: layer-dependent, as in Child et al. 2019), with the numbers of its authors for 64x64 ImageNet in
    openai/distribution_augmentation (train.py, and imagenet64-8gpu of hyperparams.py): variance 0.125 over the inputs; 0.125 /
    (2 L C) for the output of attention and 0.5 / (2 L 4 C) for that of the MLP, which are equal.

    The paper compares zero heads with heads that are not (A.1) and does not say how those are drawn; GPT-2 draws all matrices
    with 0.02. A tied matrix cannot be zero: it is drawn as the head if head_std is given, otherwise as wte.

    Each module draws its own tensors in its constructor: `deepspeed.zero.Init` partitions a tensor as soon as its module is
    complete, and a later initialisation would have no effect.
    """
    C, L = config.n_embd, config.n_layer
    drawn = head_std if config.tied_embeddings else 0.0
    if init == "released":
        return {
            "wte": drawn or 0.02,
            "sos": 0.02,
            "wpe": 0.01,
            "attn.c_attn": C**-0.5,
            "attn.c_proj": (C * L) ** -0.5,
            "mlp.c_fc": 0.02,
            "mlp.c_proj": 0.02,
            "head": head_std,
        }
    assert init == "sparse_transformer", init
    inward, outward = (0.125 / C) ** 0.5, 0.25 * (C * L) ** -0.5
    return {
        "wte": drawn or 0.01,
        "sos": 0.01,
        "wpe": 0.01,
        "attn.c_attn": inward,
        "attn.c_proj": outward,
        "mlp.c_fc": inward,
        "mlp.c_proj": outward,
        "head": head_std,
    }


def _drawn(*shape: int, std: float) -> nn.Parameter:
    weight = torch.empty(*shape)
    return nn.Parameter(nn.init.normal_(weight, std=std) if std else nn.init.zeros_(weight))


class Projection(nn.Module):
    """x [..., n_in] -> x @ weight.T [..., n_out]; no bias."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = _drawn(n_out, n_in, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return linear(x, self.weight)


class TiedHead(nn.Module):
    """The head whose matrix is that of an embedding: x [..., C] -> x @ wte.T [..., V]. It has no weight of its own.

    The matrix is one parameter, of wte, with one name in checkpoints and model dirs. ZeRO-3 must be told that this module reads
    it as well (train/engine.py).
    """

    def __init__(self, wte: nn.Embedding) -> None:
        super().__init__()
        self._wte = (wte,)  # in a tuple, so that it is no submodule

    @property
    def weight(self) -> nn.Parameter:
        """wte's matrix [V, C]."""
        return cast(nn.Parameter, self._wte[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., V]."""
        return linear(x, self.weight)


class Norm(nn.Module):
    """x * rsqrt(mean(x^2) + 1e-5) * gain over the last dimension. The paper says layer norm, but no mean is subtracted."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return rms_norm(x, self.weight, eps=1e-5)


class Attention(nn.Module):
    """Multi-head self-attention. If causal, each position attends to itself and earlier ones, otherwise to all.

    Each rank of a sequence group passes in and gets back its own t = T/sp tokens; inside, it has all tokens of H/sp heads.
    """

    def __init__(self, config: ModelConfig, std: dict[str, float], causal: bool, group: ProcessGroup | None = None) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.n_ctx, self.causal, self.group = config.n_head, config.n_ctx, causal, group
        self.c_attn = Projection(C, 3 * C, std["attn.c_attn"])
        self.c_proj = Projection(C, C, std["attn.c_proj"])

    def forward(self, x: Tensor) -> Tensor:
        """[B, t, C] -> [B, t, C]."""
        B, t, C = x.shape
        qkv = self.c_attn(x).view(B, t, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4) if self.group is None else to_heads(qkv, self.n_ctx, self.group)
        y = attention(q, k, v, self.causal)
        y = y.transpose(1, 2) if self.group is None else to_tokens(y, self.group)
        return self.c_proj(y.reshape(B, t, C))


class MLP(nn.Module):
    """C -> 4 C -> C with quick-GELU, x * sigmoid(1.702 x), in between."""

    def __init__(self, config: ModelConfig, std: dict[str, float]) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = Projection(C, 4 * C, std["mlp.c_fc"])
        self.c_proj = Projection(4 * C, C, std["mlp.c_proj"])

    def forward(self, x: Tensor) -> Tensor:
        """[B, t, C] -> [B, t, C]."""
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Block(nn.Module):
    """h + attn(ln_1 h), then the same with the MLP and ln_2 (paper 2.2)."""

    def __init__(self, config: ModelConfig, std: dict[str, float], causal: bool, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd)
        self.attn = Attention(config, std, causal, group)
        self.ln_2 = Norm(config.n_embd)
        self.mlp = MLP(config, std)

    def forward(self, h: Tensor, dropout: Dropout | None = None, l: int = 0) -> Tensor:  # noqa: E741  (the paper's l)
        """[B, t, C] -> [B, t, C]; l is the number of the block, by which dropout draws."""
        if dropout is None:
            h = h + self.attn(self.ln_1(h))
            return h + self.mlp(self.ln_2(h))
        h = h + dropout(self.attn(self.ln_1(h)), 2 * l + 1)
        return h + dropout(self.mlp(self.ln_2(h)), 2 * l + 2)


def attention_backend(config: ModelConfig, causal: bool, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel of this model's attention in training, see `choose_attention`."""
    return choose_attention((1, config.n_head, config.n_ctx, config.n_embd // config.n_head), causal, device, dtype)


class Transformer(nn.Module):
    """The whole network.

    Args:
        config: its shape.
        activation_checkpointing: what is kept for the backward pass. "none": all activations, 16 C per token and block.
            "selective": 9 C, the blocks' inputs, queries, keys, values, attention and the input of quick-GELU; the rest is
            recomputed. "full": the blocks' inputs, 1 C; each block is computed twice. In a sequence group the last two exchange
            tokens and heads once more.
        objective: "ar" predicts each pixel from those before it; "bert" predicts hidden pixels from all others (paper 2.1), with
            no mask in attention and no sos.
        init, head_std: the distribution of fresh weights, see `init_std`.
        group: the ranks that share the tokens of the same images (see `ulysses`). Each gets whole images of n_ctx tokens and
            returns logits and residuals of its own t = T/sp tokens; without a group t = T.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: str = "none",
        objective: str = "ar",
        init: str = "released",
        group: ProcessGroup | None = None,
        head_std: float = 0.0,
    ) -> None:
        super().__init__()
        assert objective in OBJECTIVES, objective
        assert activation_checkpointing in CHECKPOINTING, activation_checkpointing
        std = init_std(config, init, head_std)
        assert group is None or config.n_head % group.size() == 0, "ds_config.join refuses it"
        self.config, self.objective, self.group = config, objective, group
        self.activation_checkpointing = activation_checkpointing
        self.wte = nn.Embedding(config.n_vocab, config.n_embd, _weight=_drawn(config.n_vocab, config.n_embd, std=std["wte"]))
        if objective == "ar":
            self.sos = _drawn(config.n_embd, std=std["sos"])
        self.wpe = _drawn(config.n_ctx, config.n_embd, std=std["wpe"])
        self.blocks = nn.ModuleList(Block(config, std, objective == "ar", group) for _ in range(config.n_layer))
        self.ln_f = Norm(config.n_embd)
        tied = config.tied_embeddings
        self.head = TiedHead(self.wte) if tied else Projection(config.n_embd, config.n_vocab, std["head"])

    def embed(self, tokens: Tensor, mask: Tensor | None = None, dropout: Dropout | None = None) -> Tensor:
        """tokens [B, T] -> h^0 [B, t, C].

        "ar": sos, then all pixels except the last, each with its position. "bert": every pixel with its position; only the
        position where mask [B, T] is True (paper 2.2).
        """
        assert self.group is None or tokens.size(1) == self.config.n_ctx, "a sequence group divides whole images"
        here = part(self.group, tokens.size(1))
        if self.objective == "ar":
            assert mask is None, "an auto-regressive model hides nothing"
            content = self._shifted(tokens, here)
        else:
            content = self.wte(tokens[:, here])
            if mask is not None:
                content = content.masked_fill(mask[:, here, None], 0.0)
        h = content + self.wpe[here]
        return h if dropout is None else dropout(h, 0)

    def _shifted(self, tokens: Tensor, here: slice) -> Tensor:
        """The input before each of these pixels: [B, T] -> [B, t, C]."""
        sos = self.sos.expand(tokens.size(0), 1, -1)
        if self.group is None:
            return torch.cat([sos, self.wte(tokens[:, :-1])], dim=1)
        # Only the first rank has a sos, but ZeRO waits for its gradient on all ranks: it is zero on the others.
        before = self.wte(tokens.roll(1, dims=1)[:, here])
        first = torch.full((), here.start == 0, device=tokens.device)
        return torch.cat([torch.where(first, sos, before[:, :1]), before[:, 1:]], dim=1)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, dropout: Dropout | None = None) -> Tensor:
        """tokens [B, T] int64, and for "bert" mask [B, T] bool (True: hidden and to be predicted) -> logits [B, t, V].

        Without a group t = T. "ar": the logits of a pixel depend only on the pixels before it. "bert": only on the pixels that
        are not masked. A loss of training alone passes dropout.
        """
        assert (mask is None) == (self.objective == "ar"), "the bert objective alone takes a mask, and needs one"
        assert dropout is None or self.training, "dropout is for training alone"
        h = self.embed(tokens, mask, dropout)
        for l, block in enumerate(self.blocks):  # noqa: E741  (the paper's l)
            h = run_block(block, h, self.activation_checkpointing, dropout, l)
        return self.head(self.ln_f(h))

    def residuals(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (h^l, n^l), each [B, t, C], for l = 0..L, one layer at a time.

        h^l is the residual stream that block l reads; n^l = layer norm of h^l as that block applies it (paper 2.2, 2.4).
        n^L is the output of ln_f. A bert model reads the whole image here, without a mask.
        """
        h = self.embed(tokens)
        for block in self.blocks:
            yield h, cast(Block, block).ln_1(h)
            h = block(h)
        yield h, self.ln_f(h)

    def pooled(self, x: Tensor) -> Tensor:
        """The features in h^l or n^l, [B, t, C] -> [B, C] float32: the mean over all T tokens, on every rank of the group.

        In a group every rank passes whole images, as in training.
        """
        return mean_over_tokens(x, self.config.n_ctx if self.group else x.size(1), self.group)
