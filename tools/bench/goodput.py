"""Kills toy runs at random moments: the ledger must agree with the wall clock, and half of the runs must predict the others.

    python tools/bench/goodput.py --out bench_goodput.json
    python tools/bench/goodput.py --show docs/bench_goodput.json

Each run of train.py is a process on one CPU core. Its time until each fault is random and exponential. A fault is a SIGKILL, now
and then with a byte of the newest checkpoint flipped. After a random wait the same command continues it with --resume auto. This
program measures the wall clock from the first start of a run to its end, and how long nothing ran. The same --seed draws the same
times. The first fault waits until the first start has written to its run directory: nothing is known of an earlier end.

A prediction cannot know the luck of the other half. So the times of a run are one from each of as many equal parts of the
exponential distribution, in random order. The stop that ends a run comes at such a time too, and counts as a failure in the fit.
For the ledger a start that is killed before its first row is time down. This program saw it, as a batch script would, and counts
it as start-up in the fit. --runs keeps what is fitted, for `python -m igpt_ds.plan goodput --fit`.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import harness
import numpy as np
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.data.palette import fit_palette, save_palette
from igpt_ds.errors import InputError
from igpt_ds.json_files import write_json, write_json_lines
from igpt_ds.plan.goodput import Measured, expected, fit
from igpt_ds.train.ledger.goodput import DOWN, STARTUP, UNEXPLAINED, Goodput, read_goodput

ROOT = Path(__file__).parents[2]
DAMAGED = 0.04  # of the faults: they also damage the newest checkpoint
END_SECONDS = 600.0  # for a run to save and end


@dataclass(frozen=True)
class Trial:
    """How many runs, faults of each, and their times in seconds."""

    runs: int
    faults: int
    up: float  # mean time from a start to a fault
    down: float  # longest wait before the next start


@dataclass(frozen=True)
class Disturbed:
    """A run with its faults, as this program saw it and by its ledger. Times are seconds."""

    wall: float
    down: float
    faults: int
    ledger: Goodput

    @property
    def error(self) -> float:
        """Percent by which the ledger differs from the wall clock, unexplained time included."""
        explained = self.ledger.wall - abs(self.ledger.seconds[UNEXPLAINED])
        return 100 * abs(self.wall - explained) / self.wall

    @property
    def measured(self) -> Measured:
        """What a prediction is fitted to: the ledger, with the starts that this program saw and the ledger did not."""
        known = Measured.of(self.ledger.to_dict())
        unseen = known.seconds[DOWN] - self.down
        seconds = known.seconds | {DOWN: self.down, STARTUP: known.seconds[STARTUP] + unseen}
        return replace(known, failures=self.faults + 1, seconds=seconds, after_failures=None)

    @property
    def down_error(self) -> float:
        """Percent of the wall clock by which the time down differs."""
        return 100 * abs(self.down - self.ledger.seconds[DOWN]) / self.wall


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, kills, measures, prints."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, quick="20 faults instead of 200")
    parser.add_argument("--runs", type=Path, help="JSON lines file to write the seconds of each run to (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the faults")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    trial = Trial(2, 1, 5.0, 1.0) if args.toy else Trial(4, 5, 25.0, 3.0) if args.quick else Trial(20, 10, 25.0, 3.0)
    with tempfile.TemporaryDirectory(prefix="igpt_ds-goodput-") as work:
        words = prepare(Path(work))
        found = [
            disturb(words, Path(work) / f"run-{number}", trial, random.Random(args.seed + number)) for number in range(trial.runs)
        ]
    if args.runs:
        write_json_lines(args.runs, ({"goodput": asdict(one.measured)} for one in found))
    harness.finish(rows(found, bars=not args.toy), args.out, args.quick, ("torch", "deepspeed"))


def prepare(work: Path) -> list[str]:
    """Makes shards of the digits and a small recipe; the command of a run without its --run_dir."""
    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_px=8, n_vocab=16)
    recipe = Recipe("toy", model, batch_images=16, steps=1_000_000, lr=0.001, warmup_steps=10)
    write_json(work / "recipe.json", recipe_to_dict(recipe))
    write_json(work / "ds_config.json", {"zero_optimization": {"stage": 3}})
    colours = np.random.default_rng(0).integers(0, 256, (4000, 3), dtype=np.uint8)
    save_palette(work / "palette.npy", fit_palette(colours, 16)[0])
    shards = ["--source", "digits:", "--palette", work / "palette.npy", "--n_px", 8, "--out", work / "shards"]
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, shards)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise InputError(f"the shards of the digits cannot be made: {done.stderr[-600:]}")
    flags = {"config": work / "recipe.json", "data": work / "shards", "ds_config": work / "ds_config.json", "resume": "auto"}
    often = {"log_every": 1, "val_every": 100, "val_images": 16, "save_every": 20}
    given = [str(word) for name, value in (flags | often).items() for word in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "train.py"), *given]


def disturb(words: Sequence[str], run_dir: Path, trial: Trial, draw: random.Random) -> Disturbed:
    """Runs the command with its faults, then stops it."""
    begun, down, end = time.monotonic(), 0.0, 0.0
    for fault, up in enumerate(up_times(trial, draw)):
        process, log = start(words, run_dir)
        down += time.monotonic() - end if end else 0.0
        last = fault == trial.faults
        deadline = time.monotonic() + up
        while process.poll() is None and (time.monotonic() < deadline or not ready(run_dir, process.pid, last)):
            time.sleep(0.02)
        if process.poll() is not None:
            raise InputError(f"the run ended with {process.returncode}: {log.read_text(encoding='utf-8')[-600:]}")
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        process.wait(END_SECONDS)
        end = time.monotonic()
        if not last:
            damage(run_dir, draw)
            time.sleep(draw.uniform(0, trial.down))
    return Disturbed(end - begun, down, trial.faults, read_goodput(run_dir))


def up_times(trial: Trial, draw: random.Random) -> list[float]:
    """Seconds until each fault of a run and until its stop: one from each equal part of the exponential distribution."""
    parts = trial.faults + 1
    times = [-trial.up * math.log(1 - (part + draw.random()) / parts) for part in range(parts)]
    draw.shuffle(times)
    return times


def start(words: Sequence[str], run_dir: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A start of the run, and its log."""
    log = run_dir.with_suffix(".log")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        command = [*words, "--run_dir", str(run_dir)]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment), log


def ready(run_dir: Path, pid: int, last: bool) -> bool:
    """Whether a fault may come: the run directory is there. The last stop waits for two saves, and for a step."""
    if not last:
        return (run_dir / "restarts.jsonl").exists()
    with suppress(OSError, InputError):
        text = (run_dir / "heartbeat" / "node-00000.json").read_text(encoding="utf-8")
        return f'"pid": {pid}' in text and '"phase": "step"' in text and bool(read_goodput(run_dir, live=True).saves)
    return False


def damage(run_dir: Path, draw: random.Random) -> None:
    """Now and then flips a byte of the newest checkpoint."""
    newest = sorted((run_dir / "checkpoints").glob("step-*/*optim_states.pt"))[-1:]
    if draw.random() < DAMAGED:
        for path in newest:
            with open(path, "r+b") as file:
                file.seek(draw.randrange(path.stat().st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))


def rows(found: Sequence[Disturbed], bars: bool) -> list[BenchRow]:
    """The ledger against the wall clock, and the prediction against the measured half."""
    faults, hours = sum(one.faults for one in found), sum(one.wall for one in found) / 3600
    note = f"{faults} faults in {len(found)} runs, {hours:.1f} h"
    worst = max(one.error for one in found)
    whole = 100 * abs(sum(one.ledger.wall for one in found) / sum(one.wall for one in found) - 1)
    measured = [one.measured for one in found]
    others = measured[1::2]
    seconds = math.fsum(math.fsum(one.seconds.values()) for one in others)
    real = math.fsum(one.seconds["training"] for one in others) / seconds
    predicted = expected(fit(measured[::2]))
    seen = f"goodput {100 * predicted:.1f} % predicted, {100 * real:.1f} % measured"
    bar, points = 1.0 if bars else None, 100 * abs(predicted - real)
    down = max(one.down_error for one in found)
    return [
        BenchRow("ledger against the wall clock, all runs", "%", whole, 1.0, "the bar", bar, at_most=True, note=note),
        BenchRow("the same, with what it does not explain, worst run", "%", worst, 1.0, "the bar", bar, at_most=True),
        BenchRow("time down, worst run", "% of the wall clock", down, 1.0, "reported", at_most=True),
        BenchRow("prediction by half of the runs", "points", points, 2.0, "the bar", bar, at_most=True, note=seen),
    ]


if __name__ == "__main__":
    cli.run(main)
