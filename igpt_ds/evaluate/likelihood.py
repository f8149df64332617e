"""Likelihood. In: a model and shards. Out: nats per token of each image, and their mean with its standard error.

One number in three units:

    nats per token      the mean negative log-likelihood of a pixel's palette colour, as OpenAI reports it
    bits per token      nats / ln 2
    bits per sub-pixel  bits per token / 3, because one token stands for three colour values

It compares only with results on the same palette, n_px and images. It does not compare with the bits per dimension of models of
raw 8-bit images, because the palette discards most of those bits. The masked nats of a BERT model (paper 2.1) use pixels on all
sides, so they do not compare with those of auto-regressive models.

Batches do not depend on the number of ranks, which take them in turn. Values are float64 and summed in the order of the images.
The result is therefore bit-equal for any number of ranks on equal devices. Another batch size can change the rounding of kernels.
On a CPU, batches of 1 to 13 at widths of 16 to 512 in fp32 and bf16 changed no bit. Called by `tools/evaluate.py` and
`tools/sample.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.config import SIZES, ModelConfig
from igpt_ds.console import count
from igpt_ds.counter_random import random_words
from igpt_ds.data.palette import OPENAI_PALETTE_HASH
from igpt_ds.data.shards.dataset import ImageSet, ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.devices import device_index
from igpt_ds.errors import InputError, error_text
from igpt_ds.evaluate.report.row_types import MeanWithError
from igpt_ds.launcher import map_environment
from igpt_ds.model.objectives import image_loss, token_nats
from igpt_ds.model.transformer import Transformer
from igpt_ds.paper.published import FIGURE_3_NATS
from igpt_ds.sealed import Format

LIKELIHOOD = Format("igpt_ds.likelihood", "likelihood", "make it with tools/evaluate.py --out", version=2, sealed=2, oldest=1)
N_TEST = 50_000  # test images of ImageNet
_DRAWS = 9  # purpose of random words: the seeds of the mask draws


@dataclass(frozen=True)
class LikelihoodSettings:
    """How a likelihood is computed. Masks are drawn only for BERT models, mask_draws times for each image."""

    batch: int = 32
    precision: str = "fp32"  # of the matrix products; the residual stream stays float32
    mask_draws: int = 1
    seed: int = 0
    mask_prob: float = 0.15  # paper 2.1

    def __post_init__(self) -> None:
        for name in ("batch", "mask_draws"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} must lie between 0 and 2^63 - 1")
        if not 0 < self.mask_prob < 1:
            raise InputError(f"--mask_prob {self.mask_prob} must lie between 0 and 1")


def join_ranks(device: str) -> str:
    """Joins the other processes of this launch, if any; returns the device, for "cuda" this rank's GPU. Needs no DeepSpeed."""
    map_environment(os.environ)
    if dist.world_size() > 1:
        dist.join("gloo")  # the ranks exchange a few numbers at the end
    return f"cuda:{device_index(dist.local_rank(), torch.cuda.device_count())}" if device == "cuda" else device


def choose_ids(n_images: int, limit: int | None) -> np.ndarray:
    """`limit` images (None: all), evenly spread over the split, because sources are sorted by class: int64, rising.

    Raises:
        ValueError: limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} must be at least 1")
    n = n_images if limit is None else min(limit, n_images)
    return np.arange(n) * n_images // n


def shard_nats(model: Transformer, shards: ImageSet, ids: np.ndarray, settings: LikelihoodSettings) -> np.ndarray:
    """The nats per token of some images of a split, on every rank: ids int64 [N] -> float64 [N]. Computed on the model's device.

    For a BERT model: of the masked tokens, averaged over the mask draws. Masks depend only on (seed, draw, id, pixel).

    Raises:
        SharedError: on every rank, if a likelihood is not finite or an image is damaged.
    """
    starts = range(0, len(ids), settings.batch)
    bar = tqdm(starts, "likelihood", unit=" batches", leave=False, disable=True if dist.rank() else None)
    mine: dict[int, np.ndarray] = {}
    problem = None
    try:
        for number, start in enumerate(bar):
            if number % dist.world_size() == dist.rank():
                mine[start] = _batch_nats(model, shards, ids[start : start + settings.batch], settings)
    except (InputError, OSError) as error:  # every rank must know it, or the others wait for this one
        problem = error_text(error)
    together: dict[int, np.ndarray] = {}
    for part, complaint in dist.gather_objects((mine, problem)):
        if complaint is not None:
            raise SharedError(complaint)
        together |= part
    return np.concatenate([together[start] for start in starts])


def _batch_nats(model: Transformer, shards: ImageSet, ids: np.ndarray, settings: LikelihoodSettings) -> np.ndarray:
    return token_batch_nats(model, shards.tokens(ids).reshape(len(ids), -1), ids, settings, f"of {shards.path} ")


@torch.inference_mode()
def token_batch_nats(
    model: Transformer, tokens: np.ndarray, ids: np.ndarray, settings: LikelihoodSettings, where: str = ""
) -> np.ndarray:
    """The nats per token of one batch: tokens [B, T], and ids int64 [B], which choose the masks of a BERT model -> float64 [B].

    Args:
        where: the place of the images in an error.

    Raises:
        ValueError: a likelihood is not finite.
    """
    device = model.wpe.device
    batch = torch.from_numpy(tokens).to(device).long()
    total = torch.zeros(len(ids), dtype=torch.float64)
    draws = settings.mask_draws if model.objective == "bert" else 1
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        for seed in _seeds(settings.seed, draws):
            total += image_loss(model.objective, seed, settings.mask_prob)(model, batch, torch.from_numpy(ids)).double().cpu()
    values = (total / draws).numpy()
    if not np.isfinite(values).all():
        wrong = ids[~np.isfinite(values)][0]
        raise InputError(f"the likelihood of image {wrong} {where}is not finite; check the model, or use fp32")
    return values


def _seeds(seed: int, draws: int) -> Iterator[int]:
    """A seed for each draw. With seed + draw, neighbouring seeds would share masks."""
    return map(int, random_words(seed, _DRAWS, np.arange(draws)))


@torch.inference_mode()
def pixel_nats(model: Transformer, tokens: torch.Tensor) -> np.ndarray:
    """The nats of each pixel given those before it: tokens int64 [B, T] -> float32 [B, T], whose mean is `image_nats`.

    Raises:
        ValueError: the model is not auto-regressive, or a likelihood is not finite.
    """
    if model.objective != "ar":
        raise InputError(f"a model of objective {model.objective!r} gives an image no likelihood pixel by pixel")
    nats = token_nats(model(tokens), tokens).cpu().numpy()
    if not np.isfinite(nats).all():
        raise InputError("the likelihood of a pixel is not finite; check the model's weights")
    return nats


@dataclass(frozen=True)
class Summary:
    """The likelihood in three units."""

    nats_per_token: MeanWithError
    bits_per_token: MeanWithError
    bits_per_sub_pixel: MeanWithError


def summarise(nats: np.ndarray) -> Summary:
    """float64 [N], nats per token of each image -> mean and standard error in each unit."""
    N = len(nats)
    mean = math.fsum(nats) / N
    error = math.sqrt(math.fsum((nats - mean) ** 2) / (N - 1) / N) if N > 1 else None
    scales = (1.0, 1 / math.log(2), 1 / (3 * math.log(2)))
    return Summary(*(MeanWithError(mean * scale, None if error is None else error * scale) for scale in scales))


@dataclass(frozen=True)
class MaskSettings:
    """The masks of a BERT model."""

    mask_draws: int
    mask_prob: float
    seed: int


@dataclass(frozen=True)
class Likelihood:
    """What was measured on what: the file of `tools/evaluate.py --out`. No value depends on the number of ranks."""

    commit: str | None
    model_hash: str
    objective: str
    step: int  # of training
    dataset: str
    dataset_hash: str
    palette_hash: str
    split: str
    n_px: int
    n_images: int
    precision: str
    batch: int
    masks: MaskSettings | None  # None: no image is masked
    summary: Summary
    published: float | None  # nats per token of the published model that this one compares with
    published_does_not_apply: list[str]  # why none compares

    def to_dict(self) -> dict[str, object]:
        """The fields of the file, which `LIKELIHOOD` writes."""
        values: dict[str, object] = {}
        for name, value in asdict(self).items():
            values |= value if name == "summary" else {name: value}
        return values


def compare_published(config: ModelConfig, objective: str, shards: ShardSet, n_images: int) -> tuple[str | None, list[str]]:
    """The size of the published model that this one compares with, or None and each failing condition in words.

    The published numbers (`FIGURE_3_NATS`) are of the released arrays. No text says with which filter those were resized, and the
    filter moves nats more than the size of the model does. So only the arrays themselves compare, and no images resized here.

    Args:
        n_images: number of evaluated images.
    """
    own = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    size = next((size for size in FIGURE_3_NATS if SIZES[size.lower()] == own), None)
    index = read_index(shards.path)
    source = index.source or "unknown"
    released = source.startswith("openai:")
    imagenet = source.rpartition("/")[2].rpartition(":")[2] == "imagenet" if released else source.startswith("imagenet:")
    # Test images have the central crop if the training images have random ones.
    crop = "center" if index.crop == "random" and shards.split in ("val", "test") else index.crop or "unknown"
    resized = f"the filter is {index.filter or 'unknown'!r}, and that of the published arrays is not known"
    conditions = {
        f"the objective is {objective!r}, not 'ar'": objective == "ar",
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd} are none of S, M, L": size is not None,
        "the embeddings are tied": not config.tied_embeddings,
        f"n_px is {config.n_px}, not 32": config.n_px == 32,
        f"the palette is {shards.palette.name}, not OpenAI's": shards.palette_hash == OPENAI_PALETTE_HASH,
        f"the images come from {source}, not from ImageNet": imagenet,
        f"the split is {shards.split!r}, not 'test'": shards.split == "test",
        f"the crop is {crop!r}, not 'center'": crop == "center",
        f"{resized} (make_shards.py --source openai: reads them)": released,
        f"measured on {n_images:,} of {count(shards.n_images, 'image')}": n_images == shards.n_images,
        f"the split has {count(shards.n_images, 'image')}, not {N_TEST:,}": shards.n_images == N_TEST,
    }
    failing = [words for words, holds in conditions.items() if not holds]
    return (None if failing else size), failing
