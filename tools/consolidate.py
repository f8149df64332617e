"""Gathers a sharded checkpoint into a model dir: config.json, model.safetensors (float32), palette.npy.

    python tools/consolidate.py --run_dir runs/s --out models/s

takes the newest complete checkpoint, or of a fine-tuning the best, with its class head; --step takes another. Needs no GPU, no
DeepSpeed and no process group, and no more memory for a large model than for a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.model.store import read_info
from igpt_ds.train.checkpoint.consolidate import consolidate


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the checkpoint's files, gathers the tensors, writes the model dir."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run_dir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--out", type=Path, required=True, help="the model dir to make")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest complete or best one when left out")
    args = parser.parse_args(argv)

    step, size = consolidate(args.run_dir, args.out, args.step)
    print(f"{args.out}: step {step}, {size:,} parameters, sha256 {read_info(args.out).model_hash[:16]}")


if __name__ == "__main__":
    cli.run(main)
