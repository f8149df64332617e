"""What a run leaves behind, and commands with a fault."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import read_json_lines
from igpt_ds.ops.compare import MEASURED

Rows = list[dict[str, Any]]


def learned(run_dir: Path) -> Rows:
    """The rows of train.jsonl without what a clock or a memory counter measured."""
    found = read_json_lines(run_dir / "train.jsonl")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]


@pytest.fixture
def curves(tmp_path: Path) -> Callable[[str], Rows]:
    """curves("run") -> its rows without what a clock or a memory counter measured."""
    return lambda run_dir: learned(tmp_path / run_dir)


@pytest.fixture(scope="session")
def whole_dir(launch_once: Any, command_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `command` on two ranks, never interrupted. Training waits for its saves."""
    directory = tmp_path_factory.mktemp("whole")
    done = launch_once(command_in(directory)("run", "--save", "sync"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "run"


@pytest.fixture(scope="session")
def whole(whole_dir: Path) -> Rows:
    """The curves of that run."""
    return learned(whole_dir)


@pytest.fixture
def with_fault() -> Callable[[list[str], str], list[str]]:
    """with_fault(words, fault) -> the words of a `train.py ...` command, with a fault of faults.py."""
    return lambda words, fault: [str(Path(__file__).with_name("faults.py")), fault, *words[1:]]


@pytest.fixture
def ended() -> Callable[[subprocess.CompletedProcess[str], int], str]:
    """ended(done, status) -> what it printed, the status being as it should."""

    def said(done: subprocess.CompletedProcess[str], status: int) -> str:
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return said
