"""Batches are a pure function of the images seen: any ranks, any accumulation, any resume give the same images."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.config import ModelConfig
from igpt_ds.data import loader as loader_module
from igpt_ds.data.loader import Augment, Batch, BatchLayout, Loader, augment, check_shards, one_pass, sequential
from igpt_ds.data.order import shuffled
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import DamagedImagesError, ShardSet
from igpt_ds.data.shards.layout import ShardOptions


def step_of(shards, images_seen, batch_images, world_size, accumulation, **options):
    """One whole step, gathered from all ranks: [accumulation, world_size, micro_batch] flattened."""
    micro_batch = batch_images // (world_size * accumulation)
    loaders = [Loader(shards, BatchLayout(batch_images, micro_batch, rank, world_size), **options) for rank in range(world_size)]
    parts = [loader.batch(images_seen, micro_step) for micro_step in range(accumulation) for loader in loaders]
    return [torch.cat(column) for column in zip(*((*part[:2], part.positions) for part in parts), strict=True)]


def assert_same(one, other):
    assert one[0].dtype == other[0].dtype == torch.uint16
    assert torch.equal(one[0].long(), other[0].long())
    assert torch.equal(one[1], other[1])
    assert one[2:] == other[2:] if isinstance(one, Batch) else torch.equal(one[2], other[2])


# --------------------------------------------------------------------------------------------------- training batches


@pytest.fixture(scope="module")
def fold_back(tmp_path_factory, memory, palette8):
    """48 images, some of which are validation images."""
    path = tmp_path_factory.mktemp("fold_back") / "shards"
    write_dataset(path, memory(48), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=7))
    return path


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("split", ["train", "train+val"])
def test_each_image_once_an_epoch(tiny_of, fold_back, split, world_size, accumulation):
    shards = tiny_of(48) if split == "train" else ShardSet(fold_back, split)
    every = shards.tokens(np.arange(48)).reshape(48, 16)
    assert len(np.unique(every, axis=0)) == shards.n_images == 48
    for epoch in range(3):
        steps = [step_of(shards, epoch * 48 + seen, 24, world_size, accumulation, seed=1) for seen in (0, 24)]
        tokens = torch.cat([step[0] for step in steps]).numpy()
        assert sorted(tokens.tolist()) == sorted(every.tolist())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40) | st.just("train+val"),
    micro_batch=st.integers(1, 5),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    images_seen=st.integers(0, 10**10),
    seed=st.integers(0, 2**64),
    pad=st.integers(0, 3),
    flip=st.booleans(),
)
def test_any_layout_equals_one_rank(tiny, tiny_of, n, micro_batch, world_size, accumulation, images_seen, seed, pad, flip):
    shards = ShardSet(tiny, n) if n == "train+val" else tiny_of(n)
    options = {"seed": seed, "augment": Augment(pad, flip)}
    batch_images = micro_batch * world_size * accumulation
    one = step_of(shards, images_seen, batch_images, 1, 1, **options)
    assert_same(step_of(shards, images_seen, batch_images, world_size, accumulation, **options), one)
    assert one[0].shape == (batch_images, 16)
    assert (one[0].dtype, one[1].dtype) == (torch.uint16, torch.int64)
    positions = np.arange(images_seen, images_seen + batch_images)
    assert one[2].dtype == torch.int64
    np.testing.assert_array_equal(one[2].numpy(), positions)
    ids = shuffled(positions, shards.n_images, seed)
    np.testing.assert_array_equal(one[1].numpy(), shards.labels(ids))
    if not (pad or flip):
        np.testing.assert_array_equal(one[0].numpy(), shards.tokens(ids).reshape(batch_images, 16))


def test_ranks_hold_different_images(digits):
    shards = ShardSet(digits, "train")
    first, second = (Loader(shards, BatchLayout(8, 2, rank, 2), seed=3).batch(0, 1)[0] for rank in (0, 1))
    whole = Loader(shards, BatchLayout(8, 8), seed=3).batch(0, 0)[0]
    assert torch.equal(torch.cat([first, second]).long(), whole[4:].long())
    assert not torch.equal(first.long(), second.long())


def test_labels_are_left_out_when_nobody_needs_them(tiny_of):
    shards = tiny_of(23)
    with_labels, without = (Loader(shards, BatchLayout(4, 2), seed=3, with_labels=wanted) for wanted in (True, False))
    for one, other in zip(itertools.islice(with_labels.stream(0), 30), without.stream(0), strict=False):
        assert torch.equal(one.tokens.long(), other.tokens.long())
        assert (one.labels.shape, other.labels.shape, other.labels.dtype) == ((2,), (0,), torch.int64)


def test_a_batch_goes_to_its_device_as_a_network_takes_it(tiny_of):
    batch = Loader(tiny_of(23), BatchLayout(4, 4)).batch(8, 0)
    moved = batch.to("cpu")
    assert (moved.tokens.dtype, moved.tokens.tolist()) == (torch.int64, batch.tokens.tolist())
    assert (moved.labels.tolist(), moved.positions.tolist()) == (batch.labels.tolist(), [8, 9, 10, 11])


def test_batch_that_does_not_divide_is_refused(tiny_of):
    with pytest.raises(
        ValueError, match="batch_images=10 does not divide into 2 ranks x micro batch 3; nearest that does: 6 or 12"
    ):
        Loader(tiny_of(10), BatchLayout(10, 3, rank=0, world_size=2))


# --------------------------------------------------------------------------------------------------- the stream


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 1000), steps=st.integers(0, 5), world_size=st.integers(1, 2), accumulation=st.integers(1, 3))
def test_resume_equals_continuing(tiny_of, start, steps, world_size, accumulation):
    """Whatever the handfuls are that the thread works in: here a few micro batches each."""
    batch_images = 2 * world_size * accumulation
    loader = Loader(
        tiny_of(23), BatchLayout(batch_images, 2, world_size - 1, world_size), seed=9, augment=Augment(pad=1, flip=True)
    )
    endless = loader.stream(start)
    for _ in range(steps * accumulation):
        next(endless)
    resumed = loader.stream(start + steps * batch_images)
    for micro_step, (one, other) in enumerate(zip(itertools.islice(endless, 4), resumed, strict=False)):
        assert_same(one, other)
        seen = start + (steps + micro_step // accumulation) * batch_images
        assert_same(one, loader.batch(seen, micro_step % accumulation))
    endless.close()
    resumed.close()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_closing_or_forgetting_the_stream_ends_its_thread(tiny_of):
    loader = Loader(tiny_of(10), BatchLayout(2, 2))
    stream = loader.stream(0)
    assert not loader_threads()  # nothing starts before the first batch is asked for
    next(stream)
    assert len(loader_threads()) == 1
    stream.close()
    assert not loader_threads()
    for _ in loader.stream(0):
        break
    assert not loader_threads()


@pytest.mark.parametrize("micro_batch", [1, 7, 100, 3000])
def test_the_stream_is_batch_after_batch(tiny_of, monkeypatch, micro_batch):
    """Over many handfuls, for micro batches smaller and larger than one."""
    monkeypatch.setattr(loader_module, "_ORDER_CHUNK", 512)
    monkeypatch.setattr(loader_module, "_READ_BYTES", 32 * 64)
    loader = Loader(tiny_of(23), BatchLayout(2 * 3 * micro_batch, micro_batch, 1, 3), seed=2, augment=Augment(pad=1, flip=True))
    stream = loader.stream(12)
    for step in range(max(2, 700 // micro_batch)):
        for micro_step in range(2):
            assert_same(next(stream), loader.batch(12 + step * loader.layout.batch_images, micro_step))
    stream.close()


def test_an_error_reaches_the_consumer_at_its_batch(tmp_path, memory, palette8):
    write_dataset(tmp_path / "out", memory(20), palette8, ShardOptions(4, val_fraction=0))
    order = shuffled(np.arange(20), 20, 0)
    with open(tmp_path / "out" / "train-000000.tar", "r+b") as file:  # spoil the image that comes eighth, in the fourth batch
        file.seek(int(order[7]) * 2048 + 1536 + 128)
        file.write(b"\xff")
    stream = Loader(ShardSet(tmp_path / "out", "train"), BatchLayout(2, 2)).stream(0)
    for _ in range(3):
        next(stream)
    with pytest.raises(DamagedImagesError, match=rf"image {order[7]} at byte {order[7] * 2048} is damaged"):
        next(stream)
    assert not loader_threads()


# --------------------------------------------------------------------------------------------------- augmentation


def reference_variants(grid, pad):
    """Every window of the reflect-padded image and of its mirror image (paper 3.1), by plain slicing."""
    n = len(grid)
    variants = set()
    for image in (grid, grid[:, ::-1]):
        padded = np.pad(image, pad, mode="reflect")
        for top, left in itertools.product(range(2 * pad + 1), repeat=2):
            variants.add(padded[top : top + n, left : left + n].tobytes())
    return variants


@settings(max_examples=30, deadline=None)
@given(n_px=st.integers(1, 9), pad=st.integers(0, 8), seed=st.integers(0, 2**32))
def test_augmented_images_are_windows_of_the_padded_image(n_px, pad, seed):
    pad = min(pad, n_px - 1)
    grids = np.random.default_rng(seed).integers(0, 60000, (12, n_px, n_px)).astype(np.uint16)
    for flip in (False, True):
        result = augment(grids, np.arange(12), seed, pad, flip)
        assert (result.dtype, result.shape) == (np.uint16, grids.shape)
        for grid, variant in zip(grids, result, strict=True):
            assert variant.tobytes() in reference_variants(grid, pad)
    if not pad:
        assert augment(grids, np.arange(12), seed, 0, False) is grids  # and not a copy, which costs as much as reading


def test_all_variants_are_equally_likely():
    grid = np.arange(36, dtype=np.uint16).reshape(6, 6)
    n, pad = 5000, 2
    result = augment(np.repeat(grid[None], n, axis=0), np.arange(n), 4, pad, True)
    seen = {}
    for variant in result:
        seen[variant.tobytes()] = seen.get(variant.tobytes(), 0) + 1
    assert set(seen) == reference_variants(grid, pad)
    assert len(seen) == 50
    expected = n / 50
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)


def test_mirroring_alone_mirrors_half():
    grids = np.arange(4000 * 4, dtype=np.uint16).reshape(4000, 2, 2)
    result = augment(grids, np.arange(4000), 0, 0, True)
    mirrored = (result == grids[:, :, ::-1]).all(axis=(1, 2))
    assert ((result == grids).all(axis=(1, 2)) ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_a_later_epoch_draws_another_variant(digits):
    loader = Loader(ShardSet(digits, "val"), BatchLayout(1, 1), seed=2, augment=Augment(pad=2))
    n = loader.mixture.n_images
    order = [shuffled(np.arange(n) + epoch * n, n, 2) for epoch in range(6)]
    variants = {tuple(loader.batch(epoch * n + int(np.argmax(ids == 5)), 0)[0][0].tolist()) for epoch, ids in enumerate(order)}
    assert len(variants) > 3


def test_many_images_are_augmented_as_one_by_one():
    grids = np.random.default_rng(3).integers(0, 512, (300, 8, 8)).astype(np.uint16)
    together = augment(grids, np.arange(300), 1, 2, True)
    for place in (0, 127, 128, 299):
        alone = augment(grids[place : place + 1].copy(), np.array([place]), 1, 2, True)
        np.testing.assert_array_equal(together[place : place + 1], alone)


def test_augmentation_is_frozen():
    """As the order: a resumed run must draw the same variants."""
    grid = np.arange(16, dtype=np.uint16).reshape(1, 4, 4).repeat(4, axis=0)
    assert augment(grid, np.arange(100, 104), 7, 2, True)[:, 1, 1].tolist() == [6, 13, 6, 4]


# --------------------------------------------------------------------------------------------------- validation passes


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 9), world_size=st.integers(1, 5), limit=st.none() | st.integers(1, 50))
def test_validation_covers_the_split_exactly_once(tiny_of, n, batch, world_size, limit):
    shards = tiny_of(n)
    passes = [list(sequential(shards, batch, rank, world_size, limit)) for rank in range(world_size)]
    assert len({len(batches) for batches in passes}) == 1
    wanted = n if limit is None else min(n, limit)
    kept_tokens, kept_labels = [], []
    for step in zip(*passes, strict=True):
        for tokens, labels, weight in step:
            assert (tokens.shape, tokens.dtype) == ((batch, 16), torch.uint16)
            assert (labels.shape, labels.dtype) == ((batch,), torch.int64)
            assert (weight.shape, weight.dtype) == ((batch,), torch.float32)
            kept_tokens += tokens[weight == 1].tolist()
            kept_labels += labels[weight == 1].tolist()
            assert ((weight == 0) | (weight == 1)).all()
    ids = np.arange(wanted) * n // wanted
    assert len(set(ids.tolist())) == wanted
    numbers = zip(*(one_pass(n, batch, rank, world_size, limit) for rank in range(world_size)), strict=True)
    assert [i for step in numbers for i_of, weight in step for i in i_of[weight.numpy() == 1].tolist()] == ids.tolist()
    assert kept_tokens == shards.tokens(ids).reshape(wanted, 16).tolist()
    assert kept_labels == shards.labels(ids).tolist()


def test_limited_validation_is_spread_over_the_classes(digits):
    labels = torch.cat([labels for _, labels, _ in sequential(ShardSet(digits, "val"), 10, limit=40)])
    assert len(set(labels.tolist())) > 7


# --------------------------------------------------------------------------------------------------- shards and model


def test_shards_must_fit_the_model(tiny_of):
    shards = tiny_of(10)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8}
    check_shards(shards, ModelConfig(**shape, n_px=4, n_vocab=8))
    message = (
        rf"shards {shards.path} have n_px=4 but the model has n_px=32; make shards with --n_px 32 or set n_px=4 in the recipe"
    )
    with pytest.raises(ValueError, match=message):
        check_shards(shards, ModelConfig(**shape, n_px=32, n_vocab=8))
    message = r"have n_vocab=8 but the model has n_vocab=512; make shards with a palette of 512 colours or set n_vocab=8"
    with pytest.raises(ValueError, match=message):
        check_shards(shards, ModelConfig(**shape, n_px=4))
