"""The commit of the code, or nothing outside a checkout."""

import subprocess
from pathlib import Path

import pytest

from igpt_ds.provenance import git_commit


def test_a_commit_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
    monkeypatch.setenv("PATH", "")  # no git there
    assert git_commit() is None


def test_an_installed_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "provenance.py").touch()
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "theirs.py"], [*name, "commit", "-qm", "theirs"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert git_commit(tmp_path / ".venv" / "provenance.py") is None
    assert len(git_commit(tmp_path / "theirs.py") or "") == 40
