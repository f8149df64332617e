"""slurm/story_paper.sh: nothing submitted unasked, each stage behind those that it needs, nothing that is there made again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.evaluate.report.results import read_results
from igpt_ds.paper.scales import get_scale
from igpt_ds.paper.stages import stages

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_every_stage_is_a_job_behind_those_that_it_needs(slurm: Any, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper"
    command = ["bash", "slurm/story_paper.sh", "tiny", out, "", "--steps=4", "--ds_config=ds_configs/zero3_fp32.json"]
    said = slurm.run(*command, IGPT_DS_CLUSTER=str(settings))
    assert said.startswith(f"the paper at scale tiny in {out}: 4 models, ")
    assert said.endswith("nothing was submitted; to do so: SUBMIT=1 before the same command\n")
    assert not out.exists()

    slurm.run(*command, IGPT_DS_CLUSTER=str(settings), SUBMIT="1", timeout=400)
    last = dict(line.split() for line in (out / "jobs.txt").read_text().splitlines())  # of several of one name the last
    found = stages(get_scale("tiny", None, steps=4), out, lambda recipe: {})
    assert set(last) == {"sweep_table", *(stage.name for stage in found)}

    def needs(name: str) -> set[str]:
        return set(re.findall(r":(\d+)\(", slurm.facts(last[name])["Dependency"]))

    assert needs("train-digits_nano_ar_8") <= {last["shards-digits_8"]}  # none, once the shards are there
    assert needs("model-digits_nano_ar_8-4") == {last["train-digits_nano_ar_8"]}
    looks = ("features-digits_nano_ar_8-4-digits_8", "probe-digits_nano_ar_8-4-digits_8")
    assert needs("figure-confusion") == {last[name] for name in looks}
    shown = {last[name] for name in last if name.startswith("figure-") and name != "figure-layers"}
    assert shown < needs("report"), "which draws the layers itself"
    pixels = last["probe-pixels-digits_8"]
    slurm.until(lambda: slurm.facts(pixels)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 200)
    assert slurm.facts(pixels)["JobState"] == "COMPLETED"
    assert [row["weights"] for row in read_results(out / "results" / "pixels-digits_8.jsonl")] == ["pixels"]
    refused = slurm.run(*command, IGPT_DS_CLUSTER=str(settings), SUBMIT="1", status=2)
    assert f"story_paper.sh: error: jobs of {out} are still queued: " in refused

    slurm.run("scancel", "--user=root")
    slurm.until(lambda: not slurm.run("squeue", "-h", "-u", "root"), 180)  # KillWait is 60 s
    slurm.run(*command, IGPT_DS_CLUSTER=str(settings), SUBMIT="1", timeout=400)
    again = [line.split()[0] for line in (out / "jobs.txt").read_text().splitlines()]
    assert not {"palette", "shards-digits_8", "features-pixels-digits_8", "probe-pixels-digits_8"} & set(again)
    assert "report" in again
    slurm.run("scancel", "--user=root")


TOY = ["--steps=8", "--warmup_steps=2", "--batch_images=16", "--n_layer=2", "--n_embd=16", "--val_images=32", "--val_every=4"]


def test_own_images_from_training_to_tables_in_one_submission(
    slurm: Any, settings: Path, run_stages: Any, tmp_path: Path
) -> None:
    """The stages before the training are made already; the test above submits such stages."""
    out, name = tmp_path / "story", "digits_nano_ar_8"
    training = ["--ds_config=ds_configs/zero3_fp32.json", "--", "--recipe", name, *TOY]
    command = ["bash", "slurm/story_paper.sh", "own", out, "digits:", *training]
    run_stages(["--scale=own", f"--out={out}", "--data=digits:", *training], before="train")
    slurm.run(*command, IGPT_DS_CLUSTER=str(settings), SUBMIT="1", timeout=400)
    jobs = dict(line.split() for line in (out / "jobs.txt").read_text().splitlines())
    assert {f"train-{name}", f"model-{name}-8", "tables", "report"} <= set(jobs)
    assert "shards-digits_8" not in jobs

    def story() -> str:
        return "\n".join(str(slurm.facts(number)) for number in jobs.values())

    for name_of in ("report", "tables", "figure-layers", "figure-training"):  # no other job needs these
        number = jobs[name_of]
        slurm.until(lambda number=number: slurm.facts(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 900, story)
        assert slurm.facts(number)["JobState"] == "COMPLETED", story()
    assert "validation: " in (out / "tables.md").read_text()
    for picture in ("layers", "training"):
        assert (out / "figures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows = read_results(out / "results" / f"{name}-8-digits_8.jsonl")
    assert {row["weights"] for row in rows} == {"trained"}
    other = slurm.run(*command, "--lr=0.1", IGPT_DS_CLUSTER=str(settings), SUBMIT="1", status=2)
    assert f"{out} holds the paper of scale own" in other
