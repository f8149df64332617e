"""README and docs show what commands print: what stands between `<!-- COMMAND -->` and `<!-- end -->` comes out again."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- python (\S+) (.+?) -->\n(.*?)<!-- end -->\n", re.DOTALL)
SHOWN = [shown for text in TEXTS for shown in BLOCK.findall(text.read_text())]


@pytest.mark.parametrize(("tool", "arguments", "shown"), SHOWN, ids=[arguments for _, arguments, _ in SHOWN])
def test_tables_come_out_again(launch: Any, tool: str, arguments: str, shown: str) -> None:
    done = launch([*([] if tool.endswith(".py") else [sys.executable]), tool, *arguments.split()])
    assert done.returncode == 0, done.stderr
    assert shown.strip("\n") == done.stdout.strip("\n")


def test_there_is_something_to_compare() -> None:
    assert {"tools/tables.py", "tools/bench/data.py"} <= {tool for tool, _, _ in SHOWN}


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture
