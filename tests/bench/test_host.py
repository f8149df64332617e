"""The benchmark of the host's work: its bars, and the whole program at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host
import pytest
from harness import read_bench


def test_bars_are_for_stage_3() -> None:
    bars = {(cell.stage, cell.ranks): cell.bar("stock") for cell in host.cells(quick=False, toy=False)}
    assert bars == {(3, 8): None, (3, 64): 0.5, (3, 512): 0.3, (2, 8): None, (2, 64): None, (2, 512): None}
    assert {cell.bar("fsdp2") for cell in host.cells(quick=True, toy=False)} == {1.3}


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size(launch: Any, tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/host.py", "--toy", "--out", out])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_bench(out).rows
    assert [row.peer_name for row in rows] == ["DeepSpeed as it comes", "torch FSDP2"]
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert "step, stage 3, full, 2 blocks, 8 ranks" in tool("bench/host", "--show", out)[1]
