"""Measuring ours beside a peer: in turns, in one run, on one core, with medians; a table, a JSON file, and bars that fail.

In: contenders as functions. Out: rows. The programs tools/bench/*.py call; nothing of the product does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from igpt_ds.files import read_json, write_json
from igpt_ds.provenance import git_commit

FORMAT = "igpt_ds.bench"
_TURN_SECONDS = 0.1  # a turn repeats a contender for this long, so that what the one before left in the caches counts little


@dataclass(frozen=True)
class Row:
    """One comparison. Where more is better `bar` is the least ratio ours / peer; with `at_most` it is the most."""

    what: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    bar: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours divided by the peer's."""
        return self.ours / self.peer

    @property
    def holds(self) -> bool:
        """Whether the bar is met; a row without a bar only informs."""
        return self.bar is None or (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar)


@contextmanager
def one_core() -> Iterator[None]:
    """Runs a block on one core with one thread of each numeric library, and gives the cores back afterwards."""
    import torch
    from threadpoolctl import threadpool_limits

    cores, threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(), torch.get_num_threads()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def medians(
    contenders: Mapping[str, Callable[[], Any]], turns: int, turn_seconds: float = _TURN_SECONDS, warm_up: bool = True
) -> dict[str, float]:
    """Seconds a call of each contender: they take turns, so that whatever else the machine does meets all of them.

    A first turn warms up and does not count; without `warm_up` it counts, where a call takes minutes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(turns + warm_up), leave=False, disable=None):
        for name, run in contenders.items():
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < turn_seconds:
                run()
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def add_flags(parser: argparse.ArgumentParser, quick: str, measures: Iterable[str] = (), toy: bool = True) -> None:
    """What the benchmarks' command lines share: --only (None: all that --quick leaves), --quick, --toy, --out, --show."""
    if names := list(measures):
        parser.add_argument("--only", choices=names, nargs="+", help="these measurements alone; all when left out")
    parser.add_argument("--quick", action="store_true", help=quick)
    if toy:
        parser.add_argument("--toy", action="store_true", help="tiny sizes and no bars")
    parser.add_argument("--out", type=Path, help="also write the rows and the machine's facts as this JSON")
    parser.add_argument("--show", type=Path, help="print the table of such a JSON, measure nothing")


def own_memory(key: str = "VmRSS") -> float:
    """Bytes that the kernel counts for this process now, or with VmHWM the most there ever was."""
    return 1024.0 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


def peak_beyond(run: Callable[[], Any]) -> float:
    """The most bytes that a call takes beyond what this process held before it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS; else what came before might count
    before = own_memory()
    run()
    return own_memory("VmHWM") - before


def finish(rows: Sequence[Row], out: Path | None, quick: bool, packages: Sequence[str], cores_used: int = 1) -> None:
    """Prints the table, writes rows and the machine's facts as JSON, exits with 1 when a bar is missed."""
    facts = _facts(quick, packages) | {"cores_used": cores_used}
    about = {"format": FORMAT, "facts": facts, "rows": [asdict(row) for row in rows]}
    print(table(about))
    if out is not None:
        write_json(out, about)
    if missed := [row for row in rows if not row.holds]:
        print(f"missed: {', '.join(f'{row.what} ({row.peer_name})' for row in missed)}", file=sys.stderr)
        sys.exit(1)


def read_bench(path: Path) -> dict[str, Any]:
    """What `finish` wrote.

    Raises:
        ValueError: no such file, or not one of these.
    """
    about = read_json(path, "benchmark")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"benchmark {path} is not {FORMAT}; make it with a tools/bench/*.py --out")
    return about


def table(about: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, and one line on where they were measured."""
    lines = ["| what | ours | peer | ratio | bar | peer is |", "|---|---|---|---|---|---|"]
    for row in (Row(**row) for row in about["rows"]):
        unit = f" {row.unit}" if row.unit else ""
        bar = (
            "-" if row.bar is None else f"{'at most' if row.at_most else 'at least'} {row.bar:g}{'' if row.holds else ', missed'}"
        )
        what = f"{row.what} ({row.note})" if row.note else row.what
        lines.append(
            f"| {what} | {_number(row.ours)}{unit} | {_number(row.peer)}{unit} | {row.ratio:.3g} | {bar} | {row.peer_name} |"
        )
    facts = about["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    used = facts.get("cores_used", 1)
    cores = "One core" if used == 1 else f"{used} cores"
    return "\n".join([*lines, "", f"{cores} of {facts['cpu']}; Python {facts['python']}, {versions}."])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _facts(quick: bool, packages: Sequence[str]) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "git_commit": git_commit(),
        "quick": quick,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }
