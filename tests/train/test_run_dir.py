"""A run directory holds one run."""

import argparse
import dataclasses
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.config import Recipe, override, recipe_to_dict
from igpt_ds.data.facts import DataFacts
from igpt_ds.ds_config import Run, join
from igpt_ds.json_files import seal
from igpt_ds.model import cpu_kernels, cpu_speed
from igpt_ds.train import run_dir, session

DATA = DataFacts("shards", "d", "p", 2)
ZERO = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def palette(tmp_path: Path) -> Path:
    np.save(tmp_path / "palette.npy", np.zeros((8, 3), np.float32))
    return tmp_path / "palette.npy"


def start(where: Path, run: Run, palette: Path, resume: bool = False, data: DataFacts = DATA) -> None:
    run_dir.check(where, run, data, palette, resume)
    run_dir.record(where, run, data, palette, cpu_kernels.used())


def save(where: Path, step: int = 4) -> None:
    (where / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def test_a_run_is_written_down_and_can_be_given_back(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where = tmp_path / "runs" / "a"
    start(where, join(recipe, ZERO, 2), palette, resume=False)
    assert run_dir.read_recipe(where / "run.json") == recipe
    assert run_dir.read_run(where)["ds_config"]["gradient_accumulation_steps"] == 1
    assert (where / "palette.npy").read_bytes() == palette.read_bytes()


def test_the_same_run_continues_only_when_asked(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    start(where, run, palette, resume=False)
    (where / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    save(where, 2)
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume auto"):
        start(where, run, palette, resume=False)
    start(where, run, palette, resume=True)
    assert not (where / "checkpoints" / "step-00000004.partial").exists()


def test_another_split_is_refused_by_name(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    both = dataclasses.replace(DATA, split="train+val")
    start(where, run, palette)  # an earlier version, which did not record the split
    save(where)
    start(where, run, palette, True, both)
    with pytest.raises(ValueError, match=r"--train_split is train\+val there and train here; choose another --run_dir"):
        start(where, run, palette, True, dataclasses.replace(DATA, split="train", dataset_hash="e"))


def test_another_runs_config_is_refused_by_name(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where = tmp_path / "a"
    start(where, join(recipe, ZERO, 2), palette, resume=False)
    save(where)
    other = join(dataclasses.replace(recipe, lr=0.02), ZERO, 2)
    with pytest.raises(
        ValueError, match=r"run.json belongs to another run: --lr is 0.01 there and 0.02 here; choose another --run_dir"
    ):
        start(where, other, palette, resume=True)
    masked = join(dataclasses.replace(recipe, name="other", objective="bert"), ZERO, 2)
    with pytest.raises(
        ValueError, match=r"run.json belongs to another run: objective is ar there and bert here; choose another --run"
    ):
        start(where, masked, palette, resume=True)
    deeper = join(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, n_layer=7)), ZERO, 2)
    with pytest.raises(ValueError, match=f"--n_layer is {recipe.model.n_layer} there and 7 here"):
        start(where, deeper, palette, resume=True)
    with pytest.raises(ValueError, match=r"dataset_hash is d there and e here"):
        start(where, join(recipe, ZERO, 2), palette, True, dataclasses.replace(DATA, dataset_hash="e"))
    with pytest.raises(ValueError, match=r"order is 2 there and stream here"):
        start(where, join(recipe, ZERO, 2), palette, True, dataclasses.replace(DATA, order="stream"))
    with pytest.raises(ValueError, match=r"images in order 2 and this version in order 3, so only the version that began it"):
        start(where, join(recipe, ZERO, 2), palette, True, dataclasses.replace(DATA, order=3))


@pytest.mark.parametrize("resume", [False, True])
def test_before_the_first_checkpoint_anything_may_change(tmp_path: Path, recipe: Recipe, palette: Path, resume: bool) -> None:
    where = tmp_path / "a"
    start(where, join(recipe, ZERO, 2), palette)
    (where / "checkpoints" / "step-00000004.partial").mkdir(parents=True)  # a save that was interrupted
    other = tmp_path / "other.npy"
    np.save(other, np.ones((8, 3), np.float32))
    start(where, join(dataclasses.replace(recipe, lr=0.02), ZERO, 2), other, resume, dataclasses.replace(DATA, dataset_hash="e"))
    assert run_dir.read_recipe(where / "run.json").lr == 0.02
    assert (where / "palette.npy").read_bytes() == other.read_bytes()


def test_a_run_of_older_code_continues(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    """Knobs that it did not know are those it had."""
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    start(where, run, palette)
    path = where / "run.json"
    values = json.loads(path.read_text())
    del values["recipe"]["mask_prob"], values["recipe"]["init"], values["sha256"]
    del values["recipe"]["dropout"], values["recipe"]["weight_decay"], values["recipe"]["head_std"]
    path.write_text(json.dumps(values | {"version": 1}))
    save(where)
    start(where, run, palette, resume=True)
    path.write_text(json.dumps(values | {"version": 1}))
    with pytest.raises(ValueError, match="init is released there and sparse_transformer here"):
        start(where, join(dataclasses.replace(recipe, init="sparse_transformer"), ZERO, 2), palette, resume=True)
    tied = join(override(recipe, tied_embeddings=True), ZERO, 2)
    with pytest.raises(ValueError, match="--tied_embeddings is False there and True here"):
        start(where, tied, palette, resume=True)
    start(tmp_path / "b", tied, palette)
    save(tmp_path / "b")
    with pytest.raises(ValueError, match="--tied_embeddings is True there and False here"):
        start(tmp_path / "b", run, palette, resume=True)


@pytest.mark.parametrize("product", cpu_kernels.PRODUCTS)
def test_a_resumed_run_takes_the_recorded_product(
    tmp_path: Path, recipe: Recipe, palette: Path, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "_used", None)
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    monkeypatch.delenv(cpu_speed.PRODUCT_VARIABLE)
    assert session.cpu_product(where) == cpu_speed.fastest_product()
    monkeypatch.setenv(cpu_speed.PRODUCT_VARIABLE, product)
    assert session.cpu_product(where) == product
    cpu_kernels.use(product)
    start(where, run, palette)
    monkeypatch.setattr(cpu_kernels, "_used", None)
    assert session.cpu_product(where) == product
    path = where / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(seal(values | {"cpu_product": "blas"})))
    with pytest.raises(ValueError, match=r"run.json has cpu_product 'blas'"):
        session.cpu_product(where)
    del values["cpu_product"]  # of older code, which knew one product
    path.write_text(json.dumps(seal(values)))
    assert session.cpu_product(where) == "onednn"


def test_checkpoints_of_nobody_knows_which_run_are_refused(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints but no run\.json"):
        start(tmp_path / "a", join(recipe, ZERO, 2), palette, resume=True)


def test_another_palette_is_not_overwritten(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where = tmp_path / "a"
    where.mkdir()
    np.save(where / "palette.npy", np.ones((8, 3), np.float32))
    with pytest.raises(ValueError, match=r"palette.npy differs from the palette"):
        start(where, join(recipe, ZERO, 2), palette, resume=True)


def test_a_resumed_run_validates_on_as_many_images_as_before(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    new, other = (argparse.Namespace(run_dir=where, resume="auto", val_images=given) for given in (None, 7))
    assert run_dir.number_validated(new) == 5000  # nothing is there yet
    start(where, run, palette)
    assert run_dir.number_validated(new) == 5000  # nothing is saved yet
    save(where)
    assert run_dir.number_validated(new, default=3) is None  # all, as earlier versions without a record
    run_dir.record(where, run, DATA, palette, cpu_kernels.used(), val_images=40)
    assert (run_dir.number_validated(new), run_dir.number_validated(other)) == (40, 7)
    assert run_dir.number_validated(argparse.Namespace(run_dir=where, resume="never", val_images=None)) == 5000
    old = json.loads((where / "run.json").read_text())
    (where / "run.json").write_text(json.dumps(seal(old | {"val_images": 0})))
    with pytest.raises(ValueError, match=r"run\.json has val_images 0"):
        run_dir.number_validated(new)


def test_files_that_are_no_run_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run config .*run\.json is not igpt_ds\.run version 1 or 2: it has no 'format'"):
        run_dir.read_run(tmp_path)
    with pytest.raises(ValueError, match="is not a recipe"):
        run_dir.read_recipe(tmp_path / "run.json")
    changed = json.dumps(run_dir.RUN.seal({"recipe": recipe_to_dict(recipe)})).replace(recipe.name, "other")
    (tmp_path / "run.json").write_text(changed)
    with pytest.raises(ValueError, match=r'run\.json was changed .*; save its "recipe" as a file of its own'):
        run_dir.read_recipe(tmp_path / "run.json")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_to_dict(recipe)))
    assert run_dir.read_recipe(path) == recipe


def test_a_start_that_lost_the_run_may_not_save(tmp_path, monkeypatch):
    run_dir.check_owner(tmp_path)
    (tmp_path / "owner").write_text("12.1\n")
    run_dir.check_owner(tmp_path)  # nobody's start, outside of a batch job
    monkeypatch.setenv("IGPT_DS_OWNER", "12.1")
    run_dir.check_owner(tmp_path)
    monkeypatch.setenv("IGPT_DS_OWNER", "12.0")
    with pytest.raises(ValueError, match=r"owner names 12.1 and this start is 12.0: .*; nothing was saved"):
        run_dir.check_owner(tmp_path)


def test_a_run_at_work_is_not_disturbed(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    """test_run_lock.py has the rest."""
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    (where / "heartbeat").mkdir(parents=True)

    def beat() -> None:
        values = {"step": 3, "host": "elsewhere", "pid": 7, "phase": "step", "time": time.time(), "written": time.time()}
        (where / "heartbeat" / "new").write_text(json.dumps(values))
        (where / "heartbeat" / "new").rename(where / "heartbeat" / "rank-00000.json")

    beat()
    threading.Timer(0.2, beat).start()
    with pytest.raises(ValueError, match=r"rank 0 on elsewhere \(pid 7\) wrote \d s ago; .*choose another --run_dir"):
        start(where, run, palette)
    assert not (where / "run.json").exists()


def test_the_start_that_owner_names_goes_on_beside_an_older_one(
    tmp_path: Path, recipe: Recipe, palette: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, run = tmp_path / "a", join(recipe, ZERO, 2)
    (where / "heartbeat").mkdir(parents=True)
    beat = {"host": "lost", "pid": 7, "phase": "step", "time": time.time(), "written": time.time()}
    (where / "heartbeat" / "rank-00000.json").write_text(json.dumps(beat))
    (where / "owner").write_text("12.1\n")
    monkeypatch.setenv("IGPT_DS_OWNER", "12.1")
    began = time.monotonic()
    start(where, run, palette)
    assert time.monotonic() - began < 10  # it did not wait for the heartbeat to stand still


def test_a_file_is_no_run_directory(tmp_path: Path, recipe: Recipe, palette: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--run_dir .*/file is a file; choose a directory"):
        start(tmp_path / "file", join(recipe, ZERO, 2), palette)
    with pytest.raises(ValueError, match=r"--run_dir .*/file/x cannot be made: Not a directory; choose another directory"):
        start(tmp_path / "file" / "x", join(recipe, ZERO, 2), palette)
    with pytest.raises(ValueError, match=r"--run_dir /proc/x cannot be made: No such file or directory; choose another"):
        start(Path("/proc/x"), join(recipe, ZERO, 2), palette)
