"""Contact sheets and duplicate lists, made as a user makes them: what is written, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.exclusion import read_exclusion
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions

TOOLS = Path(__file__).parents[3] / "tools"


def refused(tool, name, complaint, *arguments):
    """One line, exit status 2, nothing on stdout."""
    status, said, errors = tool(name, *arguments)
    assert (status, said, errors.count("\n")) == (2, "", 1), (said, errors)
    assert errors.startswith(f"{name}.py: error: ")
    assert complaint in errors


@pytest.fixture(scope="module")
def three(tmp_path_factory, memory, palette8):
    """A dataset with the splits train, val and test: 30, 11 or so, and 9 images of 4x4, classes cat, dog, owl."""
    path = tmp_path_factory.mktemp("three") / "shards"
    write_dataset(path, memory(50, n_test=9), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=16))
    return path


# --------------------------------------------------------------------------------------------------- show_shards


def cells(path, n, columns, side, n_px):
    """The pictures of a sheet, found again by counting: uint8 [n, n_px, n_px, 3]. Cells are side wide, rows have captions."""
    picture = np.asarray(Image.open(path))
    scale = side // n_px
    bar = max(1, scale // 2)
    rows = -(-n // columns)
    height, width = (picture.shape[0] - bar) // rows, side + bar
    assert height > side + bar  # room for the caption
    assert picture.shape[1] == columns * width + bar
    corners = [(number // columns * height + bar, number % columns * width + bar) for number in range(n)]
    middle = scale // 2
    return np.stack([picture[top + middle : top + side : scale, left + middle : left + side : scale] for top, left in corners])


@pytest.mark.parametrize("split", ["train", "val", "test", "train+val"])
def test_a_sheet_shows_the_images_of_its_split(tool, three, tmp_path, split):
    shards = ShardSet(three, split)
    n = min(10, shards.n_images)
    out = tmp_path / "sheets" / "a.png"
    status, said, errors = tool("show_shards", "--data", three, "--split", split, "--out", out, "--images", 10, "--columns", 5)
    assert (status, errors) == (0, "")
    for text in (f"{shards.n_images} images, n_px 4, 8 colours", f"{n} shown, 3 of 3 classes: cat, dog, owl", str(out)):
        assert text in said
    ids = np.arange(n) * shards.n_images // n
    np.testing.assert_array_equal(cells(out, n, 5, 96, 4), shards.palette.decode(shards.tokens(ids)))
    assert [path.name for path in out.parent.iterdir()] == ["a.png"]


def test_which_images_are_shown(tool, three, tmp_path):
    shards = ShardSet(three, "train")

    def shown(*arguments):
        out = tmp_path / "a.png"
        assert (
            tool("show_shards", "--data", three, "--split", "train", "--out", out, "--images", 6, "--scale", 3, *arguments)[0]
            == 0
        )
        pictures = cells(out, 6, 6, 12, 4)
        every = shards.palette.decode(shards.tokens(np.arange(shards.n_images)))
        return [int(np.flatnonzero((every == picture).all(axis=(1, 2, 3)))[0]) for picture in pictures]

    assert shown("--first") == [0, 1, 2, 3, 4, 5]
    spread = shown()
    assert spread[0] == 0
    assert set(np.diff(spread)) <= {shards.n_images // 6, shards.n_images // 6 + 1}
    drawn = shown("--seed", 1)
    assert drawn == shown("--seed", 1) == sorted(set(drawn))
    assert drawn != shown("--seed", 2)


def test_what_a_sheet_cannot_be(tool, three, tmp_path):
    usual = ["--data", three, "--out", tmp_path / "a.png"]
    refused(tool, "show_shards", "--images 0 must lie in 1..10000", *usual, "--images", 0)
    refused(tool, "show_shards", "--images 10001 must lie in 1..10000", *usual, "--images", 10001)
    refused(tool, "show_shards", "--columns -1 must lie in 1..10000", *usual, "--columns", -1)
    refused(tool, "show_shards", "--scale 0 must lie in 1..10000", *usual, "--scale", 0)
    refused(tool, "show_shards", "--seed -1 must be at least 0", *usual, "--seed", -1)
    refused(tool, "show_shards", "has no split 'dev'", *usual, "--split", "dev")
    refused(tool, "show_shards", "is no shard directory", "--data", tmp_path, "--out", tmp_path / "a.png")
    status, _, errors = tool("show_shards", *usual, "--seed", 1, "--first")
    assert status == 2
    assert "--first: not allowed with --seed" in errors
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- dedup_shards


def textures(numbers):
    """One 16x16 image a number, no two alike: uint8 [N, 16, 16, 3]."""
    blocks = [np.random.default_rng(int(number)).integers(0, 256, (8, 8, 3), dtype=np.uint8) for number in numbers]
    return np.stack(blocks).repeat(2, axis=1).repeat(2, axis=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, memory):
    """Makes a dataset of one split: made(images, split="train") -> directory. The palette has 125 colours."""
    axis = np.linspace(-1, 1, 5, dtype=np.float32)
    palette = Palette(np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3))

    def make(images, split="train", n_px=16):
        path = tmp_path_factory.mktemp("made") / "shards"
        source = memory(len(images), n_test=0 if split == "train" else len(images) - 1)
        source.images = images
        write_dataset(path, source, palette, ShardOptions(n_px, val_fraction=0.0))
        return path

    return make


@pytest.fixture(scope="module")
def pair(made):
    """40 training images and 10 test images, which are the training images 3, 9 (mirrored) and 27 among new ones."""
    train = textures(range(40))
    test = textures(range(100, 111))
    test[1], test[5], test[8] = train[3], train[9][:, ::-1], train[27]
    return made(train), made(test, "test")


@pytest.mark.parametrize("method", ["phash", "dhash", "tokens"])
def test_the_list_names_what_the_evaluation_set_holds(tool, pair, tmp_path, method):
    train, evaluated = pair
    out, sheet = tmp_path / "exclude.json", tmp_path / "pairs.png"
    arguments = ["--train", train, "--eval", evaluated, "--out", out, "--sheet", sheet, "--method", method, "--workers", 1]
    status, said, errors = tool("dedup_shards", *arguments)
    assert (status, errors) == (0, "")
    shards = ShardSet(train, "train")
    ids = read_exclusion(out, shards)
    assert ids.tolist() == [3, 9, 27]
    rest = ShardSet(train, "train", exclude=ids)
    assert rest.n_images == 37
    about = json.loads(out.read_text())["about"]
    assert (about["method"], about["max_distance"], about["eval_split"]) == (method, 0 if method == "tokens" else 4, "test")
    assert about["eval_dataset_hash"] == ShardSet(evaluated, "test").dataset_hash
    for text in (
        "40 training and 10 evaluation images",
        "pairs/s",
        "flat, not compared: 0 of the training and 0 of the evaluation set",
        f"{out}: 3 training images (7.5000%) are near 3 evaluation images",
        f"{sheet}: 3 pairs",
    ):
        assert text in said
    pictures = cells(sheet, 6, 6, 96, 16)
    seen, test = shards.palette.decode(shards.tokens(ids)), ShardSet(evaluated, "test")
    np.testing.assert_array_equal(pictures[0::2], seen)
    np.testing.assert_array_equal(pictures[1::2], test.palette.decode(test.tokens(np.array([0, 4, 7]))))


def test_nothing_found_is_an_empty_list(tool, made, tmp_path):
    train, evaluated = made(textures(range(20))), made(textures(range(50, 60)))
    out, sheet = tmp_path / "exclude.json", tmp_path / "pairs.png"
    given = ["--train", train, "--eval", evaluated, "--eval_split", "train", "--out", out, "--sheet", sheet, "--workers", 1]
    status, said, errors = tool("dedup_shards", *given)
    assert (status, errors) == (0, "")
    assert "0 training images (0.0000%) are near 0 evaluation images" in said
    assert f"{sheet} was not written: there is no pair to show" in said
    assert read_exclusion(out, ShardSet(train, "train")).tolist() == []
    assert [path.name for path in tmp_path.iterdir()] == ["exclude.json"]


def test_one_image_that_excludes_many_is_pointed_at(tool, made, tmp_path):
    train = textures(range(30))
    train[10:25] = train[10]
    given = ["--train", made(train), "--eval", made(train[[10, 2]]), "--eval_split", "train", "--out", tmp_path / "exclude.json"]
    status, said, errors = tool("dedup_shards", *given, "--workers", 1, "--sheet", tmp_path / "a.png", "--pairs", 4)
    assert status == 0
    assert "16 training images (53.3333%) are near 2 evaluation images" in said
    assert "evaluation image 0 alone excludes 15 training images; look at --sheet" in errors
    assert "4 pairs" in said


def test_sizes_may_differ_for_perceptual_hashes_alone(tool, made, tmp_path):
    train, evaluated = made(textures(range(20))), made(textures(range(5)), n_px=8)
    given = ["--train", train, "--eval", evaluated, "--eval_split", "train", "--out", tmp_path / "e.json", "--workers", 1]
    refused(tool, "dedup_shards", "cannot be equal; make both alike, or use --method phash", *given, "--method", "tokens")
    assert not list(tmp_path.iterdir())
    assert tool("dedup_shards", *given, "--max_distance", 16, "--sheet", tmp_path / "a.png")[0] == 0
    assert read_exclusion(tmp_path / "e.json", ShardSet(train, "train")).tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_compared(tool, pair, tmp_path):
    train, evaluated = pair
    usual = ["--train", train, "--eval", evaluated, "--out", tmp_path / "e.json"]
    refused(tool, "dedup_shards", "3 has no meaning for --method tokens", *usual, "--method", "tokens", "--max_distance", 3)
    refused(tool, "dedup_shards", "max_distance=20 must lie in 0..16", *usual, "--max_distance", 20)
    refused(tool, "dedup_shards", "workers=0 must be at least 1", *usual, "--workers", 0)
    refused(tool, "dedup_shards", "--pairs 0 must lie in 1..10000", *usual, "--pairs", 0)
    refused(tool, "dedup_shards", "has no split 'val'", *usual, "--eval_split", "val")
    same = ["--train", train, "--eval", train, "--eval_split", "train", "--out", tmp_path / "e.json"]
    refused(tool, "dedup_shards", "hold the same images, all of which would be excluded", *same)
    assert not list(tmp_path.iterdir())
