"""Messages between ranks, and how they meet."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

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
