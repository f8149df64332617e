"""Why a start of a batch job ended, and whether the job queues again. In: text and records. Out: a decision.

Called by ops/restarts.py, which asks SLURM and reads and writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.cli import HUNG, STOPPED
from igpt_ds.train.ledger.rows import read_time

BAD_INPUT, BAD_NODES = 2, 3  # exit statuses of a program with a wrong flag or file, and of slurm/launch.sh's preflight
SPARE_SECONDS = 120  # too short for a first step; SLURM compares clocks about once a minute

_ERROR = re.compile(r"[a-z_]+\.py: error: .*|^(?:\[rank\d+\]: )?(?:[a-z_]+\.)*[A-Z][A-Za-z]*(?:Error|Exception)\b.*", re.M)
_EXIT_CODE = re.compile(r"^srun: error: .*exit code (\d+)$", re.M)
# Deaths that point at hardware: BUS, KILL (memory ran out) and SEGV. A shell reports 128 + the signal, deepspeed 256 - it.
# ABRT does not count: NCCL aborts every rank of a job when one of them is lost or late. TERM is srun's own.
_DEATH = r"Exited with exit code (?:135|137|139|249|247|245)\b|Killed|Out Of Memory|Bus error|Segmentation fault"
_KILLED = re.compile(rf"^srun: error: ([^: \n]+): tasks? [\d,-]+: (?:{_DEATH})", re.M)
_WRONG = re.compile(r"gave different bits: .*; the hardware is suspected.*--exclude=([^) ]+)\)")  # of train/health/replay.py
_ENDED = re.compile(
    r"^(?:srun|slurmstepd\S*): .*(?:Terminating|Job step aborted|CANCELLED AT|Node failure on)", re.M
)  # the other nodes


@dataclass(frozen=True)
class Start:
    """One start of a batch job."""

    run_dir: Path
    job: str
    restart: int
    nodes: str  # as SLURM lists them: "node[1-2]"
    max_fruitless: int = 3  # starts in a row that may end without a new checkpoint


@dataclass(frozen=True)
class End:
    """How the ranks of a start ended."""

    status: int
    finished: bool = False  # RUN_DIR/FINISHED exists, or the program may end without it
    gained: bool = False  # the start saved a new checkpoint
    fruitless: int = 1  # starts in a row without a new checkpoint, this one included
    bad: tuple[str, ...] = ()  # nodes that failed the preflight, or where a rank was killed
    cause: str = ""  # the first error of the ranks
    reason: str = ""  # replaces "it ended with status N"


@dataclass(frozen=True)
class Decision:
    """What happens to a job whose start did not finish the run."""

    requeue: bool
    words: str


def find_cause(log: str) -> str:
    """The first error line of a program in a log, else the first exception; printable ASCII, 300 characters at most."""
    found = [match.group() for match in _ERROR.finditer(re.sub(r"[^\n -~]", "", log.replace("\t", " ")))]
    line = next((line for line in found if "py: error: " in line), found[0] if found else "")
    return re.sub(" +", " ", line)[:300]


def find_outcome(status: int, errors: str) -> tuple[int, tuple[str, ...]]:
    """The status of the ranks, and the nodes where a rank died as if by its hardware, or computed wrong numbers (status 3).

    The first node that fails makes srun end the others, and srun's own status is the highest of all. What dies after that was
    killed by SLURM.
    """
    codes = [int(code) for code in _EXIT_CODE.findall(errors)]
    if status != 0 and codes:
        status = codes[0]
    for special in (HUNG, STOPPED):
        status = special if special in codes else status
    if wrong := _WRONG.search(errors):
        return BAD_NODES, tuple(wrong[1].split(","))
    ended = _ENDED.search(errors)
    return status, tuple(dict.fromkeys(_KILLED.findall(errors, 0, ended.start() if ended else len(errors))))


def find_facts(text: str, job: str) -> dict[str, str]:
    """The values of a job in the output of `scontrol show job -o`, which may list other tasks of its array."""
    line = next((line for line in text.splitlines() if line.startswith(f"JobId={job} ")), "")
    return dict(reversed(re.findall(r"(?:^| )(\w+)=(\S*)", line)))  # the first one counts: a command with its flags follows


def count_fruitless(images: Sequence[int]) -> int:
    """Starts in a row without progress, the last included, from the images that each start of a job began with."""
    return len(images) - images.index(max(images))


def always_too_late(facts: dict[str, str], signal_option: str) -> str:
    """Why every start of a job gets USR1 before its first step, or "".

    `facts` are SLURM's (see `find_facts`), `signal_option` is the value of sbatch's --signal: "B:USR1@600".
    """
    limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", facts.get("TimeLimit", ""))  # or UNLIMITED
    start, end = (read_time(facts.get(name)) for name in ("StartTime", "EndTime"))
    if not limit or start is None or end is None:
        return ""
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    before = re.search(r"@(\d+)$", signal_option)
    if end - start != ((days * 24 + hours) * 60 + minutes) * 60 + seconds:  # a preemption moves the end
        return ""
    if end - start - (int(before[1]) if before else 60) > SPARE_SECONDS:
        return ""
    advice = "give a longer --time, or sbatch --signal=B:USR1@60"
    return f"the time limit ({limit[0]}) leaves no time before USR1, which --signal requests; {advice}"


def explain(end: End, run_dir: Path) -> str:
    """Why a start ended, for the log and restarts.jsonl."""
    if end.status == 0:
        return "finished" if end.finished else f"it ended without {run_dir}/FINISHED"
    if end.status == STOPPED:
        return f"it was stopped {'and saved its state' if end.gained else 'before the first step: nothing was saved'}"
    if end.status == HUNG:
        return "it hung"
    if end.status == BAD_NODES:
        return f"bad nodes: {' '.join(end.bad)}"
    return (end.reason or f"it ended with status {end.status}") + (f" ({end.cause})" if end.cause else "")


def decide(start: Start, end: End, state: str, stop: bool, too_late: str) -> Decision:
    """Whether a job queues again, from its state in SLURM ("": no answer), RUN_DIR/STOP, and `always_too_late`."""
    if state != "RUNNING":  # the job was cancelled, or SLURM lost a node and queues the job again itself
        return Decision(False, f"SLURM {'has ended the job' if state else 'does not answer'} and decides what follows")
    fruitless = 0 if end.gained else end.fruitless
    why = ""
    if stop:
        why = f"{start.run_dir}/STOP exists; submit again to continue"
    elif end.status == STOPPED and too_late and not end.gained:
        why = too_late
    elif fruitless >= start.max_fruitless:
        why = f"{fruitless} starts in a row brought no new checkpoint"
    elif end.status == BAD_INPUT and start.restart == 0 and fruitless:
        why = "the first start could not begin; fix the error and submit again"
    return Decision(not why, f"not queued again: {why}" if why else "queued again")
