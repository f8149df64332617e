"""A real launch of what makes the host's part of a step cheap: leaf modules, patches of DeepSpeed, collected garbage."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.json_files import read_json

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


def test_garbage_is_collected_on_all_ranks_together(
    launch: Any, command: Callable[..., list[str]], with_fault: Callable[[list[str], str], list[str]]
) -> None:
    """After validations (steps 0, 4, 8, 12) and saves (4, 8, 12) as a whole, and what is new after steps 5 and 10."""
    done = launch(with_fault(command("run", "--ds_config", "zero3_fp32"), "garbage=5"), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for rank in (0, 1):
        assert re.findall(rf"rank {rank} collects generation (\d)", done.stdout) == list("222122122")
