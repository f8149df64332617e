"""Saves the checkpoints of a run one after another, while training goes on. Every rank calls every method at the same step.

After a save a thread copies the rank's state into host memory, beside the next forward and backward pass (snapshot.py). The
update waits for it (`wait_for_copy`). At low priority the thread then writes, hashes and syncs the files, without a message to
the ranks of the training. Once a step has found that no rank writes any more (`Stop.idle`), the main thread of each rank
calls `finish`, and rank 0 completes the checkpoint. Until then it does not count. The next save, a rollback and the end of the
run wait for it. Called by train/session.py and train/loop.py.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.errors import InputError
from igpt_ds.plan.costs import FAST_KEPT
from igpt_ds.train.checkpoint.disk import CheckpointWriter
from igpt_ds.train.checkpoint.host_memory import saves_in_background
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts
from igpt_ds.train.checkpoint.neighbours import Neighbours, find_neighbours
from igpt_ds.train.checkpoint.save import Begun, Kept, begin_save, check_space, states_in_memory
from igpt_ds.train.checkpoint.snapshot import Buffers, lower_priority
from igpt_ds.train.checkpoint.tiers import Tier, fast_tier, forget_fast, leave_fast, run_tier, without
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.run_dir import check_owner


class Saver:
    """Saves into the run directory, and more often into the fast one if there is one.

    Args:
        run: in every manifest.
        tiers: the run directory first.
        asynchronous: whether a thread writes the files; otherwise every save waits for them.
    """

    def __init__(self, engine: Engine, run: RunFacts, tiers: Sequence[Tier], asynchronous: bool) -> None:
        self._engine, self._run = engine, run
        self._slow, self._fast = tiers[0], next(iter(tiers[1:]), None)
        self._buffers = Buffers() if asynchronous else None
        self._fast_works = self._fast is not None and self._fast.works
        self._neighbours = find_neighbours(self._fast) if self._fast and self._fast_works else None
        self._begun: Begun | None = None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is not complete yet; the same on all ranks."""
        return self._begun is not None

    @property
    def has_fast(self) -> bool:
        """Whether there is a fast directory that works; the same on all ranks."""
        return self._fast_works

    @property
    def copied(self) -> int:
        """Bytes of host memory that this rank keeps for its copies."""
        return 0 if self._buffers is None else self._buffers.bytes

    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, progress: Progress, kept: Kept, wait: bool) -> None:
        """Saves the state of this step into the run directory, after the save before it has finished.

        Args:
            wait: return when the checkpoint is complete.

        Raises:
            SharedError: this save or the one before failed; the step is named.
        """
        self.finish()
        self._begin(self._slow, progress, kept, None if wait else self._buffers)

    def save_fast(self, progress: Progress) -> None:
        """Saves the state of this step into the fast directory. If that fails, the run goes on without it."""
        self.finish()
        if self._fast is not None and self._fast_works:
            self._check_owner()
            with self._spared():
                self._begin(self._fast, progress, Kept(FAST_KEPT), self._buffers)

    def _begin(self, tier: Tier, progress: Progress, kept: Kept, buffers: Buffers | None) -> None:
        begun = begin_save(self._engine, tier, self._run, progress, kept, buffers)
        neighbours = self._neighbours if tier.fast else None
        if buffers is None:
            _write(begun, neighbours)
            begun.commit()
            return
        self._begun, self._copied = begun, threading.Event()
        arguments = (begun, neighbours, self._copied, self._engine.device)
        self._thread = threading.Thread(target=_write_beside, args=arguments, name="saver", daemon=True)
        self._thread.start()

    @property
    def copying(self) -> bool:
        """Whether `wait_for_copy` would wait."""
        return not self._copied.is_set()

    def wait_for_copy(self) -> None:
        """Returns when the state of the last save may change. Each step calls it before its update."""
        self._copied.wait()

    def finish(self) -> None:
        """Waits until the files of the last save are written, and completes its checkpoint; nothing if none is under way.

        Raises:
            SharedError: a rank could not write into the run directory; the step is named.
        """
        begun, thread = self._begun, self._thread
        self._begun = self._thread = None
        if begun is None or thread is None:
            return
        thread.join()
        dist.meet()  # a slow disk has no time limit
        if begun.tier.fast:
            self._check_owner()
        with self._spared() if begun.tier.fast else nullcontext():
            begun.commit()

    def _check_owner(self) -> None:
        """A start that has lost its run ends: that is no fault of the fast directory."""
        dist.from_rank_0(lambda: check_owner(self._slow.run_dir))

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """A fast directory that fails is used no more; all ranks learn of it, and the run goes on."""
        try:
            yield
        except SharedError as error:
            self._fast_works = False
            dist.say(without(error))

    def forget_newer(self, step: int) -> None:
        """After a rollback to a step, later states do not count, also where nothing is saved any more."""
        self.finish()
        self._check_owner()
        self._slow.forget_newer(step)
        if self._fast is None:
            forget_fast(self._slow.run_dir)  # of an earlier start
        else:
            self._fast = self._fast.start_over()

    def close(self) -> None:
        """Finishes the last save. Then the run directory has the newest state, and the fast one is removed.

        Raises:
            SharedError: a rank could not write; the step is named.
        """
        self.finish()
        if self._fast is not None:
            self._fast.clear()


def tiers_of(args: argparse.Namespace, resumes: bool) -> list[Tier]:
    """The directories that a run saves to, the run directory first.

    Args:
        args: run_dir, fast_dir and fast_copies.

    Raises:
        SharedError: --fast_dir cannot be used, or the fast directory of the last start has a newer state and is not given.
    """
    if resumes or not args.fast_dir:
        leave_fast(args.run_dir, args.fast_dir)
    fast = [fast_tier(args.fast_dir, args.run_dir, resumes, args.fast_copies)] if args.fast_dir else []
    return [run_tier(args.run_dir), *fast]


def open_saver(engine: Engine, run: RunFacts, tiers: Sequence[Tier], asked: str | None, keep_last: int, step: int) -> Saver:
    """The saver of a run, once disk and memory suffice.

    Args:
        run: in every manifest.
        asked: the value of --save.
        keep_last: checkpoints that stay in the run directory.
        step: where this start begins.

    Raises:
        SharedError: too little disk space, or too little memory for --save async; on every rank.
    """
    slow, *fast = tiers
    check_space(engine, slow, keep_last)
    working = [checked(engine, tier) for tier in fast]
    for tier in working:
        tier.begin(step)
    beside = sum(states_in_memory(engine, tier, FAST_KEPT) for tier in working)
    return Saver(engine, run, [slow, *working], saves_in_background(engine, asked, beside))


def checked(engine: Engine, tier: Tier) -> Tier:
    """A fast directory that the run had before is used no more if its disk is too small or read-only; a new run is refused.

    Raises:
        SharedError: it has too little space.
    """
    if not tier.counts():  # its newer states could not be removed
        return replace(tier, works=False)
    try:
        check_space(engine, tier, FAST_KEPT)
    except SharedError as error:
        if not tier.known:
            raise
        dist.say(without(error))
        return replace(tier, works=False)
    return tier


def _write_beside(begun: Begun, neighbours: Neighbours | None, copied: threading.Event, device: torch.device) -> None:
    try:
        with _noting(begun.writer):
            if device.type != "cpu":  # a thread begins with the first GPU, and would take memory there
                torch.accelerator.set_device_index(device)
            begun.writer.copy_held()
    finally:
        copied.set()
    lower_priority()
    _write(begun, neighbours)


def _write(begun: Begun, neighbours: Neighbours | None) -> None:
    """Writes the files of this rank and its copies."""
    writer = begun.writer
    with _noting(writer):
        writer.write_held()
    with _noting(writer):
        if neighbours is not None:
            writer.copies = neighbours.exchange(begun.unfinished, [] if writer.error else writer.entries)


@contextmanager
def _noting(writer: CheckpointWriter) -> Iterator[None]:
    """What fails is told when the ranks meet: they would wait for this one."""
    try:
        yield
    except Exception as error:
        writer.error = writer.error or (str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
