"""Times the parts of this rank's steps. In: the steps of the loop. Out: a `Pace`. Called by train/loop.py.

A rank waits for others where its compute stream waits for a message: on a CPU, where the host waits. So a measured step times
every call that starts a message or waits for one. On a GPU two events on the compute stream enclose the call, and are read after
the end of the step, when the host has waited for the device anyway: nothing is synchronized for the measurement.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as td

from igpt_ds import dist
from igpt_ds.train.health.links import link_seconds
from igpt_ds.train.health.pace import Pace, network_share

WINDOW = 24  # measured steps whose medians count
EVERY_ON_GPU = 4  # one step in so many is measured there, because each event costs the host a few microseconds; on CPUs all are
NETWORK = 0.2  # share of a step that the network takes at which the ranks measure their links
LINK_ROWS = 20  # rows of the log between two such measurements
_BYTES = {True: 1 << 20, False: 1 << 23}  # of a message on CPUs, on GPUs
# The methods of torch's process groups that start a message. A call with async_op=False waits in them, or in Work.wait.
_STARTS = (
    *("allreduce", "reduce", "broadcast", "allgather", "_allgather_base", "reduce_scatter", "_reduce_scatter_base"),
    *("allreduce_coalesced", "allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"),
    *("alltoall_base", "alltoall", "barrier"),
)


class StepClock:
    """The pace of this rank. One rank alone waits for nobody, and its waits are 0.

    Args:
        device: where this rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._steps = device, 0
        self._every = 1 if device.type == "cpu" else EVERY_ON_GPU
        self._window: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._host = socket.gethostname()
        self._link: float | None = None
        self._rows = LINK_ROWS  # since the last measurement of the links
        self._aside = 0.0  # seconds of the step under way that are no part of it

    @contextmanager
    def step(self, data: float) -> Iterator[None]:
        """The part of a step from its images to the loss on the host.

        Args:
            data: seconds that this step waited for its images.
        """
        self._steps += 1
        if self._steps == 1 or self._steps % self._every:  # the first step of a start allocates and connects
            yield
            return
        waits = _HostWaits() if self._device.type == "cpu" else _StreamWaits(self._device)
        start, self._aside = time.perf_counter(), 0.0
        with waits.watching() if dist.world_size() > 1 else ExitStack():
            yield
        seconds, wait = time.perf_counter() - start - self._aside, waits.seconds()
        self._window.append((data, max(0.0, seconds - wait), wait))

    def aside(self, seconds: float) -> None:
        """Leaves seconds out of the step under way: it waited for a save."""
        self._aside += seconds

    @property
    def pace(self) -> Pace | None:
        """The medians of the last measured steps; None before the first."""
        if not (window := list(self._window)):
            return None
        data, device, wait = (statistics.median(values) for values in zip(*window, strict=True))
        return Pace(data, device, wait, self._host, self._link)

    def paces(self) -> dict[int, Pace]:
        """The paces of all ranks. Every rank calls this, with each row of the log."""
        told = dist.gather_objects(self.pace)
        paces = {rank: pace for rank, pace in enumerate(told) if pace is not None}
        self._rows += 1
        if len(paces) < len(told) or self._rows <= LINK_ROWS or network_share(paces) < NETWORK:
            return paces
        hosts = [pace.host for pace in paces.values()]
        found = link_seconds(self._device, hosts, _BYTES[self._device.type == "cpu"], repeats=4)
        self._link, self._rows = found.get("across" if len(set(hosts)) > 1 else "inside"), 0
        links = dist.gather_objects(self._link)
        return {rank: replace(pace, link=links[rank]) for rank, pace in paces.items()}


class _HostWaits:
    """Waits of the host, on a CPU."""

    def __init__(self) -> None:
        self._seconds, self._thread = 0.0, threading.get_ident()

    @property
    def beside(self) -> bool:
        """Whether the calling thread is not that of the step: a save sends messages too."""
        return threading.get_ident() != self._thread

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **named: Any) -> Any:
            if self.beside:
                return call(*args, **named)
            start = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                self._seconds += time.perf_counter() - start

        return method

    def places(self) -> list[tuple[Any, str]]:
        """The methods to time: (class, name)."""
        starts = [(td.ProcessGroup, name) for name in _STARTS if hasattr(td.ProcessGroup, name)]
        return [(td.Work, "wait"), *starts]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the methods meanwhile, and puts them back as they were."""
        with ExitStack() as stack:
            for owner, name in self.places():
                if name in vars(owner):
                    stack.callback(setattr, owner, name, vars(owner)[name])  # `getattr` would lose the binding of a C method
                else:
                    stack.callback(delattr, owner, name)
                setattr(owner, name, self.timed(getattr(owner, name)))
            yield

    def seconds(self) -> float:
        """The sum of all waits."""
        return self._seconds


class _StreamWaits(_HostWaits):
    """Waits of the compute stream, on a GPU: for messages on it, for other streams, and while the host waits for those."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._module: Any = torch.get_device_module(device)
        self._compute = self._module.current_stream()
        self._pairs: list[tuple[Any, Any]] = []

    def places(self) -> list[tuple[Any, str]]:
        stream = self._module.Stream
        return super().places() + [(stream, name) for name in ("wait_stream", "synchronize") if hasattr(stream, name)]

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **named: Any) -> Any:
            if self.beside or self._module.current_stream() != self._compute:
                return call(*args, **named)
            first, last = (self._module.Event(enable_timing=True) for _ in range(2))
            first.record(self._compute)
            try:
                return call(*args, **named)
            finally:
                last.record(self._compute)
                self._pairs.append((first, last))

        return method

    def seconds(self) -> float:
        return sum(first.elapsed_time(last) for first, last in self._pairs) / 1e3
