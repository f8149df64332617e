"""Where a run saves: its run directory, and with --fast_dir a faster disk that takes saves more often.

The fast directory may be one for all ranks, or a disk of each node under the same path. There the first rank of each node
completes the checkpoint with a manifest of its node's files. A run has a directory of its own in it, RUN-ID. The id is in
RUN_DIR/fast_id (fast_id.py): a new run of the same name meets no states of an old one, and a run that rolled back none from
before, for it gets a new id. Called by the other modules here.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.errors import InputError, error_text
from igpt_ds.train.checkpoint.directory import list_checkpoints, newest_step, remove_leftovers, set_aside_newer, step_of
from igpt_ds.train.checkpoint.disk import ROOM
from igpt_ds.train.checkpoint.fast_id import FastId, add_start, keep_fast_id, new_fast_id, read_fast_id
from igpt_ds.train.checkpoint.manifest import Manifest

T = TypeVar("T")


@dataclass(frozen=True)
class Tier:
    """A directory of checkpoints.

    run_dir: whose owner may save. ranks: those that see the same directory; None: all. fast: it is no more than a faster copy, so
    that what fails there does not end the run. works: states can be written there on every rank. copies: each node also keeps the
    files of the node before it (neighbours.py). start: names this start of the ranks in its manifests. known: the run had it.
    past: what the run knows of its starts so far.
    """

    directory: Path
    run_dir: Path
    ranks: tuple[int, ...] | None = None
    fast: bool = False
    copies: bool = False
    start: str = field(default="", compare=False)
    works: bool = True
    known: bool = field(default=False, compare=False)
    past: FastId | None = field(default=None, compare=False)

    @property
    def room(self) -> str:
        """What to do if its disk is too small."""
        return "free some space there, or put --fast_dir on another disk" if self.fast else ROOM

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that see the same directory as this one, in order. The first of them completes checkpoints."""
        return tuple(range(dist.world_size())) if self.ranks is None else self.ranks

    @property
    def leads(self) -> bool:
        """Whether this rank completes checkpoints."""
        return self.members[0] == dist.rank()

    def once(self, function: Callable[[], T]) -> T | None:
        """Calls the function on one rank of each directory; the result is on all ranks if they share it, and else on those.

        Raises:
            SharedError: it raised an InputError or OSError somewhere; on every rank.
        """
        if self.ranks is None:
            return dist.from_rank_0(function)
        result, error = None, ""
        try:
            result = function() if self.leads else None
        except (InputError, OSError) as caught:
            error = f"on rank {dist.rank()} {error_text(caught)}"
        dist.meet()
        if errors := [error for error in dist.gather_objects(error) if error]:
            raise SharedError(errors[0])
        return result

    def forget_newer(self, step: int) -> None:
        """Later steps do not count any more: they are removed here if a copy, and else set aside.

        Where a fast directory cannot be changed, no later start will look into it (`counts`).
        """
        try:
            self.once(lambda: _remove_newer(self.directory, step) if self.fast else set_aside_newer(self.directory, step))
        except SharedError:
            if not self.fast:
                raise
            forget_fast(self.run_dir)

    def has_branch(self, manifest: Manifest) -> bool:
        """Whether a state here leads to the run's newest start (fast_id.py)."""
        return self.past is None or self.past.counts(manifest.start, manifest.step)

    def begin(self, step: int) -> None:
        """This start of the ranks begins at a step, and may save here."""
        if self.fast and self.start:
            dist.from_rank_0(lambda: add_start(self.run_dir, self.start, step))

    def counts(self) -> bool:
        """Whether a later start looks into it; the same on all ranks."""

        def counts() -> bool:
            known = read_fast_id(self.run_dir)
            return known is not None and self.directory.name.endswith(f"-{known.identity}")

        return not self.fast or dist.from_rank_0(counts)

    def start_over(self) -> Tier:
        """Another directory for the run, which has rolled back. No state from before counts, nor those of a node that is away."""
        self.clear()
        fast_dir = self.directory.parent
        known = dist.from_rank_0(lambda: new_fast_id(self.run_dir, fast_dir))
        self.begin(0)
        return replace(self, directory=_states(fast_dir, self.run_dir, known))

    def clear(self) -> None:
        """Removes the whole directory: the run's own has the state that it continues from."""
        with suppress(SharedError):
            self.once(lambda: shutil.rmtree(self.directory, ignore_errors=True))

    def remove_leftovers(self) -> None:
        """Removes what interrupted saves left. A fast directory that cannot be changed keeps it."""
        with suppress(SharedError) if self.fast else nullcontext():
            self.once(lambda: remove_leftovers(self.directory))


def forget_fast(run_dir: Path) -> None:
    """No later start looks into the fast directory that the run has had, for its states cannot be removed now."""
    dist.from_rank_0(lambda: read_fast_id(run_dir) and new_fast_id(run_dir, None))


def _remove_newer(directory: Path, step: int) -> None:
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def run_tier(run_dir: Path) -> Tier:
    """RUN_DIR/checkpoints."""
    return Tier(run_dir / "checkpoints", run_dir)


def fast_tier(fast_dir: Path, run_dir: Path, resumes: bool, copies: bool = False) -> Tier:
    """The directory of a run below --fast_dir, which is made. All ranks find out which of them share it.

    A run that already has states there goes on if some rank cannot use it: the others may have them all.

    Args:
        resumes: whether the run continues where it was (--resume auto).
        copies: each node keeps the files of another one too, unless all share the directory.

    Raises:
        SharedError: a new run cannot use it, or it holds states of a run that is not continued.
    """
    past, known = dist.from_rank_0(lambda: _id(fast_dir, run_dir, resumes))
    start = dist.from_rank_0(lambda: uuid.uuid4().hex)
    directory, error = _states(fast_dir, run_dir, past), ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".{start}.{dist.rank()}").touch()
    except OSError as caught:
        error = f"--fast_dir {fast_dir} cannot be used on rank {dist.rank()}: {caught.strerror}"
    if errors := [error for error in dist.gather_objects(error) if error]:
        if not known:
            raise SharedError(f"{errors[0]}; choose another directory")
        dist.say(without(errors[0]))
    seen = tuple(sorted({dist.rank(), *(int(path.name.rpartition(".")[2]) for path in _found(directory, f".{start}.*"))}))
    dist.barrier()
    for left in _found(directory, f".*.{dist.rank()}"):
        with suppress(OSError):
            left.unlink()
    apart = any(len(ranks) < dist.world_size() for ranks in dist.gather_objects(seen))
    if copies and not apart:
        dist.say(f"--fast_copies: all ranks share {fast_dir}, so that no copies are needed")
    shared = Tier(directory, run_dir, fast=True, start=start, works=not errors, known=known, past=past)
    return replace(shared, ranks=seen, copies=copies) if apart else shared


def without(error: object) -> str:
    """What a run says whose fast directory fails."""
    return f"the run goes on without --fast_dir: {error}"


def _found(directory: Path, pattern: str) -> list[Path]:
    """The files of a pattern; none on a disk that fails."""
    with suppress(OSError):
        return list(directory.glob(pattern))
    return []


def leave_fast(run_dir: Path, fast_dir: Path | None) -> None:
    """A run that continues without the fast directory of its last start, or with another one: no later start looks into it.

    Raises:
        SharedError: a newer state than the run directory's is there.
    """

    def known() -> FastId | None:
        found = read_fast_id(run_dir)
        return None if found is None or found.where is None or (fast_dir and found.is_at(fast_dir)) else found

    before = dist.from_rank_0(known)
    if before is None or before.where is None:
        return
    states, mine = _states(before.where, run_dir, before), 0
    with suppress(InputError, OSError):
        mine = newest_step(states)
    newest = max(dist.gather_objects(mine))  # each node may have a disk of its own

    def leave() -> None:
        if newest > newest_step(run_dir / "checkpoints"):
            raise InputError(
                f"{states} holds step {newest} of this run, which is newer than its checkpoints; "
                f"continue with --resume auto --fast_dir {before.where}, or remove {states} to go on without it"
            )
        new_fast_id(run_dir, fast_dir)

    dist.from_rank_0(leave)


def _id(fast_dir: Path, run_dir: Path, resumes: bool) -> tuple[FastId, bool]:
    """The id of the run's directory, and whether the run that continues has it already."""
    if known := read_fast_id(run_dir):
        if resumes:
            return keep_fast_id(run_dir, known, fast_dir), (run_dir / "run.json").exists()
        states = _states(fast_dir, run_dir, known)
        if list_checkpoints(states):
            raise InputError(f"{states} holds states of this run; continue with --resume auto, or remove {states}")
    return new_fast_id(run_dir, fast_dir), False


def _states(fast_dir: Path, run_dir: Path, known: FastId) -> Path:
    """The run's directory below --fast_dir, also if the run directory had another name before."""
    path = fast_dir / f"{run_dir.resolve().name}-{known.identity}"
    there = _found(fast_dir, f"*-{known.identity}")
    return path if path in there or not there else there[0]
