"""What a user gives as images -> tokens int64 [N, T].

An image is a file, a PIL image, an array, a tensor or tokens; folders, shards and lists hold several. Called by `models.py`.
Every fault is an InputError that names the entry and the fix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.api.stored import ShardImages, Shards
from igpt_ds.data.given_images import read_images
from igpt_ds.data.images import DEFAULT_FILTER, decode_image, square
from igpt_ds.data.palette import Palette
from igpt_ds.data.pictures import on_white, picture_pixels
from igpt_ds.errors import InputError, error_text

_CHANNELS = (3, 1, 4)  # RGB, grey, RGBA
_LAYOUTS = "[h, w], [h, w, 3], [h, w, 4], [N, h, w, 3] or [N, h, w, 1]; a tensor may have its channels first"


@dataclass(frozen=True)
class Preparation:
    """How images become the tokens of a model: its size, its palette, and the crop of its training images."""

    n_px: int
    palette: Palette
    crop: str = "none"
    resize_filter: str = DEFAULT_FILTER

    def tokens(self, images: Any) -> np.ndarray:
        """What a user gives -> int64 [N, T].

        Raises:
            ValueError: there is no image, or an entry is not an image; the entry is named.
        """
        if not _is_list(images):
            return self._tokens(images, "images")
        found = []
        for number, image in enumerate(images):
            rows = self._tokens(image, f"images[{number}]")
            if len(rows) != 1:
                raise InputError(f"images[{number}] holds {len(rows)} images; an entry of a list is one image")
            found.append(rows)
        if not found:
            raise InputError("images is empty; give at least one image")
        return np.concatenate(found)

    def checked(self, tokens: Any, name: str = "tokens") -> np.ndarray:
        """Tokens [T], [N, T] or [N, n_px, n_px] -> int64 [N, T]; an InputError if they are not those of the palette."""
        if isinstance(tokens, Shards | ShardImages):
            return self._tokens(tokens, name)
        array, T = _array(_stacked(tokens, name), name), self.n_px**2
        if array.dtype.kind not in "iu":
            raise InputError(f"{name} holds {array.dtype}; tokens are whole numbers, as encode() returns them")
        if array.shape[-2:] == (self.n_px, self.n_px) and T > 1:
            array = array.reshape(*array.shape[:-2], T)
        if array.ndim not in (1, 2) or array.shape[-1] != T:
            colours = "" if name == "tokens" else "; colours are uint8 in 0..255 or floats in [0, 1]"
            raise InputError(f"{name} has shape {list(array.shape)}; tokens of this model are [N, {T}]{colours}")
        array = np.atleast_2d(array).astype(np.int64)
        if not len(array):
            raise InputError(f"{name} is empty; give at least one image")
        if array.min() < 0 or array.max() >= len(self.palette):
            outside = int(array.min() if array.min() < 0 else array.max())
            raise InputError(f"{name} holds {outside}; tokens of this model are 0..{len(self.palette) - 1}")
        return array

    def _tokens(self, image: Any, name: str) -> np.ndarray:
        if isinstance(image, Shards):
            image.check_fits(self.palette.hash, self.n_px)
            return self.checked(image.tokens(), name)
        if isinstance(image, ShardImages):
            return self.checked(image.tokens, name)
        if isinstance(image, str | os.PathLike):
            if "://" in os.fsdecode(image):
                raise InputError(f"{name}: {image} is a URL; images are read from disk, download it first")
            path = Path(image).expanduser()
            return self._of_folder(path) if _is_folder(path) else self._encoded([_read(path, name)])
        if (pixels := picture_pixels(image, name)) is not None:
            return self._encoded([pixels])
        array = _array(image, name)
        if array.dtype.kind in "iu" and array.dtype != np.uint8 and array.ndim <= 2:
            return self.checked(array, name)
        return self._encoded(_pixels(array, isinstance(image, torch.Tensor), name))

    def _of_folder(self, folder: Path) -> np.ndarray:
        options = {"crop": self.crop, "resize_filter": self.resize_filter}
        images = read_images([folder], self.palette, self.n_px, **options)
        images.print_left_out()
        return images.tokens(np.arange(images.n_images)).reshape(images.n_images, -1).astype(np.int64)

    def _encoded(self, images: Iterable[np.ndarray]) -> np.ndarray:
        squares = [square(image, self.n_px, crop=self.crop, resize_filter=self.resize_filter) for image in images]
        return self.palette.encode(np.stack(squares)).reshape(len(squares), -1).astype(np.int64)


def _is_list(images: Any) -> bool:
    """Lists, tuples and generators; not what is one image or one array although it can be iterated."""
    if isinstance(images, list | tuple):
        return not isinstance(images, ShardImages)
    return hasattr(images, "__next__")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long; reading it says so
        return False


def _read(file: Path, name: str) -> np.ndarray:
    try:
        return decode_image(file.read_bytes(), str(file))
    except OSError as error:
        raise InputError(f"{name}: {error_text(error)}") from None


def _array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not hasattr(values, "__array__"):
        kinds = "an array of tokens" if name == "tokens" else "a path, a PIL image, an array, a tensor, or a list of them"
        raise InputError(f"{name} is of type {type(values).__name__}; give {kinds}")
    return np.asarray(values)


def _stacked(tokens: Any, name: str) -> Any:
    """Lists of numbers or of equal arrays as one array; anything else as it is."""
    if not isinstance(tokens, list | tuple):
        return tokens
    try:
        return np.array(tokens)
    except ValueError:
        raise InputError(f"{name} holds rows of different lengths; give an array [N, T]") from None


def _pixels(array: np.ndarray, first: bool, name: str) -> list[np.ndarray]:
    """Colours in one of the layouts -> uint8 [h, w, 3] each.

    Args:
        first: whether channels stand first if the shape allows both, as in tensors.
    """
    array = _as_bytes(array, name)
    if array.ndim == 2:
        array = array[..., None]
    axis = _channel_axis(array.shape, first)
    if array.ndim not in (3, 4) or axis is None or not array.size:
        raise InputError(f"{name} has shape {list(array.shape)}; images are {_LAYOUTS}")
    array = np.moveaxis(array, axis, -1)
    return [_rgb(np.ascontiguousarray(image)) for image in (array if array.ndim == 4 else array[None])]


def _channel_axis(shape: tuple[int, ...], first: bool) -> int | None:
    """The axis of the colours, -1 or -3. RGB is preferred to grey and RGBA."""
    if len(shape) < 3:
        return None
    order = (-3, -1) if first else (-1, -3)
    return next((axis for sizes in (_CHANNELS[:1], _CHANNELS[1:]) for axis in order if shape[axis] in sizes), None)


def _rgb(image: np.ndarray) -> np.ndarray:
    return {1: lambda: image.repeat(3, axis=2), 3: lambda: image, 4: lambda: on_white(image)}[image.shape[2]]()


def _as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is; floats in [0, 1] times 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise InputError(f"{name} holds {array.dtype}; give uint8 in 0..255 or floats in [0, 1]")
    if array.size and not 0 <= array.min() <= array.max() <= 1:  # also for NaN
        low, high = float(array.min()), float(array.max())
        raise InputError(f"{name} holds floats from {low:g} to {high:g}; scale them to [0, 1], or give uint8 in 0..255")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
