"""`load` and the `Model` it returns: tokens, features, likelihoods, samples and predictions of images, as numpy arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds.api.arguments import check_kind, device_name, layer_list, pixel_filter, precision_name, whole
from igpt_ds.api.encoding import Preparation
from igpt_ds.api.found import FoundModel, best_layer, find_model
from igpt_ds.api.masks import mask_count, masks_of
from igpt_ds.api.predictions import Prediction, class_head, opened_probe, predicted
from igpt_ds.data.given_images import GivenImages
from igpt_ds.errors import InputError
from igpt_ds.evaluate.classification import MASK_SEED
from igpt_ds.evaluate.features.network import Network
from igpt_ds.evaluate.likelihood import LikelihoodSettings, token_batch_nats
from igpt_ds.evaluate.prediction import apply_probe
from igpt_ds.evaluate.probes.settings import N_MASKS
from igpt_ds.model.sampling import Filter, sample
from igpt_ds.plan.costs import parameters


class Model:
    """A trained model. `igpt_ds.load` makes it.

    `images` are a path, a PIL image, an array or a tensor of colours, tokens, `Shards`, or a list of them; `encode` says more.

    Attributes:
        path: where the model was found.
        config: its shape: n_layer, n_head, n_embd, n_px, n_vocab, n_ctx.
        info: what its config.json says: objective, step, images_seen, model_hash, class_head, ...
        palette: the colours of the tokens, float32 [V, 3] in [-1, 1].
        network: the torch module, in eval mode.
        device, dtype: "cpu" or "cuda", and "fp32" or "bf16".
    """

    def __init__(self, found: FoundModel, device: str, dtype: str) -> None:
        self._found = found
        self.path, self.info, self.config = found.path, found.info, found.info.config
        self.device, self.dtype = device, dtype
        self._network = Network(found.network, device, dtype)
        self._prepared = Preparation(self.config.n_px, found.palette, self.info.crop, self.info.resize_filter)
        self._told, self._masked = set[str](), self.info.objective == "bert"

    @property
    def network(self) -> torch.nn.Module:
        """The transformer: tokens int64 [B, T] -> logits [B, T, V]."""
        return self._network.model

    @property
    def palette(self) -> np.ndarray:
        """The colours of the tokens, float32 [V, 3] in [-1, 1]."""
        return self._prepared.palette.colors

    def __repr__(self) -> str:
        shape, info = self.config, self.info
        name = f"{info.recipe} " if info.recipe else ""
        images = f"{shape.n_px}x{shape.n_px} pixels of {shape.n_vocab} colours"
        size = f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}"
        classes = f"; {len(info.class_head.classes)} classes" if info.class_head else ""
        count = f"{parameters(shape, info.objective):,} parameters"
        trained = f"{info.objective}, step {info.step}"
        return f"<igpt_ds.Model {name}{self.path}: {trained}; {images}; {size}, {count}{classes}; {self.device}, {self.dtype}>"

    def encode(self, images: Any) -> np.ndarray:
        """The tokens of images: int64 [N, T]; N is 1 for one image.

        An image is cropped to its central square and resized to n_px, as the training images were. Its EXIF orientation counts,
        and transparent pixels are blended with white. Each pixel becomes the nearest colour of the model's palette.

        Args:
            images: a file; a folder, whose images are taken in the order of their names, subfolders last; a PIL image;
                uint8 [h, w], [h, w, 3] or [h, w, 4]; floats in [0, 1] of these shapes; several as [N, h, w, 3]; a tensor,
                whose channels may stand first; `Shards` or a part of them; or a list of such images.
                Whole numbers of another type than uint8, [T] or [N, T], are tokens already.

        Raises:
            InputError: there is no image, or an entry is not an image.
        """
        return self._prepared.tokens(images)

    def decode(self, tokens: Any) -> np.ndarray:
        """The images of tokens: [N, T], [N, n_px, n_px] or [T] -> uint8 [N, n_px, n_px, 3]."""
        n_px = self.config.n_px
        return self._prepared.palette.decode(self._prepared.checked(tokens).reshape(-1, n_px, n_px))

    def features(
        self,
        images: Any,
        layer: int | str | Sequence[int] = "best",
        kind: str = "normed",
        batch: int = 32,
        progress: bool = False,
        mask_draws: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The features of images, averaged over the positions (paper 2.4): float32 [N, C].

        A BERT model sees each image through masks, as in training (paper 4.6).

        Args:
            layer: 0..n_layer; "best", the layer of the model's best known probe, else the middle one; "all" or a list of
                layers, for [L + 1, N, C] or one [N, C] for each of the list.
            kind: "normed", after the layer norm, as in the paper; "raw", before it.
            batch: images per forward pass.
            progress: show a progress bar.
            mask_draws, seed: masks for each image, whose features are averaged (0: whole images), and their random seed; for
                BERT models only. None: one mask, the first of tools/extract_features.py.
        """
        check_kind(kind)
        masks = masks_of(self.info, mask_count(mask_draws, 1, 0, self._masked, self.path), seed)
        layers = layer_list(self._best_or_middle(kind) if _is_best(layer) else layer, self.config.n_layer)
        wanted, rising, first = sorted(set(layers)), [], 0
        for tokens in self._batches(self.encode(images), batch, progress, "features"):
            drawn = masks(np.arange(first, first + len(tokens)))
            rising.append(np.mean([self._pooled(tokens, wanted, kind, mask) for mask in drawn], axis=0, dtype=np.float32))
            first += len(tokens)
        found = np.concatenate(rising, axis=1)
        if not np.isfinite(found).all():
            raise InputError(f"features of {self.path} are not finite; check the model, or load it with dtype='fp32'")
        return found[0] if isinstance(layer, Integral) or _is_best(layer) else found[[wanted.index(one) for one in layers]]

    def best_layer(self, kind: str = "normed") -> int | None:
        """The layer whose linear probe has the best held-out accuracy; None if no probe of this model is known.

        Probes are rows of `results.jsonl` or `results/*.jsonl`, in the model directory or in the two above it.
        """
        check_kind(kind)
        return best_layer(self.path, self.info, kind)

    def nats(
        self, images: Any, batch: int = 32, mask_draws: int | None = None, seed: int = 0, progress: bool = False
    ) -> np.ndarray:
        """The negative log-likelihood of images in nats per token: float64 [N].

        For a BERT model: of masked tokens given all others, averaged over the masks of each image. These nats do not compare
        with those of an auto-regressive model.

        Args:
            mask_draws, seed: masks for each image, None for one, and their random seed; for BERT models only.
        """
        draws = mask_count(mask_draws, 1, 1, self._masked, self.path)
        whole("batch", batch, 1)
        prob = LikelihoodSettings.mask_prob if self.info.mask_prob is None else self.info.mask_prob
        settings = LikelihoodSettings(batch, self.dtype, draws, whole("seed", seed, 0), prob)
        found, first = [], 0
        for tokens in self._batches(self.encode(images), batch, progress, "likelihood"):
            ids = np.arange(first, first + len(tokens))
            found.append(token_batch_nats(self._network.model, tokens, ids, settings))
            first += len(tokens)
        return np.concatenate(found)

    def sample(
        self,
        n: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """New images: uint8 [n, n_px, n_px, 3]. A seed gives the same images in batches of any size.

        Args:
            temperature: divides the logits.
            top_k: sample among the k likeliest colours only.
            top_p: sample among the fewest colours whose probabilities sum to this.
        """
        whole("n", n, 1)
        return self._drawn(np.zeros((n, 0), dtype=np.int64), seed, pixel_filter(temperature, top_k, top_p), batch, progress)

    def complete(
        self,
        images: Any,
        keep: float = 0.5,
        n: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        batch: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """Completions of images whose upper rows are kept: uint8 [N * n, n_px, n_px, 3]; those of one image stand together.

        Args:
            keep: the part of the rows that is kept, between 0 and 1.
            n: completions of each image.
            temperature: divides the logits.
        """
        n_px = self.config.n_px
        whole("n", n, 1)
        if not isinstance(keep, Real) or not 0 < keep < 1:
            raise InputError(f"keep={keep!r} must lie between 0 and 1; 0.5 keeps the upper half, and sample() needs no image")
        if not (rows := int(keep * n_px + 1e-9)):
            raise InputError(f"keep={keep} is less than one row of {n_px}; use at least {1 / n_px:g}")
        tokens = self.encode(images)
        prefixes = np.tile(tokens[:, : rows * n_px], (n, 1))
        drawn = self._drawn(prefixes, seed, pixel_filter(temperature), batch, progress)
        return drawn.reshape(n, len(tokens), *drawn.shape[1:]).swapaxes(0, 1).reshape(drawn.shape)

    def predict(
        self,
        images: Any,
        probe: str | os.PathLike[str] | None = None,
        mask_draws: int | None = None,
        batch: int = 32,
        progress: bool = False,
    ) -> Prediction:
        """The classes of images by the class head of a fine-tuned model, or by a saved probe.

        Args:
            probe: file of tools/linear_probe.py --save_probe that was fitted on this model; None takes the class head.
            mask_draws: masks of each image that vote, None for five; for BERT models only.

        Raises:
            InputError: the model was not fine-tuned, or the probe is of another model.
        """
        if probe is not None:
            saved = opened_probe(self._found, self.dtype, probe)
            draws = mask_count(mask_draws, N_MASKS, 1, saved.about.mask_prob is not None, Path(probe))
            whole("batch", batch, 1)
            found = apply_probe(saved, replace(self._network, batch=batch), self._given(self.encode(images)), draws, progress)
            return Prediction(found.labels, found.probabilities.astype(np.float32), found.classes)
        head, logits, first = class_head(self._found), [], 0
        masks = masks_of(self.info, mask_count(mask_draws, N_MASKS, 1, self._masked, self.path), MASK_SEED)
        for tokens in self._batches(self.encode(images), batch, progress, "predict"):
            drawn = masks(np.arange(first, first + len(tokens)))
            logits.append(torch.stack([head.logits(self._pooled(tokens, [head.layer], head.kind, mask)[0]) for mask in drawn]))
            first += len(tokens)
        return predicted(torch.cat(logits, dim=1), head.classes)

    def _given(self, tokens: np.ndarray) -> GivenImages:
        grids = tokens.reshape(-1, self.config.n_px, self.config.n_px).astype(np.uint16)
        return GivenImages(grids, self._prepared.palette, [str(number) for number in range(len(grids))], path=self.path)

    def _best_or_middle(self, kind: str) -> int:
        best, middle = self.best_layer(kind), self.config.n_layer // 2
        if best is not None:
            return best
        if kind not in self._told:
            self._told.add(kind)
            said = f"layer='best' takes the middle layer, {middle} of 0..{self.config.n_layer}"
            print(f"no probe of {kind} features of {self.path} is known; {said}; name a layer to choose", file=sys.stderr)
        return middle

    def _pooled(self, tokens: np.ndarray, layers: list[int], kind: str, mask: torch.Tensor | None = None) -> np.ndarray:
        """Tokens [B, T], rising layers -> float32 [number of layers, B, C]."""
        network = replace(self._network, batch=len(tokens))
        found = network.pooled(tokens, layers, [kind], mask)
        return np.stack([found[layer, kind] for layer in layers])

    def _drawn(self, prefix: np.ndarray, seed: int, filter: Filter, batch: int, progress: bool) -> np.ndarray:
        """Prefixes [N, P] completed to images uint8 [N, n_px, n_px, 3]."""
        if self.info.objective != "ar":
            raise InputError(f"{self.path} is a {self.info.objective!r} model, which cannot sample; load an auto-regressive one")
        whole("seed", seed, 0)
        filter.check(self.config.n_vocab)
        generator = torch.Generator().manual_seed(int(seed))
        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        T, P, drawn = self.config.n_ctx, prefix.shape[1], []
        for part in self._batches(prefix, batch, False, ""):
            positions = tqdm(range(P, T), "sample", unit=" pixels", leave=False, disable=not progress)
            given = torch.from_numpy(np.ascontiguousarray(part)).to(self.device)
            drawn.append(sample(self._network.model, given, generator, filter, progress=positions, dtype=dtype).cpu().numpy())
        return self.decode(np.concatenate(drawn))

    def _batches(self, tokens: np.ndarray, batch: int, progress: bool, what: str) -> Iterator[np.ndarray]:
        whole("batch", batch, 1)
        for start in tqdm(range(0, len(tokens), batch), what, unit=" batches", leave=False, disable=not progress):
            yield tokens[start : start + batch]


def _is_best(layer: object) -> bool:
    return isinstance(layer, str) and layer == "best"


def load(path: str | os.PathLike[str], device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Model:
    """Loads a trained model.

    Args:
        path: a model dir; a run dir, whose `model/` is taken, else its newest complete checkpoint (the best one of a
            fine-tuning); a checkpoint; an ImageGPT directory of Hugging Face; or a directory with one model in it.
        device: "cpu" or "cuda"; None or "auto" takes a GPU if one exists, else the CPU.
        dtype: "fp32", the default, or "bf16"; torch.float32 and torch.bfloat16 too.

    Raises:
        InputError: there is no model, or it is damaged; the device or the dtype does not exist.
    """
    chosen, precision = device_name(device), precision_name(dtype)
    return Model(find_model(path), chosen, precision)
