"""The token arrays of OpenAI's release: tokens pass unchanged, files are mapped, and what is wrong is one line."""

import numpy as np
import pytest

from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import dataset_name, open_source, openai_arrays

SIZES = {"tr": 5, "va": 2, "te": 3}


@pytest.fixture
def arrays(tmp_path):
    """Arrays of the released layout in small, and the tokens and labels by part of the name."""
    random = np.random.default_rng(3)
    tokens = {part: random.integers(0, 512, (n, 1024)) for part, n in SIZES.items()}
    labels = {part: random.integers(0, 10, n) for part, n in SIZES.items()}
    for part in SIZES:
        np.save(tmp_path / f"imagenet_{part}X.npy", tokens[part].astype(np.int32))
        np.save(tmp_path / f"imagenet_{part}Y.npy", np.eye(10, dtype=np.float32)[labels[part]])
    return tmp_path, tokens, labels


@pytest.fixture
def palette(monkeypatch):
    """A palette of the test's own in the place of OpenAI's."""
    made = Palette(np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32))
    monkeypatch.setattr(openai_arrays, "OPENAI_PALETTE_HASH", made.hash)
    return made


def test_shards_hold_the_tokens_and_labels_of_the_arrays(arrays, palette, tmp_path):
    where, tokens, labels = arrays
    source = open_source(f"openai:{where}")
    assert (source.name, source.val_fraction, dataset_name(f"openai:{where}")) == (f"openai:{where}/imagenet", 0.0, "imagenet")
    out = tmp_path / "shards"
    write_dataset(out, source, palette, ShardOptions(32))
    for part, split in (("tr", "train"), ("va", "val"), ("te", "test")):
        made = ShardSet(out, split)
        found, classes = made.read(np.arange(SIZES[part]))
        np.testing.assert_array_equal(found.reshape(-1, 1024), tokens[part])
        assert classes.tolist() == labels[part].tolist()
        assert made.keys_of(np.arange(1)) == [f"{split}/0000000"]
    index = read_index(out)
    assert (index.crop, index.filter, index.palette_hash, len(index.classes)) == ("center", None, palette.hash, 10)


def test_the_test_arrays_alone_and_integer_labels(arrays, palette, tmp_path):
    where, _, labels = arrays
    for part in ("tr", "va"):
        (where / f"imagenet_{part}X.npy").unlink()
    np.save(where / "imagenet_teY.npy", labels["te"])
    write_dataset(tmp_path / "shards", open_source(f"openai:{where}/imagenet"), palette, ShardOptions(32))
    assert list(read_index(tmp_path / "shards").splits) == ["test"]
    (where / "imagenet_teY.npy").unlink()
    assert [entry.label for entry in open_source(f"openai:{where}", "ignore").entries()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("trX", np.zeros((5, 1024)), "trX.npy is float64 .*expected integers"),
        ("trX", np.zeros((5, 1000), int), r"trX.npy is int64 \[5, 1000\], expected"),
        ("teX", np.zeros((3, 64), int), "teX.npy has 8x8 pixels, .*trX.npy 32x32"),
        ("vaX", np.full((2, 1024), 512), "vaX.npy row 0 holds 512; tokens lie in 0..511"),
        ("teX", np.full((3, 1024), -1), "teX.npy row 0 holds -1"),
        ("trY", np.zeros((5, 10)), "trY.npy row 0 is no class"),
        ("vaY", np.eye(10)[:3], r"vaY.npy is float64 \[3, 10\], expected one-hot \[2, K\]"),
        ("teY", np.array([0, 1, -2]), "teY.npy row 2 is no class"),
        ("teX", np.array(3), r"teX.npy is int64 \[\], expected"),
        ("teY", np.eye(7)[:3], "teY.npy has 7 classes, expected 10"),
        ("teY", np.array([0, 1, 10**12]), "teY.npy has 1000000000001 classes, expected 10"),
        ("teY", None, "teY.npy does not exist; download it, or add --labels ignore"),
    ],
)
def test_what_is_wrong_is_named(arrays, name, array, message):
    where, file = arrays[0], arrays[0] / f"imagenet_{name}.npy"
    file.unlink()
    if array is not None:
        np.save(file, array)
    with pytest.raises(ValueError, match=f"{where}/imagenet_.*{message}"):
        _read_all(f"openai:{where}")


def _read_all(spec):
    source = open_source(spec)
    assert source.classes
    return list(source.read(list(source.entries())))


def test_options_that_would_change_the_tokens_are_refused(arrays, palette):
    source = open_source(f"openai:{arrays[0]}")
    for options, given, message in (
        (ShardOptions(16), palette, "use --n_px 32, not 16"),
        (ShardOptions(32, crop="center"), palette, "omit --crop and --filter"),
        (ShardOptions(32, filter="box"), palette, "omit --crop and --filter"),
        (ShardOptions(32), Palette(-palette.colors), "use kmeans_centers.npy"),
    ):
        with pytest.raises(ValueError, match=message):
            options.settings(source, given)
    np.save(arrays[0] / "cifar10_teX.npy", np.zeros((1, 1024), int))
    with pytest.raises(ValueError, match=f"holds arrays of cifar10, imagenet; name one, openai:{arrays[0]}/cifar10"):
        open_source(f"openai:{arrays[0]}")
