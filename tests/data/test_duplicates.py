"""Near-duplicates: planted ones are found by each method and others are not, against imagehash's own distances pair by pair."""

from __future__ import annotations

import io
import re

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_ds.data import duplicates
from igpt_ds.data.duplicates import METHODS, bit_count, find_duplicates, fingerprints, nearest_query
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source

NONE = np.iinfo(np.int64).max


def scene(seed, n_px=32):
    """A random image with more contrast the coarser the detail, as photographs have: uint8 [n_px, n_px, 3]."""
    random = np.random.default_rng(seed)
    total = np.zeros((n_px, n_px, 3))
    for cells in (2, 4, 8, 16):
        octave = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(octave.resize((n_px, n_px), Image.Resampling.BICUBIC)) / cells
    total -= total.min()
    return np.rint(total * 255 / total.max()).astype(np.uint8)


def as_jpeg(image, quality=70):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def cube(levels):
    """A palette of levels^3 colours in a regular grid."""
    axis = np.linspace(-1, 1, levels, dtype=np.float32)
    return Palette(np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3))


@pytest.fixture
def made(tmp_path):
    """Makes a dataset of images in the order given: made("train", images, n_px=32, levels=10) -> its split "train"."""

    def make(name, images, n_px=32, levels=10):
        folder = tmp_path / f"{name}_raw" / "thing"
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:04d}.png")
        source = open_source(f"imagefolder:{folder.parent}")
        write_dataset(tmp_path / name, source, cube(levels), ShardOptions(n_px, val_fraction=0.0, images_per_shard=16))
        return ShardSet(tmp_path / name, "train")

    return make


@pytest.fixture
def planted(made):
    """Five evaluation images, and 60 training images that hold four of them in disguise and one as it is."""
    wanted = [scene(1000 + number) for number in range(5)]
    images = [scene(number) for number in range(60)]
    images[5] = wanted[0]
    images[11] = as_jpeg(wanted[1])
    images[17] = wanted[2][:, ::-1]
    images[23] = (wanted[3].astype(int) * 0.92 + 16).astype(np.uint8)
    images[29] = as_jpeg(wanted[4][:, ::-1])
    return made("train", images), made("eval", wanted)


@pytest.mark.parametrize("method", ["phash", "dhash"])
def test_planted_ones_are_found_and_no_others(planted, method):
    train, evaluated = planted
    found = find_duplicates(train, evaluated, method, 10)
    assert found.train_ids.tolist() == [5, 11, 17, 23, 29]
    assert found.eval_ids.tolist() == [0, 1, 2, 3, 4]
    assert found.mirrored.tolist() == [False, False, True, False, True]
    assert found.distances[0] == 0
    assert found.distances.max() <= 10
    assert (found.flat_train, found.flat_eval, found.n_pairs) == (0, 0, 60 * 10)


def test_equal_tokens_are_found_straight_and_mirrored(planted):
    found = find_duplicates(*planted, "tokens", 0)
    assert found.train_ids.tolist() == [5, 17]
    assert found.eval_ids.tolist() == [0, 2]
    assert found.distances.tolist() == [0, 0]
    assert found.mirrored.tolist() == [False, True]


def test_every_distance_is_imagehashes(planted):
    """All pairs, by imagehash's own subtraction; and a wide radius, so that hits are many."""
    train, evaluated = planted
    found = find_duplicates(train, evaluated, "phash", 16)

    def images(shards):
        return shards.palette.decode(shards.tokens(np.arange(shards.n_images)))

    straight = list(images(evaluated))
    queries = [imagehash.phash(Image.fromarray(np.ascontiguousarray(x))) for x in [*straight, *(x[:, ::-1] for x in straight)]]
    expected = []
    for number, image in enumerate(images(train)):
        distances = [imagehash.phash(Image.fromarray(image)) - query for query in queries]
        best = int(np.argmin(distances))
        if distances[best] <= 16:
            expected.append((number, best % 5, distances[best], best >= 5))
    assert len(expected) >= 5
    assert len({distance for _, _, distance, _ in expected}) > 2
    assert list(zip(*(x.tolist() for x in (found.train_ids, found.eval_ids, found.distances, found.mirrored)), strict=True)) == (
        expected
    )


def test_another_size_and_palette_do_not_matter_to_perceptual_hashes(made):
    wanted = [scene(number, 64) for number in range(4)]
    train = made("train", [scene(number, 64) for number in range(100, 120)] + wanted, n_px=24)
    found = find_duplicates(train, made("eval", wanted, n_px=48, levels=14), "phash", 10)
    assert found.train_ids.tolist() == [20, 21, 22, 23]
    assert found.eval_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_flat_images_exclude_nothing(made, method):
    """Half of the training set is of one colour, in many colours, and the evaluation set holds such images too."""
    plain = [np.full((32, 32, 3), 17 * (number % 15), dtype=np.uint8) for number in range(30)]
    train = made("train", [scene(number) for number in range(30)] + plain)
    evaluated = made("eval", [scene(7), plain[0], plain[3], plain[14]])
    found = find_duplicates(train, evaluated, method, 4 if method != "tokens" else 0)
    assert found.train_ids.tolist() == [7]
    assert (found.flat_train, found.flat_eval) == (30, 3)


def test_nearly_flat_images_and_ramps_are_flat():
    """Noise of a few grey levels; and for dhash what only grows brighter (or darker) to the right, where all bits are equal."""
    noise = np.random.default_rng(0).integers(100, 107, (1, 32, 32, 3), dtype=np.uint8)
    ramp = np.repeat(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))[None, :, :, None], 3, axis=3)
    images = np.concatenate([noise, ramp, ramp[:, :, ::-1], scene(1)[None]])
    assert fingerprints(images, "dhash")[1].tolist() == [True, True, True, False]
    assert fingerprints(images, "phash")[1].tolist()[0] is True
    assert fingerprints(images, "phash")[1].tolist()[3] is False


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_workers_change_nothing(planted, method, monkeypatch):
    train, evaluated = planted
    expected = find_duplicates(train, evaluated, method, 0 if method == "tokens" else 12)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    monkeypatch.setattr(duplicates, "_TASK", 21)
    monkeypatch.setattr(duplicates, "_PAIRS", 16)
    for workers in (1, 2) if method == "phash" else (1,):
        found = find_duplicates(train, evaluated, method, 0 if method == "tokens" else 12, workers)
        for name in ("train_ids", "eval_ids", "distances", "mirrored"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.n_pairs == expected.n_pairs


@pytest.mark.parametrize("method", METHODS)
def test_of_equally_near_ones_the_first_counts_and_unmirrored_before_mirrored(made, method):
    face = scene(3)
    face[:, 16:] = face[:, 15::-1]  # its own mirror image
    train = made("train", [scene(1)[:, ::-1], scene(2), face, scene(1)])
    evaluated = made("eval", [scene(1), scene(1), scene(2)[:, ::-1], scene(2), face, face])
    found = find_duplicates(train, evaluated, method, 0)
    assert found.train_ids.tolist() == [0, 1, 2, 3]
    assert found.eval_ids.tolist() == [0, 3, 4, 0]
    assert found.mirrored.tolist() == [True, False, False, False]


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_is_one_clear_error_from_workers_too(planted, monkeypatch, workers):
    train, evaluated = planted
    shard = train.path / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    monkeypatch.setattr(duplicates, "_TASK", 20)
    with pytest.raises(ValueError, match=r"train-000001.tar: image .* is damaged"):
        find_duplicates(train, evaluated, workers=workers)


words = st.lists(st.integers(0, 2**64 - 1), min_size=0, max_size=20)


@settings(max_examples=60, deadline=None)
@given(hashes=words, queries=words, farthest=st.integers(0, 64), flips=st.lists(st.integers(0, 63), max_size=5))
def test_nearest_equals_brute_force(hashes, queries, farthest, flips):
    queries = queries + [one ^ sum(1 << bit for bit in set(flips)) for one in hashes[:3]]
    got = nearest_query(np.array(hashes, dtype=np.uint64), np.array(queries, dtype=np.uint64), farthest)
    for one, code in zip(hashes, got, strict=True):
        pairs = [(bin(one ^ query).count("1"), number) for number, query in enumerate(queries)]
        within = [pair for pair in pairs if pair[0] <= farthest]
        assert code == ((min(within)[0] << 32) + min(within)[1] if within else NONE)


@pytest.mark.parametrize("numpy1", [False, True])
def test_bit_count(numpy1, monkeypatch):
    if numpy1:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    values = np.random.default_rng(0).integers(0, 2**64, (3, 50), dtype=np.uint64)
    values[0, :3] = 0, 1 << 63, 2**64 - 1
    counts = bit_count(values)
    assert counts.dtype == np.uint8
    np.testing.assert_array_equal(counts, [[bin(int(value)).count("1") for value in row] for row in values])


def test_what_has_no_sense_is_refused(planted, made):
    train, evaluated = planted
    other = made("other", [scene(0), scene(1)], n_px=16)
    recolored = made("recolored", [scene(0), scene(1)], levels=6)
    for arguments, complaint in [
        ((train, ShardSet(train.path, "train")), "hold the same images, all of which would be excluded; name two different sets"),
        ((train, other, "tokens", 0), "(16x16, palette "),
        ((train, recolored, "tokens", 0), "cannot be equal; make both alike, or use --method phash"),
        ((train, evaluated, "phash", -1), "max_distance=-1 must lie in 0..16; unlike images differ in 32 bits"),
        ((train, evaluated, "phash", 17), "max_distance=17 must lie in 0..16"),
        ((train, evaluated, "phash", 4, 0), "workers=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(complaint)):
            find_duplicates(*arguments)


def test_splits_of_one_dataset_may_not_overlap(tiny_dataset):
    whole, val = ShardSet(tiny_dataset, "train+val"), ShardSet(tiny_dataset, "val")
    with pytest.raises(ValueError, match="hold the same images"):
        find_duplicates(whole, val)
    assert find_duplicates(ShardSet(tiny_dataset, "train"), val, "tokens", 0).n_pairs > 0
