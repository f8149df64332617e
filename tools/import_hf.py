"""Imports an ImageGPT directory of Hugging Face as a model dir.

    python tools/import_hf.py --hf imagegpt-small --out models/s

The directory holds config.json, model.safetensors or pytorch_model.bin, and preprocessor_config.json, whose 'clusters' are the
palette. Use --palette where 'clusters' is missing. This tool does not need transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.palette import Palette, load_palette, save_palette
from igpt_ds.errors import InputError
from igpt_ds.files import reserved, scratch_dir

with lazy.imports():
    from igpt_ds.model.interchange.hf import ImportedModel, read_hf, save_imported
    from igpt_ds.model.store import read_info


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, checks, writes the model dir."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--hf", type=Path, required=True, help="directory that save_pretrained wrote, or a download from the hub")
    parser.add_argument("--out", type=Path, required=True, help="model dir to write")
    parser.add_argument(
        "--palette", type=Path, help="palette.npy, where the directory has no 'clusters' (default: the directory's own)"
    )
    args = parser.parse_args(argv)
    lazy.load()

    imported = read_hf(args.hf)
    palette = choose_palette(imported, args.hf, args.palette)
    with reserved(args.out), scratch_dir(args.out) as directory:
        file = directory / "palette.npy"
        save_palette(file, palette)
        save_imported(args.out, imported, file, palette.hash)
    size = sum(tensor.numel() for tensor in imported.weights.values())
    print(f"{args.out}: {size:,} parameters, {palette.name}, sha256 {read_info(args.out).model_hash[:16]}")


def choose_palette(imported: ImportedModel, directory: Path, path: Path | None) -> Palette:
    """The directory's own palette; the palette at `path` where the directory has none."""
    own = None if imported.colors is None else Palette(imported.colors)
    if path is None:
        if own is None:
            raise InputError(f"{directory / 'preprocessor_config.json'} has no 'clusters'; give the palette with --palette")
        return own
    given = load_palette(path)
    if own is not None and given.hash != own.hash:
        raise InputError(f"--palette {path} differs from the palette in {directory / 'preprocessor_config.json'}; omit --palette")
    if len(given) != imported.config.n_vocab:
        raise InputError(f"--palette {path} has {len(given)} colours; the model in {directory} has {imported.config.n_vocab}")
    return given


if __name__ == "__main__":
    cli.run(main)
