"""A tool killed at a file-system call finishes when it is run again: the same result, and nothing beside it.

Each test kills at a few calls, drawn by a seed. Of two equal commands at the same time one is refused, and the result is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import killed
import pytest
from killed import ROOT, Case


@pytest.fixture(scope="module")
def tools() -> Iterator[killed.Tools]:
    """One process that imports every tool that a test here runs."""
    with killed.Tools() as running:
        yield running


def test_fit_palette(tools: killed.Tools, tmp_path: Path, tiny_images: Path) -> None:
    source = ["--source", f"imagefolder:{tiny_images}", "--n_colors", 8]
    words = lambda out: [*source, "--out", out / "p.npy", "--swatch", out / "swatch.png"]  # noqa: E731
    case = Case(tools, "tools/fit_palette.py", words, tmp_path)
    case.kills(2)
    case.two_at_once()


def test_make_shards(tools: killed.Tools, tmp_path: Path, tiny_images: Path, tiny_dataset: Path) -> None:
    source = ["--source", f"imagefolder:{tiny_images}", "--palette", tiny_dataset / "palette.npy", "--n_px", 4]
    fixed = ["--val_fraction", 0.25, "--images_per_shard", 16, "--workers", 1]
    case = Case(tools, "tools/make_shards.py", lambda out: [*source, *fixed, "--out", out / "shards"], tmp_path)
    case.kills(5)
    case.two_at_once()


def test_figures(tools: killed.Tools, tmp_path: Path) -> None:
    words = lambda out: ["confusion", "--counts", ROOT / "docs/cifar10/confusion.json", "--out", out / "c.png"]  # noqa: E731
    Case(tools, "tools/figures.py", words, tmp_path).kills(1)


def test_diagnose_leaves_no_part_of_an_earlier_report(tools: killed.Tools, tmp_path: Path) -> None:
    run_dir = tmp_path / "run-7"
    run_dir.mkdir()
    for name in ("run.json", "train.jsonl"):
        (run_dir / name).write_bytes((ROOT / "docs/cifar10" / name).read_bytes())
    whole = tools.run("tools/diagnose.py", run_dir, under=tmp_path)
    assert whole.code == 0, whole.output
    for at in range(1, whole.calls):
        tools.run("tools/diagnose.py", run_dir, under=tmp_path, at=at)
    assert tools.run("tools/diagnose.py", run_dir, under=tmp_path).code == 0
    assert not list(tmp_path.glob(".*"))
