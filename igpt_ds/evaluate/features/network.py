"""Features: the activations of each layer, averaged over the positions of an image (paper 2.4).

Kinds: "normed", f^l = mean over i of n^l_i, as in the paper; "raw", the mean of the residual stream h^l; "pixels", the colours of
the image, [N, 3 T] in [-1, 1], which are layer 0 and need no model. A bert model sees whole images, or images through masks as in
training (paper 4.6).

The network applies one block to some images and averages the layer before the next block. Layers above the last requested one are
not computed. A model that does not fit into memory reads its blocks from the file one at a time.

In: a model dir and token grids. Out: arrays. Called by `extract.py`, which writes them to disk, and by `domain.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from igpt_ds.data.given_images import GivenImages, read_images
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.data.shards.dataset import ImageSet
from igpt_ds.devices import refuse_idle_gpus
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import Origin
from igpt_ds.model.store import ModelInfo, fresh_model, load_model, load_without_blocks, read_info, read_tensors
from igpt_ds.model.transformer import Block, Projection, Transformer

MASK_PROB = 0.15  # paper 2.1, for models without a recorded value

LayerMeans = dict[tuple[int, str], np.ndarray]  # (layer, kind) -> float32 [B, C]


def pick_device(name: str) -> str:
    """The device of a flag: auto takes a GPU if one exists.

    Raises:
        ValueError: cuda without a GPU, or auto beside GPUs that torch cannot use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    if name == "auto":
        refuse_idle_gpus(otherwise="give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_layers(layers: Sequence[int] | None, n_layer: int) -> list[int]:
    """The requested layers in rising order; all layers 0..L for None."""
    if layers is None:
        return list(range(n_layer + 1))
    wrong = [layer for layer in layers if not 0 <= layer <= n_layer]
    if wrong or not layers:
        raise InputError(f"--layers {' '.join(map(str, wrong))} does not exist; the model has layers 0..{n_layer}")
    return sorted(set(layers))


def open_model(
    model_dir: Path, shards: ImageSet, untrained: int | None = None, blocks_elsewhere: bool = False
) -> tuple[Transformer, Origin]:
    """The model of a model dir, or an untrained model of the same shape. The shards must have its n_px and palette.

    Args:
        untrained: seed of fresh weights; None takes the trained weights.
        blocks_elsewhere: leave the weights of the blocks in the file; `Network` reads one block at a time.

    Raises:
        ValueError: the shards have another n_px or palette; the weights are damaged.
    """
    info = read_info(model_dir)
    if info.config.n_px != shards.n_px:
        sizes = f"{info.config.n_px}x{info.config.n_px} images, {shards.path} holds {shards.n_px}x{shards.n_px}"
        raise InputError(f"{model_dir} reads {sizes}; make shards with --n_px {info.config.n_px}")
    if info.palette_hash != shards.palette_hash:
        hashes = f"palette {info.palette_hash[:12]}, {shards.path} was made with {shards.palette_hash[:12]}"
        raise InputError(f"{model_dir} was trained with {hashes}; make the shards with {model_dir / 'palette.npy'}")
    model_palette(model_dir, info)
    origin = Origin("trained", info.palette_hash, objective=info.objective, model=info.config.to_dict())
    origin = replace(origin, mask_prob=(info.mask_prob or MASK_PROB) if info.objective == "bert" else None)
    if untrained is not None:
        model = fresh_model(info.config, untrained, info.objective, info.init, info.head_std)
        return model, replace(origin, weights="untrained", model_hash=_hash(model), step=0, seed=untrained)
    origin = replace(origin, model_hash=info.model_hash, step=info.step)
    return (load_without_blocks if blocks_elsewhere else load_model)(model_dir)[0], origin


def model_palette(model_dir: Path, info: ModelInfo) -> Palette:
    """The palette of a model dir.

    Raises:
        ValueError: it is not the one that the model was trained with.
    """
    palette = load_palette(model_dir / "palette.npy")
    if palette.hash != info.palette_hash:
        raise InputError(f"{model_dir / 'palette.npy'} is not the palette that the model was trained with; consolidate again")
    return palette


def model_images(model_dir: Path, paths: Sequence[Path]) -> GivenImages:
    """Image files and folders as a model sees them, in its palette, size and crop; raises like `read_images`."""
    info = read_info(model_dir)
    palette = model_palette(model_dir, info)
    return read_images(paths, palette, info.config.n_px, crop=info.crop, resize_filter=info.resize_filter)


def _hash(model: Transformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Network:
    """A model on its device. Its blocks are in memory, or in the file `blocks`, from which each is read when it is needed.

    With precision "bf16" the matrix products run in bfloat16 and the residual stream stays float32. On a GPU, and if blocks are
    read from the file, their weights are bfloat16 too; the results are bit-equal. The model is moved and cast in place.
    """

    model: Transformer
    device: str = "cpu"
    precision: str = "fp32"
    blocks: Path | None = None
    batch: int = 32  # images that go through a block together

    def __post_init__(self) -> None:
        self.model.eval()
        for part in self.model.children() if self.blocks else [self.model]:
            if not isinstance(part, nn.ModuleList):
                self._place(part)
        if self.blocks:
            for name in ("wpe", "sos")[: 2 if self.model.objective == "ar" else 1]:
                setattr(self.model, name, nn.Parameter(getattr(self.model, name).data.to(self.device)))

    def _place(self, module: nn.Module) -> None:
        module.to(self.device)
        for part in module.modules():
            if self.precision == "bf16" and isinstance(part, Projection) and (self.device != "cpu" or self.blocks):
                part.to(torch.bfloat16)

    @contextmanager
    def _block(self, layer: int, norm_alone: bool) -> Iterator[Block]:
        block = cast(Block, self.model.blocks[layer])
        if self.blocks is None:
            yield block
            return
        norm = "ln_1." if norm_alone else ""
        tensors = read_tensors(self.blocks, f"blocks.{layer}.{norm}")
        weights = {norm + name: tensor for name, tensor in tensors.items()}
        block.load_state_dict(weights, strict=not norm_alone, assign=True)
        self._place(block.ln_1 if norm_alone else block)
        yield block
        block.to("meta")

    @torch.inference_mode()
    def pooled(self, grids: np.ndarray, layers: Sequence[int], kinds: Sequence[str], mask: Tensor | None = None) -> LayerMeans:
        """The features of some images: uint16 [B, n_px, n_px], mask bool [B, T] or None, rising layers -> float32 [B, C] each."""
        tokens = torch.from_numpy(grids.reshape(len(grids), -1).astype(np.int64)).to(self.device)
        hidden = [None] * -(-len(tokens) // self.batch) if mask is None else mask.to(self.device).split(self.batch)
        found: LayerMeans = {}
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            states = [self.model.embed(*pair) for pair in zip(tokens.split(self.batch), hidden, strict=True)]
            for layer in range(layers[-1] + 1):
                if layer == len(self.model.blocks):
                    self._pool(layer, states, self.model.ln_f, kinds, found)
                    break
                with self._block(layer, norm_alone=layer == layers[-1]) as block:
                    if layer in layers:
                        self._pool(layer, states, block.ln_1, kinds, found)
                    if layer < layers[-1]:  # higher layers are not computed
                        for i, h in enumerate(states):
                            states[i] = block(h)
        return found

    def _pool(self, layer: int, states: list[Tensor], norm: nn.Module, kinds: Sequence[str], found: LayerMeans) -> None:
        for kind in kinds:
            means = [self.model.pooled(norm(h) if kind == "normed" else h) for h in states]
            found[layer, kind] = torch.cat(means).cpu().numpy()
