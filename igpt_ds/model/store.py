"""The model dir: a trained transformer as three plain files, written by consolidation and read by every offline tool.

config.json holds the shape and what a reader must check; model.safetensors the float32 weights; palette.npy the colours
that the tokens stand for. class_head.safetensors, only after fine-tuning, holds the class head. README.md is the model card.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt_ds.config import OBJECTIVES, ModelConfig
from igpt_ds.errors import InputError, naming
from igpt_ds.files import atomic_dir, sha256_file
from igpt_ds.model.card import CardFacts, write_card
from igpt_ds.model.classifier import CLASS_HEAD, Classifier
from igpt_ds.model.transformer import Transformer
from igpt_ds.plain_files import utf8_path
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

MODEL = Format("igpt_ds.model", "model config", "consolidate the checkpoint again", version=2, sealed=2, oldest=1)
HEAD_FILE = "class_head.safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class ClassHead:
    """The class head of a fine-tuned model, and how it was trained. A value is None if older code did not record it."""

    classes: list[str]
    layer: int  # whose features it reads
    hash: str  # sha256 of its file
    dataset: str | None = None
    dataset_hash: str | None = None
    train_split: str | None = None
    n_train: int | None = None
    start_step: int | None = None  # of pre-training
    start: str | None = None  # model_hash of the pre-trained model; "" for fresh weights
    loss: str | None = None
    gen_scale: str | None = None
    precision: str | None = None
    lr: float | None = None
    batch_images: int | None = None
    seed: int | None = None
    augment_pad: int | None = None
    augment_flip: bool | None = None
    warmup_steps: int | None = None
    clip: float | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The contents of a model dir's config.json. model_hash is the sha256 of model.safetensors."""

    config: ModelConfig
    objective: str  # "ar" or "bert"
    palette_hash: str
    step: int
    images_seen: int
    model_hash: str
    mask_prob: float | None = None  # masking probability of a "bert" model, where known
    init: str = "released"  # how its weights were drawn before the first step, with head_std
    head_std: float = 0.0
    dropout: float = 0.0  # in training; none in use
    weight_decay: float = 0.0
    recipe: str | None = None  # that it was trained by, where known
    crop: str = "none"  # of other images for it, as `data/images.square` does it
    resize_filter: str = "bicubic"
    class_head: ClassHead | None = None  # after fine-tuning


@dataclass(frozen=True)
class WeightStream:
    """Float32 weights that are never all in memory: `blocks(name)` gives one tensor's bytes in order."""

    shapes: Mapping[str, tuple[int, ...]]
    blocks: Callable[[str], Iterable[bytes | memoryview]]


def save_model(
    model_dir: Path,
    weights: dict[str, Tensor] | WeightStream,
    info: Mapping[str, Any],
    palette: Path,
    facts: CardFacts | None = None,
) -> None:
    """Writes a model dir, completely or not at all.

    Args:
        weights: the float32 state dict of a Transformer, or its tensors one at a time.
        info: the fields of ModelInfo except model_hash and class_head's "hash", which are taken from the written files.
        palette: the palette file to carry along. facts: what the model card says beside `info`.
    """
    with atomic_dir(model_dir) as partial:
        if isinstance(weights, WeightStream):
            head, rest = _parted(weights.shapes)
            _stream_file(WeightStream(rest, weights.blocks), partial / "model.safetensors")
            if head:
                _stream_file(WeightStream(head, weights.blocks), partial / HEAD_FILE)
        else:
            if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
                raise InputError(f"{model_dir} would hold weights that are not finite: {wrong[0]!r}; nothing was written")
            head_weights, rest_weights = _parted(weights)
            write_tensors(partial / "model.safetensors", rest_weights)
            if head_weights:
                write_tensors(partial / HEAD_FILE, head_weights)
        if info.get("class_head"):
            info = {**info, "class_head": info["class_head"] | {"hash": sha256_file(partial / HEAD_FILE)}}
        shutil.copyfile(palette, partial / "palette.npy")
        values = {**info, "config": info["config"].to_dict(), "model_hash": sha256_file(partial / "model.safetensors")}
        MODEL.write(partial / "config.json", values)
        write_card(partial, model_dir.resolve().name, values, facts or CardFacts())


def _parted(weights: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The class head, and all other weights."""
    head = {name: weight for name, weight in weights.items() if name == CLASS_HEAD}
    return head, {name: weight for name, weight in weights.items() if name != CLASS_HEAD}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; a failure is an OSError that names the path, as for every other file."""
    path.touch()
    mode = path.stat().st_mode & 0o777  # by the umask; safetensors gives its files 0600
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None
    path.chmod(mode)


def _stream_file(weights: WeightStream, path: Path) -> None:
    """Writes the bytes that safetensors would: the header's length in 8 bytes, the header as JSON, the tensors sorted by name."""
    header, end = {}, 0
    for name in sorted(weights.shapes):
        start, end = end, end + 4 * torch.Size(weights.shapes[name]).numel()
        header[name] = {"dtype": "F32", "shape": list(weights.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for block in weights.blocks(name):
                file.write(block)
        written = file.tell()
    assert written == 8 + len(text) + end


def read_info(model_dir: Path, objective: str | None = None) -> ModelInfo:
    """Reads config.json of a model dir.

    Args:
        objective: the one that the caller needs; None if it takes both.

    Raises:
        ValueError: a field is missing or wrong, the version differs, or the model was trained with the other objective.
    """
    path = model_dir / "config.json"
    info = record_from(ModelInfo, MODEL.read(path), f"model config {path}", MODEL.fix)
    if info.objective not in OBJECTIVES:
        raise InputError(
            f"{path} has objective {info.objective!r}; known: {', '.join(OBJECTIVES)}; read it with the code that wrote it"
        )
    if objective not in (None, info.objective):
        raise InputError(
            f"{model_dir} was trained with objective {info.objective!r}, and this needs {objective!r}; name another model"
        )
    return info


def load_model(model_dir: Path, objective: str | None = None) -> tuple[Transformer, ModelInfo]:
    """The model in float32 on the CPU, in eval mode, with its info.

    Args:
        objective: the one that the caller needs; None if it takes both.

    Raises:
        ValueError: it has the other objective, or its weights are damaged or do not fit its config.
    """
    info = read_info(model_dir, objective)
    path = model_dir / "model.safetensors"
    _check_file(path, info.model_hash)
    _check_layers(path, info.config.n_layer)
    with torch.device("meta"):
        model = Transformer(info.config, objective=info.objective)
    _load(model, [path], model_dir)
    return model.eval(), info


def load_classifier(model_dir: Path) -> tuple[Classifier, ModelInfo]:
    """A fine-tuned model with its class head, in float32 on the CPU, in eval mode; `ModelInfo.class_head` is not None.

    Raises:
        ValueError: it has no class head, or as in `load_model`.
    """
    info = read_info(model_dir)
    if info.class_head is None:
        raise InputError(f"{model_dir} has no class head; fine-tune it with finetune.py first, or give a saved probe")
    files = [model_dir / "model.safetensors", model_dir / HEAD_FILE]
    for path, expected in zip(files, (info.model_hash, info.class_head.hash), strict=True):
        _check_file(path, expected)
    _check_layers(files[0], info.config.n_layer)
    with torch.device("meta"):
        model = Classifier(info.config, len(info.class_head.classes), info.class_head.layer, objective=info.objective)
    _load(model, files, model_dir)
    return model.eval(), info


@contextmanager
def open_weights(model_dir: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yields a function from a weight's name to the weight. It reads one tensor at a time and never holds all of them."""
    with utf8_path(model_dir / "model.safetensors") as path, safe_open(path, framework="pt") as file:
        yield file.get_tensor


def verified_info(model_dir: Path) -> ModelInfo:
    """`read_info`, after the weights were compared with their sha256; raises a ValueError as `load_model` does."""
    info = read_info(model_dir)
    _check_file(model_dir / "model.safetensors", info.model_hash)
    return info


def _check_file(path: Path, expected: str) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist; consolidate the checkpoint again")
    if sha256_file(path) != expected:
        raise InputError(f"{path} is not the file that config.json describes (sha256 differs); consolidate again")


def _check_layers(path: Path, n_layer: int) -> None:
    """Counts the layers of a file before a model of n_layer layers is made: 65,536 take a minute."""
    try:
        with utf8_path(path) as name, safe_open(name, "pt") as file:
            found = sum(name.endswith(".ln_1.weight") for name in file.keys())  # noqa: SIM118, safe_open is no dict
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}; consolidate again") from None
    if found != n_layer:
        where = path.with_name("config.json")
        raise InputError(f"{path} does not fit {where}: it has {found} layers, and n_layer is {n_layer}; consolidate again")


def _read_file(path: Path) -> dict[str, Tensor]:
    with utf8_path(path) as name:
        return load_file(name)


def _load(model: Transformer, files: Iterable[Path], model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    try:
        weights = {name: weight for path in files for name, weight in _read_file(path).items()}
        model.load_state_dict(weights, strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path} does not fit {model_dir / 'config.json'}: {' '.join(str(error).split())}") from None


def load_without_blocks(model_dir: Path) -> tuple[Transformer, ModelInfo]:
    """The model as `load_model` returns it, but the weights of the blocks are meta tensors and stay in the file."""
    info, path = read_info(model_dir), model_dir / "model.safetensors"
    _check_file(path, info.model_hash)
    _check_layers(path, info.config.n_layer)
    with torch.device("meta"):
        model = Transformer(info.config, objective=info.objective)
    for name in ("wte.", "wpe", "sos", "ln_f.", "head."):
        model.load_state_dict({name + end: part for end, part in read_tensors(path, name).items()}, strict=False, assign=True)
    return model.eval(), info


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a model.safetensors whose names start with a prefix, by the rest of their names.

    The file is opened and closed at each call, so that its mapped pages do not stay in the process's memory.
    """
    with utf8_path(path) as utf8, safe_open(utf8, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, safe_open is no dict
        return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}


def fresh_model(
    config: ModelConfig, seed: int, objective: str = "ar", init: str = "released", head_std: float = 0.0
) -> Transformer:
    """An untrained model with the weights that training would start from with this seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config, objective=objective, init=init, head_std=head_std).eval()
