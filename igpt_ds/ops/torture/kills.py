"""Killed tools. In: the world, a seed and a number. Out: for each trial the tool, the outcome, and where it was killed.

A tool gets SIGKILL at its n-th call that changes the file system. Then the same command runs again, and its result must be that
of a tool that was never killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ds.errors import InputError
from igpt_ds.ops.torture.damages import copy_parts
from igpt_ds.ops.torture.trial import Ended, Trial, run_all, run_one, tool
from igpt_ds.ops.torture.world import digest, make_shards, read_shards

_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"})


@dataclass(frozen=True)
class Victim:
    """A tool that is killed.

    words: its command in a copy of the world's parts; result: what the command has made there.
    """

    name: str
    parts: tuple[str, ...]
    words: Callable[[Path], tuple[object, ...]]
    result: Callable[[Path], str]


def _out(here: Path) -> str:
    return digest(here / "out")


def _made_shards(here: Path) -> str:
    return read_shards(here / "out").replace("\n", " ")


def _consolidated(here: Path) -> str:
    """The weights in the checkpoint. The run is copied, because the reader of a checkpoint may put it in order."""
    shutil.copytree(here / "run", here / "copy")
    try:
        tool("consolidate", "--run_dir", here / "copy", "--out", here / "model")
        return digest(here / "model")
    finally:
        shutil.rmtree(here / "copy")
        shutil.rmtree(here / "model", ignore_errors=True)


def _state_of(one: Victim, here: Path) -> str:
    """What the tool has made, then the names of all files, among them what a killed one left."""
    return f"{one.result(here)}\n{sorted(str(path.relative_to(here)) for path in here.rglob('*'))}"


def victims() -> list[Victim]:
    """The tools that are killed."""
    model = ("model", "shards", "palette.npy", "palette.json")
    return [
        Victim(
            "make_shards", ("images", "palette.npy", "palette.json"), lambda here: make_shards(here, here / "out"), _made_shards
        ),
        Victim(
            "fit_palette",
            ("images",),
            _fit_palette,
            lambda here: digest(here / "out.npy", here / "out.json"),
        ),
        Victim("reshard", ("run",), lambda here: ("reshard", "--run_dir", here / "run", "--ranks", 2), _consolidated),
        Victim("consolidate", ("run",), lambda here: ("consolidate", "--run_dir", here / "run", "--out", here / "out"), _out),
        Victim("export_hf", model, lambda here: ("export_hf", "--model", here / "model", "--out", here / "out"), _out),
        Victim(
            "import_hf",
            ("hf", "palette.npy", "palette.json"),
            lambda here: ("import_hf", "--hf", here / "hf", "--palette", here / "palette.npy", "--out", here / "out"),
            _out,
        ),
        Victim(
            "extract_features",
            model,
            lambda here: ("extract_features", "--model", here / "model", "--data", here / "shards", "--out", here / "out"),
            _out,
        ),
        Victim(
            "linear_probe",
            ("features",),
            _probe,
            lambda here: digest(here / "out.jsonl"),
        ),
        Victim("sgd_probe", ("features",), _sgd_probe, lambda here: digest(here / "out.jsonl")),
        Victim("dedup_shards", ("shards",), _dedup, lambda here: digest(here / "out")),
    ]


def _fit_palette(here: Path) -> tuple[object, ...]:
    source = f"imagefolder:{here / 'images'}"
    return ("fit_palette", "--source", source, "--n_px", 4, "--n_colors", 8, "--out", here / "out.npy", "--workers", 1)


def _sgd_probe(here: Path) -> tuple[object, ...]:
    few = ("--layers", 1, "--steps", 20, "--batch_images", 16, "--save_every", 5, "--rates", 0.1)
    return ("sgd_probe", "--features", here / "features", *few, "--out", here / "out.jsonl")


def _dedup(here: Path) -> tuple[object, ...]:
    splits = ("--train_split", "train", "--eval_split", "val")
    return ("dedup_shards", "--train", here / "shards", "--eval", here / "shards", *splits, "--out", here / "out", "--workers", 1)


def _probe(here: Path) -> tuple[object, ...]:
    few = ("--layers", 1, "--C_grid", 1)
    return ("linear_probe", "--features", here / "features", *few, "--out", here / "out.jsonl")


def trials(world: Path, seed: int, n: int, cores: int) -> Iterator[tuple[str, str, str]]:
    """`n` kills, the tools in turn.

    Raises:
        ValueError: a tool fails without a kill.
    """
    found = victims()
    whole, calls = dict[str, str](), dict[str, int]()
    for one in found if n else ():
        ended = run_one(partial(_counted, world, one), world / "trials")
        if ended.how != "ok":
            raise InputError(f"{one.name} fails without a kill: {ended.how}: {ended.text}")
        count, _, whole[one.name] = ended.text.partition(" ")
        calls[one.name] = int(count)
    random_ = random.Random(seed)
    work = []
    for number in range(n):
        one = found[number % len(found)]
        at = random_.randrange(1, calls[one.name] + 1)
        work.append(Trial(f"{one.name} at call {at} of {calls[one.name]}", partial(_killed_and_again, world, one, at)))
    for trial, ended in run_all(work, world / "trials", cores):
        name = trial.name.split(" ", 1)[0]
        yield f"{name}, killed", classify(ended, whole[name]), f"{trial.name}: {ended.text[-1500:]}"


def classify(ended: Ended, whole: str) -> str:
    """The outcome: a rerun that fails is stuck, another result is silent, more files are left over."""
    if ended.how == "ok":
        same = ended.text.partition("\n")[0] == whole.partition("\n")[0]
        return "silent" if not same else "same" if ended.text == whole else "left"
    return {"error": "stuck", "killed": "traceback"}.get(ended.how, ended.how)


def _counted(world: Path, one: Victim, place: Path) -> str:
    """The number of calls of an uninterrupted tool, and its result."""
    here = place / "here"
    copy_parts(world, one.parts, here)
    count = watch(0)
    tool(*one.words(here))  # type: ignore[arg-type]
    made = count[0]
    return f"{made} {_state_of(one, here)}"


def _killed_and_again(world: Path, one: Victim, at: int, place: Path) -> str:
    """Kills the tool at a call, runs it again, and returns its result."""
    here = place / "here"
    copy_parts(world, one.parts, here)
    if (process := os.fork()) == 0:
        try:
            watch(at)
            tool(*one.words(here))  # type: ignore[arg-type]
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    try:
        tool(*one.words(here))  # type: ignore[arg-type]
    except SystemExit:
        if not _complete(one, here):
            raise
        Path(place / "stderr").write_text("", encoding="utf-8")
    return _state_of(one, here)


def _complete(one: Victim, here: Path) -> bool:
    """Whether the killed tool had finished, so that its rerun may refuse to write over the result."""
    return one.name != "reshard" and any((here / name).exists() for name in ("out", "out.npy", "out.jsonl"))


def watch(at: int) -> list[int]:
    """Counts this process's calls that change the file system in the returned list; SIGKILL at number `at` (0: never)."""
    count = [0]

    def counted() -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in _EVENTS or writes:
            counted()

    fsync = os.fsync

    def watched(descriptor: Any) -> None:
        counted()
        fsync(descriptor)

    os.fsync = watched  # type: ignore[assignment]
    sys.addaudithook(hook)
    return count
