"""A micro batch that is computed twice: the training's bits stay, and a flipped bit names its rank."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.json_files import read_json_lines
from igpt_ds.ops.status import read_status
from igpt_ds.train.health.replay import bits, report


def test_bits_tell_apart_what_compares_equal() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        zeros, nan = torch.tensor([0.0, -0.0], dtype=dtype), torch.tensor(float("nan"), dtype=dtype)
        assert bits(zeros)[0] != bits(zeros)[1]
        assert torch.equal(bits(nan), bits(nan))


def test_the_error_says_what_to_do() -> None:
    said = report(200, 100, [("", "a (CPU)", "a"), ("the output of block 7", "b (cuda:1, H100)", "b")])
    assert "step 200: " in said
    assert "rank 1 on b (cuda:1, H100) in the output of block 7; the hardware is suspected" in said
    assert "--exclude=b)" in said
    assert "checkpoints of step 100 or later are doubtful" in said
    both = report(200, 100, [("the loss", "a (CPU)", "a"), ("the loss", "b (CPU)", "b")])
    assert "hardware is suspected" not in both
    assert "not deterministic" in both


@pytest.mark.slow
def test_the_bits_stay_a_flipped_bit_names_its_rank_and_a_busy_rank_is_slow(
    launch: Any, command: Callable[..., list[str]], with_fault: Callable[[list[str], str], list[str]], tmp_path: Path, whole: Any
) -> None:
    """Two ranks under ZeRO-3. The first launch replays each step, and is equal to `whole`, which replays none."""
    done = launch(command("run", "--replay_every", "1", "--stop_at_step", "8"), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    names = ("step", "loss", "grad_norm", "val_loss")
    rows, expected = ([{name: row.get(name) for name in names} for row in of] for of in (read(tmp_path / "run"), whole))
    assert rows == expected[: len(rows)]
    assert rows[-1]["step"] == 8

    words = with_fault(command("run", "--replay_every", "4", "--resume", "auto"), "garbage=100")
    done = launch(words, ranks=2, env={"IGPT_DS_TEST_FLIP": "1,12", "IGPT_DS_TEST_SLOW": "device,0,0.3"})
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("faults.py: error")]
    assert len(said) == 1, done.stderr[-3000:]
    assert (
        f"step 12: a micro batch that was computed twice gave different bits: rank 1 on {socket.gethostname()} (CPU)" in said[0]
    )
    assert "in the output of block 1; the hardware is suspected" in said[0]
    assert "checkpoints of step 8 or later are doubtful" in said[0]
    assert [row["step"] for row in read(tmp_path / "run") if "loss" in row][-1] == 11
    found = read_status(tmp_path / "run", 0.0)
    assert found.state == "failed"
    assert "rank 1 on" in str(found.why)
    assert found.slowest is not None, "its steps were slow before it ended"
    assert (found.slowest.rank, found.slowest.reason) == (0, "device")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run."""
    return read_json_lines(run_dir / "train.jsonl")
