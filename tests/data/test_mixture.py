"""Datasets mixed by weight in one order, exclusion lists, and what becomes of damaged images."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.exclusion import ExclusionReason, write_exclusion
from igpt_ds.data.loader import BatchLayout, Loader
from igpt_ds.data.mixture import Mixture, open_mixture
from igpt_ds.data.order import BLOCK, ONE_VIEW_ORDER, ORDER_VERSION
from igpt_ds.data.shards.build import copy_images, write_dataset
from igpt_ds.data.shards.dataset import DamagedImagesError, ShardSet
from igpt_ds.data.shards.layout import ShardOptions

STRIDE = 2048  # bytes of a 4x4 image in a shard
TOKENS = 1536 + 128  # of which the tokens begin here


@pytest.fixture
def dataset(tmp_path, memory, palette8):
    """Makes a dataset of n images: dataset("a", 20, seed=1) -> its directory."""

    def make(name, n, seed=0, n_px=4, palette=palette8):
        write_dataset(
            tmp_path / name, memory(n, n_px, seed=seed), palette, ShardOptions(n_px, val_fraction=0, images_per_shard=16)
        )
        return tmp_path / name

    return make


def spoil(path, *images):
    """Damages tokens of images, 16 of which are in each shard."""
    for image in images:
        with open(path / f"train-{image // 16:06d}.tar", "r+b") as file:
            file.seek(image % 16 * STRIDE + TOKENS + 2)
            before = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([before[0] ^ 1]))


def step_of(mixture, images_seen, micro_batch, world_size, accumulation, seed):
    batch_images = micro_batch * world_size * accumulation
    loaders = [Loader(mixture, BatchLayout(batch_images, micro_batch, rank, world_size), seed) for rank in range(world_size)]
    parts = [loader.batch(images_seen, micro_step) for micro_step in range(accumulation) for loader in loaders]
    return torch.cat([part.tokens for part in parts]).numpy()


# --------------------------------------------------------------------------------------------------- mixing


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 10), min_size=4, max_size=4),
    micro_batch=st.integers(1, 5),
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    images_seen=st.integers(0, 10**9),
    seed=st.integers(0, 2**63),
)
def test_any_layout_sees_the_same_images(tiny_of, sizes, weights, micro_batch, world_size, accumulation, images_seen, seed):
    mixture = Mixture([tiny_of(n) for n in sizes], weights[: len(sizes)])
    batch_images = micro_batch * world_size * accumulation
    found = step_of(mixture, images_seen, micro_batch, world_size, accumulation, seed)
    which, ids = mixture.images_at(np.arange(images_seen, images_seen + batch_images), seed)
    wanted = [tiny_of(sizes[k]).tokens(np.array([image]))[0].ravel() for k, image in zip(which, ids, strict=True)]
    np.testing.assert_array_equal(found, np.stack(wanted))


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    layout=st.sampled_from([(4, 2, 1), (1, 3, 2), (8, 1, 4), (5, 4, 1)]),
    start=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_each_image_once_an_epoch_of_its_dataset(tiny_of, sizes, weights, layout, start, seed):
    """The loaders of all ranks together over a whole block: counts of a dataset's images never differ by more than one."""
    mixture = Mixture([tiny_of(n) for n in sizes], weights[: len(sizes)])
    micro_batch, world_size, accumulation = layout
    batch_images = micro_batch * world_size * accumulation
    steps = -(-BLOCK // batch_images)
    streams = [
        Loader(mixture, BatchLayout(batch_images, micro_batch, rank, world_size), seed).stream(0) for rank in range(world_size)
    ]
    seen = []
    for _ in range(steps * accumulation):
        seen += [next(stream).tokens.numpy() for stream in streams]
    for stream in streams:
        stream.close()
    seen = np.concatenate(seen)
    resumed = step_of(mixture, start * batch_images, micro_batch, world_size, accumulation, seed)
    np.testing.assert_array_equal(seen[start * batch_images : (start + 1) * batch_images], resumed)
    counted = Counter(grid.tobytes() for grid in seen[:BLOCK])
    expected = Counter()
    for shards, share in zip(mixture.shard_sets, mixture.shares, strict=True):
        every = [grid.tobytes() for grid in shards.tokens(np.arange(shards.n_images))]
        expected.update(dict.fromkeys(every, share // shards.n_images))
    extra = counted - expected
    assert not expected - counted
    assert sum(extra.values()) == sum(share % n for share, n in zip(mixture.shares, sizes, strict=True))


def test_one_dataset_alone_is_read_as_without_a_mixture(tiny_of):
    one, other = Loader(tiny_of(23), BatchLayout(4, 4), seed=5), Loader(Mixture([tiny_of(23)], [7.0]), BatchLayout(4, 4), seed=5)
    for seen in (0, 4, 8):
        assert torch.equal(one.batch(seen, 0).tokens.long(), other.batch(seen, 0).tokens.long())
    assert Mixture([tiny_of(23)]).dataset_hash == tiny_of(23).dataset_hash


def test_weights_follow_the_sizes_when_left_out(tiny_of):
    assert Mixture([tiny_of(10), tiny_of(30)]).shares == [BLOCK // 4, 3 * BLOCK // 4]


def test_the_hash_covers_datasets_order_and_shares(tiny_of):
    one, other = tiny_of(10), tiny_of(30)
    mixtures = [Mixture([one, other]), Mixture([other, one]), Mixture([one, other], [1, 1]), Mixture([one])]
    assert len({mixture.dataset_hash for mixture in mixtures}) == 4
    assert Mixture([one, other], [2, 6]).dataset_hash == mixtures[0].dataset_hash
    facts = mixtures[0].facts()
    assert (facts.order, facts.path) == (ORDER_VERSION, f"{one.path} + {other.path}")
    assert [part.share for part in facts.datasets] == [BLOCK // 4, 3 * BLOCK // 4]


def test_datasets_that_do_not_fit_together(dataset, palette8):
    paths = [dataset("a", 5), dataset("large", 5, n_px=8)]
    with pytest.raises(ValueError, match=r"a has n_px 4 and \S+large 8; to train on both, make the shards again with the same"):
        open_mixture(paths)
    other = dataset("other", 5, palette=type(palette8)(palette8.colors[::-1].copy()))
    with pytest.raises(ValueError, match=r"a has palette_hash \w+ and \S+other \w+; to train on both"):
        open_mixture([paths[0], other])
    with pytest.raises(ValueError, match=r"--data_weights has 1 numbers for 2 datasets; give one for each"):
        open_mixture([paths[0], dataset("b", 5)], [1.0])
    with pytest.raises(ValueError, match="names a dataset twice; give it a larger weight instead"):
        open_mixture([paths[0], paths[0].parent / "large" / ".." / "a"])


def test_a_dataset_too_large_for_the_order(tiny_of, monkeypatch):
    monkeypatch.setattr("igpt_ds.data.mixture.MAX_IMAGES", 9)
    with pytest.raises(ValueError, match="has 10 images; more than 9 need several datasets"):
        Mixture([tiny_of(10)])


def test_labels_of_different_classes_are_not_mixed(tiny_of, tmp_path, memory, palette8):
    write_dataset(tmp_path / "x", memory(5, classes=["web"]), palette8, ShardOptions(4, val_fraction=0))
    mixture = Mixture([tiny_of(10), ShardSet(tmp_path / "x", "train")])
    Loader(mixture, BatchLayout(4, 4), with_labels=False)
    with pytest.raises(ValueError, match="have different classes, so their labels cannot be mixed; name one dataset"):
        Loader(mixture, BatchLayout(4, 4))


# --------------------------------------------------------------------------------------------------- exclusion lists


def test_excluded_images_never_come(dataset, tmp_path):
    paths = [dataset("a", 20, seed=1), dataset("b", 30, seed=2)]
    lists = [tmp_path / "b.json", tmp_path / "a.json"]
    for file, path, ids in zip(lists, paths[::-1], ([3, 29], [0, 7]), strict=True):
        write_exclusion(file, ShardSet(path, "train"), np.array(ids), ExclusionReason("for a test"))
    mixture, whole = open_mixture(paths, exclusions=lists), open_mixture(paths)
    assert [shards.n_images for shards in mixture.shard_sets] == [18, 28]
    assert mixture.dataset_hash != whole.dataset_hash
    tokens, _ = mixture.read(*mixture.images_at(np.arange(BLOCK), 0), with_labels=False)
    came = {grid.tobytes() for grid in tokens}
    left_out = [*whole.shard_sets[0].tokens(np.array([0, 7])), *whole.shard_sets[1].tokens(np.array([3, 29]))]
    assert len(came) == 46
    assert not came & {grid.tobytes() for grid in left_out}


def test_lists_that_fit_no_dataset_and_two_of_one(dataset, tmp_path):
    a, b, c = (dataset(name, 10, seed=seed) for seed, name in enumerate("abc"))
    for name, path in (("one", a), ("two", a), ("of_c", c)):
        write_exclusion(tmp_path / f"{name}.json", ShardSet(path, "train"), np.array([1]), ExclusionReason("for a test"))
    with pytest.raises(ValueError, match=r"exclusion list \S+of_c\.json is about images"):
        open_mixture([a, b], exclusions=[tmp_path / "of_c.json"])
    write_exclusion(tmp_path / "two.json", ShardSet(a, "train"), np.array([1, 4]), ExclusionReason("for a test"))
    mixture = open_mixture([b, a], exclusions=[tmp_path / "one.json", tmp_path / "two.json"])
    assert [shards.n_images for shards in mixture.shard_sets] == [10, 8]


# --------------------------------------------------------------------------------------------------- train+val


def test_train_and_val_are_one_dataset_and_lists_of_each_fit(tiny, dataset, tmp_path):
    train, val = (ShardSet(tiny, split) for split in ("train", "val"))
    for shards, ids in ((train, [0]), (val, [1, 2])):
        write_exclusion(tmp_path / f"{shards.split}.json", shards, np.array(ids), ExclusionReason("for a test"))
    lists = [tmp_path / "val.json", tmp_path / "train.json"]
    both, less = open_mixture([tiny], split="val+train"), open_mixture([tiny], exclusions=lists, split="train+val")
    assert both.facts().split == less.facts().split == "train+val"
    assert (both.n_images, less.n_images) == (40, 37)
    every = np.concatenate([shards.tokens(np.arange(shards.n_images)) for shards in (train, val)])
    np.testing.assert_array_equal(everything(both, 40)[0], every)
    np.testing.assert_array_equal(everything(less, 37)[0], np.delete(every, [0, train.n_images + 1, train.n_images + 2], axis=0))

    mixed = open_mixture([tiny, dataset("web", 9)], split="train+val")  # which has no validation images to fold back
    assert [shards.split for shards in mixed.shard_sets] == ["train+val", "train"]
    with pytest.raises(ValueError, match=r"web has no split 'val'; it has train"):
        open_mixture([tmp_path / "web"], split="train+val")
    with pytest.raises(ValueError, match=r"split 'train\+val\+train' names 'train' twice; name each split once"):
        ShardSet(tiny, "train+val+train")


# --------------------------------------------------------------------------------------------------- damaged images


def everything(mixture, n):
    return mixture.read(np.zeros(n, dtype=np.int64), np.arange(n), with_labels=True)


def test_a_damaged_image_stops_the_run(dataset):
    path = dataset("a", 40)
    spoil(path, 17)
    with pytest.raises(DamagedImagesError, match=r"train-000001\.tar: image 1 at byte 2048 is damaged; .*--on_bad skip"):
        everything(open_mixture([path]), 40)


def test_skipped_images_are_replaced_by_the_next_whole_one(dataset, capsys):
    path = dataset("a", 40)
    tokens, labels = everything(open_mixture([path]), 40)
    spoil(path, 0, 17, 18, 39)
    mixture = open_mixture([path], on_bad="skip", max_bad=0.1)
    found, found_labels = everything(mixture, 40)
    instead = np.arange(40)
    instead[[0, 17, 18, 39]] = [1, 19, 19, 1]
    np.testing.assert_array_equal(found, tokens[instead])
    np.testing.assert_array_equal(found_labels, labels[instead])
    everything(mixture, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"image {bad} of {path} (train) is damaged; image {good} is used instead"
        for bad, good in ((0, 1), (17, 19), (18, 19), (39, 1))
    ]
    assert mixture.n_skipped == 4


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from([(4, 2, 1), (1, 3, 2), (8, 1, 1), (2, 2, 3)]),
    start=st.integers(0, 200),
    seed=st.integers(0, 2**32),
    known=st.booleans(),
)
def test_every_layout_takes_the_same_images_instead(spoiled, layout, start, seed, known):
    """Found one after the other in whatever order, or all before the first step."""
    whole, path, instead = spoiled
    mixture = open_mixture([path], on_bad="skip", max_bad=0.2)
    if known:
        mixture.skip([shards.damaged_ids() for shards in mixture.shard_sets], aloud=False)
        assert mixture.n_skipped == 5
    batch_images = layout[0] * layout[1] * layout[2]
    for seen in (start, start + batch_images):
        _, ids = mixture.images_at(np.arange(seen, seen + batch_images), seed)
        found = step_of(mixture, seen, *layout, seed)
        np.testing.assert_array_equal(found, whole[instead[ids]].reshape(batch_images, -1))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory, memory, palette8):
    """The tokens of 40 images, a directory of them with five damaged, and what to take for each."""
    path = tmp_path_factory.mktemp("spoiled") / "a"
    write_dataset(path, memory(40), palette8, ShardOptions(4, val_fraction=0, images_per_shard=16))
    tokens = ShardSet(path, "train").tokens(np.arange(40))
    spoil(path, 3, 15, 16, 17, 39)
    instead = np.arange(40)
    instead[[3, 15, 16, 17, 39]] = [4, 18, 18, 18, 0]
    return tokens, path, instead


@pytest.mark.parametrize("before", [False, True])
def test_too_many_damaged_images_stop_the_run(dataset, before, capsys):
    path = dataset("a", 40)
    spoil(path, *range(20, 25))
    mixture = open_mixture([path], on_bad="skip", max_bad=0.1)
    message = (
        r"5 of 40 images of \S+a \(train\) are damaged, image 20 among them; --max_bad 0.1 allows 4: see tools/verify_shards"
    )
    with pytest.raises(ValueError, match=message):
        mixture.skip([mixture.shard_sets[0].damaged_ids()]) if before else everything(mixture, 40)
    assert not capsys.readouterr().err


def test_the_last_whole_image_is_never_left_out(dataset):
    path = dataset("a", 3)
    spoil(path, 0, 1, 2)
    with pytest.raises(ValueError, match=r"--max_bad 0\.999 allows 2"):
        everything(open_mixture([path], on_bad="skip", max_bad=0.999), 3)


# --------------------------------------------------------------------------------------------------- stored views


@pytest.fixture(scope="module")
def viewed(tmp_path_factory, memory, palette8):
    """Twelve images of which four are for validation and one is unreadable, three views of each training image."""
    path = tmp_path_factory.mktemp("views") / "shards"
    options = ShardOptions(4, val_fraction=0.34, images_per_shard=7, crop="random", views=3)
    write_dataset(path, memory(12, 9, unreadable=(5,)), palette8, options, max_bad=0.5)
    return path


def test_an_epoch_of_one_view_has_each_image_once_and_three_have_every_view(viewed):
    images = open_mixture([viewed], one_view=True)
    shards, n = images.shard_sets[0], images.n_originals
    assert (images.n_images, images.facts().order) == (3 * n, ONE_VIEW_ORDER)
    epochs = images.images_at(np.arange(4 * n), seed=3)[1].reshape(4, n)
    for epoch in epochs:
        assert len(set(shards.keys_of(epoch))) == n
    assert sorted(epochs[:3].ravel()) == list(range(3 * n))
    assert len(set(epochs[0] % 3)) > 1  # an epoch mixes first, second and third views
    np.testing.assert_array_equal(images.images_at(np.arange(n + 2, n + 5), 3)[1], epochs.ravel()[n + 2 : n + 5])
    plain = open_mixture([viewed])
    assert (plain.n_images, plain.n_originals, plain.facts().order) == (3 * n, n, ORDER_VERSION)
    assert sorted(plain.images_at(np.arange(3 * n), 3)[1]) == list(range(3 * n))


def test_views_are_counted_once_with_exclusions_joined_splits_and_chosen_images(viewed, tmp_path):
    whole = ShardSet(viewed, "train")
    n, n_val = whole.n_images // 3, ShardSet(viewed, "val").n_images
    assert whole.first_views().tolist() == list(range(0, 3 * n, 3))
    assert ShardSet(viewed, "val").first_views() is None
    fewer = ShardSet(viewed, "train", exclude=np.array([0, 3, 4, 5]))  # a view of the first image, all of the second
    assert fewer.first_views().tolist() == [0, *range(2, 3 * n - 4, 3)]
    both = open_mixture([viewed], split="train+val", one_view=True)
    assert both.n_originals == n + n_val
    ids = both.images_at(np.arange(both.n_originals), 0)[1]
    assert set(range(3 * n, 3 * n + n_val)) <= set(ids.tolist())
    copy_images(tmp_path / "some", whole, np.array([1, 2, 6, 10, 11]), note={"how": "by hand"})
    assert ShardSet(tmp_path / "some", "train").first_views().tolist() == [0, 2, 3]

    taken = fewer.take(np.array([0, 2]))
    assert taken.dataset_hash not in (whole.dataset_hash, fewer.dataset_hash)
    np.testing.assert_array_equal(taken.tokens(np.arange(2)), whole.tokens(np.array([1, 6])))
    np.testing.assert_array_equal(whole.one_view().tokens(np.arange(n)), whole.tokens(np.arange(0, 3 * n, 3)))
