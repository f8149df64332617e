"""Reads .npy files whose headers may lie: memory is bounded by the file's own size, and every fault is one line.

In: a .npy file, or its bytes. Out: its array, in memory or mapped. Called by `data/palette.py`, `data/streaming.py` and
`evaluate/features/files.py`.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from igpt_ds.errors import InputError, reason
from igpt_ds.plain_files import check_file
from igpt_ds.schema import short


def read_npy(path: Path, what: str, fix: str, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, read-only.

    Args:
        what: what the file is, for the error.
        fix: what the user can do about it.
        mapped: maps the file instead of reading it.

    Raises:
        ValueError: the file is missing or is no .npy file of numbers, or its size is not what its header says.
    """
    where = f"{what} {path}"
    check_file(path)
    try:
        with open(path, "rb") as file:
            return _read(file, where, fix, mapped)
    except OSError as error:
        said = error.strerror if isinstance(error, FileNotFoundError) else reason(error)
        raise InputError(f"{where} cannot be read: {said}; {fix}") from None


def parse_npy(content: bytes, where: str, fix: str) -> np.ndarray:
    """The array in the bytes of a .npy file, read-only; `where` names them in errors, which are those of `read_npy`."""
    return _read(io.BytesIO(content), where, fix, mapped=False)


def _read(file: BinaryIO, where: str, fix: str, mapped: bool) -> np.ndarray:
    shape, fortran, dtype = _header(file, where, fix)
    start, size = file.tell(), file.seek(0, 2)
    needed = start + math.prod(shape) * dtype.itemsize
    if size != needed:
        raise InputError(f"{where} has {size} bytes, and its header says {short(needed)}; {fix}")
    if mapped and size > start:  # an empty file cannot be mapped
        return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")
    file.seek(start)
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def _header(file: BinaryIO, where: str, fix: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise InputError(f"version {version} of .npy")
        shape, fortran, dtype = read[version](file)
        if dtype.kind not in "iufb" or any(side < 0 for side in shape):
            raise InputError(f"it holds {dtype} {list(shape)}")
    except OSError:
        raise
    except Exception as error:  # NumPy's parser of the header raises what Python's own parser raises
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where} is not a .npy file of numbers: {said[:200]}; {fix}") from None
    return shape, fortran, dtype
