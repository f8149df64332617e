"""The benchmark of the SGD probe runs, and shows again what it wrote."""

from __future__ import annotations

import pytest
from harness import read_bench


@pytest.mark.slow
def test_the_sgd_benchmark_runs(tmp_path, launch, tool):
    done = launch(["tools/bench/sgd.py", "--toy", "--out", tmp_path / "bench.json"])
    assert done.returncode == 0, done.stderr
    rows = read_bench(tmp_path / "bench.json").rows
    reading = "reading 5 layers side by side, 400 x 16 in fp16"
    assert [row.what for row in rows] == ["SGD probe, 4 rates, 400 x 16 x 10"] * 2 + [reading] * 2
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert tool("bench/sgd", "--show", tmp_path / "bench.json")[1].strip() in done.stdout
