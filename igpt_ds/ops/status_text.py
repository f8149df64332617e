"""The status of a run as a few lines of text. Called by tools/status.py and tools/diagnose.py."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from statistics import median, median_low

from igpt_ds.console import count, duration
from igpt_ds.ops.rank_status import RankStatus
from igpt_ds.ops.status import Status, paces
from igpt_ds.plan.text import columns
from igpt_ds.train.health.pace import SLOW, SlowRank, brief, slow_ranks
from igpt_ds.train.ledger.goodput import CATEGORIES, TRAINING, Goodput

MOST_RANKS = 8  # shown one by one


def status_text(status: Status) -> str:
    """A run in a few lines."""
    hosts = status.hosts
    where = f" on {', '.join(hosts[:MOST_RANKS])}{' ...' if len(hosts) > MOST_RANKS else ''}" if hosts else ""
    validation = f"; validation {status.val_loss:.4f} at step {status.val_step:,}" if status.val_loss is not None else ""
    saved = status.checkpoint
    what = ((status.restarts, "restart"), (status.rollbacks, "rollback"), (status.skipped_steps or 0, "skipped step"))
    counts = ", ".join(count(n, thing) for n, thing in what)
    newest = f"step {saved.step:,}, {duration(saved.age)} old" if saved else "none yet"
    newest += "" if status.fast_step is None else f", and step {status.fast_step:,} in --fast_dir"
    return "\n".join(
        (
            f"{status.run_dir}: {status.state}, {status.recipe} on {count(status.world_size, 'rank')}{where}",
            f"  step        {status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.1f} %), "
            f"{status.images_seen:,} images",
            f"  loss        {_number(status.loss, '{:.4f} nats/token')}{validation}",
            f"  speed       {_number(status.images_per_s, '{:.1f} images/s')}, MFU {_number(status.mfu, '{:.1%}')}, "
            f"waiting for data {_number(status.data_wait, '{:.1%}')}",
            f"  end         {_end(status)}",
            f"  checkpoint  {newest}; {counts}",
            *pace_lines(status),
            f"  heartbeats  {heartbeats_line(status.ranks)}",
        )
    )


def _number(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def _end(status: Status) -> str:
    if status.why:
        return status.why
    if status.step >= status.steps:
        return "all steps are done"
    if status.seconds_left is None:
        return "-"
    moment = datetime.fromtimestamp(status.time + status.seconds_left, timezone.utc).astimezone()
    resumed = "" if status.state in ("running", "stopping") else " if it continues now"
    return f"in {duration(status.seconds_left)}, {moment:%Y-%m-%d %H:%M %Z}{resumed}"


def pace_lines(status: Status) -> list[str]:
    """How a step divides at the median rank, and the slow ranks with the reason: at least the slowest, at most MOST_RANKS."""
    found = paces(status.ranks)
    slow: list[SlowRank | None] = [rank for rank in slow_ranks(found)[:MOST_RANKS] if rank.ratio > SLOW]
    lines = [f"{' ' * 14 if place else '  slowest     '}{rank or '-'}" for place, rank in enumerate(slow or [status.slowest])]
    if not found:
        return lines
    data, device = (median_low([getattr(pace, part) for pace in found.values()]) for part in ("data", "device"))
    wait = median(pace.wait for pace in found.values())
    network = min(pace.wait for pace in found.values())
    parts = f"{brief(device)} s computing, {brief(data)} s waiting for data, {brief(wait)} s for other ranks"
    return [f"  a step      {parts} (the network takes {brief(network)} s of them)", *lines]


def heartbeats_line(ranks: Sequence[RankStatus]) -> str:
    """The time since each rank's last progress, and its phase; of many ranks, those with the longest times."""
    if all(rank.beat is None for rank in ranks):
        return "none"
    oldest = sorted(ranks, key=lambda rank: (rank.age is not None, -(rank.age or 0.0)))[:MOST_RANKS]
    shown = sorted(oldest, key=lambda rank: rank.rank)
    more = f" and {len(ranks) - len(shown)} more recent ones" if len(ranks) > len(shown) else ""
    return ", ".join(f"{rank.rank}: {_rank_words(rank)}" for rank in shown) + more


def _rank_words(rank: RankStatus) -> str:
    if rank.beat is None:
        return "none"
    age = duration(rank.age or 0.0)
    return f"{age} ({rank.beat.phase} {rank.beat.step}{', silent' if rank.silent else ''})"


def goodput_text(found: Goodput) -> str:
    """Where the wall clock of a run went: each category, then each start."""
    rows = [("category", "seconds", "%"), *goodput_rows(found)]
    names = [name for name in CATEGORIES if any(abs(one.seconds[name]) >= 0.05 for one in found.starts)]
    starts: list[tuple[str, ...]] = [("start", "began", "steps", "wall", *names, "how it ended")]
    for number, one in enumerate(found.starts, start=1):
        began = datetime.fromtimestamp(one.began, timezone.utc).astimezone()
        steps = f"{one.first_step:,} to {one.last_step:,}"
        seconds = [f"{_plain(one.seconds[name]):,.1f}" for name in names]
        starts.append((str(number), f"{began:%Y-%m-%d %H:%M:%S}", steps, f"{sum(one.seconds.values()):,.1f}", *seconds, one.how))
    return "\n".join([goodput_line(found), *(f"  {line}".rstrip() for line in (*columns(rows), "", *columns(starts)))])


def goodput_line(found: Goodput) -> str:
    """The goodput in one line."""
    whole = f"{duration(found.seconds[TRAINING])} of training kept in {duration(found.wall)} of wall clock"
    ends = f"{count(len(found.starts), 'start')}, {count(found.failures, 'failure')}"
    return f"{found.run_dir}: goodput {100 * found.goodput:.1f} %, {whole}, {ends}"


def goodput_rows(found: Goodput) -> list[tuple[str, str, str]]:
    """Name, seconds and percent of each category, then their sum."""
    seconds, wall = found.seconds, found.wall
    rows = [
        (name, f"{_plain(seconds[name]):,.1f}", f"{_plain(100 * seconds[name] / wall if wall else 0):.2f}") for name in CATEGORIES
    ]
    return [*rows, ("wall clock", f"{wall:,.1f}", "100.00")]


def _plain(value: float) -> float:
    """A number to two decimals, without a minus before a zero."""
    return round(value, 2) + 0.0
