"""Measuring on one device against a clock: what does not fit the memory or the time becomes a row that says so.

In: measurements as functions that return rows of `igpt_ds.bench`. Out: rows, written as JSON after each measurement, so that a
run that is cut off has left what it found. tools/bench/gpu.py calls.
"""

from __future__ import annotations

import gc
import platform
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Row

from igpt_ds.config import SIZES, ModelConfig
from igpt_ds.files import write_json
from igpt_ds.plan import costs
from igpt_ds.provenance import git_commit

PEAK = "printed bf16 peak"
BANDWIDTH = 4.8e12  # bytes a second that an H200 prints


class _LateError(Exception):
    """The time of a measurement is over."""


@dataclass
class Session:
    """The device, the clock, and the rows so far."""

    toy: bool
    out: Path | None
    device: torch.device
    end: float  # of time.monotonic()
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    bandwidth: float = BANDWIDTH  # until the copy is measured

    @property
    def peak(self) -> float:
        """FLOP/s in bf16 that the maker prints; an H100's where the device is not known."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "H100"
        return costs.peak_flops(name) or costs.PEAK_FLOPS["H100"]

    def config(self, size: str, n_px: int, n_layer: int | None = None) -> ModelConfig:
        """A size of the paper, maybe with fewer layers; a toy of two layers for --toy."""
        if self.toy:
            return ModelConfig(n_layer=2, n_head=2, n_embd=32, n_px=4, n_vocab=16)
        shape = SIZES[size] | ({"n_layer": n_layer} if n_layer else {})
        return ModelConfig(**shape, n_px=n_px)

    def attempt(self, what: str, seconds: float, measure: Callable[[], list[Row]]) -> float | None:
        """Adds what `measure` finds, or a row that says why there is nothing. Returns the first row's `ours`."""
        left, why, found = min(seconds, self.end - time.monotonic()), "", []
        try:
            with _alarm(left):
                found = measure()
        except torch.OutOfMemoryError:
            why = "out of memory"
        except _LateError:
            why = "not done in its time"
        except ImportError as error:
            why = f"{error.name or error} is not installed"
        except Exception as error:  # one measurement of many: the others go on, and the exit status tells
            traceback.print_exc()
            why = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            self.failed.append(what)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.rows += found or [Row(what, "", 0.0, 1.0, "not measured", note=why)]
        if self.out is not None:
            write_json(self.out, self.about())
        return found[0].ours if found else None

    def about(self) -> dict[str, Any]:
        """Rows and facts, JSON-ready; `harness.read_bench` reads it."""
        cuda = self.device.type == "cuda"
        versions: dict[str, str | None] = {"torch": torch.__version__, "CUDA": torch.version.cuda}
        versions["cuDNN"] = str(torch.backends.cudnn.version()) if cuda else None
        where = torch.cuda.get_device_name() if cuda else "a CPU at toy sizes"
        facts = {"git_commit": git_commit(), "cpu": where, "python": platform.python_version(), "versions": versions}
        return {"format": harness.FORMAT, "facts": facts, "rows": [asdict(row) for row in self.rows]}

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

    def flops_row(self, what: str, flops: float, seconds: float, note: str = "") -> Row:
        """Achieved FLOP/s against the printed peak: the ratio is the MFU."""
        return Row(what, "TFLOP/s", flops / seconds / 1e12, self.peak / 1e12, PEAK, note=note)

    def step_row(self, what: str, config: ModelConfig, B: int, seconds: float) -> Row:
        """A training step in PaLM's convention, with the causal one and the memory beside it."""
        tokens = B * config.n_ctx
        causal = costs.train_flops_per_token(config, causal=True) * tokens / seconds / self.peak
        gib = torch.cuda.max_memory_allocated() / costs.GIB if self.device.type == "cuda" else 0.0
        note = f"causal MFU {causal:.1%}, {tokens / seconds:,.0f} tokens/s, at most {gib:.1f} GiB"
        return self.flops_row(what, costs.train_flops_per_token(config) * tokens, seconds, note)


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


def table(about: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, and one line on the device."""
    facts = about["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"{harness.table(about).rpartition(chr(10))[0]}\n{facts['cpu']}; Python {facts['python']}, {versions}."
