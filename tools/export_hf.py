"""Exports a model dir to Hugging Face: a directory for ImageGPTForCausalImageModeling and ImageGPTImageProcessor.from_pretrained.

    python tools/export_hf.py --model models/s --out hf/imagegpt-s

HF does not add the start-of-sequence token; the caller adds it. For n pixels the input is [sos, x_0 .. x_{n-2}] with
sos = vocab_size - 1, and the logits at i predict x_i. Without sos every prediction is shifted by one position. HF's processor
squashes an image that is not square, and this project crops its centre: most tokens differ. Crop the PIL image before the
processor, for n = n_px:

    w, h = (round(side * n / min(image.size)) for side in image.size)
    image = image.resize((w, image.height), Image.BICUBIC).resize((w, h), Image.BICUBIC)  # columns first, in every Pillow
    image = image.crop(((w - n) // 2, (h - n) // 2, (w - n) // 2 + n, (h - n) // 2 + n))

This tool does not need transformers. HF has no ImageGPT for BERT models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.data.palette import load_palette
from igpt_ds.errors import InputError
from igpt_ds.files import check_writable

with lazy.imports():
    from igpt_ds.api.found import model_dir
    from igpt_ds.model.interchange.hf import write_hf
    from igpt_ds.model.store import load_model, read_info


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, checks, writes the directory."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir, run dir or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="HF directory to write")
    args = parser.parse_args(argv)
    lazy.load()
    args.model_dir = model_dir(args.model)
    check_writable(directories=[args.out])

    objective = read_info(args.model_dir).objective
    if objective != "ar":
        raise InputError(
            f"{args.model} has objective {objective!r}; HF's ImageGPT is auto-regressive only; export a model with objective 'ar'"
        )
    palette = load_palette(args.model_dir / "palette.npy")
    model, info = load_model(args.model_dir)
    if palette.hash != info.palette_hash:
        raise InputError(
            f"{args.model / 'palette.npy'} is not the palette that the model was trained with; write the model dir again"
        )
    write_hf(args.out, info.config, model.state_dict(), palette.colors, info.dropout)
    print(f"{args.out}: vocab_size {info.config.n_vocab + 1}; start every image with token {info.config.n_vocab} (sos)")
    if info.config.tied_embeddings:
        print("lm_head is a copy of the embedding: the outputs are the same, but training in HF changes the two separately")
    n = info.config.n_px
    print(f"crop images to {n}x{n} before HF's processor, which squashes them: three lines in tools/export_hf.py --help")


if __name__ == "__main__":
    cli.run(main)
