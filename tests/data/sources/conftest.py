"""The published layouts of the datasets in small: pickles as Python 2 wrote them, records, planes, tars and tars of tars."""

import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.sources import Entry, open_source


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def _python2_pickle(value):
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def python2_pickle():
    """Pickles a value as Python 2 with its numpy did."""
    return _python2_pickle


@pytest.fixture(scope="session")
def write_tar():
    """Writes {member name: bytes} as a plain tar: write_tar(path, members) -> path."""
    return _write_tar


@pytest.fixture(scope="session")
def archive():
    """Packs a folder as its publisher did: archive(folder, "w:gz", path) -> path."""

    def make(folder, mode, path):
        with tarfile.open(path, mode) as tar:
            tar.add(folder, arcname=folder.name)
        return path

    return make


@pytest.fixture(scope="session")
def encoded():
    """The bytes of a small random image: encoded(seed, "PNG")."""

    def make(seed=0, form="JPEG"):
        buffer = io.BytesIO()
        image = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(image).save(buffer, form)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def everything():
    """Checks what all sources promise: everything(spec) -> (entries, results)."""

    def make(spec):
        source = open_source(spec)
        entries = list(source.entries())
        again = open_source(source.name)
        assert list(again.entries()) == entries == list(source.entries())
        assert again.classes == source.classes
        assert source.val_fraction == (0.04 if spec.startswith("imagenet:") else 0.1)
        assert len({entry.key for entry in entries}) == len(entries)
        assert [entry.split for entry in entries] == sorted((entry.split for entry in entries), key=["train", "test"].index)
        assert all(0 <= entry.label < len(source.classes) for entry in entries)
        assert [Entry(*json.loads(json.dumps(entry))) for entry in entries] == entries
        results = list(source.read(entries))
        assert len(results) == len(entries)
        for stride in (2, 5):  # gaps, and a process that did not list
            for index, result in zip(
                range(1, len(entries), stride), open_source(source.name).read(entries[1::stride]), strict=True
            ):
                np.testing.assert_equal(result, results[index])
        return entries, results

    return make


@pytest.fixture
def cifar(tmp_path, python2_pickle):
    """Writes a small CIFAR in both versions: cifar("cifar10") -> images [n, 32, 32, 3], labels, python folder, binary folder."""

    def make(kind, n=4, test=3, top=tmp_path):
        hundred = kind == "cifar100"
        rng = np.random.default_rng(3)
        batches = {f"data_batch_{i}": n for i in range(1, 6)} | {"test_batch": test}
        batches = {"train": 5 * n, "test": test} if hundred else batches
        images = rng.integers(0, 256, (5 * n + test, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 100 if hundred else 10, len(images))
        python = top / ("cifar-100-python" if hundred else "cifar-10-batches-py")
        binary = top / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
        python.mkdir()
        binary.mkdir()
        start = 0
        for name, count in batches.items():
            part = slice(start, start + count)
            rows = images[part].transpose(0, 3, 1, 2).reshape(count, -1)
            start += count
            heads = [labels[part] // 5, labels[part]] if hundred else [labels[part]]
            (binary / f"{name}.bin").write_bytes(np.concatenate([np.stack(heads, 1).astype(np.uint8), rows], axis=1).tobytes())
            keys = {b"fine_labels": labels[part].tolist(), b"coarse_labels": (labels[part] // 5).tolist()}
            keys = keys if hundred else {b"labels": labels[part].tolist()}
            keys |= {b"filenames": [b"%d.png" % i for i in range(count)]}
            (python / name).write_bytes(python2_pickle({b"batch_label": b"one of many", **keys, b"data": rows}))
        names = [f"class{i:02d}" for i in range(100 if hundred else 10)]
        text = "".join(name + "\n" for name in names)
        (binary / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text(text if hundred else text + "\n")
        key = b"fine_label_names" if hundred else b"label_names"
        meta = {b"num_cases_per_batch": n, key: [name.encode() for name in names], b"num_vis": 3072}
        (python / ("meta" if hundred else "batches.meta")).write_bytes(python2_pickle(meta))
        return images, labels.tolist(), python, binary

    return make


@pytest.fixture(params=["cifar10", "cifar100"])
def kind(request):
    """Each of the two CIFARs."""
    return request.param


@pytest.fixture
def tree(tmp_path):
    """Writes {path: bytes} below a new directory: tree("name", files) -> directory."""

    def make(name, files):
        for path, data in files.items():
            file = Path(tmp_path, name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return tmp_path / name

    return make
