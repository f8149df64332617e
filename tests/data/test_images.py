"""Every kind of image file becomes upright RGB bytes; squares and grids are what they say."""

import io

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.images import FILTERS, fit_to_square, read_image, save_grid

RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]


def stored(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    file.seek(0)
    return file


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", stored(Image.fromarray(picture))):
        image = read_image(source)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, picture)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_followed(picture, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(stored(Image.fromarray(picture), exif=exif))
    np.testing.assert_array_equal(image, upright(picture))


def test_grey_bilevel_and_16_bit_grey_become_rgb():
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(read_image(stored(Image.fromarray(grey))), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(read_image(stored(deep)), expected)
    bilevel = read_image(stored(Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)))
    assert bilevel.tolist() == [[[0] * 3, [0] * 3, WHITE]]


def test_cmyk_becomes_rgb():
    cmyk = Image.fromarray(np.array([[[0, 255, 255, 0], [0, 0, 0, 0]]], dtype=np.uint8), mode="CMYK")
    assert read_image(stored(cmyk, format="TIFF")).tolist() == [[RED, WHITE]]


def test_transparency_is_laid_over_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    assert read_image(stored(Image.fromarray(rgba))).tolist() == [[RED, WHITE, [127] * 3]]
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], dtype=np.uint8), mode="LA")
    assert read_image(stored(grey)).tolist() == [[[0] * 3, WHITE]]


def test_palette_images_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette(RED + GREEN)
    assert read_image(stored(image)).tolist() == [[RED, GREEN]]
    assert read_image(stored(image, transparency=1)).tolist() == [[RED, WHITE]]
    assert read_image(stored(image, transparency=bytes([255, 0]))).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize("name", ["text.jpg", "empty.png", "torn.jpg", "float.tif", "missing.png"])
def test_unreadable_files_are_named_in_one_line(tmp_path, name):
    whole = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), format="JPEG")
    content = {
        "text.jpg": b"hello",
        "empty.png": b"",
        "torn.jpg": whole.getvalue()[:1500],
        "float.tif": stored(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), format="TIFF").getvalue(),
    }
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image: ") as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="stream cannot be read as an image: it holds floating-point pixels of unknown range"):
        read_image(stored(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), format="TIFF"))


@pytest.mark.parametrize("limit", [30, 50])  # above twice the limit PIL stops, above the limit it only warns
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bomb.png cannot be read as an image: Image size \(64 pixels\)"):
        read_image(tmp_path / "bomb.png")


def test_the_right_size_passes_unchanged(picture):
    square = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for name in FILTERS:
        assert fit_to_square(square, 4, name) is square


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_the_central_square_is_kept(shape):
    image = np.zeros((*shape, 3), dtype=np.uint8)
    long_side = int(np.argmax(shape))
    np.moveaxis(image, long_side, 0)[3:8] = 200  # rows 3..7 of 12, or columns: the crop begins at (12 - 5) // 2 = 3
    assert (fit_to_square(image, 5, "box") == 200).all()


def test_box_filter_is_the_block_mean():
    image = np.random.default_rng(2).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean = image[:, 2:10].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(fit_to_square(image, 4, "box") - mean).max() <= 1


def test_golden_bicubic():
    # A ramp with one bright column, 6 x 8 -> 3 x 4 -> the left 3 x 3: the Catmull-Rom cubic widened by 2, as its formula says.
    image = np.repeat((np.arange(6 * 8).reshape(6, 8) * 3).astype(np.uint8)[..., None], 3, axis=-1)
    image[:, 4] = 255
    assert fit_to_square(image, 3)[..., 0].tolist() == [[13, 46, 125], [59, 88, 152], [107, 130, 179]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (333, 7), (31, 33)])
@pytest.mark.parametrize("name", list(FILTERS))
def test_any_shape_gives_the_square(shape, name):
    image = np.full((*shape, 3), 77, dtype=np.uint8)
    square = fit_to_square(image, 8, name)
    assert square.shape == (8, 8, 3)
    assert (square == 77).all()


def test_unknown_filter_and_size_are_refused(picture):
    with pytest.raises(ValueError, match="filter 'cubic' is unknown; known: bicubic, bilinear, box, lanczos"):
        fit_to_square(picture, 4, "cubic")
    with pytest.raises(ValueError, match="n_px=0 must be at least 1"):
        fit_to_square(picture, 0)


def test_grid_shows_each_pixel_and_separates_images(tmp_path):
    images = np.random.default_rng(3).integers(0, 100, (5, 2, 3, 3), dtype=np.uint8)
    save_grid(tmp_path / "new" / "grid.png", images, columns=2, scale=4)
    grid = read_image(tmp_path / "new" / "grid.png")
    assert grid.shape == (3 * 10 + 2, 2 * 14 + 2, 3)
    for index, image in enumerate(images):
        top, left = index // 2 * 10 + 2, index % 2 * 14 + 2
        np.testing.assert_array_equal(grid[top : top + 8 : 4, left : left + 12 : 4], image)
        np.testing.assert_array_equal(grid[top + 3 : top + 8 : 4, left + 3 : left + 12 : 4], image)
    assert (grid[::10] == 128).all()
    assert (grid[:, ::14] == 128).all()
    assert (grid[22:, 16:] == 128).all()  # the empty sixth place
