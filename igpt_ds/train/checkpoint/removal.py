"""Removes directories of checkpoints on all ranks together, because a checkpoint of 512 ranks has over a thousand files.

Called by train/checkpoint/save.py and load.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from igpt_ds import dist


def remove_together(directories: Sequence[Path]) -> None:
    """Each rank removes its share of the files; then rank 0 removes the directories. Every rank calls this with the same ones.

    A rank whose disk fails leaves its share to rank 0.

    Raises:
        SharedError: rank 0 cannot remove a directory.
    """
    for directory in directories if dist.world_size() > 1 else ():
        with suppress(OSError):
            for path in directory.iterdir():
                # By its name, and not by its place: the other ranks make the list shorter meanwhile.
                if crc32(bytes(path)) % dist.world_size() == dist.rank():
                    path.unlink()
    if directories:
        dist.meet()
        dist.from_rank_0(lambda: _remove(directories))


def _remove(directories: Sequence[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory)
