"""The palette: V colours that replace the colours of all pixels (paper 3.2). An image becomes a grid of 9-bit tokens.

In: uint8 pixels. Out: uint16 tokens, and back. The shard writer encodes with it, sampling decodes with it, and
`tools/fit_palette.py` fits one by k-means. Colours are in model space, x / 127.5 - 1, as in OpenAI's release.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from igpt_ds.arrays import save_array
from igpt_ds.data.kmeans import kmeans
from igpt_ds.data.palette_table import (
    N_RGB,
    build_table,
    code_pixels,
    color_codes,
    load_table,
    nearest,
    save_table,
    table_path,
)
from igpt_ds.errors import InputError, reason
from igpt_ds.npy import read_npy
from igpt_ds.plain_files import is_missing
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

_AGAIN = "write palette and report again with tools/fit_palette.py"
REPORT = Format("igpt_ds.palette", "palette report", _AGAIN, version=1, sealed=1, oldest=0)
MAX_COLORS = 65536  # tokens are stored in 16 bits
# Of the 512 colours in kmeans_centers.npy of OpenAI's image-gpt release (the file's own sha256 is c614a3d2..., header included).
OPENAI_PALETTE_HASH = "017426d148bc9650db9174810c0bd1c7a0d8a8d5b8ae6200465f4d34ebfb02f0"
# Work done by direct comparison, in pixels x colours, before a palette looks for a cached table, and before it builds one.
_WORK_BEFORE_LOADING, _WORK_BEFORE_BUILDING = 1 << 22, 1 << 27  # 8,192 and 262,144 pixels with 512 colours: 0.01 s and 0.4 s


@dataclass
class _TableState:
    """What one `Palette` knows of its table of all colours."""

    work: int = 0  # pixels x colours compared so far
    table: np.ndarray | None = None
    looked: bool = False  # for a cached table


@dataclass(frozen=True, eq=False)
class Palette:
    """V colours, float32 [V, 3] in [-1, 1]. Compare two palettes by their `hash`.

    file: the file that it was loaded from; the table of `prepare_table` lies beside it.
    """

    colors: np.ndarray
    file: Path | None = None
    _state: _TableState = field(default_factory=_TableState, repr=False)

    def __post_init__(self) -> None:
        assert self.colors.dtype == np.float32
        assert self.colors.shape == (len(self.colors), 3)
        assert 1 <= len(self.colors) <= MAX_COLORS
        colors = np.array(self.colors, order="C")  # a read-only copy, because the hash is cached
        colors.setflags(write=False)
        object.__setattr__(self, "colors", colors)

    def __reduce__(self) -> tuple[type[Palette], tuple[np.ndarray, Path | None]]:
        return Palette, (self.colors, self.file)  # without the table: another process maps it itself

    def __len__(self) -> int:
        return len(self.colors)

    @cached_property
    def hash(self) -> str:
        """The hex sha256 of the colours as little-endian float32 in C order."""
        return hashlib.sha256(self.colors.astype("<f4").tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """Its name in printed text."""
        return "OpenAI's palette" if self.hash == OPENAI_PALETTE_HASH else f"palette {self.hash[:16]}"

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The nearest colour of each pixel: uint8 [..., 3] -> uint16 [...].

        Exact: the smallest sum over R, G, B of squared differences in float64 model space; the lowest index wins a tie. The first
        pixels are compared directly; later ones are looked up in a table of all colours.
        """
        assert (image.dtype, image.shape[-1]) == (np.uint8, 3)
        codes = color_codes(image)
        table = self._state.table
        if table is None:
            table = self._table_for(codes.size)
        if table is not None:
            return table.take(codes)
        different, inverse = np.unique(codes, return_inverse=True)
        return nearest(code_pixels(different), self.colors)[0].astype(np.uint16)[inverse].reshape(codes.shape)

    def _table_for(self, n_pixels: int) -> np.ndarray | None:
        """The table, or None while a table would cost more than it saves."""
        state = self._state
        state.work += n_pixels * len(self)
        if state.work > _WORK_BEFORE_LOADING and not state.looked and self.file is not None:
            state.looked = True
            state.table = load_table(table_path(self.file), self.hash, _say_not_used)
        if state.work > _WORK_BEFORE_BUILDING and state.table is None:
            state.table = build_table(self.colors)
        return state.table

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The colour of each token: integers [...] -> uint8 [..., 3]."""
        pixels = np.rint(127.5 * (self.colors.astype(np.float64) + 1))
        return np.clip(pixels, 0, 255).astype(np.uint8)[np.asarray(tokens)]


def _say_not_used(reason: str) -> None:
    print(f"{reason}; it is not used", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- files


def load_palette(path: Path) -> Palette:
    """Reads a palette from a .npy file, float32 [V, 3] in [-1, 1].

    A report beside it (palette.json for palette.npy), which `save_palette` writes, must have its hash. A file does not say
    whether its range is [-1, 1] or [0, 1], so a palette without negative values is accepted only with such a report.

    Raises:
        ValueError: the file is missing or is not a .npy file, the dtype or the shape is wrong, values are not in model space, or
            a field of the report is missing or has another type.
    """
    colors = read_npy(path, "palette", "make one with tools/fit_palette.py")
    _check_colors(colors, f"palette {path}")
    palette = Palette(colors, Path(path))
    vouched = _vouched(palette)
    if colors.min() >= 0 and not vouched:
        raise InputError(
            f"palette {path} has no negative value and looks like [0, 1] values; a palette lies in [-1, 1]: use 2 * colors - 1, "
            f"or keep the report {report_path(path).name} of tools/fit_palette.py beside it"
        )
    return palette


def prepare_table(path: Path, threads: int = 1) -> Palette:
    """`load_palette`, and the table of all 256^3 colours. The table is built in about a second if it is not cached.

    The table is cached as `path`.table, 32 MiB; processes that load the palette later share its memory. If the cache cannot be
    written, a line on stderr says so, and the table stays in this process.
    """
    palette = load_palette(path)
    cache = table_path(path)
    table = load_table(cache, palette.hash, _say_not_used)
    if table is None:
        table = build_table(palette.colors, threads)
        try:
            save_table(cache, table, palette.hash)
        except OSError as error:
            print(f"the palette's table cannot be cached as {cache}: {reason(error)}", file=sys.stderr, flush=True)
        else:
            table = load_table(cache, palette.hash, _say_not_used)  # the mapped file, which processes share
    palette._state.table, palette._state.looked = table, True
    return palette


def save_palette(path: Path, palette: Palette, report: PaletteReport | None = None) -> None:
    """Writes a palette as .npy, and its report beside it, each atomically.

    The report is written if it is given, and for a palette without negative values, which cannot be loaded without one. JSON has
    no infinite psnr; the file has null.
    """
    _check_colors(palette.colors, f"palette for {path}")
    if report is not None or palette.colors.min() >= 0:
        values = asdict(report or PaletteReport(palette.hash, len(palette)))
        assert values["hash"] == palette.hash
        REPORT.write(report_path(path), {key: None if value == math.inf else value for key, value in values.items()})
    save_array(path, palette.colors.astype("<f4"))


@dataclass(frozen=True)
class PaletteReport:
    """The content of palette.json. Fields after n_colors are None if unknown.

    inertia: sum over pixels of the squared distance in model space. psnr: in dB, of 8-bit pixels. n_pixels, n_unique: pixels that
    were clustered, and different colours among them. The other fields say which images those are of, and how they were made.
    """

    hash: str
    n_colors: int
    inertia: float | None = None
    psnr: float | None = None
    n_pixels: int | None = None
    n_unique: int | None = None
    seed: int | None = None
    source: str | None = None
    n_px: int | None = None
    crop: str | None = None
    filter: str | None = None
    n_images: int | None = None


def report_path(palette_path: Path) -> Path:
    """The report file of a palette file."""
    return palette_path.with_suffix(".json")


def _vouched(palette: Palette) -> bool:
    """Whether a report is beside the palette, which must be the palette's own."""
    assert palette.file is not None
    path = report_path(palette.file)
    if is_missing(path):
        return False
    report = record_from(PaletteReport, REPORT.read(path), f"palette report {path}", _AGAIN)
    if report.hash != palette.hash:
        raise InputError(f"palette {palette.file} is not the one that {path} describes: its colours have another hash; {_AGAIN}")
    return True


def _check_colors(colors: np.ndarray, where: str) -> None:
    if colors.dtype != np.float32:
        raise InputError(f"{where} holds {colors.dtype}; a palette is float32 in [-1, 1]")
    if colors.ndim != 2 or colors.shape[1] != 3 or not 1 <= len(colors) <= MAX_COLORS:
        raise InputError(f"{where} has shape {list(colors.shape)}; a palette is [V, 3] with 1 to {MAX_COLORS} colours")
    low, high = float(colors.min()), float(colors.max())
    if not -1 <= low <= high <= 1:  # also false for NaN
        raise InputError(f"{where} holds values from {low:g} to {high:g}; a palette lies in [-1, 1], pixel / 127.5 - 1")


# --------------------------------------------------------------------------------------------------- fitting


class ColorCounts:
    """Counts each RGB colour, image by image. Memory does not grow with the number of images."""

    def __init__(self) -> None:
        self._counts = np.zeros(N_RGB, dtype=np.int64)
        self.n_pixels = 0

    def add(self, pixels: np.ndarray) -> None:
        """Counts pixels, uint8 [..., 3]."""
        self.add_codes(*np.unique(color_codes(pixels), return_counts=True))

    def add_codes(self, codes: np.ndarray, counts: np.ndarray) -> None:
        """Adds distinct colours, codes int [U], that occur counts [U] times each."""
        self._counts[codes] += counts
        self.n_pixels += int(counts.sum())

    def weighted(self, max_pixels: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(colours uint8 [U, 3], counts int64 [U]) of all pixels, or of max_pixels pixels drawn with replacement."""
        codes = np.flatnonzero(self._counts)
        counts = self._counts[codes]
        if max_pixels is not None and self.n_pixels > max_pixels:
            drawn = np.random.default_rng(seed).integers(self.n_pixels, size=max_pixels)
            counts = np.bincount(np.searchsorted(counts.cumsum(), drawn, side="right"), minlength=len(codes))
            codes, counts = codes[counts > 0], counts[counts > 0]
        return code_pixels(codes), counts


def fit_palette(pixels: np.ndarray, n_colors: int, seed: int = 0) -> tuple[Palette, PaletteReport]:
    """k-means over pixels, uint8 [N, 3] (paper 3.2); returns what `fit_colors` returns."""
    counts = ColorCounts()
    counts.add(pixels)
    return fit_colors(*counts.weighted(), n_colors, seed)


def fit_colors(colors: np.ndarray, counts: np.ndarray, n_colors: int, seed: int = 0) -> tuple[Palette, PaletteReport]:
    """k-means over U distinct colours, uint8 [U, 3], that occur counts [U] times.

    Returns the palette, its colours ordered by luminance, and a report of the fit. The paper does not say how its palette was
    fitted.

    Raises:
        ValueError: n_colors is not between 1 and the number of distinct colours.
    """
    if not 1 <= n_colors <= min(len(colors), MAX_COLORS):
        most = min(len(colors), MAX_COLORS)
        raise InputError(f"n_colors={n_colors} but the images hold {len(colors)} different colours; use --n_colors 1 to {most}")
    points = colors.astype(np.float64) / 127.5 - 1
    centres = points if len(points) == n_colors else kmeans(points, counts.astype(np.float64), n_colors, seed)
    luminance = centres @ [0.299, 0.587, 0.114]
    order = np.lexsort((centres[:, 2], centres[:, 1], centres[:, 0], luminance))
    palette = Palette(centres[order].clip(-1, 1).astype(np.float32))
    return palette, _report(palette, colors, counts)


def _report(palette: Palette, colors: np.ndarray, counts: np.ndarray) -> PaletteReport:
    nearest_colors = palette.colors[palette.encode(colors)].astype(np.float64)
    squares = ((colors / 127.5 - 1 - nearest_colors) ** 2).sum(axis=1)
    inertia, n_pixels = float((squares * counts).sum()), int(counts.sum())
    squared_error = inertia * 127.5**2 / (3 * n_pixels)  # of one 8-bit value
    psnr = 10 * math.log10(255**2 / squared_error) if squared_error > 0 else math.inf
    return PaletteReport(palette.hash, len(palette), inertia, psnr, n_pixels, len(colors))
