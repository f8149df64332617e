"""Saved probes: a fitted linear probe as a safetensors file, which executes nothing when it is read. Only this module writes it.

    weights     float64 [K, C], for standardised features      mean    float64 [C], of the training images' features
    intercepts  float64 [K]                                    scale   float64 [C], 1 / their deviation

The file's metadata holds a sealed JSON object under "igpt_ds": the model, the layers, the classes, the result, and the sha256 of
the tensors. Called by `tools/linear_probe.py --save_probe` and by `evaluate/prediction.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from igpt_ds.errors import InputError, naming, reason
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.features.manifest import DTYPES
from igpt_ds.evaluate.features.network import Network
from igpt_ds.evaluate.probes.linear import Probe
from igpt_ds.evaluate.probes.variants import ConcatProbe
from igpt_ds.files import atomic_file
from igpt_ds.json_files import parse_json
from igpt_ds.model.objectives import draw_of_masks
from igpt_ds.plain_files import check_file
from igpt_ds.provenance import git_commit
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

PROBE = Format("igpt_ds.probe", "saved probe", "make one with tools/linear_probe.py --save_probe", 1, 1, 1)
TENSORS = ("weights", "intercepts", "mean", "scale")
_KEY = "igpt_ds"  # in the metadata
_MAX_BYTES = 1 << 31  # 1,000 classes x 5 layers of iGPT-XL are 0.1 GiB


@dataclass(frozen=True)
class ProbeAbout:
    """What a saved probe is of, and how good it is.

    Attributes:
        labels: the class index of each row of the weights. A class without training images has none.
        precision, dtype: of the features, as in `features/manifest.Origin`.
        mask_prob, mask_seed: of the masks that the images were seen through (paper 4.6); None: the images were whole.
        tensors: the sha256 of the tensors, which `save_probe` computes.
    """

    model_hash: str
    objective: str | None
    step: int | None
    palette_hash: str
    n_px: int
    layers: list[int]
    kind: str
    precision: str
    dtype: str
    classes: list[str]
    labels: list[int]
    protocol: str
    dataset: str
    dataset_hash: dict[str, str]
    train_split: str
    eval_split: str
    n_train: int
    C: float
    seed: int
    held_out_accuracy: float
    accuracy: float
    mask_prob: float | None = None
    mask_seed: int | None = None
    tensors: str = ""
    commit: str | None = None

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0 or self.layers != sorted(set(self.layers)):
            raise InputError(f"layers {self.layers}, which are not rising")
        if len(self.labels) < 2 or self.labels != sorted(set(self.labels) & set(range(len(self.classes)))):
            raise InputError(f"labels {self.labels}, which are not rising indices of {len(self.classes)} classes")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}, which is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True, eq=False)
class SavedProbe:
    """A fitted probe: weights float64 [K, C], intercepts [K], and the scaling of the features, mean and scale [C]."""

    about: ProbeAbout
    weights: np.ndarray
    intercepts: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def check_model(self, model_hash: str, palette_hash: str, where: Path, file: Path) -> None:
        """Refuses another model than that of the fit.

        Raises:
            ValueError: the model has other weights or another palette. `where` names it, `file` the probe.
        """
        of = self.about
        if (model_hash, palette_hash) != (of.model_hash, of.palette_hash):
            raise InputError(
                f"{file} was fitted on the features of another model ({of.model_hash[:12]}) than {where} ({model_hash[:12]}); "
                f"name that model, or fit a probe on this one with tools/linear_probe.py --save_probe"
            )

    def features(self, network: Network, grids: np.ndarray, ids: np.ndarray | None = None, draw: int = 0) -> np.ndarray:
        """The features of some images as the probe reads them: uint16 [B, n_px, n_px] -> float64 [B, C].

        Args:
            ids: the numbers of the images, which decide their masks, as in the extraction; None: from 0 on.
            draw: which of the masks of each image.
        """
        ids = np.arange(len(grids)) if ids is None else ids
        mask = draw_of_masks(self.about.mask_seed or 0, ids, draw, self.about.n_px**2, self.about.mask_prob)
        means = network.pooled(grids, self.about.layers, [self.about.kind], mask)
        layers = [means[layer, self.about.kind].astype(DTYPES[self.about.dtype]) for layer in self.about.layers]
        return np.concatenate(layers, axis=1, dtype=np.float64)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """features [N, C] -> float64 [N, K], one for each of `about.labels`."""
        return np.asarray(((features - self.mean) * self.scale) @ self.weights.T + self.intercepts)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The likeliest class of each image: features [N, C] -> class indices, int64 [N]."""
        return np.array(self.about.labels, dtype=np.int64)[self.logits(features).argmax(1)]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """features [N, C] -> float64 [N, number of classes]; 0 for a class without training images."""
        logits = self.logits(features)
        found = np.zeros((len(logits), len(self.about.classes)))
        found[:, self.about.labels] = torch.from_numpy(logits).softmax(1).numpy()
        return found


def check_savable(features: FeatureSet) -> None:
    """Refuses features whose probe could not be used on new images.

    Raises:
        ValueError: the features do not record the shape of the model.
    """
    if features.manifest.origin.weights == "trained" and "n_px" not in (features.manifest.origin.model or {}):
        raise InputError(f"{features.path} does not record the shape of its model; extract the features again")


def saved_probe(probe: Probe, train: FeatureSet, evaluated: FeatureSet, protocol: str) -> SavedProbe:
    """The probe that `save_probe` writes, of a probe on the features of a trained model."""
    origin, fitted = train.manifest.origin, probe.fitted
    assert fitted is not None
    assert origin.model_hash is not None
    assert origin.model is not None
    tensors = {
        "weights": fitted.fit.weights[0],
        "intercepts": fitted.fit.intercepts[0],
        "mean": fitted.standard.mean,
        "scale": fitted.standard.scale,
    }
    about = ProbeAbout(
        model_hash=origin.model_hash,
        objective=origin.objective,
        step=origin.step,
        palette_hash=origin.palette_hash,
        n_px=origin.model["n_px"],
        layers=probe.layers if isinstance(probe, ConcatProbe) else [probe.layer],
        precision=origin.precision,
        dtype=origin.dtype,
        mask_prob=origin.mask_prob if train.mask_draws else None,
        mask_seed=origin.mask_seed if train.mask_draws else None,
        classes=list(train.classes),
        labels=fitted.fit.classes.tolist(),
        protocol=protocol,
        dataset=train.manifest.dataset,
        dataset_hash={train.split: train.dataset_hash, evaluated.split: evaluated.dataset_hash},
        commit=git_commit(),
        **{
            name: getattr(probe, name)
            for name in ("kind", "train_split", "eval_split", "n_train", "C", "seed", "held_out_accuracy", "accuracy")
        },
    )
    return SavedProbe(about, **tensors)


def save_probe(path: Path, probe: SavedProbe) -> None:
    """Writes a probe, atomically. An older file of that name is replaced."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(probe, name), dtype=np.float64)) for name in TENSORS}
    hashed = _hash({name: tensor.numpy() for name, tensor in tensors.items()})
    text = json.dumps(PROBE.seal(asdict(replace(probe.about, tensors=hashed))))
    with atomic_file(path) as file:
        file.write(save(tensors, {_KEY: text}))


def load_probe(path: Path) -> SavedProbe:
    """Reads a probe.

    Raises:
        ValueError: no such file, no saved probe, another version, or a damaged file.
    """
    where = f"{PROBE.what} {path}"
    content = _content(path, where)
    try:
        tensors = {name: tensor.numpy() for name, tensor in load(content).items() if tensor.dtype == torch.float64}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{where} is not a safetensors file: {' '.join(str(error).split())}; {PROBE.fix}") from None
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")].decode(), where, PROBE.fix)
    metadata = header.get("__metadata__") or {}
    if _KEY not in metadata:
        raise InputError(f"{where} is another safetensors file: its metadata has no {_KEY!r}; {PROBE.fix}")
    about = record_from(ProbeAbout, PROBE.opened(parse_json(metadata[_KEY], where, PROBE.fix), where), where, PROBE.fix)
    if sorted(tensors) != sorted(TENSORS) or len(header) != len(TENSORS) + 1 or _hash(tensors) != about.tensors:
        raise InputError(f"{where} is damaged: the sha256 of its tensors differs; {PROBE.fix}")
    probe = SavedProbe(about, **tensors)
    K, width = len(about.labels), len(probe.mean)
    shapes = [getattr(probe, name).shape for name in TENSORS]
    if shapes != [(K, width), (K,), (width,), (width,)] or width % len(about.layers):
        raise InputError(f"{where} has tensors of shapes {shapes}, which do not fit {K} classes; {PROBE.fix}")
    return probe


def _content(path: Path, where: str) -> bytes:
    check_file(path)
    try:
        with naming(path), open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{where} does not exist; {PROBE.fix}") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {reason(error)}") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"{where} has more than {_MAX_BYTES:,} bytes, so it is none; {PROBE.fix}")
    return content


def _hash(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + np.ascontiguousarray(tensor, dtype="<f8").tobytes())
    return digest.hexdigest()
