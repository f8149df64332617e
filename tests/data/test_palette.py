"""The palette is exact, stable, and refuses what is no palette."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data import palette as palette_module
from igpt_ds.data.palette import (
    OPENAI_PALETTE_HASH,
    REPORT,
    ColorCounts,
    Palette,
    PaletteReport,
    fit_colors,
    fit_palette,
    load_palette,
    prepare_table,
    report_path,
    save_palette,
)
from igpt_ds.data.palette_table import build_table, code_pixels, color_codes, nearest, table_path


def brute_force(pixels, colors):
    """The definition, as it stands: float64 model space, first index on ties."""
    x = pixels.astype(np.float64) / 127.5 - 1
    return ((x[:, None, :] - colors.astype(np.float64)[None]) ** 2).sum(-1).argmin(-1)


def random_palette(n_colors, seed):
    return Palette(np.random.default_rng(seed).uniform(-1, 1, (n_colors, 3)).astype(np.float32))


@pytest.fixture
def pixels():
    return np.random.default_rng(7).integers(0, 256, (3000, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------- encode and decode


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(1, 2500))
def test_encode_equals_brute_force(n_colors, seed, n_pixels):
    palette = random_palette(n_colors, seed)
    pixels = np.random.default_rng(seed + 1).integers(0, 256, (n_pixels, 3), dtype=np.uint8)
    np.testing.assert_array_equal(palette.encode(pixels), brute_force(pixels, palette.colors))


def test_encode_equals_brute_force_on_openai_palette(openai_palette_file):
    palette = load_palette(openai_palette_file)
    pixels = np.random.default_rng(3).integers(0, 256, (20_000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(palette.encode(pixels), brute_force(pixels, palette.colors))
    np.testing.assert_array_equal(palette.encode(palette.decode(np.arange(512))), np.arange(512))
    assert len(palette) == 512


def test_encode_keeps_the_shape_and_remembers(pixels):
    palette = random_palette(9, 1)
    image = pixels.reshape(3, 50, 20, 3)
    first = palette.encode(image)
    assert (first.shape, first.dtype) == ((3, 50, 20), np.uint16)
    np.testing.assert_array_equal(palette.encode(image), first)


def test_first_index_wins_a_tie(pixels):
    colors = random_palette(6, 2).colors
    doubled = Palette(np.concatenate([colors, colors]))
    assert doubled.encode(pixels).max() < 6


def test_tokens_reach_the_last_of_65536_colours():
    grey = np.linspace(-1, 1, 65536, dtype=np.float32)
    palette = Palette(np.stack([grey, grey, grey], axis=1))
    assert palette.encode(np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)).tolist() == [0, 65535]


def test_decode_is_the_released_formula():
    palette = Palette(np.array([[-1, 0, 1], [-0.98925, 0.99702, 0.5]], dtype=np.float32))
    decoded = palette.decode(np.array([[1, 0]]))
    assert decoded.dtype == np.uint8
    assert decoded.tolist() == [[[1, 255, 191], [0, 128, 255]]]


def test_every_byte_survives_model_space():
    grey = (np.arange(256) / 127.5 - 1).astype(np.float32)
    palette = Palette(np.stack([grey, grey, grey], axis=1))
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    np.testing.assert_array_equal(palette.decode(palette.encode(levels)), levels)


def test_hash_is_of_the_float32_bytes_and_cannot_go_stale():
    colors = random_palette(4, 3).colors.copy()
    palette = Palette(colors)
    assert palette.hash == hashlib.sha256(colors.astype("<f4").tobytes()).hexdigest()
    colors[0] = 0
    assert palette.colors[0].any()
    with pytest.raises(ValueError, match="read-only"):
        palette.colors[0] = 0


# --------------------------------------------------------------------------------------------------- files


def test_palette_file_round_trip(tmp_path):
    palette = random_palette(12, 4)
    save_palette(tmp_path / "p.npy", palette)
    loaded = load_palette(tmp_path / "p.npy")
    assert loaded.hash == palette.hash
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), palette.colors)
    assert [file.name for file in tmp_path.iterdir()] == ["p.npy"]


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        (np.zeros((8, 3)), "holds float64; a palette is float32"),
        (np.zeros((8, 4), np.float32), r"has shape \[8, 4\]; a palette is \[V, 3\] with 1 to 65536 colours"),
        (np.zeros(24, np.float32), r"has shape \[24\]"),
        (np.zeros((0, 3), np.float32), r"has shape \[0, 3\]"),
        (np.zeros((65537, 3), np.float32), r"has shape \[65537, 3\]"),
        (np.float32([[0, 128, 255]]), r"holds values from 0 to 255; a palette lies in \[-1, 1\]"),
        (np.float32([[-1.5, 0, 0]]), r"holds values from -1.5 to 0"),
        (np.float32([[np.nan, 0, 0]]), r"holds values from nan to nan"),
        (np.float32([[0, 0.5, 1]]), r"no negative value and looks like \[0, 1\] values.*use 2 \* colors - 1"),
    ],
)
def test_load_refuses_what_is_no_palette(tmp_path, colors, message):
    np.save(tmp_path / "odd.npy", colors)
    with pytest.raises(ValueError, match=message) as caught:
        load_palette(tmp_path / "odd.npy")
    assert f"palette {tmp_path / 'odd.npy'} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_missing_and_foreign_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"none.npy cannot be read: No such file or directory; make one with tools/fit_palette.py"
    ):
        load_palette(tmp_path / "none.npy")
    for content in (b"", b"not numpy at all", b"\x93NUMPY\x01\x00"):
        (tmp_path / "odd.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"odd.npy is not a .npy file of numbers") as caught:
            load_palette(tmp_path / "odd.npy")
        assert "\n" not in str(caught.value)
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"object.npy is not a .npy file of numbers"):
        load_palette(tmp_path / "object.npy")


def test_save_refuses_what_load_would(tmp_path):
    with pytest.raises(ValueError, match=r"palette for .*p.npy holds values from 2 to 2"):
        save_palette(tmp_path / "p.npy", Palette(np.full((2, 3), 2, dtype=np.float32)))
    assert not list(tmp_path.iterdir())


def test_a_palette_without_dark_colours_is_vouched_for_by_its_own_report(tmp_path):
    path = tmp_path / "p.npy"
    bright, report = fit_palette(np.random.default_rng(0).integers(128, 256, (500, 3), dtype=np.uint8), 8)
    report = dataclasses.replace(report, seed=3)
    save_palette(path, bright, report)
    assert load_palette(path).hash == bright.hash
    written = json.loads(report_path(path).read_text())
    assert written == REPORT.seal(dataclasses.asdict(report))
    written = dataclasses.asdict(report)  # as older code wrote it
    assert (written["hash"], written["n_colors"], written["seed"]) == (bright.hash, 8, 3)
    save_palette(tmp_path / "copy.npy", load_palette(path))  # a copy can be loaded too
    assert load_palette(tmp_path / "copy.npy").hash == bright.hash
    report_path(path).write_text(json.dumps(written | {"hash": "0" * 64}))
    with pytest.raises(
        ValueError,
        match=r"p.npy is not the one that .*p.json describes: its colours have another hash; write palette and report again",
    ):
        load_palette(path)
    fields = {name: value for name, value in written.items() if value is not None}
    report_path(path).write_text(json.dumps({"hash": fields.pop("hash"), "n_colors": fields.pop("n_colors")}))
    assert load_palette(path).hash == bright.hash, "older reports lack the other fields"
    for name, value in written.items():
        wrong = 0.5 if isinstance(value, str) else "other"
        report_path(path).write_text(json.dumps(written | {name: wrong}))
        if wrong == "other" and name in ("source", "crop", "filter"):
            continue
        with pytest.raises(ValueError, match=f"palette report {report_path(path)} has {name} {wrong!r}, which is not a"):
            load_palette(path)
    for broken, told in (
        ("[]", "has content [], which is not an object; write"),
        ("{", "is not valid JSON"),
        ("{}", "has no 'hash'"),
    ):
        report_path(path).write_text(broken)
        with pytest.raises(ValueError, match=re.escape(f"palette report {report_path(path)} {told}")):
            load_palette(path)
    report_path(path).write_text(json.dumps({"hash": bright.hash}))
    with pytest.raises(ValueError, match="has no 'n_colors'"):
        load_palette(path)


def test_a_perfect_fit_has_a_report_that_is_json(tmp_path):
    colors = np.array([[-1, 0, 1], [0.5, 0.25, 0]], dtype=np.float32)
    palette = Palette(colors)
    save_palette(tmp_path / "p.npy", palette, PaletteReport(palette.hash, 2, psnr=math.inf))
    assert json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)["psnr"] is None


# --------------------------------------------------------------------------------------------------- the table of all colours


def corner_cases():
    """Palettes on which bounds could be too tight: ties by symmetry, duplicates, one plane, clumps, colours on byte values."""
    levels = (np.array([0, 1, 127, 128, 255]) / 127.5 - 1).astype(np.float32)
    rng = np.random.default_rng(5)
    return {
        "one": np.zeros((1, 3), np.float32),
        "lattice": np.array(list(itertools.product(levels, repeat=3)), dtype=np.float32),
        "mirrored": np.array(list(itertools.product([-0.5, 0.5], repeat=3)), dtype=np.float32),
        "doubled": np.tile(rng.uniform(-1, 1, (20, 3)).astype(np.float32), (3, 1)),
        "grey": np.repeat(np.linspace(-1, 1, 300, dtype=np.float32)[:, None], 3, axis=1),
        "clump": (rng.normal(0, 0.01, (600, 3)) - 0.9).clip(-1, 1).astype(np.float32),
        "random": rng.uniform(-1, 1, (512, 3)).astype(np.float32),
    }


def sample_pixels(colors, n):
    """n random colours, the palette's own and those halfway between two of them, where the ties are, with their surroundings."""
    rng = np.random.default_rng(1)
    bytes_ = 127.5 * (colors.astype(np.float64) + 1)
    pairs = rng.integers(len(colors), size=(500, 2))
    centres = np.concatenate([bytes_[rng.integers(len(colors), size=200)], bytes_[pairs].mean(axis=1)])
    around = np.floor(centres)[:, None] + np.array(list(itertools.product((-1, 0, 1, 2), repeat=3)))
    return np.concatenate([rng.integers(0, 256, (n, 3)), around.reshape(-1, 3).clip(0, 255)]).astype(np.uint8)


@pytest.mark.parametrize("name", corner_cases())
def test_the_table_is_brute_force(name):
    colors = corner_cases()[name]
    table = build_table(colors)
    assert (table.shape, table.dtype) == ((1 << 24,), np.uint16)
    pixels = sample_pixels(colors, 10_000)
    np.testing.assert_array_equal(table[color_codes(pixels)], nearest(pixels, colors)[0])


def test_the_table_is_brute_force_on_200_000_colours_of_the_released_palette(openai_palette_file):
    colors = load_palette(openai_palette_file).colors
    table = build_table(colors)
    pixels = sample_pixels(colors, 200_000)
    np.testing.assert_array_equal(table[color_codes(pixels)], nearest(pixels, colors)[0])
    np.testing.assert_array_equal(build_table(colors, threads=3), table)


@pytest.mark.skipif(os.environ.get("IGPT_DS_EXHAUSTIVE") != "1", reason="all 16.7M colours: set IGPT_DS_EXHAUSTIVE=1")
def test_the_table_is_brute_force_on_every_colour(openai_palette_file):
    for colors in (load_palette(openai_palette_file).colors, corner_cases()["lattice"]):
        table = build_table(colors)
        for codes in np.arange(1 << 24).reshape(256, -1):
            np.testing.assert_array_equal(table[codes], nearest(code_pixels(codes), colors)[0])


def test_the_table_of_65536_colours():
    colors = np.random.default_rng(2).uniform(-1, 1, (65536, 3)).astype(np.float32)
    pixels = np.random.default_rng(3).integers(0, 256, (500, 3), dtype=np.uint8)
    np.testing.assert_array_equal(build_table(colors)[color_codes(pixels)], nearest(pixels, colors)[0])


def test_tokens_are_those_of_the_released_formula(openai_palette_file):
    palette = load_palette(openai_palette_file)
    pixels = np.random.default_rng(4).integers(0, 256, (200_000, 3), dtype=np.uint8)
    tokens = palette.encode(pixels)

    def expanded(dtype):
        a, b = (pixels / 127.5 - 1).astype(dtype), palette.colors.astype(dtype).T
        parts = np.array_split(a, 50)
        return np.concatenate([((p**2).sum(1)[:, None] - 2 * p @ b + (b**2).sum(0)).argmin(1) for p in parts])

    np.testing.assert_array_equal(tokens, expanded(np.float64))
    differ = np.flatnonzero(tokens != expanded(np.float32))
    assert len(differ) <= 5  # float32 rounds the expansion: 2 of 2,097,152 colours on one machine, all of them near ties
    x = pixels[differ] / 127.5 - 1
    ours, theirs = (((x - palette.colors[t[differ]]) ** 2).sum(1) for t in (tokens, expanded(np.float32)))
    assert (theirs - ours < 1e-6).all()


def test_openai_palette_is_known_by_name(openai_palette_file):
    assert load_palette(openai_palette_file).hash == OPENAI_PALETTE_HASH
    assert load_palette(openai_palette_file).name == "OpenAI's palette"
    assert random_palette(4, 0).name == f"palette {random_palette(4, 0).hash[:16]}"


@pytest.fixture
def saved(tmp_path):
    palette = random_palette(64, 8)
    save_palette(tmp_path / "p.npy", palette)
    return tmp_path / "p.npy"


@pytest.fixture
def builds(monkeypatch):
    """Counts the tables that are built."""
    calls = []
    monkeypatch.setattr(palette_module, "build_table", lambda *a, **k: calls.append(1) or build_table(*a, **k))
    return calls


def test_a_few_images_build_no_table_and_many_do(builds):
    palette = random_palette(512, 9)
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    few = palette.encode(images[:10])
    assert not builds
    many = palette.encode(images)
    palette.encode(images)
    assert len(builds) == 1
    np.testing.assert_array_equal(many[:10], few)
    np.testing.assert_array_equal(many.reshape(-1), nearest(images.reshape(-1, 3), palette.colors)[0])


def test_a_prepared_table_is_cached_mapped_and_used_by_others(saved, builds, capsys, pixels):
    prepared = prepare_table(saved)
    assert len(builds) == 1
    assert table_path(saved) == saved.with_name("p.npy.table")
    assert table_path(saved).stat().st_size == 4096 + 2 * (1 << 24)
    many = np.tile(pixels, (40, 1))
    expected = brute_force(pixels, prepared.colors)
    for palette in (prepared, prepare_table(saved), load_palette(saved), pickle.loads(pickle.dumps(prepared))):
        np.testing.assert_array_equal(palette.encode(many)[:3000], expected)
        mapped = palette._state.table
        assert isinstance(mapped.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            mapped[0] = 1
    assert len(builds) == 1
    assert len(pickle.dumps(prepared)) < 5000
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "is damaged: its bytes have another sha256"),
        (lambda data: data[:-1], "is damaged: it has 33558527 bytes instead of 33558528"),
        (lambda data: data[:50], "belongs to another palette"),
        (lambda data: data[:33] + b"\xff\n", "belongs to another palette"),
        (lambda data: b"", "is not a table of this version"),
        (lambda data: data.replace(random_palette(64, 8).hash.encode(), b"0" * 64, 1), "belongs to another palette"),
    ],
)
def test_a_table_that_is_damaged_or_foreign_is_never_used(saved, damage, words, builds, capsys, pixels):
    prepare_table(saved)
    table_path(saved).write_bytes(damage(table_path(saved).read_bytes()))
    palette = load_palette(saved)
    many = np.tile(pixels, (40, 1))
    expected = np.tile(brute_force(pixels, palette.colors), 40)
    for _ in range(2):
        np.testing.assert_array_equal(palette.encode(many), expected)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert error.endswith("; it is not used\n")
    prepare_table(saved)  # says it once more, and mends it
    assert words in capsys.readouterr().err
    np.testing.assert_array_equal(load_palette(saved).encode(many), expected)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_costs_only_the_cache(saved, capsys, pixels, monkeypatch):
    table_path(saved).mkdir()  # root may write anywhere, but nobody can replace a directory by a file
    palette = prepare_table(saved)
    np.testing.assert_array_equal(palette.encode(pixels), brute_force(pixels, palette.colors))
    error = capsys.readouterr().err
    assert "the palette's table cannot be cached as" in error
    assert "Is a directory" in error
    assert not list(saved.parent.glob(".*"))


# --------------------------------------------------------------------------------------------------- fitting


def grey(values):
    return np.repeat(np.array(values, dtype=np.uint8)[:, None], 3, axis=1)


def test_centres_are_weighted_means():
    palette, report = fit_palette(grey([0] * 9 + [10] + [200] * 5), 2)
    np.testing.assert_allclose(127.5 * (palette.colors[:, 0] + 1), [1, 200], atol=1e-4)
    assert report.n_pixels == 15
    assert report.n_unique == 3
    squared_error = (9 * 1**2 + 9**2) * 3 / 45  # of 8-bit values
    assert report.inertia == pytest.approx((9 * 1**2 + 9**2) * 3 / 127.5**2, rel=1e-4)
    assert report.psnr == pytest.approx(10 * np.log10(255**2 / squared_error), rel=1e-5)


def test_as_many_colours_as_there_are_is_exact():
    pixels = grey([0, 0, 16, 255])
    palette, report = fit_palette(pixels, 3)
    np.testing.assert_array_equal(palette.decode(palette.encode(pixels)), pixels)
    assert report.psnr > 100


@pytest.mark.parametrize("n_colors", [0, 18, 512])
def test_more_colours_than_there_are_is_refused(n_colors):
    message = rf"n_colors={n_colors} but the images hold 17 different colours; use --n_colors 1 to 17"
    with pytest.raises(ValueError, match=message):
        fit_palette(grey(range(17)), n_colors)


def test_fit_is_seeded_ordered_by_luminance_and_better_than_chance(pixels):
    palette, report = fit_palette(pixels, 16, seed=5)
    again, _ = fit_palette(pixels, 16, seed=5)
    other, _ = fit_palette(pixels, 16, seed=6)
    assert palette.hash == again.hash != other.hash
    assert (np.diff(palette.colors @ [0.299, 0.587, 0.114]) > 0).all()
    x = pixels / 127.5 - 1
    inertia = ((x - palette.colors[palette.encode(pixels)]) ** 2).sum()
    assert report.inertia == pytest.approx(inertia, rel=1e-9)
    assert inertia < 0.8 * ((x - pixels[:16][brute_force(pixels, pixels[:16] / 127.5 - 1)] / 127.5 + 1) ** 2).sum()


def test_counts_are_exact_and_bounded_draws_follow_them(pixels):
    counts = ColorCounts()
    coarse = pixels // 64 * 64
    counts.add(coarse[:1000].reshape(10, 100, 3))
    counts.add(coarse[1000:])
    colors, weights = counts.weighted()
    codes, expected = np.unique(color_codes(coarse), return_counts=True)
    np.testing.assert_array_equal(color_codes(colors), codes)
    np.testing.assert_array_equal(weights, expected)
    assert counts.weighted(3000)[1].sum() == counts.n_pixels == 3000  # no more asked than there are: all, exactly

    drawn, drawn_weights = counts.weighted(2000, seed=1)
    assert drawn_weights.sum() == 2000
    assert drawn_weights.min() > 0
    np.testing.assert_array_equal(counts.weighted(2000, seed=1)[1], drawn_weights)
    share = dict(zip(color_codes(colors).tolist(), weights / 3000, strict=True))
    spread = [abs(w / 2000 - share[c]) for c, w in zip(color_codes(drawn).tolist(), drawn_weights, strict=True)]
    assert max(spread) < 5 * np.sqrt(max(share.values()) / 2000)


def test_drawn_fit_is_near_the_full_fit(pixels):
    counts = ColorCounts()
    counts.add(pixels)
    palette, report = fit_colors(*counts.weighted(1000), 8)
    assert report.n_pixels == 1000
    _, full = fit_palette(pixels, 8)
    error = ((pixels / 127.5 - 1 - palette.colors[palette.encode(pixels)]) ** 2).sum()
    assert error < 1.2 * full.inertia
