"""Images that a user names: the tokens of shards, a stable order, labels from class folders, a count of what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.given_images import GivenImages, read_images
from igpt_ds.data.images import decode_image, square
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.data.shards.dataset import ImageSet, ShardSet


@pytest.fixture
def palette(tiny_dataset: Path) -> Palette:
    return load_palette(tiny_dataset / "palette.npy")


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 9, 3), dtype=np.uint8)).save(path)
    return path


def below(images: GivenImages, root: Path) -> list[str]:
    return [str(Path(key).relative_to(root)) for key in images.keys]


def test_they_are_the_images_of_shards(tiny_images: Path, tiny_dataset: Path, palette: Palette) -> None:
    images: ImageSet = read_images([tiny_images], palette, 4)
    shards: ImageSet = ShardSet(tiny_dataset, "train+val")
    for name in ("n_images", "n_px", "n_vocab", "classes", "palette_hash"):
        assert getattr(images, name) == getattr(shards, name), name
    rows = [
        sorted((label, *grid.ravel()) for label, grid in zip(one.labels(ids), one.tokens(ids), strict=True))
        for one, ids in ((one, np.arange(48)) for one in (images, shards))
    ]
    assert rows[0] == rows[1]


def test_files_and_folders_keep_their_order(tmp_path: Path, palette: Palette) -> None:
    names = ["b/2.png", "b/10.png", "b/deep/x.png", "b/a.jpg", "z.png"]
    files = {name: save(tmp_path / name, seed) for seed, name in enumerate(names)}
    images = read_images([tmp_path / "z.png", tmp_path / "b"], palette, 3)
    assert below(images, tmp_path) == ["z.png", "b/10.png", "b/2.png", "b/a.jpg", "b/deep/x.png"]
    for number, key in enumerate(images.keys):
        expected = palette.encode(square(decode_image(Path(key).read_bytes()), 3))
        assert (images.tokens(np.array([number]))[0] == expected).all()
        assert images.keys_of(np.array([number])) == [key]
    assert read_images([files["z.png"], tmp_path / "b"], palette, 3).dataset_hash == images.dataset_hash


@pytest.mark.parametrize(
    ("names", "given", "classes"),
    [
        (["a.png", "b.png"], ["."], [None, None]),
        (["cat/a.png", "dog/b.png"], ["."], ["cat", "dog"]),
        (["cat/a.png", "dog/b.png"], ["cat", "dog"], ["cat", "dog"]),
        (["cat/a.png", "dog/b.png"], ["cat"], [None]),
        (["cat/a.png", "cat/deep/c.png", "loose.png"], ["."], [None, "cat", "cat"]),
        (["test/cat/a.png", "train/dog/b.png"], ["."], ["cat", "dog"]),
        (["test/a.png", "train/b.png"], ["."], ["test", "train"]),
        (["cat/a.png", "b.png"], ["b.png", "cat"], [None, "cat"]),
    ],
)
def test_class_folders_are_labels(names, given, classes, tmp_path: Path, palette: Palette) -> None:
    for name in names:
        save(tmp_path / name)
    images = read_images([tmp_path / name for name in given], palette, 3)
    known = sorted({name for name in classes if name})
    assert (images.classes, images.labelled) == (known, bool(known))
    assert list(images.labels(np.arange(len(classes)))) == [known.index(name) if name else -1 for name in classes]
    assert list(images.labels_among(["dog", "cat"])) == [{"dog": 0, "cat": 1}.get(name, -1) for name in classes]


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path, palette: Palette, capsys) -> None:
    save(tmp_path / "good.png")
    for name, content in {"notes.txt": b"x", "broken.png": b"\x89PNG", "empty.jpg": b"", ".hidden.png": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    images = read_images([tmp_path], palette, 3)
    assert below(images, tmp_path) == ["good.png"]
    assert {row.reason: row.n for row in images.left_out} == {
        "cannot be decoded": 1,
        "empty": 1,
        "hidden": 1,
        "not images by name": 1,
    }
    images.print_left_out()
    assert "left out    cannot be decoded: 1 .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["good.png", "none.png"], "none.png"),
        (["good.png", "notes.txt"], "notes.txt cannot be read as an image"),
        (["good.png", "empty"], "empty holds no image"),
        (["bad"], "cannot be decoded: 1 .png"),
    ],
)
def test_what_a_user_names_must_be_there(given, complaint, tmp_path: Path, palette: Palette) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=complaint):
        read_images([tmp_path / name for name in given], palette, 3)
