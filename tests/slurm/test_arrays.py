"""Arrays of jobs make what one process makes, and a part that failed is made again alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.json_files import read_json
from igpt_ds.model.store import save_model
from igpt_ds.model.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
Submit = Callable[..., list[str]]


@pytest.fixture
def submit(slurm: Any, settings: Path) -> Submit:
    """submit("probe", "--features", ...) -> the numbers of the jobs that slurm/submit.sh put in the queue."""

    def jobs(*words: str | Path, log: Path | None = None, cluster: Path = settings) -> list[str]:
        options = [f"--output={log}", "--open-mode=append"] if log else []
        said = slurm.run("bash", "slurm/submit.sh", *options, *words, IGPT_DS_CLUSTER=str(cluster))
        return [line.split()[-1] for line in said.splitlines()]

    return jobs


def content(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_shards_of_an_array_equal_those_of_one_process_and_a_failed_part_is_made_again(
    slurm: Any, submit: Submit, tiny_images: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    images, log = tmp_path / "images", tmp_path / "log"
    shutil.copytree(tiny_images, images)
    flags = [f"--source=imagefolder:{images}", f"--palette={tiny_dataset}/palette.npy", "--n_px=4", "--val_fraction=0.25"]
    flags += ["--images_per_shard=5", "--workers=1", "--max_bad=0", "--name=tiny"]
    slurm.run("python", "tools/make_shards.py", *flags, f"--out={tmp_path}/one")

    flags.append(f"--out={tmp_path}/array")
    (listed,) = submit("make_shards", "--stage=list", *flags, log=log)
    assert slurm.ended(listed, log) == "COMPLETED"
    lost = images / "red" / "03.png"
    kept = lost.read_bytes()
    lost.write_bytes(b"no picture")
    listed, written, merged = submit("make_shards", *flags, log=log)
    assert slurm.ended(merged, log) == "CANCELLED"
    states = {str(part): slurm.facts(f"{written}_{part}")["JobState"] for part in range(3)}
    assert sorted(states.values()) == ["COMPLETED", "COMPLETED", "FAILED"], log.read_text()

    lost.write_bytes(kept)
    failed = next(part for part, state in states.items() if state == "FAILED")
    (alone,) = submit(f"--array={failed}", "make_shards", "--stage=write", *flags, log=log)
    assert slurm.ended(alone, log) == "COMPLETED"
    (merged,) = submit("make_shards", "--stage=merge", *flags, log=log)
    assert slurm.ended(merged, log) == "COMPLETED"
    assert content(tmp_path / "array") == content(tmp_path / "one")


def test_features_of_an_array_equal_those_of_one_process(
    slurm: Any, submit: Submit, tiny_dataset: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    info = {"config": tiny_config, "recipe": "tiny", "objective": "ar", "mask_prob": None, "init": "released"}
    info |= {"palette_hash": ShardSet(tiny_dataset, "train").palette.hash, "dataset_hash": "", "step": 0, "images_seen": 0}
    save_model(tmp_path / "model", Transformer(tiny_config).state_dict(), info, tiny_dataset / "palette.npy")
    flags = [f"--model={tmp_path}/model", f"--data={tiny_dataset}", "--batch=4"]
    slurm.run("python", "tools/extract_features.py", *flags, f"--out={tmp_path}/one")

    log = tmp_path / "log"
    parts, merged = submit("extract_features", *flags, f"--out={tmp_path}/array", log=log)
    assert slurm.ended(merged, log) == "COMPLETED", log.read_text()
    assert content(tmp_path / "array") == content(tmp_path / "one")
    assert len(slurm.run("squeue", "-h", "-r", "-t", "all", "-j", parts).splitlines()) == 3


def test_learning_rates_are_tried_side_by_side(
    slurm: Any, submit: Submit, settings: Path, common: list[str], tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "sweep"
    cluster = tmp_path / "cluster.sh"
    cluster.write_text(f"{settings.read_text()}SPARE_NODES=1\n")  # which is for training jobs with several nodes
    words = ("--array=0-1", "sweep_lr", f"--out={out}", "--", *common, "--steps=10")
    rates, table = submit(*words, log=log, cluster=cluster)
    assert slurm.ended(table, log) == "COMPLETED", log.read_text()
    assert [slurm.facts(f"{rates}_{number}")["JobState"] for number in range(2)] == ["COMPLETED", "COMPLETED"], log.read_text()
    found = read_json(out / "sweep.json", "sweep")["results"]
    assert [row["lr"] for row in found] == [0.01, 0.003]
    assert all(row["val_loss"] < math.log(8) for row in found)
    assert all((path / "FINISHED").exists() and (path / "restarts.jsonl").exists() for path in out.glob("lr*/"))


AGAIN = """#!/usr/bin/env bash
echo "task $SLURM_ARRAY_TASK_ID" >>"$1"
while (($(grep -c task "$1") < 2)); do sleep 0.2; done
code='import os; from igpt_ds.ops.slurm import ask, task_of; ask("scontrol", "requeue", task_of(os.environ["SLURM_JOB_ID"]))'
((SLURM_ARRAY_TASK_ID == 0 || ${SLURM_RESTART_COUNT:-0} > 0)) || exec python -c "$code"
until (($(grep -c "task 1" "$1") == 2)); do sleep 0.2; done
"""


def test_a_task_queues_again_without_the_others_of_its_array(slurm: Any, tmp_path: Path) -> None:
    """The last task has the number of the array."""
    script, log = tmp_path / "again.sbatch", tmp_path / "log"
    script.write_text(AGAIN)
    job = slurm.sbatch(
        "--array=0-1", "--requeue", "--nodes=1", f"--output={log}", "--open-mode=append", script, tmp_path / "tasks"
    )
    for number in range(2):
        assert slurm.ended(f"{job}_{number}", log) == "COMPLETED"
    assert [slurm.facts(f"{job}_{number}")["Restarts"] for number in range(2)] == ["0", "1"]
    assert sorted((tmp_path / "tasks").read_text().split("\n")) == ["", "task 0", "task 1", "task 1"]


def test_a_part_of_nobody_knows_how_many_is_refused(submit: Submit, slurm: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = slurm.sbatch("--array=0-1", f"--output={log}", "slurm/make_shards.sbatch", IGPT_DS_CLUSTER="/dev/null")
    assert slurm.ended(job, log) == "FAILED"
    assert "PARTS: is not set; slurm/cluster.sh says how many parts there are" in log.read_text()


def test_submit_says_what_is_missing(slurm: Any, settings: Path, tmp_path: Path) -> None:
    job = slurm.sbatch("--chdir=/tmp", f"--output={tmp_path}/log", "slurm/tool.sbatch", "tools/status.py")
    assert slurm.ended(job) == "FAILED"
    assert "error: submit at the repository root, which /tmp is not" in (tmp_path / "log").read_text()
    command = ["bash", "slurm/submit.sh"]
    said = slurm.run(*command, "probe", status=2, IGPT_DS_CLUSTER="nowhere.sh")
    assert "nowhere.sh is not there; cp slurm/cluster.example.sh slurm/cluster.sh" in said
    wrong = slurm.run(*command, "--nodes", "1-2", "pretrain", status=2, IGPT_DS_CLUSTER=str(settings))
    assert wrong.startswith(
        "error: '1-2' is no job; an option of sbatch is one word, --sbatch_option=value; usage: bash slurm/submit.sh"
    )
    assert len(wrong.splitlines()) == 1
    assert "usage: bash slurm/submit.sh" in slurm.run(*command, status=2, IGPT_DS_CLUSTER=str(settings))


def test_a_range_of_nodes_is_what_sbatch_gets(slurm: Any, submit: Submit, tmp_path: Path) -> None:
    for option in ("--nodes=1-2", "-N1-2"):
        (job,) = submit("--hold", option, "pretrain", f"--run_dir={tmp_path / option}")
        assert slurm.facts(job)["NumNodes"] == "1-2"
