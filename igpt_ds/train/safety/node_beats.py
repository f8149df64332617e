"""The heartbeats of a node's ranks in one file of the run directory. In: this rank's heartbeats. Out: train/heartbeat.py's files.

Each rank writes its heartbeat to a directory in the node's own TMPDIR. The first rank of the node that is not silent there writes
all of them to the run directory, so a rank that hangs or dies leaves this to the next one. A rank that ends writes the file too.
Ranks that do not share a TMPDIR, or have none, have a file each. Called by the watchdog.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from igpt_ds import dist
from igpt_ds.json_files import read_json, write_json
from igpt_ds.locks import open_lock, try_lock
from igpt_ds.train.heartbeat import Heartbeat, heartbeat_from, remove_heartbeats, write_heartbeats

_PREFIX = "igpt_ds.heartbeats."
_OLD_SECONDS = 86400.0  # a directory that nobody wrote to for so long is of a run that was killed
_LOCK_SECONDS = 5.0  # to wait for another rank of the node, which may be stopped while it writes


class NodeBeats:
    """One rank's way to write its heartbeats. `meet` makes it.

    Args:
        shared: the directory of the node's ranks; None: this rank writes a file of its own.
        every: seconds between two writes of the node's file.
    """

    def __init__(self, run_dir: Path, shared: Path | None, every: float) -> None:
        self._run_dir, self._shared, self._every = run_dir, shared, every
        self._next = 0.0

    @classmethod
    def meet(cls, run_dir: Path, every: float) -> NodeBeats:
        """Removes the heartbeats of an earlier start, and agrees on a directory. Every rank calls this."""

        def begin() -> str:
            remove_heartbeats(run_dir)
            return uuid.uuid4().hex

        shared = Path(tempfile.gettempdir()) / f"{_PREFIX}{dist.from_rank_0(begin)}"
        try:
            _remove_old(shared.parent)
            shared.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return cls(run_dir, None, every)
        return cls(run_dir, shared, every)

    def write(self, beat: Heartbeat, first: bool = False) -> None:
        """Writes a heartbeat of this rank, and the file of the node if it is this rank's turn.

        Args:
            first: this is the first heartbeat; every rank waits until all have written theirs.

        Raises:
            OSError: a disk is full or does not answer.
        """
        if first:
            self._note(beat)
            dist.meet()
        lock = self._locked()
        try:
            self._note(beat)
            beats = self._on_this_node(beat)
            if beat.ended or (self._writer(beats, beat.rank) == beat.rank and time.monotonic() >= self._next):
                self._next = time.monotonic() + 0.9 * self._every  # the watchdog comes twice in that time
                write_heartbeats(self._run_dir, beats)
            if self._shared is not None and all(one.ended for one in beats):
                shutil.rmtree(self._shared, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)

    def _note(self, beat: Heartbeat) -> None:
        if self._shared is not None:
            with suppress(OSError):  # without room in TMPDIR a file of its own
                write_json(self._shared / f"{beat.rank}.json", beat.to_dict())

    def _on_this_node(self, own: Heartbeat) -> list[Heartbeat]:
        found = {own.rank: own}
        for path in self._shared.glob("*.json") if self._shared is not None else ():
            with suppress(ValueError):  # removed at this moment
                beat = heartbeat_from(read_json(path, "heartbeat"))
                if beat is not None and beat.rank != own.rank:
                    found[beat.rank] = beat
        return [found[rank] for rank in sorted(found)]

    def _writer(self, beats: list[Heartbeat], own: int) -> int | None:
        now = time.time()
        living = (beat.rank == own or beat.file_age(now) < 3 * self._every for beat in beats)
        return next((beat.rank for beat, lives in zip(beats, living, strict=True) if lives and not beat.ended), None)

    def _locked(self) -> int | None:
        """The lock of the node's file: without it the file may miss one of two ranks that end at the same moment."""
        if self._shared is None:
            return None
        end = time.monotonic() + _LOCK_SECONDS
        try:
            lock = open_lock(self._shared / "lock")
        except (OSError, ValueError):
            return None
        while try_lock(lock) is False and time.monotonic() < end:
            time.sleep(0.01)
        return lock


def _remove_old(directory: Path) -> None:
    """Removes the directories of this user's runs that were killed."""
    for path in directory.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            state = path.lstat()
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > _OLD_SECONDS:
                shutil.rmtree(path)
