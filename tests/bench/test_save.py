"""The benchmark of saves, whole at toy sizes: every row is there and the file is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import read_bench


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_sizes(launch: Any, tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/save.py", "--toy", "--work", tmp_path, "--out", out])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_bench(out).rows
    assert [row.what.partition(" (")[0] for row in rows] == [
        "stall of a save",
        "step while files are written",
        "memory for the copy",
    ]
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert "| stall of a save (" in tool("bench/save", "--show", out)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
