"""Damaged files. In: the world, a seed and a number. Out: for each trial the format, the outcome and the damage in words."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.ops.torture.mutate import MISSING, WITHOUT_SILENT, damage
from igpt_ds.ops.torture.trial import Ended, Trial, run_all, run_one
from igpt_ds.ops.torture.world import Format, damaged_file, formats


def trials(world: Path, seed: int, n: int, cores: int) -> Iterator[tuple[str, str, str]]:
    """`n` damaged files, the formats in turn.

    Raises:
        ValueError: an undamaged copy cannot be read.
    """
    if not n:
        return
    whole = {}
    for one in formats():
        ended = run_one(partial(read_copy, world, one, None), world / "trials", one.seconds)
        if ended.how != "ok":
            raise InputError(f"an undamaged {one.name} cannot be read: {ended.how}: {ended.text}")
        whole[one.name] = ended.text
    turns = list(islice((one for turn in count() for one in formats() if turn % one.every == 0), n))
    work = [
        Trial(str(number), partial(read_copy, world, one, f"{seed}/{number}"), one.seconds) for number, one in enumerate(turns)
    ]
    for trial, ended in run_all(work, world / "trials", cores):
        one = turns[int(trial.name)]
        kind, words = what(world, one, f"{seed}/{trial.name}")
        noticed = one.ours and kind not in WITHOUT_SILENT and not (one.optional and kind == MISSING)
        yield one.name, classify(ended, whole[one.name], noticed), f"{words}: {ended.text[-1500:]}"


def copy_parts(world: Path, parts: Sequence[str], here: Path) -> None:
    """Copies parts of the world into the directory of a trial."""
    for part in parts:
        source, target = world / part, here / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy(source, target)


def read_copy(world: Path, one: Format, seed: str | None, place: Path) -> str:
    """Copies a format, damages one of its files (seed None: none), and reads it."""
    here = place / "here"
    copy_parts(world, one.parts, here)
    if seed is not None:
        random_ = random.Random(seed)
        damage(random_, damaged_file(random_, here, one.files), place, here)
    return one.read(here)


def what(world: Path, one: Format, seed: str) -> tuple[str, str]:
    """The kind of damage of a trial, and the damage in words, found by doing it again."""
    here = world / "trials" / "again"
    copy_parts(world, one.parts, here)
    random_ = random.Random(seed)
    file = damaged_file(random_, here, one.files)
    kind = damage(random_, file, here, here)
    shutil.rmtree(here)
    return kind, f"{kind} in {file.relative_to(here)} (seed {seed})"


def classify(ended: Ended, whole: str, ours: bool) -> str:
    """The outcome of a trial, as `Figures` counts it."""
    if ended.how == "ok":
        return "same" if ended.text == whole or not ours else "silent"
    return {"killed": "traceback"}.get(ended.how, ended.how)
