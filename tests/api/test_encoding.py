"""What a user may give as images, and what an error names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt_ds
from igpt_ds.data.images import decode_image, square


@pytest.fixture(scope="module")
def model(model_dir):
    return igpt_ds.load(model_dir, device="cpu")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_one_image_in_every_form_has_the_same_tokens(model, photo, tmp_path):
    file = tmp_path / "photo.png"
    Image.fromarray(photo).save(file)
    expected = model.encode(photo)
    assert (expected.shape, expected.dtype) == ((1, 16), np.int64)
    small = square(photo, 4)
    colors = np.rint(127.5 * (model.palette.astype(np.float64) + 1))
    nearest = ((small[..., None, :] - colors) ** 2).sum(-1).argmin(-1)
    assert (expected.reshape(4, 4) == nearest).all()
    channels_first = torch.from_numpy(photo).permute(2, 0, 1)
    forms = [file, str(file), Image.open(file), photo.astype(np.float32) / 255, channels_first, channels_first.float() / 255]
    forms += [photo[None], channels_first[None], channels_first.numpy(), np.dstack([photo, np.full((9, 7), 255, np.uint8)])]
    for form in forms:
        np.testing.assert_array_equal(model.encode(form), expected, err_msg=repr(type(form)))
    np.testing.assert_array_equal(model.encode(forms), np.repeat(expected, len(forms), axis=0))
    np.testing.assert_array_equal(model.encode(iter([photo, expected[0], expected])), np.repeat(expected, 3, axis=0))
    np.testing.assert_array_equal(model.encode(np.stack([photo] * 5)), np.repeat(expected, 5, axis=0))


def test_the_crop_is_the_models_own(make_model_dir, photo, tmp_path):
    model = igpt_ds.load(make_model_dir(tmp_path / "model", crop="center", resize_filter="box"))
    prepared = square(photo, 4, crop="center", resize_filter="box")
    np.testing.assert_array_equal(model.encode(photo), model.encode(prepared))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(model.encode(tmp_path / "photo.png"), model.encode(photo))


def test_a_folder_is_read_as_by_the_tools(model, tiny_images):
    files = sorted(tiny_images.rglob("*.png"))
    np.testing.assert_array_equal(model.encode(tiny_images), model.encode(files))
    np.testing.assert_array_equal(model.encode(str(tiny_images / "red")), model.encode(files[-16:]))


def test_tokens_pass_and_shards_are_read(model, tiny_dataset):
    shards = igpt_ds.open_shards(tiny_dataset, "train")
    tokens = shards.tokens()
    for form in (tokens, torch.from_numpy(tokens), tokens.astype(np.uint16), shards, shards[:], list(shards), list(tokens)):
        np.testing.assert_array_equal(model.encode(form), tokens)
    np.testing.assert_array_equal(model.encode(shards[3]), tokens[3:4])
    batch = next(iter(torch.utils.data.DataLoader(shards, batch_size=4)))
    np.testing.assert_array_equal(model.encode(batch.tokens), tokens[:4])
    np.testing.assert_array_equal(model.encode(batch), tokens[:4])


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_a_pil_image_of_any_mode_equals_its_file(model, photo, mode):
    picture = Image.fromarray(photo[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(photo).convert(mode)
    file = io.BytesIO()
    picture.save(file, format="TIFF")
    expected = model.encode(decode_image(file.getvalue()))
    np.testing.assert_array_equal(model.encode(picture), expected)
    np.testing.assert_array_equal(model.encode(Image.open(file)), expected)


def test_the_exif_orientation_counts_and_stays_in_the_users_image(model, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    picture = Image.open(tmp_path / "turned.png")
    expected = model.encode(np.rot90(photo, -1))
    np.testing.assert_array_equal(model.encode(picture), expected)
    np.testing.assert_array_equal(model.encode(tmp_path / "turned.png"), expected)
    assert picture.getexif()[0x0112] == 6


def test_grey_and_transparent_arrays(model, photo):
    grey = photo[..., 0]
    expected = model.encode(np.repeat(grey[..., None], 3, axis=2))
    for form in (grey, grey[..., None], grey[None, :, :, None], torch.from_numpy(grey[None].copy())):
        np.testing.assert_array_equal(model.encode(form), expected)
    clear = np.dstack([photo, np.zeros((9, 7), np.uint8)])
    np.testing.assert_array_equal(model.encode(clear), model.encode(np.full((9, 7, 3), 255, np.uint8)))


WRONG = {
    "an empty list": ([], r"images is empty; give at least one image"),
    "a file that is missing": ("nowhere.png", r"images: nowhere.png: No such file"),
    "a path that is too long": ("x" * 5000, r"images: x+: File name too long"),
    "a URL": ("https://host/cat.png", r"https://host/cat.png is a URL; .*download it first"),
    "a folder of code": (str(Path(__file__).parent), r"holds no image that can be read"),
    "no image": (__file__, r"test_encoding.py cannot be read as an image"),
    "None": (None, r"images is of type NoneType; give a path"),
    "None in a list": ([np.zeros((4, 4), np.uint8), None], r"images\[1\] is of type NoneType"),
    "a missing file in a list": ([np.zeros((4, 4), np.uint8), "gone.png"], r"images\[1\]: gone.png"),
    "a list of numbers": ([1, 2], r"images\[0\] is of type int"),
    "a batch in a list": ([np.zeros((2, 4, 4, 3), np.uint8)], r"images\[0\] holds 2 images; an entry of a list is one image"),
    "an image and its label": ((np.zeros((4, 4), np.uint8), 3), r"images\[1\] is of type int"),
    "a dict": ({"a": 1}, r"images is of type dict"),
    "floats up to 255": (np.full((4, 4, 3), 200.0), r"floats from 200 to 200; scale them to \[0, 1\]"),
    "negative floats": (np.full((4, 4, 3), -0.5), r"floats from -0.5"),
    "NaN": (np.full((4, 4, 3), np.nan), r"floats from nan"),
    "whole numbers": (np.zeros((4, 4, 3), dtype=np.int64), r"images holds int64; give uint8"),
    "bool": (np.zeros((4, 4), dtype=bool), r"images holds bool; give uint8"),
    "five channels": (np.zeros((9, 7, 5), np.uint8), r"shape \[9, 7, 5\]; images are"),
    "many grey images": (np.zeros((6, 9, 7), np.uint8), r"shape \[6, 9, 7\]"),
    "no pixels": (np.zeros((0, 4, 4, 3), np.uint8), r"shape \[0, 4, 4, 3\]"),
    "one dimension": (np.zeros(5, np.uint8), r"shape \[5\]"),
    "tokens of another size": (
        np.zeros((3, 9), dtype=np.int64),
        r"shape \[3, 9\]; tokens of this model are \[N, 16\]; colours are uint8",
    ),
    "tokens of another palette": (np.full((3, 16), 8), r"holds 8; tokens of this model are 0..7"),
    "no tokens": (np.zeros((0, 16), dtype=np.int64), r"images is empty"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_image_is_named_in_one_line(model, what):
    images, pattern = WRONG[what]
    with pytest.raises(igpt_ds.InputError, match=pattern) as caught:
        model.encode(images)
    assert "\n" not in str(caught.value)


def test_shards_of_another_palette_are_refused(tmp_path, tiny_dataset, model_dir):
    other = tmp_path / "model"
    other.mkdir()
    for file in model_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    np.save(other / "palette.npy", np.load(other / "palette.npy")[::-1])
    with pytest.raises(igpt_ds.InputError, match=r"palette.npy is not the palette that the model was trained with"):
        igpt_ds.load(other)
