"""STL-10: planes of columns become images, labels begin at 1, the unlabelled images are left aside."""

import numpy as np
import pytest

from igpt_ds.data.sources import open_source

CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


@pytest.fixture
def stl10(tmp_path):
    """A small STL-10: images [5, 96, 96, 3], labels, folder; 3 to train and 2 to test."""
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    labels = np.array([9, 0, 4, 4, 2])
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, part in (("train", slice(3)), ("test", slice(3, 5))):
        columns = [np.stack([image[:, x, c] for c in range(3) for x in range(96)]) for image in images[part]]
        (folder / f"{split}_X.bin").write_bytes(np.stack(columns).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels[part] + 1).astype(np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(bytes(96 * 96 * 3))
    (folder / "fold_indices.txt").write_text("0 1\n")
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    return images, labels.tolist(), folder


def test_every_form_gives_the_same_images(stl10, archive, everything, tmp_path):
    images, labels, folder = stl10
    first = None
    for path in (folder, tmp_path, archive(folder, "w:gz", tmp_path / "stl10_binary.tar.gz")):
        entries, results = everything(f"stl10:{path}")
        np.testing.assert_array_equal(np.stack(results), images)
        assert [entry.label for entry in entries] == labels
        assert open_source(f"stl10:{path}").classes == CLASSES
        first = first or entries
        assert entries == first
    assert [entry.key for entry in first] == ["train/0000", "train/0001", "train/0002", "test/0000", "test/0001"]


def test_the_test_files_may_be_absent_together(stl10):
    _, _, folder = stl10
    (folder / "test_y.bin").unlink()
    with pytest.raises(ValueError, match=f"{folder}/test_y.bin does not exist; unpack or download the dataset again"):
        open_source(f"stl10:{folder}")
    (folder / "test_X.bin").unlink()
    assert [entry.key for entry in open_source(f"stl10:{folder}").entries()] == ["train/0000", "train/0001", "train/0002"]


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin", "class_names.txt"])
def test_absent_files_are_named(stl10, name):
    _, _, folder = stl10
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder}/{name} does not exist; unpack or download the dataset again"):
        open_source(f"stl10:{folder}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "test_X.bin",
            lambda data: data[:-1],
            r"has 55295 bytes, which is not a multiple of 27648: it was cut; download it again",
        ),
        ("train_X.bin", lambda data: b"", r"has 0 bytes, which is not a multiple of 27648: it was cut"),
        ("train_y.bin", lambda data: data[:-1], r"holds 2 labels for the 3 images of train_X.bin; download both again"),
        ("test_y.bin", lambda data: b"\0" + data[1:], r"holds the label 0; labels lie in 1..10. Download it again"),
        ("test_y.bin", lambda data: b"\x0b" + data[1:], r"holds the label 11; labels lie in 1..10"),
    ],
)
def test_damaged_files_are_named(stl10, name, change, message):
    _, _, folder = stl10
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{folder}/{name} {message}"):
        list(open_source(f"stl10:{folder}").entries())


def test_a_file_that_changed_after_listing_is_an_error(stl10):
    _, _, folder = stl10
    entries = list(open_source(f"stl10:{folder}").entries())
    file = folder / "train_X.bin"
    file.write_bytes(file.read_bytes()[:27648])
    with pytest.raises(ValueError, match=rf"{file} was listed with train/0001 but ends before; list it again"):
        list(open_source(f"stl10:{folder}").read(entries))
