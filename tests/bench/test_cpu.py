"""The benchmark of training on two cores: its rows, and the whole at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cpu
import pytest
from cpu import Setting
from harness import read_bench

from igpt_ds.config import get_recipe


@pytest.mark.parametrize(("faster", "best", "holds"), [(None, 0.5, True), (None, 0.4, False), (("bf16", 2.0), 0.5, True)])
def test_the_recommended_setting_must_be_within_5_percent_of_the_fastest(
    faster: tuple[str, float] | None, best: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "faster_precision", lambda *_: faster)
    mine = Setting(faster[0] if faster else "fp32", 2, 32)
    seconds = {mine: 0.5, Setting("fp32", 1, 64): best, Setting("fp32", 1, 32, plain=True): 0.8}
    rows = cpu._rows(get_recipe("digits_nano_ar_8"), seconds)
    (bar,) = [row for row in rows if "recommended, " in row.what]
    assert mine.text in bar.what
    assert bar.ours == 64 / 0.5
    assert bar.holds is holds
    assert [row.ratio for row in rows if row.peer_name.startswith("plain")] == [pytest.approx(0.8 / best if not faster else 1.6)]


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size(launch: Any, tool: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = launch(["tools/bench/cpu.py", "--toy", "--only", "digits_nano_ar_8", "--out", out], by="python")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_bench(out).rows
    assert len(rows) == 10 + 1 + 2
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert "2 ranks x 1 thread" in tool("bench/cpu", "--show", out)[1]
