"""A notice board for ranks that may be dead: each rank posts values by itself, and every wait has a limit.

A rank posts JSON values under a name; rank 0 collects them and learns which ranks posted nothing. It uses torch's TCPStore, which
works before a process group exists and while some ranks are missing. Called by tools/preflight.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as td

from igpt_ds import dist

_LOOK_EVERY = 0.1  # seconds


class Board:
    """The notice board. Rank 0 or torchrun's agent hosts it.

    Raises:
        ConnectionError: no host answers within `seconds`, so rank 0 is missing.
    """

    def __init__(self, seconds: float) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # multi_tenant: the process group that starts later uses a store at the same port.
        hosts = {"is_master": dist.rank() == 0 and not agent, "wait_for_workers": False, "multi_tenant": True}
        try:
            store = td.TCPStore(host, port, timeout=timedelta(seconds=seconds), **hosts)
        except (RuntimeError, OSError) as error:  # DistError is a RuntimeError
            raise ConnectionError(f"rank 0 did not answer at {host}:{port} within {seconds:g} s ({_first_line(error)})") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = td.PrefixStore(f"preflight/{attempt}", store)

    def say(self, what: str, value: Any, rank: int | None = None) -> None:
        """Posts a JSON value under a name and a rank, by default this one."""
        self._store.set(f"{what}/{dist.rank() if rank is None else rank}", json.dumps(value))

    def heard(self, what: str, rank: int) -> Any:
        """The value that a rank posted; None if it has not yet."""
        key = f"{what}/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def collect(self, what: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The values that ranks post within some seconds, without the ranks that post nothing."""
        end, waiting, said = time.monotonic() + seconds, set(ranks), dict[int, Any]()
        while True:
            for rank in sorted(waiting):
                if (value := self.heard(what, rank)) is not None:
                    said[rank] = value
            waiting -= set(said)
            if not waiting or time.monotonic() > end:
                return dict(sorted(said.items()))
            time.sleep(_LOOK_EVERY)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
