"""Several writers at once. In: the world, a seed and a number. Out: for each trial what was written, the outcome and the fault.

One of two may refuse with a clear error. Afterwards the result must be whole, and the same command must work.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.evaluate.report.row_types import ProbeRow
from igpt_ds.ops.torture.damages import copy_parts
from igpt_ds.ops.torture.trial import Ended, Trial, run_all, run_one, tool
from igpt_ds.ops.torture.world import digest, make_shards

APPENDERS, APPENDS = 4, 5


def trials(world: Path, seed: int, n: int) -> Iterator[tuple[str, str, str]]:
    """`n` trials, the three kinds in turn, one trial at a time because each has processes of its own."""
    kinds = {"make_shards": _two_make_shards, "reshard": _two_reshards, "results.jsonl": _appenders}
    whole = {}
    for name, work in kinds.items() if n else ():
        ended = run_one(partial(work, world, None), world / "trials")
        if ended.how != "ok":
            raise InputError(f"{name} fails with one writer: {ended.how}: {ended.text}")
        whole[name] = ended.text
    names = [list(kinds)[number % len(kinds)] for number in range(n)]
    work_ = [Trial(name, partial(kinds[name], world, f"{seed}/{number}")) for number, name in enumerate(names)]
    for trial, ended in run_all(work_, world / "trials", 1):
        yield f"{trial.name}, several writers", classify(ended, whole[trial.name]), ended.text[-1500:]


def classify(ended: Ended, whole: str) -> str:
    """The outcome: another result is silent, lost rows are lost, and a command that fails afterwards is stuck."""
    if ended.how == "ok":
        return "same" if ended.text == whole else "lost" if ended.text.startswith("rows") else "silent"
    return {"error": "stuck", "killed": "traceback"}.get(ended.how, ended.how)


def _together(works: Sequence[Callable[[], Any]], seed: str) -> list[int]:
    """Runs functions in processes that start within milliseconds; their exit statuses, 1 after an exception."""
    random_, processes = random.Random(seed), []
    for work in works:
        if (process := os.fork()) == 0:
            status = 1
            try:
                work()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                os._exit(status)
        processes.append(process)
        time.sleep(random_.choice((0, 0, 0.005, 0.05, 0.2)))
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def _two(command: Callable[..., tuple[Any, ...]], seed: str | None, place: Path) -> None:
    """Runs a command twice at once, and once more if neither was successful.

    Raises:
        RuntimeError: one of them raised a traceback.
    """
    statuses = [1] if seed is None else _together([partial(tool, *command(number)) for number in range(2)], seed)
    said = (place / "stderr").read_text(encoding="utf-8")
    if "Traceback" in said:
        raise RuntimeError(f"statuses {statuses}: {said[-1000:]}")
    (place / "stderr").write_text("", encoding="utf-8")
    if 0 not in statuses:
        tool(*command(0))


def _two_make_shards(world: Path, seed: str | None, place: Path) -> str:
    here = place / "here"
    copy_parts(world, ("images", "palette.npy", "palette.json"), here)
    _two(lambda number: make_shards(here, here / "out"), seed, place)
    tool("verify_shards", "--data", here / "out", "--workers", 1)
    return digest(here / "out")


def _two_reshards(world: Path, seed: str | None, place: Path) -> str:
    here = place / "here"
    copy_parts(world, ("run",), here)
    _two(lambda number: ("reshard", "--run_dir", here / "run", "--ranks", 2 + number), seed, place)
    tool("consolidate", "--run_dir", here / "run", "--out", here / "out")
    return digest(here / "out")


def _appenders(world: Path, seed: str | None, place: Path) -> str:
    """Processes that add rows to one file; how many rows it has."""
    path, row = place / "results.jsonl", read_results(world / "results.jsonl")[0]
    assert isinstance(row, ProbeRow)

    def append(number: int) -> None:
        for turn in range(APPENDS):
            add_results(path, [replace(row, seed=number * APPENDS + turn)])

    if seed is None:
        for number in range(APPENDERS):
            append(number)
    elif any(_together([partial(append, number) for number in range(APPENDERS)], seed)):
        raise RuntimeError((place / "stderr").read_text(encoding="utf-8")[-1000:])
    return f"rows {len({repr(one) for one in read_results(path)})}"
