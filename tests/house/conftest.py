"""The repository as the house tests see it: its files, its programs, and what each does in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_commands import TEXTS, Call, calls, commands

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shown_calls() -> list[Call]:
    """The calls of our programs that the texts show."""
    return [call for path in TEXTS for command in commands(path.read_text()) for call in calls(command)]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, shown_calls: list[Call]) -> dict[str, dict[str, Any]]:
    """What importing the modules did, and asking each program for --help in a process of its own (see fresh.py)."""
    here = tmp_path_factory.mktemp("fresh")
    by_program: dict[str, list[list[str]]] = {}
    for program, words in shown_calls:
        by_program.setdefault(program, []).append(words)
    asked = tmp_path_factory.mktemp("calls") / "calls.json"
    asked.write_text(json.dumps(by_program))
    command = [sys.executable, str(ROOT / "tests" / "house" / "fresh.py"), str(asked)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir()), "importing the package wrote files"
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def flags(fresh: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """The long flags of each program, by the words that start it ("train.py", "-m igpt_ds.plan")."""
    return {name: set(report["flags"]) for name, report in fresh["programs"].items()}
