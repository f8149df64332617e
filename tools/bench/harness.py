"""Measures our code beside a peer: in turns, in one process, on one core, with medians. Rows become a table and a JSON file.

In: contenders as functions. Out: rows, each of which can have a bar. Only the programs tools/bench/*.py call it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_sealed, seal, write_json
from igpt_ds.provenance import git_commit
from igpt_ds.schema import record_from

FORMAT = "igpt_ds.bench"
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
_TURN_SECONDS = 0.1  # a turn repeats a contender for this long, so that caches that the previous one filled count little


@dataclass(frozen=True)
class BenchRow:
    """One comparison. `bar` is the smallest allowed ratio ours / peer, or with `at_most` the largest."""

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
        """Whether the bar is met; True without a bar."""
        return self.bar is None or (self.ratio <= self.bar if self.at_most else self.ratio >= self.bar)


@dataclass(frozen=True)
class MachineFacts:
    """Where and with which code the rows were measured."""

    git_commit: str | None
    cpu: str  # or the name of the GPU
    python: str
    versions: dict[str, str | None]  # of the packages; None if one is not installed
    quick: bool = False
    cores: int | None = None
    load: float | None = None  # when the measurement ended
    cores_used: int = 1

    @property
    def text(self) -> str:
        """The device and the versions in words."""
        known = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"{self.cpu}; Python {self.python}, {known}."


@dataclass(frozen=True)
class Benchmark:
    """The content of a benchmark's JSON file."""

    facts: MachineFacts
    rows: list[BenchRow]

    def table(self, with_cores: bool = True) -> str:
        """The rows as a Markdown table, and one line on where they were measured."""
        lines = ["| what | ours | peer | ratio | bar | peer is |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            unit = f" {row.unit}" if row.unit else ""
            limit = "at most" if row.at_most else "at least"
            bar = "-" if row.bar is None else f"{limit} {row.bar:g}{'' if row.holds else ', missed'}"
            what = f"{row.what} ({row.note})" if row.note else row.what
            numbers = f"{_number(row.ours)}{unit} | {_number(row.peer)}{unit} | {row.ratio:.3g}"
            lines.append(f"| {what} | {numbers} | {bar} | {row.peer_name} |")
        cores = "One core of " if self.facts.cores_used == 1 else f"{self.facts.cores_used} cores of "
        return "\n".join([*lines, "", (cores if with_cores else "") + self.facts.text])

    def write(self, path: Path) -> None:
        """Writes the file that `read_bench` reads."""
        write_json(path, seal({"format": FORMAT, **asdict(self)}))


@contextmanager
def one_core() -> Iterator[None]:
    """Runs a block on one core with one thread of each numeric library, and restores the cores at the end."""
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
    """The median seconds of a call of each contender. They take turns, so that other work of the machine slows all of them.

    The first turn warms up and does not count. Without `warm_up` it counts, for calls that take minutes.
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
    """Adds the flags that all benchmarks have: --only (None: all measurements), --quick, --toy, --out, --show."""
    if names := list(measures):
        parser.add_argument("--only", choices=names, nargs="+", help="measurements to run (default: all)")
    parser.add_argument("--quick", action="store_true", help=quick)
    if toy:
        parser.add_argument("--toy", action="store_true", help="run at tiny sizes without bars, to test the program")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows and the facts of the machine to (default: none)")
    parser.add_argument("--show", type=Path, help="JSON file of --out whose table is printed; nothing is measured")


def own_memory(key: str = "VmRSS") -> float:
    """The memory of this process in bytes: now, or with VmHWM the most since its start."""
    return 1024.0 * int(Path("/proc/self/status").read_text(encoding="utf-8").partition(f"{key}:")[2].split()[0])


def peak_beyond(run: Callable[[], Any]) -> float:
    """The most bytes that a call takes beyond the memory of this process before the call; at least a page, the kernel's unit."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_bytes(b"5")  # resets VmHWM to VmRSS; without it an earlier peak may count
    before = own_memory()
    run()
    return max(float(os.sysconf("SC_PAGE_SIZE")), own_memory("VmHWM") - before)


def on_ranks(program: Sequence[str], ranks: int, port: int, work: Path, task: Mapping[str, object]) -> None:
    """Runs a program on each rank, on CPUs of this machine, and waits for them.

    Args:
        program: its words; `--task FILE` follows.
        port: a free one.
        work: a directory for the file and for what the ranks print.

    Raises:
        ValueError: a rank failed; with the end of what it printed.
    """
    note = work / "task.json"
    write_json(note, dict(task))
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    said, processes = [work / f"rank-{rank}.txt" for rank in range(ranks)], []
    for rank, path in enumerate(said):
        mine = os.environ | ON_CPU | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(path, "w", encoding="utf-8") as file:
            processes.append(subprocess.Popen([*program, "--task", str(note)], env=mine, stdout=file, stderr=file))
    for rank, process in enumerate(processes):
        if status := process.wait():
            last = said[rank].read_text(encoding="utf-8", errors="replace").strip()[-600:]
            raise InputError(f"rank {rank} of {ranks} ended with {status}: {last}")


def finish(rows: Sequence[BenchRow], out: Path | None, quick: bool, packages: Sequence[str], cores_used: int = 1) -> None:
    """Prints the table, writes rows and machine facts as JSON, and exits with 1 if a bar is missed."""
    found = Benchmark(_facts(quick, packages, cores_used), list(rows))
    print(found.table())
    if out is not None:
        found.write(out)
    if missed := [row for row in rows if not row.holds]:
        print(f"missed: {', '.join(f'{row.what} ({row.peer_name})' for row in missed)}", file=sys.stderr)
        sys.exit(1)


def read_bench(path: Path) -> Benchmark:
    """The benchmark in a file.

    Raises:
        ValueError: no such file, another format, or a field that is missing or has another type.
    """
    fix = "make it with a tools/bench/*.py --out"
    values = read_sealed(path, "benchmark", fix)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"benchmark {path} is not {FORMAT}; {fix}")
    return record_from(Benchmark, values, f"benchmark {path}", fix)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _facts(quick: bool, packages: Sequence[str], cores_used: int) -> MachineFacts:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return MachineFacts(
        git_commit=git_commit(),
        cpu=models[0] if models else platform.processor(),
        python=platform.python_version(),
        versions=versions,
        quick=quick,
        cores=os.cpu_count(),
        load=os.getloadavg()[0],
        cores_used=cores_used,
    )
