"""Measures the host's work in a training step of 60 blocks: milliseconds of one core on 8, 64 and 512 ranks that are not there.

    python tools/bench/host.py --quick --out bench_host.json
    python tools/bench/host.py --show docs/bench_host.json

A GPU waits for Python where a step of Python takes longer than a step of the GPU. Here the network is tiny, the other ranks are
torch's fake process group, and the time is that of the processor, so what remains is the host's work: torch, DeepSpeed, this
project. Ours is beside DeepSpeed as it comes (a hook on each module, its own functions) and beside torch's FSDP2, one unit a
block. The three take turns, each in its own process (tools/bench/host_rank.py). The network without shards is in the row "torch".
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import harness
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.config import CHECKPOINTING
from igpt_ds.errors import InputError

PACKAGES = ("torch", "deepspeed")
OF_STOCK = {64: 0.5, 512: 0.3}  # ours / DeepSpeed as it comes, at most, at stage 3
OF_FSDP2 = 1.3
NAMES = {"stock": "DeepSpeed as it comes", "fsdp2": "torch FSDP2", "torch": "torch without shards"}


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    stage: int
    mode: str  # of activation checkpointing
    ranks: int
    blocks: int

    @property
    def what(self) -> str:
        """Its name in the table."""
        return f"step, stage {self.stage}, {self.mode}, {self.blocks} blocks, {self.ranks} ranks"

    def bar(self, peer: str) -> float | None:
        """The largest allowed ratio of ours to the peer's."""
        if self.stage < 3 or peer == "torch":
            return None
        return OF_FSDP2 if peer == "fsdp2" else OF_STOCK.get(self.ranks)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every cell, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "only stage 3 on 64 ranks, and fewer turns")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    rows = [row for cell in cells(args.quick, args.toy) for row in measure(cell, 2 if args.toy else 5 if args.quick else 9)]
    rows = [replace(row, bar=None) for row in rows] if args.toy else rows
    harness.finish(rows, args.out, args.quick, PACKAGES)


def cells(quick: bool, toy: bool) -> list[Cell]:
    """What is measured: every stage, mode and number of ranks; and fewer blocks, for the cost of one."""
    if toy:
        return [Cell(3, "full", 8, 2)]
    if quick:
        return [Cell(3, mode, 64, 60) for mode in CHECKPOINTING]
    whole = [Cell(stage, mode, ranks, 60) for stage in (3, 2) for mode in CHECKPOINTING for ranks in (8, 64, 512)]
    return whole + [Cell(stage, mode, 64, 20) for stage in (3, 2) for mode in CHECKPOINTING]


def measure(cell: Cell, turns: int) -> list[BenchRow]:
    """Ours beside each peer, in milliseconds."""
    peers = ["stock", "fsdp2"] + (["torch"] if cell.ranks == 64 else [])
    with ExitStack() as running:
        ranks = {kind: running.enter_context(start(cell, kind)) for kind in ("ours", *peers)}
        seconds = take_turns(ranks, turns)
    ours = 1e3 * seconds["ours"]
    found = []
    for peer in peers:
        bar = cell.bar(peer)
        found.append(BenchRow(cell.what, "ms", ours, 1e3 * seconds[peer], NAMES[peer], bar, at_most=True))
    return found


def start(cell: Cell, kind: str) -> subprocess.Popen[str]:
    """Starts rank 0 of a contender; it waits to be told to take a step."""
    command = [sys.executable, str(Path(__file__).with_name("host_rank.py")), "--kind", kind]
    for name in ("stage", "mode", "ranks", "blocks"):
        command += [f"--{name}", str(getattr(cell, name))]
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "8"}
    pipe, env = subprocess.PIPE, os.environ | on_cpu
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")


def take_turns(ranks: Mapping[str, subprocess.Popen[str]], turns: int) -> dict[str, float]:
    """The median seconds of processor of a step of each contender."""
    seconds: dict[str, list[float]] = {kind: [] for kind in ranks}
    for _ in range(turns):
        for kind, process in ranks.items():
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                process.stdin.write("step\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise InputError(f"{kind} ended: {process.stderr.read().strip()[-600:]}")
            seconds[kind].append(json.loads(line))
    return {kind: statistics.median(times) for kind, times in seconds.items()}


if __name__ == "__main__":
    cli.run(main)
