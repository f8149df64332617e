"""The protocol: what is standardised, held out, chosen and reported, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.probes.linear import ProbeSettings, Search, View, linear_probe, probe_view, stratified_order
from igpt_ds.evaluate.probes.variants import low_data


def clouds(n, seed, width=6, classes=3, spread=1.0):
    """n points around `classes` centres."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * 2
    return centres[labels] + spread * rng.normal(size=(n, width)), labels


@pytest.fixture
def sets(made_features):
    """(train, val) of a made directory: sets({"train": (x, y), ...}) or well separated clouds."""

    def make(splits=None, **more):
        path = made_features(splits or {"train": clouds(200, 1), "val": clouds(100, 2)}, **more)
        return open_features(path, "train"), open_features(path, "val")

    return make


def test_the_whole_protocol_against_scikit_learn(sets):
    """The same steps by other means: numpy's moments, scikit-learn's fits."""
    features, labels = load_digits(return_X_y=True)
    features = features * np.logspace(0, 2, 64) + 3
    splits = {"train": (features[:1000], labels[:1000]), "val": (features[1000:], labels[1000:])}
    train, val = sets(splits, classes=10)
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    probe = linear_probe(train, val, 0, "normed", ProbeSettings.of(grid, seed=3))

    def pipeline(C):
        return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000, tol=1e-6))

    (x, y), (tested, truth) = ((part[0].astype(np.float32).astype(np.float64), part[1]) for part in splits.values())
    order = stratified_order(y, 3)
    held_out, rest = order[:100], order[100:]  # moments, too, are those of the rest alone
    accuracies = [pipeline(C).fit(x[rest], y[rest]).score(x[held_out], y[held_out]) for C in grid]
    best = int(np.argmax(accuracies))
    final = pipeline(grid[best]).fit(x, y)

    assert probe.held_out_accuracies == pytest.approx(accuracies, abs=0.001)
    assert grid[best] == probe.C
    assert probe.held_out_accuracy == max(probe.held_out_accuracies)
    assert probe.accuracy == pytest.approx(final.score(tested, truth), abs=0.002)
    assert probe.train_accuracy == pytest.approx(final.score(x, y), abs=0.002)
    assert (probe.n_train, probe.n_eval, probe.n_features, probe.n_classes) == (1000, 797, 64, 10)
    assert probe.converged
    assert probe.grad_norm <= 1e-6


def test_the_search_never_sees_the_held_out_tenth(sets):
    """Other features of the held-out images change their accuracy, and not one bit of what was fitted; nor do their labels."""
    x, y = clouds(200, 1, spread=3)
    train, _ = sets({"train": (x, y), "val": (x, y)}, name="a")
    ids = np.arange(200)
    one = Search.of(View(train, (0,), "normed"), ids, ProbeSettings())
    held_out = one.order[180:]
    changed = x.copy()
    changed[held_out] = 1000.0
    other = Search.of(View(sets({"train": (changed, y), "val": (x, y)}, name="b")[0], (0,), "normed"), ids, ProbeSettings())
    assert sorted(one.order) == list(range(200))
    assert np.array_equal(other.order, one.order)
    assert np.array_equal(other.found.weights, one.found.weights)
    assert (one.accuracies > other.accuracies).any()


def test_memory_does_not_hold_the_features_twice(launch, sets, tmp_path):
    """One copy of 47 MiB, in a process of its own, beside buffers of 80 MiB whatever the number of images; no second copy."""
    rng = np.random.default_rng(0)
    splits = {"train": (rng.normal(size=(96_000, 128)), rng.integers(0, 3, 96_000)), "val": clouds(50, 1, width=128)}
    train, _ = sets(splits)
    program = (
        "import sys, threading, torch\n"
        "from pathlib import Path\n"
        "from igpt_ds.evaluate.features.files import open_features\n"
        "from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe\n"
        "torch.set_num_threads(1)\n"
        "big, small = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "def held():  # pages of mapped files may be dropped at any time and do not count\n"
        "    return 1024 * int(Path('/proc/self/status').read_text().partition('RssAnon:')[2].split()[0])\n"
        "for path in (small, big):\n"
        "    before, most, over = held(), [0], threading.Event()\n"
        "    def watch():\n"
        "        while not over.wait(0.002):\n"
        "            most[0] = max(most[0], held())\n"
        "    thread = threading.Thread(target=watch)\n"
        "    thread.start()\n"
        "    train, val = open_features(path, 'train'), open_features(path, 'val')\n"
        "    linear_probe(train, val, 0, 'normed', ProbeSettings.of([1e-4, 1e-3, 1e-2]))\n"
        "    over.set()\n"
        "    thread.join()\n"
        "print(most[0] - before)\n"
    )
    small, _ = sets({"train": clouds(5000, 1, width=128), "val": clouds(50, 1, width=128)}, name="small")
    (tmp_path / "program.py").write_text(program)
    done = launch([tmp_path / "program.py", train.path, small.path])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 96_000 * 128 * 4 + 90 * 2**20, f"{int(done.stdout) / 2**20:.0f} MiB"


def test_a_seed_decides_everything(sets):
    train, val = sets({"train": clouds(200, 1, spread=3), "val": clouds(100, 2, spread=3)})
    probes = [linear_probe(train, val, 0, "normed", ProbeSettings(seed=seed)) for seed in (0, 0, 1)]
    assert probes[0] == probes[1]
    assert probes[0].held_out_accuracies != probes[2].held_out_accuracies


def test_the_reported_split_chooses_nothing(sets):
    """Other labels in the reported split change the accuracy, and not one thing besides."""
    splits = {"train": clouds(200, 1, spread=3), "val": clouds(100, 2, spread=3)}
    shuffled = {"train": splits["train"], "val": (splits["val"][0], np.roll(splits["val"][1], 1))}
    one, other = (linear_probe(*sets(made, name=name), 0, "normed") for made, name in ((splits, "a"), (shuffled, "b")))
    assert one.accuracy > other.accuracy
    assert replace(one, accuracy=0) == replace(other, accuracy=0)


def test_every_beginning_of_the_order_is_stratified():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    order = stratified_order(labels, 0)
    assert sorted(order) == list(range(100))
    for n in (10, 20, 50, 90):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert np.abs(counts - n * np.array([0.5, 0.3, 0.2])).max() <= 1
    assert not np.array_equal(order, stratified_order(labels, 1))
    equal = np.repeat(np.arange(10), 10)
    extra = {tuple(sorted(np.bincount(equal[stratified_order(equal, seed)[:5]], minlength=10))) for seed in range(5)}
    assert extra == {(0, 0, 0, 0, 0, 1, 1, 1, 1, 1)}
    assert len({tuple(sorted(equal[stratified_order(equal, seed)[:5]])) for seed in range(5)}) > 1, "not always the same classes"


def test_few_labels(sets):
    train, val = sets({"train": clouds(2000, 1), "val": clouds(100, 2)})
    probe = linear_probe(train, val, 0, "normed", max_train=30)
    assert (probe.n_train, probe.n_classes) == (30, 3)
    assert probe.accuracy > 0.8
    for wrong in (1, 2001):
        with pytest.raises(
            ValueError, match=rf"--max_train {wrong} must lie between 2 and the 2000 images of split 'train' in .*made"
        ):
            linear_probe(train, val, 0, "normed", max_train=wrong)


def test_features_that_never_change_do_not_matter(sets):
    (x, y), (tested, truth) = clouds(200, 1), clouds(100, 2)
    constant = np.full((200, 1), 0.1), np.full((100, 1), 7.0)  # 7: a constant of training may change later, and must not count
    plain = linear_probe(*sets({"train": (x, y), "val": (tested, truth)}, name="a"), 0, "normed")
    more = {"train": (np.hstack([x, constant[0]]), y), "val": (np.hstack([tested, constant[1]]), truth)}
    padded = linear_probe(*sets(more, name="b"), 0, "normed")
    assert padded.accuracy == plain.accuracy
    assert padded.objective == pytest.approx(plain.objective, rel=1e-6)


def test_a_class_that_is_too_rare_to_be_held_out(sets):
    x, y = clouds(200, 1)
    probe = linear_probe(
        *sets({"train": (np.vstack([x, x[:1] + 50]), np.append(y, 3)), "val": clouds(50, 2)}, classes=4), 0, "normed"
    )
    assert probe.n_classes == 4
    assert probe.accuracy > 0.9


@pytest.mark.parametrize(("grid", "edge"), [([1e5, 1e6, 1e7], "low"), ([1e-9, 1e-2, 1e9], None), ([1.0], None)])
def test_the_edge_of_the_grid(sets, grid, edge):
    train, val = sets({"train": clouds(300, 1, spread=4, width=60), "val": clouds(100, 2, width=60)})
    probe = linear_probe(train, val, 0, "normed", ProbeSettings.of([*reversed(grid), grid[0]]))
    assert probe.C_grid == grid
    assert probe.grid_edge == edge


def test_the_upper_edge_of_the_grid(sets):
    """The classes differ in a small difference of two features, which only large weights can see."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=400), rng.integers(0, 2, 400)
    x = np.stack([z, z + 0.1 * y], 1)
    probe = linear_probe(*sets({"train": (x, y), "val": (x, y)}, classes=2), 0, "normed", ProbeSettings.of([1e-4, 1e4]))
    assert (probe.grid_edge, probe.accuracy) == ("high", 1.0)


def test_float32_finds_the_same(sets):
    train, val = sets()
    exact, rough = (linear_probe(train, val, 0, "normed", ProbeSettings(precision=precision)) for precision in ("fp64", "fp32"))
    assert exact.accuracy == rough.accuracy
    assert exact.objective == pytest.approx(rough.objective, rel=1e-4)


def test_real_features_pass_through(features_dir, pixels_dir):
    for path, kind in ((features_dir, "raw"), (pixels_dir, "pixels")):
        train, val = open_features(path, "train"), open_features(path, "val")
        probe = linear_probe(train, val, 0, kind)
        assert (probe.n_train, probe.n_eval) == (len(train.labels), len(val.labels))


@pytest.mark.parametrize(("split", "image"), [("train", 7), ("val", 3)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(sets, split, image, value):
    """In either split, and among several layers side by side, the error names what must be extracted again."""
    train, val = sets({"train": clouds(60, 1), "val": clouds(20, 2)})
    x = np.load(train.path / split / "layer_00_normed.npy")
    np.save(train.path / "train" / "layer_01_normed.npy", np.load(train.path / "train" / "layer_00_normed.npy"))
    np.save(train.path / "val" / "layer_01_normed.npy", np.load(train.path / "val" / "layer_00_normed.npy"))
    x[image, 5] = value
    np.save(train.path / split / "layer_01_normed.npy", x)
    train, val = (replace(one, manifest=replace(one.manifest, layers=[0, 1])) for one in (train, val))
    assert linear_probe(train, val, 0, "normed", ProbeSettings.of([1e-2, 1.0])).accuracy > 0.8
    name = rf"{train.path} split '{split}': layer 1 normed is not finite for image {image}; extract the features again with"
    with pytest.raises(ValueError, match=name):
        linear_probe(train, val, 1, "normed")
    with pytest.raises(ValueError, match=name):
        probe_view(View(train, (0, 1), "normed"), [View(val, (0, 1), "normed")], np.arange(60), ProbeSettings())
    with pytest.raises(ValueError, match=name):
        low_data(train, val, 1, "normed", 30, ProbeSettings.of([1.0]))


def test_labels_that_no_probe_can_use(sets):
    x, y = clouds(20, 1)
    train, val = sets({"train": (x, np.where(np.arange(20) == 7, -1, y)), "val": (x, y)}, name="a")
    with pytest.raises(ValueError, match=r"image 7 of split 'train' in .*a has label -1, not one of 0\.\.2"):
        linear_probe(train, val, 0, "normed")
    train, val = sets({"train": (x, y), "val": (x, y + 3)}, name="b")
    with pytest.raises(ValueError, match=r"image 0 of split 'val' in .*b has label \d, not one of 0\.\.2"):
        linear_probe(train, val, 0, "normed")
    train, val = sets({"train": (x, y * 0 + 2), "val": (x, y)}, name="c")
    with pytest.raises(ValueError, match=r"the training labels hold only one class \(class2\), in .*c"):
        linear_probe(train, val, 0, "normed")
