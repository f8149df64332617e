"""Measures what a checkpoint costs training with --save async, beside --save sync, on a disk of 50 MB/s.

    python tools/bench/save.py --quick --out bench_save.json
    python tools/bench/save.py --show docs/bench_save.json

Real ranks train under ZeRO-3 on the cores of this machine. Their files are written slowly (tools/bench/save_rank.py), because a
disk that all ranks of a cluster share is slow too. Rows: how long a save stops training, how much slower steps are while files
are written, and the memory that a rank takes for its copy. Without --quick the model has 0.3 billion weights, on 2 and 4 ranks.
That takes half an hour, 16 GB of memory and 8 GB of disk under --work.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import harness
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import Recipe, get_recipe, override, recipe_to_dict
from igpt_ds.json_files import read_json

with lazy.imports():
    from igpt_ds import dist

PACKAGES = ("torch", "deepspeed")
DISK = 50e6  # bytes a second
# Otherwise glibc keeps large tensors that are freed, and the ranks take half as much memory again.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
STALL, SLOWER, MEMORY = 0.05, 1.10, 1.1  # bars: of the synchronous save, of a step without a save, of the rank's partition


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "a model of 0.02 billion weights on 2 ranks, about a minute")
    parser.add_argument("--work", type=Path, help="directory for checkpoints (default: a temporary directory)")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    os.environ |= MALLOC
    small = args.quick or args.toy
    rows: list[BenchRow] = []
    for ranks in (2,) if small else (2, 4):
        with tempfile.TemporaryDirectory(prefix="bench_save.", dir=args.work) as work:
            rows += measure(Path(work), ranks, recipe(args.quick, args.toy), 1 if args.toy else 2)
    rows = [replace(row, bar=None) for row in rows] if args.toy else rows
    harness.finish(rows, args.out, args.quick, PACKAGES, 2)


def recipe(quick: bool, toy: bool) -> Recipe:
    """Blocks of width 1024, each of 12.6 million weights, over small images, so that a step is short beside a save."""
    n_layer, n_embd = (2, 64) if toy else (2, 1024) if quick else (24, 1024)
    shape = {"n_layer": n_layer, "n_head": 8, "n_embd": n_embd, "n_px": 8}
    return override(get_recipe("digits_nano_ar_8"), **shape, batch_images=4, warmup_steps=0, steps=1000)


def measure(work: Path, ranks: int, recipe: Recipe, saves: int) -> list[BenchRow]:
    """The rows of a number of ranks."""
    answer = work / "answer.json"
    task = {"out": str(answer), "directory": str(work / "run" / "checkpoints"), "recipe": recipe_to_dict(recipe), "saves": saves}
    program, port = Path(__file__).with_name("save_rank.py"), dist.free_port()
    harness.on_ranks([sys.executable, str(program)], ranks, port, work, task | {"bytes_per_s": DISK})
    found = read_json(answer, "measurement")
    size = f"{found['copied'] * ranks / 1e9:.3g} GB, {ranks} ranks"
    steps = f"{found['steps']:.0f} steps beside the writing, {found['steps'] * found['beside']:.0f} s"
    return [
        BenchRow(f"stall of a save ({size})", "s", found["stall"], found["stop"], "--save sync", STALL, True, "50 MB/s"),
        BenchRow(f"step while files are written ({size})", "s", found["beside"], found["alone"], "no save", SLOWER, True, steps),
        BenchRow(
            f"memory for the copy ({size})", "MB", found["extra"] / 1e6, found["copied"] / 1e6, "the rank's files", MEMORY, True
        ),
    ]


if __name__ == "__main__":
    cli.run(main)
