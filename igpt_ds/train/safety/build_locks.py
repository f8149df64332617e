"""Locks of torch's extension builder: DeepSpeed compiles its optimizer on the first start of a node that offloads.

torch marks a build by a file and waits for its removal without end, so the file that a killed start left would stop every
later start. Called by train/engine.py and tests/build_extension.py.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from igpt_ds import dist

PATIENCE = 60.0  # seconds that a lock may stand unchanged with no process of this node holding it; a build takes about as long


def wait_for_builds(patience: float = PATIENCE) -> None:
    """Waits on all ranks until no extension is under construction; the first rank of a node removes a stale lock.

    torch keeps the file open while it builds. A lock is stale when for `patience` seconds no process of this node has had it open
    and no file beside it has changed, as it would if another node built in the same directory.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")) if dist.local_rank() == 0 else []:
        _wait(lock, patience)
    dist.meet()


def _wait(lock: Path, patience: float) -> None:
    print(f"waiting for another start that builds DeepSpeed's {lock.parent.name} under {lock}", flush=True)
    alive, before = time.monotonic(), _files(lock.parent)
    while lock.exists():
        if (found := _files(lock.parent)) != before or _is_open(lock):
            alive, before = time.monotonic(), found
        elif time.monotonic() - alive >= patience:
            lock.unlink(missing_ok=True)
            print(f"removed {lock}: no process builds there; a killed start left the lock file", flush=True)
            return
        time.sleep(min(1.0, patience / 10))


def _files(directory: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of each file, as far as they can be read."""
    found = {}
    for path in directory.glob("*"):
        with suppress(OSError):
            about = path.stat()
            found[path.name] = about.st_size, about.st_mtime_ns
    return found


def _is_open(file: Path) -> bool:
    """Whether a process of this node has the file open; processes of other users cannot be seen."""
    with suppress(OSError):
        wanted = file.stat()
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                found = descriptor.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    return False
