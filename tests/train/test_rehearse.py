"""tools/rehearse.py: a run interrupted at random moments ends like one left alone; a rehearsal that proves nothing is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import read_json


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--kills", "2"], "no training command: write it after ` -- `"),
        (["--", "train.py", "--run_dir", "x"], "--run_dir is set by the rehearsal; leave it out of the training command"),
        (
            ["--", "train.py"],
            "give the training command --save_every with a number: without checkpoints on the way nothing resumes",
        ),
        (["--kills", "0", "--", "train.py", "--save_every", "5"], "--kills 0 must be at least 1"),
        (["--tolerance", "nan", "--", "train.py", "--save_every", "5"], "--tolerance nan must be a number of at least 0"),
        (["--", "false", "--save_every", "5"], "the run ended with status 1 before its last step; see "),
    ],
)
def test_what_proves_nothing_is_refused(words: list[str], complaint: str, tool: Any, tmp_path: Path) -> None:
    status, _, error = tool("rehearse", "--out", tmp_path / "out", *words)
    assert status == 2
    assert f"rehearse.py: error: {complaint}" in error


def test_nothing_is_rehearsed_over_something_else(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    status, _, error = tool("rehearse", "--out", tmp_path / "out", "--", "train.py", "--save_every", "5")
    assert status == 2
    assert "out exists already; choose another --out or remove it" in error


@pytest.mark.slow
def test_interrupted_runs_end_in_the_same_weights(
    launch: Any, tool: Any, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = command("unused", "--steps", "120", "--save_every", "10", "--val_every", "40")
    at = words.index("--run_dir")
    del words[at : at + 2], words[words.index("--save_every") : words.index("--save_every") + 2]
    done = launch(["tools/rehearse.py", "--out", tmp_path / "out", "--kills", "3", "--", sys.executable, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed 3 times; largest difference of a loss 0; weights the same" in done.stdout
    assert read_json(tmp_path / "out" / "rehearsal.json", "rehearsal")["kills"] == 3
    status, said, _ = tool("compare_runs", tmp_path / "out" / "alone", tmp_path / "out" / "interrupted")
    assert (status, said) == (0, "rows in both runs: 124\nall values are bit-equal\n")

    sparse = [{"10": "11", "120": "12"}.get(word, word) for word in words]
    done = launch(["tools/rehearse.py", "--out", tmp_path / "sparse", "--", sys.executable, *sparse])
    assert "--save_every 11 leaves nothing to go on from in a run of 12 steps" in done.stderr
