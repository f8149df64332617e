"""The SGD probe: torch's own SGD for every rate, an order that its place decides, resumption to the bit, an honest choice."""

from __future__ import annotations

import copy
import dataclasses
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from igpt_ds.evaluate.features import manifest
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.features.manifest import FeatureSplit
from igpt_ds.evaluate.probes import rows, sgd_search, sgd_state
from igpt_ds.evaluate.probes.rows import Blocks, FiniteRows, moments, standardised
from igpt_ds.evaluate.probes.settings import RateSearch, SgdSettings
from igpt_ds.evaluate.probes.sgd import MOMENTUM, RowSubset, Sgd, cosine, predictions
from igpt_ds.evaluate.probes.sgd_search import held_out_rows
from igpt_ds.evaluate.probes.sgd_state import RateResults, SgdState, StateFile


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of five rows of four features."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 5 * 4 * 4)


def numbered(n):
    """Rows that say their own number."""
    return np.arange(n, dtype=np.float32)[:, None].repeat(4, 1)


def stream(values, keep=None, seed=0, window_blocks=3, first=0, last=60, batch=7):
    order = Blocks(values, keep, seed, window_blocks * 5 * 4 * 4)
    return [(x.clone(), ids.clone()) for x, ids in order.batches(first, last, batch, "cpu")]


def test_each_epoch_holds_every_row_once_in_another_order(small_blocks):
    values = numbered(53)
    ids = torch.cat([ids for _, ids in stream(values, last=53)])  # 7 epochs
    epochs = ids.view(7, 53)
    assert all(sorted(epoch.tolist()) == list(range(53)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7
    assert all((x[:, 0].long() == ids).all() for x, ids in stream(values)), "rows and their numbers go together"
    window = set((epochs[0][:15] // 5).tolist())
    assert len(window) <= 3, "the first window holds rows of three blocks, and no more is in memory"
    assert epochs[0][:15].tolist() != sorted(epochs[0][:15].tolist())


def test_the_place_in_the_stream_decides(small_blocks):
    values, keep = numbered(53), np.arange(53) % 3 != 0
    for mask in (None, keep):
        whole = stream(values, mask)
        for first in (1, 13, 59):
            part = stream(values, mask, first=first)
            assert len(part) == 60 - first
            assert all(torch.equal(a[1], b[1]) and torch.equal(a[0], b[0]) for a, b in zip(part, whole[first:], strict=True))
    assert not torch.equal(stream(values, seed=1)[0][1], stream(values)[0][1])
    kept = torch.cat([ids for _, ids in stream(values, keep, last=5)])
    assert sorted(kept.tolist()) == np.flatnonzero(keep).tolist()


def test_moments_and_standardised_rows(small_blocks):
    values = np.random.default_rng(0).normal(5, [1, 2, 0, 4], (53, 4)).astype(np.float32)
    keep = np.arange(53) < 40
    mean, scale = moments(values, keep, 6)
    np.testing.assert_allclose(mean, values[:40].mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scale[[0, 1, 3]], 1 / values[:40].std(0, dtype=np.float64)[[0, 1, 3]], rtol=1e-6)
    assert scale[2] == 0, "a feature that never changes becomes 0"
    x = torch.cat([x for x, _ in Blocks(values, keep, 0, 1 << 20, (mean, scale)).batches(0, 10, 4, "cpu")])
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(0, unbiased=False), [1, 1, 0, 1], rtol=1e-5)
    assert standardised(x, None) is x


def test_every_rate_is_torchs_own_sgd():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 16, 6, generator=random), torch.randint(0, 3, (30, 16), generator=random)
    rates = [3.0, 0.3, 0.01]
    ours = Sgd(6, 3, rates, "cpu")
    for step in range(30):
        ours.step(x[step], y[step], cosine(step, 30))
    for number, rate in enumerate(rates):
        layer = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for step in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[step]), y[step]).backward()
            optimizer.step()
            schedule.step()
        part = slice(3 * number, 3 * number + 3)
        torch.testing.assert_close(ours.weights[:, part].T, layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.intercepts[part], layer.bias.detach(), rtol=1e-4, atol=1e-5)
        assert predictions(ours, x[0].numpy(), None, "cpu")[number].tolist() == layer(x[0]).argmax(1).tolist()


def test_a_rate_that_diverges_leaves_the_others_alone():
    x, y = torch.eye(4).repeat(4, 1) * 1e20, torch.arange(4).repeat(4)
    both, one = Sgd(4, 4, [1e38, 1e-30], "cpu"), Sgd(4, 4, [1e-30], "cpu")
    for step in range(4):
        both.step(x, y, cosine(step, 4))
        one.step(x, y, cosine(step, 4))
    assert both.finite().tolist() == [False, True]
    assert torch.equal(both.weights[:, 4:], one.weights)


def separable(n=240, classes=3, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return random.normal(0, 1, (n, 5)) + 2.5 * np.eye(5)[labels], labels


@pytest.fixture
def sets(made_features):
    path = made_features({"train": separable(), "val": separable(90, seed=1)})
    return [open_features(path, split) for split in ("train", "val")]


def described(features, **changes):
    """The features with other values in their manifest."""
    return dataclasses.replace(features, manifest=dataclasses.replace(features.manifest, **changes))


def of_origin(features, **changes):
    """The features with another origin."""
    return described(features, origin=dataclasses.replace(features.manifest.origin, **changes))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("batch_images", 10**6, "--batch_images 1000000 is more than the .* images that the probe is fitted on"),
        ("steps", 10**12, "--steps 1000000000000 of 16 images are .* epochs .* choose at most --steps "),
    ],
)
def test_a_fit_that_would_never_end_is_refused_before_it_begins(sets, name, value, said):
    with pytest.raises(ValueError, match=said):
        sgd_search.sgd_probe(*sets, 0, "normed", dataclasses.replace(QUICK, **{name: value}), RateSearch([0.1]))


QUICK = SgdSettings(steps=200, batch_images=16)


def test_a_probe_finds_what_is_there(sets):
    probe = sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch((0.01, 1.0, 0.1, 0.001, 1e-5), 2, 0.25))
    assert probe.rates == [1.0, 0.1] or probe.rates == [1.0, 0.1, 0.01, 0.001], "from large to small, two at a time"
    assert probe.rate == probe.rates[int(np.argmax(probe.held_out_accuracies))]
    assert min(probe.accuracy, probe.held_out_accuracy, probe.train_accuracy) > 0.85
    assert (probe.n_train, probe.n_eval, probe.n_classes, probe.diverged) == (240, 90, 3, [])


def test_the_search_ends_when_the_best_rate_is_inside(sets, monkeypatch):
    shares = {1.0: 0.5, 0.1: 0.8, 0.01: 0.7, 0.001: 0.9}

    def found(self, name, rates, keep, counted):
        return RateResults([True] * len(rates), {what: [shares[rate] for rate in rates] for what in counted})

    monkeypatch.setattr(sgd_search._Fitting, "accuracies", found)
    probe = sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch(list(shares), 2))
    assert (probe.rate, probe.rates, probe.grid_edge) == (0.001, [1.0, 0.1, 0.01, 0.001], "low")
    shares[0.01] = 0.81
    probe = sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch(list(shares), 3))
    assert (probe.rate, probe.rates) == (0.001, [1.0, 0.1, 0.01, 0.001]), "0.01 was the smallest of the first three"
    shares[0.1] = 0.95
    probe = sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch(list(shares), 3))
    assert (probe.rate, probe.rates, probe.grid_edge) == (0.1, [1.0, 0.1, 0.01], None)


@pytest.fixture
def layered(made_features):
    """Makes two feature directories: layered(n) -> splits with three layers of five columns, and with one of all fifteen."""

    def make(n=240, name="layers"):
        splits = {}
        for seed, (split, size) in enumerate((("train", n), ("val", 90))):
            random = np.random.default_rng(seed)
            splits[split] = random.normal(0, 1, (size, 15)) + np.eye(15)[:9][np.arange(size) % 9], np.arange(size) % 3
        path, whole = made_features(splits, name=name), made_features(splits, name=f"{name}_whole")
        values = json.loads((path / "manifest.json").read_text()) | {"layers": [0, 1, 2], "n_features": 5}
        (path / "manifest.json").write_text(json.dumps(values))
        for split, (x, _) in splits.items():
            for layer in range(3):
                part = np.ascontiguousarray(x[:, 5 * layer : 5 * layer + 5], dtype=np.float32)
                np.save(path / split / f"layer_{layer:02d}_normed.npy", part)
        return [[open_features(some, split) for split in splits] for some in (path, whole)]

    return make


@pytest.mark.parametrize("standardise", [False, True])
def test_layers_side_by_side_equal_their_concatenation(layered, monkeypatch, standardise):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 7 * 4 * 15)
    apart, together = layered()
    settings = dataclasses.replace(QUICK, steps=50, window_bytes=3 * 7 * 4 * 15, standardise=standardise)
    ours = sgd_search.sgd_probe(*apart, (0, 1, 2), "normed", settings, RateSearch((0.5, 0.05), held_out=0.25))
    whole = sgd_search.sgd_probe(*together, 0, "normed", settings, RateSearch((0.5, 0.05), held_out=0.25))
    assert (ours.layer, ours.layers, ours.n_features) == (1, [0, 1, 2], 15)
    assert vars(ours) == vars(whole) | {"layer": 1, "layers": [0, 1, 2]}, "to the last bit"
    a, b = FiniteRows(apart[0], (0, 1, 2), "normed"), FiniteRows(together[0], 0, "normed")
    for some in (slice(3, 50), np.array([7, 8, 9, 3]), np.array([], dtype=np.int64)):
        assert np.array_equal(a[some], b[some])


def test_layers_side_by_side_go_on_to_the_bit(layered, tmp_path):
    (train, val), _ = layered()
    settings, search, state = QUICK, RateSearch([0.5]), tmp_path / "state"
    whole = sgd_search.sgd_probe(train, val, (0, 2), "normed", settings, search)
    with stopped_after(149):
        sgd_search.sgd_probe(train, val, (0, 2), "normed", settings, search, StateFile(state, save_every=30))
    with pytest.raises(ValueError, match=r"state was begun with layer \[0, 2\], now it is \[1, 2\]; remove it"):
        sgd_search.sgd_probe(train, val, (1, 2), "normed", settings, search, StateFile(state))
    assert sgd_search.sgd_probe(train, val, (0, 2), "normed", settings, search, StateFile(state)) == whole


def test_memory_does_not_grow_with_the_images(layered, monkeypatch):
    """Two windows and what the threads read, although the features are twenty windows."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 12)
    n, window = 20_000, 1 << 16
    (train, _), _ = layered(n)
    values = FiniteRows(train, (0, 1, 2), "normed")
    tracemalloc.start()
    assert sum(len(ids) for _, ids in Blocks(values, None, 0, window).batches(0, n // 50, 50, "cpu")) == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers = 16 * n  # two for each image
    assert peak - numbers < 4 * window < 4 * 15 * n // 4


class StoppedError(Exception):
    """What stands for a killed process."""


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """The probe in the block is stopped in the step after so many."""
    left, step = [steps], Sgd.step

    def until(self, *given):
        if not left[0]:
            raise StoppedError
        left[0] -= 1
        step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sgd, "step", until)
        with pytest.raises(StoppedError):
            yield


def test_an_interrupted_probe_goes_on_to_the_bit(sets, tmp_path):
    arguments = (*sets, 0, "normed", dataclasses.replace(QUICK, window_bytes=20 * 60, standardise=True))
    search = RateSearch((0.5, 0.05), together=1, held_out=0.25)
    whole = sgd_search.sgd_probe(*arguments, search)
    state = tmp_path / "deep" / "state"
    for stop_at in (35, 170, 95):  # inside the first group, after its end, in the last fit
        with stopped_after(stop_at):
            sgd_search.sgd_probe(*arguments, search, StateFile(state, save_every=30))
        assert state.exists()
    assert sgd_search.sgd_probe(*arguments, search, StateFile(state, save_every=30)) == whole
    assert not list(state.parent.iterdir()), "the state has done its work"


def test_a_state_of_another_probe(sets, tmp_path, monkeypatch):
    state = tmp_path / "state"
    monkeypatch.setattr(sgd_state.Path, "unlink", lambda self, missing_ok: None)
    sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch([0.1]), StateFile(state))
    with pytest.raises(ValueError, match=r"state was begun with steps 200, now it is 100; remove it, or name another --out"):
        sgd_search.sgd_probe(*sets, 0, "normed", dataclasses.replace(QUICK, steps=100), RateSearch([0.1]), StateFile(state))
    with pytest.raises(ValueError, match=r"state was begun with held_out 0\.04, now it is 0\.1; remove it"):
        sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch([0.1], held_out=0.1), StateFile(state))
    train, val = sets
    for changed in ({"dtype": "fp16"}, {"precision": "bf16"}, {"mask_prob": 0.3}, {"mask_seed": 1}, {"model_hash": "other"}):
        (name, value), other = *changed.items(), of_origin(train, **changed)
        monkeypatch.setitem(manifest.DTYPES, "fp16", "<f4")  # so that the same files will do
        with pytest.raises(ValueError, match=rf"begun with features' {name} .*, now it is {value!r}; remove it"):
            sgd_search.sgd_probe(other, val, 0, "normed", QUICK, RateSearch([0.1]), StateFile(state))
    splits = {"val": dataclasses.replace(val.manifest.splits["val"], dataset_hash="h")}
    for evaluated, named in (
        (train, "eval_split 'val', now it is 'train'"),
        (described(val, splits=splits), "eval_split's hash 'val', now it is 'h'"),
    ):
        with pytest.raises(ValueError, match=f"state was begun with {named}; remove it"):
            sgd_search.sgd_probe(train, evaluated, 0, "normed", QUICK, RateSearch([0.1]), StateFile(state))
    more = described(train, classes=[*train.classes, "class3"])
    with pytest.raises(ValueError, match="state was begun with n_classes 3, now it is 4; remove it"):
        sgd_search.sgd_probe(more, val, 0, "normed", QUICK, RateSearch([0.1]), StateFile(state))
    state.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"state is torn or not the state of a probe .*; remove it"):
        sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch([0.1]), StateFile(state))


@pytest.mark.parametrize(("split", "image"), [("train", 100), ("train", 3), ("val", 41)])
@pytest.mark.parametrize("standardise", [False, True])
def test_features_that_are_not_finite_are_named_and_leave_nothing_behind(sets, tmp_path, split, image, standardise):
    """Whichever image it is, of the fit or held out; and good features after them give what they give without a state."""
    arguments = (*sets, 0, "normed", dataclasses.replace(QUICK, standardise=standardise))
    search = RateSearch((0.5, 0.05), together=1, held_out=0.25)
    whole, state = sgd_search.sgd_probe(*arguments, search), tmp_path / "state"
    file = sets[0].path / split / "layer_00_normed.npy"
    good = np.load(file)
    bad = good.copy()
    bad[image, 2] = np.nan
    np.save(file, bad)
    name = rf"{sets[0].path} split '{split}': layer 0 normed is not finite for image {image}; extract the features again with"
    with pytest.raises(ValueError, match=name):
        sgd_search.sgd_probe(*arguments, search, StateFile(state))
    np.save(file, good)
    assert sgd_search.sgd_probe(*arguments, search, StateFile(state)) == whole
    assert not state.exists()


def test_finite_rows_read_like_the_map_they_stand_for(many_masks):
    rows = FiniteRows(many_masks, 0, "normed", 1)
    stored = many_masks.layer(0, "normed", 1)
    assert (len(rows), rows.shape, stored.dtype) == (6, (6, 4), np.float16)
    for part in (slice(1, 4), np.array([5, 0])):
        assert rows[part].dtype == np.float32
        assert np.array_equal(rows[part], stored[part])
    changed = np.array(stored)
    changed[4, 3] = np.inf
    np.save(many_masks.path / "val" / "layer_00_normed_mask1.npy", changed)
    for part in (slice(2, 6), np.array([1, 4, 0])):
        with pytest.raises(ValueError, match=r"split 'val': layer 0 normed mask 1 is not finite for image 4; .* --dtype fp32"):
            FiniteRows(many_masks, 0, "normed", 1)[part]
    assert len(rows[:4]) == 4, "what is not read is not looked at"


@pytest.fixture
def many_masks(made_features):
    """Six images seen through two masks, in half precision."""
    path = made_features({"val": separable(6)})
    for mask in range(2):
        np.save(path / "val" / f"layer_00_normed_mask{mask}.npy", numbered(6).astype(np.float16) + mask)
    features = open_features(path, "val")
    return described(of_origin(features, dtype="fp16"), n_features=4, splits={"val": FeatureSplit(6, "val", mask_draws=2)})


def test_a_search_that_failed_is_not_gone_on_from(sets, tmp_path):
    state, few = tmp_path / "state", dataclasses.replace(QUICK, steps=5)
    with pytest.raises(ValueError, match=r"every rate diverged, down to 1e\+38; give smaller --rates, or --standardise"):
        sgd_search.sgd_probe(*sets, 0, "normed", few, RateSearch((3e38, 1e38), together=1), StateFile(state))
    assert not state.exists()


def test_all_views_of_an_image_are_held_out_together():
    labels = np.repeat(np.arange(40) % 4, 3)
    mask = held_out_rows(labels, 0.25, 3, seed=0)
    assert mask.sum() == 30
    assert all(len(set(image)) == 1 for image in mask.reshape(40, 3))
    assert np.bincount(labels[mask], minlength=4).min() >= 6, "classes in proportion"
    assert list(RowSubset(numbered(9), np.array([4, 2]))[slice(0, 2)][:, 0]) == [4, 2]


@pytest.mark.parametrize(
    ("changes", "more", "complaint"),
    [
        ({}, {"rates": ()}, "--rates  must be positive numbers"),
        ({}, {"rates": (1.0, -1.0)}, r"--rates 1 -1 must be positive numbers"),
        ({}, {"together": 0}, "^--together 0 must be at least 1"),
        ({}, {"held_out": 1.5}, r"--held_out 1\.5 must lie between 0 and 1"),
        ({}, {"held_out": 0.999}, r"--held_out 0\.999 of 240 images leaves none to fit on"),
        ({"views": 7}, {}, "--views 7 does not divide the 240 rows of the training images"),
        ({"steps": 5}, {"rates": (1e38,)}, r"every rate diverged, down to 1e\+38; give smaller --rates"),
    ],
)
def test_bad_input(sets, changes, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        sgd_search.sgd_probe(*sets, 0, "normed", dataclasses.replace(QUICK, **changes), RateSearch(**more))


def test_labels_of_one_class(sets):
    train = dataclasses.replace(sets[0], labels=np.full(240, 2))
    with pytest.raises(
        ValueError, match=r"the training labels hold only one class \(class2\), in .*made; a probe needs at least 2"
    ):
        sgd_search.sgd_probe(train, sets[1], 0, "normed", QUICK)


def test_the_last_fit_must_not_diverge(sets, monkeypatch, tmp_path):
    state = tmp_path / "state"

    def found(self, name, rates, keep, counted):
        self._save(SgdState())
        return RateResults([name == "search"] * len(rates), {what: [0.5] * len(rates) for what in counted})

    monkeypatch.setattr(sgd_search._Fitting, "accuracies", found)
    with pytest.raises(ValueError, match=r"rate 1 was the best and diverged on all images; omit it from --rates"):
        sgd_search.sgd_probe(*sets, 0, "normed", QUICK, RateSearch([1.0]), StateFile(state))
    assert not state.exists()


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_images", 0), ("window_bytes", 0), ("views", 0)])
def test_settings(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        SgdSettings(**{name: value})
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        SgdSettings(seed=-1)


@pytest.fixture
def stopped_state(sets, tmp_path):
    """The state of a probe that was interrupted in its last fit, as the file holds it, and the call that continues it."""
    search, file = RateSearch((0.5, 0.05), 1, 0.25), StateFile(tmp_path / "state", 30)
    with stopped_after(639):
        sgd_search.sgd_probe(*sets, 0, "normed", dataclasses.replace(QUICK, steps=250), search, file)
    saved = torch.load(file.path, weights_only=True)

    def resume():
        return sgd_search.sgd_probe(*sets, 0, "normed", dataclasses.replace(QUICK, steps=250), search, file)

    return file.path, saved, resume


def test_every_field_of_a_state(stopped_state):
    file, saved, resume = stopped_state
    groups = list(saved["done"])
    places = [("identity",), ("done",), *(("begun", name) for name in ("name", "step", "weights"))]
    places += [("done", groups[0], name) for name in ("finite", "held_out")] + [("identity", name) for name in saved["identity"]]
    places += [("begun", "weights", name) for name in saved["begun"]["weights"]]
    assert len(groups) >= 1
    for place in places:
        for change in (None, "text", torch.zeros(1), 7):
            wrong = copy.deepcopy(saved)
            inner = wrong
            for name in place[:-1]:
                inner = inner[name]
            if change is None:
                del inner[place[-1]]
            elif isinstance(inner[place[-1]], type(change)) and not isinstance(change, torch.Tensor):
                continue
            else:
                inner[place[-1]] = change
            torch.save(wrong, file)
            with pytest.raises(ValueError, match=rf"{file}.*; remove it"):
                resume()
    for wrong in ([], {}, 3):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=rf"{file} .*; remove it"):
            resume()
    torch.save(saved, file)
    resume()
