"""Pixels in and out: image files become uint8 [h, w, 3], squares of n_px; grids of images become one PNG.

The only module that knows PIL. `data/sources.py` reads with it, `data/shards.py` squares with it, sampling saves grids with it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from igpt_ds.files import atomic_file

# How a resized pixel is made of its neighbours; each filter widens with the reduction (antialias). The paper names none.
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
DEFAULT_FILTER = "bicubic"
_SEPARATOR = 128  # the grey of the lines between the images of a grid


def read_image(source: Path | IO[bytes]) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 3], turned upright as its EXIF says.

    Grey, CMYK and palette images become RGB, 16-bit grey keeps its upper 8 bits, transparency is laid over white.

    Raises:
        ValueError: the file cannot be read, is no image, or is so large that it looks like a decompression bomb.
    """
    name = source if isinstance(source, Path) else getattr(source, "name", "stream")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter to pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # decoders meet hostile bytes and raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be read as an image: {reason}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel, where a plain conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")


def fit_to_square(image: np.ndarray, n_px: int, resize_filter: str = DEFAULT_FILTER) -> np.ndarray:
    """The short side scaled to n_px, then the central square: uint8 [h, w, 3] -> [n_px, n_px, 3].

    The paper's evaluation crop (3.1) in one step: no random scale, no random position. An image that is n_px x n_px already
    passes unchanged, so that ready-made small images are not filtered twice.

    Raises:
        ValueError: the filter is unknown, or n_px is not positive.
    """
    if n_px < 1:
        raise ValueError(f"n_px={n_px} must be at least 1")
    if resize_filter not in FILTERS:
        raise ValueError(f"filter {resize_filter!r} is unknown; known: {', '.join(FILTERS)}")
    height, width = image.shape[:2]
    if (height, width) == (n_px, n_px):
        return image
    short = min(height, width)
    size = (round(width * n_px / short), round(height * n_px / short))
    resized = np.asarray(Image.fromarray(image).resize(size, FILTERS[resize_filter]))
    top, left = (size[1] - n_px) // 2, (size[0] - n_px) // 2
    return resized[top : top + n_px, left : left + n_px]


def save_grid(path: Path, images: np.ndarray, columns: int, scale: int = 1) -> None:
    """Writes images, uint8 [N, h, w, 3], row by row into one PNG: each pixel as scale x scale, grey bars between images."""
    n, height, width, _ = images.shape
    assert min(n, columns, scale) > 0
    columns = min(columns, n)
    rows = -(-n // columns)
    bar = max(1, scale // 2)
    cell_height, cell_width = height * scale + bar, width * scale + bar
    canvas = np.full((rows * cell_height + bar, columns * cell_width + bar, 3), _SEPARATOR, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * cell_height + bar, index % columns * cell_width + bar
        canvas[top : top + height * scale, left : left + width * scale] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_file(path) as file:
        Image.fromarray(canvas).save(file, format="PNG")
