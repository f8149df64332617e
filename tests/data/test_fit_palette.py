"""tools/fit_palette.py as a user runs it: what it writes, that workers and test images change nothing, how it fails."""

import json

import numpy as np
import pytest
from launcher import Launcher
from PIL import Image

from igpt_ds.data.palette import load_palette


def fit(*arguments):
    return Launcher()(["tools/fit_palette.py", *arguments], env={"PYTHONWARNINGS": "error"})


def failure(*arguments):
    result = fit(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("fit_palette.py: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(1)
    for label in ("cat", "dog"):
        (directory / label).mkdir()
        for index in range(40):
            image = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
            Image.fromarray(image).save(directory / label / f"{index}.png")
    (directory / "cat" / "0.png").write_bytes(b"broken")
    return f"imagefolder:{directory}"


def test_palette_report_and_pictures_are_the_same_for_any_workers(source, tmp_path):
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        shape = ["--n_px", 8, "--crop", "random", "--filter", "box", "--n_colors", 16, "--max_pixels", 3000, "--max_bad", 0.1]
        pictures = ["--swatch", out / "swatch.png", "--preview", out / "preview.png"]
        result = fit("--source", source, *shape, "--seed", 3, "--workers", workers, *pictures, "--out", out / "palette.npy")
        assert (result.returncode, result.stderr) == (0, "")
        palette = load_palette(out / "palette.npy")
        for words in ("79 at", "1 unreadable", "3000 of 5056 clustered", "16 colours", "PSNR", palette.hash):
            assert words in result.stdout
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert sorted(made[0]) == ["palette.json", "palette.npy", "preview.png", "swatch.png"]
    report = json.loads(made[0]["palette.json"])
    assert (report["hash"], report["n_colors"], report["n_images"], report["n_pixels"]) == (palette.hash, 16, 79, 3000)
    assert (report["crop"], report["filter"], report["n_px"], report["seed"]) == ("random", "box", 8, 3)
    with Image.open(tmp_path / "1" / "swatch.png") as swatch:
        first = swatch.getpixel((8 + 4, 8 + 4))
    assert first == tuple(palette.decode(np.array(0)))


def test_a_sample_of_the_images_follows_the_seed(source, tmp_path):
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.npy"
        result = fit("--source", source, "--n_colors", 4, "--max_images", 10, "--max_bad", 1, "--seed", seed, "--out", out)
        assert "of 1800 clustered" in result.stdout or "of 1620 clustered" in result.stdout
        hashes.append(load_palette(out).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path):
    out = ["--source", source, "--out", tmp_path / "p.npy"]
    assert "1 of 80 images are unreadable, more than --max_bad 0.001; first error: cat/0.png" in failure(*out)
    for name in ("max_pixels", "max_images", "n_px", "workers"):
        assert f"{name}=0 must be at least 1" in failure(*out, f"--{name}", 0)
    assert "crop=random needs --n_px" in failure(*out, "--crop", "random")
    assert "must end in .npy" in failure("--source", source, "--out", tmp_path / "p.bin")
    assert "use --n_colors 1 to 17" in failure("--source", "digits:", "--out", tmp_path / "p.npy")
    assert not list(tmp_path.iterdir())
    (tmp_path / "p.json").write_text("{}")
    assert "p.json exists already" in failure(*out)


def test_a_source_without_train_images_is_refused(tmp_path):
    (tmp_path / "raw" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "raw" / "test" / "cat" / "0.png")
    message = failure("--source", f"imagefolder:{tmp_path / 'raw'}", "--out", tmp_path / "p.npy")
    assert "no train images" in message or "holds no" in message
