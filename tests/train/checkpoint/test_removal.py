"""Ranks that remove a checkpoint's files together, and a load that asks the disk for no file of another rank."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.train.checkpoint.removal import remove_together
from igpt_ds.train.checkpoint.restricted import RestrictedReader, restricted_reader


def test_each_file_is_the_share_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks take their turns here. The last one finds what the first ones left."""
    doomed = tmp_path / "step-00000001.partial"
    doomed.mkdir()
    for number in range(64):
        (doomed / f"zero_pp_rank_{number}_optim_states.pt").touch()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("igpt_ds.train.checkpoint.removal.dist.from_rank_0", lambda function: None)
    left = [64]
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        remove_together([doomed])
        left.append(len(list(doomed.iterdir())))
    assert left[-1] == 0
    assert all(8 <= before - after <= 24 for before, after in pairwise(left))
    monkeypatch.undo()
    remove_together([doomed])
    assert not doomed.exists()
    with pytest.raises(ValueError, match="partial: No such file or directory"):
        remove_together([doomed])


class AnEngine:
    """The names of a DeepSpeedEngine that a load uses."""

    checkpoint_engine: Any = "its own"
    checkpoint_mp_rank, loaded_checkpoint_dp_world_size = 0, 512

    def _get_mp_rank_zero_checkpoint_names(
        self, load_dir: str, tag: str, mp_rank: int, dp_world_size: int, bf16_mode: bool
    ) -> Any:
        return [f"{load_dir}/{tag}/{rank}" for rank in range(dp_world_size)]

    def _get_all_zero_checkpoint_names(self, load_dir: str, tag: str, bf16_mode: bool) -> Any:
        raise AssertionError("it stats every file")


def test_a_load_looks_for_no_file_of_another_rank() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert {name for name in vars(AnEngine) if name.startswith("_get")} <= set(vars(DeepSpeedEngine))
    engine: Any = AnEngine()
    with restricted_reader(engine):
        assert isinstance(engine.checkpoint_engine, RestrictedReader)
        assert len(engine._get_all_zero_checkpoint_names("runs", "step", False)) == 512
    assert engine.checkpoint_engine == "its own"
    with pytest.raises(AssertionError, match="stats"):
        engine._get_all_zero_checkpoint_names("runs", "step", False)
