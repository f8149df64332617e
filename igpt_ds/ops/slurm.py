"""What SLURM and the nodes of a job answer. In: the number of a job. Out: facts, states and names. Called by ops/restarts.py.

A node is lost if SLURM calls it down or silent, if the job has lost it (sbatch --no-kill), or if it does not answer within
ANSWER_SECONDS. SLURM itself notices a dead node only after its SlurmdTimeout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from igpt_ds.errors import error_text
from igpt_ds.ops import requeue
from igpt_ds.ops.restart_log import write_line

ANSWER_SECONDS = 30.0
PATIENCE_SECONDS, AGAIN_SECONDS = 300.0, 5.0  # for a controller that does not answer, as when it is started anew
_NO_ANSWER = re.compile(r"Unable to contact|timed out|Zero Bytes|standby mode|temporarily unable|Connection refused", re.I)
_began = time.monotonic()  # the patience of one process is for all its questions together
_DOWN = re.compile(r"(?:down|unknown|future)\W*|.*\*")  # of sinfo; a star: the node does not respond


@dataclass(frozen=True)
class JobNodes:
    """The nodes of a job after ranks died."""

    lost: tuple[str, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()  # (node, what its kernel says of the hardware)

    @property
    def bad(self) -> tuple[str, ...]:
        """The nodes that the job should not use again."""
        return self.lost + tuple(node for node, _ in self.faults)


def ask(*command: str) -> tuple[bool, str]:
    """Whether a command of SLURM succeeds, and what it prints; its errors go to the job's log. It waits for the controller."""
    while True:
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        except OSError as error:
            write_line(f"error: {error_text(error)}", sys.stderr)
            return False, ""
        if done.stderr:
            write_line(done.stderr.rstrip("\n"), sys.stderr)
        waited = time.monotonic() - _began
        if done.returncode == 0 or waited > PATIENCE_SECONDS or not _NO_ANSWER.search(done.stderr):
            return done.returncode == 0, done.stdout
        time.sleep(AGAIN_SECONDS)


def task_of(job: str) -> str:
    """This process's job for `scontrol`, which takes the number of one task for the whole array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else job


def facts_of(job: str) -> dict[str, str]:
    """What SLURM knows of a job; empty if it does not answer."""
    return requeue.find_facts(ask("scontrol", "show", "job", "-o", job)[1], job)


def state_of(job: str) -> str:
    """PENDING, RUNNING ... of a job; "UNKNOWN" if SLURM does not answer, "" if the job has ended."""
    try:  # %A: squeue lists all tasks of an array under the number of one of them
        done = subprocess.run(("squeue", "-h", "-o", "%A %T", "-j", job), capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return "UNKNOWN"
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else "UNKNOWN"
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()).get(job, "")


def has_dependents(job: str) -> bool:
    """Whether another job waits for the result of this one (afterok), or may wait, for SLURM does not answer."""
    answered, waiting = ask("squeue", "-h", "-o", "%E")
    return not answered or re.search(rf"afterok:{job}(?!\d)", waiting) is not None


def host_names(nodes: str) -> list[str]:
    """The names of "node[1-2]"."""
    return ask("scontrol", "show", "hostnames", nodes)[1].split() if nodes else []


def nodes_of_job() -> list[str]:
    """The nodes that this process's job was given, in their order."""
    return host_names(os.environ.get("SLURM_JOB_NODELIST", ""))


def exclude(job: str, bad: Sequence[str], old: str, least: int) -> str:
    """Keeps a waiting job from its bad nodes as well as from its `old` list, if enough others are left; the result in words."""
    nodes = ",".join([*bad, *([old] if old not in ("", "(null)") else [])])
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    working = ask("sinfo", "-h", "-N", "-p", partition, "-t", "idle,alloc,mix,comp", "-o", "%N")[1].split()
    left = len({*working} - {*host_names(nodes)})
    if left < least:
        return f"; {','.join(bad)} stays: without it there are {left} nodes for {least}"
    ask("scontrol", "update", f"JobId={task_of(job)}", f"ExcNodeList={nodes}")
    return f" without {nodes}"


def check(job: str, seconds: float, known: Collection[str] = ()) -> JobNodes:
    """Asks SLURM and each node of a job how it is; no node is lost if nobody answers.

    Args:
        seconds: the age of the oldest line of a kernel's log that counts.
        known: nodes that need not be asked.
    """
    given = [node for node in nodes_of_job() if node not in known]
    if not given:
        return JobNodes()
    answered, still = ask("squeue", "-h", "-j", job, "-o", "%N")
    kept = set(host_names(still.strip())) if answered else set(given)
    states = [line.split() for line in ask("sinfo", "-h", "-N", "-n", ",".join(given), "-o", "%N %T")[1].splitlines()]
    down = {words[0] for words in states if len(words) == 2 and _DOWN.fullmatch(words[1])}
    asked = [node for node in given if node in kept and node not in down]
    answers = _answers(asked, seconds) if asked else {}
    silent = {node for node in asked if node not in answers} if answers else set()
    lost = tuple(node for node in given if node not in kept or node in down or node in silent)
    faults = tuple((node, fault) for node, fault in answers.items() if fault)
    return JobNodes(lost, faults)


def _answers(nodes: Sequence[str], seconds: float) -> dict[str, str]:
    """What the kernel of each node that answers says of broken hardware; "" if nothing."""
    n = len(nodes)
    command = ["srun", f"--nodes={n}", f"--nodelist={','.join(nodes)}", f"--ntasks={n}", "--ntasks-per-node=1", "--cpu-bind=none"]
    command += ["--overlap", "--kill-on-bad-exit=0", "python", "-m", "igpt_ds.ops.kernel_log", "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=ANSWER_SECONDS)
        printed = done.stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
    except OSError:
        return {}
    lines = (line.split(": ", 2) for line in printed.decode(errors="replace").splitlines() if line.startswith("node: "))
    return {words[1]: words[2] if len(words) == 3 else "" for words in lines}
