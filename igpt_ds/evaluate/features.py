"""Features: each layer's activations, averaged over the positions of an image (paper 2.4). Written and read here alone.

In: a transformer and shards. A bert model sees the whole image here, with nothing masked. Out: a directory

    manifest.json                     what the features are of, and what a reader must check
    {split}/labels.npy                int64 [N]
    {split}/layer_{l:02d}_{kind}.npy  float32 [N, C], memory-mapped by writer and reader

Kinds: "normed", f^l = mean over i of n^l_i, as the paper writes; "raw", the mean of the residual stream h^l itself; "pixels",
the colours of the image, [N, 3 T] in [-1, 1], which stand as layer 0 and need no model. `tools/extract_features.py` writes,
the probes read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds.data.shards import ShardSet
from igpt_ds.files import atomic_dir, read_json, write_json
from igpt_ds.model.store import fresh_model, load_model, read_info
from igpt_ds.model.transformer import Transformer

FORMAT, VERSION = "igpt_ds.features", 1
KINDS = ("normed", "raw")
PRECISIONS = ("fp32", "bf16")
_AGAIN = "make them again with tools/extract_features.py"

Pooled = Iterator[tuple[int, str, np.ndarray]]  # layer, kind, float32 [B, C]


@dataclass(frozen=True)
class Origin:
    """What the features are of; goes into the manifest as it is."""

    weights: str  # "trained", "untrained" or "pixels"
    palette_hash: str
    pooling: str = "mean"  # over positions; "none" for pixels
    model_hash: str | None = None  # sha256 of model.safetensors; of the drawn tensors, where they are untrained
    objective: str | None = None
    step: int | None = None  # that the model was trained to
    seed: int | None = None  # that untrained weights were drawn with
    precision: str = "fp32"


# --------------------------------------------------------------------------------------------------- the model


def open_model(model_dir: Path, shards: ShardSet, untrained: int | None = None) -> tuple[Transformer, Origin]:
    """The model of a model dir, or an untrained one of the same shape, if the shards are made for it.

    Args:
        untrained: the seed to draw fresh weights with; None takes the trained ones.

    Raises:
        ValueError: the shards have another n_px or palette.
    """
    info = read_info(model_dir)
    if info.config.n_px != shards.n_px:
        sizes = f"{info.config.n_px}x{info.config.n_px} images, {shards.path} holds {shards.n_px}x{shards.n_px}"
        raise ValueError(f"{model_dir} reads {sizes}; make shards with --n_px {info.config.n_px}")
    if info.palette_hash != shards.palette_hash:
        hashes = f"palette {info.palette_hash[:12]}, {shards.path} was made with {shards.palette_hash[:12]}"
        raise ValueError(f"{model_dir} was trained with {hashes}; make the shards with {model_dir / 'palette.npy'}")
    if untrained is not None:
        model = fresh_model(info.config, untrained, info.objective, info.init)
        return model, Origin("untrained", info.palette_hash, "mean", _hash(model), info.objective, 0, untrained)
    model, info = load_model(model_dir)
    return model, Origin("trained", info.palette_hash, "mean", info.model_hash, info.objective, info.step)


def _hash(model: Transformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- writing


def estimated_bytes(n_images: int, n_features: int, layers: int, kinds: int = len(KINDS)) -> int:
    """The size of the feature files, in bytes."""
    return n_images * n_features * layers * kinds * 4


def pick_device(name: str) -> str:
    """The device for a flag: auto takes a GPU if there is one; a GPU that is asked for and not there is a ValueError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_layers(layers: Sequence[int] | None, n_layer: int) -> list[int]:
    """The layers asked for in rising order, all 0..L for None."""
    if layers is None:
        return list(range(n_layer + 1))
    wrong = [layer for layer in layers if not 0 <= layer <= n_layer]
    if wrong or not layers:
        raise ValueError(f"--layers {' '.join(map(str, wrong))} is not there; the model has layers 0..{n_layer}")
    return sorted(set(layers))


def extract(
    out: Path,
    shard_sets: Sequence[ShardSet],
    model: Transformer,
    origin: Origin,
    *,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] = KINDS,
    batch: int = 32,
    device: str = "cpu",
    precision: str = "fp32",
) -> None:
    """Writes the features of every image of the shard sets, at every layer asked for (all for None).

    Activations are averaged in float32; the batch size changes nothing but the rounding. With precision "bf16" the matrix
    products run in bfloat16 and the residual stream stays float32.

    Raises:
        ValueError: a layer that the model has not, a batch below 1, activations that are not finite, `out` exists.
    """
    model = model.to(device).eval()
    wanted = check_layers(layers, model.config.n_layer)

    def pooled(grids: np.ndarray) -> Pooled:
        tokens = torch.from_numpy(grids.reshape(len(grids), -1)).to(device).long()
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            for layer, (h, n) in enumerate(model.residuals(tokens)):
                if layer in wanted:
                    for kind, activations in (("normed", n), ("raw", h)):
                        if kind in kinds:
                            yield layer, kind, activations.mean(1, dtype=torch.float32).cpu().numpy()
                if layer == wanted[-1]:
                    return  # what lies above is never computed

    about = asdict(origin) | {"precision": precision}
    _write(out, shard_sets, about, wanted, list(kinds), model.config.n_embd, pooled, batch)


def extract_pixels(out: Path, shard_sets: Sequence[ShardSet], batch: int = 256) -> None:
    """Writes the palette colours of every image, [N, 3 T] in [-1, 1]: what a probe sees without any model."""
    colors = shard_sets[0].palette.colors

    def pooled(grids: np.ndarray) -> Pooled:
        yield 0, "pixels", colors[grids].reshape(len(grids), -1)

    about = asdict(Origin("pixels", shard_sets[0].palette_hash, "none"))
    _write(out, shard_sets, about, [0], ["pixels"], 3 * shard_sets[0].n_px ** 2, pooled, batch)


def _write(
    out: Path,
    shard_sets: Sequence[ShardSet],
    about: dict[str, Any],
    layers: list[int],
    kinds: list[str],
    n_features: int,
    pooled: Callable[[np.ndarray], Pooled],
    batch: int,
) -> None:
    if batch < 1:
        raise ValueError(f"--batch {batch} must be at least 1")
    total = sum(shards.n_images for shards in shard_sets)
    with atomic_dir(out) as partial, tqdm(total=total, unit=" images", desc="features", leave=False, disable=None) as bar:
        for shards in shard_sets:
            N = shards.n_images
            (partial / shards.split).mkdir()
            files = {
                (layer, kind): np.lib.format.open_memmap(
                    partial / _file(shards.split, layer, kind), "w+", np.dtype("<f4"), (N, n_features)
                )
                for layer in layers
                for kind in kinds
            }
            for start in range(0, N, batch):
                ids = np.arange(start, min(start + batch, N))
                for layer, kind, values in pooled(shards.tokens(ids)):
                    if not np.isfinite(values).all():
                        raise ValueError(f"layer {layer} is not finite for images of {shards.path}; check the model, or use fp32")
                    files[layer, kind][start : start + len(ids)] = values
                bar.update(len(ids))
            for file in files.values():
                file.flush()
            np.save(partial / shards.split / "labels.npy", shards.labels(np.arange(N)).astype("<i8"))
        manifest = {"format": FORMAT, "version": VERSION, "dataset": shard_sets[0].name, **about}
        splits = {shards.split: {"n_images": shards.n_images, "dataset_hash": shards.dataset_hash} for shards in shard_sets}
        shape = {"layers": layers, "kinds": kinds, "n_features": n_features}
        write_json(partial / "manifest.json", manifest | shape | {"splits": splits, "classes": list(shard_sets[0].classes)})


def _file(split: str, layer: int, kind: str) -> str:
    return f"{split}/layer_{layer:02d}_{kind}.npy"


# --------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class FeatureSet:
    """One split of a feature directory. `manifest` is the whole manifest."""

    path: Path
    split: str
    manifest: dict[str, Any]
    labels: np.ndarray  # int64 [N]

    @property
    def layers(self) -> list[int]:
        """The layers that are there, rising."""
        return list(self.manifest["layers"])

    @property
    def kinds(self) -> list[str]:
        """The kinds that are there."""
        return list(self.manifest["kinds"])

    @property
    def classes(self) -> list[str]:
        """The names that labels stand for."""
        return list(self.manifest["classes"])

    @property
    def dataset_hash(self) -> str:
        """Of the split that the features are of."""
        return str(self.manifest["splits"][self.split]["dataset_hash"])

    def layer(self, layer: int, kind: str) -> np.ndarray:
        """The features of one layer: a read-only memory map, float32 [N, C].

        Raises:
            ValueError: the layer or the kind is not there, or the file is torn.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind {kind!r} is not there; the features hold {', '.join(self.kinds)}, from {self.path}")
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not there; the features hold layers {span(self.layers)}, from {self.path}")
        return _open_array(self.path / _file(self.split, layer, kind), "<f4", (len(self.labels), self.manifest["n_features"]))


def open_features(path: Path, split: str) -> FeatureSet:
    """Opens one split of a feature directory.

    Raises:
        ValueError: no feature directory, another version, a damaged manifest, no such split, torn labels.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path} is no feature directory: it has no manifest.json; make one with tools/extract_features.py")
    manifest = read_json(file, "feature manifest")
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"feature manifest {file} is not {FORMAT} version {VERSION}; {_AGAIN}")
    missing = [
        name for name in ("layers", "kinds", "n_features", "splits", "classes", *Origin.__annotations__) if name not in manifest
    ]
    if missing:
        raise ValueError(f"feature manifest {file} has no {missing[0]!r}; {_AGAIN}")
    if split not in manifest["splits"]:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    labels = _open_array(path / split / "labels.npy", "<i8", (manifest["splits"][split]["n_images"],))
    return FeatureSet(path, split, manifest, np.asarray(labels))


def _open_array(file: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is missing or torn ({str(error).splitlines()[0]}); {_AGAIN}") from None
    if array.shape != shape or array.dtype != np.dtype(dtype):
        found = f"{array.dtype} {list(array.shape)}, the manifest says {np.dtype(dtype)} {list(shape)}"
        raise ValueError(f"{file} holds {found}; {_AGAIN}")
    return array


def span(layers: Sequence[int]) -> str:
    """Layers in words: "0..8" where none is left out, else "0, 4, 8"."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else ", ".join(map(str, layers))
