"""Reads the pickles of CIFAR, written by Python 2, without running code from them.

In: the bytes of a pickle. Out: a dict of arrays, lists, dicts, strings and numbers. `sources/cifar.py` uses it. A pickle is a
program: it names functions and calls them. Here the few names that an array needs map to replacements that check their arguments.
All other names are refused, and the pickle cannot reach any function of numpy.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, cast

import numpy as np

from igpt_ds.errors import InputError


class _ForbiddenError(Exception):
    """A pickle uses something that plain data does not need."""


class _Name:
    """A name that a pickle may contain but not call."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _ForbiddenError("it sets the state of a name")


class _Encode(_Name):
    """`_codecs.encode`: Python 3 writes bytes for Python 2 as text whose characters are the bytes."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise _ForbiddenError(f"it encodes as {encoding!r}")
        return text.encode("latin1")


class _MakeDtype(_Name):
    """`numpy.dtype(name, align, copy)`."""

    __slots__ = ()

    def __call__(self, name: Any, *rest: Any) -> _Dtype:
        return _Dtype(name)


class _Reconstruct(_Name):
    """`numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), b"b")`, an empty array that is filled later."""

    __slots__ = ()

    def __call__(self, *rest: Any) -> _Array:
        return _Array()


class _Dtype:
    """The type of an array's elements: integers, floating-point numbers and booleans, never objects or records."""

    def __init__(self, name: Any) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(text, str) or len(text) != 2 or text[0] not in "biuf" or text[1] not in "1248":
            raise _ForbiddenError(f"it holds an array of {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(item is not None for item in state[2:5]):
            raise _ForbiddenError("it holds an array of records")
        self.dtype = self.dtype.newbyteorder(cast(Any, order))


class _Array:
    """Replaces numpy's array: `array` is set with its state."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise _ForbiddenError(f"it holds an array of {type(data).__name__}")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


_ALLOWED: dict[tuple[str, str], type[_Name]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _MakeDtype,
    ("_codecs", "encode"): _Encode,
}


# Python's own unpickler: the one in C allocates any amount of memory that a malicious pickle names.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]()

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError("it refers to objects outside")


def load_pickle(data: bytes, name: str) -> dict[str, object]:
    """The dict in a pickle. Keys are str; values are read-only arrays, lists, dicts, bytes, str or numbers.

    `name` is the file's name in errors. Strings of Python 2 become bytes.

    Raises:
        ValueError: the pickle is truncated, holds no dict, or needs more than plain arrays.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _ForbiddenError as error:
        raise InputError(f"{name} is not plain data: {error}; nothing of it was run. Download the file again") from None
    except Exception as error:  # malicious or truncated bytes raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} cannot be read as a pickle: {reason}; download it again") from None
    if not isinstance(value, dict):
        found = type(value).__name__.lstrip("_").lower()
        raise InputError(f"{name} holds a {found} where a dict should stand; download it again")
    return {_text(key): item.array if isinstance(item, _Array) else item for key, item in value.items()}


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
