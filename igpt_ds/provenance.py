"""Which code made a result. Written into run.json and into each result row."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit that this code stands at, with "+" when files were changed since; None outside a git checkout.

    An installed copy is no checkout, although its environment may lie inside the repository of something else.

    Args:
        file: a file of the code.
    """
    git = ["git", "-C", str(file.resolve().parent)]
    tracked = [*git, "ls-files", "--error-unmatch", file.name]
    command = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
