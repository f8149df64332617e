"""A header that lies about a .npy file is one clear error, and no memory is taken for what it promises."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.npy import read_npy


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("array", [np.arange(6, dtype="<f4").reshape(2, 3), np.zeros(0, "<i8"), np.asfortranarray(np.eye(3))])
def test_arrays_come_back(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    for mapped in (False, True):
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", "thing", "fix", mapped), array)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not a .npy file of numbers"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,)}"), "has 75 bytes, and its header says"),
        (
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 400 + ",)}"),
            "has 465 bytes, and its header says",
        ),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "is not a .npy file of numbers"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "is not a .npy file of numbers"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}"), "is not a .npy file of numbers"),
        (header("(" * 3000), "is not a .npy file of numbers"),
        (header("\0\xff"), "is not a .npy file of numbers"),
        (b"\x93NUMPY\x09\x00" + bytes(200), "is not a .npy file of numbers"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "is not a .npy file of numbers"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=r"; make it again$") as error:
            read_npy(path, "thing", "make it again", mapped)
        assert str(error.value).startswith(f"thing {path} {told}")
        assert len(str(error.value).splitlines()) == 1


def test_a_file_that_is_longer_than_its_header_says(tmp_path: Path) -> None:
    made = io.BytesIO()
    np.save(made, np.arange(3))
    (tmp_path / "a.npy").write_bytes(made.getvalue() + b"x")
    with pytest.raises(ValueError, match=r"a\.npy has 153 bytes, and its header says 152; fix$"):
        read_npy(tmp_path / "a.npy", "thing", "fix")
    with pytest.raises(ValueError, match=r"thing .*none\.npy cannot be read: No such file or directory; fix$"):
        read_npy(tmp_path / "none.npy", "thing", "fix")
