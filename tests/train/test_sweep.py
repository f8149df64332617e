"""The search for a learning rate: its order, its end, and what it reads of runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.json_files import seal
from igpt_ds.train import finetune_flags, flags
from igpt_ds.train.sweep import (
    MAX_RATES,
    Result,
    best,
    best_of_search,
    finished,
    next_rate,
    points,
    rate,
    read_result,
    read_sweep,
    table,
    write_sweep,
)


def results(losses: list[float | None]) -> list[Result]:
    return [Result(rate(number), loss, 7 if loss is None else None) for number, loss in enumerate(losses)]


def test_the_papers_rates() -> None:
    assert [rate(number) for number in range(6)] == [0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003]


@pytest.mark.parametrize(
    ("losses", "then"),
    [
        ([], 0.01),
        ([2.5], 0.003),
        ([2.5, 2.4], 0.001),
        ([2.5, 2.5], 0.001),  # it has not risen
        ([2.5, 2.6], None),
        ([None], 0.003),
        ([None, None], 0.001),
        ([None, 2.5, 2.4, 2.45], None),
        ([2.5, None], None),
    ],
)
def test_what_comes_next(losses: list[float | None], then: float | None) -> None:
    assert next_rate(results(losses)) == then


def test_a_search_of_few_rates_ends_before_its_rise() -> None:
    assert next_rate(results([2.5]), most=2) == 0.003
    assert next_rate(results([2.5, 2.4]), most=2) is None


@given(st.lists(st.one_of(st.none(), st.floats(0.1, 10)), min_size=MAX_RATES, max_size=MAX_RATES))
def test_the_search_ends_at_the_first_rise_and_the_best_is_the_one_before(losses: list[float | None]) -> None:
    found: list[Result] = []
    while (lr := next_rate(found)) is not None:
        found.append(results(losses)[len(found)])
        assert found[-1].lr == lr
    assert finished(found)
    ranks = [result.rank for result in found]
    assert all(after <= before for before, after in itertools.pairwise(ranks[:-1]))
    chosen = best(found)
    assert (chosen is None) == all(result.val_loss is None for result in found)
    if chosen is not None:
        assert chosen.rank == min(ranks)


def test_the_table() -> None:
    assert table(results([None, 2.5, 2.75])) == (
        "| learning rate | final validation loss, nats per token |\n|---|---|\n"
        "| 0.01 | lost at step 7 |\n| **0.003** | **2.5000** |\n| 0.001 | 2.7500 |\n"
    )
    assert "**" not in table(results([None]))


def test_what_a_run_left(tmp_path: Path) -> None:
    assert read_result(tmp_path, 0.01) is None
    rows = [{"step": 0, "val_loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 4, "val_loss": 2.0}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_result(tmp_path, 0.01) is None
    (tmp_path / "FINISHED").touch()
    assert read_result(tmp_path, 0.01) == Result(0.01, 2.0, None)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl has no validation loss; remove the directory and try the rate again"):
        read_result(tmp_path, 0.01)
    (tmp_path / "LOST.json").write_text('{"step": 12}')
    assert read_result(tmp_path, 0.01) == Result(0.01, None, 12)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("LOST.json", "[]", "has content []"),
        ("LOST.json", "{}", "has no 'step'"),
        ("LOST.json", '{"step": 1e400}', "is not valid JSON: 1e400 is not a finite number"),
        ("train.jsonl", '{"val_loss": 2.0}\n', "line 1 has no 'step'"),
        ("train.jsonl", '{"step": 4, "val_loss": "2"}\n', "line 1 has val_loss '2'"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_clear_error(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / "FINISHED").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {complaint}")):
        read_result(tmp_path, 0.01)


def test_a_sweep_that_is_written_is_read_and_a_damaged_one_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_sweep(path, results([None, 2.5, 2.75]))
    assert read_sweep(path) == points(results([None, 2.5, 2.75]))
    good = json.loads(path.read_text())
    for changes, complaint in (
        ({"results": None}, "has results None"),
        ({"results": [3]}, "has results[0] 3"),
        ({"results": [{"lr": "1"}]}, "has results[0].lr '1'"),
        ({"results": [{"lr": 1.0}]}, "has no 'results[0].val_loss'"),
        ({"measured": 3}, "has measured 3"),
    ):
        path.write_text(json.dumps(seal(good | changes)))
        with pytest.raises(ValueError, match=re.escape(f"{path} {complaint}")):
            read_sweep(path)


def test_a_training_takes_the_best_of_a_finished_search(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep.json", [Result(0.01, 2.5, None, 0.5, step=40), Result(0.003, 2.5, None, 0.4, step=80)])
    words = ["--data", str(tmp_path), "--run_dir", "run", "--search", str(tmp_path)]
    tuning = ["--recipe", "igpt_s_ar_32", "--untrained", "0", *words]
    assert (finetune_flags.parse("", tuning).lr, finetune_flags.parse("", tuning).steps) == (0.01, None)
    assert finetune_flags.parse("", [*tuning, "--train_split", "train+val"]).steps == 40
    assert flags.choose_recipe(flags.parse("", ["--recipe", "igpt_s_ar_32", *words])).lr == 0.01
    with pytest.raises(ValueError, match=r"--lr 1 and --search .* both give a learning rate; leave out one of them"):
        finetune_flags.parse("", [*tuning, "--lr", "1"])
    for found, why in (
        ([Result(0.01, 2.5, None)], "the search is not finished"),
        (results([None] * MAX_RATES), "every rate div"),
    ):
        write_sweep(tmp_path / "sweep.json", found)
        with pytest.raises(ValueError, match=f"--search .*: {why}"):
            best_of_search(tmp_path)
