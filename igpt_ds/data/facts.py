"""What identifies training data in run.json and in checkpoints, as records that load no library.

`Mixture.facts` and `ShardStream.facts` make them; train/run_dir.py and train/checkpoint/manifest.py keep and compare them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a mixture; share: its images in a block of order.BLOCK positions."""

    path: str
    dataset_hash: str
    n_images: int
    share: int


@dataclass(frozen=True)
class DataFacts:
    """What identifies the training data in run.json and checkpoints.

    order: the version of the order of images, or "stream". datasets: None for a stream. stream: the URL of a stream.
    split: the split that is trained on, such as "train+val"; None in files of earlier versions.
    """

    path: str
    dataset_hash: str
    palette_hash: str
    order: int | str | None = None
    datasets: tuple[DatasetFacts, ...] | None = None
    stream: str | None = None
    split: str | None = None
