"""Measures on one device within a time limit. A measurement that does not fit the memory or the time becomes a row that says so.

In: measurements as functions that return rows. Out: rows, written as JSON after each measurement, so that an interrupted run
keeps its results. Called by tools/bench/gpu.py.
"""

from __future__ import annotations

import gc
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark, BenchRow, MachineFacts, read_bench

from igpt_ds.config import SIZES, ModelConfig
from igpt_ds.plan import costs
from igpt_ds.plan.gpus import GPUS, Gpu, find_gpu
from igpt_ds.plan.step_time import Cluster, Step, step_time
from igpt_ds.provenance import git_commit
from igpt_ds.train.peak import peak_of

BANDWIDTH = 4.8e12  # bytes a second that an H200 prints


class _LateError(Exception):
    """A measurement exceeds its time limit."""


@dataclass
class DeviceSession:
    """The device, the time limit, and the rows so far."""

    toy: bool
    out: Path | None
    device: torch.device
    end: float  # of time.monotonic()
    rows: list[BenchRow] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    bandwidth: float = BANDWIDTH  # until the copy is measured
    slack: float = 1.0  # times the seconds of each measurement

    @cached_property
    def peak_and_source(self) -> tuple[float, str]:
        """(FLOP/s in bf16, where from): the data sheet, for an unknown GPU a large product measured here, an H100's on a CPU."""
        return peak_of(self.device, "bf16") if self.device.type == "cuda" else (GPUS["h100-80g"].peak, "an H100's bf16 peak")

    @property
    def peak(self) -> float:
        """The FLOP/s in bf16 that an MFU is a part of."""
        return self.peak_and_source[0]

    def config(self, size: str, n_px: int, n_layer: int | None = None) -> ModelConfig:
        """A size of the paper, with n_layer layers if given; a model of two layers for --toy."""
        if self.toy:
            return ModelConfig(n_layer=2, n_head=2, n_embd=32, n_px=4, n_vocab=16)
        config = ModelConfig(**SIZES[size], n_px=n_px)
        return replace(config, n_layer=n_layer or config.n_layer)

    def attempt(self, what: str, seconds: float, measure: Callable[[], list[BenchRow]]) -> float | None:
        """Adds the rows of `measure`, or a row with the reason of its failure. Returns `ours` of the first row."""
        left, why, found = min(self.slack * seconds, self.end - time.monotonic()), "", []
        try:
            with _alarm(left):
                found = measure()
        except torch.OutOfMemoryError:
            why = "out of memory"
        except _LateError:
            why = "not done in its time"
        except ImportError as error:
            why = f"{error.name or error} is not installed"
        except Exception as error:  # the other measurements continue, and the exit status is 1
            traceback.print_exc()
            why = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            self.failed.append(what)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.add(found or [BenchRow(what, "", 0.0, 1.0, "not measured", note=why)])
        return found[0].ours if found else None

    def add(self, rows: list[BenchRow]) -> None:
        """Adds rows, and writes the file again."""
        self.rows += rows
        if self.out is not None:
            self.benchmark().write(self.out)

    @property
    def gpu(self) -> Gpu:
        """The plan's rates of this GPU, those of an H200 for an unknown one."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return find_gpu(name) or GPUS["h200-141g"]

    def planned(self, config: ModelConfig, layout: costs.RankLayout) -> Step:
        """A training step in the plan."""
        return step_time(config, layout, Cluster(self.gpu))

    def plan_says(self, rate: float) -> str:
        """A rate of the plan in words."""
        return f"the plan assumes {rate / 1e12:.0f}"

    def benchmark(self) -> Benchmark:
        """The rows so far and the facts of the device."""
        cuda = self.device.type == "cuda"
        versions: dict[str, str | None] = {"torch": torch.__version__, "CUDA": torch.version.cuda}
        versions["cuDNN"] = str(torch.backends.cudnn.version()) if cuda else None
        where = torch.cuda.get_device_name() if cuda else "a CPU at toy sizes"
        return Benchmark(MachineFacts(git_commit(), where, platform.python_version(), versions), list(self.rows))

    def seconds(self, run: Callable[[], Any], warm_up: int = 3, times: int = 10) -> float:
        """The median seconds of a call, measured on the device."""
        cuda, found = self.device.type == "cuda", []
        for _ in range(1 if self.toy else warm_up):
            run()
        for _ in range(2 if self.toy else times):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def flops_row(self, what: str, flops: float, seconds: float, note: str = "") -> BenchRow:
        """Achieved FLOP/s beside the peak: the ratio is the MFU, which cannot exceed 1."""
        if flops / seconds > self.peak:
            raise ArithmeticError(f"{flops / seconds:.2e} FLOP/s exceed the peak of {self.peak:.2e}, which must be wrong")
        return BenchRow(what, "TFLOP/s", flops / seconds / 1e12, self.peak / 1e12, self.peak_and_source[1], note=note)

    def step_row(self, what: str, config: ModelConfig, layout: costs.RankLayout, seconds: float) -> BenchRow:
        """A training step; the MFU is in PaLM's convention, the note has the causal MFU, the memory and the plan."""
        tokens = layout.micro_batch * config.n_ctx
        causal = costs.train_flops_per_token(config, causal=True) * tokens / seconds / self.peak
        gib = torch.cuda.max_memory_allocated() / costs.GIB if self.device.type == "cuda" else 0.0
        flops = costs.train_flops_per_token(config) * tokens
        plan = f"plan {flops / self.planned(config, layout).seconds / self.peak:.1%}"
        note = f"causal MFU {causal:.1%}, {tokens / seconds:,.0f} tokens/s, at most {gib:.1f} GiB, {plan}"
        return self.flops_row(what, flops, seconds, note)


def run_process(session: DeviceSession, program: Path, parts: list[str], seconds: float) -> None:
    """Runs parts of a program in a process of their own, and adds its rows, or one that says why there are none."""
    what, left = " ".join(parts), min(session.slack * seconds, session.end - time.monotonic())
    if left < 10:
        session.add([BenchRow(what, "", 0.0, 1.0, "not measured", note="no time was left")])
        return
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rows.json"
        minutes = f"{left / 60 / session.slack:.3f}"
        words = [sys.executable, str(program), "--only", *parts, "--out", str(out), "--minutes", minutes]
        process = subprocess.Popen([*words, *(["--toy"] if session.toy else [])], stdout=subprocess.DEVNULL)
        try:
            process.wait(left + 5)  # it stops by itself, unless a library hangs
            why = "" if process.returncode in (0, 1) else f"failed: it ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = "it was ended after its time"
        found = read_bench(out) if out.exists() else Benchmark(session.benchmark().facts, [])
    if why or not found.rows:
        found.rows.append(BenchRow(what, "", 0.0, 1.0, "not measured", note=why or "failed: it has no rows"))
    session.add(found.rows)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _LateError

    if seconds < 1:
        raise _LateError
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
