"""Reads float32 tensors out of a TensorFlow checkpoint (the "tensor bundle", model.ckpt-N.index and .data-*) without TensorFlow.

The .index file is a sorted table in LevelDB's layout: blocks of prefix-compressed entries, then a footer of 48 bytes that says
where the block of blocks lies. Each entry maps a tensor's name to a protobuf message: type, shape, shard, offset, size,
checksum. Layout: tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/format. Called by `openai.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from igpt_ds.errors import InputError
from igpt_ds.plain_files import beside, check_file

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5  # after each block: one byte that names its compression, and its checksum
_FLOAT32 = 1  # DT_FLOAT in tensorflow/core/framework/types.proto


@dataclass(frozen=True)
class TensorEntry:
    """The place of a tensor: bytes [offset, offset + size) of the shard's data file. crc32c is masked, see `masked_checksum`."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc32c: int
    sliced: bool


class Bundle:
    """An opened checkpoint. `entries` maps names to `TensorEntry`; `read` gives the values.

    Args:
        prefix: the path without .index, as TensorFlow's own tools take it: models/igpt-s/model.ckpt-1000000.

    Raises:
        ValueError: the index is missing, damaged, or of an unsupported kind.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = beside(prefix, ".index")
        check_file(self.index)
        try:
            content = self.index.read_bytes()
        except OSError as error:
            where = f"{self.index} cannot be read: {error.strerror}"
            raise InputError(f"{where}; give the path without .index, as in model.ckpt-1000000") from None
        try:
            values = dict(_table(content, self.index))
            header = _fields(values.pop(b"", b""))
            self.n_shards = _number(header, 1)
            endianness = _number(header, 2)
            # A name that starts with a zero byte is a slice of a variable; the whole variable has an entry of its own.
            self.entries = {name.decode(): _entry(value) for name, value in values.items() if name[0]}
        except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
            raise InputError(f"{self.index} is not the index of a TensorFlow checkpoint ({error}); download it again") from None
        if endianness != 0:
            raise InputError(f"{self.index} was written on a big-endian machine; this reader knows little-endian files only")

    def data_file(self, shard: int) -> Path:
        """The file that holds the tensors of a shard."""
        return beside(self.prefix, f".data-{shard:05d}-of-{self.n_shards:05d}")

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, float32 in its stored shape, and compares its checksum.

        Raises:
            ValueError: it is not there, not float32, cut into slices, or its bytes are missing or damaged.
        """
        if name not in self.entries:
            raise InputError(f"{self.index} has no tensor {name!r}")
        entry = self.entries[name]
        if entry.dtype != _FLOAT32:
            raise InputError(f"{self.index}: {name!r} has TensorFlow's type {entry.dtype}; only float32 (1) is read")
        if entry.sliced:
            raise InputError(f"{self.index}: {name!r} is stored in slices; save the checkpoint with whole variables")
        if entry.size != 4 * math.prod(entry.shape):
            raise InputError(f"{self.index}: {name!r} of shape {list(entry.shape)} cannot have {entry.size} bytes")
        path = self.data_file(entry.shard)
        check_file(path)
        try:
            values = np.fromfile(path, "<f4", math.prod(entry.shape), offset=entry.offset)
        except OSError as error:
            shards = f"download all {self.n_shards} data files beside {self.index.name}"
            raise InputError(f"{path} cannot be read: {error.strerror}; {shards}") from None
        if values.nbytes != entry.size:
            raise InputError(f"{path} ends before {name!r} does; download it again")
        if masked_checksum(values.data.cast("B")) != entry.crc32c:
            raise InputError(f"{path} is damaged: the checksum of {name!r} differs; download it again")
        return values.astype(np.float32, copy=False).reshape(entry.shape)


def masked_checksum(content: bytes | memoryview) -> int:
    """CRC-32C as TensorFlow stores it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table(content: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs of a table file."""
    if len(content) < _FOOTER or struct.unpack("<Q", content[-8:])[0] != _MAGIC:
        raise InputError(f"{path} is not the index of a TensorFlow checkpoint, or its end is missing; download it again")
    footer = content[-_FOOTER:]
    _, place = _handle(footer, 0)  # of the meta index, which these files leave empty
    root, _ = _handle(footer, place)
    for _, value in _block(content, root, path):
        yield from _block(content, _handle(value, 0)[0], path)


def _handle(content: bytes, place: int) -> tuple[tuple[int, int], int]:
    offset, place = _varint(content, place)
    size, place = _varint(content, place)
    return (offset, size), place


def _block(content: bytes, handle: tuple[int, int], path: Path) -> Iterator[tuple[bytes, bytes]]:
    offset, size = handle
    raw = content[offset : offset + size + _TRAILER]
    if len(raw) != size + _TRAILER or masked_checksum(raw[: size + 1]) != struct.unpack_from("<I", raw, size + 1)[0]:
        raise InputError(f"{path} is damaged: the checksum of the block at byte {offset} differs; download it again")
    if raw[size] != 0:
        raise InputError(f"{path} is compressed (type {raw[size]}); TensorFlow's checkpoint writer never compresses its index")
    end = size - 4 * (struct.unpack_from("<I", raw, size - 4)[0] + 1)  # restart points, which only a search needs
    key, place = b"", 0
    while place < end:
        shared, place = _varint(raw, place)
        added, place = _varint(raw, place)
        length, place = _varint(raw, place)
        key = key[:shared] + raw[place : place + added]
        place += added + length
        yield key, raw[place - length : place]


# --------------------------------------------------------------------------------------------------- protobuf


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """A protobuf message as {field number: its values in order}; varints and fixed numbers as int, the rest as bytes."""
    fields: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = _varint(message, place)
        elif tag & 7 == 5:
            value, place = struct.unpack_from("<I", message, place)[0], place + 4
        elif tag & 7 == 1:
            value, place = struct.unpack_from("<Q", message, place)[0], place + 8
        elif tag & 7 == 2:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        else:
            raise IndexError(f"protobuf wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]  # protobuf leaves zeros out
    if not isinstance(value, int):
        raise TypeError(f"protobuf field {field} is not a number")
    return value


def _entry(message: bytes) -> TensorEntry:
    """BundleEntryProto of tensorflow/core/protobuf/tensor_bundle.proto."""
    fields = _fields(message)
    shape = _fields(b"".join(value for value in fields.get(2, []) if isinstance(value, bytes)))
    sizes = tuple(_number(_fields(dim), 1) for dim in shape.get(2, []) if isinstance(dim, bytes))
    dtype, shard, offset, size, crc = (_number(fields, field) for field in (1, 3, 4, 5, 6))
    return TensorEntry(dtype, sizes, shard, offset, size, crc, sliced=7 in fields)
