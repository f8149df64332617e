"""Ends the ranks of a batch job when a node is gone, before SLURM notices. In: nodes and RUN_DIR. Out: the names of lost nodes.

    python -m igpt_ds.ops.node_watch --run_dir RUN_DIR --nodes node1 node2 --most 1 --step PID

A dead node sends nothing, so the other ranks wait for it: until a time limit of the network, or until SLURM's SlurmdTimeout (5
minutes by default). A node is gone if it is out of reach and its heartbeats stand still, both for GONE_SECONDS. A node is in
reach if it answers on a port, be it with a refusal: port 7, as Java's InetAddress.isReachable does. Only nodes that answered
before count, for a firewall may drop such packets. If more than --most nodes are gone, the job must queue again, and waits for
SLURM to notice. slurm/launch.sh runs this beside the step, whose srun is PID. The standard library is enough.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from igpt_ds import cli
from igpt_ds.train.heartbeat import HEARTBEAT_SECONDS, all_heartbeats, is_running

PORT = 7  # echo
ANSWER_SECONDS = 2.0
GONE_SECONDS = 1.2 * HEARTBEAT_SECONDS  # a node that lives writes its heartbeats within this time
EVERY_SECONDS = 1.0  # between two looks
KILL_SECONDS = 2.0  # for srun to kill the ranks of the other nodes


class Watch:
    """What was seen of the nodes of a start.

    Args:
        in_reach: whether a node answers.
    """

    def __init__(self, run_dir: Path, nodes: Sequence[str], in_reach: Callable[[str], bool]) -> None:
        self._run_dir, self._in_reach = run_dir, in_reach
        self._known: set[str] = set()
        self._gone: dict[str, tuple[float, float]] = {}  # since when by the clock of this process, and the heartbeat then
        self._nodes, self._pool = list(nodes), ThreadPoolExecutor(32)

    def lost(self, now: float) -> list[str]:
        """The nodes that are gone at a time in seconds. Called every few seconds."""
        answers = dict(zip(self._nodes, self._pool.map(self._in_reach, self._nodes), strict=True))
        self._known |= {node for node, answer in answers.items() if answer}
        silent = [node for node in self._nodes if node in self._known and not answers[node]]
        beats = self._heartbeats() if silent else {}
        before = self._gone
        self._gone = {}
        for node in silent:
            beat = beats.get(node.partition(".")[0], 0.0)
            since, last = before.get(node, (now, beat))
            self._gone[node] = (since, beat) if beat == last else (now, beat)
        return [node for node, (since, _) in self._gone.items() if now - since >= GONE_SECONDS]

    def _heartbeats(self) -> dict[str, float]:
        """When each node last wrote a heartbeat, by its own clock."""
        found = dict[str, float]()
        for beat in all_heartbeats(self._run_dir).values():
            name = beat.host.partition(".")[0]
            found[name] = max(found.get(name, 0.0), beat.written)
        return found


def in_reach(node: str) -> bool:
    """Whether a host answers, be it with a refusal."""
    try:
        socket.create_connection((node, PORT), ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Waits until the step has ended, or prints the nodes that are gone and ends it."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run_dir", type=Path, required=True, help="the run directory")
    parser.add_argument("--nodes", nargs="+", required=True, help="names of the nodes")
    parser.add_argument("--most", type=int, required=True, metavar="NODES", help="how many the job can do without")
    parser.add_argument("--step", type=int, required=True, metavar="PID", help="process that ends with the ranks")
    args = parser.parse_args(argv)
    watch = Watch(args.run_dir, args.nodes, in_reach)
    while is_running(args.step):
        lost = watch.lost(time.monotonic())
        if 0 < len(lost) <= args.most:
            print(*lost, flush=True)
            end(args.step)
            return
        time.sleep(EVERY_SECONDS)


def end(pid: int) -> None:
    """TERM makes srun kill the ranks. It would then wait for the lost node."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):
            os.kill(pid, sent)
        deadline = time.monotonic() + KILL_SECONDS
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.1)


if __name__ == "__main__":
    cli.run(main)
