"""Measurements: bars that hold and bars that fail, a table that says so, and a run of the real thing."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from harness import BenchRow, finish, medians, one_core, read_bench
from PIL import Image

from igpt_ds.json_files import seal


def test_rows_hold_or_miss():
    assert BenchRow("a", "images/s", 10, 5, "peer", 2.0).holds
    assert not BenchRow("a", "images/s", 9.9, 5, "peer", 2.0).holds
    assert BenchRow("a", "s", 0.9, 1, "peer", 1.0, at_most=True).holds
    assert not BenchRow("a", "s", 1.1, 1, "peer", 1.0, at_most=True).holds
    assert BenchRow("a", "", 1, 100, "peer").holds


def test_medians_take_turns_and_leave_the_first_out(monkeypatch):
    called, now = [], [0.0]
    monkeypatch.setattr("harness.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def first():
        now[0] += 0.02 if len(called) < 2 else 0.001
        called.append("first")

    seconds = medians({"first": first, "second": lambda: called.append("second")}, 3, turn_seconds=0)
    assert called == ["first", "second"] * 4
    assert seconds["second"] == 0
    assert seconds["first"] == pytest.approx(0.001)
    called.clear()
    medians({"first": first}, 1, turn_seconds=0, warm_up=False)
    assert called == ["first"]


def test_a_missed_bar_is_written_printed_and_fails(tmp_path, capsys):
    rows = [
        BenchRow("fast", "images/s", 2000, 100, "slow peer", 2.0),
        BenchRow("lean", "MiB", 12, 10, "itself", 1.1, True, "many"),
    ]
    finish(rows[:1], tmp_path / "good.json", True, ["numpy"])
    with pytest.raises(SystemExit) as caught:
        finish(rows, tmp_path / "bad.json", True, ["numpy", "no-such-package"])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "missed: lean (itself)\n"
    assert "| fast | 2,000 images/s | 100 images/s | 20 | at least 2 | slow peer |" in printed.out
    assert "| lean (many) | 12 MiB | 10 MiB | 1.2 | at most 1.1, missed | itself |" in printed.out
    found = read_bench(tmp_path / "bad.json")
    assert found.rows == rows
    assert found.table() in printed.out
    assert found.facts.versions == {"numpy": np.__version__, "no-such-package": None}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"benchmark .*other.json is not igpt_ds.bench; make it with a tools/bench/"):
        read_bench(tmp_path / "other.json")


def test_one_core_is_given_back():
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
def test_the_data_benchmark_runs(tmp_path, launch, tool):
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(4):
        coarse = random.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((250, 200), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{number}.jpg")
    command = ["tools/bench/data.py", "--images", tmp_path / "images", "--quick", "--only", "quantise", "jpeg", "memory"]
    done = launch([*command, "--out", tmp_path / "bench.json"])
    rows = {row.what: row for row in read_bench(tmp_path / "bench.json").rows}
    assert set(rows) == {"quantise 32x32", "table of 256^3 colours", "JPEG to 64x64 tokens", "memory of make_shards"}
    assert done.returncode == (0 if all(row.holds for row in rows.values()) else 1)
    assert rows["memory of make_shards"].holds
    assert tool("bench/data", "--show", tmp_path / "bench.json")[1].strip() in done.stdout
    assert tool("bench/data", "--quick")[2] == "data.py: error: --images is needed: a folder of JPEGs\n"
    assert "holds no .jpg or .jpeg file" in tool("bench/data", "--images", tmp_path / "none")[2]


def test_every_field_of_a_file(tmp_path):
    path = tmp_path / "bench.json"
    with pytest.raises(SystemExit):
        finish([BenchRow("fast", "images/s", 1, 100, "peer", 2.0)], path, True, ["numpy"])
    good = json.loads(path.read_text())
    for part, inner in (("facts", good["facts"]), ("rows", good["rows"][0])):
        for name in inner:
            for change in (None, ["x"]):
                wrong = json.loads(path.read_text())
                place = wrong["facts"] if part == "facts" else wrong["rows"][0]
                place[name] = change
                if change is None:
                    del place[name]
                file = tmp_path / "wrong.json"
                file.write_text(json.dumps(seal(wrong)))
                if change is None and name in ("quick", "cores", "load", "cores_used", "bar", "at_most", "note"):
                    read_bench(file)
                    continue
                with pytest.raises(ValueError, match=rf"^benchmark {file} has .*{name}.*; make it with a tools/bench/"):
                    read_bench(file)
