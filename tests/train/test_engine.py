"""train/engine.py, what needs no launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from igpt_ds.train.engine import tell_of_locks


def test_a_lock_that_a_killed_build_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch waits for it without a word and without an end."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    tell_of_locks()
    assert capsys.readouterr().out == ""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    tell_of_locks()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    tell_of_locks()
    fix = "where no other start builds it, a killed one left the file, and this one waits until you remove it\n"
    assert capsys.readouterr().out == f"waiting for another start that builds DeepSpeed's cpu_adam under {lock}; {fix}"
