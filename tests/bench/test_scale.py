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


@pytest.mark.slow
def test_the_start_on_many_shards_at_toy_sizes(launch: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/shards.py", "--toy", "--work", tmp_path, "--out", out])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row.what.partition(",")[0] + row.what.rpartition(",")[2]: row for row in read_bench(out).rows}
    assert len(rows) == 15
    assert (
        rows["opens of a rank 512 ranks"].ours < rows["opens of a rank 64 ranks"].ours < 96 < rows["opens of a rank 1 rank"].ours
    )
    assert rows["later start 512 ranks"].note == "0 GB hashed"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
