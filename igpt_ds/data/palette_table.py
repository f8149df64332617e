"""Nearest colours: by brute force, and for all 256^3 colours at once as a table that is cached in a file.

In: uint8 pixels and a palette's colours, float32 [V, 3] in model space. Out: tokens. `data/palette.py` encodes with it.

The table is uint16 [256^3]: the token of colour R * 65536 + G * 256 + B. It is built by subdividing the colour cube. Each cell
keeps the palette colours that can be nearest to one of its points, with a margin far above rounding errors, and passes them to
its eight parts. Cells of 4^3 compare the remaining colours with the same operations as `nearest`, so the table equals brute
force to the bit, including ties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from igpt_ds.files import atomic_file
from igpt_ds.plain_files import check_file

N_RGB = 1 << 24  # the number of colours of three bytes
_BLOCK = 1 << 19  # distances computed at once by brute force: 1024 pixels x 512 colours fit the cache of a core
_LEVELS = np.arange(256) / 127.5 - 1  # the 256 values of a byte in model space, as `nearest` computes them
_ROOT_SIDE, _LEAF_SIDE = 64, 4  # side of the first and the last cells, in colours
_MARGIN = 1e-9  # squared distances below 12 are rounded by some 1e-15
_MAX_PAIRS = 1 << 19  # (cell, colour) pairs processed at once: about 100 MB
_LEAF_CELLS = 256  # cells compared at once: 16,384 float64 fit the cache of a core
_MAGIC, _HEADER = b"igpt_ds palette table, version 1\n", 4096  # the header fills a page, so the table is page-aligned


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """One number per pixel, R * 65536 + G * 256 + B: uint8 [..., 3] -> intp [...]."""
    padded = np.empty(pixels.size + 1, dtype=np.uint8)
    padded[1:] = pixels.reshape(-1)
    # Reads each pixel and the byte before it as one big-endian number: three times as fast as three shifts.
    windows: np.ndarray = np.ndarray(pixels.size // 3, dtype=">u4", buffer=padded, strides=(3,))
    codes = windows.astype(np.intp)
    codes &= 0xFFFFFF
    return codes.reshape(pixels.shape[:-1])


def code_pixels(codes: np.ndarray) -> np.ndarray:
    """The inverse of `color_codes`: int [N] -> uint8 [N, 3]."""
    return np.stack([codes >> 16, (codes >> 8) & 255, codes & 255], axis=-1).astype(np.uint8)


def nearest(pixels: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest colour and its squared distance: uint8 [N, 3], float32 [V, 3] -> int64 [N], float64 [N], by brute force.

    Differences are computed directly: the expansion |a|^2 - 2ab + |b|^2 cancels and can pick the wrong one of two close colours.
    """
    index, squared = np.empty(len(pixels), dtype=np.int64), np.empty(len(pixels))
    step = max(1, _BLOCK // len(colors))
    wide = colors.astype(np.float64)
    for start in range(0, len(pixels), step):
        block = _LEVELS[pixels[start : start + step]]
        distance = np.zeros((len(block), len(colors)))
        for channel in range(3):
            difference = block[:, channel, None] - wide[None, :, channel]
            difference *= difference
            distance += difference
        best = distance.argmin(axis=1)
        index[start : start + step] = best
        squared[start : start + step] = distance[np.arange(len(block)), best]
    return index, squared


# --------------------------------------------------------------------------------------------------- building


def build_table(colors: np.ndarray, threads: int = 1) -> np.ndarray:
    """The token of every colour: float32 [V, 3] -> uint16 [256^3]. The bits do not depend on the number of threads."""
    assert 1 <= len(colors) <= 1 << 16
    _, first = np.unique(colors, axis=0, return_index=True)  # of equal colours the lowest index wins
    tokens = np.sort(first)
    wide = colors[tokens].astype(np.float64)
    table = np.empty((256, 256, 256), dtype=np.uint16)
    corners = range(0, 256, _ROOT_SIDE)
    roots = [np.array([[r, g, b]]) for r in corners for g in corners for b in corners]

    def fill(root: np.ndarray) -> None:
        _fill(table, root, wide, tokens.astype(np.uint16))

    if threads == 1:
        for root in roots:
            fill(root)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, roots))
    return table.reshape(-1)


def _fill(table: np.ndarray, root: np.ndarray, colors: np.ndarray, tokens: np.ndarray) -> None:
    """Fills the table in one root cell. A set of cells is corners [n, 3] and the concatenated colours of the cells."""
    work: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]
    work = [(_ROOT_SIDE, root, np.array([len(colors)]), np.arange(len(colors)))]
    while work:
        side, corners, counts, candidates = work.pop()
        if len(corners) > 1 and len(candidates) * 8 > _MAX_PAIRS and side > _LEAF_SIDE:
            half = len(corners) // 2
            cut = int(counts[:half].sum())
            work.append((side, corners[half:], counts[half:], candidates[cut:]))
            work.append((side, corners[:half], counts[:half], candidates[:cut]))
            continue
        corners, counts, candidates = _prune(side, corners, counts, candidates, colors)
        if side == _LEAF_SIDE:
            _compare(table, corners, counts, candidates, colors, tokens)
        else:
            work.append((side // 2, *_halve(side // 2, corners, counts, candidates)))


def _halve(
    side: int, corners: np.ndarray, counts: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The eight parts of all cells, one eighth after the other. Each part has all candidates of its cell."""
    offsets = side * np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)])
    parts = (corners[None] + offsets[:, None]).reshape(-1, 3)
    return parts, np.tile(counts, 8), np.tile(candidates, 8)


def _prune(
    side: int, corners: np.ndarray, counts: np.ndarray, candidates: np.ndarray, colors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops from each cell the colours that are farther from every point of it than the colour nearest to its middle.

    The difference of two squared distances is linear in the position. Its minimum over a box is its value in the middle minus
    |slope| x half a side for each axis.
    """
    first, last = _LEVELS[corners], _LEVELS[corners + side - 1]
    middle, half = (first + last) / 2, float(side - 1) / 255
    distance = np.zeros(len(candidates))
    for channel in range(3):
        difference = colors[candidates, channel] - np.repeat(middle[:, channel], counts)
        distance += difference * difference
    starts = np.cumsum(counts) - counts
    distance -= np.repeat(np.minimum.reduceat(distance, starts), counts)
    hits = np.flatnonzero(distance == 0)
    rival = candidates[hits[np.searchsorted(hits, starts)]]  # the first such colour of each cell
    for channel in range(3):
        distance -= 2 * half * np.abs(colors[candidates, channel] - np.repeat(colors[rival, channel], counts))
    keep = distance <= _MARGIN
    return corners, np.add.reduceat(keep, starts, dtype=np.int64), candidates[keep]


def _compare(
    table: np.ndarray, corners: np.ndarray, counts: np.ndarray, candidates: np.ndarray, colors: np.ndarray, tokens: np.ndarray
) -> None:
    """Writes the nearest candidate of every colour of the leaf cells, in descending order of candidates."""
    starts = np.cumsum(counts) - counts
    order = np.argsort(-counts, kind="stable")
    n = 256 // _LEAF_SIDE
    cells = table.reshape(n, _LEAF_SIDE, n, _LEAF_SIDE, n, _LEAF_SIDE).transpose(0, 2, 4, 1, 3, 5)  # a view
    inner = np.arange(_LEAF_SIDE)
    for begin in range(0, len(order), _LEAF_CELLS):
        chosen = order[begin : begin + _LEAF_CELLS]
        number, first, corner = counts[chosen], starts[chosen], corners[chosen]
        levels = _LEVELS[corner[:, :, None] + inner]  # [cell, channel, side]
        best = np.full((len(chosen),) + (_LEAF_SIDE,) * 3, np.inf)
        winner = np.zeros(best.shape, dtype=np.uint8 if number[0] <= 256 else np.uint16)
        for rank in range(number[0]):
            m = int(np.searchsorted(-number, -rank))  # the first m cells have a candidate of this rank
            squares = levels[:m] - colors[candidates[first[:m] + rank]][:, :, None]
            squares *= squares
            distance = (squares[:, 0, :, None] + squares[:, 1, None, :])[..., None] + squares[:, 2, None, None, :]
            closer = distance < best[:m]  # not <=: candidates are in palette order, and the first one wins a tie
            np.minimum(best[:m], distance, out=best[:m])
            np.maximum(winner[:m], closer * winner.dtype.type(rank), out=winner[:m])
        r, g, b = (corner // _LEAF_SIDE).T
        cells[r, g, b] = tokens[candidates[first[:, None, None, None] + winner]]


# --------------------------------------------------------------------------------------------------- files


def table_path(palette_path: Path) -> Path:
    """The cache file of a palette file's table, in the same directory."""
    return palette_path.with_name(f"{palette_path.name}.table")


def save_table(path: Path, table: np.ndarray, palette_hash: str) -> None:
    """Writes a header (format, the palette's hash, the table's sha256) and the table, little-endian, atomically."""
    data = table.astype("<u2", copy=False)
    digest = hashlib.sha256(data.data).hexdigest()
    with atomic_file(path) as file:
        file.write((_MAGIC + f"{palette_hash}\n{digest}\n".encode()).ljust(_HEADER, b"\0"))
        file.write(data.data)


def load_table(path: Path, palette_hash: str, say: Callable[[str], None]) -> np.ndarray | None:
    """Maps a cached table into memory, which processes share. None if there is no intact table of this palette.

    say: gets the reason if the file exists and cannot be used.
    """
    try:
        check_file(path)
        with open(path, "rb") as file:
            header = file.read(_HEADER).rstrip(b"\0")
        if not header.startswith(_MAGIC):
            say(f"{path} is not a table of this version")
            return None
        found, digest = [*header[len(_MAGIC) :].decode("ascii", "replace").split("\n"), "", ""][:2]
        if found != palette_hash:
            say(f"{path} belongs to another palette")
            return None
        if path.stat().st_size != _HEADER + 2 * N_RGB:
            say(f"{path} is damaged: it has {path.stat().st_size} bytes instead of {_HEADER + 2 * N_RGB}")
            return None
        table = np.memmap(path, dtype="<u2", mode="r", offset=_HEADER, shape=(N_RGB,))
        if hashlib.sha256(table.data).hexdigest() != digest:
            say(f"{path} is damaged: its bytes have another sha256")
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return None
    return table.view(np.ndarray)
