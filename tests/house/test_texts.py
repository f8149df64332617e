"""What is committed speaks of the project alone: no path, index or file address of the machine it was written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written so that this file does not match itself.
MACHINE = re.compile(
    r"(?<![\w.])[/](?:work|home|root|Users|farm)[/]|[/]tmp[/]bash|file:[/]{3}|--(?:extra-)?index[-]url|[.]librar[y]\b"
)


def committed() -> list[Path]:
    """What git tracks, or would after `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what is committed is unknown")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_trace_of_a_machine():
    found = []
    for path in committed():
        if path.stat().st_size > 1 << 20 or b"\0" in (content := path.read_bytes()):
            continue
        lines = content.decode("utf-8", "replace").splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line[:80]}" for number, line in enumerate(lines, 1) if MACHINE.search(line)
        ]
    assert not found, found


def test_every_text_file_ends_with_one_newline():
    for path in committed():
        content = path.read_bytes()
        if content and b"\0" not in content:
            assert content.endswith(b"\n"), f"{path} does not end with a newline"
            assert not content.endswith(b"\n\n"), f"{path} ends with empty lines"


def test_nothing_large_is_committed():
    large = [f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes" for path in committed() if path.stat().st_size > 1 << 20]
    assert not large, large
