"""Rehearses interruptions: an undisturbed run and a run that is killed at random moments must end with the same weights.

    python tools/rehearse.py --out runs/rehearsal -- deepspeed train.py --recipe digits_nano_ar_8 --data shards --save_every 50

After `--` follows a training command without --run_dir and --resume. Its run is interrupted in turn by kill -9 of one rank, kill
-9 of all ranks, and USR1, at moments drawn with --seed, and restarted each time. Exit status: 0 if losses and weights agree, 1 if
they differ or if a start finds no checkpoint. On a CPU in fp32 they are bit-equal. Some GPU kernels are not deterministic, so
--tolerance allows a difference of the losses.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.console import duration
from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines, write_json
from igpt_ds.ops.compare import compare_runs
from igpt_ds.plain_files import open_plain
from igpt_ds.train.heartbeat import all_heartbeats

WAYS = {"kill -9 of one rank": signal.SIGKILL, "kill -9 of all ranks": signal.SIGKILL, "USR1": signal.SIGUSR1}
CURVES = ("loss", "val_loss", "lr", "images_seen")  # columns of train.jsonl that must agree
CONSOLIDATE = Path(__file__).resolve().parent / "consolidate.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs without and with interruptions, and compares."""
    args = parse(list(sys.argv[1:] if argv is None else argv))
    alone, broken = args.out / "alone", args.out / "interrupted"
    start = time.monotonic()
    until_the_end(args.command, alone)
    seconds = time.monotonic() - start
    print(f"left alone: {duration(seconds)}", flush=True)
    keep_product(alone)
    dice = random.Random(args.seed)
    first, last = args.save_every, last_step(alone)
    if first >= 0.9 * last:
        raise InputError(
            f"--save_every {first} leaves nothing to go on from in a run of {last} steps; save several times as often"
        )
    targets = sorted(dice.uniform(first + 1, 0.9 * last) for _ in range(args.kills))
    for number, target in enumerate(targets):
        way = list(WAYS)[number % len(WAYS)]
        interrupt(args.command, broken, way, int(target), seconds_a_step(alone), dice)
        print(f"{way} at step {last_step(broken)}", flush=True)
    until_the_end(args.command, broken)
    resumed = broken.with_suffix(".log").read_text(encoding="utf-8", errors="replace").count("resumed from ")
    curves = compare_runs(alone, broken, columns=CURVES)
    worst = math.inf if any(curves.missing) else max(curves.largest.values())
    same = weights(alone, args.out / "alone.model") == weights(broken, args.out / "interrupted.model")
    write_json(
        args.out / "rehearsal.json",
        {"kills": args.kills, "resumed": resumed, "seconds": seconds, "worst": worst, "same_weights": same},
    )
    print(f"resumed {resumed} times; largest difference of a loss {worst:g}; weights {'the same' if same else 'differ'}")
    if resumed < args.kills or worst > args.tolerance or not (same or args.tolerance):
        sys.exit(1)


def parse(words: list[str]) -> Any:
    """The command line; everything after `--` is the training command."""
    ours, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="directory for both runs")
    parser.add_argument("--kills", type=int, default=5, help="number of interruptions")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments and the ranks")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of a loss in nats that counts as equal; 0: bit-equal"
    )
    args = parser.parse_args(ours)
    if not command:
        raise InputError("no training command: write it after ` -- `, as in `-- deepspeed --num_gpus 2 train.py ...`")
    if taken := [word for word in command if word.partition("=")[0] in ("--run_dir", "--resume")]:
        raise InputError(f"{taken[0]} is set by the rehearsal; leave it out of the training command")
    every = dict(itertools.pairwise(command)).get("--save_every", "")
    if not every.isdecimal() or int(every) < 1:
        raise InputError("give the training command --save_every with a number: without checkpoints on the way nothing resumes")
    args.save_every = int(every)
    if args.kills < 1:
        raise InputError(f"--kills {args.kills} must be at least 1")
    if not 0 <= args.tolerance < math.inf:
        raise InputError(f"--tolerance {args.tolerance} must be a number of at least 0")
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"{args.out} exists already; choose another --out or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    args.command = command
    return args


def begin(command: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes]:
    """Starts or continues a run and appends its output to a file beside it."""
    with open(run_dir.with_suffix(".log"), "ab", opener=open_plain) as log:
        words = [*command, "--run_dir", str(run_dir), "--resume", "auto"]
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def until_the_end(command: Sequence[str], run_dir: Path) -> None:
    """Runs to the last step; a ValueError if the run ends before."""
    process = begin(command, run_dir)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    if status or not (run_dir / "FINISHED").exists():
        raise InputError(f"the run ended with status {status} before its last step; see {run_dir.with_suffix('.log')}")


def keep_product(run_dir: Path) -> None:
    """Lets the next new run compute in the float32 product of this one, for the same bits."""
    from igpt_ds.model.cpu_speed import PRODUCT_VARIABLE  # imports torch
    from igpt_ds.train.run_dir import read_run

    os.environ[PRODUCT_VARIABLE] = read_run(run_dir)["cpu_product"]


def last_step(run_dir: Path) -> int:
    """The last step in train.jsonl."""
    return max((row["step"] for row in read_json_lines(run_dir / "train.jsonl")), default=0)


def seconds_a_step(run_dir: Path) -> float:
    """Seconds per training step, without the start and the checkpoints."""
    rows = [row for row in read_json_lines(run_dir / "train.jsonl") if "images_per_s" in row]
    return statistics.median(row["images_seen"] / row["step"] / row["images_per_s"] for row in rows)


def interrupt(command: Sequence[str], run_dir: Path, way: str, target: int, step_s: float, dice: random.Random) -> None:
    """Starts the run, lets it train to that step and up to two steps more, and interrupts it."""
    started = time.time()
    process = begin(command, run_dir)
    while process.poll() is None and (last_step(run_dir) < target or not _pids(run_dir, started)):
        time.sleep(min(0.1, step_s / 2))
    time.sleep(dice.uniform(0, min(2 * step_s, 3)))  # within a step, or in the save after it
    pids = _pids(run_dir, started)
    for pid in pids if way == "kill -9 of all ranks" else [dice.choice(pids)] if pids else []:
        try:
            os.kill(pid, WAYS[way])
        except ProcessLookupError:
            continue  # the run ended before the interruption
    process.wait()


def _pids(run_dir: Path, since: float) -> list[int]:
    # The ranks of this start on this machine, by their heartbeats.
    return [beat.pid for beat in all_heartbeats(run_dir).values() if beat.written > since]


def weights(run_dir: Path, model_dir: Path) -> str:
    """The sha256 of a run's last weights."""
    subprocess.run([sys.executable, CONSOLIDATE, "--run_dir", run_dir, "--out", model_dir], check=True, stdout=subprocess.DEVNULL)
    return str(json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["model_hash"])


if __name__ == "__main__":
    cli.run(main)
