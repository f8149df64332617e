"""The benchmark of training at scale, whole at toy sizes: every row is there and the file is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import read_bench


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_sizes(launch: Any, tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/scale.py", "--toy", "--work", tmp_path, "--out", out])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_bench(out).rows
    assert len(rows) == 5 + 4 + 4 + 2 + 1
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert "| memory of reshard (" in tool("bench/scale", "--show", out)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json"]
