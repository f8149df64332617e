"""Every kind of image file becomes upright RGB bytes, the fast paths are PIL's pixels; squares and grids are what they say."""

import io
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from igpt_ds.data import images
from igpt_ds.data.images import CROPS, FILTERS, decode_image, square
from igpt_ds.data.left_out import BadImageError

RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]
PIL_FILTERS = {name: Image.Resampling[name.upper()] for name in FILTERS}


def stored(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def smooth(height, width, seed=0):
    """A picture with slopes, edges and grain, as photographs have."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (large + rng.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)


def by_pil(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)


@pytest.fixture
def fast_decodes(monkeypatch):
    """How many images simplejpeg decoded."""
    calls = []
    real = images.simplejpeg.decode_jpeg

    def counted(*arguments, **options):
        calls.append(arguments[1])
        return real(*arguments, **options)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", counted)
    return calls


# --------------------------------------------------------------------------------------------------- decoding


def test_rgb_is_read_as_it_is_and_may_be_written_to(picture):
    image = decode_image(stored(Image.fromarray(picture)))
    assert (image.dtype, image.flags.writeable) == (np.uint8, True)
    np.testing.assert_array_equal(image, picture)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 48), (101, 155)])
def test_jpegs_have_pils_pixels(mode, subsampling, progressive, shape, fast_decodes):
    image = Image.fromarray(smooth(*shape)).convert(mode)
    data = stored(image, format="JPEG", quality=77, subsampling=subsampling, progressive=progressive)
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded, by_pil(data))
    assert decoded.flags.writeable
    assert fast_decodes == ["RGB" if mode == "RGB" else "GRAY"]


def test_jpegs_stored_as_rgb_and_with_restarts_have_pils_pixels(fast_decodes):
    for options in ({"keep_rgb": True}, {"restart_marker_rows": 1}, {"optimize": True}, {"quality": 100}):
        data = stored(Image.fromarray(smooth(40, 30)), format="JPEG", **options)
        np.testing.assert_array_equal(decode_image(data), by_pil(data))
    assert len(fast_decodes) == 4


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_followed(picture, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(picture), exif=exif)), upright(picture))
    plain, turned = (stored(Image.fromarray(smooth(20, 30)), format="JPEG", **extra) for extra in ({}, {"exif": exif}))
    np.testing.assert_array_equal(decode_image(turned), upright(decode_image(plain)))


def test_orientation_is_tag_274_alone(picture):
    """A malformed tag beside it, as cameras write them, and another word on it in XMP do not count."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x829A] = 0.5  # the exposure time
    raw = bytearray(exif.tobytes())
    little = raw[6:8] == b"II"
    raw[(entry := raw.index(b"\x9a\x82" if little else b"\x82\x9a")) + 2 : entry + 4] = b"\7\0" if little else b"\0\7"
    large = Image.fromarray(smooth(20, 30))
    plain = decode_image(stored(large, format="JPEG"))
    np.testing.assert_array_equal(decode_image(stored(large, format="JPEG", exif=bytes(raw))), np.rot90(plain, -1))
    raw[entry - 12 + 2 : entry - 12 + 4] = b"\xff\xff"  # tag 274 itself is of a type that does not exist
    np.testing.assert_array_equal(decode_image(stored(large, format="JPEG", exif=bytes(raw))), plain)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    np.testing.assert_array_equal(decode_image(stored(large, format="JPEG", xmp=xmp)), plain)


def chunk(kind, data, crc=None):
    return len(data).to_bytes(4, "big") + kind + data + (zlib.crc32(kind + data) if crc is None else crc).to_bytes(4, "big")


@pytest.mark.parametrize(
    "note",
    [
        chunk(b"tEXt", b"Comment\0" + bytes([65]) * (1 << 21)),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 24))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no deflate"),
        chunk(b"tIME", b"1234567", crc=7),
        chunk(b"iCCP", b"x"),
        chunk(b"eXIf", b"Exif", crc=7),
        chunk(b"gAMA", b""),
        chunk(b"prVt", b"anything"),
    ],
    ids=lambda note: note[4:8].decode(),
)
def test_chunks_of_a_png_that_are_not_pixels_do_not_count(picture, note):
    png = stored(Image.fromarray(picture))
    np.testing.assert_array_equal(decode_image(png[:33] + note + png[33:]), picture)
    np.testing.assert_array_equal(decode_image(png[:-12] + note + png[-12:]), picture)


def test_a_wrong_checksum_of_pixels_is_refused(picture):
    """PIL leaves the checksums of IDAT to zlib's own."""
    png = bytearray(stored(Image.fromarray(picture)))
    start = png.index(b"IHDR")
    png[start + 4 + int.from_bytes(png[start - 4 : start], "big")] ^= 1
    with pytest.raises(ValueError, match="cannot be read as an image"):
        decode_image(bytes(png))


def test_pixels_of_unknown_range_are_refused():
    for dtype in (np.int32, np.uint32, np.int16, np.float32):
        values = np.arange(12, dtype=dtype).reshape(3, 4)
        if dtype in (np.int16, np.uint32):  # no mode of PIL's: the sample format of an int32 or uint16 TIFF is changed instead
            like = values.astype(np.int32 if dtype is np.uint32 else np.uint16)
            data = stored(Image.fromarray(like), format="TIFF", tiffinfo={339: 1 if dtype is np.uint32 else 2})
        else:
            data = stored(Image.fromarray(values), format="TIFF")
        with pytest.raises(ValueError, match="unknown range"):
            decode_image(data)
    wide = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(wide), format="PPM"))[..., 0], wide >> 8)


def test_formats_whose_reader_runs_a_program_are_not_tried(monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="no known format"):
        decode_image(eps)


def test_grey_bilevel_and_16_bit_grey_become_rgb():
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(grey))), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(decode_image(stored(deep)), expected)
    bilevel = decode_image(stored(Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)))
    assert bilevel.tolist() == [[[0] * 3, [0] * 3, WHITE]]


def test_cmyk_becomes_rgb():
    ink = np.array([[[0, 255, 255, 0], [0, 0, 0, 0]]], dtype=np.uint8)
    assert decode_image(stored(Image.fromarray(ink, mode="CMYK"), format="TIFF")).tolist() == [[RED, WHITE]]
    large = Image.fromarray(ink.repeat(16, axis=0).repeat(16, axis=1), mode="CMYK")
    jpeg = decode_image(stored(large, format="JPEG", quality=100)).astype(int)
    assert jpeg.shape == (16, 32, 3)
    assert np.abs(jpeg[:, :12] - RED).max() <= 3
    assert np.abs(jpeg[:, 20:] - WHITE).max() <= 3


def test_ycck_is_cmyk_behind_a_colour_transform():
    grey = Image.fromarray(np.full((16, 16, 4), 64, dtype=np.uint8), mode="CMYK")
    data = stored(grey, format="JPEG", quality=100)
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    ycck = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]  # the same numbers, now Y, Cb, Cr and K
    decoded = decode_image(ycck)
    assert decoded.shape == (16, 16, 3)
    assert np.abs(decoded.astype(int) - decode_image(data)).max() > 50
    np.testing.assert_array_equal(decoded, by_pil(ycck))


def test_transparency_is_laid_over_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    assert decode_image(stored(Image.fromarray(rgba))).tolist() == [[RED, WHITE, [127] * 3]]
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], dtype=np.uint8), mode="LA")
    assert decode_image(stored(grey)).tolist() == [[[0] * 3, WHITE]]


def test_palette_images_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette(RED + GREEN)
    assert decode_image(stored(image)).tolist() == [[RED, GREEN]]
    assert decode_image(stored(image, transparency=1)).tolist() == [[RED, WHITE]]
    assert decode_image(stored(image, transparency=bytes([255, 0]))).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", "its bytes are of no known format"),
        (b"", "it is empty"),
        (stored(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), format="TIFF"), "it holds floating-point pixels of unkn"),
        (stored(Image.fromarray(smooth(64, 64)))[:-4000], "image file is truncated"),
    ],
)
def test_unreadable_bytes_are_named_in_one_line(data, reason):
    with pytest.raises(ValueError, match=rf"^cat\.jpg cannot be read as an image: {reason}") as caught:
        decode_image(data, "cat.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_torn_jpeg_is_refused_wherever_it_ends(mode, progressive):
    data = stored(Image.fromarray(smooth(48, 64)).convert(mode), format="JPEG", progressive=progressive)
    for end in range(0, len(data) - 40, 37):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            decode_image(data[:end])


def test_a_blemish_that_pil_reads_over_is_read_over():
    data = stored(Image.fromarray(smooth(48, 64)), format="JPEG")
    noisy = data[:-2] + b"\x12\x34\x56" + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        images.simplejpeg.decode_jpeg(noisy, "RGB")
    np.testing.assert_array_equal(decode_image(noisy), decode_image(data))


def test_a_header_of_two_sizes_is_not_decoded_at_the_unchecked_one(fast_decodes):
    data = stored(Image.fromarray(smooth(16, 16)), format="JPEG")
    frame = data.index(b"\xff\xc0")
    header = data[frame : frame + 19]
    large = header[:5] + (8000).to_bytes(2, "big") * 2 + header[9:]
    with pytest.raises(ValueError, match="cannot be read as an image"):
        decode_image(data[:frame] + large + data[frame:])
    assert not fast_decodes


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize(("limit", "reason"), [(30, r"Image size \(64 pixels\)"), (50, "its 8 x 8 pixels are more than 50")])
def test_decompression_bomb_is_refused(monkeypatch, form, limit, reason, fast_decodes):
    data = stored(Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)), format=form)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # above twice the limit PIL stops, above the limit it only warns
    with pytest.raises(ValueError, match=f"bomb cannot be read as an image: {reason}"):
        decode_image(data, "bomb")
    assert not fast_decodes


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_panorama_is_read_where_it_is_allowed(monkeypatch, form):
    panorama = stored(Image.fromarray(np.zeros((4, 40, 3), dtype=np.uint8)), format=form)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for limit in (None, 159, 79):
        with pytest.raises(BadImageError, match="set --max_pixels") as caught:
            decode_image(panorama, max_pixels=limit)
        assert caught.value.reason == "too many pixels"
    assert decode_image(panorama, max_pixels=160).shape == (4, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize("side", [10_000, 65_000])
@pytest.mark.parametrize("marker", [b"\xff\xc0", b"\xff\xc2"])
def test_a_jpeg_header_of_huge_size_is_refused_before_decoding(side, marker, fast_decodes):
    data = stored(Image.fromarray(smooth(16, 16)), format="JPEG", progressive=marker == b"\xff\xc2")
    frame = data.index(marker)
    data = data[: frame + 5] + side.to_bytes(2, "big") * 2 + data[frame + 9 :]
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(data)
    assert not fast_decodes


# --------------------------------------------------------------------------------------------------- squares


def test_the_right_size_passes_unchanged():
    ready = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for name in FILTERS:
        np.testing.assert_array_equal(square(ready, 4, resize_filter=name), ready)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_the_central_square_is_kept(shape):
    image = np.zeros((*shape, 3), dtype=np.uint8)
    long_side = int(np.argmax(shape))
    np.moveaxis(image, long_side, 0)[3:8] = 200  # rows 3..7 of 12, or columns: the crop begins at (12 - 5) // 2 = 3
    assert (square(image, 5, resize_filter="box") == 200).all()


def test_box_filter_is_the_block_mean():
    image = np.random.default_rng(2).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean = image[:, 2:10].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(square(image, 4, resize_filter="box") - mean).max() <= 1


def test_golden_bicubic():
    # A ramp with one bright column, 6 x 8 -> 3 x 4 -> the left 3 x 3: the Catmull-Rom cubic widened by 2, as its formula says.
    image = np.repeat((np.arange(6 * 8).reshape(6, 8) * 3).astype(np.uint8)[..., None], 3, axis=-1)
    image[:, 4] = 255
    golden = np.array([[13, 46, 125], [59, 88, 152], [107, 130, 179]])
    assert np.abs(square(image, 3)[..., 0].astype(int) - golden).max() <= 1


def slow_square(image, n_px, crop, name, short=None, corner=None):
    """The paper's words with PIL's resize alone, columns first; a random crop gets its draws from outside."""

    def shortest(image, side):
        height, width = image.shape[:2]
        now = min(height, width)
        size = (round(width * side / now), round(height * side / now))
        return np.asarray(Image.fromarray(image).resize((size[0], height), PIL_FILTERS[name]).resize(size, PIL_FILTERS[name]))

    def window(image, top, left, side):
        return image[top : top + side, left : left + side]

    if crop == "none":
        image = shortest(image, n_px)
        return window(image, (image.shape[0] - n_px) // 2, (image.shape[1] - n_px) // 2, n_px)
    image = shortest(image, short or 224)
    top, left = corner or ((image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2)
    return shortest(np.ascontiguousarray(window(image, top, left, 224)), n_px)


@settings(max_examples=60, deadline=None)
@example(height=77, width=35, n_px=30, name="lanczos", grain=True, seed=0)  # Pillow 13 begins with the rows
@example(height=77, width=35, n_px=30, name="bicubic", grain=True, seed=0)
@example(height=100, width=129, n_px=80, name="bicubic", grain=True, seed=905)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    n_px=st.integers(1, 90),
    name=st.sampled_from(FILTERS),
    grain=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_resize_is_within_two_grey_levels_of_pil(height, width, n_px, name, grain, seed):
    if max(height, width) > 16 * min(height, width):
        height = width
    random = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = random if grain else smooth(height, width, seed)
    difference = square(image, n_px, resize_filter=name).astype(int) - slow_square(image, n_px, "none", name)
    # Each of two passes rounds, and Pillow may take them in the other order. Of 60,402 images of noise 665 differ by 2 somewhere.
    assert np.abs(difference).max() <= (2 if name in ("bicubic", "bilinear") else 0)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(300, 451), (500, 333), (100, 90), (224, 224)])
def test_the_central_crop_is_the_papers(shape, name):
    image = smooth(*shape)
    for n_px in (32, 64, 224):
        difference = square(image, n_px, crop="center", resize_filter=name).astype(int) - slow_square(image, n_px, "center", name)
        assert np.abs(difference).max() <= 2  # two resizes, one level each


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(300, 451), (500, 333), (100, 90)])
def test_the_random_crop_is_the_papers_with_the_stated_draws(shape, name):
    image = smooth(*shape)
    for view in range(3):
        first, second, third = (draw / 2**64 for draw in images._draws(7, "cat", view))
        short = 256 + int(first * 129)
        height, width = (round(side * short / min(shape)) for side in shape)
        corner = (int(second * (height - 223)), int(third * (width - 223)))
        expected = slow_square(image, 48, "random", name, short, corner)
        ours = square(image, 48, crop="random", resize_filter=name, seed=7, key="cat", view=view)
        assert np.abs(ours.astype(int) - expected).max() <= 2


def test_random_crops_are_reproducible_and_differ_by_seed_key_and_view():
    image = smooth(270, 400)
    draws = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "\udcff\u2603", 0)]
    views = [square(image, 32, crop="random", seed=seed, key=key, view=view).tobytes() for seed, key, view in draws]
    assert len(set(views)) == len(draws)
    again = [square(image, 32, crop="random", seed=seed, key=key, view=view).tobytes() for seed, key, view in draws]
    assert views == again


def test_a_view_does_not_change_between_releases():
    assert images._draws(0, "n01440764/n01440764_10026.JPEG", 2) == (
        9703456844181822015,
        2297473933521688589,
        4668131031876836619,
    )


def test_random_windows_are_uniform_over_scale_and_place(monkeypatch):
    seen = []
    monkeypatch.setattr(images, "_resize", lambda image, height, width, name: np.zeros((height, width, 3), dtype=np.uint8))
    monkeypatch.setattr(images, "_below", lambda draw, n: seen.append((draw * n >> 64, n)) or draw * n >> 64)
    image = np.zeros((300, 450, 3), dtype=np.uint8)
    n_draws = 20_000
    for number in range(n_draws):
        square(image, 32, crop="random", key=f"image {number}")
    shorts = Counter(256 + value for value, n in seen[::3])
    assert (min(shorts), max(shorts), len(shorts)) == (256, 384, 129)
    expected = n_draws / 129
    chi2 = sum((count - expected) ** 2 / expected for count in shorts.values())
    assert chi2 < 129 + 5 * np.sqrt(2 * 129)  # its mean is 128, its standard deviation 16
    for axis in (1, 2):
        places = np.array([(value + 0.5) / n for value, n in seen[axis::3]])
        assert np.abs(np.histogram(places, 20, (0, 1))[0] - n_draws / 20).max() < 6 * np.sqrt(n_draws / 20)
        assert min(value for value, _ in seen[axis::3]) == 0
        assert any(value == n - 1 for value, n in seen[axis::3])
        assert all(value < n for value, n in seen[axis::3])
    tops, lefts = (np.array([(value + 0.5) / n for value, n in seen[axis::3]]) for axis in (1, 2))
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 5 / np.sqrt(n_draws)


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (333, 7), (31, 33), (1, 200_000)])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("crop", CROPS)
def test_any_shape_gives_the_square(shape, name, crop):
    image = np.full((*shape, 3), 77, dtype=np.uint8)
    result = square(image, 8, crop=crop, resize_filter=name)
    assert result.shape == (8, 8, 3)
    assert (result == 77).all()


def test_a_long_strip_keeps_its_middle():
    image = np.zeros((2, 100, 3), dtype=np.uint8)
    image[:, 34:66] = 9
    np.testing.assert_array_equal(images._without_ends(image), image[:, 34:66])
    np.testing.assert_array_equal(images._without_ends(image[:, :32]), image[:, :32])


def test_arrays_that_may_not_be_written_to_are_resized_in_silence():
    image = smooth(40, 50)
    frozen = image.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (frozen, frozen[::-1], frozen.transpose(1, 0, 2)):
            np.testing.assert_array_equal(square(view, 16), square(np.ascontiguousarray(view).copy(), 16))
    np.testing.assert_array_equal(frozen, image)


def test_unknown_filter_crop_and_size_are_refused(picture):
    with pytest.raises(ValueError, match="filter 'cubic' is unknown; known: bicubic, bilinear, box, lanczos"):
        square(picture, 4, resize_filter="cubic")
    with pytest.raises(ValueError, match="crop 'ten' is unknown; known: none, center, random"):
        square(picture, 4, crop="ten")
    with pytest.raises(ValueError, match="n_px=0 must be at least 1"):
        square(picture, 0)
