"""The host's share of a step against the committed measurement."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from igpt_ds.plan.costs import RankLayout
from igpt_ds.plan.host_time import GPU_HOST, host_seconds

MEASURED = Path(__file__).parents[2] / "docs" / "bench_host.json"
CELL = re.compile(r"step, stage (\d), (\w+), (\d+) blocks, (\d+) ranks")
CELLS = {row["what"]: row["ours"] for row in json.loads(MEASURED.read_text())["rows"]}


@pytest.mark.parametrize("what", CELLS)
def test_the_law_is_near_each_measured_cell(what: str) -> None:
    found = CELL.fullmatch(what)
    assert found
    stage, mode, blocks, ranks = found.groups()
    layout = RankLayout(int(ranks), stage=int(stage), checkpointing=mode)
    assert 1e3 * GPU_HOST * host_seconds(int(blocks), layout) == pytest.approx(CELLS[what], rel=0.2)
