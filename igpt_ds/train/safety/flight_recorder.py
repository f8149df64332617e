"""torch's flight recorder: the last collectives of a rank, for `torchfrtrace`. Called by the watchdog.

Each rank keeps its last collectives in memory. They are written to RUN_DIR/flight_recorder/rank_N when the watchdog ends a rank
that hangs, or by torch itself when a collective exceeds its time limit. torch opens the file but makes no directory.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path

from igpt_ds.errors import error_text
from igpt_ds.plain_files import open_plain

FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # the second is the older name
_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_ENTRIES = "2000"  # collectives that a rank remembers
_DUMP_SECONDS = 60.0

_ours: dict[str, str] = {}  # variables that this process has set


def prepare(environment: MutableMapping[str, str], run_dir: Path, time_limit: timedelta) -> None:
    """Sets the variables that torch reads when the ranks join, so call this before. Those that the user has set stay.

    Args:
        time_limit: of a collective. torch's own monitor, which ends a process without our report, waits as long.
    """
    wanted = {
        FILE: f"{run_dir.absolute() / 'flight_recorder' / 'rank_'}",
        _SIZE: _ENTRIES,
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",): f"{time_limit.total_seconds():.0f}",
    }
    for names, value in wanted.items():
        if all(environment.get(name, "") in ("", _ours.get(name)) for name in names):
            environment[names[0]] = _ours[names[0]] = value


def make_directory(environment: MutableMapping[str, str]) -> None:
    """Makes the directory of the files, if `prepare` was called. A disk that refuses does not end the run."""
    try:
        if prefix := _prefix(environment):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"no flight recorder: {error_text(error)}", file=sys.stderr, flush=True)


def dump(environment: MutableMapping[str, str], rank: int) -> None:
    """Writes this rank's last collectives, before the process ends. It ends in any case: a hung GPU may hold up the dump."""
    torch, prefix = sys.modules.get("torch"), _prefix(environment)
    if torch is None or not prefix:
        return
    faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True, file=2)
    collectives = torch._C._distributed_c10d
    take = getattr(collectives, "_dump_nccl_trace", None) if torch.cuda.is_available() else None
    take = take or getattr(collectives, "_dump_fr_trace", None)
    if take is not None:
        try:
            with open(f"{prefix}{rank}", "wb", opener=open_plain) as file:
                file.write(take())
        except (OSError, RuntimeError) as error:
            print(f"flight recorder of rank {rank} not written: {error}", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()


def _prefix(environment: MutableMapping[str, str]) -> str:
    return next((environment[name] for name in FILE if environment.get(name)), "")
