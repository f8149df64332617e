"""Messages between ranks, and how they meet."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.dist import (
    data_rank,
    data_world_size,
    from_rank_0,
    join,
    sequence_group,
    sequence_rank,
    sequence_size,
    start_sequence_groups,
)
from igpt_ds.errors import InputError
from igpt_ds.launcher import LaunchError


def test_a_run_continues_when_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as output:
        monkeypatch.setattr("sys.stdout", output)
        dist.say("step 1")
        dist.say("step 2")


def test_rank_0_answers_for_all() -> None:
    def refuse() -> None:
        raise InputError("no such thing")

    assert from_rank_0(lambda: 7) == 7
    with pytest.raises(SharedError, match="no such thing"):
        from_rank_0(refuse)
    with pytest.raises(SharedError, match=r"^/proc/nothing/x: No such file or directory; check the path$"):
        from_rank_0(lambda: Path("/proc/nothing/x").mkdir())
    with pytest.raises(KeyError, match="format"):
        from_rank_0(lambda: {}["format"])


@pytest.mark.parametrize(
    ("number", "address", "match"),
    [
        (0, "127.0.0.1", "MASTER_PORT={port}: another process uses this port; choose another"),
        (1, "no-host.invalid", "MASTER_ADDR=no-host.invalid cannot be resolved .*; set it to the host of rank 0"),
        (1, "127.0.0.1", "MASTER_PORT={free}: no rank 0 came within 0 s; start every rank. .*unset RANK"),
    ],
)
def test_ranks_that_cannot_meet(number: int, address: str, match: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "JOIN_SECONDS", {True: 0.0, False: 0.0})
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"MASTER_ADDR": address, "MASTER_PORT": port if number == 0 else free_port}
        for name, value in ({"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number} | place).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(LaunchError, match=match.format(port=port, free=free_port)):
            join("gloo")


MISTAKE = """
import sys, torch.distributed as td
from igpt_ds import cli, dist
td.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=dist.rank(), world_size=2)
cli.run(lambda argv: dist.from_rank_0(lambda: {}["format"]), ranks=True)
"""


def test_a_mistake_of_rank_0_reaches_the_others(launch: Any, tmp_path: Path) -> None:
    """They would wait for it for ever: the traceback is rank 0's, and the others leave without a word."""
    program = tmp_path / "mistake.py"
    program.write_text(MISTAKE)
    ranks = [launch.start([program, tmp_path / "meeting"], env={"RANK": rank, "WORLD_SIZE": "2"}) for rank in ("0", "1")]
    said = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 2]
    assert "KeyError: 'format'" in said[0]
    assert said[1] == ""


def test_without_sequence_groups_every_rank_has_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    start_sequence_groups(1)
    assert sequence_group() is None
    assert (data_rank(), data_world_size(), sequence_rank(), sequence_size()) == (5, 8, 0, 1)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, free_port: int) -> Iterator[pytest.MonkeyPatch]:
    """For tests that join a group: it ends with the test, and so do the limits and our store."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setattr(dist, "_stores", {})
    monkeypatch.setattr(dist, "_sequence_groups", {})
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    yield monkeypatch
    td.destroy_process_group()


def test_every_group_has_the_time_limit_of_the_first(joined: pytest.MonkeyPatch) -> None:
    limit = timedelta(minutes=41)
    join("gloo", limit)
    groups = [td.group.WORLD, td.new_group([0]), td.new_subgroups(1)[0]]
    assert [group._get_backend(torch.device("cpu")).options._timeout for group in groups] == [limit] * 3  # type: ignore[union-attr]
    assert distributed_c10d._get_default_timeout(td.Backend("nccl")) == limit


def test_a_rank_makes_its_own_sequence_group_alone(joined: pytest.MonkeyPatch) -> None:
    """At 512 ranks with groups of 4, making all would be 128 calls on each rank."""
    td.init_process_group("fake", store=FakeStore(), rank=37, world_size=512)
    joined.setenv("RANK", "37")
    joined.setenv("WORLD_SIZE", "512")
    start_sequence_groups(4)
    assert td.get_process_group_ranks(sequence_group()) == [36, 37, 38, 39]
    assert len(distributed_c10d._world.pg_map) == 2
    assert (data_rank(), data_world_size(), sequence_rank(), sequence_size()) == (9, 128, 1, 4)


def test_a_rank_waits_for_a_key_of_another_one() -> None:
    store = td.HashStore()
    waiting = threading.Thread(target=dist.wait_for, args=(lambda: store.check(["done"]),), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    store.set("done", "")
    waiting.join(60)
    assert not waiting.is_alive()
