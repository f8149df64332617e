"""Puts a state that the nodes hold in parts into the run directory, where any number of ranks can load it.

In: the fast saves on the disks of the nodes. A lost node's part comes from the copy on its neighbour (neighbours.py). A part that
is damaged is named, and the next copy of it is tried. Called by train/checkpoint/newest.py.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.errors import InputError, error_text
from igpt_ds.files import fsync_path, sha256_file
from igpt_ds.train.checkpoint.directory import checkpoint_name, commit, complete_checkpoints
from igpt_ds.train.checkpoint.manifest import FileEntry, Manifest, read_checkpoint
from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.save import make_unfinished, unfinished_of
from igpt_ds.train.checkpoint.tiers import Tier


@dataclass(frozen=True)
class Held:
    """A state of one step. holders: for each file the first rank of each node that has it."""

    manifest: Manifest
    holders: tuple[tuple[int, ...], ...]

    @property
    def is_whole(self) -> bool:
        """Whether the nodes together have the files of every rank."""
        found = {entry.of_rank for entry in self.manifest.files}
        ranks = range(self.manifest.world_size)
        if self.manifest.stage == 3:
            return all((kind, rank) in found for kind in ("optim", "model") for rank in ranks)
        has_model = "mp_rank_00_model_states.pt" in {entry.name for entry in self.manifest.files}
        return has_model and all(("optim", rank) in found for rank in ranks)


def collect_newest(tier: Tier, run: Tier, after: int, before: int | None, reasons: list[str]) -> int | None:
    """Puts the newest state into the run directory that all nodes together hold. All ranks call this together.

    Args:
        tier: a disk of each node.
        after, before: limits of its step; before=None: any.
        reasons: gets which parts are damaged.

    Returns:
        The step that was tried; None if there is none between the limits.
    """
    mine = _states_of(tier.directory) if tier.leads else {}
    states = _together(dist.gather_objects(mine))
    steps = [step for step, held in states.items() if held.is_whole and step > after and (before is None or step < before)]
    if not steps:
        return None
    step = max(steps)
    held, final = states[step], run.directory / checkpoint_name(step)
    unfinished = unfinished_of(final)
    try:
        dist.from_rank_0(lambda: make_unfinished(unfinished, held.manifest.bytes))
        if _copy(tier, unfinished, held, reasons):
            dist.from_rank_0(lambda: commit(unfinished, final, held.manifest))
            dist.say(f"step {step} was put together in {run.directory} from the states of the nodes")
    except SharedError as error:  # an older state may be used instead
        reasons.append(f"step {step} of {tier.directory} cannot be put together: {error}")
    remove_together(dist.from_rank_0(lambda: [unfinished] if unfinished.exists() else []))
    return step


def _states_of(directory: Path) -> dict[int, Manifest]:
    """The complete states of a node by step. What cannot be read is left out, for the search has named it."""
    found = {}
    for path in complete_checkpoints(directory):
        with suppress(InputError, OSError):
            manifest = read_checkpoint(path).manifest
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
            if step not in found or held.is_whole:
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
    """Copies each file from the first node whose file is whole; False if a file is whole nowhere. The ranks of a node share."""
    pending = dict.fromkeys(range(len(held.holders)), 0)  # a file and which of its holders copies it
    while pending:
        if any(turn == len(held.holders[place]) for place, turn in pending.items()):
            return False
        failed = {}
        for place, turn in pending.items():
            here = held.holders[place][turn] == tier.members[0]
            if here and tier.members[place % len(tier.members)] == dist.rank():
                entry = held.manifest.files[place]
                if error := _copy_file(tier.directory / checkpoint_name(held.manifest.step), unfinished, entry):
                    failed[place] = error
        dist.meet()  # a slow disk has no time limit
        answers = dist.gather_objects(failed)
        reasons += [error for failed in answers for error in failed.values()]
        pending = {place: pending[place] + 1 for failed in answers for place in failed}
    return True


def _copy_file(source: Path, target: Path, entry: FileEntry) -> str:
    """Copies a file; returns what is wrong with it, or ""."""
    try:
        shutil.copyfile(source / entry.name, target / entry.name)
        fsync_path(target / entry.name)
        same = sha256_file(target / entry.name) == entry.sha256
    except OSError as error:
        return error_text(error)
    return "" if same else f"{source / entry.name} is damaged (sha256 differs, on the node of rank {dist.rank()})"
