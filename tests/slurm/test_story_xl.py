"""slurm/story_xl.sh at toy size: one submission, from images to tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from igpt_ds.evaluate.report.results import read_results

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
TOY = ["--steps=8", "--warmup_steps=2", "--batch_images=16", "--n_layer=2", "--n_embd=16", "--val_images=32", "--val_every=4"]


def test_the_story_from_images_to_tables_in_one_submission(slurm: Any, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "story"
    command = ["bash", "slurm/story_xl.sh", "digits_nano_ar_8", "digits:", out, *TOY, "--ds_config=ds_configs/zero3_fp32.json"]
    said = slurm.run(*command, IGPT_DS_CLUSTER=str(settings))
    jobs = [line.split() for line in said.splitlines()[:-1]]
    names = ["fit_palette", *3 * ["make_shards"], "pretrain", "consolidate", *5 * ["extract_features"]]
    names += ["probe", "tables", "figures", "figures"]
    assert [name for name, _ in jobs] == names
    refused = slurm.run(*command, status=2, IGPT_DS_CLUSTER=str(settings))
    assert f"jobs of {out} are still queued: {' '.join(number for _, number in jobs)}" in refused

    def story() -> str:
        return "\n".join(str(slurm.facts(number)) for _, number in jobs)

    last = jobs[-1][1]
    slurm.until(lambda: slurm.facts(last)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 900, story)
    assert slurm.facts(last)["JobState"] == "COMPLETED", story()
    assert "validation: " in (out / "tables.md").read_text()
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {row["weights"] for row in read_results(out / "results.jsonl")} == {"trained", "untrained", "pixels"}

    again = slurm.run(*command, IGPT_DS_CLUSTER=str(settings)).splitlines()
    there = ["palette.npy", "shards", "FINISHED", "model", "features/trained", "features/untrained", "features/pixels"]
    assert again[:7] == [f"there already: {out}/{name}" for name in there]
    assert [line.split()[0] for line in again[7:-1]] == ["probe", "tables", "figures", "figures"]
    other = slurm.run(*command, "--lr=0.1", status=2, IGPT_DS_CLUSTER=str(settings))
    assert f"{out} holds another story" in other
