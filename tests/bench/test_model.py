"""The benchmarks of the model, each run whole at toy sizes: every row is there, none failed, and the file is read again."""

import time
from pathlib import Path

import pytest
import torch
from device import DeviceSession, run_process
from harness import BenchRow, read_bench

from igpt_ds.plan.costs import RankLayout

DEVICES = {"CUDA_VISIBLE_DEVICES": ""}


def session(seconds: float = 60, out: Path | None = None) -> DeviceSession:
    return DeviceSession(True, out, torch.device("cpu"), time.monotonic() + seconds)


def test_what_finds_nothing_is_a_row_that_says_why(tmp_path, capsys):
    def memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def guest():
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

    def broken():
        raise RuntimeError("no kernel\nat all")

    here = session(out=tmp_path / "bench.json")
    assert here.attempt("a", 5, memory) is None
    assert here.attempt("b", 5, guest) is None
    assert here.attempt("c", 5, broken) is None
    assert here.attempt("d", 1, lambda: time.sleep(30) or []) is None
    assert here.attempt("e", 5, lambda: [BenchRow("e", "s", 2.0, 4.0, "peer")]) == 2.0
    notes = [row.note for row in here.rows]
    assert notes == [
        "out of memory",
        "deepspeed is not installed",
        "failed: RuntimeError: no kernel",
        "not done in its time",
        "",
    ]
    assert here.failed == ["c"]
    assert "RuntimeError: no kernel" in capsys.readouterr().err
    assert read_bench(tmp_path / "bench.json").rows == here.rows


def test_no_time_is_left():
    late = session(seconds=0)
    late.attempt("a", 5, lambda: pytest.fail("started"))
    assert [row.note for row in late.rows] == ["not done in its time"]


def test_a_process_that_dies_or_takes_too_long_is_a_row(tmp_path: Path):
    program = tmp_path / "dies.py"
    program.write_text("import os, time\nos.kill(os.getpid(), 9)\n")
    here = session(out=tmp_path / "bench.json")
    run_process(here, program, ["a"], 60)
    here.end = 0
    run_process(here, program, ["b", "c"], 60)
    assert [(row.what, row.note) for row in here.rows] == [
        ("a", "failed: it ended with status -9"),
        ("b c", "no time was left"),
    ]
    assert read_bench(tmp_path / "bench.json").rows == here.rows


def test_mfu_is_of_the_printed_peak():
    here = session()
    row = here.flops_row("a", 989.4e12, 2.0)
    assert (row.ours, row.peer) == (494.7, 989.4)
    assert row.ratio == 0.5
    config = here.config("xl", 64)
    C, L, T, V = config.n_embd, config.n_layer, config.n_ctx, config.n_vocab
    palm = 6 * (12 * L * C * C + V * C) + 12 * L * C * T
    step = here.step_row("a", config, RankLayout(1, 3), 1e-7)
    assert step.ours == pytest.approx(3 * T * palm / 1e-7 / 1e12)
    assert f"causal MFU {3 * T * (palm - 6 * L * C * T) / 1e-7 / 989.4e12:.1%}" in step.note


@pytest.mark.slow
def test_the_model_benchmark_runs(tmp_path, launch, tool):
    command = ["tools/bench/model.py", "--toy", "--quick", "--out", tmp_path / "bench.json"]
    done = launch(command, by="python")  # it measures its own memory, which in a fork begins with that of the parent
    assert done.returncode == 0, done.stderr
    rows = read_bench(tmp_path / "bench.json").rows
    for start in (
        "training step",
        "memory of a training step",
        "full activation",
        "selective activation",
        "sampling",
        "features",
    ):
        assert any(row.what.startswith(start) for row in rows), start
    assert all(row.ours > 0 and row.peer > 0 and row.bar is None for row in rows)
    kept = {row.what.split()[0]: row.ratio for row in rows if "activations kept" in row.what}
    assert kept["full"] < kept["selective"] < 1
    assert tool("bench/model", "--show", tmp_path / "bench.json")[1].strip() in done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_whole_on_a_cpu(tmp_path, launch, tool):
    done = launch(["tools/bench/gpu.py", "--toy", "--out", tmp_path / "bench.json"], env=DEVICES, by="python")
    assert done.returncode == 0, done.stderr
    about = read_bench(tmp_path / "bench.json")
    rows = about.rows
    assert rows[0].what == "host time of a ZeRO-3 step, 2 blocks, full checkpointing"
    planned = [row for row in rows if row.unit == "TFLOP/s" and "best" not in row.what and "against HF" not in row.what]
    assert all("plan" in row.note for row in planned)
    assert not [row for row in rows if row.peer_name == "not measured"]
    for start in (
        "product",
        "copy",
        "attention",
        "XL slice, the best without",
        "XL under ZeRO-3, full checkpointing, 4",
        "XL under ZeRO-3, full checkpointing, 8",
        "step of XL",
        "memory of XL",
        "S training",
        "S features",
    ):
        assert any(row.what.startswith(start) for row in rows), start
    for mode in ("none", "selective", "full"):
        assert sum(f"{mode} checkpointing" in row.what for row in rows if row.what.startswith("XL slice")) == 2
    assert sum(row.peer_name.startswith("HF") for row in rows) == 2
    assert about.table(with_cores=False) in done.stdout
    assert tool("bench/gpu", "--show", tmp_path / "bench.json")[1].strip() == about.table(with_cores=False)
    refused = launch(["tools/bench/gpu.py", "--only", "ceilings"], env=DEVICES, by="python")
    assert refused.stderr == "gpu.py: error: torch sees no GPU here; --toy runs on a CPU\n"
