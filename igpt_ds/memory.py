"""The memory that this node can still give to a process. Called by train/checkpoint/host_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the kernel and the limits of this process's cgroups (SLURM, containers) leave; None if unknown.

    Args:
        root: where proc and sys/fs/cgroup are.
    """
    found = list(_cgroups(root))
    with suppress(OSError, ValueError, IndexError):
        found.append(1024 * int(_field(root / "proc/meminfo", "MemAvailable:")))
    return max(0, min(found)) if found else None


def _cgroups(root: Path) -> Iterator[int]:
    """What each limit above this process leaves. Files that are cached give way to a process."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")  # version 1 has a tree for each controller
            limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            place = top / inside.lstrip("/")
            for group in (place, *place.parents):
                if not group.is_relative_to(top):
                    break
                with suppress(OSError, ValueError, IndexError):
                    free = int(_text(group, limit)) - int(_text(group, used))
                    yield free + int(_field(group / "memory.stat", "inactive_file "))


def _text(group: Path, name: str) -> str:
    return (group / f"memory.{name}").read_text(encoding="utf-8")


def _field(path: Path, name: str) -> str:
    return path.read_text(encoding="utf-8").partition(name)[2].split()[0]
