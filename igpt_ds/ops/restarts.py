"""Begins and ends each start of a batch job: whose the run is, what is written down, and whether SLURM queues the job again.

slurm/launch.sh runs it in the job, at the repository root, with TERM and USR1 ignored. The standard library is enough.

    python -m igpt_ds.ops.restarts begin --run_dir RUN_DIR --nodes 'node[1-2]' --ranks 8
    python -m igpt_ds.ops.restarts outcome --status 1 --errors FILE --seconds 600
    python -m igpt_ds.ops.restarts again --run_dir RUN_DIR --nodes 'node[1-2]' --status 1 --bad node2 --errors FILE
    python -m igpt_ds.ops.restarts finish --run_dir RUN_DIR --nodes 'node[1-2]' --status 85 --errors FILE
    python -m igpt_ds.ops.restarts number --run_dir RUN_DIR
    python -m igpt_ds.ops.restarts cause < LOG

`begin` and `finish` exit with the status of the job; after a 0 of `begin` the ranks may start. `outcome` prints the status of the
ranks and the bad nodes, `cause` the first error of a log. `again` prints the nodes for another start inside the same job; if it
prints none, `finish` ends the job. RUN_DIR/owner names the start that may write checkpoints; IGPT_DS_OWNER is a rank's own start.
Both are JOB.RESTART, and `number` prints the RESTART of the next start. RUN_DIR/restarts.jsonl has a row for each start and each
end (restart_log.py).

A job that was asked to stop by RUN_DIR/STOP ends with status 0, unless other jobs wait for its result (afterok): then with 85, so
that SLURM cancels them. `begin` exits with 85 if the job must end with 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from igpt_ds import cli
from igpt_ds.errors import InputError, error_text
from igpt_ds.files import atomic_file
from igpt_ds.ops import requeue, slurm
from igpt_ds.ops.requeue import BAD_INPUT, End, Start
from igpt_ds.ops.restart_log import (
    images_at_starts,
    newest_images,
    next_restart,
    read_text,
    record,
    record_end,
    record_lost_ends,
    time_of_last_start,
    write_line,
)
from igpt_ds.ops.slurm import ask, facts_of, has_dependents, state_of
from igpt_ds.train.ledger.rows import read_time, timestamp

OWNER_TRIES, OWNER_SECONDS, LOCK_TRIES, LOCK_SECONDS = 60, 5.0, 60, 1.0  # how often, and after how long, the owner is asked for
LOCK_BROKEN, LOCK_MISSING = 30, 5  # tries: then the lock is a killed process's; without a lock, the disk cannot be written
AGAIN_SECONDS = 60.0  # before a second start in a row without a new checkpoint: what was wrong may pass

_NEEDED = "; it ends as FAILED, so that SLURM cancels the jobs that need its result"


def say(start: Start, words: str, log: TextIO | None = None) -> None:
    """A line of the job's log."""
    write_line(f"== {datetime.now():%Y-%m-%dT%H:%M:%S} job {start.job}, restart {start.restart}: {words}", log or sys.stdout)


def take(start: Start) -> None:
    """Makes a start the owner of its run directory. Of two jobs that start at the same time one waits.

    Raises:
        ValueError: another job owns it.
        OSError: the disk cannot be written.
    """
    start.run_dir.mkdir(parents=True, exist_ok=True)
    path, guard = start.run_dir / "owner", start.run_dir / "owner.lock"
    for tries in range(1, OWNER_TRIES + 1):
        lock(guard)
        try:
            owner = path.read_text(encoding="utf-8", errors="replace").strip().rpartition(".")[0] if path.exists() else ""
            state = state_of(owner) if owner not in ("", start.job) else ""
            if not state:
                with atomic_file(path, "w") as file:
                    file.write(f"{start.job}.{start.restart}\n")
                return
        finally:
            with contextlib.suppress(OSError):
                guard.rmdir()
        # The other job's last ranks may still be saving, or the controller does not answer.
        if state not in ("COMPLETING", "UNKNOWN") or tries == OWNER_TRIES:
            raise InputError(f"job {owner} ({state}) still uses {start.run_dir}; cancel it, or choose another --run_dir")
        time.sleep(OWNER_SECONDS)


def lock(path: Path) -> None:
    """Makes the directory `path`, which only one job can.

    Raises:
        OSError: the disk cannot be written, or another job keeps the lock.
    """
    missing = 0
    for tries in range(1, LOCK_TRIES + 1):
        try:
            path.mkdir()
            return
        except OSError:
            missing += not path.is_dir()  # a lock may have been removed at this moment
            if missing == LOCK_MISSING or tries == LOCK_TRIES:
                raise
        if tries == LOCK_BROKEN:
            with contextlib.suppress(OSError):
                path.rmdir()
        time.sleep(LOCK_SECONDS)


def stop_requested(start: Start) -> bool:
    """Whether RUN_DIR/STOP is for this start. A file from before the job's submission was for another job, and is removed."""
    stop = start.run_dir / "STOP"
    if not stop.exists():
        return False
    since = (start.restart and time_of_last_start(start.run_dir)) or _submitted(start)
    if since is None or stop.stat().st_mtime > since:
        return True
    say(start, f"removed {stop}, which is older than this job")
    stop.unlink(missing_ok=True)
    return False


def _submitted(start: Start) -> float | None:
    return read_time(facts_of(start.job).get("SubmitTime"))  # which SLURM tells without a time zone


def begin(start: Start, ranks: int, hostfile: Path) -> int:
    """Makes the run the job's own and writes down the start; 0, or the status of the job.

    Raises:
        ValueError: another job owns the run.
    """
    try:
        take(start)
        stop = stop_requested(start)
        record_lost_ends(start)
        if stop:
            record_end(start, cli.STOPPED, reason := "it was asked to stop before it started")
            needed = has_dependents(start.job)
            words = f"{start.run_dir}/STOP exists; submit again to continue{_NEEDED if needed else ''}"
            say(start, f"{reason}; not queued again: {words}")
            return 1 if needed else cli.STOPPED
        nodes = slurm.host_names(start.nodes)
        with atomic_file(hostfile, "w") as file:
            file.writelines(f"{node} slots={ranks}\n" for node in nodes)
        submitted = _submitted(start)
        record(start, "start", submitted="" if submitted is None else timestamp(submitted))
        images = images_at_starts(start)
    except OSError as error:
        write_line(f"error: {error_text(error)}", sys.stderr)
        fruitless = requeue.count_fruitless(images_at_starts(start))
        return finish(start, End(1, fruitless=fruitless, reason=f"{start.run_dir} cannot be written"))
    if (fruitless := requeue.count_fruitless(images)) > start.max_fruitless:
        record_end(start, 1, reason := f"{fruitless - 1} starts in a row brought no new checkpoint; SLURM ended the last one")
        say(start, f"{reason}; not queued again")
        return 1
    say(start, f"start on {start.nodes}, {ranks} ranks a node, after {images[-1]} images")
    return 0


def outcome(status: int, errors: str, seconds: float, gone: Sequence[str], lost: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """The status of the ranks, and the nodes not to use again: a rank died there, or the node is lost or its hardware broken.

    Args:
        gone: nodes for which the ranks of the others were killed (node_watch.py). lost: those that earlier starts left out.
    """
    status, killed = requeue.find_outcome(status, errors)
    killed = tuple(gone) or killed
    if status in (0, cli.STOPPED, BAD_INPUT):
        return status, killed
    nodes = slurm.check(os.environ["SLURM_JOB_ID"], seconds, {*gone, *lost})
    for node, fault in nodes.faults:
        write_line(f"fault: {node}: {fault}", sys.stderr)
    if nodes.lost:
        write_line(f"lost: {' '.join(nodes.lost)}", sys.stderr)
    return status, tuple(dict.fromkeys(killed + nodes.bad))


def again(start: Start, end: End, lost: Sequence[str], least: int) -> list[str]:
    """The nodes of the job that the run starts on again, at once; none if the job ends, queues again, or too few are left.

    Args:
        lost: nodes that earlier starts of the job left out.
        least: the fewest nodes that may train.
    """
    if end.status in (0, cli.STOPPED):
        return []
    stop = (start.run_dir / "STOP").exists()
    if not requeue.decide(start, end, facts_of(start.job).get("JobState", ""), stop, "").requeue:
        return []
    reason, bad = requeue.explain(end, start.run_dir), {*end.bad, *lost}
    left = [node for node in slurm.nodes_of_job() if node not in bad]
    if len(left) < least:
        say(start, f"{len(left)} nodes of the job are left for {least}", sys.stderr)
        return []
    record_end(start, end.status, reason, end.bad)
    say(start, f"{reason}; starts again inside the job{' without ' + ','.join(sorted(bad)) if bad else ''}", sys.stderr)
    if not end.gained and end.fruitless > 1:
        time.sleep(AGAIN_SECONDS)
    return left


def finish(start: Start, end: End, signal_option: str | None = None, least_nodes: int = 1, lost: Sequence[str] = ()) -> int:
    """Writes down how a start ended, and queues the job again or says why not; the status of the job.

    Args:
        signal_option: the value of sbatch's --signal, if the job got USR1.
        lost: nodes that earlier starts of the job left out.
    """
    reason, status = requeue.explain(end, start.run_dir), end.status or int(not end.finished)
    record_end(start, status, reason, end.bad)
    if status == 0:
        say(start, reason)
        return 0
    facts = facts_of(start.job)
    too_late = "" if signal_option is None else requeue.always_too_late(facts, signal_option)
    stop = (start.run_dir / "STOP").exists()
    decision = requeue.decide(start, end, facts.get("JobState", ""), stop, too_late)
    asked = stop and status == cli.STOPPED and facts.get("JobState") == "RUNNING"
    needed = asked and has_dependents(start.job)
    bad = tuple(dict.fromkeys((*end.bad, *lost)))
    if not (decision.requeue and bad):
        say(start, f"{reason}; {decision.words}{_NEEDED if needed else ''}")
    if not decision.requeue:
        return 0 if asked and not needed else status
    if not ask("scontrol", "requeue", slurm.task_of(start.job))[0]:  # then SLURM ends this process
        return 1
    if bad:  # only a waiting job takes another list of nodes
        say(start, f"{reason}; {decision.words}{slurm.exclude(start.job, bad, facts.get('ExcNodeList', ''), least_nodes)}")
    return status


def signal_option(script: Path) -> str:
    """The value of sbatch's --signal. SLURM does not tell it to a job: it is unknown if only the command line had it."""
    found = re.search(r"^#SBATCH --signal=(.*)", read_text(script), re.M)
    return os.environ.get("SBATCH_SIGNAL") or (found[1] if found else "")


def main(argv: Sequence[str] | None = None) -> None:
    """One action of the docstring."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("action", choices=("begin", "outcome", "again", "finish", "cause", "number"))
    parser.add_argument("--run_dir", type=Path, help="the run directory")
    parser.add_argument("--nodes", help="nodes of the ranks, as SLURM lists them")
    parser.add_argument("--ranks", type=int, help="ranks of a node")
    parser.add_argument("--max_fruitless", type=int, default=3, help="starts in a row that may end without a new checkpoint")
    parser.add_argument("--least_nodes", type=int, default=1, help="fewest nodes that the job can use")
    parser.add_argument("--status", type=int, default=0, help="exit status of srun, or of the ranks")
    parser.add_argument("--errors", type=Path, help="file with the error output of srun")
    parser.add_argument("--bad", default="", help="bad nodes of this start, with commas between them")
    parser.add_argument("--lost", default="", help="nodes that earlier starts of the job left out, the same way")
    parser.add_argument("--restart", type=int, help="number of the start (default: SLURM_RESTART_COUNT)")
    parser.add_argument("--seconds", type=float, default=600.0, help="age of the oldest line of a kernel's log that counts")
    parser.add_argument("--early", type=int, default=0, help="1: status 0 means finished, also without RUN_DIR/FINISHED")
    parser.add_argument("--usr1", type=Path, help="the batch script, if the job got USR1")
    args = parser.parse_args(argv)
    errors = read_text(args.errors) if args.errors else ""
    if args.action == "cause":
        return print(requeue.find_cause(sys.stdin.buffer.read().decode(errors="replace")))
    if args.action == "outcome":
        status, bad = outcome(args.status, errors, args.seconds, _names(args.bad), _names(args.lost))
        return print(status, ",".join(bad))
    job, counted = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if args.action == "number":
        return print(next_restart(args.run_dir, job, counted))
    restart = counted if args.restart is None else args.restart
    start = Start(args.run_dir, job, restart, args.nodes, args.max_fruitless)
    if args.action == "begin":
        sys.exit(begin(start, args.ranks, Path(os.environ["HOSTFILE"])))
    images = images_at_starts(start)
    end = End(
        args.status,
        finished=bool(args.early) or (start.run_dir / "FINISHED").exists(),
        gained=newest_images(start.run_dir) > images[-1],
        fruitless=requeue.count_fruitless(images),
        bad=_names(args.bad),
        cause=requeue.find_cause(errors),
    )
    if args.action == "again":
        return print(*again(start, end, _names(args.lost), args.least_nodes))
    sys.exit(finish(start, end, signal_option(args.usr1) if args.usr1 else None, args.least_nodes, _names(args.lost)))


def _names(nodes: str) -> tuple[str, ...]:
    """The names between commas."""
    return tuple(node for node in nodes.split(",") if node)


if __name__ == "__main__":
    cli.run(main)
