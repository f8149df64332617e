"""Why a run hangs or died: heartbeats, states of processes and lines of logs enter; who is behind and the likely causes leave.

tools/diagnose.py collects and calls. Nothing here needs torch, or waits.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.ops.status import duration, lost_words
from igpt_ds.train.run_lock import ENDED

# What exit statuses of a rank, or of its launcher, mean. A launcher that says -9 means 137.
EXIT_CODES = {
    1: "an error of Python or of the launcher; the traceback stands in the log",
    2: "bad input; the line before says what to change",
    3: "the preflight found bad nodes",
    cli.STOPPED: "stopped with everything saved; the same command with --resume auto goes on",
    cli.HUNG: "a rank gave no sign of life for --hang_minutes; its stacks are in RUN_DIR/stacks",
    130: "interrupted from the keyboard",
    134: "aborted (SIGABRT): NCCL's watchdog, or an assertion in C++",
    135: "bus error (SIGBUS): /dev/shm is full, or a mapped shard was cut short",
    137: "killed with SIGKILL: out of memory of the machine or of the job's cgroup, scancel, or somebody's kill -9",
    138: "killed by USR1 before train.py could hear it, or its launcher was: start launchers with USR1 ignored",
    139: "segmentation fault (SIGSEGV): a broken driver, library or memory; RUN_DIR/stacks and PYTHONFAULTHANDLER=1 say where",
    143: "ended by SIGTERM: a time limit, preemption, scancel, or another rank that failed first",
}

# What a line of a log or of dmesg gives away, the surest first.
CLUES = (
    (r"out of memory: killed process|oom-kill|oom_kill|detected \d+ oom", "the machine ran out of memory (not the GPU)"),
    (r"\bxid\b.{0,40}\d+|uncorrectable ecc|fallen off the bus", "a GPU is broken: leave its node out"),
    (
        r"cuda out of memory|outofmemoryerror",
        "the GPU ran out of memory: a smaller micro batch, or more activation checkpointing",
    ),
    (r"no space left on device|disk quota exceeded", "the disk is full"),
    (r"due to time limit", "the job's time limit; --signal=B:USR1@SECONDS lets it save before"),
    (r"due to preemption", "the job was preempted"),
    (r"node failure|node_fail|due to node", "a node failed"),
    (r"the run is lost at step", "the loss is lost: the line says what to do"),
    (r"watchdog caught collective operation timeout", "a collective waited too long: one rank did not come; see who is behind"),
    (
        r"nccl.{0,60}(error|failure|unhandled)|connection closed by peer|socket timeout",
        "the network between ranks, or a rank that died",
    ),
    (
        r"waiting for another start that builds",
        "a killed start left a lock in a build of DeepSpeed's: remove that file",
    ),
    (r"address already in use", "another job uses the same MASTER_PORT"),
    (r"stale file handle|input/output error|transport endpoint", "a network disk went away"),
)

_FAILURES = (
    re.compile(r"--local_rank=(?P<rank>\d+)\b.*exits with return code = (?P<code>-?\d+)"),  # deepspeed
    re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)"),  # torchrun
    re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+).*?: (?:Exited with exit code (?P<code>\d+)|(?P<word>[A-Z].*))"),
    re.compile(r"rank (?P<rank>\d+) (?P<word>hangs in phase .*)"),
    re.compile(r"\[rank ?(?P<rank>\d+)\].*?(?P<word>Traceback|Watchdog caught.*|\w*Error\b.*)", re.IGNORECASE),
)
_PROCESS_STATES = {
    "T": "is stopped by a signal: kill -CONT {pid} lets it go on",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a driver that does not answer",
    "Z": "has died, and its parent did not notice",
    "gone": "is not there any more",
}


@dataclass(frozen=True)
class Clue:
    """A line that gives something away."""

    where: str  # file and line number
    line: str
    cause: str


def explain(code: int) -> str:
    """An exit status, or a launcher's negative signal number, in words."""
    code = 128 - code if code < 0 else code
    if code in EXIT_CODES:
        return EXIT_CODES[code]
    if 128 < code < 128 + 65 and code - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(code - 128).name}"
    return "not a status that train.py gives"


def failures(name: str, lines: Iterable[str]) -> list[str]:
    """What a log says of ranks that failed, in its order: the first is the one to look at, others fail because of it."""
    found = []
    for number, line in enumerate(lines, start=1):
        for pattern in _FAILURES:
            if match := pattern.search(line):
                parts = match.groupdict()
                code = parts.get("code")
                words = f"exit status {code}: {explain(int(code))}" if code else str(parts.get("word")).strip()[:120]
                node = f" on {parts['node']}" if parts.get("node") else ""
                found.append(f"rank {parts['rank']}{node}: {words} ({name}, line {number})")
                break
    return found


def clues(name: str, lines: Iterable[str]) -> list[Clue]:
    """The lines of a log that give a cause away, the surest cause first and of each cause the first line."""
    found: dict[int, Clue] = {}
    for number, line in enumerate(lines, start=1):
        for sureness, (pattern, cause) in enumerate(CLUES):
            if sureness not in found and re.search(pattern, line, re.IGNORECASE):
                found[sureness] = Clue(f"{name}, line {number}", line.strip()[:200], cause)
    return [found[sureness] for sureness in sorted(found)]


def process_state(pid: int, proc: Path = Path("/proc")) -> str:
    """The letter that Linux gives a process (R runs, S sleeps, T stopped, D waits for a device, Z dead), or "gone"."""
    try:
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def catches(pid: int, number: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process has a handler for a signal; one that has none would die of it."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return False
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(mask and int(mask.group(1), 16) >> (number - 1) & 1)


def behind(ranks: list[dict[str, Any]], states: dict[int, str]) -> list[str]:
    """The ranks that others may be waiting for, and why: a process that cannot go on, silence, or standing elsewhere.

    Args:
        ranks: of `status.read_heartbeats`.
        states: `process_state` of the ranks whose machine was asked.
    """
    known = [rank for rank in ranks if rank["phase"] is not None and rank["phase"] not in ENDED]
    usual = Counter((rank["step"], rank["phase"]) for rank in known).most_common(1)
    found = [f"rank {rank['rank']} never had a heartbeat" for rank in ranks if rank["phase"] is None and known]
    for rank in known:
        name = f"rank {rank['rank']} (process {rank['pid']} on {rank['host']}, in {rank['phase']} after step {rank['step']})"
        state = states.get(rank["rank"], "")
        if state in _PROCESS_STATES:
            found.insert(0, f"{name} {_PROCESS_STATES[state].format(pid=rank['pid'])}")
        elif rank["silent"]:
            found.append(f"{name} is silent, its last sign of life {duration(rank['age'])} old")
        elif (rank["step"], rank["phase"]) != usual[0][0] and 2 * usual[0][1] > len(known):
            found.append(f"{name} stands elsewhere than most, which are in {usual[0][0][1]} after step {usual[0][0][0]}")
    return found


def errors(ranks: list[dict[str, Any]]) -> list[str]:
    """What ranks said of their end, by their last heartbeats: those that ended with an error."""
    return [f"rank {rank['rank']}: ended with the error {rank['error']!r} (its heartbeat)" for rank in ranks if rank.get("error")]


def likely_causes(
    state: str,
    waiting_for: list[str],
    failed: list[str],
    found: list[Clue],
    exit_code: int | None,
    lost: dict[str, Any] | None = None,
) -> list[str]:
    """The causes, the likeliest first: a lost loss, what a log gives away, then who failed first, then who is behind.

    Args:
        lost: RUN_DIR/LOST.json (`status.read_lost`): written where the guards of the loss ended the run.
    """
    causes = [] if lost is None else [f"{lost_words(lost)} (LOST.json)"]
    causes += [f"{clue.cause} ({clue.where}: {clue.line})" for clue in found]
    causes += failed[:1]
    causes += waiting_for if state in ("hanging", "running", "stopping", "dead", "unknown") else []
    if exit_code is not None:
        causes.append(f"exit status {exit_code}: {explain(exit_code)}")
    if not causes and state == "hanging":
        causes.append("all ranks live and none goes on: compare their stacks; the network between them is the usual reason")
    return causes
