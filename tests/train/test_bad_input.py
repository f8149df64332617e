"""What a user can get wrong on the command line of train.py: one line, the value, the file, the fix, status 2."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import Recipe
from igpt_ds.train import flags
from igpt_ds.train.schedule import warmup_note

ROOT = Path(__file__).parents[2]
Command = Callable[..., list[str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """train.py's main, on one rank; everything below stops before the ranks join."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("train_story", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda words: module.main(words[1:])


def test_unknown_recipe(main: Any) -> None:
    with pytest.raises(ValueError, match=r"recipe 'igpt_xxl' is unknown; did you mean igpt_.*known: .*igpt_xl_ar_64"):
        main(["train.py", "--recipe", "igpt_xxl", "--dry_run"])


def test_the_mask_of_an_objective_that_hides_nothing(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"mask_prob=0\.2 has no effect on igpt_s_ar_32: its objective is ar"):
        main(["train.py", "--recipe", "igpt_s_ar_32", "--mask_prob", "0.2", "--dry_run"])
    main(["train.py", "--recipe", "igpt_s_bert_32", "--mask_prob", "0.2", "--init", "sparse_transformer", "--dry_run"])
    assert "igpt_s_bert_32" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--init 'xavier' is unknown; known: released"):
        main(["train.py", "--recipe", "igpt_s_bert_32", "--init", "xavier", "--dry_run"])


def test_missing_paths(main: Any, command: Command, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data and --run_dir are required"):
        main(["train.py", "--recipe", "igpt_s_ar_32"])
    with pytest.raises(ValueError, match=r"nowhere is no shard directory.*tools/make_shards.py"):
        main(command("run", "--data", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"^--ds_config: nothing\.json does not exist$"):
        main(command("run", "--ds_config", "nothing.json"))


def test_shards_that_do_not_fit_the_recipe(main: Any, command: Command) -> None:
    with pytest.raises(ValueError, match="n_px=4 but the model has n_px=8; make shards with --n_px 8"):
        main(command("run", "--n_px", "8"))
    with pytest.raises(ValueError, match=r"n_vocab=8 .*n_vocab=16"):
        main(command("run", "--n_vocab", "16"))


@pytest.mark.parametrize(
    ("flag", "least"),
    [("val_images", 1), ("stop_at_step", 1), ("save_every", 0), ("keep_last", 1), ("seed", 0), ("max_rollbacks", 0)],
)
def test_numbers_that_are_too_small(main: Any, command: Command, flag: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"--{flag} {least - 1} must be at least {least}"):
        main(command("run", f"--{flag}", str(least - 1)))


def test_torn_shard(main: Any, command: Command, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "torn")
    shard = tmp_path / "torn" / "train-000000.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(ValueError, match=r"train-000000\.tar is missing or torn: \d+ bytes, expected \d+"):
        main(command("run", "--data", str(tmp_path / "torn")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_bad", "1"], "--max_bad 1 must be at least 0 and below 1"),
        (["--data_weights", "1", "2"], "--data_weights has 2 numbers for 1 datasets; give one for each"),
        (["--exclude", "nothing.json"], r"exclusion list nothing\.json does not exist"),
        (["--stream", "https://host/x"], r"--stream https://host/x has no place for the name of a shard"),
        (["--stream", "{shard}", "--on_bad", "skip"], "--stream takes one --data as it is, without"),
        (["--stream", "{shard}", "--exclude", "a.json"], "--stream takes one --data as it is, without"),
        (["--stream", "{shard}", "--data", "a", "b"], "--stream takes one --data as it is, without"),
        (["--max_minutes", "-1"], "--max_minutes -1 must be a number of minutes, at least 0"),
        (["--hang_minutes", "nan"], "--hang_minutes nan must be a number of minutes, at least 0"),
        (["--spike_skip_images", "9"], "--spike_skip_images 9 needs --on_spike rollback"),
        (["--wandb", "p"], "--wandb needs the package wandb, which is not installed: pip install wandb, or leave --wandb out"),
        (["--spike_patience", "0"], "spike_patience=0 must be a whole number of at least 1"),
    ],
)
def test_ways_to_read_that_do_not_fit(main: Any, command: Command, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(command("run", *words))


def test_batch_that_does_not_divide(main: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="batch_images=12 does not divide into 5 ranks; nearest that does: 10 or 15"):
        main(command("run"))
    with pytest.raises(ValueError, match="into 5 ranks x micro batch 4; nearest that does: 20"):
        main(command("run", "--micro_batch", "4"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'"),
        ({"gradient_clipping": 1.0}, "'gradient_clipping' is set by the recipe as clip; remove it here"),
        ({"zero_optimization": {"stage": 0}}, "stage=0 must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "subgroup_size": 5}}, "unknown key 'zero_optimization.subgroup_size'"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "no 'zero_optimization.mics_shard_size' any more; use zero"),
    ],
)
def test_ds_config_keys(main: Any, command: Command, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | keys))
    with pytest.raises(ValueError, match=message) as error:
        main(command("run", "--ds_config", str(path)))
    assert str(path) in str(error.value)


def test_a_warm_up_longer_than_the_run_shrinks_with_it(command: Command, recipe: Recipe) -> None:
    """The recipe's is 3 of 12 steps; a flag for it is taken as it is, and a longer run changes nothing."""

    def chosen(*words: str) -> tuple[int, str]:
        args = flags.parse("", command("run", *words)[1:])
        found = flags.choose_recipe(args)
        return found.warmup_steps, warmup_note(args, recipe.warmup_steps, found)

    steps, note = chosen("--steps", "2")
    assert steps == 1
    assert note.startswith("--steps 2 is below the warm-up of 3 steps, which is now 1")
    assert chosen("--steps", "3") == chosen("--steps", "400") == chosen() == (3, "")
    assert chosen("--steps", "2", "--warmup_steps", "2") == (2, "")
    with pytest.raises(ValueError, match="warmup_steps=3 must lie between 0 and steps=2"):
        chosen("--steps", "2", "--warmup_steps", "3")


def test_warm_up_by_epochs(main: Any, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny dataset's training split has 37 images, in batches of 12."""
    main(command("run", "--dry_run", "--warmup_epochs", "1.5"))
    assert "12 steps with 5 of warm-up" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--warmup_epochs 1 needs --data to count, and no --warmup_steps beside it"):
        main(command("run", "--warmup_epochs", "1", "--warmup_steps", "3"))
    with pytest.raises(ValueError, match="--warmup_epochs 1 needs --data to count"):
        main(["train.py", "--recipe", "igpt_s_ar_32", "--dry_run", "--warmup_epochs", "1"])
    with pytest.raises(ValueError, match=r"warmup_epochs=9 of 37 images are 28 steps, more than steps=12"):
        main(command("run", "--warmup_epochs", "9"))


def test_ranks_that_share_an_image(main: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="sequence_parallel=3 does not divide n_head=2; here it may be 1"):
        main(command("run", "--sequence_parallel", "3"))
    with pytest.raises(ValueError, match="--sequence_parallel 0 must be at least 1"):
        main(command("run", "--sequence_parallel", "0"))


def test_dry_run_prints_the_plan_and_writes_nothing(main: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["train.py", "--recipe", "igpt_xl_ar_64", "--dry_run", "--run_dir", str(tmp_path / "run"), "--micro_batch", "4"])
    assert "6,810,875,904" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_user_sees_one_line_and_status_2(launch: Any, command: Command) -> None:
    done = launch(command("run", "--n_px", "8"))
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_or_abbreviated_flag_is_refused(launch: Any, command: Command) -> None:
    done = launch(command("run", "--stepz", "8"))
    assert done.returncode == 2
    assert "unknown flag --stepz; did you mean --steps?" in done.stderr
