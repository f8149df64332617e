"""Reads and writes files of torch.save without torch.load: no code that a file names is run, and memory holds one block.

Such a file is an uncompressed zip archive with a pickle of everything except the tensors' bytes, and one record per storage. A
tensor that is read here is only the position of its bytes on disk. Objects of foreign classes (DeepSpeed's loss scaler, a NumPy
generator's state) are kept as the names in the pickle and written back unchanged. A block has at most BLOCK bytes, whatever the
size of the tensors. Called by the other modules of train/checkpoint/.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_ds.errors import InputError, naming
from igpt_ds.plain_files import check_file

BLOCK = 1 << 24  # bytes read or written at once
_ALIGNMENT = 64  # of each record, as in torch, so that the file can be memory-mapped
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
# The only names of a pickle that are looked up. Their constructors have no side effects.
_PLAIN = {("collections", "OrderedDict"), ("torch", "Size"), ("_codecs", "encode")}


@dataclass(frozen=True)
class StoredTensor:
    """The position of a contiguous tensor in a file."""

    path: Path
    position: int  # of its first byte
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    def blocks(self, start: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """The bytes of `count` elements from number `start` on (None: to the end), at most BLOCK at once.

        Each block is gone when the next one is asked for: they share their memory.
        """
        left = (self.numel - start if count is None else count) * self.dtype.itemsize
        assert start >= 0
        assert start * self.dtype.itemsize + left <= self.numel * self.dtype.itemsize
        block = memoryview(bytearray(min(left, BLOCK)))
        with naming(self.path), open(self.path, "rb", buffering=0) as file:
            file.seek(self.position + start * self.dtype.itemsize)
            while left:
                got = file.readinto(block[: min(left, BLOCK)])
                if not got:
                    raise InputError(f"{self.path} ends in the middle of a tensor; choose another step")
                left -= got
                yield block[:got]

    def read(self) -> Tensor:
        """The tensor itself, in memory."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        content = bytearray()
        for block in self.blocks():
            content += block
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `blocks()` yields its bytes in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[memoryview | bytes]]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


class Foreign:
    """An object of a class, or a call of a function, that a file names and that is never looked up."""

    reference = ("", "")
    arguments: tuple[Any, ...]
    called: bool  # whether the file calls it; otherwise it is made by __new__ alone
    state: Any

    def __new__(cls, *arguments: Any) -> Foreign:
        """The first step of a call and of a bare construction."""
        made = super().__new__(cls)
        made.arguments, made.called, made.state = arguments, False, None
        return made

    def __init__(self, *_: Any) -> None:
        self.called = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        if self.called:
            return (type(self), self.arguments, self.state)
        return (copyreg.__newobj__, (type(self), *self.arguments), self.state)  # type: ignore[attr-defined]


@cache
def foreign_class(module: str, name: str) -> type[Foreign]:
    """A stand-in for the class or function of that name; it is written back under this name."""
    return type(name, (Foreign,), {"__module__": module, "reference": (module, name)})


def read_torch_file(path: Path) -> Any:
    """The object that torch.save wrote, with a StoredTensor for each tensor.

    Raises:
        ValueError: it is no such file, or uses something of the format that DeepSpeed's files do not.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            return _Unpickler(path, records, file, archive.read(records["data.pkl"])).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is not a file of torch.save that this code reads ({error!r}); choose another step") from None


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, StoredTensors, and stand-ins for everything else."""

    def __init__(self, path: Path, records: dict[str, zipfile.ZipInfo], file: io.BufferedReader, words: bytes) -> None:
        super().__init__(io.BytesIO(words), encoding="utf-8")
        self._path, self._records, self._file = path, records, file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):  # a tensor with attributes that DeepSpeed added
            return lambda rebuild, kind, arguments, attributes: rebuild(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        return foreign_class(module, name)

    def persistent_load(self, words: Any) -> tuple[int, torch.dtype]:
        _, kind, key, _, _ = words
        record = self._records[f"data/{key}"]
        if record.compress_type != zipfile.ZIP_STORED or kind.reference[1] not in _STORAGES:
            raise pickle.UnpicklingError(f"storage {key} of {kind.reference[1]}")
        self._file.seek(record.header_offset + 26)
        lengths = self._file.read(4)
        start = record.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return start, _STORAGES[kind.reference[1]]

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
        start, dtype = storage
        shape, dense = tuple(size), torch.empty(tuple(size), device="meta").stride()
        if 0 not in shape and any(step != packed for step, packed, n in zip(stride, dense, shape, strict=True) if n > 1):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {tuple(stride)}")
        return StoredTensor(self._path, start + offset * dtype.itemsize, dtype, shape)


def write_torch_file(path: Path, content: Any) -> None:
    """Writes a file for torch.load: a StoredTensor is copied from its file, a NewTensor is written block by block."""
    words = io.BytesIO()
    pickler = _Pickler(words)
    pickler.dump(content)
    with naming(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", iter([words.getvalue()]))
        _record(archive, "byteorder", iter([b"little"]))
        for key, tensor in enumerate(pickler.tensors):
            _record(archive, f"data/{key}", tensor.blocks())
        _record(archive, "version", iter([b"3\n"]))


def _record(archive: zipfile.ZipFile, name: str, blocks: Iterator[memoryview | bytes]) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    start = archive.start_dir + 30 + len(info.filename) + 20  # after the local header, the name, the field of 64-bit sizes
    padding = -(start + 4) % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # as torch pads
    with archive.open(info, "w", force_zip64=True) as record:
        for block in blocks:
            record.write(block)


class _Storage:
    """One tensor's storage in the file being written."""

    def __init__(self, key: int, tensor: StoredTensor | NewTensor) -> None:
        self.key, self.tensor = key, tensor


class _Pickler(pickle._Pickler):  # the pickler written in Python: the one in C looks up every name that it writes
    """Writes stand-ins as the names that they stand for, and tensors as references to records."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[StoredTensor | NewTensor] = []
        self.dispatch_table = copyreg.dispatch_table | {StoredTensor: self._tensor, NewTensor: self._tensor}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = foreign_class("torch", _STORAGE_OF[obj.tensor.dtype])
        return ("storage", kind, str(obj.key), "cpu", obj.tensor.numel)

    def _tensor(self, obj: StoredTensor | NewTensor) -> tuple[Any, ...]:
        self.tensors.append(obj)
        stride = torch.empty(obj.shape, device="meta").stride()
        storage = _Storage(len(self.tensors) - 1, obj)
        return foreign_class("torch._utils", "_rebuild_tensor_v2"), (storage, 0, obj.shape, stride, False, OrderedDict())

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Foreign):
            self.write(pickle.GLOBAL + "\n".join((*obj.reference, "")).encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]
