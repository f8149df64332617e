"""Puts a state that the nodes hold in parts into the run directory, where any number of ranks can load it.

In: the fast saves on the disks of the nodes. A lost node's part comes from the copy on its neighbour (neighbours.py). A part that
is damaged is named, and the next copy of it is tried. Called by train/checkpoint/newest.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.errors import InputError, error_text
from igpt_ds.train.checkpoint.directory import checkpoint_name, commit, complete_checkpoints
from igpt_ds.train.checkpoint.disk import Hashing
from igpt_ds.train.checkpoint.manifest import FileEntry, Manifest, read_checkpoint
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.save import make_unfinished, unfinished_of
from igpt_ds.train.checkpoint.tiers import Tier

PIECE = 1 << 22  # bytes that are read at once


@dataclass(frozen=True)
class Held:
    """A state of one step. holders: for each file the first rank of each node that has it."""

    manifest: Manifest
    holders: tuple[tuple[int, ...], ...]


def collect_newest(tier: Tier, run: Tier, after: int, before: int | None, reasons: list[str]) -> int | None:
    """Puts the newest state into the run directory that all nodes together hold. All ranks call this together.

    Args:
        tier: a disk of each node.
        after, before: limits of its step; before=None: any.
        reasons: gets which parts are damaged.

    Returns:
        The step that was tried; None if there is none between the limits.

    Raises:
        SharedError: the run directory has no space, or cannot be written. An older state would lose the newer one.
    """
    mine = _states_of(tier) if tier.leads else {}
    states = _together(dist.gather_objects(mine))
    steps = [
        step for step, held in states.items() if held.manifest.is_whole and step > after and (before is None or step < before)
    ]
    if not steps:
        return None
    step = max(steps)
    held, final = states[step], run.directory / checkpoint_name(step)
    unfinished = unfinished_of(final)
    error: SharedError | None = None
    try:
        dist.from_rank_0(lambda: make_unfinished(unfinished, held.manifest.bytes))
        if _copy(tier, unfinished, held, reasons):
            dist.from_rank_0(lambda: commit(unfinished, final, held.manifest))
            dist.say(f"step {step} was put together in {run.directory} from the states of the nodes")
    except SharedError as caught:
        error = caught
    remove_together(dist.from_rank_0(lambda: [unfinished] if unfinished.exists() else []))
    if error:
        raise SharedError(f"step {step} cannot be put together in {run.directory}: {error}; the states of the nodes stay")
    return step


def _states_of(tier: Tier) -> dict[int, Manifest]:
    """The complete states of a node by step. What cannot be read, or was left, is not there, for the search has named it."""
    found, paths = {}, list[Path]()
    with suppress(InputError, OSError):
        paths = complete_checkpoints(tier.directory)
    for path in paths:
        with suppress(InputError, OSError):
            manifest = read_checkpoint(path).manifest
            if tier.has_branch(manifest):
                found[manifest.step] = manifest
    return found


def _together(nodes: list[dict[int, Manifest]]) -> dict[int, Held]:
    """The states by step. nodes: of each rank; those of a rank that is not the first of its node are empty."""
    found = {}
    for step in {step for states in nodes for step in states}:
        parts = {rank: states[step] for rank, states in enumerate(nodes) if step in states}
        while parts:  # parts of two starts never mix
            facts = replace(next(iter(parts.values())), files=())
            same = {rank: manifest for rank, manifest in parts.items() if replace(manifest, files=()) == facts}
            parts = {rank: manifest for rank, manifest in parts.items() if rank not in same}
            held = _held(facts, same)
            if step not in found or held.manifest.is_whole:
                found[step] = held
    return found


def _held(facts: Manifest, parts: dict[int, Manifest]) -> Held:
    """The state whose parts these are. parts: by the first rank of a node."""
    holders: dict[FileEntry, list[int]] = {}
    for rank, manifest in parts.items():
        for entry in manifest.files:
            holders.setdefault(entry, []).append(rank)
    files = {entry.name: (entry, tuple(ranks)) for entry, ranks in holders.items()}
    entries, ranks = zip(*files.values(), strict=True) if files else ((), ())
    return Held(replace(facts, files=entries), ranks)


def _copy(tier: Tier, unfinished: Path, held: Held, reasons: list[str]) -> bool:
    """Copies each file from the first node whose file is whole; False if a file is whole nowhere. The ranks of a node share.

    Raises:
        SharedError: a rank cannot write.
    """
    pending = dict.fromkeys(range(len(held.holders)), 0)  # a file and which of its holders copies it
    while pending:
        if any(turn == len(held.holders[place]) for place, turn in pending.items()):
            return False
        here = [place for place, turn in pending.items() if held.holders[place][turn] == tier.members[0]]
        mine = [place for place in here if tier.members[place % len(tier.members)] == dist.rank()]
        damaged, error, source = {}, "", tier.directory / checkpoint_name(held.manifest.step)
        try:
            damaged = {place: said for place in mine if (said := _copy_file(source, unfinished, held.manifest.files[place]))}
        except OSError as caught:
            error = error_text(caught)
        dist.meet()  # a slow disk has no time limit
        answers = dist.gather_objects((damaged, error))
        if errors := [error for _, error in answers if error]:
            raise SharedError(errors[0])
        reasons += [said for damaged, _ in answers for said in damaged.values()]
        pending = {place: pending[place] + 1 for damaged, _ in answers for place in damaged}
    return True


def _copy_file(source: Path, target: Path, entry: FileEntry) -> str:
    """Copies a file; returns what is wrong with the source, or "".

    Raises:
        OSError: the target cannot be written.
    """
    with open(target / entry.name, "wb") as file:
        hashing = Hashing(file)
        try:
            for piece in _pieces(source / entry.name):
                hashing.write(piece)
        except InputError as error:
            return str(error)
        file.flush()
        os.fsync(file.fileno())
    same = hashing.digest.hexdigest() == entry.sha256
    return "" if same else f"{source / entry.name} is damaged (sha256 differs, on the node of rank {dist.rank()})"


def _pieces(path: Path) -> Iterator[bytes]:
    """The content of a file. A ValueError if it cannot be read, which an error in writing is not."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise InputError(error_text(error)) from None
