"""The tiny world of the data wing: an 8-colour palette, 4x4 images in two classes, and the digits as shards."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_ds.data.left_out import Tally
from igpt_ds.data.palette import Palette, fit_colors
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import Entry, open_source


@dataclass
class Memory:
    """A source whose images lie in memory: uint8 [N, h, w, 3]; image i is of class i % len(classes)."""

    images: np.ndarray
    name: str = "memory:"
    classes: list[str] = field(default_factory=lambda: ["cat", "dog", "owl"])
    val_fraction: float = 0.1
    n_test: int = 0  # how many of the last images are test images
    unreadable: tuple[int, ...] = ()
    labels: str = "use"
    left_out: Tally = field(default_factory=Tally)

    def entries(self):
        """As data/sources asks."""
        for index in range(len(self.images)):
            split = "test" if index >= len(self.images) - self.n_test else "train"
            yield Entry(split, f"image{index}", index % len(self.classes), [index])

    def read(self, entries):
        """As data/sources asks."""
        for entry in entries:
            bad = entry.place[0] in self.unreadable
            yield ValueError(f"{entry.key} cannot be read") if bad else self.images[entry.place[0]]


@pytest.fixture(scope="session")
def memory():
    """Makes a source of n random images: memory(n, n_px=4)."""

    def make(n, n_px=4, seed=0, **options):
        return Memory(np.random.default_rng(seed).integers(0, 256, (n, n_px, n_px, 3), dtype=np.uint8), **options)

    return make


@pytest.fixture(scope="session")
def palette8():
    """The eight corners of the colour cube, pulled in a little."""
    corners = np.array([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)], dtype=np.float32)
    return Palette(corners * np.float32(0.8))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, memory, palette8):
    """A dataset directory of 40 images of 4x4 in 8 colours, 7 images a shard."""
    path = tmp_path_factory.mktemp("tiny") / "shards"
    write_dataset(path, memory(40), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=7))
    return path


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory, memory, palette8):
    """A train split of n images of 4x4: tiny_of(n). Each is made once."""
    made = {}

    def make(n):
        if n not in made:
            path = tmp_path_factory.mktemp("tiny_of") / str(n)
            write_dataset(path, memory(n), palette8, ShardOptions(4, val_fraction=0, images_per_shard=10))
            made[n] = ShardSet(path, "train")
        return made[n]

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits as shards of 500 images, with a palette of all their 17 grey levels."""
    path = tmp_path_factory.mktemp("digits") / "shards"
    levels = np.repeat(np.rint(np.arange(17) * 255 / 16).astype(np.uint8)[:, None], 3, axis=1)
    palette, _ = fit_colors(levels, np.ones(17, dtype=np.int64), 17)
    write_dataset(path, open_source("digits:"), palette, ShardOptions(8, images_per_shard=500))
    return path


@pytest.fixture
def folder(tmp_path):
    """Makes DIR/<class>/<n>.png of random 6x5 images: folder({"cat": 3, "dog": 2}) -> DIR."""

    def make(classes, name="raw"):
        rng = np.random.default_rng(1)
        for label, n in classes.items():
            (tmp_path / name / label).mkdir(parents=True)
            for index in range(n):
                image = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / name / label / f"{index}.png")
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def openai_palette_file():
    """OpenAI's palette, where it lies beside the repository."""
    path = Path(__file__).parents[3] / "shared/data/openai-kmeans_centers.npy"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path
