"""Sources give the same records each time, and say clearly what is wrong with a directory."""

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.sources import open_source


def test_digits_are_the_bundled_ones():
    from sklearn.datasets import load_digits

    bundled = load_digits()
    source = open_source("digits:")
    records = list(source)
    assert (source.name, source.classes, source.skipped) == ("digits:", list("0123456789"), [])
    assert len(records) == len(source) == len({key for key, _, _ in records}) == 1797
    key, image, label = records[7]
    assert (key, label) == (f"{bundled.target[7]}/0007", bundled.target[7])
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], np.rint(bundled.images[7] * 255 / 16))
    assert {0, 255} <= set(np.unique([image for _, image, _ in records]).tolist())


def test_image_folder_is_ordered_by_name_and_repeats(folder):
    directory = folder({"owl": 2, "cat": 11})
    (directory / "cat" / "notes.txt").write_text("no image")
    (directory / "cat" / "._0.png").write_bytes(b"left by another system")
    (directory / ".cache").mkdir()
    (directory / "empty").mkdir()
    Image.fromarray(np.zeros((3, 3, 3), dtype=np.uint8)).save(directory / "owl" / "Z.JPEG")
    source = open_source(f"imagefolder:{directory}")
    records = list(source)
    assert source.name == f"imagefolder:{directory}"
    assert source.classes == ["cat", "owl"]
    names = ["0", "1", "10", *map(str, range(2, 10))]
    assert [key for key, _, _ in records] == [f"cat/{name}.png" for name in names] + ["owl/0.png", "owl/1.png", "owl/Z.JPEG"]
    assert [label for _, _, label in records] == [0] * 11 + [1] * 3
    assert len(source) == 14
    np.testing.assert_array_equal(records[2][1], np.asarray(Image.open(directory / "cat" / "10.png")))
    for (key, image, label), (key2, image2, label2) in zip(records, source, strict=True):
        assert (key, label) == (key2, label2)
        np.testing.assert_array_equal(image, image2)


@pytest.mark.parametrize("spec", ["", "digits", "digits:8", "imagefolder", "imagefolder:", "cifar10:/data", "/data"])
def test_unknown_source_is_refused(spec):
    with pytest.raises(ValueError, match=rf"source '{spec}' is unknown; known: 'digits:' and 'imagefolder:DIR'"):
        open_source(spec)


def test_missing_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist; expected .*none/<class>/<image>.jpg"):
        open_source(f"imagefolder:{tmp_path / 'none'}")
    Image.fromarray(np.zeros((3, 3, 3), dtype=np.uint8)).save(tmp_path / "flat.png")  # an image, but of no class
    (tmp_path / "class").mkdir()
    with pytest.raises(
        ValueError, match=rf"source directory {tmp_path} holds no images; expected {tmp_path}/<class>/<image>.jpg"
    ):
        open_source(f"imagefolder:{tmp_path}")


def test_unreadable_images_are_named_and_left_out(folder, capsys):
    directory = folder({"cat": 30})
    for index in range(7):
        (directory / "cat" / f"{index}.png").write_bytes(b"broken")
    source = open_source(f"imagefolder:{directory}", max_bad_fraction=0.25)
    for _ in range(2):  # the count begins anew with each iteration
        assert len(list(source)) == 23
        assert source.skipped == [f"cat/{index}.png" for index in range(7)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 5
    assert lines[0].startswith(f"skipped: {directory}/cat/0.png cannot be read as an image")


def test_too_many_unreadable_images_stop_the_source(folder):
    directory = folder({"cat": 10})
    (directory / "cat" / "3.png").write_bytes(b"broken")
    source = open_source(f"imagefolder:{directory}")
    message = (
        r"raw: 1 unreadable, more than the 0.001 of 10 images that may be unreadable \(latest: .*3.png.*\); repair .* --max_bad"
    )
    with pytest.raises(ValueError, match=message) as caught:
        list(source)
    assert "\n" not in str(caught.value)
    assert len(list(open_source(f"imagefolder:{directory}", max_bad_fraction=0.1))) == 9


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"max_bad={fraction} must lie between 0 and 1"):
        open_source("digits:", fraction)
