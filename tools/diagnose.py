"""Finds out why a run hangs or died, and packs the evidence into one file to send.

    python tools/diagnose.py --job_id 1234 runs/s --logs logs/pretrain-1234.out

It reads the heartbeats, the logs, torch's flight recorder and the kernel's messages about memory and GPUs. It collects the Python
stacks of live ranks on this node, and with --job_id (or inside the job) on its other nodes through `srun --overlap`. It uses
py-spy where that is installed; elsewhere it sends SIGUSR2, which does not end a rank. It prints the ranks that are behind, the
likely causes and the meaning of the exit status, and writes RUN_DIR-diagnosis-DATE.tar.gz beside the run directory.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.files import atomic_file, sweep_dated
from igpt_ds.ops.diagnose import behind, catches, clues, errors, failures, likely_causes, process_state
from igpt_ds.ops.rank_status import WATCH_SECONDS, RankStatus
from igpt_ds.ops.status import read_lost, read_status
from igpt_ds.ops.status_text import status_text
from igpt_ds.plain_files import beside, check_file, is_inside, open_plain

TAIL_BYTES, MOST_BYTES = 1 << 20, 1 << 28  # read of a log; size of the largest file that is packed
STACK_SECONDS = 3.0  # to wait for the stacks of a rank
_CALM = {  # the cause, by the run's state, when nothing points to one
    "finished": "none: the run has finished",
    "stopped": "none: the run stopped with everything saved; --resume auto continues it",
}
KERNEL = re.compile(r"oom|out of memory|xid|nvrm|segfault|i/o error|hung_task|blocked for more than", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> None:
    """Asks the ranks, reads the logs, finds causes, prints, packs."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="--run_dir of train.py or finetune.py")
    parser.add_argument("--logs", type=Path, nargs="+", default=[], help="logs of the job (logs in RUN_DIR are always read)")
    parser.add_argument(
        "--job_id",
        default=os.environ.get("SLURM_JOB_ID"),
        help="SLURM job whose other nodes are asked too (default: the job that this runs in)",
    )
    parser.add_argument("--exit_code", type=int, help="exit status of the job, to explain")
    parser.add_argument(
        "--here", action="store_true", help="ask only the ranks on this node, and print their process states as JSON"
    )
    args = parser.parse_args(argv)
    lost = read_lost(args.run_dir)  # first, since the next start removes it
    status = read_status(args.run_dir, time.time(), 0 if args.here else WATCH_SECONDS)
    states = ask_ranks_here(args.run_dir, status.ranks)
    if args.here:
        print(json.dumps(states), flush=True)
        return
    elsewhere = set(status.hosts) - {socket.gethostname()}
    if elsewhere and args.job_id and shutil.which("srun"):
        states |= ask_other_nodes(args.run_dir, args.job_id, sorted(elsewhere))
    if status.state in ("running", "stopping", "hanging") and states and set(states.values()) == {"gone"}:
        status = replace(status, state="dead")  # before the heartbeats are old enough to count as silent
    texts, kernel = read_logs(args.run_dir, args.logs), kernel_lines()
    failed = [line for name, text in texts.items() for line in failures(name, text.splitlines())]
    failed += errors(status.ranks) if status.state != "lost" else []  # LOST.json has that error
    found = [clue for name, text in texts.items() for clue in clues(name, text.splitlines())]
    waiting_for = behind(status.ranks, states)
    causes = likely_causes(status.state, waiting_for, failed, found, args.exit_code, lost if status.state == "lost" else None)
    if causes:  # last: the kernel's lines may be from an earlier job
        causes += [f"{clue.cause} ({clue.where}: {clue.line})" for clue in clues("dmesg", kernel.splitlines())]
    texts |= {"dmesg": kernel}
    report = beside(args.run_dir, f"-diagnosis-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    lines = [
        status_text(status),
        f"first failure   {failed[0] if failed else 'none in logs and heartbeats'}",
        f"behind          {'; '.join(waiting_for) or 'nobody'}",
        f"likely cause    {causes[0] if causes else _CALM.get(status.state, 'unknown')}",
        *(f"or              {cause}" for cause in causes[1:4]),
        f"read            {', '.join(name for name, text in texts.items() if text) or 'no logs'}",
    ]
    pack(
        report,
        args.run_dir,
        texts | {"summary.txt": "\n".join(lines) + "\n", "status.json": json.dumps(status.to_dict(), indent=1)},
    )
    print("\n".join([*lines, f"report          {report}"]), flush=True)


def ask_ranks_here(run_dir: Path, ranks: Sequence[RankStatus]) -> dict[int, str]:
    """The process state of each rank on this node. Live ranks write their stacks to RUN_DIR/stacks."""
    here = [rank.beat for rank in ranks if rank.beat and rank.beat.local and rank.beat.pid]
    states = {beat.rank: process_state(beat.pid) for beat in here}
    if set(states.values()) - {"gone"}:
        (run_dir / "stacks").mkdir(exist_ok=True)
    asked = []
    for beat in here:
        file, pid = run_dir / "stacks" / f"rank-{beat.rank}.live.txt", beat.pid
        if states[beat.rank] in ("gone", "Z"):
            continue
        if shutil.which("py-spy"):
            done = subprocess.run(
                ["py-spy", "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, encoding="utf-8", errors="replace"
            )
            with open(file, "w", encoding="utf-8", opener=open_plain) as out:
                out.write(done.stdout + done.stderr)
        elif is_python(pid) and catches(pid, signal.SIGUSR2):
            asked.append((file, file.stat().st_size if file.exists() else 0))
            os.kill(pid, signal.SIGUSR2)
    end = time.monotonic() + STACK_SECONDS
    while time.monotonic() < end and not all(file.exists() and file.stat().st_size > size for file, size in asked):
        time.sleep(0.05)
    return states


def is_python(pid: int) -> bool:
    """Whether a process runs train.py. An unrelated process may have the same number now."""
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ask_other_nodes(run_dir: Path, job: str, hosts: list[str]) -> dict[int, str]:
    """The same on other nodes of the job, without the nodes that do not answer in 30 seconds."""
    where = ["srun", "--overlap", "--jobid", job, "-w", ",".join(hosts), "-N", str(len(hosts)), "-n", str(len(hosts))]
    command = [*where, "--ntasks-per-node=1", sys.executable, __file__, str(run_dir.resolve()), "--here"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {int(rank): state for answer in answers for rank, state in answer.items()}


def read_logs(run_dir: Path, named: list[Path]) -> dict[str, str]:
    """The ends of the named logs and of the logs in the run directory."""
    kinds = ("*.log", "*.out", "*.err", "logs/**/*.log", "logs/**/*.out", "logs/**/std*")
    for path in named:
        check_file(path)
    found = dict.fromkeys([*named, *(path for kind in kinds for path in sorted(run_dir.glob(kind)) if _is_ours(path, run_dir))])
    return {str(path): tail(path) for path in found}


def _is_ours(path: Path, run_dir: Path) -> bool:
    """Whether a path is a file in the run directory. A link may lead to a file that must not be sent."""
    ours = is_inside(path, run_dir)
    if not ours and not path.is_dir():
        print(f"left out: {path} is no file of {run_dir}", file=sys.stderr)
    return ours


def tail(path: Path) -> str:
    """The last bytes of a text file."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode(errors="replace")


def kernel_lines() -> str:
    """The kernel's messages about memory, GPUs and disks on this node; "" without permission to read them."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "\n".join(line for line in done.stdout.splitlines() if KERNEL.search(line))[-TAIL_BYTES:]


def pack(report: Path, run_dir: Path, texts: dict[str, str]) -> None:
    """Writes the .tar.gz: the texts, and the small useful files of the run directory."""
    recorder = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    dumps = sorted(Path(recorder).parent.glob(f"{Path(recorder).name}*")) if recorder else []
    kinds = ("*.json", "restarts.jsonl", "heartbeat/*.json", "stacks/*", "flight_recorder/*")
    files = [path for kind in kinds for path in sorted(run_dir.glob(kind)) if _is_ours(path, run_dir)]
    rows = run_dir / "train.jsonl"
    texts = texts | ({"train.jsonl": tail(rows)} if is_inside(rows, run_dir) else {})
    sweep_dated(report)
    with atomic_file(report) as out, tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in texts.items():
            content = text.encode("utf-8", "backslashreplace")
            info = tarfile.TarInfo(f"diagnosis/{name.strip('/')}")
            info.size, info.mtime = len(content), int(time.time())
            tar.addfile(info, io.BytesIO(content))
        for path in dict.fromkeys([*files, *dumps]):
            if path.is_file() and path.stat().st_size <= MOST_BYTES:
                tar.add(path, f"diagnosis/run/{path.relative_to(run_dir) if path.is_relative_to(run_dir) else path.name}")


if __name__ == "__main__":
    cli.run(main)
