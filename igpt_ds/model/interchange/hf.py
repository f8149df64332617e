"""Reads and writes the weights of HF transformers' ImageGPT; transformers itself is not needed.

In: an HF directory; out: an `ImportedModel`, whose weights are the state dict of our Transformer. `write_hf` goes the other way.
Called by tools/import_hf.py and tools/export_hf.py; tools/import_openai.py gets its `ImportedModel` from openai.py.

| ours                      | HF (Conv1D weights are [in, out])          |
|---------------------------|--------------------------------------------|
| wte.weight [V, C]         | transformer.wte.weight[:V]                 |
| sos [C]                   | transformer.wte.weight[V]                  |
| wpe [T, C]                | transformer.wpe.weight                     |
| blocks.i.ln_1, ln_2       | transformer.h.i.ln_1, ln_2                 |
| blocks.i.attn.c_attn      | transformer.h.i.attn.c_attn, transposed    |
| blocks.i.attn.c_proj      | transformer.h.i.attn.c_proj, transposed    |
| blocks.i.mlp.c_fc, c_proj | transformer.h.i.mlp.c_fc, c_proj, transposed |
| ln_f.weight [C]           | transformer.ln_f.weight                    |
| head.weight [V, C]        | lm_head.weight                             |
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_ds.config import ModelConfig, Size
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_dir, sha256_file
from igpt_ds.json_files import read_json, write_json
from igpt_ds.model.store import save_model, write_tensors
from igpt_ds.plain_files import check_file, utf8_path

# The defaults of ImageGPTConfig, and the only values that our arithmetic supports.
_HF_ARITHMETIC = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": False,
}
_HF_SHAPE = {"n_layer": 24, "n_head": 8, "n_embd": 512, "n_positions": 1024, "vocab_size": 513}
_CONV1D = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 1}  # -> output width in units of C


@dataclass(frozen=True)
class ImportedModel:
    """A model of another project.

    weights: float32 state dict of a Transformer(config, objective=objective). colors: float32 [V, 3] in [-1, 1], if the format
    has them. step, images_seen: 0 if unknown. files: those that the weights were read from. mask_prob: of BERT.
    """

    config: ModelConfig
    objective: str
    weights: dict[str, Tensor]
    colors: np.ndarray | None
    step: int
    images_seen: int
    files: list[Path]
    mask_prob: float | None = None


def save_imported(model_dir: Path, imported: ImportedModel, palette: Path, palette_hash: str) -> None:
    """Writes a model dir. Its config.json lists the files of the weights under "source", with their sha256."""
    info = {
        "config": imported.config,
        "objective": imported.objective,
        "mask_prob": imported.mask_prob,
        "palette_hash": palette_hash,
        "step": imported.step,
        "images_seen": imported.images_seen,
        "source": {file.name: sha256_file(file) for file in imported.files},
    }
    save_model(model_dir, imported.weights, info, palette)


# --------------------------------------------------------------------------------------------------- HF, written


def write_hf(directory: Path, config: ModelConfig, weights: dict[str, Tensor], colors: np.ndarray, dropout: float = 0.0) -> None:
    """Writes what `ImageGPTForCausalImageModeling` and `ImageGPTImageProcessor` load with from_pretrained.

    Args:
        weights: state dict of an auto-regressive Transformer(config).
        colors: the palette, float32 [V, 3] in [-1, 1].
        dropout: of its training, which takes effect with .train() at the same places (model/dropout.py).

    Tied embeddings are written twice, exactly: HF's wte has a row more than its head, for sos, so HF cannot tie them.

    Raises:
        ValueError: the weights are those of a BERT model (without sos), which HF does not have, or the directory exists.
    """
    if "sos" not in weights:
        raise InputError("a BERT model has no sos and sees all pixels; HF's ImageGPT is causal and cannot represent it")
    V = config.n_vocab
    names = {"architectures": ["ImageGPTForCausalImageModeling"], "model_type": "imagegpt", "dtype": "float32"}
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": None}
    drops = {"attn_pdrop": 0.0, "embd_pdrop": dropout, "resid_pdrop": dropout}  # always written: HF's default is 0.1
    sizes = {"n_positions": config.n_ctx, "vocab_size": V + 1}
    # transformers 4.42 to 5.20 divides scores by int(sqrt(D)), 11 for M's 11.31 and 9 for L's 9.80, except in this mode. It is
    # correct in every version, and in float32 the arithmetic is the same.
    root = math.isqrt(config.n_embd // config.n_head)
    scale = {"reorder_and_upcast_attn": root * root * config.n_head != config.n_embd}
    processor = {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": colors.astype(np.float64).tolist(),  # decimal digits that give the same float32 back
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,  # bilinear, as in HF's own copies of the released models
        "size": {"height": config.n_px, "width": config.n_px},  # the class's default is 256
    }
    with atomic_dir(directory) as partial_dir:
        write_tensors(partial_dir / "model.safetensors", _weights_to_hf(config, weights), {"format": "pt"})
        write_json(partial_dir / "config.json", names | shape | sizes | drops | _HF_ARITHMETIC | scale)
        write_json(partial_dir / "preprocessor_config.json", processor)


def _weights_to_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "transformer.wte.weight": torch.cat([weights["wte.weight"], weights["sos"][None]]),
        "transformer.wpe.weight": weights["wpe"],
        "transformer.ln_f.weight": weights["ln_f.weight"],
        "lm_head.weight": weights["wte.weight" if config.tied_embeddings else "head.weight"],
    }
    for i in range(config.n_layer):
        for name in ("ln_1", "ln_2"):
            out[f"transformer.h.{i}.{name}.weight"] = weights[f"blocks.{i}.{name}.weight"]
        for name, width in _CONV1D.items():
            out[f"transformer.h.{i}.{name}.weight"] = weights[f"blocks.{i}.{name}.weight"].T.contiguous()
            out[f"transformer.h.{i}.{name}.bias"] = torch.zeros(width * config.n_embd)
    return out


# --------------------------------------------------------------------------------------------------- HF, read


def read_hf(directory: Path) -> ImportedModel:
    """Reads an ImageGPT directory: config.json, preprocessor_config.json, model.safetensors or pytorch_model.bin, also in shards.

    Raises:
        ValueError: a file is missing, damaged, or holds code; the config or a tensor needs a feature that our model does not
            have (a nonzero bias, another activation, tied embeddings), which is named; the colours are not a palette.
    """
    path = directory / "config.json"
    config = _hf_config(read_json(path, "HF config"), path)
    tensors, files = _hf_tensors(directory)
    return ImportedModel(config, "ar", _weights_from_hf(tensors, config, directory), _hf_colors(directory, config), 0, 0, files)


def _hf_config(values: Any, path: Path) -> ModelConfig:
    if not isinstance(values, dict) or values.get("model_type") != "imagegpt":
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise InputError(f"{path}: model_type={kind!r}; only HF's 'imagegpt' can be imported")
    for name, ours in _HF_ARITHMETIC.items():
        if values.get(name, ours) != ours:
            raise InputError(f"{path}: {name}={values[name]!r} is not what this project's model computes; it needs {ours!r}")
    shape = {name: values.get(name, default) for name, default in _HF_SHAPE.items()}
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: {name}={value!r} must be a whole number of at least 1")
    if values.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise InputError(f"{path}: n_inner={values['n_inner']!r}; this project's MLP is 4 x n_embd = {4 * shape['n_embd']} wide")
    sizes = Size(n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"])
    return shape_of(sizes, shape["n_positions"], shape["vocab_size"] - 1, path)


def shape_of(sizes: Size, n_ctx: int, n_vocab: int, path: Path) -> ModelConfig:
    """The ModelConfig of n_layer, n_head, n_embd in `sizes`, n_ctx positions and n_vocab colours; ValueError names `path`."""
    n_px = math.isqrt(n_ctx)
    if n_px * n_px != n_ctx:
        raise InputError(f"{path}: {n_ctx} positions are no square image")
    try:
        return ModelConfig(**sizes, n_px=n_px, n_vocab=n_vocab)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


Tensors = dict[str, Callable[[], Tensor]]  # name -> reads the tensor


def _hf_tensors(directory: Path) -> tuple[Tensors, list[Path]]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).exists():
            return _open_tensors(directory / name), [directory / name]
        index = directory / f"{name}.index.json"
        if index.exists():
            return _open_shards(index)
    raise InputError(f"{directory} holds neither model.safetensors nor pytorch_model.bin, nor an index of their shards")


def _open_shards(index: Path) -> tuple[Tensors, list[Path]]:
    values = read_json(index, "index of shards")
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no 'weight_map'; download it again")
    foreign = [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise InputError(f"{index} names {foreign[0]!r}, which is not a file beside it")
    files = {name: _open_tensors(index.parent / name) for name in sorted(set(places.values()))}
    missing = [name for name, file in places.items() if name not in files[file]]
    if missing:
        raise InputError(f"{index.parent / places[missing[0]]} does not hold {missing[0]!r}, as {index.name} says; download both")
    return {name: files[file][name] for name, file in places.items()}, [index.parent / name for name in files]


def _open_tensors(path: Path) -> Tensors:
    if not path.is_file():
        raise InputError(f"{path} is missing or not a file; download it again")
    check_file(path)
    if path.suffix == ".safetensors":
        try:
            with utf8_path(path) as name:
                file = safe_open(name, "pt")
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or cut short: {error}; download it again") from None
        return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - safe_open cannot be iterated
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} is damaged, or would run code when opened; only plain tensors are read") from None
    except Exception as error:  # torch raises a dozen kinds on damaged bytes
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise InputError(f"{path} is damaged or cut short: {reason}; download it again") from None
    if not isinstance(values, dict) or not all(type(name) is str and isinstance(values[name], Tensor) for name in values):
        raise InputError(f"{path} is not a state dict of tensors")
    return {name: partial(values.__getitem__, name) for name in values}


def _weights_from_hf(tensors: Tensors, config: ModelConfig, directory: Path) -> dict[str, Tensor]:
    C, V, left = config.n_embd, config.n_vocab, dict(tensors)

    def take(name: str, *shape: int) -> Tensor:
        if name not in left:
            raise InputError(f"{directory} has no tensor {name!r}; only a whole ImageGPTForCausalImageModeling can be imported")
        tensor = left.pop(name)()
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise InputError(f"{directory}: {name!r} is {found}; by config.json it must hold numbers of shape {list(shape)}")
        return tensor.float()

    table = take("transformer.wte.weight", V + 1, C)
    weights = {
        "wte.weight": table[:V].clone(),
        "sos": table[V].clone(),
        "wpe": take("transformer.wpe.weight", config.n_ctx, C),
    }
    for i in range(config.n_layer):
        for name in ("ln_1", "ln_2"):
            weights[f"blocks.{i}.{name}.weight"] = take(f"transformer.h.{i}.{name}.weight", C)
        for name, width in _CONV1D.items():
            n_in, foreign = (4 * C if name == "mlp.c_proj" else C), f"transformer.h.{i}.{name}"
            weights[f"blocks.{i}.{name}.weight"] = take(f"{foreign}.weight", n_in, width * C).T.contiguous()
            if f"{foreign}.bias" in left and take(f"{foreign}.bias", width * C).any():
                raise InputError(f"{directory}: '{foreign}.bias' is not zero; this project's model, like OpenAI's, has no biases")
        _drop_masks(left, f"transformer.h.{i}.attn", directory)
    weights["ln_f.weight"] = take("transformer.ln_f.weight", C)
    weights["head.weight"] = take("lm_head.weight", V, C)
    if left:
        raise InputError(f"{directory}: {min(left)!r} is a tensor that this project's model does not have")
    return weights


def _drop_masks(left: Tensors, attention: str, directory: Path) -> None:
    """Older files hold the causal mask as `attn.bias` [1, 1, T, T] and a constant, `attn.masked_bias`: neither is a weight."""
    left.pop(f"{attention}.masked_bias", None)
    if f"{attention}.bias" in left:
        mask = left.pop(f"{attention}.bias")()
        square = mask.ndim == 4 and mask.dtype in (torch.bool, torch.uint8)
        if not square or not torch.equal(mask.bool()[0, 0], torch.ones(mask.shape[2:], dtype=torch.bool).tril()):
            raise InputError(f"{directory}: '{attention}.bias' is no causal mask [1, 1, T, T]; the attention has no bias itself")


def _hf_colors(directory: Path, config: ModelConfig) -> np.ndarray | None:
    path = directory / "preprocessor_config.json"
    values = read_json(path, "HF processor") if path.exists() else {}
    clusters = values.get("clusters") if isinstance(values, dict) else None
    if clusters is None:
        return None
    try:
        colors = np.array(clusters, dtype=np.float64).astype(np.float32)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{path}: 'clusters' is not a list of colours") from None
    if colors.shape != (config.n_vocab, 3):
        shape = f"{list(colors.shape)}; config.json's vocab_size asks for {[config.n_vocab, 3]}"
        raise InputError(f"{path}: 'clusters' has shape {shape}, and one token more for sos")
    if not -1 <= colors.min() < 0 or not colors.max() <= 1:  # also true for NaN
        low, high = colors.min(), colors.max()
        raise InputError(f"{path}: 'clusters' lies in [{low:g}, {high:g}], not in [-1, 1] as pixel / 127.5 - 1 does")
    return colors
