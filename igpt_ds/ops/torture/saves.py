"""Killed trainings and flipped bytes. In: the world, a seed and numbers. Out: for each trial the row, the outcome, what was done.

A training that saves into two directories in the background gets SIGKILL at its n-th call that changes the file system, whichever
thread makes it. The same command then must continue from the newest state that was complete, or a newer one, and reach the losses
and checkpoints of a training that was never killed. A state with a flipped byte must be named, and the next one taken.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines
from igpt_ds.model.cpu_speed import PRODUCT_VARIABLE
from igpt_ds.ops.torture.damages import copy_parts
from igpt_ds.ops.torture.kills import classify, watch
from igpt_ds.ops.torture.trial import Ended, Trial, run_all, run_one, tool
from igpt_ds.ops.torture.world import digest
from igpt_ds.train.checkpoint.directory import complete_checkpoints, step_of
from igpt_ds.train.checkpoint.newest import newest_state
from igpt_ds.train.checkpoint.tiers import Tier, run_tier

PARTS = ("shards", "recipe.json", "ds_config.json")
SECONDS = 300.0  # limit of a trial: two starts of a training on a crowded machine
KILLED, FLIPPED = "training, killed", "newest state, a byte flipped"


def trials(world: Path, seed: int, kills: int, flips: int, cores: int) -> Iterator[tuple[str, str, str]]:
    """`kills` killed trainings, then `flips` flipped bytes, in either directory in turn.

    Raises:
        ValueError: a training fails without a kill.
    """
    if not kills and not flips:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # each trial would import and compile for seconds
    os.environ.setdefault(PRODUCT_VARIABLE, "torch")  # each trial is a new run, whose weights are compared with the first one's
    from igpt_ds.ds_config import load_ds_config
    from igpt_ds.train.engine import check_ds_config

    given = world / "ds_config.json"
    check_ds_config(load_ds_config(given), given)  # imports DeepSpeed once, not in each trial
    ended = run_one(partial(_counted, world), world / "trials", SECONDS)
    if ended.how != "ok":
        raise InputError(f"training fails without a kill: {ended.how}: {ended.text}")
    count, _, whole = ended.text.partition(" ")
    random_ = random.Random(seed)
    work = []
    for _ in range(kills):
        at = random_.randrange(1, int(count) + 1)
        work.append(Trial(f"call {at} of {count}", partial(_killed_and_again, world, at), SECONDS))
    for trial, ended in run_all(work, world / "trials", cores):
        yield KILLED, classify(ended, whole), f"{trial.name}: {ended.text[-1500:]}"
    flipped = [Trial(str(number), partial(_flipped, world, number % 2 == 0, f"{seed}/{number}")) for number in range(flips)]
    for trial, ended in run_all(flipped, world / "trials", cores):
        yield FLIPPED, _judged(ended), f"number {trial.name}: {ended.text[-1500:]}"


def _train(here: Path, at: int = 0) -> int:
    """Four steps: each is saved into here/fast, each second one into here/run. Returns the calls that change the file system.

    Args:
        at: the call that kills it; 0: none.

    Raises:
        ValueError: it failed, without a kill.
    """
    if (process := os.fork()) == 0:
        count, leave = watch(at), os._exit

        def ended(status: int) -> NoReturn:
            (here / "calls").write_text(str(count[0]), encoding="utf-8")
            leave(status)

        os._exit = ended  # train.py ends with it
        try:
            tool("train", *_words(here))
        finally:
            leave(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status and not (at and status == -signal.SIGKILL):
        raise InputError(f"the training ended with status {status}")
    return int((here / "calls").read_text(encoding="utf-8")) if status == 0 else at


def _words(here: Path) -> list[object]:
    given = {"config": "recipe.json", "data": "shards", "ds_config": "ds_config.json", "run_dir": "run", "fast_dir": "fast"}
    often = {"fast_save_every": 1, "save_every": 2, "val_every": 0, "log_every": 1, "hang_minutes": 0, "resume": "auto"}
    pairs = [*((name, here / file) for name, file in given.items()), *often.items()]
    return [word for name, value in pairs for word in (f"--{name}", value)]


def _result(here: Path) -> str:
    """The losses and the checkpoints, then the names of what else is there of saves."""
    losses = [(row["step"], row["loss"]) for row in read_json_lines(here / "run" / "train.jsonl") if "loss" in row]
    left = sorted(str(path.relative_to(here)) for part in ("fast", "run/checkpoints") for path in (here / part).glob("*"))
    return f"{losses} {digest(here / 'run' / 'checkpoints')}\n{left}"


def _counted(world: Path, place: Path) -> str:
    """The number of calls of a training that is not killed, and its result. Its checkpoints stay in the world."""
    here = place / "here"
    copy_parts(world, PARTS, here)
    made = _train(here)
    shutil.copytree(here / "run" / "checkpoints", world / "states", dirs_exist_ok=True)
    return f"{made} {_result(here)}"


def _killed_and_again(world: Path, at: int, place: Path) -> str:
    """Kills a training at a call, trains again, and returns the result.

    Raises:
        ValueError: the second training continues from an older state than was complete.
    """
    here = place / "here"
    copy_parts(world, PARTS, here)
    _train(here, at)
    places = [here / "run" / "checkpoints", *(here / "fast").glob("*")]
    newest = max((step_of(path) for where in places for path in complete_checkpoints(where)), default=0)
    said = place / "stdout"
    before = said.stat().st_size
    _train(here)
    resumed = re.search(r"resumed from \S*step-(\d+)", said.read_bytes()[before:].decode(errors="replace"))
    if newest > (int(resumed[1]) if resumed else 0):
        raise InputError(f"step {newest} was complete, and the next start began at {resumed[1] if resumed else 0}")
    return _result(here)


def _flipped(world: Path, fast: bool, seed: str, place: Path) -> str:
    """Flips a byte of the newest state, and returns the step that a start takes instead, and whether the file was named."""
    run_dir, where = place / "run", place / "fast"
    newest, older = (where, run_dir / "checkpoints") if fast else (run_dir / "checkpoints", where)
    for name, directory in (("step-00000002", older), ("step-00000004", newest)):
        shutil.copytree(world / "states" / name, directory / name)
    random_ = random.Random(seed)
    file = random_.choice(sorted((newest / "step-00000004").iterdir()))
    content = bytearray(file.read_bytes())
    content[random_.randrange(len(content))] ^= random_.randrange(1, 256)
    file.write_bytes(content)
    found = newest_state([run_tier(run_dir), Tier(where, run_dir, fast=True)])
    sys.stderr.flush()
    named = str(file) in (place / "stderr").read_text(encoding="utf-8", errors="replace")
    return f"{file} named {named}, step {found.manifest.step if found else None}"


def _judged(ended: Ended) -> str:
    if ended.how != "ok":
        return {"error": "stuck", "killed": "traceback"}.get(ended.how, ended.how)
    return "same" if ended.text.endswith(" named True, step 2") else "silent"
