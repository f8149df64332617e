"""The harness itself: what it calls an error, silent, a hang; that a seed makes the same damage; that a kill is one."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from igpt_ds.cli import HUNG
from igpt_ds.errors import InputError
from igpt_ds.ops.torture import damages, kills, trial, writers
from igpt_ds.ops.torture.mutate import GADGET, SIGNED, damage
from igpt_ds.ops.torture.trial import RAN, Ended, Figures, Trial, run_all, table


def refuse(place: Path) -> NoReturn:
    raise InputError("no such thing")


def crash(place: Path) -> NoReturn:
    raise KeyError("format")


def leave(place: Path) -> NoReturn:
    raise SystemExit(HUNG)


def run_gadget(place: Path) -> str:
    (place / RAN).touch()
    return "fine"


def wait(place: Path) -> str:
    time.sleep(60)
    return "late"


def too_large(place: Path) -> str:
    return str(len(bytearray(1 << 34)))


def test_every_end_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 3.0)  # a start on a crowded machine takes more than one
    expected: dict[Callable[[Path], str], str] = {
        lambda place: "fine": "ok",
        refuse: "error",
        crash: "traceback",
        leave: "traceback",
        too_large: "traceback",
        run_gadget: "ran",
        wait: "hang",
    }
    trials = [Trial(how, work) for work, how in expected.items()]
    found = [(one.name, ended.how) for one, ended in run_all(trials, tmp_path, 4)]
    assert sorted(found) == sorted((how, how) for how in expected.values())
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_which_outcome() -> None:
    assert damages.classify(Ended("ok", "a"), "a", ours=True) == "same"
    assert damages.classify(Ended("ok", "b"), "a", ours=True) == "silent"
    assert damages.classify(Ended("ok", "b"), "a", ours=False) == "same"
    assert damages.classify(Ended("killed", ""), "a", ours=True) == "traceback"  # by the system, for its memory
    assert kills.classify(Ended("ok", "a\nout"), "a\nout") == "same"
    assert kills.classify(Ended("ok", "a\n.out.partial out"), "a\nout") == "left"
    assert kills.classify(Ended("ok", "b\nout"), "a\nout") == "silent"
    assert kills.classify(Ended("error", "exists already"), "a\nout") == "stuck"
    assert writers.classify(Ended("ok", "rows 19"), "rows 20") == "lost"
    row = Figures("palette")
    for outcome in ("error", "silent"):
        row.add(outcome)
    assert table([row, row]).splitlines()[-1] == "| total | 4 | 2 | 0 | 2 | 0 | 0 | 0 | 0 | 0 | 0 |"


def test_a_seed_makes_the_same_damage(tmp_path: Path) -> None:
    """Of every kind: hundreds of seeds on a small JSON file, each time a file that differs or is no file any more."""
    kinds = set()
    for seed in range(200):
        states = []
        for turn in (0, 1):
            file = tmp_path / f"{seed}-{turn}" / "values.json"
            file.parent.mkdir()
            file.write_text(json.dumps({"format": "f", "rows": [1, 2.5, None, True, "x"]}))
            kinds.add(damage(random.Random(seed), file, tmp_path, file.parent))
            states.append(file.read_bytes() if file.is_file() else file.lstat().st_mode if os.path.lexists(file) else None)
        assert states[0] == states[1]
    assert {"bit", "a fifo", GADGET, SIGNED, "deep nesting", "a key twice", "another value", "LFS pointer", "missing"} <= kinds


def test_a_tool_is_killed_at_a_call(tmp_path: Path) -> None:
    def work(place: Path) -> str:
        if (process := os.fork()) == 0:
            kills.watch(2)
            for name in ("a", "b", "c"):
                (place / name).mkdir()
            os._exit(0)
        return f"{os.waitpid(process, 0)[1]} {sorted(path.name for path in place.glob('?'))}"

    assert trial.run_one(work, tmp_path) == Ended("ok", "9 ['a']")


@pytest.mark.slow
def test_the_tool_prints_figures(launch: Any, tmp_path: Path) -> None:
    out = tmp_path / "torture.json"
    numbers = ["--mutations", 28, "--kills", 10, "--pairs", 3, "--trainings", 2, "--flips", 6, "--seed", 1]
    done = launch(["tools/torture.py", *map(str, numbers), "--out", out])
    assert done.stdout.startswith("| of | trials |"), done.stderr[-2000:]
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert sum(row["trials"] for row in rows.values()) == 41 + 2 + 6
    assert rows["checkpoint"]["trials"] == 2
    assert not any(row[name] for row in rows.values() for name in trial.BARS)
    assert launch(["tools/torture.py", "--show", out]).stdout == done.stdout
