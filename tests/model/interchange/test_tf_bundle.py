"""The reader returns what a checkpoint's writer stored, and names each kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.model.interchange.tf_bundle import Bundle, masked_checksum

# One variable, model/g = [1.5, -2.0, 0.25], and global_step = 5, saved by TensorFlow 2.21.0 (Saver, global_step=5).
REAL_INDEX = (
    "00000608011a020801000b0b676c6f62616c5f7374657008091200280835eab2043e0007116d6f64656c2f6708011204120208032008280c"
    "358050b84300000000010000000040f9f0b1000000000100000000c0f2a1b00001026e00450000000001000000004dd3fa564a08570e0000"
    "0000000000000000000000000000000000000000000000000000000000000000000057fb808b247547db"
)
REAL_DATA = "05000000000000000000c03f000000c00000803e"


def test_the_checksum_is_tensorflows() -> None:
    """0xE3069283 is the check value of CRC-32C (RFC 3720); the constant is in tensorflow/core/lib/hash/crc32c.h."""
    assert masked_checksum(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32


def tensors(n: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = [(), (3,), (2, 5), (2, 3, 4), (0, 4), (40, 33)]
    named = {f"model/h{i}/w{'x' * (i % 3)}": rng.normal(size=shapes[i % 6]).astype(np.float32) for i in range(n)}
    return named | {"global_step": np.array(7), "double": np.ones(2)}


@pytest.mark.parametrize(("n_shards", "per_block"), [(1, 1000), (3, 1), (32, 7)])
def test_reads_what_was_written(write_bundle, tmp_path: Path, n_shards: int, per_block: int) -> None:
    bundle = Bundle(write_bundle(tmp_path / "model.ckpt-7", tensors(), n_shards, per_block))
    assert bundle.n_shards == n_shards
    assert bundle.entries.keys() == tensors().keys()
    for name, array in tensors().items():
        assert bundle.entries[name].shape == array.shape
        if array.dtype == np.float32:
            read = bundle.read(name)
            assert (read.dtype, read.shape) == (np.float32, array.shape)
            assert np.array_equal(read, array)


def test_reads_what_tensorflow_wrote(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt-5.index").write_bytes(bytes.fromhex(REAL_INDEX))
    (tmp_path / "model.ckpt-5.data-00000-of-00001").write_bytes(bytes.fromhex(REAL_DATA))
    bundle = Bundle(tmp_path / "model.ckpt-5")
    assert bundle.read("model/g").tolist() == [1.5, -2.0, 0.25]
    assert {name: entry.shape for name, entry in bundle.entries.items()} == {"model/g": (3,), "global_step": ()}


def test_a_flipped_bit_of_the_index_is_noticed(write_bundle, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", tensors(8), per_block=4)
    path = tmp_path / "m.index"
    whole, expected = path.read_bytes(), Bundle(prefix).entries
    silent = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            entries = Bundle(prefix).entries
        except ValueError as error:
            complaint = str(error)
        else:
            complaint = f"{path}, download it again"
            silent.append(place)
            assert entries == expected
        assert str(path) in complaint
        assert "download it again" in complaint
    # Nothing is read from the empty meta index (8 bytes and 5 of its trailer), its handle and the padding of the footer.
    assert 0 < len(silent) < 13 + 40


def test_a_cut_index_is_refused(write_bundle, tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", tensors(8))
    path = tmp_path / "m.index"
    whole = path.read_bytes()
    for length in (0, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m.index is not the index of a TensorFlow checkpoint, or its end is missing"):
            Bundle(prefix)
    path.write_bytes(whole[100:])
    with pytest.raises(ValueError, match=r"m.index is damaged: the checksum of the block at byte \d+ differs"):
        Bundle(prefix)
    path.write_bytes(bytes(100) + b"\xff" * 40 + struct.pack("<Q", 0xDB4775248B80FB57))
    with pytest.raises(ValueError, match=r"m.index is damaged"):
        Bundle(prefix)
    path.unlink()
    with pytest.raises(ValueError, match=r"m.index cannot be read: No such file or directory; give the path without .index"):
        Bundle(prefix)


def test_kinds_that_are_not_read_are_named(write_bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m.index was written on a big-endian machine"):
        Bundle(write_bundle(tmp_path / "m", tensors(2), big_endian=True))
    with pytest.raises(ValueError, match=r"m.index is compressed \(type 1\)"):
        Bundle(write_bundle(tmp_path / "m", tensors(2), compression=1))
    wire = (b"odd", b"\x0f")  # a protobuf field of type 7, which there is not
    text = (b"text", b"\x0a\x01x")  # a dtype that is a string
    for more in (wire, text):
        with pytest.raises(ValueError, match=r"m.index is not the index of a TensorFlow checkpoint \(protobuf"):
            Bundle(write_bundle(tmp_path / "m", tensors(2), more=[more]))

    sliced = (b"cut", b"\x08\x01\x12\x04\x12\x02\x08\x03\x3a\x00")  # a float32 [3] of one slice, whose name starts with a zero
    short = (b"short", b"\x08\x01\x12\x04\x12\x02\x08\x03\x28\x08")  # a float32 [3] of 8 bytes
    more = [sliced, short, (b"\0\x01cut\0\x01", b"\x08\x01")]
    bundle = Bundle(write_bundle(tmp_path / "m", tensors(2), more=more))
    for name, message in (
        ("none", "m.index has no tensor 'none'"),
        ("global_step", r"'global_step' has TensorFlow's type 9; only float32 \(1\)"),
        ("double", "'double' has TensorFlow's type 2"),
        ("cut", "'cut' is stored in slices"),
        ("short", r"'short' of shape \[3\] cannot have 8 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            bundle.read(name)


def test_missing_and_damaged_data_are_named(write_bundle, tmp_path: Path) -> None:
    bundle = Bundle(write_bundle(tmp_path / "m", tensors(6), n_shards=2))
    path = tmp_path / "m.data-00001-of-00002"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 128]) + whole[1:])
    with pytest.raises(ValueError, match=r"m.data-00001-of-00002 is damaged: the checksum of 'model/h1/wx' differs"):
        bundle.read("model/h1/wx")
    path.write_bytes(whole[:8])
    with pytest.raises(ValueError, match=r"m.data-00001-of-00002 ends before 'model/h1/wx' does; download it again"):
        bundle.read("model/h1/wx")
    path.unlink()
    with pytest.raises(ValueError, match=r"m.data-00001-of-00002 cannot be read: .*download all 2 data files beside m.index"):
        bundle.read("model/h1/wx")
    assert bundle.read("model/h0/w").shape == ()
