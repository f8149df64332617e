"""The memory that this node can still give to a process, and which directories take some of it. Called by train/checkpoint/."""

from __future__ import annotations

import os
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
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
        found.append(1024 * int(text.partition("MemAvailable:")[2].split()[0]))
    return max(0, min(found)) if found else None


def in_memory(directory: Path, root: Path = Path("/")) -> bool:
    """Whether the files of an existing directory are held in memory, as those of /dev/shm."""
    with suppress(OSError):
        device = directory.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == number:
                return kind.split()[0] in ("tmpfs", "ramfs")
    return False


def _cgroups(root: Path) -> Iterator[int]:
    """What each limit above this process leaves. Files that are cached give way to a process."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")  # version 1 has a tree for each controller
            limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            cached = [f"{'total_' if controllers else ''}{kind}_file" for kind in ("inactive", "active")]
            place = top / inside.lstrip("/")
            for group in (place, *place.parents):
                if not group.is_relative_to(top):
                    break
                with suppress(OSError, ValueError, KeyError):
                    free = int(_text(group, limit)) - int(_text(group, used))
                    counts = dict(line.split() for line in _text(group, "stat").splitlines())
                    yield free + sum(int(counts[name]) for name in cached)


def _text(group: Path, name: str) -> str:
    return (group / f"memory.{name}").read_text(encoding="utf-8")
