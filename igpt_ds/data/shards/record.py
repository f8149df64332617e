"""The bytes of one image in a shard: conversion of many images to records and back.

In: image names, uint16 grids, labels. Out: records of constant size, each of two members of a plain USTAR file. `dataset.py`
reads with it, `build.py` writes with it.

    offset  bytes
    0       tar header of `000000012.cls`
    512     the class index in nine ASCII digits; the last 8 bytes of the block are the checksum
    1024    tar header of `000000012.npy`
    1536    the .npy file, uint16 [n_px, n_px], padded with zeros to a multiple of 512

The checksum is in tar padding, which readers of tar files skip: they see two ordinary members.
"""

from __future__ import annotations

import io
import tarfile

import numpy as np

END = bytes(1024)  # two empty blocks end a tar file
MAX_IMAGES = 10**9  # nine digits
_BLOCK = 512  # bytes of a tar block
_DIGITS = 9
_POWERS = 10 ** np.arange(_DIGITS - 1, -1, -1)
_OCTAL = 3 * np.arange(5, -1, -1)  # shifts of the six octal digits of a tar header's own checksum
_LABEL_WEIGHT = np.uint64(0x9E3779B97F4A7C15)  # odd, so no two labels have the same weight


def record_dtype(n_px: int) -> np.dtype:
    """The record of an n_px x n_px image as a structured dtype; its itemsize is the stride of a shard."""
    content = len(_npy(n_px))
    fields = {
        "cls_name": (("u1", _DIGITS), 0),
        "cls_sum": (("u1", 6), 148),
        "label": (("u1", _DIGITS), _BLOCK),
        "checksum": ("<u8", 2 * _BLOCK - 8),
        "npy_name": (("u1", _DIGITS), 2 * _BLOCK),
        "npy_sum": (("u1", 6), 2 * _BLOCK + 148),
        "tokens": (("<u2", (n_px, n_px)), 3 * _BLOCK + content - 2 * n_px * n_px),
    }
    formats, offsets = zip(*fields.values(), strict=True)
    itemsize = 3 * _BLOCK + -(-content // _BLOCK) * _BLOCK
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": itemsize})


def pack(names: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Records of N images: names int64 [N], tokens uint16 [N, n_px, n_px], labels int64 [N] -> record_dtype [N]."""
    assert tokens.dtype == np.uint16
    assert not len(names) or (names.min() >= 0 and names.max() < MAX_IMAGES and labels.min() >= 0)
    blank = _blank(tokens.shape[-1])
    # Tiled as bytes: numpy copies only the named fields of a structured array.
    records = np.tile(blank.view(np.uint8), len(names)).view(blank.dtype)
    digits = _ascii(names)
    for member in ("cls", "npy"):
        records[f"{member}_name"] = digits
        total = int(_octal(blank[f"{member}_sum"])[0]) + (digits.astype(np.int64) - ord("0")).sum(axis=1)
        records[f"{member}_sum"] = (total[:, None] >> _OCTAL & 7) + ord("0")
    records["label"] = _ascii(labels)
    records["tokens"] = tokens
    records["checksum"] = checksum(tokens, labels)
    return records


def names_of(records: np.ndarray) -> np.ndarray:
    """The numbers that name the images of some records: int64 [N]; any number if a name is damaged."""
    return numbers(records["cls_name"])


def numbers(digits: np.ndarray) -> np.ndarray:
    """ASCII digits, uint8 [N, 9] -> int64 [N]."""
    return (digits - np.uint8(ord("0"))) @ _POWERS


def checksum(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The checksum of images: uint16 [N, n_px, n_px], int64 [N] -> uint64 [N], a sum of the 64-bit words and the label.

    It detects any change within one word, and other changes with probability 1 - 2^-64. It costs as much as copying the tokens.
    """
    flat = np.ascontiguousarray(tokens).reshape(len(tokens), tokens.shape[1] * tokens.shape[2])
    words = flat.view("<u8") if flat.shape[1] % 4 == 0 else flat
    return np.add.reduce(words, axis=1, dtype=np.uint64) + labels.astype(np.uint64) * _LABEL_WEIGHT


def _ascii(values: np.ndarray) -> np.ndarray:
    return (values[:, None] // _POWERS % 10 + ord("0")).astype(np.uint8)


def _octal(digits: np.ndarray) -> np.ndarray:
    return ((digits.astype(np.int64) - ord("0")) << _OCTAL).sum(axis=1)


def _npy(n_px: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros((n_px, n_px), dtype="<u2"), version=(1, 0))
    return file.getvalue()


def _blank(n_px: int) -> np.ndarray:
    """The record of image 0 with label 0 and all tokens 0, written by the standard library's tarfile: record_dtype [1]."""
    content = b""
    for suffix, member in (("cls", b"0" * _DIGITS), ("npy", _npy(n_px))):
        info = tarfile.TarInfo(f"{0:0{_DIGITS}d}.{suffix}")
        info.size, info.mode = len(member), 0o444
        content += info.tobuf(tarfile.USTAR_FORMAT) + member + bytes(-len(member) % _BLOCK)
    return np.frombuffer(content, record_dtype(n_px))
