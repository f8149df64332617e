"""The commit of the code, or nothing outside a checkout."""

import pytest

from igpt_ds.provenance import git_commit


def test_a_commit_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
    monkeypatch.setenv("PATH", "")  # no git there
    assert git_commit() is None
