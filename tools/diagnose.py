"""Collects what is left of a run that hangs or died, says what it looks like, and packs it into one file to send.

    python tools/diagnose.py --job_id 1234 runs/s --logs logs/pretrain-1234.out

Who is behind by the heartbeats; the Python stacks of ranks that live, on this node and, with --job_id (or inside the job), on its
other nodes through `srun --overlap`; logs, torch's flight recorder, what the kernel says of memory and GPUs; exit statuses in
words. py-spy is used where it is installed, else ranks are asked by SIGUSR2, which ends none. The report is written beside the
run directory as RUN_DIR-diagnosis-DATE.tar.gz.
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
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.files import atomic_file
from igpt_ds.ops.diagnose import behind, catches, clues, errors, failures, likely_causes, process_state
from igpt_ds.ops.status import describe, read_lost, read_status

TAIL_BYTES, MOST_BYTES = 1 << 20, 1 << 28  # of a log; of a file that is packed whole
STACK_SECONDS = 3.0  # that a rank has to write its stacks
KERNEL = re.compile(r"oom|out of memory|xid|nvrm|segfault|i/o error|hung_task|blocked for more than", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> None:
    """Asks the ranks, reads the logs, judges, packs, prints."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what train.py got as --run_dir")
    parser.add_argument(
        "--logs", type=Path, nargs="+", default=[], help="logs of the job; those in RUN_DIR are found by themselves"
    )
    parser.add_argument("--job_id", default=os.environ.get("SLURM_JOB_ID"), help="SLURM job whose other nodes are asked too")
    parser.add_argument("--exit_code", type=int, help="status that the job ended with, to be explained")
    parser.add_argument("--here", action="store_true", help="ask the ranks on this node alone and print their states as JSON")
    args = parser.parse_args(argv)
    lost = read_lost(args.run_dir)  # first, since the next start removes it
    status = read_status(args.run_dir, time.time())
    states = ask_ranks_here(args.run_dir, status["ranks"])
    if args.here:
        print(json.dumps(states), flush=True)
        return
    elsewhere = {rank["host"] for rank in status["ranks"] if rank["host"]} - {socket.gethostname()}
    if elsewhere and args.job_id and shutil.which("srun"):
        states |= ask_other_nodes(args.run_dir, args.job_id, sorted(elsewhere))
    if status["state"] in ("running", "stopping", "hanging") and states and set(states.values()) == {"gone"}:
        status["state"] = "dead"  # for less than the minute after which a heartbeat counts as silent
    texts, kernel = read_logs(args.run_dir, args.logs), kernel_lines()
    failed = [line for name, text in texts.items() for line in failures(name, text.splitlines())]
    failed += errors(status["ranks"]) if status["state"] != "lost" else []  # that one error is in LOST.json
    found = [clue for name, text in texts.items() for clue in clues(name, text.splitlines())]
    waiting_for = behind(status["ranks"], states)
    causes = likely_causes(
        status["state"], waiting_for, failed, found, args.exit_code, lost if status["state"] == "lost" else None
    )
    if causes:  # the kernel's lines may be of another job, long ago
        causes += [f"{clue.cause} ({clue.where}: {clue.line})" for clue in clues("dmesg", kernel.splitlines())]
    texts |= {"dmesg": kernel}
    report = args.run_dir.with_name(f"{args.run_dir.resolve().name}-diagnosis-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    lines = [
        describe(status),
        f"first failure   {failed[0] if failed else 'none in logs and heartbeats'}",
        f"behind          {'; '.join(waiting_for) or 'nobody'}",
        f"likely cause    {causes[0] if causes else 'unknown'}",
        *(f"or              {cause}" for cause in causes[1:4]),
        f"read            {', '.join(name for name, text in texts.items() if text) or 'no logs'}",
    ]
    pack(report, args.run_dir, texts | {"summary.txt": "\n".join(lines) + "\n", "status.json": json.dumps(status, indent=1)})
    print("\n".join([*lines, f"report          {report}"]), flush=True)


def ask_ranks_here(run_dir: Path, ranks: list[dict[str, Any]]) -> dict[int, str]:
    """The state of each rank's process on this node; those that live leave their stacks in RUN_DIR/stacks."""
    here = [rank for rank in ranks if rank["host"] == socket.gethostname() and rank["pid"]]
    states = {rank["rank"]: process_state(rank["pid"]) for rank in here}
    if set(states.values()) - {"gone"}:
        (run_dir / "stacks").mkdir(exist_ok=True)
    asked = []
    for rank in here:
        file, pid = run_dir / "stacks" / f"rank-{rank['rank']}.live.txt", rank["pid"]
        if states[rank["rank"]] in ("gone", "Z"):
            continue
        if shutil.which("py-spy"):
            done = subprocess.run(["py-spy", "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True)
            file.write_text(done.stdout + done.stderr)
        elif is_python(pid) and catches(pid, signal.SIGUSR2):
            asked.append((file, file.stat().st_size if file.exists() else 0))
            os.kill(pid, signal.SIGUSR2)
    end = time.monotonic() + STACK_SECONDS
    while time.monotonic() < end and not all(file.exists() and file.stat().st_size > size for file, size in asked):
        time.sleep(0.05)
    return states


def is_python(pid: int) -> bool:
    """Whether a process runs train.py, and is not another one that got the number since."""
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ask_other_nodes(run_dir: Path, job: str, hosts: list[str]) -> dict[int, str]:
    """The same on other nodes of the job; a node that does not answer in half a minute tells nothing."""
    where = ["srun", "--overlap", "--jobid", job, "-w", ",".join(hosts), "-N", str(len(hosts)), "-n", str(len(hosts))]
    command = [*where, "--ntasks-per-node=1", sys.executable, __file__, str(run_dir.resolve()), "--here"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {int(rank): state for answer in answers for rank, state in answer.items()}


def read_logs(run_dir: Path, named: list[Path]) -> dict[str, str]:
    """The ends of the logs that were named, and of those that lie in the run directory."""
    kinds = ("*.log", "*.out", "*.err", "logs/**/*.log", "logs/**/*.out", "logs/**/std*")
    found = dict.fromkeys([*named, *(path for kind in kinds for path in sorted(run_dir.glob(kind)) if path.is_file())])
    return {str(path): tail(path) for path in found}


def tail(path: Path) -> str:
    """The last bytes of a text file."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode(errors="replace")


def kernel_lines() -> str:
    """What this node's kernel says of memory, GPUs and disks; "" where it may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "\n".join(line for line in done.stdout.splitlines() if KERNEL.search(line))[-TAIL_BYTES:]


def pack(report: Path, run_dir: Path, texts: dict[str, str]) -> None:
    """Writes the .tar.gz: the texts, and from the run directory what is small and tells something."""
    recorder = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    dumps = sorted(Path(recorder).parent.glob(f"{Path(recorder).name}*")) if recorder else []
    kinds = ("*.json", "heartbeat/*.json", "stacks/*", "fr/*")
    files = [path for kind in kinds for path in sorted(run_dir.glob(kind))]
    rows = run_dir / "train.jsonl"
    texts = texts | ({"train.jsonl": tail(rows)} if rows.exists() else {})
    with atomic_file(report) as out, tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in texts.items():
            content = text.encode()
            info = tarfile.TarInfo(f"diagnosis/{name.strip('/')}")
            info.size, info.mtime = len(content), int(time.time())
            tar.addfile(info, io.BytesIO(content))
        for path in [*files, *dumps]:
            if path.is_file() and path.stat().st_size <= MOST_BYTES:
                tar.add(path, f"diagnosis/run/{path.relative_to(run_dir) if path.is_relative_to(run_dir) else path.name}")


if __name__ == "__main__":
    cli.run(main)
