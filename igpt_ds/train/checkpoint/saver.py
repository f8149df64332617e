"""Saves the checkpoints of a run one after another, while training goes on. Every rank calls every method at the same step.

At a save each rank copies its state into host memory (snapshot.py). A thread of low priority writes, hashes and syncs the files;
it sends no message to other ranks. Once a step has found that no rank writes any more (`Stop.idle`), the main thread of each rank
calls `finish`, and rank 0 completes the checkpoint. Until then it does not count. The next save, a rollback and the end of the
run wait for it. Called by train/session.py and train/loop.py.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from igpt_ds import dist
from igpt_ds.train.checkpoint.host_memory import saves_in_background
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts
from igpt_ds.train.checkpoint.save import Begun, Kept, Saved, begin_save, check_space
from igpt_ds.train.checkpoint.snapshot import Buffers, lower_priority
from igpt_ds.train.engine_protocol import Engine


class Saver:
    """Saves into one directory of checkpoints.

    Args:
        directory: RUN_DIR/checkpoints.
        run: in every manifest.
        asynchronous: whether a thread writes the files; otherwise every save waits for them.
    """

    def __init__(self, engine: Engine, directory: Path, run: RunFacts, asynchronous: bool) -> None:
        self._engine, self._directory, self._run = engine, directory, run
        self._buffers = Buffers() if asynchronous else None
        self._begun: Begun | None = None
        self._thread: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is not complete yet; the same on all ranks."""
        return self._begun is not None

    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, progress: Progress, kept: Kept, wait: bool) -> None:
        """Saves the state of this step, after the save before it has finished.

        Args:
            wait: return when the checkpoint is complete.

        Raises:
            SharedError: this save or the one before failed; the step is named.
        """
        self.finish()
        buffers = None if wait else self._buffers
        self._begun = begin_save(self._engine, self._directory, self._run, progress, kept, buffers)
        if buffers is None:
            self.finish()
            return
        self._thread = threading.Thread(target=_write, args=(self._begun,), name="saver", daemon=True)
        self._thread.start()

    def finish(self) -> Saved | None:
        """Waits until the files of the last save are written, and completes its checkpoint; None if none is under way.

        Raises:
            SharedError: a rank could not write; the step is named.
        """
        begun, thread = self._begun, self._thread
        self._begun = self._thread = None
        if begun is None:
            return None
        if thread is not None:
            thread.join()
            dist.meet()  # a slow disk has no time limit
        return begun.commit()


def open_saver(engine: Engine, args: argparse.Namespace, run: RunFacts, keep_last: int) -> Saver:
    """The saver of a run, once disk and memory suffice.

    Args:
        args: run_dir and save.
        run: in every manifest.
        keep_last: checkpoints that stay.

    Raises:
        SharedError: too little disk space, or too little memory for --save async; on every rank.
    """
    directory = args.run_dir / "checkpoints"
    check_space(engine, directory, keep_last)
    return Saver(engine, directory, run, saves_in_background(engine, args.save))


def _write(begun: Begun) -> None:
    """Writes the files of this rank. Whatever fails is told when the ranks meet, because they would wait for this one."""
    lower_priority()
    try:
        begun.writer.write_held()
    except Exception as error:
        begun.writer.error = f"{type(error).__name__}: {error}"
