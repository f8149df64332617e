"""Records are plain tar members whatever the size, names and labels; their checksum sees every change."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.shards.record import END, checksum, names_of, numbers, pack, record_dtype


def some(n, n_px, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 65536, (n, n_px, n_px)).astype(np.uint16)
    return random.integers(0, 10**9, n), tokens, random.integers(0, 1000, n)


@pytest.mark.parametrize("n_px", [1, 2, 3, 4, 5, 8, 13, 32, 64, 224])
def test_the_standard_library_s_tar_reads_them(n_px):
    names, tokens, labels = some(5, n_px)
    records = pack(names, tokens, labels)
    assert records.dtype == record_dtype(n_px)
    assert records.dtype.itemsize % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(records.tobytes() + END), mode="r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{name:09d}.{suffix}" for name in names for suffix in ("cls", "npy")]
        for index, (cls, npy) in enumerate(zip(members[::2], members[1::2], strict=True)):
            assert int(tar.extractfile(cls).read()) == labels[index]
            np.testing.assert_array_equal(np.load(io.BytesIO(tar.extractfile(npy).read())), tokens[index])


def test_what_was_packed_comes_back():
    names, tokens, labels = some(100, 4)
    records = pack(names, tokens, labels)
    np.testing.assert_array_equal(names_of(records), names)
    np.testing.assert_array_equal(numbers(records["label"]), labels)
    np.testing.assert_array_equal(records["tokens"], tokens)
    np.testing.assert_array_equal(records["checksum"], checksum(tokens, labels))


def test_no_images():
    assert len(pack(*some(0, 4))) == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.data())
def test_checksum_sees_every_change_of_one_token_or_label(n_px, data):
    _, tokens, labels = some(1, n_px)
    before = checksum(tokens, labels)
    place = data.draw(st.integers(-1, n_px * n_px - 1))
    if place < 0:
        other = data.draw(st.integers(0, 10**9 - 1).filter(lambda label: label != labels[0]))
        assert checksum(tokens, np.array([other])) != before
    else:
        tokens.reshape(-1)[place] ^= data.draw(st.integers(1, 65535))
        assert checksum(tokens, labels) != before
