"""verified.json: the shards that a run has verified, so that its next start reads only those that changed. The format's owner.

In: shards with the sizes, times and index of the moment. Out: what each of them held. Called by train/stream.py.

A shard counts as unchanged if its size, its time and the directory's index.json are those of the record. Bytes that changed
under the same size and time are noticed only when their image is read for the first time, by the image's own checksum.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import ShardEntry
from igpt_ds.data.shards.verify import damaged_rows, shard_damage
from igpt_ds.errors import InputError
from igpt_ds.files import sha256_file
from igpt_ds.plain_files import is_missing
from igpt_ds.schema import record_from, to_json
from igpt_ds.sealed import Format

READERS = 8  # threads of a rank that read shards
MODES = ("once", "always", "never")  # of --verify_shards
VERIFIED = Format("igpt_ds.verified", "record of verified shards", "remove it", version=1, sealed=1, oldest=1)


@dataclass(frozen=True)
class VerifiedShard:
    """What a shard was when it was read. damaged: the rows of its damaged images, which --on_bad skip left out."""

    bytes: int
    mtime_ns: int
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True)
class VerifiedDirectory:
    """The verified shards of a dataset directory, by name, under the index.json with this sha256."""

    index: str
    shards: dict[str, VerifiedShard]


@dataclass(frozen=True)
class Verified:
    """The contents of a verified.json, by the path of the dataset directory."""

    directories: dict[str, VerifiedDirectory] = field(default_factory=dict)

    def shard(self, directory: Path, name: str) -> VerifiedShard | None:
        """What is known of a shard."""
        known = self.directories.get(str(directory.absolute()))
        return None if known is None else known.shards.get(name)

    def having(self, checks: Sequence[ShardCheck], found: Sequence[VerifiedShard]) -> Verified:
        """This record with what the checks found, under the same index.json."""
        shards: dict[str, dict[str, VerifiedShard]] = {where: dict(one.shards) for where, one in self.directories.items()}
        for check, one in zip(checks, found, strict=True):
            shards[str(check.shards.path.absolute())][check.entry.name] = one
        return Verified({where: VerifiedDirectory(self.directories[where].index, some) for where, some in shards.items()})


def read_verified(path: Path, directories: Sequence[Path]) -> Verified:
    """What a run has verified of these dataset directories under their present index.json; nothing if the record is damaged."""
    indexes = {str(directory.absolute()): sha256_file(directory / "index.json") for directory in directories}
    empty = Verified({where: VerifiedDirectory(index, {}) for where, index in indexes.items()})
    try:
        if is_missing(path):
            return empty
        found = record_from(Verified, VERIFIED.read(path), str(path), VERIFIED.fix).directories
    except InputError as error:
        print(f"{error}; all shards are verified again", file=sys.stderr, flush=True)
        return empty
    same = {where: found[where] for where, index in indexes.items() if where in found and found[where].index == index}
    return Verified(empty.directories | same)


def write_verified(path: Path, verified: Verified) -> None:
    """Writes what a run has verified."""
    VERIFIED.write(path, to_json(verified))


@dataclass(frozen=True)
class ShardCheck:
    """One shard to verify: number `number` of a split."""

    shards: ShardSet
    number: int
    mode: str  # of MODES
    skip: bool  # whether damaged images are left out
    known: VerifiedShard | None  # from the record

    @property
    def entry(self) -> ShardEntry:
        """What the index says of the shard."""
        return self.shards.entries[self.number]

    def run(self) -> tuple[VerifiedShard, bool]:
        """Reads the shard once, unless it is known and unchanged or never read. Returns what it is, and whether it was read.

        Raises:
            ValueError: it is damaged; with `skip`, only if it has another size.
            OSError: it cannot be read.
        """
        file, known = self.shards.path / self.entry.name, self.known
        try:
            state = file.stat()
        except FileNotFoundError:
            raise InputError(str(shard_damage(file, self.entry, self.shards.n_px)[0])) from None
        seen = VerifiedShard(state.st_size, state.st_mtime_ns)
        if self.mode == "never" and seen.bytes == self.entry.bytes:
            return seen, False
        if self.mode == "once" and known and replace(known, damaged=()) == seen and (self.skip or not known.damaged):
            return known, False
        damage = shard_damage(file, self.entry, self.shards.n_px)
        if damage and (not self.skip or seen.bytes != self.entry.bytes):
            raise InputError(str(damage[0]))
        rows = tuple(damaged_rows(file, self.entry, self.shards.n_px)) if damage else ()
        # Damage outside of the images is not left out by --on_bad skip: no file has this time, so it is found again.
        return VerifiedShard(seen.bytes, -1 if damage and not rows else seen.mtime_ns, rows), True


def checks_of(sets: Sequence[ShardSet], mode: str, skip: Sequence[bool], before: Verified) -> list[ShardCheck]:
    """A check of every shard of some splits, in the order of the shards. `skip`: for each split, whether images are left out."""
    return [
        ShardCheck(shards, number, mode, left_out, before.shard(shards.path, entry.name))
        for shards, left_out in zip(sets, skip, strict=True)
        for number, entry in enumerate(shards.entries)
    ]


def run_checks(checks: Sequence[ShardCheck]) -> Generator[tuple[VerifiedShard, bool], None, None]:
    """The results of `ShardCheck.run`, in the order of the checks; several shards are read at a time."""
    threads = ThreadPoolExecutor(max(1, min(READERS, len(os.sched_getaffinity(0)))))  # sha256 releases the interpreter lock
    try:
        yield from threads.map(ShardCheck.run, checks)
    finally:
        threads.shutdown(cancel_futures=True)


def damaged_images(checks: Sequence[ShardCheck], found: Sequence[VerifiedShard], shards: ShardSet) -> np.ndarray:
    """The sorted ids, int64, of the damaged images of one ShardSet."""
    ids = [
        check.shards.ids_of(check.number, np.array(one.damaged, dtype=np.int64))
        for check, one in zip(checks, found, strict=True)
        if check.shards is shards and one.damaged
    ]
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *ids]))
