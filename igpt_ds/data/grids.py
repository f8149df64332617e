"""Pixels out: images become one grid, a PNG or an animated GIF, with a label left of each row and a caption below each image.

In: uint8 [N, h, w, 3] and texts. Out: one file. Called by the tools that show images: sample, show_shards, figures and others.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file

CELL = 96  # screen pixels that an image's side has at least: room for a caption
BACKGROUND = 236  # the grey around images and texts
_FONT_PX, _LINE_PX = 12, 16
_FRAME_MS, _LAST_MS = 60, 3000  # the last frame of a GIF is shown longer


def cell_scale(n_px: int) -> int:
    """Screen pixels per image pixel that give images of at least CELL screen pixels."""
    return -(-CELL // n_px)


@dataclass(frozen=True)
class Texts:
    """The texts of a grid. A row without captions has no room for them."""

    captions: Sequence[str] = ()  # below the images, one line each, shortened in the middle to the image's width
    labels: Sequence[str] = ()  # left of the rows


def save_grid(path: Path, images: np.ndarray, columns: int, scale: int = 1, texts: Texts | None = None) -> None:
    """Writes images, uint8 [N, h, w, 3], row by row into one PNG; each pixel becomes scale x scale, grey bars separate images."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} would hold a PNG; give it a name that ends in .png")
    picture = _Layout(images.shape, columns, scale, texts or Texts()).draw(images)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def save_gif(path: Path, frames: Iterable[np.ndarray], columns: int, scale: int = 1, texts: Texts | None = None) -> None:
    """Writes a looping GIF of grids laid out as by `save_grid`: frames of uint8 [N, h, w, 3].

    All frames use the 256 colours that fit the last frame best, so nothing flickers.
    """
    pictures = [_Layout(images.shape, columns, scale, texts or Texts()).draw(images) for images in frames]
    colors = pictures[-1].quantize(256)
    indexed = [picture.quantize(palette=colors, dither=Image.Dither.NONE) for picture in pictures]
    durations = [_FRAME_MS] * (len(indexed) - 1) + [_LAST_MS]
    with atomic_file(path) as file:
        indexed[0].save(file, format="GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)


class _Layout:
    """Where each image and text of a grid stands."""

    def __init__(self, shape: tuple[int, ...], columns: int, scale: int, texts: Texts) -> None:
        n, height, width, _ = shape
        assert min(n, columns, scale) > 0
        assert len(texts.captions) in (0, n)
        self.columns, self.scale, self.texts = min(columns, n), scale, texts
        self.height, self.width = height * scale, width * scale
        self.font = ImageFont.load_default(_FONT_PX)
        bar, rows = max(1, scale // 2), -(-n // self.columns)
        assert len(texts.labels) in (0, rows)
        left = max((2 * bar + round(self.font.getlength(label)) for label in texts.labels if label), default=0)
        self.label_left, self.corners, top = bar, list[tuple[int, int]](), bar
        for row in range(rows):
            places = range(row * self.columns, min(n, (row + 1) * self.columns))
            self.corners += [(top, left + bar + (self.width + bar) * (place - row * self.columns)) for place in places]
            captioned = any(texts.captions[place] for place in places) if texts.captions else False
            top += self.height + bar + _LINE_PX * captioned
        self.size = (top, left + bar + (self.width + bar) * self.columns)

    def draw(self, images: np.ndarray) -> Image.Image:
        """The picture of these images."""
        canvas = np.full((*self.size, 3), BACKGROUND, dtype=np.uint8)
        for image, (top, left) in zip(images, self.corners, strict=True):
            large = image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            canvas[top : top + self.height, left : left + self.width] = large
        picture = Image.fromarray(canvas)
        draw = ImageDraw.Draw(picture)
        for text, (top, left) in zip(self.texts.captions, self.corners, strict=False):
            draw.text((left, top + self.height + _LINE_PX // 2), self._shortened(text), fill="black", font=self.font, anchor="lm")
        for text, (top, _) in zip(self.texts.labels, self.corners[:: self.columns], strict=False):
            draw.text((self.label_left, top + self.height // 2), text, fill="black", font=self.font, anchor="lm")
        return picture

    def _shortened(self, text: str) -> str:
        """One line that fits under an image: of a longer text the start and the end, which tell file names apart."""
        line = _written(" ".join(text.split()))
        kept = len(line)
        shown = line
        while kept and self.font.getlength(shown) > self.width:
            kept -= 1
            shown = f"{line[: kept - kept // 2]}\u2026{line[len(line) - kept // 2 :]}" if kept else ""
        return shown


def _written(text: str) -> str:
    """A text in the letters of PIL's own font: others lose their accents, or become an escape such as \\u56fe."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return plain.encode("ascii", "backslashreplace").decode()
