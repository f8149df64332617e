"""Gathers a sharded checkpoint into a model dir: config.json, model.safetensors (float32), palette.npy.

    python tools/consolidate.py --run_dir runs/s --out models/s

The tool takes the newest complete checkpoint. For a fine-tuned model it takes the best checkpoint, with its class head. It needs
no GPU, no DeepSpeed and no process group. Its memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy

with lazy.imports():
    from igpt_ds.model.store import read_info
    from igpt_ds.train.checkpoint.consolidate import consolidate


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the files of the checkpoint, gathers the tensors, writes the model dir."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="model dir to write")
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint (default: the newest complete one; after fine-tuning the best one)"
    )
    args = parser.parse_args(argv)
    lazy.load()

    step, size = consolidate(args.run_dir, args.out, args.step)
    print(f"{args.out}: step {step}, {size:,} parameters, sha256 {read_info(args.out).model_hash[:16]}")


if __name__ == "__main__":
    cli.run(main)
