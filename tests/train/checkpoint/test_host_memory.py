"""Whether every node has room for the copies of its ranks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from igpt_ds.cli import SharedError
from igpt_ds.memory import available_memory, in_memory
from igpt_ds.plan.costs import copied_bytes
from igpt_ds.train.checkpoint import disk, host_memory, save
from igpt_ds.train.checkpoint.disk import require_space
from igpt_ds.train.checkpoint.host_memory import saves_in_background, shortage
from igpt_ds.train.checkpoint.save import expected_bytes, states_in_memory
from igpt_ds.train.checkpoint.tiers import Tier


def test_a_node_holds_the_copies_of_all_its_ranks() -> None:
    assert shortage([("a", 60, 100), ("b", 60, 130), ("b", 60, 120), ("c", 60, None)]) == ""
    assert shortage([("a", 60, 100), ("b", 60, 130), ("b", 60, 119)]) == "needs 120 bytes of host memory on b, which has 119 free"


def test_a_copy_is_a_share_of_the_optimizer_and_below_stage_3_the_weights_of_rank_0() -> None:
    assert copied_bytes(1000, 8, ranks=2) == 3000
    assert copied_bytes(1000, 8, stage=2, ranks=1) == 1500 + 2000
    assert copied_bytes(1000, 8, stage=2, ranks=1, first=False) == 1500


def test_the_smallest_limit_counts(tmp_path: Path) -> None:
    assert (available_memory() or 0) > 1 << 20
    assert available_memory(tmp_path) is None
    job = tmp_path / "sys/fs/cgroup/slurm/job_7"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert available_memory(tmp_path) == 8000 << 10
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7\n")
    for group, limit in ((job, "max"), (job.parent, "5000000")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("3000000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 500000\nactive_file 2\n")
    assert available_memory(tmp_path) == 2_500_002


def test_version_1_of_cgroups_counts_the_groups_below(tmp_path: Path) -> None:
    job = tmp_path / "sys/fs/cgroup/memory/slurm"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("9:cpu:/slurm\n8:memory:/slurm\n")
    (job / "memory.limit_in_bytes").write_text("5000000\n")
    (job / "memory.usage_in_bytes").write_text("3000000\n")
    (job / "memory.stat").write_text("inactive_file 7\nactive_file 7\ntotal_inactive_file 500\ntotal_active_file 20\n")
    assert available_memory(tmp_path) == 2_000_520


@pytest.mark.parametrize(("kind", "held"), [("tmpfs rw", True), ("ramfs rw", True), ("ext4 /dev/vda", False)])
def test_the_kind_of_a_mount_says_whether_its_files_are_in_memory(tmp_path: Path, kind: str, held: bool) -> None:
    device = tmp_path.stat().st_dev
    (tmp_path / "proc/self").mkdir(parents=True)
    mounts = f"22 27 999:21 / /proc rw - proc proc rw\n25 24 {os.major(device)}:{os.minor(device)} / /x rw,relatime - {kind}\n"
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    assert in_memory(tmp_path, tmp_path) is held
    assert not in_memory(tmp_path / "missing", tmp_path)


def test_a_save_into_memory_needs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "available_memory", lambda: 999)
    monkeypatch.setattr(disk, "in_memory", lambda directory: directory == tmp_path)
    require_space(tmp_path / "fast", 999, "checkpoint step-00000100")
    with pytest.raises(
        ValueError, match=r"checkpoint step-00000100 needs 1,000 bytes of memory for .*/fast and 999 are free; free"
    ):
        require_space(tmp_path / "fast", 1000, "checkpoint step-00000100")
    monkeypatch.setattr(disk, "in_memory", lambda _: False)
    require_space(tmp_path / "fast", 1000, "checkpoint step-00000100")


def test_the_states_of_a_fast_directory_in_memory_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = SimpleNamespace(module=torch.nn.Linear(10, 10, bias=False), zero_optimization_stage=lambda: 3)
    tier = Tier(tmp_path, tmp_path, fast=True)
    monkeypatch.setattr(save, "in_memory", lambda _: False)
    assert states_in_memory(engine, tier, 2) == 0  # type: ignore[arg-type]
    monkeypatch.setattr(save, "in_memory", lambda _: True)
    one = expected_bytes(engine, tier)  # type: ignore[arg-type]
    assert states_in_memory(engine, tier, 2) == 3 * one  # type: ignore[arg-type]
    (tmp_path / "step-00000001").mkdir()
    assert states_in_memory(engine, tier, 2) == 2 * one  # type: ignore[arg-type]
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1200 + 2 * one)
    assert saves_in_background(engine, "async", 2 * one)  # type: ignore[arg-type]
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1199 + 2 * one)
    with pytest.raises(
        SharedError, match=r"free, with the states of --fast_dir; use --save sync, .*, or put --fast_dir on a disk"
    ):
        saves_in_background(engine, "async", 2 * one)  # type: ignore[arg-type]
    assert not saves_in_background(engine, None, 2 * one)  # type: ignore[arg-type]


def test_too_little_memory_refuses_async_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = SimpleNamespace(module=torch.nn.Linear(10, 10, bias=False), zero_optimization_stage=lambda: 3)
    assert saves_in_background(engine, "async")  # type: ignore[arg-type]
    assert not saves_in_background(engine, "sync")  # type: ignore[arg-type]
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1199)
    with pytest.raises(
        SharedError, match=r"--save async needs 1,200 bytes of host memory on .*, which has 1,199 free; use --save sync"
    ):
        saves_in_background(engine, "async")  # type: ignore[arg-type]
    assert not saves_in_background(engine, None)  # type: ignore[arg-type]
    assert "saves are synchronous: --save async needs 1,200 bytes" in capsys.readouterr().out
