"""Arrays in .npy files: written whole, or through a memory map whose disk space is reserved."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from igpt_ds.errors import naming
from igpt_ds.files import atomic_file
from igpt_ds.plain_files import reserve


def new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of zeros, to be written through the memory map.

    Raises:
        OSError: the disk has no space for it.
    """
    with naming(path):
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    reserve(path)
    return array


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(1, 0))
    with atomic_file(path) as file:
        file.write(content.getbuffer())
