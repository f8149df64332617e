"""How often to save, and what becomes training: the closed form against simulated failures, and against published runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from igpt_ds.plan import goodput_command
from igpt_ds.plan.goodput import DAY, GPU_MTBF, HOUR, Measured, Scenario, daly, expected, fit, simulate, young

TYPICAL = Scenario(mtbf=3 * HOUR, interval=600, save=20, startup=400, down=60, queue=120, validation=0.02)


def test_the_interval_of_young_and_daly() -> None:
    assert young(20, 10_000) == pytest.approx(632.456, abs=0.001)
    assert daly(20, 10_000) == pytest.approx(619.2, abs=0.1)
    assert daly(30, 10) == 10  # a save as long as two failures are apart
    assert HOUR * 50_000 < GPU_MTBF < HOUR * 51_000


def test_no_other_interval_is_better_than_dalys() -> None:
    best = daly(TYPICAL.save, TYPICAL.mtbf)
    goodputs = {share: expected(replace(TYPICAL, validation=0.0, interval=share * best)) for share in (0.5, 0.8, 1, 1.25, 2)}
    assert max(goodputs, key=goodputs.__getitem__) == 1


@pytest.mark.parametrize(
    "one",
    [
        TYPICAL,
        replace(TYPICAL, mtbf=1200.0, interval=150),  # start-ups that fail
        replace(TYPICAL, save=0.5, flush=120, interval=300),
        replace(TYPICAL, queue=3600.0, requeued=0.3),
    ],
)
def test_simulated_failures_agree_with_the_closed_form(one: Scenario) -> None:
    found = simulate(one, 20_000 * one.mtbf, seed=1)
    assert sum(found.seconds.values()) == pytest.approx(20_000 * one.mtbf)
    assert min(found.seconds.values()) >= 0
    assert found.goodput == pytest.approx(expected(one), abs=0.01)
    assert simulate(one, 50 * DAY, seed=1) == simulate(one, 50 * DAY, seed=1)


def test_a_fast_tier_loses_less_and_its_loss_costs() -> None:
    slow = replace(TYPICAL, mtbf=HOUR, interval=1800.0)
    tiers = replace(slow, fast_interval=120.0, fast_save=1.0)
    without, half, whole = (simulate(one, 200 * DAY).goodput for one in (slow, replace(tiers, fast_share=0.5), tiers))
    assert without + 0.02 < half < whole - 0.02
    assert min(simulate(replace(tiers, fast_share=0.5), 200 * DAY).seconds.values()) >= 0


def test_a_scenario_fitted_on_half_of_the_runs_predicts_the_others() -> None:
    one = replace(TYPICAL, mtbf=HOUR, queue=0.0)
    runs = [simulate(one, 4 * DAY, seed=seed) for seed in range(20)]
    half = runs[::2]
    plain = [Measured(run.seconds, run.failures, one.interval, one.save) for run in half]
    fitted = fit(plain)
    others = [run.seconds for run in runs[1::2]]
    measured = sum(run["training"] for run in others) / sum(sum(run.values()) for run in others)
    assert fitted.mtbf == pytest.approx(one.mtbf, rel=0.15)
    assert expected(fitted) == pytest.approx(measured, abs=0.02)
    late = [simulate(replace(one, flush=300.0), 4 * DAY, seed=seed) for seed in range(20)]  # each failure also loses a save
    fitted = fit([Measured(run.seconds, run.failures, one.interval, one.save) for run in late])
    assert fitted.flush == pytest.approx(300, rel=0.2)
    waits = [replace(run, seconds=run.seconds | {"queue": 4 * HOUR}) for run in plain]
    assert fit(waits).queue > 60  # taken as waits after failures
    first = [replace(run, after_failures={"down": run.seconds["down"], "queue": 0.0}) for run in waits]
    assert fit(first) == fit(plain)  # the wait before the first start says nothing of failures
    with pytest.raises(ValueError, match="a run with --fast_dir has two tiers"):
        fit([replace(run, fast_saves=1) for run in waits])
    with pytest.raises(ValueError, match="no run has two saves"):
        fit([Measured({"training": 1.0}, 0, None, None)])


def test_llama_3s_effective_training_time() -> None:
    """Above 90 % with 419 unexpected of 466 interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, 3.3.4).

    Start-up and save are not published. With ten minutes for a start and a short save the model agrees; with twice as many
    minutes it does not, so it is no model that always says yes.
    """
    run = Scenario(mtbf=54 * DAY / 466, interval=daly(5, 54 * DAY / 466), save=5, startup=600)
    assert 0.90 < expected(run) < 0.93
    assert expected(replace(run, startup=1200)) < 0.89
    assert pytest.approx(3.09 * HOUR, rel=0.01) == GPU_MTBF / 16384


@pytest.mark.parametrize(("mtbf", "save", "recovery"), [(3 * HOUR, 30.0, 300.0), (24 * HOUR, 60.0, 600.0), (HOUR, 10.0, 120.0)])
def test_the_best_interval_is_that_of_saxena_and_others(mtbf: float, save: float, recovery: float) -> None:
    """The time between saves, the save included, with most availability is s + sqrt(2 (M + R) s + s^2) (arXiv 2410.18124)."""
    published = save + math.sqrt(2 * (mtbf + recovery) * save + save**2)
    one = Scenario(mtbf=mtbf, interval=1.0, save=save, startup=recovery)
    best = max((expected(replace(one, interval=float(tau))), tau) for tau in range(10, 10_000, 10))[1]
    assert best + save == pytest.approx(published, rel=0.08)
    assert expected(replace(one, interval=published - save)) == pytest.approx(expected(replace(one, interval=best)), abs=0.001)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    goodput_command.main(["--gpus", "512", "--save_seconds", "20", "--queue_seconds", "1800", "--days", "300"])
    said = capsys.readouterr().out
    assert "failures   one in 4 d 2 h" in said
    assert "saves      20 s every 1 h 2 min of training" in said
    goodput_command.main(["--gpus", "512", "--save_seconds", "20", "--fast_interval", "60", "--json"])
    assert 0.98 < json.loads(capsys.readouterr().out)["goodput"] < 1
    measured = {
        "seconds": {"training": 80.0, "start-up": 10.0, "down": 10.0},
        "failures": 1,
        "save_interval": 5.0,
        "save_seconds": 0.1,
    }
    (tmp_path / "m.jsonl").write_text(json.dumps({"goodput": measured | {"wall": 100.0}}) + "\n")
    goodput_command.main(["--fit", str(tmp_path / "m.jsonl"), "--days", "1"])
    assert "failures   one in 1 min 30 s" in capsys.readouterr().out
    for words, complaint in {
        "--gpus 0": "--gpus 0 must be at least 1",
        "--interval 0": "--interval 0 must be a number above 0",
        "--requeued 2": "--requeued 2 must be at most 1",
        "--queue_seconds nan": "--queue_seconds nan must be a number of at least 0",
        "--save_seconds 0": "--save_seconds 0 leaves no best interval",
        f"--fit {tmp_path}/none": "none does not exist; write the file with",
        f"--fit {tmp_path}": "is no file; write the file with",
        f"--fit {tmp_path}/m.jsonl --gpus 8": "--gpus 8 needs --gpu_mtbf_hours, for with --fit the failures are those",
        "--gpu_mtbf_hours 1e-300": "the time between two failures is 3.6e-297 s, and must be at least 25.9 s to simulate 30 days",
        "--interval 1e-310": "the time between two saves is 1e-310 s, and must be at least 0.001 s",
        "--fast_interval 1e-310": "the time between two fast saves is 1e-310 s, and must be at least 0.001 s",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            goodput_command.main(words.split())
    for damaged, (value, complaint) in {
        "failures": (-1, "failures -1, which is out of range"),
        "save_interval": (-5.0, "save_interval -5, which is out of range"),
        "save_seconds": (math.nan, "save_seconds nan, which is out of range"),
        "seconds": ({"training": math.inf}, "training inf, which is out of range"),
        "after_failures": ({"down": -1.0}, "down -1, which is out of range"),
    }.items():
        (tmp_path / "m.jsonl").write_text(json.dumps({"goodput": measured | {damaged: value}}) + "\n")
        with pytest.raises(ValueError, match=f"m.jsonl line 1 field 'goodput'.*{complaint}"):
            goodput_command.main(["--fit", str(tmp_path / "m.jsonl")])
    (tmp_path / "m.jsonl").write_text(json.dumps({"goodput": measured | {"seconds": {}}}) + "\n")
    with pytest.raises(ValueError, match="no run kept a step of training"):
        goodput_command.main(["--fit", str(tmp_path / "m.jsonl")])
