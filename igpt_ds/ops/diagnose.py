"""Why a run hangs or died. In: heartbeats, process states and log lines. Out: the ranks to look at and the likely causes.

tools/diagnose.py collects the input. Nothing here imports torch or waits.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds import cli
from igpt_ds.console import duration
from igpt_ds.ops.rank_status import RankStatus
from igpt_ds.ops.status import DivergedRun, lost_words

# Meaning of the exit status of a rank or of its launcher. A launcher's -9 is 137 here.
EXIT_CODES = {
    1: "a Python or launcher error; the log has the traceback",
    2: "bad input; the last error line says what to change",
    3: "the preflight found bad nodes",
    cli.STOPPED: "stopped with everything saved; the same command with --resume auto continues",
    cli.HUNG: "a rank made no progress for --hang_minutes; its stacks are in RUN_DIR/stacks",
    130: "interrupted from the keyboard",
    134: "aborted (SIGABRT): NCCL's watchdog, or an assertion in C++",
    135: "bus error (SIGBUS): /dev/shm is full, or a mapped shard was cut short",
    137: "killed by SIGKILL: the machine or the job's cgroup is out of memory, or scancel, or kill -9",
    138: "killed by SIGUSR1 before train.py handled it, or its launcher was killed: start launchers with SIGUSR1 ignored",
    139: "segmentation fault (SIGSEGV): a broken driver, library or memory; RUN_DIR/stacks and PYTHONFAULTHANDLER=1 say where",
    143: "ended by SIGTERM: a time limit, preemption, scancel, or another rank that failed first",
}

# (pattern, cause): what a line of a log or of dmesg means. The most certain come first.
CLUES = (
    (r"out of memory: killed process|oom-kill|oom_kill|detected \d+ oom", "the machine ran out of memory (not the GPU)"),
    (r"\bxid\b.{0,40}\d+|uncorrectable ecc|fallen off the bus", "a GPU is broken: exclude its node"),
    (
        r"cuda out of memory|outofmemoryerror",
        "the GPU ran out of memory: use a smaller micro batch or more activation checkpointing",
    ),
    (r"no space left on device|disk quota exceeded", "the disk is full"),
    (r"due to time limit", "the job reached its time limit; --signal=B:USR1@SECONDS lets it save first"),
    (r"due to preemption", "the job was preempted"),
    (r"node failure|node_fail|due to node", "a node failed"),
    (r"the (run is lost|run diverged|loss diverged) at step", "the loss diverged: the line says what to do"),
    (r"computed twice gave different bits", "the hardware of a rank is suspected: the line says which, and what to do"),
    (
        r"watchdog caught collective operation timeout",
        "a collective timed out: one rank did not join it; see which rank is behind",
    ),
    (
        r"nccl.{0,60}(error|failure|unhandled)|connection closed by peer|socket timeout",
        "the network between ranks failed, or a rank died",
    ),
    (
        r"waiting for another start that builds",
        "another start builds an extension, or a killed one left its lock file, which the next start removes in a minute",
    ),
    (r"address already in use", "another job uses the same MASTER_PORT"),
    (r"stale file handle|input/output error|transport endpoint", "a network disk is gone"),
)

_FAILURES = (
    re.compile(r"--local_rank=(?P<rank>\d+)\b.*exits with return code = (?P<code>-?\d+)"),  # deepspeed
    re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)"),  # torchrun
    re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+).*?: (?:Exited with exit code (?P<code>\d+)|(?P<word>[A-Z].*))"),
    re.compile(r"rank (?P<rank>\d+) (?P<word>hangs in phase .*)"),
    re.compile(r"\[rank ?(?P<rank>\d+)\].*?(?P<word>Traceback|Watchdog caught.*|\w*Error\b.*)", re.IGNORECASE),
)
_PROCESS_STATES = {
    "T": "is stopped by a signal: kill -CONT {pid} continues it",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or driver that does not respond",
    "Z": "died, and its parent did not collect it",
    "gone": "no longer exists",
}


@dataclass(frozen=True)
class Clue:
    """A line that points to a cause."""

    where: str  # file and line number
    line: str
    cause: str


def explain(code: int) -> str:
    """The meaning of an exit status, or of a launcher's negative signal number."""
    code = 128 - code if code < 0 else code
    if code in EXIT_CODES:
        return EXIT_CODES[code]
    if 128 < code < 128 + 65 and code - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(code - 128).name}"
    return "not an exit status of train.py"


def failures(name: str, lines: Iterable[str]) -> list[str]:
    """The failed ranks that a log names, in order. The first one matters: the others usually fail because of it."""
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
    """The lines of a log that point to a cause: the first line of each cause, the most certain cause first."""
    found: dict[int, Clue] = {}
    for number, line in enumerate(lines, start=1):
        for place, (pattern, cause) in enumerate(CLUES):
            if place not in found and re.search(pattern, line, re.IGNORECASE):
                found[place] = Clue(f"{name}, line {number}", line.strip()[:200], cause)
    return [found[place] for place in sorted(found)]


def process_state(pid: int, proc: Path = Path("/proc")) -> str:
    """The state letter of a process on Linux (R runs, S sleeps, T stopped, D waits for a device, Z dead), or "gone"."""
    try:
        return (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def catches(pid: int, number: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process has a handler for a signal. Without a handler the signal may kill it."""
    try:
        status = (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(mask and int(mask.group(1), 16) >> (number - 1) & 1)


def behind(ranks: Sequence[RankStatus], states: dict[int, str]) -> list[str]:
    """The ranks that the others may wait for, and why: a process that cannot run, a silent rank, or one in another place.

    Args:
        states: `process_state` of each rank whose machine answered.
    """
    known = [(rank, rank.beat) for rank in ranks if rank.beat and not rank.beat.ended]
    usual = Counter((beat.step, beat.phase) for _, beat in known).most_common(1)
    found = [f"rank {rank.rank} never wrote a heartbeat" for rank in ranks if rank.beat is None and known]
    for rank, beat in known:
        name = f"rank {rank.rank} (process {beat.pid} on {beat.host}, in {beat.phase} after step {beat.step})"
        (step, phase), count = usual[0]
        state = states.get(rank.rank, "")
        if state in _PROCESS_STATES:
            found.insert(0, f"{name} {_PROCESS_STATES[state].format(pid=beat.pid)}")
        elif rank.silent:
            found.append(f"{name} is silent: its last progress is {duration(rank.age or 0.0)} old")
        elif (beat.step, beat.phase) != (step, phase) and 2 * count > len(known):
            found.append(f"{name} is not where most ranks are: in {phase} after step {step}")
    return found


def errors(ranks: Sequence[RankStatus]) -> list[str]:
    """The errors that ended ranks, from their last heartbeats."""
    return [f"rank {rank.rank}: ended with the error {rank.error!r} (its heartbeat)" for rank in ranks if rank.error]


def likely_causes(
    state: str,
    waiting_for: list[str],
    failed: list[str],
    found: list[Clue],
    exit_code: int | None,
    lost: DivergedRun | None = None,
) -> list[str]:
    """The causes, the likeliest first: a diverged loss, clues from logs, the first failed rank, the ranks behind.

    Args:
        state: `status.state_of`.
        waiting_for: of `behind`.
        failed: of `failures` and `errors`.
        found: of `clues`.
        exit_code: status of the job, if known.
        lost: of `status.read_lost`, if the loss guards ended the run.
    """
    causes = [] if lost is None else [f"{lost_words(lost)} (LOST.json)"]
    causes += [f"{clue.cause} ({clue.where}: {clue.line})" for clue in found]
    causes += failed[:1]
    causes += waiting_for if state in ("hanging", "running", "stopping", "dead", "unknown") else []
    if exit_code is not None:
        causes.append(f"exit status {exit_code}: {explain(exit_code)}")
    if not causes and state == "hanging":
        causes.append("every rank lives and none makes progress: compare their stacks; usually the network between them failed")
    return causes
