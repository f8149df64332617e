"""Checkpoints divided for another number of ranks: exact, whatever the stage, and what DeepSpeed itself would have written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.json_files import read_json_lines, seal
from igpt_ds.train.checkpoint.manifest import read_checkpoint
from igpt_ds.train.checkpoint.reshard import target_layout, write_rank
from igpt_ds.train.checkpoint.zero_layout import Place, ZeroCheckpoint, sub_groups

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
STAGES = {
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero1_fp32": {"zero_optimization": {"stage": 1, "parameter_alignment": True}},
    "zero2_bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero2_fp32": {"zero_optimization": {"stage": 2}},
    "zero3_bf16": {"zero_optimization": {"stage": 3, "sub_group_size": 500}, "bf16": {"enabled": True}},
    "zero3_fp32": {"zero_optimization": {"stage": 3, "sub_group_size": 500, "stage3_param_persistence_threshold": 0}},
}
every_stage = pytest.mark.parametrize("name", STAGES)
Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, launch_once: Any) -> Trained:
    """trained(out, ranks, last_step, names) -> out, after two_groups.py went on in it."""
    directory = tmp_path_factory.mktemp("two_groups")
    recipe = Recipe("tiny", tiny_config, batch_images=12, steps=12, lr=0.01, warmup_steps=3)
    (directory / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe)))
    for name, ds_config in STAGES.items():
        (directory / f"{name}.json").write_text(json.dumps(ds_config))

    def train(out: str, ranks: int, last_step: int, names: Iterable[str] = tuple(STAGES)) -> Path:
        words = [Path(__file__).with_name("two_groups.py"), directory / "recipe.json", directory / out, last_step]
        done = launch_once([*words, *(directory / f"{name}.json" for name in names)], ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return directory / out

    return train


@pytest.fixture(scope="module")
def whole(trained: Trained) -> Path:
    """Six steps on two ranks at every stage, never interrupted."""
    return trained("whole", 2, 6)


def numbers(checkpoint: Path, ranks: int, stage: int) -> dict[tuple[str, str], bytes]:
    """Every parameter's master weights and optimizer states."""
    source = ZeroCheckpoint(checkpoint, ranks, stage)
    return {
        (name, key): b"".join(bytes(block) for block in source.blocks(name, key))
        for name in source.shapes
        for key in ("fp32", "exp_avg", "exp_avg_sq")
    }


def divide(checkpoint: Path, out: Path, old: int, new: int, stage: int, sub_group_size: int = 500) -> Path:
    out.mkdir(parents=True)
    source = ZeroCheckpoint(checkpoint, old, stage)
    for rank in range(new):
        write_rank(source, target_layout(source, new, sub_group_size), rank, out)
    return out


@every_stage
@pytest.mark.parametrize("ranks", [1, 3, 5, 64])
def test_there_and_back_is_bit_equal(whole: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """64: more ranks than most tensors have elements."""
    before = whole / name / "checkpoints" / "step-00000006"
    stage = int(name[4])
    there = divide(before, tmp_path / "there", 2, ranks, stage)
    assert numbers(there, ranks, stage) == numbers(before, 2, stage)
    back = divide(there, tmp_path / "back", ranks, 2, stage)
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in before.glob("*.pt"))
    again = divide(divide(back, tmp_path / "a", 2, ranks, stage), tmp_path / "b", ranks, 2, stage)
    for path in back.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@every_stage
def test_it_holds_what_deepspeed_wrote(whole: Path, tmp_path: Path, name: str) -> None:
    """Two ranks to three and back: the same objects, types and values as in DeepSpeed's own files, read by torch itself."""
    before, stage = whole / name / "checkpoints" / "step-00000006", int(name[4])
    there = divide(before, tmp_path / "there", 2, 3, stage)
    back = divide(there, tmp_path / "back", 3, 2, stage)
    for path in before.glob("*.pt"):
        equal(torch.load(path, weights_only=False), torch.load(back / path.name, weights_only=False), path.name)


def equal(left: Any, right: Any, where: str) -> None:
    """Deep equality; the generators' states may be those of another rank, and are left out."""
    if where.endswith("igpt_ds/rng"):
        return
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), where
        assert torch.equal(left.detach(), right.detach()), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            equal(*pair, f"{where}/{number}")
    elif type(left).__name__ == "LossScaler":
        assert vars(left) == vars(right), where
    else:
        assert left == right, where


def test_losses_on_4_2_3_1_4_ranks_equal_those_of_two(trained: Trained, whole: Path) -> None:
    """Two parameter groups, up to seven sub-groups, at every stage; each start divides the checkpoint of the one before."""
    fp32 = [name for name in STAGES if name.endswith("fp32")]
    for last_step, ranks in ((2, 4), (4, 2), (6, 3)):
        chain = trained("chain", ranks, last_step, fp32)
    long = trained("whole", 2, 10, fp32)
    for last_step, ranks in ((8, 1), (10, 4)):
        trained("chain", ranks, last_step, fp32)
    for name in fp32:
        ours, theirs = (read_json_lines(out / name / "losses.jsonl") for out in (chain, long))
        assert len(ours) == len(theirs) == 10
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-6), name
        assert not list((chain / name / "checkpoints").glob("*.partial"))


def test_a_round_trip_by_the_tool_goes_on_bit_for_bit(trained: Trained, whole: Path, tool: Any) -> None:
    """Also in bf16, and with generators and counters."""
    names = ("zero1_bf16", "zero2_fp32", "zero3_bf16")
    out = trained("tool", 2, 2, names)
    for name in names:
        for ranks in (3, 2):
            status, _, error = tool("reshard", "--run_dir", out / name, "--ranks", ranks)
            assert status == 0, error
            manifest = read_checkpoint(out / name / "checkpoints" / "step-00000002").manifest
            assert (manifest.world_size, manifest.step) == (ranks, 2)
    trained("tool", 2, 6, names)
    for name in names:
        assert read_json_lines(out / name / "losses.jsonl") == read_json_lines(whole / name / "losses.jsonl")[:6], name


def test_sub_groups_close_when_their_local_piece_is_full() -> None:
    group = [("a", 10), ("b", 10), ("c", 1), ("d", 30)]
    assert sub_groups(group, 2, 100) == [group]
    assert sub_groups(group, 2, 26) == [group]
    assert sub_groups(group, 2, 10) == [group[:2], group[2:]]
    assert sub_groups(group, 1, 10) == [group[:1], group[1:2], group[2:]]
    assert sub_groups(group, 1, 11) == [group[:2], group[2:]]


def test_runs_of_a_parameter_cross_ranks() -> None:
    place = Place(0, numel=10, shift=3, piece=4, at=0)
    assert list(place.runs(0, 10)) == [(0, 3, 1), (1, 0, 4), (2, 0, 4), (3, 0, 1)]
    assert [place.on_rank(rank)[:2] for rank in range(5)] == [(0, 1), (1, 4), (5, 4), (9, 1), (10, 0)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: next(path.glob("*rank_1*optim*")).unlink(), r"optim_states\.pt is missing"),
        (lambda path: os.truncate(next(path.glob("*rank_1*optim*")), 1000), "has 1000 bytes instead of"),
        (lambda path: flip(next(path.glob("*rank_1*optim*"))), r"is damaged \(sha256 differs\)"),
        (lambda path: (path / "COMPLETE").unlink(), "is not complete"),
        (lambda path: change(path, world_size=3), r"0 files \*zero_pp_rank_2_mp_rank_00_optim_states\.pt instead of 1"),
        (lambda path: change(path, world_size=1), "it is not of 1 rank at stage 3"),
    ],
)
def test_the_tool_refuses_damage(whole: Path, tmp_path: Path, tool: Any, damage: Any, message: str) -> None:
    checkpoint = tmp_path / "step-00000006"
    shutil.copytree(whole / "zero3_fp32" / "checkpoints" / checkpoint.name, checkpoint)
    damage(checkpoint)
    status, _, error = tool("reshard", "--checkpoint", checkpoint, "--ranks", "4")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path: Path, **values: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(seal(manifest | values)))
    (path / "COMPLETE").write_text("4 files\n")  # as older code left it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--checkpoint", "step-00000006", "--step", "3"],
            r"--step 3 goes with --run_dir; --checkpoint step-00000006 is one step",
        ),
        (["--run_dir", "run", "--ranks", "50000"], r"--ranks 50000 is more than 4096, .*; a resumed run divides by itself"),
        (["--run_dir", "run", "--step", "7"], r"run/checkpoints/step-00000007 does not exist; steps there: none"),
        (["--run_dir", "run", "--ranks", "0"], r"--ranks 0 must be at least 1"),
    ],
)
def test_the_tool_refuses_flags_that_make_no_sense(
    words: list[str], message: str, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = tool("reshard", "--ranks", "2", *words)
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_the_tool_clears_what_an_interrupted_one_left(whole: Path, tmp_path: Path, tool: Any) -> None:
    (tmp_path / "there.64-ranks.partial").mkdir()
    checkpoint = whole / "zero3_fp32" / "checkpoints" / "step-00000006"
    status, _, error = tool("reshard", "--checkpoint", checkpoint, "--ranks", "3", "--out", tmp_path / "there")
    assert status == 0, error
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
