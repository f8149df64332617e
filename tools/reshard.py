"""Writes a checkpoint again for another number of ranks, bit for bit, with one block in memory at a time.

    python tools/reshard.py --run_dir runs/s --ranks 16
    python tools/reshard.py --checkpoint runs/s/checkpoints/step-00100000 --ranks 16 --out elsewhere/step-00100000

A resumed run does this itself; the tool does it in advance on a machine without GPUs. Without --out the new checkpoint replaces
the old one when it is complete. It needs no DeepSpeed and no process group.
"""

from __future__ import annotations

import dataclasses
import glob
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.errors import InputError
from igpt_ds.files import reserved
from igpt_ds.locks import locked
from igpt_ds.train import run_lock
from igpt_ds.train.checkpoint.directory import choose_checkpoint, commit, recover
from igpt_ds.train.checkpoint.manifest import Checkpoint, file_entry, read_checkpoint, refuse_damaged

with lazy.imports():
    from igpt_ds.train.checkpoint.disk import SLACK, require_space
    from igpt_ds.train.checkpoint.reshard import saved_sub_group_size, target_layout, write_rank
    from igpt_ds.train.checkpoint.zero_layout import ZeroCheckpoint


MOST_RANKS = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the checkpoint's files, writes those of the new ranks, marks them as complete."""
    parser = cli.parser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run_dir", type=Path, help="run directory, whose newest complete checkpoint is resharded")
    what.add_argument("--checkpoint", type=Path, help="checkpoint directory to reshard")
    parser.add_argument("--step", type=int, help="with --run_dir: step of the checkpoint (default: the newest)")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks of the new checkpoint")
    parser.add_argument(
        "--sub_group_size", type=int, help="zero_optimization.sub_group_size of the new run (default: that of the checkpoint)"
    )
    parser.add_argument("--out", type=Path, help="checkpoint directory to write (default: replace the old checkpoint)")
    args = parser.parse_args(argv)
    for name in ("ranks", "sub_group_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if args.ranks > MOST_RANKS:
        raise InputError(
            f"--ranks {args.ranks} is more than {MOST_RANKS}, whose files one process can write in reasonable time; "
            "a resumed run divides by itself, each rank its own"
        )
    if args.checkpoint and args.step is not None:
        raise InputError(f"--step {args.step} goes with --run_dir; --checkpoint {args.checkpoint} is one step already")
    lazy.load()
    if args.checkpoint:
        recover(args.checkpoint)
        checkpoint = read_checkpoint(args.checkpoint)
    else:
        checkpoint = choose_checkpoint(args.run_dir, args.step)
    if args.out:
        with reserved(args.out):
            write(checkpoint, args.out, args.ranks, args.sub_group_size)
        return
    run_dir = checkpoint.path.absolute().parents[1]
    if (run_dir / "run.json").exists():
        run_lock.take(run_dir)  # a run that starts now would remove the unfinished files
    with locked(checkpoint.path):
        write(read_checkpoint(checkpoint.path), checkpoint.path, args.ranks, args.sub_group_size)


def write(checkpoint: Checkpoint, out: Path, ranks: int, sub_group_size: int | None) -> None:
    """Writes the files of the new ranks beside `out`, which they replace when they are complete. The caller has locked `out`."""
    refuse_damaged(checkpoint)
    manifest, start = checkpoint.manifest, time.monotonic()
    source = ZeroCheckpoint(checkpoint.path, manifest.world_size, manifest.stage)
    target = target_layout(source, ranks, sub_group_size or saved_sub_group_size(source))
    for left in out.parent.glob(f"{glob.escape(out.name)}.*-ranks.partial"):  # by a killed start, for whatever ranks
        shutil.rmtree(left, ignore_errors=True)
    require_space(out.parent, int(SLACK * manifest.bytes), f"{out.name} for {ranks} ranks")
    unfinished = out.with_name(f"{out.name}.{uuid.uuid4().hex[:12]}.{ranks}-ranks.partial")
    unfinished.mkdir(parents=True)
    try:
        files = [file_entry(path) for rank in range(ranks) for path in write_rank(source, target, rank, unfinished)]
        made = dataclasses.replace(manifest, world_size=ranks, files=tuple(files))
        commit(unfinished, out, made)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size, seconds = made.bytes, time.monotonic() - start
    speed = f"{size / 1e9:.3f} GB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s"
    print(f"{out}: {manifest.world_size} ranks -> {ranks}, {speed}")


if __name__ == "__main__":
    cli.run(main)
