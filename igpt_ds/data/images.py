"""Pixels in: an image file's bytes become uint8 [h, w, 3], then squares of n_px.

Only this module uses PIL and simplejpeg to read images. `tools/fit_palette.py` and the shard writer decode and crop with it. The
same bytes give the same pixels on every machine and any number of threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from igpt_ds.data.left_out import EMPTY, TOO_LARGE, UNDECODABLE, BadImageError
from igpt_ds.data.png import without_notes
from igpt_ds.errors import InputError
from igpt_ds.plain_files import pointer

# Resizing filters; each one widens with the reduction (antialias). The paper names none.
# Bicubic is the default: it keeps edges sharper than bilinear, and lanczos rings at 32 px.
FILTERS, DEFAULT_FILTER = ("bicubic", "bilinear", "box", "lanczos"), "bicubic"
_TORCH_FILTERS = ("bicubic", "bilinear")  # several times PIL's speed, within one grey level of columns first

# none: web images and small images; center: the paper's evaluation; random: its training augmentation (3.1).
CROPS = ("none", "center", "random")
CROP_PX = 224  # side of the paper's crops
SHORT_SIDES = (256, 384)  # the short side before a random crop, both ends included
_MAX_ASPECT = 16  # a longer image is cut to this ratio before it is resized

# What PIL may read. Not EPS, for which PIL runs Ghostscript, nor formats that no camera, scanner or web page writes.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "ICNS", "QOI", "TGA",
            "DDS", "PCX", "SGI", "PSD", "XBM", "XPM", "SUN")  # fmt: skip
_EXIF_ORIENTATION = 0x0112  # tag 274; nothing else of the metadata counts
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, name: str = "image", max_pixels: int | None = None) -> np.ndarray:
    """Decodes an image file's bytes to uint8 [h, w, 3], in the orientation of its EXIF.

    Grey, CMYK and palette images become RGB, 16-bit grey keeps its upper 8 bits, transparent pixels are blended with white.
    simplejpeg decodes JPEGs in RGB or grey to the same bits as PIL. PIL decodes all other images, and those that simplejpeg
    refuses. An image of more than max_pixels pixels (default: PIL's limit) may be a decompression bomb.

    Raises:
        BadImageError: the bytes are not an image, the image is truncated, or it is larger than max_pixels.
    """
    why = UNDECODABLE
    try:
        with warnings.catch_warnings(), _limit(max_pixels):
            warnings.simplefilter("ignore")  # odd metadata does not matter to pixels; size is checked below
            with Image.open(io.BytesIO(without_notes(data)), formats=_formats()) as image:
                _refuse_bomb(image.size)
                pixels = _jpeg_pixels(data, image)
                return np.array(as_rgb(upright(image))) if pixels is None else pixels
    except UnidentifiedImageError:
        found = f"it is {known}" if (known := pointer(data)) else "its bytes are of no known format"
        reason, why = (found, why) if data else ("it is empty", EMPTY)
    except Image.DecompressionBombError as error:
        fix = "if it is no bomb, set --max_pixels of make_shards.py or --max_image_pixels of fit_palette.py"
        reason, why = f"{error}; {fix}", TOO_LARGE
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise BadImageError(f"{name} cannot be read as an image: {reason}", why)


@contextmanager
def _limit(max_pixels: int | None) -> Iterator[None]:
    """PIL's own limit of pixels, which holds for this process."""
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = max_pixels or before
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF needs a library that older wheels of Pillow lack


def _refuse_bomb(size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:  # PIL only warns up to twice this limit
        text = f"its {size[0]} x {size[1]} pixels are more than {limit}, like a decompression bomb's"
        raise Image.DecompressionBombError(text)


def _jpeg_pixels(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels by simplejpeg, or None if PIL must decode. `image` is opened from the same bytes and not loaded yet."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if "exif" in image.info and _turn(image) is not None:  # parsing the EXIF costs a third of a small decode
        return None
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if (width, height) != image.size:  # decode only the size that passed the check
            return None
        if image.mode == "RGB":
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
        return np.repeat(simplejpeg.decode_jpeg(data, "GRAY", strict=True), 3, axis=2)
    except ValueError:  # strict refuses e.g. bytes between markers, which PIL ignores; PIL refuses truncated files
        return None


def upright(image: Image.Image) -> Image.Image:
    """The image in the orientation of its EXIF; the orientation is removed from its metadata."""
    image.load()  # a TIFF turns itself here, and forgets its tag
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF orientation asks for; malformed metadata asks for nothing."""
    for note in ("xmp", "XML:com.adobe.xmp"):  # PIL would look for an orientation there, as other readers do not
        image.info.pop(note, None)
    try:
        return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the parser raises nearly anything
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, as `decode_image` says; an InputError if its pixels have no known range."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # PIL scales a PPM's numbers to 16 bits
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise InputError(f"it holds {kind} pixels of unknown range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel, where a plain conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")


def square(
    image: np.ndarray,
    n_px: int,
    *,
    crop: str = "none",
    resize_filter: str = DEFAULT_FILTER,
    seed: int = 0,
    key: str = "",
    view: int = 0,
) -> np.ndarray:
    """Crops and resizes as in the paper (3.1): uint8 [h, w, 3] -> [n_px, n_px, 3].

    crop "none": the short side to n_px, then the central square; an image of n_px x n_px passes unchanged.
    crop "center": the short side to 224, the central 224 x 224, then to n_px.
    crop "random": the short side to a uniform draw of 256..384, a uniform 224 x 224 window, then to n_px. The draws depend
    on (seed, key, view) alone, so neither the order nor the worker changes a view. Images are not mirrored here.

    Sides round half to even. If a central crop has an odd remainder, the extra pixel is cut at the right or the bottom. If one
    side is more than 16 times the other, its ends are cut off first.

    Raises:
        ValueError: the crop or the filter is unknown, or n_px is not positive.
    """
    if n_px < 1:
        raise InputError(f"n_px={n_px} must be at least 1")
    if resize_filter not in FILTERS:
        raise InputError(f"filter {resize_filter!r} is unknown; known: {', '.join(FILTERS)}")
    if crop not in CROPS:
        raise InputError(f"crop {crop!r} is unknown; known: {', '.join(CROPS)}")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    image = _without_ends(image)
    if crop == "none":
        return _central(_to_short_side(image, n_px, resize_filter), n_px)
    if crop == "center":
        window = _central(_to_short_side(image, CROP_PX, resize_filter), CROP_PX)
    else:
        window = _random_window(image, resize_filter, _draws(seed, key, view))
    return _to_short_side(window, n_px, resize_filter)


def _without_ends(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) <= longest:
        return image
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[top : top + longest, left : left + longest]


def _to_short_side(image: np.ndarray, short: int, resize_filter: str) -> np.ndarray:
    height, width = image.shape[:2]
    now = min(height, width)
    return image if now == short else _resize(image, round(height * short / now), round(width * short / now), resize_filter)


def _central(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _random_window(image: np.ndarray, resize_filter: str, draws: tuple[int, int, int]) -> np.ndarray:
    low, high = SHORT_SIDES
    image = _to_short_side(image, low + _below(draws[0], high - low + 1), resize_filter)
    height, width = image.shape[:2]
    top, left = _below(draws[1], height - CROP_PX + 1), _below(draws[2], width - CROP_PX + 1)
    return image[top : top + CROP_PX, left : left + CROP_PX]


def _draws(seed: int, key: str, view: int) -> tuple[int, int, int]:
    """Three 64-bit numbers. JSON distinguishes (1, "2") from (12, "") and can hold any string."""
    digest = hashlib.blake2b(json.dumps([seed, key, view]).encode(), digest_size=24).digest()
    first, second, third = (int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16))
    return first, second, third


def _below(draw: int, n: int) -> int:
    """A 64-bit draw mapped to 0..n-1, uniform up to 1 in 2^64 / n."""
    return draw * n >> 64


def _resize(image: np.ndarray, height: int, width: int, resize_filter: str) -> np.ndarray:
    if resize_filter not in _TORCH_FILTERS:
        by = Image.Resampling[resize_filter.upper()]
        # Columns first, as torch does: Pillow 13 begins with the rows of some tall images, and rounds to other pixels.
        return np.array(Image.fromarray(image).resize((width, image.shape[0]), by).resize((width, height), by))
    import torch  # lazily: grids and decoding do not need it

    if not image.flags.writeable:  # torch shares memory and warns about read-only arrays, although it only reads
        image = image.copy()
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode=resize_filter, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
