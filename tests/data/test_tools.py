"""The two data tools, run as a user runs them: what they leave, what they print, how they fail."""

import pytest
from launcher import Launcher

from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards.dataset import ShardSet


def tool(name, *arguments):
    return Launcher()([f"tools/{name}", *arguments], env={"PYTHONWARNINGS": "error"})


def failure(name, *arguments):
    """The one line that a failing tool prints."""
    result = tool(name, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{name}: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def palette_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("palette") / "palette.npy"
    result = tool("fit_palette.py", "--source", "digits:", "--n_colors", 16, "--out", path)
    assert (result.returncode, result.stderr) == (0, "")
    for text in ("1797", "115008 of 115008 clustered, 17 different", "16 colours", "PSNR", "inertia", load_palette(path).hash):
        assert text in result.stdout
    return path


def test_palette_then_shards(palette_file, tmp_path):
    result = tool("make_shards.py", "--source", "digits:", "--palette", palette_file, "--n_px", 8, "--out", tmp_path / "shards")
    assert (result.returncode, result.stderr) == (0, "")
    train, val = (ShardSet(tmp_path / "shards", split) for split in ("train", "val"))
    assert train.n_images + val.n_images == 1797
    assert train.palette_hash == load_palette(palette_file).hash
    for text in (
        train.dataset_hash[:16],
        val.dataset_hash[:16],
        f"{train.n_images} images in 1 shard",
        "made        1797 images at",
        "unreadable  0 images",
    ):
        assert text in result.stdout


def test_every_flag_reaches_its_place(folder, tmp_path):
    directory = folder({"cat": 20, "dog": 20})
    (directory / "cat" / "0.png").write_bytes(b"broken")
    (directory / "loose.JPG").write_bytes(b"")
    source = ["--source", f"imagefolder:{directory}", "--filter", "box", "--max_bad", 0.1, "--seed", 3]
    result = tool("fit_palette.py", *source, "--n_px", 4, "--n_colors", 8, "--max_pixels", 200, "--out", tmp_path / "p.npy")
    assert "200 of 624 clustered" in result.stdout
    assert "1 unreadable" in result.stdout
    assert "left out    beside the class folders: 1 .jpg (loose.JPG)" in result.stdout
    shape = ["--n_px", 4, "--val_fraction", 0.4, "--images_per_shard", 5]
    result = tool("make_shards.py", *source, *shape, "--palette", tmp_path / "p.npy", "--out", tmp_path / "shards")
    for said in ("unreadable  1 images", "cannot be decoded: 1 .png (cat/0.png)", "beside the class folders: 1 .jpg (loose.JPG)"):
        assert said in result.stdout
    train, val = (ShardSet(tmp_path / "shards", split) for split in ("train", "val"))
    assert train.n_images + val.n_images == 39
    assert 8 < val.n_images < 24
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == -(-train.n_images // 5)


def test_bad_input_is_one_line(palette_file, tmp_path):
    source = ["--source", "digits:"]
    assert "exists already" in failure("fit_palette.py", *source, "--out", palette_file)
    assert "max_pixels=0" in failure("fit_palette.py", *source, "--out", tmp_path / "p.npy", "--max_pixels", 0)
    assert "use --n_colors 1 to 17" in failure("fit_palette.py", *source, "--out", tmp_path / "p.npy")
    assert "n_px=0" in failure("fit_palette.py", *source, "--out", tmp_path / "p.npy", "--n_px", 0)
    make = ["--n_px", 8, "--out", tmp_path / "shards"]
    assert "cannot be read" in failure("make_shards.py", *source, *make, "--palette", tmp_path / "p.npy")
    assert "is unknown; known" in failure("make_shards.py", "--source", "mnist:", *make, "--palette", palette_file)
    assert not list(tmp_path.iterdir())
