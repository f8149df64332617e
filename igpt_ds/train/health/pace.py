"""Which ranks are slow and why. In: the pace of each rank. Out: a `SlowRank` each, the slowest first.

Under ZeRO-3 all ranks take the same time for a step, because they wait for each other in every layer. The slow rank is the one
that waits least. So each rank divides its step into waiting for its images (data), its own work (device) and waiting for messages
of others (wait). The rank that comes last waits for the transfer alone: the shortest wait of all ranks is the network's time.
Where that is long, messages between neighbours show whether one rank's link is slow.

train/health/step_clock.py measures; train/metrics.py and ops/status.py call. Neither torch nor numpy is needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SLOW = 1.15  # a rank that makes a step this many times as long as the median rank would is named in the log
LINK_SLOW = 2.0  # a link this many times as slow as the median one is the reason "network"
NAME_SECONDS = 600.0  # between two lines that name the same rank for the same reason


@dataclass(frozen=True)
class Pace:
    """Seconds of a rank's step: the medians of its last measured steps."""

    data: float  # it waits for its images
    device: float  # it works: all that is neither data nor wait
    wait: float  # it waits for other ranks and for the network
    host: str = ""
    link: float | None = None  # of one message to its faster neighbour; None: not measured

    @property
    def own(self) -> float:
        """What no other rank causes."""
        return self.data + self.device

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, for a heartbeat, which has the host."""
        times = {"data": self.data, "device": self.device, "wait": self.wait}
        return times if self.link is None else times | {"link": self.link}


@dataclass(frozen=True)
class SlowRank:
    """How much a rank slows the run."""

    rank: int
    ratio: float  # a step, over the step if this rank were as fast as the median rank
    reason: str | None = None  # "data", "device" or "network"; None: not measured
    seconds: float | None = None  # of a step, for that reason; of a message to a neighbour if it is "network"
    median: float | None = None  # the same seconds of the median rank
    host: str | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        where = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        if self.reason is None:
            return f"{where}, {self.ratio:.2f} times the median"
        what = {"data": "waits for data {} s a step", "device": "computes for {} s a step", "network": "a message takes {} s"}
        own = f"{what[self.reason].format(brief(self.seconds))}, median {brief(self.median)}"
        return f"{where}, {self.ratio:.2f} times the median ({self.reason}: {own})"


def brief(seconds: float | None) -> str:
    """Seconds to a tenth of a millisecond."""
    return f"{round(seconds or 0.0, 4):g}"


def slow_ranks(paces: Mapping[int, Pace]) -> list[SlowRank]:
    """Every rank, the slowest first. Of two middle ranks the faster one is the median, so that one of two ranks can be slow."""
    if not paces:
        return []
    network = min(pace.wait for pace in paces.values())
    data, device, own = (
        statistics.median_low([getattr(pace, name) for pace in paces.values()]) for name in ("data", "device", "own")
    )

    links = [pace.link for pace in paces.values() if pace.link]
    link = statistics.median_low(links) if links else 0.0

    def judged(rank: int, pace: Pace) -> SlowRank:
        usual = own + network
        ratio = (pace.own + network) / usual if usual else 1.0
        reason, seconds, median = max(
            ("device", pace.device, device), ("data", pace.data, data), key=lambda found: found[1] - found[2]
        )
        if pace.link and pace.link >= LINK_SLOW * link:
            shorter = (own + network) / (own + network * link / pace.link)
            if shorter > ratio:
                return SlowRank(rank, shorter, "network", pace.link, link, pace.host or None)
        return SlowRank(rank, ratio, reason, seconds, median, pace.host or None)

    return sorted((judged(rank, pace) for rank, pace in paces.items()), key=lambda slow: (-slow.ratio, slow.rank))


def network_share(paces: Mapping[int, Pace]) -> float:
    """The share of a step that the network takes, 0 to 1: the shortest wait over the longest step."""
    return min(pace.wait for pace in paces.values()) / (max(pace.own + pace.wait for pace in paces.values()) or 1.0)


class Naming:
    """Decides when the log names a slow rank: at once, and again after `NAME_SECONDS`."""

    def __init__(self) -> None:
        self._named: dict[tuple[int, str | None], float] = {}

    def text(self, slow: SlowRank | None, now: float) -> str:
        """What to append to the row of the console; "" if there is nothing new.

        Args:
            now: seconds of any clock.
        """
        if slow is None or slow.ratio <= SLOW:
            return ""
        key = (slow.rank, slow.reason)
        if now - self._named.get(key, -math.inf) < NAME_SECONDS:
            return ""
        self._named[key] = now
        return f"  {slow}"


def pace_from(values: Any, host: str) -> Pace | None:
    """A pace from its JSON; None if it is none."""
    try:
        data, device, wait = (float(values[name]) for name in ("data", "device", "wait"))
        pace = Pace(data, device, wait, host, None if values.get("link") is None else float(values["link"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return pace if all(math.isfinite(value) and value >= 0 for value in pace.to_dict().values()) else None
