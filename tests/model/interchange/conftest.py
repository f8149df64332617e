"""TensorFlow checkpoints written without TensorFlow and without anything of the reader, byte by byte after its sources.

tensorflow/core/util/tensor_bundle/tensor_bundle.cc, core/protobuf/tensor_bundle.proto, core/lib/io/{format,block_builder}.cc
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng


def slow_crc32c(content: bytes) -> int:
    """RFC 3720's polynomial, one bit at a time."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ 0x82F63B78 if register & 1 else register >> 1
    return register ^ 0xFFFFFFFF


def masked(content: bytes) -> int:
    crc = slow_crc32c(content)
    return (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes with their length; zeros and empty messages are left out, as proto3 does."""
    if isinstance(value, bytes):
        return varint(number * 8 + 2) + varint(len(value)) + value
    return varint(number * 8) + varint(value) if value else b""


def fixed32(number: int, value: int) -> bytes:
    return varint(number * 8 + 5) + struct.pack("<I", value)


def entry(array: np.ndarray, shard: int, offset: int, dtype: int) -> bytes:
    """BundleEntryProto."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    place = field(3, shard) + field(4, offset) + field(5, array.nbytes)
    return field(1, dtype) + field(2, shape) + place + fixed32(6, masked(array.tobytes()))


def block(entries: Sequence[tuple[bytes, bytes]], interval: int) -> bytes:
    """Prefix-compressed entries, a restart point every `interval`; without the trailer."""
    content, restarts, last = b"", [0], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % interval == 0:
            restarts += [len(content)] if number else []
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return content + b"".join(struct.pack("<I", place) for place in restarts) + struct.pack("<I", len(restarts))


def table(entries: Sequence[tuple[bytes, bytes]], per_block: int, compression: int) -> bytes:
    content, index = b"", []

    def append(piece: bytes) -> bytes:
        nonlocal content
        handle = varint(len(content)) + varint(len(piece))
        kind = bytes([compression])
        content += piece + kind + struct.pack("<I", masked(piece + kind))
        return handle

    for start in range(0, len(entries), per_block):
        piece = entries[start : start + per_block]
        index.append((piece[-1][0] + b"\0", append(block(piece, 16))))
    meta = append(block([], 1))
    footer = meta + append(block(index, 1))
    return content + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def write(
    prefix: Path,
    tensors: Tensors,
    n_shards: int = 1,
    per_block: int = 10,
    big_endian: bool = False,
    compression: int = 0,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> Path:
    """Writes prefix.index and its data files; tensors are dealt out to the shards in turn. Gives the prefix back."""
    numbers = {"float32": 1, "float64": 2, "int64": 9}  # DataType of types.proto
    data = [b""] * n_shards
    entries = [(b"", field(1, n_shards) + field(2, int(big_endian)) + field(3, field(1, 1)))]
    for number, (name, array) in enumerate(tensors.items()):
        shard = number % n_shards
        entries.append((name.encode(), entry(array, shard, len(data[shard]), numbers[array.dtype.name])))
        data[shard] += array.tobytes()
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{n_shards:05d}").write_bytes(content)
    index = table(sorted([*entries, *more]), per_block, compression)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index)
    return prefix


@pytest.fixture
def write_bundle() -> Callable[..., Path]:
    """write_bundle(prefix, tensors, ...) -> prefix."""
    return write


@pytest.fixture
def released() -> Callable[..., Tensors]:
    """released(L, H, C, n_px, V, sos=True): random variables by the names and shapes of openai/image-gpt src/model.py."""

    def make(n_layer: int, n_head: int, n_embd: int, n_px: int, n_vocab: int, sos: bool = True) -> Tensors:
        rng, C = RNG(n_embd), n_embd
        heads = (n_head, C // n_head, C)
        shapes: dict[str, tuple[int, ...]] = {"wte": (n_vocab, C), "wpe": (n_px**2, C), "wtet": (n_vocab, C), "ln_f/g": (C,)}
        shapes |= {"sos": (C,)} if sos else {}
        for i in range(n_layer):
            shapes |= {f"h{i}/attn/{name}_proj": heads for name in "qkvc"}
            shapes |= {f"h{i}/ln_1/g": (C,), f"h{i}/ln_2/g": (C,)}
            shapes |= {f"h{i}/mlp/c_fc/w": (C, 4 * C), f"h{i}/mlp/c_proj/w": (4 * C, C)}
        gains = {name: rng.uniform(0.5, 1.5, shape) for name, shape in shapes.items() if name.endswith("/g")}
        drawn = {name: rng.normal(0, 0.7 * C**-0.5, shape) for name, shape in shapes.items()} | gains
        tensors = {f"model/{name}": value.astype(np.float32) for name, value in drawn.items()}
        tensors |= {f"{name}/adam_{part}": np.zeros_like(tensors[name]) for name in list(tensors) for part in "mv"}
        return tensors | {"global_step": np.array(1000), "model/clf/wclf": np.zeros((10, C), np.float32)}

    return make
