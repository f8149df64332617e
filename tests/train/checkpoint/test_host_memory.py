"""Whether every node has room for the copies of its ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from igpt_ds.cli import SharedError
from igpt_ds.memory import available_memory
from igpt_ds.plan.costs import copied_bytes
from igpt_ds.train.checkpoint import host_memory
from igpt_ds.train.checkpoint.host_memory import saves_in_background, shortage


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
    assert available_memory(tmp_path) == 2_500_000


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
