"""Only whole checkpoints count; the rest is named and passed over."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds import locks
from igpt_ds.cli import SharedError
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.files import sha256_file
from igpt_ds.json_files import seal
from igpt_ds.locks import locked
from igpt_ds.train.checkpoint import directory
from igpt_ds.train.checkpoint.directory import (
    checkpoint_name,
    choose_checkpoint,
    commit,
    list_checkpoints,
    newest_checkpoint,
    prune,
    remove_leftovers,
    set_aside_newer,
)
from igpt_ds.train.checkpoint.disk import CheckpointWriter, require_space
from igpt_ds.train.checkpoint.load import load_checkpoint
from igpt_ds.train.checkpoint.manifest import (
    Checkpoint,
    DamagedError,
    FileEntry,
    Manifest,
    RunFacts,
    file_entry,
    read_checkpoint,
    write_manifest,
)
from igpt_ds.train.checkpoint.newest import newest_state
from igpt_ds.train.checkpoint.save import Saved, agree, expected_bytes
from igpt_ds.train.checkpoint.tiers import Tier, run_tier

RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), 12, 100, 0.01, 3)
RUN = RunFacts(recipe=RECIPE, data=DataFacts("shards", "a", "p", 2), precision="fp32")


def verified_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of one directory."""
    return newest_state([Tier(directory, directory.parent)])


def make(directory: Path, step: int) -> Path:
    """A checkpoint of two ranks' worth of files, as `save_checkpoint` leaves it."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    for rank in range(2):
        (path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"x" * (10 + rank))
    files = tuple(file_entry(file) for file in sorted(path.iterdir()))
    write_manifest(path, Manifest(**vars(RUN), step=step, images_seen=step, world_size=2, stage=3, files=files))
    return path


def test_the_newest_is_by_step_not_by_name_or_age(tmp_path: Path) -> None:
    for step in (200, 1000, 30):
        make(tmp_path, step)
    (tmp_path / "step-00002000.partial").mkdir()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00001000"
    assert found.manifest.step == 1000


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "is not complete"),
        (lambda path: (path / "COMPLETE").write_text(""), "COMPLETE is damaged: it has not the sha256 of manifest.json"),
        (lambda path: next(path.glob("*rank_1*")).write_bytes(b"x"), "has 1 bytes instead of 11"),
        (lambda path: next(path.glob("*rank_0*")).unlink(), "is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("[]"), r"manifest.json has content \[\], which is not an object"),
        (lambda path: change(path, step=None), "manifest.json has step None, which is not a whole number"),
        (lambda path: change(path, files=None), "manifest.json has files None, which is not a list"),
        (lambda path: change(path, files=[{"name": "x"}]), r"manifest.json has no 'files\[0\].bytes'"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 100)
    damage(make(tmp_path, 200))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / checkpoint_name(200))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest.step == 100
    error = capsys.readouterr().err
    assert "checkpoint skipped" in error
    assert re.search(message, error)


def change(path: Path, **values: object) -> Path:
    """Other values in its manifest, as older code left them."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(seal(manifest | values)))
    (path / "COMPLETE").write_text("2 files\n")
    return path


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE"])
def test_each_flipped_byte_is_named(tmp_path: Path, name: str) -> None:
    """Also one that changes no value, such as a blank."""
    file = make(tmp_path, 100) / name
    content = file.read_bytes()
    for place in range(len(content)):
        for flip in (0x01, 0x29):  # the second makes a tab of a blank
            file.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(DamagedError, match=re.escape(str(file))):
                read_checkpoint(file.parent)
    file.write_bytes(content)
    assert read_checkpoint(file.parent).manifest.step == 100


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("values", [{"version": 9}, {"format": "x"}])
def test_one_of_another_version_stops_the_run_and_is_left_alone(tmp_path: Path, values: dict[str, object]) -> None:
    """It is no damage that newer code wrote it: nothing may be thrown away for that."""
    make(tmp_path, 100)
    change(make(tmp_path, 200), **values)
    with pytest.raises(SharedError, match=r"200/manifest\.json is not igpt_ds\.checkpoint version 2 or 3 or 4: it is version"):
        verified_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]


def test_a_file_that_the_disk_does_not_give_stops_the_run(tmp_path: Path) -> None:
    """A directory in a file's place: reading it is an OSError for everyone, root too."""
    make(tmp_path, 100)
    newest = make(tmp_path, 200)
    (newest / "manifest.json").unlink()
    (newest / "manifest.json").mkdir()
    with pytest.raises(SharedError, match=r"200/manifest\.json: Is a directory"):
        verified_checkpoint(tmp_path)
    (newest / "manifest.json").rmdir()
    (tmp_path / "step-00000200" / "COMPLETE").unlink()
    newest = make(tmp_path, 300)
    file = next(newest.glob("*rank_1*"))
    file.unlink()
    file.mkdir()
    change(newest, files=[{"name": file.name, "bytes": file.stat().st_size, "sha256": "x"}])
    message = (
        r"rank_1_.*: Is a directory: rank 0 cannot read it, and nothing was changed; repair .* or move .*300 away to continue"
    )
    with pytest.raises(SharedError, match=message):
        verified_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00000300"]


def test_a_copy_under_another_name_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 100)
    make(tmp_path, 200)
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "step-00000300")
    shutil.copytree(tmp_path / "step-00000200", tmp_path / "step-00000050")
    found = verified_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000200"
    assert "skipped: " + str(tmp_path / "step-00000300") + " holds step 100: copied or renamed" in capsys.readouterr().err
    assert names(tmp_path) == ["step-00000050", "step-00000100", "step-00000200", "step-00000300.broken"]
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "checkpoints" / "step-00000300")
    with pytest.raises(
        ValueError, match="step-00000300 holds step 100: copied or renamed; rename it to step-00000100 or move it away"
    ):
        choose_checkpoint(tmp_path, 300)


def test_pruning_keeps_the_last_and_every_kth(tmp_path: Path) -> None:
    for step in range(100, 1000, 100):
        make(tmp_path, step)
    doomed = prune(tmp_path, keep_last=2, keep_every=300)
    assert [path.name for path in doomed] == [f"{checkpoint_name(step)}.partial" for step in (100, 200, 400, 500, 700)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (300, 600, 800, 900)]


def test_checkpoints_of_later_steps_are_set_aside(tmp_path: Path) -> None:
    """Else a damaged one, passed over when a run resumed, would outlive the good ones when old ones are pruned."""
    for step in (100, 200, 300):
        make(tmp_path, step)
    (tmp_path / "step-00000100.bak").mkdir()
    set_aside_newer(tmp_path, 100)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(100)]
    assert (tmp_path / f"{checkpoint_name(300)}.broken" / "COMPLETE").exists()


class NoEngine:
    """A stage, some weights, and nothing that could load anything."""

    def __init__(self, stage: int = 3) -> None:
        self.stage, self.module = stage, torch.nn.Linear(99, 10)

    def zero_optimization_stage(self) -> int:
        return self.stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "precision is fp32 there and bf16 here; choose another --run_dir"),
        ({"recipe": replace(RECIPE, lr=2.0)}, r"lr is 0\.01 there and 2\.0 here; choose another --run_dir"),
        ({"recipe": replace(RECIPE, lr=2.0, objective="bert")}, "objective is ar there and bert here"),
        ({"recipe": replace(RECIPE, mask_prob=0.2)}, r"mask_prob is 0\.15 there and 0\.2 here"),
        ({"data": DataFacts("shards", "b", "p", 2)}, "other images than shards; name the shards and weights"),
        ({"data": DataFacts("shards", "a", "p", "stream")}, r"order 2 and this run in stream; use .* \(--stream or not\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    manifest = Manifest(**vars(RUN), step=1, images_seen=1, world_size=1, stage=3, files=())
    with pytest.raises(SharedError, match=message):
        load_checkpoint(NoEngine(), Checkpoint(tmp_path, manifest), replace(RUN, **changes))


def flip(path: Path) -> Path:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, 100)
    flip(next(path.glob("*pp_rank_0_*")))
    with pytest.raises(SharedError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is damaged \(sha256 differs\)"):
        load_checkpoint(NoEngine(), read_checkpoint(path), RUN)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, 100)
    with pytest.raises(SharedError, match="was saved at ZeRO stage 3 and this run has 1; use a ds_config of that stage"):
        load_checkpoint(NoEngine(stage=1), read_checkpoint(path), RUN)


def test_a_checkpoint_without_deepspeeds_files_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, 100)
    with pytest.raises(SharedError, match=r"step-00000100 has no file \*mp_rank_00_model_states\.pt; remove it and resume again"):
        load_checkpoint(NoEngine(), read_checkpoint(path), RUN)


def test_a_flipped_bit_sets_a_checkpoint_aside_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 100)
    damaged = flip(next(make(tmp_path, 200).glob("*rank_1*")))
    (make(tmp_path, 300) / "COMPLETE").unlink()
    found = verified_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest.step == 100
    assert f"checkpoint skipped: {damaged} is damaged (sha256 differs)" in capsys.readouterr().err
    assert names(tmp_path) == ["step-00000100", "step-00000200.broken", "step-00000300.broken"]


def test_without_an_undamaged_one_the_run_stops_and_nothing_is_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To begin at step 0 would throw the run away: the curves as well."""
    flip(next(make(tmp_path, 100).glob("*rank_1*")))
    (make(tmp_path, 200) / "COMPLETE").unlink()
    next(make(tmp_path, 300).glob("*rank_1*")).unlink()
    with pytest.raises(SharedError) as refused:
        verified_checkpoint(tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    order = ["nothing was changed", "300/zero_pp_rank_1", "is missing", "200 is not complete", "100/zero_pp_rank_1", "sha256"]
    places = [str(refused.value).index(words) for words in [*order, "restore one, or choose another --run_dir"]]
    assert places == sorted(places)
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00000300"]
    assert capsys.readouterr().err == ""


def test_a_run_that_has_only_what_was_set_aside_does_not_begin_anew(tmp_path: Path) -> None:
    make(tmp_path, 100).rename(tmp_path / "step-00000100.broken")
    with pytest.raises(SharedError, match=r"no usable checkpoint.*: step-00000100\.broken set aside before; restore one"):
        verified_checkpoint(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert verified_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "step-00000100.partial").mkdir()
    make(tmp_path, 200).rename(tmp_path / "step-00000200.12.0.partial")
    assert verified_checkpoint(tmp_path) is None
    assert names(tmp_path) == []


def test_what_was_set_aside_is_not_overwritten(tmp_path: Path) -> None:
    for _ in range(3):
        make(tmp_path, 100)
        set_aside_newer(tmp_path, 0)
    assert names(tmp_path) == ["step-00000100.2.broken", "step-00000100.3.broken", "step-00000100.broken"]
    assert list_checkpoints(tmp_path) == []


def test_choosing_offline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint; train first, or name another --run_dir"):
        choose_checkpoint(tmp_path, None)
    path = make(tmp_path / "checkpoints", 100)
    assert choose_checkpoint(tmp_path, None) == choose_checkpoint(tmp_path, 100) == read_checkpoint(path)
    make(tmp_path / "checkpoints", 200)
    with pytest.raises(ValueError, match=r"step-00000007 does not exist; steps there: 100, 200$"):
        choose_checkpoint(tmp_path, 7)
    with pytest.raises(ValueError, match=r"step-00000007 does not exist; steps there: none$"):
        choose_checkpoint(tmp_path / "checkpoints", 7)
    with pytest.raises(ValueError, match="step-00000007 does not exist; choose another step"):
        read_checkpoint(tmp_path / "step-00000007")
    flip(next(path.glob("*rank_1*")))
    with pytest.raises(ValueError, match=r"is damaged \(sha256 differs\); choose another --step"):
        choose_checkpoint(tmp_path, 100)


def test_leftovers_go_and_what_was_replaced_half_way_comes_back(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.partial").mkdir()
    (tmp_path / "step-00000100.64-ranks.partial").mkdir()
    make(tmp_path, 200).rename(tmp_path / "step-00000200.old")
    make(tmp_path, 300)
    make(tmp_path / "x", 300).rename(tmp_path / "step-00000300.old")
    (tmp_path / "x").rmdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000200", "step-00000300"]


@pytest.mark.parametrize("step", [None, 200])
def test_a_reader_restores_what_a_killed_replacement_left_and_takes_no_older_step(tmp_path: Path, step: int | None) -> None:
    make(tmp_path / "checkpoints", 100)
    newest = make(tmp_path / "checkpoints", 200)
    newest.rename(newest.with_name("step-00000200.old"))
    assert choose_checkpoint(tmp_path, step).path == newest
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000100", "step-00000200"]


def test_a_reader_waits_for_who_replaces_and_refuses_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = make(tmp_path / "checkpoints", 200)
    newest.rename(newest.with_name("step-00000200.old"))
    with locked(newest):
        monkeypatch.setattr(locks, "_mine", {})  # as another process would see it
        monkeypatch.setattr(directory, "_SWAP_SECONDS", 0.1)
        with pytest.raises(ValueError, match=r"step-00000200 is being written by .* \(pid \d+\)"):
            choose_checkpoint(tmp_path, None)
        monkeypatch.undo()


def test_a_replacement_begins_with_what_a_killed_one_left(tmp_path: Path) -> None:
    make(tmp_path, 100)
    make(tmp_path / "x", 100).rename(tmp_path / "step-00000100.old")
    make(tmp_path / "y", 100).rename(tmp_path / "new")
    again = Manifest(**vars(RUN), step=100, images_seen=7, world_size=2, stage=3, files=())
    commit(tmp_path / "new", tmp_path / "step-00000100", again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "x", "y"]


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    make(tmp_path, 100)
    make(tmp_path / "new", 100).rename(tmp_path / "step-00000100.partial")
    again = Manifest(**vars(RUN), step=100, images_seen=7, world_size=2, stage=3, files=())
    commit(tmp_path / "step-00000100.partial", tmp_path / "step-00000100", again)
    assert read_checkpoint(tmp_path / "step-00000100").manifest == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "step-00000100"]


def test_the_next_checkpoint_is_as_large_as_the_one_before_or_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    estimates = [expected_bytes(NoEngine(stage), Tier(tmp_path, tmp_path)) for stage in (3, 1)]
    assert estimates == [int(1.02 * 12 * 1000) + 2**17, int(1.02 * 16 * 1000) + 2**17]
    make(tmp_path, 100)
    assert expected_bytes(NoEngine(), Tier(tmp_path, tmp_path)) == int(1.02 * 21)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1000, "checkpoint step-00000100")
    assert not (tmp_path / "a").exists()
    with pytest.raises(
        ValueError, match=r"step-00000100 needs 1,000,000,000,000,000,000 bytes and .*/b has [\d,]+ free; free some"
    ):
        require_space(tmp_path / "a" / "b", 10**18, "checkpoint step-00000100")


def test_a_full_disk_is_told_of_later_and_nothing_is_raised(tmp_path: Path) -> None:
    """/dev/full is a disk without any space."""
    writer = CheckpointWriter(NoEngine())
    writer.save({"x": torch.zeros(10)}, str(tmp_path / "a.pt"))
    assert (writer.error, len(writer.entries)) == ("", 1)
    entry = writer.entries[0]
    assert entry == FileEntry("a.pt", (tmp_path / "a.pt").stat().st_size, sha256_file(tmp_path / "a.pt"))
    writer.save({"x": torch.zeros(1_000_000)}, "/dev/full")
    assert writer.error.startswith("/dev/full: No space left on device; free some space")
    writer.save({}, str(tmp_path / "b.pt"))
    assert not (tmp_path / "b.pt").exists()
    assert writer.zero_optimization_stage() == 3  # everything else is the engine's own


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(NoEngine())
    writer.makedirs(str(tmp_path / "file" / "x"))
    assert writer.error.startswith(f"{tmp_path}/file/x: Not a directory; ")


def test_one_ranks_error_is_every_ranks(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    agree(["", ""], tmp_path / "x.partial", "checkpoint x could not be saved", run_tier(tmp_path))
    with pytest.raises(SharedError, match="checkpoint x could not be saved: on rank 1 y: No space left; its files were removed"):
        agree(["", "y: No space left"], tmp_path / "x.partial", "checkpoint x could not be saved", run_tier(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_save_says_its_speed() -> None:
    assert str(Saved(Path("step-1"), 2.0, 3_000_000_000)) == "step-1: 3.000 GB in 2.0 s, 1500 MB/s"


def test_pruning_never_removes_the_newest_complete_one(tmp_path: Path) -> None:
    make(tmp_path, 100)
    (make(tmp_path, 200) / "COMPLETE").unlink()
    prune(tmp_path, keep_last=1, keep_every=0)
    assert newest_checkpoint(tmp_path).manifest.step == 100
