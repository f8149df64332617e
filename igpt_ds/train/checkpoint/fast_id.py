"""RUN_DIR/fast_id: which directory below --fast_dir is a run's own, and which of the states there its later starts continue.

A line has the id, the next one the --fast_dir, and each further one a start and the step that it began at. A start that falls
back, say because a node is away with the newest state, begins another branch. When that node is there again, its state does not
lead to the present one, and does not count. Called by tiers.py.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file
from igpt_ds.train.run_dir import fast_id_file


@dataclass(frozen=True)
class FastId:
    """The content of the file.

    identity: 12 hex digits. where: the --fast_dir; None if the file does not say. starts: name and first step of each.
    """

    identity: str
    where: Path | None = None
    starts: tuple[tuple[str, int], ...] = ()

    def is_at(self, fast_dir: Path) -> bool:
        """Whether this is the --fast_dir of the last start. Each node may have a link of that name to a disk of its own."""
        return self.where is not None and (fast_dir.absolute() == self.where or fast_dir.resolve() == self.where.resolve())

    def counts(self, start: str, step: int) -> bool:
        """Whether a state leads to the newest start: no start since the one that saved it began at an earlier step."""
        if not (start and self.starts):  # of older code, which did not write them down
            return True
        names = [name for name, _ in self.starts]
        return start in names and all(step <= first for _, first in self.starts[names.index(start) + 1 :])


def read_fast_id(run_dir: Path) -> FastId | None:
    """The content of a run's file; None if there is none.

    Raises:
        ValueError: the file is damaged. With another id the states would be lost in silence.
    """
    path = fast_id_file(run_dir)
    if not path.exists():
        return None
    identity, *more = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    starts = [re.fullmatch(r"([0-9a-f]{32}) (\d{1,12})", line) for line in more[1:]]
    if not re.fullmatch("[0-9a-f]{12}", identity) or not all(starts):
        name = f"{run_dir.resolve().name}-..."
        raise InputError(f"{path} is damaged; write the 12 digits at the end of {name} in --fast_dir into it, or remove it")
    return FastId(
        identity, Path(more[0]) if more and more[0] else None, tuple((found[1], int(found[2])) for found in starts if found)
    )


def new_fast_id(run_dir: Path, fast_dir: Path | None) -> FastId:
    """Gives a run another id: no state from before counts any more."""
    return _write(run_dir, FastId(uuid.uuid4().hex[:12], fast_dir and fast_dir.absolute()))


def keep_fast_id(run_dir: Path, known: FastId, fast_dir: Path) -> FastId:
    """Writes down where the run's states are now."""
    return _write(run_dir, replace(known, where=fast_dir.absolute()))


def add_start(run_dir: Path, start: str, step: int) -> None:
    """Writes down that a start begins at a step."""
    if known := read_fast_id(run_dir):
        _write(run_dir, replace(known, starts=(*known.starts, (start, step))))


def _write(run_dir: Path, content: FastId) -> FastId:
    starts = [f"{name} {step}" for name, step in content.starts]
    with atomic_file(fast_id_file(run_dir), "w") as file:
        file.write("\n".join([content.identity, *([str(content.where or "")] if content.where or starts else []), *starts, ""]))
    return content
