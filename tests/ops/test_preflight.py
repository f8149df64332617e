"""The preflight: what is wrong with a node is found, named and told apart from what is wrong everywhere."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import Recipe, recipe_to_dict
from igpt_ds.devices import TorchBuild
from igpt_ds.ops.preflight import node, ranks, verdict
from igpt_ds.ops.preflight.record import NodeReport, report_from_dict
from igpt_ds.ops.preflight.report import result_text
from igpt_ds.plan.costs import parameters
from igpt_ds.train.health import links

ROOT = Path(__file__).parents[2]
GPU = {"name": "NVIDIA H100", "free": 79 << 30, "bytes": 80 << 30, "driver": "550.54", "uuid": ""}
GOOD = {
    "errors": {},
    "code": "c" * 64,
    "packages": {"python": "3.11.7", "torch": "2.13.0"},
    "recipe": "r" * 64,
    "ds_config": "d" * 64,
    "commit": "9" * 40,
    "accelerator": "cuda",
    "gpus": [GPU, GPU],
    "speed": {"0": 700.0},
    "shm": {"bytes": 1 << 30, "files": None},
    "disk": {"bytes": 10**12, "files": 10**6},
    "needed": {"bytes": 10**9, "files": 100},
    "shards": [{"path": "shards", "index": "i" * 64, "shards": 3, "errors": []}],
    "clock": 0.001,
    "links": {"inside": 300.0, "across": 40.0},
    "all_reduce": 38.0,
    "step": {"first_loss": 2.7726, "second_loss": 2.7, "seconds": 0.1, "same_image": 1.0},
}


@pytest.fixture
def reports() -> dict[int, dict[str, Any]]:
    """Six good reports: three nodes of two ranks."""
    return {rank: copy.deepcopy(GOOD) | {"rank": rank, "local_rank": rank % 2, "node": f"node{rank // 2}"} for rank in range(6)}


def compare(reports: dict[int, dict[str, Any]], **more: dict[int, str]) -> verdict.PreflightResult:
    nodes = {rank: f"node{rank // 2}" for rank in range(6)}
    records = {rank: report_from_dict(report) for rank, report in reports.items()}
    return verdict.compare_reports(nodes, records, more.get("absent", {}), more.get("silent", {}))


def test_six_good_ranks_are_fine(reports):
    result = compare(reports)
    assert (result.status, result.findings, result.bad_nodes) == (0, [], [])
    text = result_text(result, 12.3)
    assert "node2  4-5    2 x NVIDIA H100  79.0      550.54  700      300          40" in text
    assert text.endswith("preflight of 6 ranks on 3 nodes: all checks passed; all-reduce over all ranks at 38 GB/s; 12.3 s")


@pytest.mark.parametrize(
    ("key", "value", "check", "words"),
    [
        ("code", "x" * 64, "code", "has xxxxxxxxxxxx where most have cccccccccccc; install the same code"),
        ("packages", {"python": "3.11.7", "torch": "2.9.0"}, "packages", "has torch 2.9.0 where most have torch 2.13.0"),
        ("gpus", [GPU], "gpus", "has 1 x NVIDIA H100 where most have 2 x NVIDIA H100"),
        ("gpus", [GPU, GPU | {"driver": "535.1"}], "driver", "has 1 x 535.1, 1 x 550.54 where most have 1 x 550.54"),
        ("gpus", [GPU, GPU | {"free": 40 << 30}], "gpus", "GPU 1 has 40.0 of 80.0 GiB free: another process"),
        ("gpus", [GPU | {"free": 1 << 30}, GPU | {"free": None}], "gpus", "GPU 0 has 1.0 of 80.0 GiB free"),
        ("speed", {"0": 555.0}, "speed", "GPU 0 computes 555 TFLOP/s, 0.79 of the median 700"),
        (
            "accelerator",
            "cpu",
            "accelerator",
            "has cpu where most have cuda; give every rank a GPU",
        ),
        (
            "links",
            {"inside": 300.0, "across": 30.0},
            "links",
            "exchanges 30 GB/s, 0.75 of the median 40 with its neighbours across",
        ),
        ("clock", -2.5, "clock", "its clock is 2.5 s behind the others'; start chrony"),
        ("shm", {"bytes": 64 << 20, "files": None}, "shm", "/dev/shm has 64 MiB free and 128 are needed"),
        ("disk", {"bytes": 10**8, "files": 10**6}, "disk", "0.10 GB are free and checkpoints will take 1.00 more"),
        ("disk", {"bytes": 10**12, "files": 7}, "disk", "7 files (inodes) are free and checkpoints will take 100 more"),
        ("shards", [GOOD["shards"][0] | {"index": "j" * 64}], "shards", "has shards/index.json of sha256 jjjjjjjjjjjj"),
        ("shards", [GOOD["shards"][0] | {"errors": ["train-000002.tar: gone"]}], "shards", "train-000002.tar: gone; copy the"),
        ("step", GOOD["step"] | {"second_loss": 2.4}, "step", "computes a loss of 2.4000 where the others have 2.7000"),
        ("errors", {"run_dir": "runs/s is another directory here"}, "run_dir", "runs/s is another directory here; put --run_dir"),
    ],
)
def test_what_is_wrong_on_one_node_is_that_nodes_fault(reports, key, value, check, words):
    reports[4][key] = value
    result = compare(reports)
    assert [(finding.node, finding.ranks, finding.check) for finding in result.findings] == [("node2", [4], check)]
    assert words in str(result.findings[0])
    assert (result.status, result.bad_nodes) == (3, ["node2"])
    assert "bad_nodes: node2\n" in result_text(result, 1.0)


def test_ranks_without_a_gpu_of_their_own(reports):
    for rank, report in reports.items():
        report["gpus"] = [GPU | {"uuid": f"GPU-{rank}"}]
    assert compare(reports).findings == []  # srun --gpus-per-task=1
    for rank, report in reports.items():
        report["gpus"] = [GPU | {"uuid": f"GPU-{rank // 2}"}]
    found = {finding.what for finding in compare(reports).findings}
    assert found == {f"2 ranks have the GPU GPU-{node}; start one rank a GPU" for node in range(3)}
    for report in reports.values():
        report |= {"gpus": [GPU, GPU], "local_rank": report["local_rank"] + 1}
    found = {str(finding) for finding in compare(reports).findings}
    assert found == {"all nodes: gpus: has no GPU: it is the node's rank 2 and sees 2; " + verdict.FIXES["gpus"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"palette": 1}, "palette"),
        ({"clock": "late"}, "clock 'late'"),
        ({"rank": None}, "rank None"),
        ({"disk": {"bytes": 1}}, r"disk\.files"),
        ({"gpus": [{"name": "H100"}]}, r"gpus\[0\]\.free"),
    ],
)
def test_a_report_of_other_code_is_refused(reports, changes, words):
    report = report_from_dict(reports[0])
    assert json.loads(json.dumps(report.to_dict())) == reports[0]
    with pytest.raises(ValueError, match=words):
        report_from_dict(reports[0] | changes)


def test_what_is_wrong_everywhere_is_bad_input(reports):
    for rank in (0, 2, 4):
        reports[rank]["errors"] = {"shards": "shards is no shard directory; make one with tools/make_shards.py"}
    reports[5]["speed"] = {"1": 10.0}
    result = compare(reports)
    assert (result.status, result.bad_nodes) == (2, ["node2"])
    assert str(result.findings[0]) == "all nodes: shards: shards is no shard directory; make one with tools/make_shards.py"
    assert result.to_dict()["findings"][1]["ranks"] == [5]


def test_ranks_that_never_came_or_hang(reports):
    del reports[2], reports[3], reports[5]
    result = compare(reports, absent={2: "within 60 s", 3: "within 60 s"}, silent={5: "in 'shards'"})
    assert (result.status, result.bad_nodes) == (3, ["node1", "node2"])
    assert str(result.findings[0]).startswith("node1 (rank 2, 3): arrival: did not arrive within 60 s; check that the node is up")
    assert str(result.findings[1]).startswith("node2 (rank 5): report: hangs in 'shards'; find what hangs there")


def test_slurms_shorthand_tells_the_node_of_a_rank():
    env = {"SLURM_STEP_NODELIST": "gpu[01-02,7]-ib,login", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3"}
    names = [node.host_of_rank(rank, env) for rank in range(9)]
    assert names == [*["gpu01-ib"] * 2, *["gpu02-ib"] * 2, "gpu7-ib", *["login"] * 3, None]
    assert node.host_of_rank(0, {}) is None


def test_neighbours_meet_once_each_and_nobody_is_in_two_pairs_at_once():
    rounds = list(links.pair_rounds(["a", "a", "a", "b", "b", "b", "c", "c", "c"]))
    for _, pairs in rounds:
        met = [rank for pair in pairs for rank in pair]
        assert len(met) == len(set(met))
    inside = [pair for kind, pairs in rounds if kind == "inside" for pair in pairs]
    assert sorted(inside) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (6, 7), (6, 8), (7, 8)]
    across = [pair for kind, pairs in rounds if kind == "across" for pair in pairs]
    assert sorted(across) == [(0, 3), (0, 6), (1, 4), (1, 7), (2, 5), (2, 8), (3, 6), (4, 7), (5, 8)]


def test_the_small_recipe_keeps_heads_and_divides_by_the_ranks_of_an_image(recipe: Recipe):
    for parts in (1, 2):
        small = ranks.small_recipe(recipe, 3, parts)
        assert (small.batch_images, small.model.n_head, small.model.n_ctx % parts) == (3, recipe.model.n_head, 0)


def test_damaged_shards_are_told(tiny_dataset: Path, tmp_path: Path):
    assert node.shards_report(tiny_dataset).errors == ()
    copied = tmp_path / "shards"
    shutil.copytree(tiny_dataset, copied)
    shards = sorted(copied.glob("*.tar"))
    shards[0].unlink()
    os.truncate(shards[1], 2048)
    shards[2].write_bytes(bytes(shards[2].stat().st_size))
    found = node.shards_report(copied).errors
    assert found[0] == f"{shards[0]}: No such file or directory; check the path"
    assert found[1].startswith(f"{shards[1]} has 2048 bytes instead of ")
    assert node.shards_report(copied, ["val"]).shards < len(shards)
    assert found[2] == f"{shards[2]} does not begin and end as a tar file does"


def test_another_run_directory_than_rank_0s_is_told(tmp_path: Path):
    assert node.write_and_read(tmp_path, "")
    with pytest.raises(ValueError, match="is another directory here than on rank 0's node"):
        node.write_and_read(tmp_path, ".preflight-mark")
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_in_whatever_way_is_an_error_in_words(tmp_path: Path):
    report = NodeReport(0, 0, "node1")

    def refuse() -> None:
        raise AssertionError

    report = node.attempt(report, "disk", lambda: node.free_space(tmp_path / "none"))
    report = node.attempt(report, "step", refuse)
    assert report.errors == {"disk": f"{tmp_path / 'none'}: No such file or directory; check the path", "step": "AssertionError"}


def test_a_ds_config_that_does_not_fit_the_run_to_come_is_told(recipe: Recipe, sharded_config: Path, tmp_path: Path):
    plan = node.PlannedRun(lambda: recipe, sharded_config, (), tmp_path, 5, None, keep_last=2, keep_every=4)
    with pytest.raises(ValueError, match="batch_images=12 does not divide into 5 ranks; nearest that does: 10 or 15"):
        node.ds_config_hash(plan)
    weights = parameters(recipe.model)
    assert node.needed_space(plan).bytes == 12 * weights * (2 + 1 + 12 // 4)


def test_the_hash_of_the_code_needs_no_git_and_sees_one_character(tmp_path: Path):
    package = tmp_path / "igpt_ds"
    (package / "train").mkdir(parents=True)
    (package / "train" / "a.py").write_text("A = 1\n")
    before = node.package_hash(package)
    (package / "train" / "a.py").write_text("A = 2\n")
    assert node.package_hash(package) != before == before.lower()
    assert node.package_hash() == node.package_hash(ROOT / "igpt_ds")


def test_gpus_beside_a_torch_for_cpus_are_an_error_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.delenv("DS_ACCELERATOR")
    wheel = TorchBuild("2.13.0+cpu", None, None, works=False)
    report = node.attempt(NodeReport(0, 0, "node0"), "accelerator", lambda: node.accelerator(wheel, tmp_path))
    assert "/dev/nvidia0" in report.errors["accelerator"]
    everywhere = {rank: replace(report, rank=rank, node=f"node{rank}") for rank in range(2)}
    result = verdict.compare_reports({0: "node0", 1: "node1"}, everywhere, {}, {})
    assert (result.status, len(result.findings)) == (verdict.BAD_INPUT, 1)
    assert str(result.findings[0]).startswith("all nodes: accelerator: this machine has NVIDIA GPUs")
    del everywhere[1]
    assert verdict.compare_reports({0: "node0"}, everywhere, {}, {}).status == verdict.BAD_INPUT
    old = replace(wheel, cuda="13.0", why="driver too old")  # an error of the node, which `gpus` reports
    assert node.attempt(report, "accelerator", lambda: node.accelerator(old, tmp_path)).accelerator == "cpu"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(launch: Any, free_port: int, recipe: Recipe, sharded_config: Path, tiny_dataset: Path, tmp_path: Path) -> Start:
    """start(1, 4, ...) -> rank 1 of 4 as srun would start it: each on a node of its own, node1 to node4."""
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps(recipe_to_dict(recipe)))

    def begin(rank: int, world: int, *more: str, root: Path = ROOT, data: Path = tiny_dataset, **env: str) -> Any:
        names = {"SLURM_STEP_NODELIST": f"node[1-{world}]", "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})"}
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        place |= {"SLURMD_NODENAME": f"node{rank + 1}", "SLURM_NODEID": rank, "PYTHONPATH": root}
        fixed = {"config": config, "data": data, "run_dir": tmp_path / "run", "ds_config": sharded_config}
        words = [str(word) for name, value in fixed.items() for word in (f"--{name}", value)]
        ranks = ["--ranks", "3", "--micro_batch", "2"]
        environment = {name: str(value) for name, value in (names | place | env).items()}
        by = "python" if env or root != ROOT else "ranks"  # other code, or what libraries read when they are imported
        return launch.start([root / "tools" / "preflight.py", *words, *ranks, *more], env=environment, by=by)

    return begin


def ends(process: subprocess.Popen[str], status: int) -> str:
    """What it printed, once it has ended with this status."""
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == status, stdout + stderr
    return stdout


@pytest.mark.slow
def test_three_bad_nodes_among_four(start: Start, tiny_dataset: Path, tmp_path: Path):
    """Node 2 has other code, node 3 computes slowly, node 4 lacks a shard; all else, with a real training step, is well."""
    other = tmp_path / "other"
    for name in ("igpt_ds", "tools", "ds_configs"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", other)
    with open(other / "igpt_ds" / "files.py", "a") as file:
        file.write("# one line more\n")
    torn = tmp_path / "torn"
    shutil.copytree(tiny_dataset, torn)
    (torn / "train-000001.tar").unlink()
    slow = {"MKL_CBWR": "COMPATIBLE"}  # the plainest instructions that the library has
    report = tmp_path / "report.json"
    first = start(0, 4, "--json", str(report))
    others = [start(1, 4, root=other), start(2, 4, **slow), start(3, 4, data=torn)]
    text = ends(first, 3)
    assert "bad_nodes: node2,node3,node4\n" in text
    assert "node2 (rank 1): code: has " in text
    assert "node3 (rank 2): speed: the CPU computes " in text
    assert f"node4 (rank 3): shards: {torn}/train-000001.tar: No such file or directory" in text
    for process in others:
        assert ends(process, 3) == ""
    found = json.loads(report.read_text())
    assert (found["status"], found["bad_nodes"]) == (3, ["node2", "node3", "node4"])
    for rank in found["reports"]:
        assert rank["errors"] == {}
        assert rank["step"]["first_loss"] == pytest.approx(2.7726, abs=1e-3)
        assert rank["all_reduce"] > 0 < rank["links"]["across"]
        assert abs(rank["clock"]) < 1
        assert rank["packages"]["torch"] == importlib.metadata.version("torch")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_dead_node_and_one_whose_disk_hangs(start: Start, tiny_dataset: Path, tmp_path: Path):
    hanging = tmp_path / "hanging"
    shutil.copytree(tiny_dataset, hanging)
    (hanging / "train-000001.tar").unlink()
    os.mkfifo(hanging / "train-000001.tar")  # opening it waits for a writer that never comes
    first = start(0, 3, "--timeout_s", "7")
    second = start(1, 3, "--timeout_s", "7", data=hanging)
    text = ends(first, 3)
    assert "node2 (rank 1): report: hangs in 'shards'" in text
    assert "node3 (rank 2): arrival: did not arrive within 7 s" in text
    assert "bad_nodes: node2,node3\n" in text
    ends(second, 3)


@pytest.mark.slow
def test_without_rank_0_the_others_name_its_node(start: Start):
    text = ends(start(1, 2, "--timeout_s", "1"), 3)
    assert "node1 (rank 0): arrival: rank 0 did not answer at 127.0.0.1:" in text
    assert text.endswith("\nbad_nodes: node1\n")


@pytest.mark.slow
def test_two_good_ranks_under_torchrun(launch: Any, command: Any, tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launch([*torchrun, "tools/preflight.py", *command("run")[1:], "--json", str(tmp_path / "out.json")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight of 2 ranks on 1 node: all checks passed; all-reduce over all ranks at " in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["findings"] == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--timeout_s", "0"], "--timeout_s 0 must be more than 0 seconds"),
        (["--dry_run"], "--dry_run checks no nodes; give it to train.py"),
    ],
)
def test_flags_that_make_no_sense_are_refused(command: Any, launch: Any, words: list[str], complaint: str):
    done = launch(["tools/preflight.py", *command("run")[1:], *words])
    assert done.returncode == 2
    assert done.stderr == f"preflight.py: error: {complaint}\n"
