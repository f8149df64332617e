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

    torch keeps the file open while it builds. A lock is stale when no process of this node has had it open for `patience`
    seconds; the time allows for a build on another node where the directory is shared.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")) if dist.local_rank() == 0 else []:
        _wait(lock, patience)
    dist.barrier()


def _wait(lock: Path, patience: float) -> None:
    print(f"waiting for another start that builds DeepSpeed's {lock.parent.name} under {lock}", flush=True)
    alive = time.monotonic()
    while lock.exists():
        if _is_open(lock):
            alive = time.monotonic()
        elif time.monotonic() - alive >= patience:
            lock.unlink(missing_ok=True)
            print(f"removed {lock}: no process builds there; a killed start left the lock file", flush=True)
            return
        time.sleep(min(1.0, patience / 10))


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
