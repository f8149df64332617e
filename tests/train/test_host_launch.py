"""A real launch of what makes the host's part of a step cheap: leaf modules, patches of DeepSpeed, collected garbage."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import read_json, read_json_lines
from igpt_ds.ops.status import read_status
from igpt_ds.ops.status_text import status_text
from igpt_ds.train.health.pace import SLOW

pytestmark = pytest.mark.slow


def test_same_bits_few_gathers_and_no_growth(launch: Any, tmp_path: Path) -> None:
    done = launch([Path(__file__).with_name("host_ranks.py"), tmp_path / "found.json"], ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for found in read_json(tmp_path / "found.json", "found"):
        assert found["bits"] == {"none/fp32": True, "selective/fp32": True, "full/fp32": True, "none/bf16": True}
        (first, _, *_), after = found["gathers"]
        assert after == found["gathers"][0], "a validation before the first step or later leaves the gathers of a step alone"
        assert first == after[2] > 0
        for mode, objects in found["growth"].items():
            assert objects["with"] <= 5, mode
        assert found["growth"]["selective"]["without"] > 100


def test_garbage_is_collected_and_a_rank_that_waits_for_data_is_named(
    launch: Any, command: Callable[..., list[str]], with_fault: Callable[[list[str], str], list[str]], tmp_path: Path
) -> None:
    """Garbage: after validations (steps 0, 4, 8, 12) and saves (4, 8, 12) as a whole, and what is new after steps 5 and 10."""
    words = with_fault(command("run", "--ds_config", "zero3_fp32"), "garbage=5")
    done = launch(words, ranks=2, env={"IGPT_DS_TEST_SLOW": "data,1,0.3"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for rank in (0, 1):
        assert re.findall(rf"rank {rank} collects generation (\d)", done.stdout) == list("222122122")
    named = f"rank 1 on {socket.gethostname()}, "
    assert done.stdout.count(named) == 1, "the log names it once in a while"
    found = read_status(tmp_path / "run", time.time())
    assert found.slowest is not None
    assert (found.slowest.rank, found.slowest.reason) == (1, "data")
    assert found.slowest.seconds is not None
    assert found.slowest.seconds >= 0.3
    assert f"  slowest     {named}" in status_text(found)
    rows = [row for row in read_json_lines(tmp_path / "run" / "train.jsonl") if "loss" in row]
    assert {row["slowest_rank"] for row in rows[6:]} == {1}
    assert min(row["slowest_ratio"] for row in rows[6:]) > SLOW
