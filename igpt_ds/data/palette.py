"""The palette: V colours that stand for every pixel (paper 3.2), so that an image is a grid of 9-bit tokens instead of RGB bytes.

In: uint8 pixels. Out: uint16 tokens, and back. `data/shards.py` encodes with it, sampling decodes with it, and
`tools/fit_palette.py` makes one by k-means. Colours live in model space, x / 127.5 - 1, as in OpenAI's release.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.files import atomic_file

MAX_COLORS = 65536  # tokens are stored in 16 bits
_N_RGB = 1 << 24  # every colour that three bytes can hold
_BLOCK = 1024  # colours compared with the palette at a time: a float64 block of 1024 x 512 fits a core's cache


@dataclass(frozen=True, eq=False)
class Palette:
    """V colours, float32 [V, 3] in [-1, 1]. Compare two palettes by their `hash`."""

    colors: np.ndarray

    def __post_init__(self) -> None:
        assert self.colors.dtype == np.float32
        assert self.colors.shape == (len(self.colors), 3)
        assert 1 <= len(self.colors) <= MAX_COLORS
        colors = np.array(self.colors, order="C")  # a copy that nobody can change under the hash
        colors.setflags(write=False)
        object.__setattr__(self, "colors", colors)

    def __len__(self) -> int:
        return len(self.colors)

    @cached_property
    def hash(self) -> str:
        """The hex sha256 of the colours as little-endian float32 in C order."""
        return hashlib.sha256(self.colors.astype("<f4").tobytes()).hexdigest()

    @cached_property
    def _table(self) -> np.ndarray:
        # token + 1 of every colour met so far, 0 elsewhere: zeroed pages cost no memory until they are written
        return np.zeros(_N_RGB, dtype=np.int32)

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The nearest colour of each pixel: uint8 [..., 3] -> uint16 [...].

        Exact: the smallest sum over R, G, B of squared differences in float64 model space; the first index wins a tie.
        Each colour is compared with the palette once in the life of this object, afterwards it is looked up.
        """
        assert (image.dtype, image.shape[-1]) == (np.uint8, 3)
        codes = color_codes(image)
        tokens = self._table[codes]
        if not tokens.all():
            unseen = np.unique(codes[tokens == 0])
            for start in range(0, len(unseen), _BLOCK):
                block = unseen[start : start + _BLOCK]
                self._table[block] = _nearest(_code_pixels(block), self.colors)[0] + 1
            tokens = self._table[codes]
        return (tokens - 1).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The colour of each token: integers [...] -> uint8 [..., 3]."""
        pixels = np.rint(127.5 * (self.colors.astype(np.float64) + 1))
        return np.clip(pixels, 0, 255).astype(np.uint8)[np.asarray(tokens)]


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """One number R * 65536 + G * 256 + B a pixel: uint8 [..., 3] -> int32 [...]."""
    wide = pixels.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _code_pixels(codes: np.ndarray) -> np.ndarray:
    """The inverse of `color_codes`: int [N] -> uint8 [N, 3]."""
    return np.stack([codes >> 16, (codes >> 8) & 255, codes & 255], axis=-1).astype(np.uint8)


def _nearest(pixels: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest colour and its squared distance: uint8 [N, 3], float32 [V, 3] -> int64 [N], float64 [N], by brute force.

    Direct differences: the expansion |a|^2 - 2ab + |b|^2 cancels and can pick another colour where two are almost tied.
    """
    wide = pixels.astype(np.float64) / 127.5 - 1
    distance = np.zeros((len(pixels), len(colors)))
    for channel in range(3):
        difference = wide[:, channel, None] - colors[None, :, channel].astype(np.float64)
        difference *= difference
        distance += difference
    nearest = distance.argmin(axis=1)
    return nearest, distance[np.arange(len(pixels)), nearest]


# --------------------------------------------------------------------------------------------------- files


def load_palette(path: Path) -> Palette:
    """Reads a palette from a .npy file, float32 [V, 3] in [-1, 1].

    Raises:
        ValueError: no such file, not a .npy file, another dtype or shape, or values that are not in model space.
    """
    try:
        with open(path, "rb") as file:
            colors = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"palette {path} cannot be read: {error.strerror}; make one with tools/fit_palette.py") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"palette {path} is not a .npy file of numbers: {str(error).splitlines()[0]}") from None
    _check_colors(colors, f"palette {path}")
    return Palette(colors)


def save_palette(path: Path, palette: Palette) -> None:
    """Writes a palette as .npy, atomically; refuses what `load_palette` would refuse."""
    _check_colors(palette.colors, f"palette for {path}")
    with atomic_file(path) as file:
        np.lib.format.write_array(file, palette.colors.astype("<f4"), version=(1, 0))


def _check_colors(colors: np.ndarray, where: str) -> None:
    if colors.dtype != np.float32:
        raise ValueError(f"{where} holds {colors.dtype}; a palette is float32 in [-1, 1]")
    if colors.ndim != 2 or colors.shape[1] != 3 or not 1 <= len(colors) <= MAX_COLORS:
        raise ValueError(f"{where} has shape {list(colors.shape)}; a palette is [V, 3] with 1 to {MAX_COLORS} colours")
    low, high = float(colors.min()), float(colors.max())
    if not -1 <= low <= high <= 1:  # also false for NaN
        raise ValueError(f"{where} holds values from {low:g} to {high:g}; a palette lies in [-1, 1], pixel / 127.5 - 1")
    if low >= 0:
        raise ValueError(
            f"{where} has no negative value and looks like [0, 1] values; a palette lies in [-1, 1]: use 2 * colors - 1"
        )


# --------------------------------------------------------------------------------------------------- fitting


class ColorCounts:
    """How often each RGB colour occurs: pixels go in image by image, and memory stays bounded however many there are."""

    def __init__(self) -> None:
        self._counts = np.zeros(_N_RGB, dtype=np.int64)
        self.n_pixels = 0

    def add(self, pixels: np.ndarray) -> None:
        """Counts pixels, uint8 [..., 3]."""
        codes, counts = np.unique(color_codes(pixels), return_counts=True)
        self._counts[codes] += counts
        self.n_pixels += int(counts.sum())

    def weighted(self, max_pixels: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(colours uint8 [U, 3], counts int64 [U]) of all pixels, or of max_pixels drawn from them with replacement."""
        codes = np.flatnonzero(self._counts)
        counts = self._counts[codes]
        if max_pixels is not None and self.n_pixels > max_pixels:
            drawn = np.random.default_rng(seed).integers(self.n_pixels, size=max_pixels)
            counts = np.bincount(np.searchsorted(counts.cumsum(), drawn, side="right"), minlength=len(codes))
            codes, counts = codes[counts > 0], counts[counts > 0]
        return _code_pixels(codes), counts


def fit_palette(pixels: np.ndarray, n_colors: int, seed: int = 0) -> tuple[Palette, dict[str, Any]]:
    """k-means over pixels, uint8 [N, 3] (paper 3.2); see `fit_colors` for what comes back."""
    counts = ColorCounts()
    counts.add(pixels)
    return fit_colors(*counts.weighted(), n_colors, seed)


def fit_colors(colors: np.ndarray, counts: np.ndarray, n_colors: int, seed: int = 0) -> tuple[Palette, dict[str, Any]]:
    """k-means over U different colours, uint8 [U, 3], that occur counts [U] times; one seeded k-means++ start.

    Returns the palette, its colours ordered by luminance, and a report: inertia (the sum over pixels of the squared distance
    in model space), psnr (dB, of 8-bit pixels), n_pixels, n_unique. The paper does not say how its palette was fitted.

    Raises:
        ValueError: n_colors does not lie between 1 and the number of different colours.
    """
    if not 1 <= n_colors <= min(len(colors), MAX_COLORS):
        most = min(len(colors), MAX_COLORS)
        raise ValueError(f"n_colors={n_colors} but the images hold {len(colors)} different colours; use --n_colors 1 to {most}")
    points = colors.astype(np.float64) / 127.5 - 1
    centres = points if len(points) == n_colors else _kmeans(points, counts, n_colors, seed)
    luminance = centres @ [0.299, 0.587, 0.114]
    order = np.lexsort((centres[:, 2], centres[:, 1], centres[:, 0], luminance))
    palette = Palette(centres[order].clip(-1, 1).astype(np.float32))
    return palette, _report(palette, colors, counts)


def _kmeans(points: np.ndarray, counts: np.ndarray, n_colors: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans  # lazily: only a fit needs them
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):  # threads add up in any order, and the same seed must give the same bits
        model = KMeans(n_colors, init="k-means++", n_init=1, max_iter=100, random_state=seed)
        return model.fit(points, sample_weight=counts.astype(np.float64)).cluster_centers_


def _report(palette: Palette, colors: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    inertia = 0.0
    for start in range(0, len(colors), _BLOCK):
        block = slice(start, start + _BLOCK)
        inertia += float(_nearest(colors[block], palette.colors)[1] @ counts[block])
    n_pixels = int(counts.sum())
    squared_error = inertia * 127.5**2 / (3 * n_pixels)  # per 8-bit value
    psnr = 10 * math.log10(255**2 / squared_error) if squared_error > 0 else math.inf
    return {"inertia": inertia, "psnr": psnr, "n_pixels": n_pixels, "n_unique": len(colors)}
