"""Images that are in memory already -> uint8 [h, w, 3], as `images.decode_image` gives them from a file. Called by the API."""

from __future__ import annotations

import numpy as np
from PIL import Image

from igpt_ds.data.images import as_rgb, upright
from igpt_ds.data.left_out import BadImageError


def picture_pixels(picture: object, name: str = "image") -> np.ndarray | None:
    """The pixels of a PIL image: uint8 [h, w, 3]; None for any other object.

    Raises:
        BadImageError: its file is truncated, or its pixels have no known range.
    """
    if not isinstance(picture, Image.Image):
        return None
    try:
        copy = picture.copy()  # the caller's image keeps its metadata
        copy.format = picture.format
        return np.array(as_rgb(upright(copy)))
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise BadImageError(f"{name} cannot be read as an image: {reason}")


def on_white(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 4], RGBA -> [h, w, 3], blended with white."""
    return np.array(as_rgb(Image.fromarray(image)))
