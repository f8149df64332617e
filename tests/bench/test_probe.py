"""The benchmark of the probes runs at tiny sizes, says on what scikit-learn was timed, and shows again what it wrote."""

from __future__ import annotations

import pytest
from harness import read_bench


@pytest.mark.slow
def test_the_whole_program_at_toy_sizes(launch, tool, tmp_path):
    done = launch(["tools/bench/probe.py", "--toy", "--only", "grid", "layers", "memory", "--out", tmp_path / "bench.json"])
    assert done.returncode == 0, done.stderr
    about = read_bench(tmp_path / "bench.json")
    rows = about.rows
    assert [row.what.partition(",")[0] for row in rows] == ["grid of 5 values", "probes of 25 layers", "memory of a probe"]
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    assert "scikit-learn timed on" in rows[0].note
    assert float(rows[0].note.split("at most ")[1].split()[0]) <= 1e-5, "equal objectives"
    shown = tool("bench/probe", "--show", tmp_path / "bench.json")[1].strip()
    assert shown in done.stdout
    cores = about.facts.cores_used
    assert shown.splitlines()[-1].startswith("One core of" if cores == 1 else f"{cores} cores of")
