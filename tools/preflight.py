"""Checks every node before a long run: is it up, fast, equal to the others, and does it reach the data and the disk?

    srun python tools/preflight.py --recipe igpt_s_ar_32 --data shards/imagenet_32 --run_dir runs/s --json runs/s/preflight.json

It takes the arguments of train.py and starts like train.py: with `srun` (one task per GPU or per node), `torchrun`, `deepspeed`
or plain `python`. In less than a minute it prints a table of the nodes and each finding with what to do, and

    bad_nodes: node3,node7

if some nodes are not fit (for `sbatch --exclude`). Exit status: 0 all checks passed; 3 bad nodes; 2 bad input on all nodes.
A node that never answers or hangs is a finding: each stage waits for at most --timeout_s seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from igpt_ds import cli, launcher
from igpt_ds.command_line import lazy
from igpt_ds.ds_config import load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file
from igpt_ds.json_files import write_json
from igpt_ds.ops.preflight import verdict
from igpt_ds.ops.preflight.record import NodeReport, report_from_dict
from igpt_ds.ops.preflight.report import result_text
from igpt_ds.train.flags import choose_recipe, parse

with lazy.imports():
    from igpt_ds import dist
    from igpt_ds.ops.preflight.board import Board
    from igpt_ds.ops.preflight.node import PlannedRun, attempt, host_of_rank, run_node_checks
    from igpt_ds.ops.preflight.ranks import all_reduce_speed, clock_offset, link_speeds, training_step
    from igpt_ds.train.engine import start_ranks


STAGES = 4  # each waits at most --timeout_s: arrival, checks alone, checks together, end


def main(argv: Sequence[str] | None = None) -> None:
    """Starts the checks of this rank, and on rank 0 compares the reports of all."""
    start = time.monotonic()
    args = parse(__doc__ or "", argv, add_flags)
    if not args.timeout_s > 0:
        raise InputError(f"--timeout_s {args.timeout_s:g} must be more than 0 seconds")
    if args.dry_run:
        raise InputError("--dry_run checks no nodes; give it to train.py")
    lazy.load()
    launcher.map_environment(os.environ)
    ranks = args.ranks or dist.world_size()
    recipe = partial(choose_recipe, args)
    plan = PlannedRun(
        recipe,
        args.ds_config,
        tuple(args.data),
        args.run_dir,
        ranks,
        args.micro_batch,
        args.keep_last + len(args.keep_steps),
        args.keep_every,
        args.val_split.split("+") if args.stream else None,
    )
    try:
        board = Board(args.timeout_s)
    except ConnectionError as error:
        leave(without_rank_0(error))
    # The checks may hang despite their time limits, so they run in another thread than the one that waits for them.
    threading.Thread(target=work, args=(plan, board, args.timeout_s), daemon=True).start()
    leave(conduct(plan, board, args, start) if dist.rank() == 0 else follow(board, args.timeout_s))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py does not have."""
    own = parser.add_argument_group("of the preflight")
    own.add_argument("--timeout_s", type=float, default=60.0, help="longest wait for a rank in each stage, in seconds")
    own.add_argument("--ranks", type=int, help="number of ranks of the planned run (default: the ranks of this preflight)")
    own.add_argument("--json", type=Path, help="file for the full result as JSON")


def work(plan: PlannedRun, board: Board, seconds: float) -> None:
    """The checks of every rank: first alone, then together if rank 0 says so."""
    board.say("arrived", launcher.node_name())
    if dist.rank() == 0:
        board.say("mark", leave_mark(plan.run_dir))
    mark = board.collect("mark", [0], seconds).get(0, "")
    report = run_node_checks(plan, mark, partial(board.say, "phase"))
    board.say("report", report.to_dict())
    nodes = board.collect("go", [0], STAGES * seconds).get(0)
    if not nodes:
        return
    board.say("phase", "joining the process group")
    report = attempt(report, "device", lambda: str(start_ranks()))
    if report.device:
        import torch

        device = torch.device(report.device)
        checks: dict[str, Callable[[], Any]] = {
            "clock": clock_offset,
            "all_reduce": partial(all_reduce_speed, device),
            "links": partial(link_speeds, device, nodes),
            "step": lambda: training_step(plan.recipe(), load_ds_config(plan.ds_config)),
        }
        for check, find_out in checks.items():
            board.say("phase", check)
            report = attempt(report, check, find_out)
    board.say("together", report.to_dict())


def leave_mark(run_dir: Path) -> str:
    """Writes a file by which other nodes recognize the run directory. Returns its name, or "" if that fails."""
    mark = f".preflight-{uuid.uuid4().hex}"
    try:
        with atomic_file(run_dir / mark, "w") as file:
            file.write("all nodes should see this\n")
    except OSError:
        return ""
    return mark


def conduct(plan: PlannedRun, board: Board, args: argparse.Namespace, start: float) -> int:
    """Rank 0 collects and compares the reports, prints the result and posts it. Returns the exit status."""
    everybody, seconds = range(dist.world_size()), args.timeout_s
    nodes: dict[int, str] = board.collect("arrived", everybody, seconds)
    absent = {rank: f"within {seconds:g} s" for rank in everybody if rank not in nodes}
    reports = {rank: read_report(found, rank, nodes[rank]) for rank, found in board.collect("report", nodes, seconds).items()}
    silent = {rank: f"in {board.heard('phase', rank)!r}" for rank in nodes if rank not in reports}
    stops = {"recipe", "ds_config", "accelerator", "gpus", "packages", "code"}
    alike = len({report.accelerator for report in reports.values()}) == 1
    if not absent and not silent and alike and not any(stops & set(report.errors) for report in reports.values()):
        board.say("go", [nodes[rank] for rank in everybody])
        for rank, found in board.collect("together", everybody, seconds).items():
            reports[rank] = read_report(found, rank, nodes[rank])
        silent = {rank: f"in {board.heard('phase', rank)!r}" for rank in everybody if board.heard("together", rank) is None}
    nodes = dict(sorted((nodes | {rank: place(rank, nodes) for rank in absent}).items()))
    if mark := board.heard("mark", 0):
        (plan.run_dir / mark).unlink(missing_ok=True)
    result = verdict.compare_reports(nodes, reports, absent, silent)
    print(result_text(result, time.monotonic() - start), flush=True)
    if args.json is not None:
        write_json(args.json, result.to_dict())
    board.say("end", result.status)
    board.collect("left", [rank for rank in everybody if rank and rank not in absent], 2.0)  # this process hosts the board
    return result.status


def read_report(values: Any, rank: int, node: str) -> NodeReport:
    """A rank's report. A report of another version of the code is an error of that node and not of this program."""
    try:
        return report_from_dict(values)
    except InputError as error:
        return NodeReport(rank, 0, node, errors={"code": str(error)})


def place(rank: int, nodes: dict[int, str]) -> str:
    """The node of a rank that never arrived, from SLURM or from its neighbours; a made-up name if neither knows."""
    if name := host_of_rank(rank, os.environ):
        return name
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    near = [nodes[other] for other in range(rank // beside * beside, (rank // beside + 1) * beside) if other in nodes]
    return near[0] if near else f"node-of-rank-{rank}"


def follow(board: Board, seconds: float) -> int:
    """The other ranks wait for the exit status of rank 0 and return it."""
    try:
        status = board.collect("end", [0], STAGES * seconds).get(0, verdict.BAD_NODES)
        board.say("left", True)
    except (RuntimeError, OSError):  # rank 0 ended, and the board with it
        return verdict.BAD_NODES
    return int(status)


def without_rank_0(error: ConnectionError) -> int:
    """Reports that rank 0 never arrived. The first rank of each node prints it."""
    if dist.local_rank() == 0:
        node = host_of_rank(0, os.environ) or os.environ["MASTER_ADDR"]
        print(f"{node} (rank 0): arrival: {error}; {verdict.FIXES['arrival']}\nbad_nodes: {node}", flush=True)
    return verdict.BAD_NODES


def leave(status: int) -> None:
    """Ends this process at once: a hung check in another thread would keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    cli.run(main, ranks=True)
