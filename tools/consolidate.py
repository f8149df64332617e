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
from igpt_ds.console import next_command

with lazy.imports():
    from igpt_ds.model.store import read_info
    from igpt_ds.train.checkpoint.consolidate import consolidate
    from igpt_ds.train.run_dir import read_run


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
    info, trained_on = read_info(args.out), read_run(args.run_dir)["data"]
    data = (trained_on.get("datasets") or [trained_on])[0]["path"]  # of several data sets the first
    print(f"{args.out}: step {step}, {size:,} parameters, sha256 {info.model_hash[:16]}")
    if info.class_head is not None:
        print(next_command("python", "tools/evaluate_classifier.py", "--model", args.out, "--data", data))
        return
    features = f"{args.out}_features"
    print(next_command("python", "tools/extract_features.py", "--model", args.out, "--data", data, "--out", features))
    if info.objective == "ar":
        print(next_command("python", "tools/sample.py", "--model", args.out, "--out", f"{args.out}_samples.png", label="or"))


if __name__ == "__main__":
    cli.run(main)
