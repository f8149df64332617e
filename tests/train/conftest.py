"""What a run leaves behind, and commands with a fault."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.files import read_json_lines


@pytest.fixture
def curves(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """curves("run") -> its rows without what a clock or a memory counter measured."""
    measured = ("images_per_s", "tokens_per_s", "mfu", "memory_gib", "data_wait", "save_seconds", "slowest_rank", "slowest_ratio")

    def rows(run_dir: str) -> list[dict[str, Any]]:
        found = read_json_lines(tmp_path / run_dir / "train.jsonl")
        return [{name: value for name, value in row.items() if name not in measured} for row in found]

    return rows


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
