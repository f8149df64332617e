"""Lost nodes are found by what no longer answers and what no longer writes; both must last."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.ops import node_watch
from igpt_ds.ops.node_watch import GONE_SECONDS, Watch
from igpt_ds.train.heartbeat import Heartbeat, write_heartbeats


def beat(run_dir: Path, host: str, rank: int, written: float) -> None:
    write_heartbeats(run_dir, [Heartbeat(rank, 3, "step", 1.0, host, 1, 0.1, written)])


class Nodes:
    """Three nodes, of which some are away."""

    def __init__(self, run_dir: Path) -> None:
        self.away: set[str] = set()
        self.watch = Watch(run_dir, ["node1", "node2", "node3"], lambda node: node not in self.away)


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    for rank, host in enumerate(("node1", "node2.cluster", "node3")):
        beat(tmp_path, host, rank, 100.0)
    return Nodes(tmp_path)


def test_a_node_that_neither_answers_nor_writes_is_lost_after_a_while(nodes: Nodes) -> None:
    assert nodes.watch.lost(0.0) == []
    nodes.away = {"node2", "node3"}
    assert nodes.watch.lost(2.0) == []
    assert nodes.watch.lost(2.0 + GONE_SECONDS - 1) == []
    nodes.away = {"node2"}
    assert nodes.watch.lost(2.0 + GONE_SECONDS) == ["node2"]
    nodes.away = {"node2", "node3"}  # which had answered in between
    assert nodes.watch.lost(3.0 + GONE_SECONDS) == ["node2"]


def test_a_node_whose_network_for_jobs_alone_works_is_not_lost(nodes: Nodes, tmp_path: Path) -> None:
    nodes.watch.lost(0.0)
    nodes.away = {"node2"}
    for moment in range(0, 100, 10):
        beat(tmp_path, "node2.cluster", 1, 100.0 + moment)
        assert nodes.watch.lost(float(moment)) == []


def test_a_node_that_never_answered_is_not_judged(nodes: Nodes) -> None:
    nodes.away = {"node2"}
    assert [nodes.watch.lost(moment) for moment in (0.0, 100.0, 200.0)] == [[], [], []]


def test_a_refusal_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(node_watch, "PORT", port)
        assert node_watch.in_reach("127.0.0.1")
    assert node_watch.in_reach("127.0.0.1")  # nobody listens
    assert not node_watch.in_reach("no-such-host.invalid")


def test_the_step_is_ended_and_the_node_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[Any] = [True]
    monkeypatch.setattr(node_watch, "in_reach", lambda node: node == "node1" or (answers.pop() if answers else False))
    for name, value in (("GONE_SECONDS", 0.3), ("EVERY_SECONDS", 0.1), ("KILL_SECONDS", 0.2)):
        monkeypatch.setattr(node_watch, name, value)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as step:
        assert step.stdout is not None
        step.stdout.readline()
        words = ["--run_dir", str(tmp_path), "--nodes", "node1", "node2", "--most", "1", "--step", str(step.pid)]
        node_watch.main(words)
        assert step.wait(10) == -signal.SIGKILL
    assert capsys.readouterr().out == "node2\n"
    node_watch.main(words)  # the step has ended
    assert capsys.readouterr().out == ""


def test_a_job_that_cannot_do_without_the_node_waits_for_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("GONE_SECONDS", 0.0), ("EVERY_SECONDS", 0.05)):
        monkeypatch.setattr(node_watch, name, value)
    answers = [True, True]
    monkeypatch.setattr(node_watch, "in_reach", lambda node: answers.pop() if answers else False)
    with subprocess.Popen(["sleep", "1"]) as step:
        node_watch.main(["--run_dir", str(tmp_path), "--nodes", "node1", "node2", "--most", "1", "--step", str(step.pid)])
        assert step.wait(10) == 0
    assert capsys.readouterr().out == ""
