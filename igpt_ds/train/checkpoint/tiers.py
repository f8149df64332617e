"""Where a run saves: its run directory, and with --fast_dir a faster disk that takes saves more often.

The fast directory may be one for all ranks, or a disk of each node under the same path. There the first rank of each node
completes the checkpoint with a manifest of its node's files. A run has a directory of its own in it, RUN-ID. The id is in
RUN_DIR/fast_id: a new run of the same name meets no states of an old one, and a run that rolled back none from before, for it
gets a new id. Called by the other modules here.
"""

from __future__ import annotations

import re
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
from igpt_ds.files import atomic_file
from igpt_ds.train.checkpoint.directory import list_checkpoints, newest_step, remove_leftovers, set_aside_newer, step_of
from igpt_ds.train.checkpoint.disk import ROOM
from igpt_ds.train.run_dir import fast_id_file

T = TypeVar("T")


@dataclass(frozen=True)
class Tier:
    """A directory of checkpoints.

    run_dir: whose owner may save. ranks: those that see the same directory; None: all. fast: it is no more than a faster copy, so
    that what fails there does not end the run. works: states can be written there on every rank. copies: each node also keeps the
    files of the node before it (neighbours.py). start: of the ranks, for parts on several nodes. known: the run had it before.
    """

    directory: Path
    run_dir: Path
    ranks: tuple[int, ...] | None = None
    fast: bool = False
    copies: bool = False
    start: str = ""
    works: bool = True
    known: bool = field(default=False, compare=False)

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

    def counts(self) -> bool:
        """Whether a later start looks into it; the same on all ranks."""
        return not self.fast or dist.from_rank_0(lambda: self.directory.name == _name(self.run_dir, _known_id(self.run_dir)))

    def start_over(self) -> Tier:
        """Another directory for the run, which has rolled back. No state from before counts, nor those of a node that is away."""
        self.clear()
        identity = dist.from_rank_0(lambda: _new_id(self.run_dir, self.directory.parent))
        return replace(self, directory=self.directory.with_name(_name(self.run_dir, identity)))

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
    dist.from_rank_0(lambda: _known_id(run_dir) and _new_id(run_dir, None))


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
    identity, known = dist.from_rank_0(lambda: _id(fast_dir, run_dir, resumes))
    start = dist.from_rank_0(lambda: uuid.uuid4().hex)
    directory, error = fast_dir / _name(run_dir, identity), ""
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
    if not apart:
        return Tier(directory, run_dir, fast=True, works=not errors, known=known)
    return Tier(directory, run_dir, seen, fast=True, copies=copies, start=start, works=not errors, known=known)


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

    def leave() -> None:
        known, before = _read_id(run_dir)
        if not known or before is None or (fast_dir is not None and fast_dir.resolve() == before):
            return
        states, newest = before / _name(run_dir, known), 0
        with suppress(InputError, OSError):
            newest = newest_step(states)
        if newest > newest_step(run_dir / "checkpoints"):
            raise InputError(
                f"{states} holds step {newest} of this run, which is newer than its checkpoints; "
                f"continue with --fast_dir {before}, or remove {states} to go on without it"
            )
        _new_id(run_dir, fast_dir)

    dist.from_rank_0(leave)


def _id(fast_dir: Path, run_dir: Path, resumes: bool) -> tuple[str, bool]:
    """The id of the run's directory, and whether the run that continues has it already."""
    if known := _known_id(run_dir):
        states = fast_dir / _name(run_dir, known)
        if resumes:
            return _write_id(run_dir, known, fast_dir), True
        if list_checkpoints(states):
            raise InputError(f"{states} holds states of this run; continue with --resume auto, or remove {states}")
    return _new_id(run_dir, fast_dir), False


def _name(run_dir: Path, identity: str) -> str:
    return f"{run_dir.name}-{identity}"


def _known_id(run_dir: Path) -> str:
    return _read_id(run_dir)[0]


def _read_id(run_dir: Path) -> tuple[str, Path | None]:
    """The id in RUN_DIR/fast_id, "" if there is none; and the --fast_dir, None if the file does not say.

    Raises:
        ValueError: the file is damaged. With another id the states would be lost in silence.
    """
    path = fast_id_file(run_dir)
    if not path.exists():
        return "", None
    known, _, where = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").partition("\n")
    if not re.fullmatch("[0-9a-f]{12}", known):
        raise InputError(
            f"{path} is damaged; write the 12 digits at the end of {run_dir.name}-... in --fast_dir into it, or remove it"
        )
    return known, Path(where) if where else None


def _new_id(run_dir: Path, fast_dir: Path | None) -> str:
    return _write_id(run_dir, uuid.uuid4().hex[:12], fast_dir)


def _write_id(run_dir: Path, identity: str, fast_dir: Path | None) -> str:
    with atomic_file(fast_id_file(run_dir), "w") as file:
        file.write(f"{identity}\n" + (f"{fast_dir.resolve()}\n" if fast_dir else ""))
    return identity
