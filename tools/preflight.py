"""Looks at every node before a long run: is it up, alike, fast, and does it reach the data and the disk?

    srun python tools/preflight.py --recipe igpt_s_ar_32 --data shards/imagenet_32 --run_dir runs/s --json runs/s/preflight.json

It takes the arguments of train.py, and starts as train.py does: by `srun` with one task for each GPU or each node, `torchrun`,
`deepspeed`, or plain `python`. Below a minute it prints a table of the nodes, each finding with what to do, and

    bad_nodes: node3,node7

where some nodes are not fit (for `sbatch --exclude`). Exit status: 0 all is well; 3 bad nodes; 2 bad input that all nodes share.
Neither a node that never answers nor one that hangs makes it wait for longer than --timeout_s at each stage: they are findings.
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

from igpt_ds import cli, dist
from igpt_ds.ds_config import load_ds_config
from igpt_ds.files import atomic_file, write_json
from igpt_ds.ops.preflight import verdict
from igpt_ds.ops.preflight.board import RollCall
from igpt_ds.ops.preflight.node import Plan, attempt, host_of_rank, look_around, node_name
from igpt_ds.ops.preflight.ranks import all_reduce_speed, clock_offset, link_speeds, training_step
from igpt_ds.ops.preflight.report import describe
from igpt_ds.train.engine import start_ranks
from igpt_ds.train.flags import choose_recipe, parse

STAGES = 4  # that each wait --timeout_s at most: coming, looking around, working together, leaving


def main(argv: Sequence[str] | None = None) -> None:
    """The story: come together, look around, work together, judge."""
    start = time.monotonic()
    args = parse(__doc__ or "", argv, add_flags)
    if not args.timeout_s > 0:
        raise ValueError(f"--timeout_s {args.timeout_s:g} must be more than 0 seconds")
    if args.dry_run:
        raise ValueError("--dry_run has no nodes to look at; give it to train.py")
    dist.map_environment(os.environ)
    ranks = args.ranks or dist.world_size()
    recipe = partial(choose_recipe, args)
    plan = Plan(
        recipe,
        args.ds_config,
        tuple(args.data),
        args.run_dir,
        ranks,
        args.micro_batch,
        args.keep_last,
        args.keep_every,
        args.val_split.split("+") if args.stream else None,
    )
    try:
        board = RollCall(args.timeout_s)
    except ConnectionError as error:
        leave(without_rank_0(error))
    # The work may hang, whatever time limits it has; so another thread than the one that waits for it does it.
    threading.Thread(target=work, args=(plan, board, args.timeout_s), daemon=True).start()
    leave(conduct(plan, board, args, start) if dist.rank() == 0 else follow(board, args.timeout_s))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What train.py has no use for."""
    own = parser.add_argument_group("of the preflight")
    own.add_argument("--timeout_s", type=float, default=60.0, help="seconds that each stage waits for a rank at most")
    own.add_argument("--ranks", type=int, help="of the run to come; as many as there are here when left out")
    own.add_argument("--json", type=Path, help="file to write everything to that was found out")


def work(plan: Plan, board: RollCall, seconds: float) -> None:
    """What every rank does: comes, looks around, and works with the others when rank 0 says so."""
    board.say("arrived", node_name())
    if dist.rank() == 0:
        board.say("mark", leave_mark(plan.run_dir))
    mark = board.collect("mark", [0], seconds).get(0, "")
    report = look_around(plan, mark, partial(board.say, "phase"))
    board.say("report", report)
    nodes = board.collect("go", [0], STAGES * seconds).get(0)
    if not nodes:
        return
    together: dict[str, Any] = {"errors": {}}
    board.say("phase", "joining the process group")
    attempt(together, "device", lambda: str(start_ranks()))
    if device := together.get("device"):
        import torch

        checks: dict[str, Callable[[], Any]] = {
            "clock": clock_offset,
            "all_reduce": partial(all_reduce_speed, torch.device(device)),
            "links": partial(link_speeds, torch.device(device), nodes),
            "step": lambda: training_step(plan.recipe(), load_ds_config(plan.ds_config)),
        }
        for what, find_out in checks.items():
            board.say("phase", what)
            attempt(together, what, find_out)
    board.say("together", together)


def leave_mark(run_dir: Path) -> str:
    """Writes a file by which other nodes know the run directory; its name, or "" where that fails (which is looked at later)."""
    mark = f".preflight-{uuid.uuid4().hex}"
    try:
        with atomic_file(run_dir / mark, "w") as file:
            file.write("all nodes should see this\n")
    except OSError:
        return ""
    return mark


def conduct(plan: Plan, board: RollCall, args: argparse.Namespace, start: float) -> int:
    """What rank 0 does besides: learns who is there and what they found, judges, and tells; returns the exit status."""
    everybody, seconds = range(dist.world_size()), args.timeout_s
    nodes: dict[int, str] = board.collect("arrived", everybody, seconds)
    absent = {rank: f"within {seconds:g} s" for rank in everybody if rank not in nodes}
    reports: dict[int, dict[str, Any]] = board.collect("report", nodes, seconds)
    silent = {rank: f"in {board.heard('phase', rank)!r}" for rank in nodes if rank not in reports}
    stops = {"recipe", "ds_config", "gpus", "packages"}
    if not absent and not silent and not any(stops & set(report["errors"]) for report in reports.values()):
        board.say("go", [nodes[rank] for rank in everybody])
        for rank, found in board.collect("together", everybody, seconds).items():
            reports[rank] |= found | {"errors": reports[rank]["errors"] | found["errors"]}
        silent = {rank: f"in {board.heard('phase', rank)!r}" for rank in everybody if board.heard("together", rank) is None}
    nodes = dict(sorted((nodes | {rank: place(rank, nodes) for rank in absent}).items()))
    if mark := board.heard("mark", 0):
        (plan.run_dir / mark).unlink(missing_ok=True)
    judged = verdict.judge(nodes, reports, absent, silent)
    print(describe(judged, time.monotonic() - start), flush=True)
    if args.json is not None:
        write_json(args.json, judged.to_dict())
    board.say("end", judged.status)
    board.collect("left", [rank for rank in everybody if rank and rank not in absent], 2.0)  # the board goes with us
    return judged.status


def place(rank: int, nodes: dict[int, str]) -> str:
    """The node of a rank that never came: SLURM knows, or the ranks beside it, or nobody."""
    if name := host_of_rank(rank, os.environ):
        return name
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    near = [nodes[other] for other in range(rank // beside * beside, (rank // beside + 1) * beside) if other in nodes]
    return near[0] if near else f"node-of-rank-{rank}"


def follow(board: RollCall, seconds: float) -> int:
    """What the other ranks do besides: wait for the verdict of rank 0; returns the exit status."""
    try:
        status = board.collect("end", [0], STAGES * seconds).get(0, verdict.BAD_NODES)
        board.say("left", True)
    except (RuntimeError, OSError):  # rank 0 has gone, with the board
        return verdict.BAD_NODES
    return int(status)


def without_rank_0(error: ConnectionError) -> int:
    """What is left to say where rank 0 never came: the first rank of each node says it."""
    if dist.local_rank() == 0:
        node = host_of_rank(0, os.environ) or os.environ["MASTER_ADDR"]
        print(f"{node} (rank 0): arrival: {error}; {verdict.FIXES['arrival']}\nbad_nodes: {node}", flush=True)
    return verdict.BAD_NODES


def leave(status: int) -> None:
    """Ends this process at once: a check that hangs in another thread would keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    cli.run(main)
