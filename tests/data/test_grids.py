"""data/grids.py: images in a PNG or a GIF, with labels and captions."""

from __future__ import annotations

import numpy as np
import pytest

from igpt_ds.data.grids import BACKGROUND, Texts, cell_scale, save_grid
from igpt_ds.data.images import decode_image


def test_grid_shows_each_pixel_and_separates_images(tmp_path):
    pictures = np.random.default_rng(3).integers(0, 100, (5, 2, 3, 3), dtype=np.uint8)
    save_grid(tmp_path / "new" / "grid.png", pictures, columns=2, scale=4)
    grid = decode_image((tmp_path / "new" / "grid.png").read_bytes())
    assert grid.shape == (3 * 10 + 2, 2 * 14 + 2, 3)
    for index, image in enumerate(pictures):
        top, left = index // 2 * 10 + 2, index % 2 * 14 + 2
        np.testing.assert_array_equal(grid[top : top + 8 : 4, left : left + 12 : 4], image)
        np.testing.assert_array_equal(grid[top + 3 : top + 8 : 4, left + 3 : left + 12 : 4], image)
    assert (grid[::10] == BACKGROUND).all()
    assert (grid[:, ::14] == BACKGROUND).all()
    assert (grid[22:, 16:] == BACKGROUND).all()  # the empty sixth place


def test_captions_stand_under_their_images_and_stay_in_their_cells(tmp_path):
    pictures = np.full((3, 8, 8, 3), 200, dtype=np.uint8)
    captions = ["cat", "", "a name far too long for its cell \u2603\n!"]
    save_grid(tmp_path / "grid.png", pictures, columns=2, scale=5, texts=Texts(captions))
    grid = decode_image((tmp_path / "grid.png").read_bytes())
    assert grid.shape == (2 * (42 + 16) + 2, 2 * 42 + 2, 3)
    strips = [grid[row * 58 + 42 : row * 58 + 58, column * 42 : column * 42 + 44] for row in (0, 1) for column in (0, 1)]
    assert [bool((strip != BACKGROUND).any()) for strip in strips] == [True, False, True, False]
    for row in (0, 1):
        for column in (0, 1):
            cell = grid[row * 58 + 2 : row * 58 + 42, column * 42 + 2 : column * 42 + 42]
            assert (cell == (200 if (row, column) != (1, 1) else BACKGROUND)).all()
    assert (grid[:, ::42][:, :2] == BACKGROUND).all()  # no letter in the bars


def test_a_grid_is_a_png_by_name_too(tmp_path):
    with pytest.raises(ValueError, match=r"index.json would hold a PNG; give it a name that ends in .png"):
        save_grid(tmp_path / "index.json", np.zeros((1, 4, 4, 3), dtype=np.uint8), 1)
    assert not list(tmp_path.iterdir())


def test_labels_stand_left_of_their_rows_and_only_rows_with_captions_have_room_for_them(tmp_path):
    pictures = np.full((4, 8, 8, 3), 200, dtype=np.uint8)
    texts = Texts(["", "", "IMG_0001.jpg", ""], ["", "completion 12"])
    save_grid(tmp_path / "grid.png", pictures, columns=2, scale=4, texts=texts)
    grid = decode_image((tmp_path / "grid.png").read_bytes())
    left = grid.shape[1] - 2 * 34
    assert grid.shape[0] == 2 + 34 + 34 + 16
    assert (grid[2:34, left : left + 32] == 200).all()
    assert (grid[:34, :left] == BACKGROUND).all()
    assert (grid[36:68, : left - 2] != BACKGROUND).any()
    assert (grid[36:68, left : left + 32] == 200).all()  # no letter covers an image
    assert (grid[68:, left : left + 32] != BACKGROUND).any()


def test_images_of_any_size_have_room_for_a_caption():
    assert [cell_scale(n_px) * n_px for n_px in (4, 8, 32, 48, 64, 96, 192)] == [96, 96, 96, 96, 128, 96, 192]
