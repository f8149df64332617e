"""The transformer with a class head (paper 2.3). In: tokens. Out: logits of the pixels and of the image's class.

The head is that of the released code: it reads the mean over all tokens of n^L and has no bias. Its weight starts at zero, so the
loss of step 0 is ln K, unless the recipe has a head_std. The transformer has no other additional weight. Called by the
fine-tuning loop and by evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from igpt_ds.config import Finetune, ModelConfig
from igpt_ds.model.fused import run_block
from igpt_ds.model.objectives import ImageLoss, draw_masks, image_loss
from igpt_ds.model.transformer import Block, Dropout, Projection, Transformer

CLASS_HEAD = "class_head.weight"  # [K, C]

# (network, tokens [B, T] int64, labels [B], numbers [B]) -> per image, float32 [B]: gen_loss or None, clf_loss, and logits [B, K]
ClassLoss = Callable[[Callable[..., tuple[Tensor | None, Tensor]], Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor]]


class Classifier(Transformer):
    """A Transformer and a class head on n^layer.

    Args:
        n_classes: K.
        layer: l in 0..L; the head reads n^l of `Transformer.residuals`; L is ln_f's output. The paper (4.5) also tried the layer
            that probes best.
        others: those of Transformer, by name; head_std is that of both heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_classes: int,
        layer: int,
        **others: Any,
    ) -> None:
        super().__init__(config, **others)
        self.layer = layer
        self.class_head = Projection(config.n_embd, n_classes, others.get("head_std", 0.0))

    def forward(  # type: ignore[override]  # two results, so that both losses cost one pass
        self, tokens: Tensor, mask: Tensor | None = None, with_pixels: bool = True, dropout: Dropout | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """tokens [B, T] int64, "bert": mask [B, T] bool -> pixels' logits [B, t, V], the classes' [B, K] float32.

        Args:
            mask: only for "bert"; None hides nothing.
            with_pixels: False skips the blocks above `layer`; the pixels' logits are None then.
        """
        assert dropout is None or self.training, "dropout is for training alone"
        h = self.embed(tokens, mask, dropout)
        features = None
        for l, block in enumerate(self.blocks):  # noqa: E741  (the paper's l)
            if l == self.layer:
                features = self.pooled(cast(Block, block).ln_1(h))
                if not with_pixels:
                    return None, self._classes(features)
            h = run_block(block, h, self.activation_checkpointing, dropout, l)
        n = self.ln_f(h)
        features = self.pooled(n) if features is None else features
        return self.head(n) if with_pixels else None, self._classes(features)

    def _classes(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.class_head(features.to(self.class_head.weight.dtype)).float())


def class_loss(
    finetune: Finetune, config: ModelConfig, objective: str, seed: int, mask_prob: float, group: ProcessGroup | None = None
) -> ClassLoss:
    """Both losses of each image: gen_loss in nats per token (per image under gen_scale "sum"), clf_loss in nats per image.

    "bert" hides pixels for both losses in the same pass (paper 4.6: inputs are masked in training and in evaluation), by the seed
    and the image's number. Loss "clf" has no gen_loss. "sum" multiplies by the number of tokens, for "bert" by the mean number of
    hidden ones. `total` adds the two.
    """
    pixels: ImageLoss = image_loss(objective, seed, mask_prob, group)
    tokens_counted = config.n_ctx if objective == "ar" else mask_prob * config.n_ctx
    scale = tokens_counted if finetune.gen_scale == "sum" else 1.0

    def losses(
        network: Callable[..., tuple[Tensor | None, Tensor]], tokens: Tensor, labels: Tensor, numbers: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if finetune.loss == "clf":
            mask = None
            if objective == "bert":
                mask = draw_masks(seed, numbers.numpy(), tokens.size(1), mask_prob).to(tokens.device)
            _, logits = network(tokens, mask, with_pixels=False)
            return None, F.cross_entropy(logits, labels, reduction="none"), logits
        seen: list[Tensor] = []

        def of_pixels(*inputs: Tensor) -> Tensor:
            found, logits = network(*inputs)
            seen.append(logits)
            assert found is not None
            return found

        gen = pixels(of_pixels, tokens, numbers)
        return scale * gen, F.cross_entropy(seen[0], labels, reduction="none"), seen[0]

    return losses


def total(finetune: Finetune, gen: Tensor | None, clf: Tensor) -> Tensor:
    """The loss of each image that is minimised: the sum of both (paper 2.3) or one; "gen" gives the head a zero gradient."""
    if finetune.loss == "gen":
        assert gen is not None
        return gen + 0.0 * clf
    return clf if gen is None else gen + clf
