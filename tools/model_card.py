"""Writes the model card of a model dir, README.md, again: with the rows of result files, and the losses of its run.

    python tools/model_card.py --model models/s --run_dir runs/s --results runs/s/results/*.jsonl

Every model dir has a card from the moment it is made; this tool adds what was measured later. Only rows of this model are taken,
by its model_hash: the best layer of each kind of features, fine-tunings and likelihoods. The tool prints the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.cards import card_results
from igpt_ds.evaluate.report.results import read_all
from igpt_ds.model.card import CARD_FILE, CardFacts, write_card
from igpt_ds.train.checkpoint.directory import choose_checkpoint

with lazy.imports():
    from igpt_ds.model.store import MODEL, read_info
    from igpt_ds.train.checkpoint.consolidate import card_facts


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the run and the rows, writes README.md."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir whose README.md is written")
    parser.add_argument("--run_dir", type=Path, help="run that the model is of, for its images and validation loss")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.jsonl files with rows of the model")
    args = parser.parse_args(argv)
    lazy.load()
    info = read_info(args.model)
    facts = CardFacts() if args.run_dir is None else card_facts(args.run_dir, choose_checkpoint(args.run_dir, info.step).manifest)
    hashes = {info.model_hash} | ({info.class_head.start} if info.class_head else set())
    found = card_results([row for row in read_all(args.results) if row.model_hash in hashes and row.weights == "trained"])
    if args.results and not found:
        raise InputError(f"--results: no row is of {args.model}, model_hash {info.model_hash[:16]}; name the files of its probes")
    write_card(args.model, args.model.resolve().name, MODEL.read(args.model / "config.json"), facts.with_results(found))
    print((args.model / CARD_FILE).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    cli.run(main)
