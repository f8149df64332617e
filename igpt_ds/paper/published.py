"""The numbers of the paper, as data: its Tables 1 to 5, what Figures 2 to 4 say in words, and where each stands.

M. Chen, A. Radford, R. Child, J. Wu, H. Jun, D. Luan, I. Sutskever, Generative Pretraining from Pixels, ICML 2020 (the second
version of its text). Accuracies and errors in percent. Figures whose points the text does not name are not here: nobody can read
them to the decimal. Nothing is imported but dataclasses. Called by `evaluate/report/tables.py`, `evaluate/likelihood.py` and
`evaluate/report/figures_paper.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """A row of Table 1, 2 or 3, or an accuracy that the text gives beside them."""

    dataset: str  # "cifar10", "cifar100", "stl10" or "imagenet"
    model: str
    accuracy: float
    source: str
    pretraining: str = ""  # on ImageNet: "unsupervised", "supervised", "" for none
    n_px: int | None = None  # of the input; None: the usual resolution of the method
    parameters: float | None = None  # millions
    features: int | None = None  # that the probe sees

    @property
    def ours(self) -> bool:
        """Whether it is of the paper's own models."""
        return self.model.startswith("iGPT")


# Table 1: linear probes; transfer from ImageNet. ResNet-152 is said to be supervised and SimCLR unsupervised in 4.3.
TABLE_1 = (
    Accuracy("cifar10", "ResNet-152", 94.0, "Table 1", "supervised"),
    Accuracy("cifar10", "SimCLR", 95.3, "Table 1", "unsupervised"),
    Accuracy("cifar10", "iGPT-L", 96.3, "Table 1", "unsupervised"),
    Accuracy("cifar100", "ResNet-152", 78.0, "Table 1", "supervised"),
    Accuracy("cifar100", "SimCLR", 80.2, "Table 1", "unsupervised"),
    Accuracy("cifar100", "iGPT-L", 82.8, "Table 1", "unsupervised"),
    Accuracy("stl10", "AMDIM-L", 94.2, "Table 1", "unsupervised"),
    Accuracy("stl10", "iGPT-L", 95.5, "Table 1", "unsupervised"),
)

# Table 2: linear probes on ImageNet. XL's 6801M parameters count 1024 positions; with the 4096 of 64x64 they are 6811M.
TABLE_2 = (
    Accuracy("imagenet", "iGPT-S", 41.9, "4.4", "unsupervised", 32, 76, 512),
    Accuracy("imagenet", "iGPT-M", 54.5, "4.4", "unsupervised", 32, 455, 1024),
    Accuracy("imagenet", "Rotation", 55.4, "Table 2", "unsupervised", None, 86, 8192),
    Accuracy("imagenet", "iGPT-L", 60.3, "Table 2", "unsupervised", 32, 1362, 1536),
    Accuracy("imagenet", "BigBiGAN", 61.3, "Table 2", "unsupervised", None, 86, 8192),
    Accuracy("imagenet", "iGPT-L", 65.2, "Table 2", "unsupervised", 48, 1362, 1536),
    Accuracy("imagenet", "AMDIM", 68.1, "Table 2", "unsupervised", None, 626, 8192),
    Accuracy("imagenet", "MoCo", 68.6, "Table 2", "unsupervised", None, 375, 8192),
    Accuracy("imagenet", "iGPT-XL", 68.7, "Table 2", "unsupervised", 64, 6801, 3072),
    Accuracy("imagenet", "SimCLR", 69.3, "Table 2", "unsupervised", None, 24, 2048),
    Accuracy("imagenet", "CPC v2", 71.5, "Table 2", "unsupervised", None, 303, 8192),
    Accuracy("imagenet", "iGPT-XL", 72.0, "Table 2", "unsupervised", 64, 6801, 15360),
    Accuracy("imagenet", "SimCLR", 76.5, "Table 2", "unsupervised", None, 375, 8192),
)

# Table 3: fine-tuning; and the ImageNet numbers of 4.5, which has no table.
TABLE_3 = (
    Accuracy("cifar10", "AutoAugment", 98.5, "Table 3"),
    Accuracy("cifar10", "SimCLR", 98.6, "Table 3", "unsupervised"),
    Accuracy("cifar10", "GPipe", 99.0, "Table 3", "supervised"),
    Accuracy("cifar10", "iGPT-L", 99.0, "Table 3", "unsupervised"),
    Accuracy("cifar100", "iGPT-L", 88.5, "Table 3", "unsupervised"),
    Accuracy("cifar100", "SimCLR", 89.0, "Table 3", "unsupervised"),
    Accuracy("cifar100", "AutoAugment", 89.3, "Table 3"),
    Accuracy("cifar100", "EfficientNet", 91.7, "Table 3", "supervised"),
    Accuracy("imagenet", "iGPT-L from scratch", 53.2, "4.5", "", 48, 1362),
    Accuracy("imagenet", "iGPT-L", 66.3, "4.5", "unsupervised", 32, 1362),
    Accuracy("imagenet", "Isometric Neural Nets", 70.2, "4.5", "", 28),
    Accuracy("imagenet", "iGPT-L", 72.6, "4.5", "unsupervised", 48, 1362),
)


@dataclass(frozen=True)
class LowData:
    """A row of Table 4: errors in percent on CIFAR-10, mean and standard deviation over 5 subsets, by number of labels."""

    model: str
    errors: dict[int, tuple[float, float]]


TABLE_4 = (
    LowData("Mean Teacher", {250: (32.3, 2.3), 4000: (9.2, 0.2)}),
    LowData("MixMatch", {40: (47.5, 11.5), 250: (11.0, 0.9), 4000: (6.4, 0.1)}),
    LowData("iGPT-L", {40: (26.8, 1.5), 250: (12.4, 0.6), 4000: (5.7, 0.1)}),
    LowData("UDA", {40: (29.0, 5.9), 250: (8.8, 1.1), 4000: (4.9, 0.2)}),
    LowData("FixMatch RA", {40: (13.8, 3.4), 250: (5.1, 0.7), 4000: (4.3, 0.1)}),
    LowData("FixMatch CTA", {40: (11.4, 3.4), 250: (5.1, 0.3), 4000: (4.3, 0.2)}),
)
LABELS = (40, 250, 4000)
# 4.7: iGPT-L fine-tuned on 40 labels instead, accuracy.
FINETUNED_ON_40 = 42.1


@dataclass(frozen=True)
class Rate:
    """A row of Table 5."""

    size: str
    objective: str
    n_px: int
    lr: float


TABLE_5 = (
    Rate("S", "ar", 32, 0.003),
    Rate("M", "ar", 32, 0.003),
    Rate("L", "ar", 32, 0.001),
    Rate("L", "ar", 48, 0.01),
    Rate("XL", "ar", 64, 0.0003),
    Rate("S", "bert", 32, 0.01),
    Rate("M", "bert", 32, 0.003),
    Rate("L", "bert", 32, 0.001),
)

# Figure 3: nats per token of the released models at their last checkpoint (README of openai/image-gpt, "matching Figure 3"), on
# the released arrays of ImageNet's test split: 32x32, central crops.
FIGURE_3_STEPS = (65_000, 131_000, 262_000, 524_000, 1_000_000)
FIGURE_3_NATS = {"S": 2.0895, "M": 2.0614, "L": 2.0466}


@dataclass(frozen=True)
class Bar:
    """A bar of Figure 4, iGPT-L at 32x32, as far as the text gives it (4.4, 4.5, 4.6)."""

    dataset: str
    objective: str
    evaluation: str  # "probe" or "finetune"
    accuracy: float
    source: str
    exact: bool = True  # False: the text gives an approximate difference


FIGURE_4 = (
    Bar("cifar10", "ar", "probe", 96.3, "Table 1"),
    Bar("cifar10", "bert", "probe", 95.3, '4.6: "more than 1% lower"', exact=False),
    Bar("cifar10", "ar", "finetune", 99.0, "Table 3"),
    Bar("cifar10", "bert", "finetune", 98.6, "4.6"),
    Bar("imagenet", "ar", "probe", 60.3, "Table 2"),
    Bar("imagenet", "bert", "probe", 54.3, '4.6: "6% lower"', exact=False),
    Bar("imagenet", "ar", "finetune", 66.3, "4.5"),
    Bar("imagenet", "bert", "finetune", 66.5, "4.6"),
)
