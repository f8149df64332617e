"""Launchers are recognised by what they leave in the environment."""

from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import SharedError
from igpt_ds.dist import (
    data_rank,
    data_world_size,
    from_rank_0,
    map_environment,
    sequence_group,
    sequence_rank,
    sequence_size,
    start_sequence_groups,
)

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


def test_without_a_launcher_there_is_one_rank() -> None:
    env: dict[str, str] = {}
    map_environment(env)
    assert env == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def test_a_launchers_own_variables_stay() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"} | STEP
    before = dict(env)
    map_environment(env)
    assert env == before


def test_srun_is_mapped() -> None:
    env = dict(STEP)
    map_environment(env)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("3", "1", "4")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "23456")


def test_several_nodes_need_scontrol_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    env = STEP | {"SLURM_NNODES": "2"}
    with pytest.raises(ValueError, match=r"node\[1-2\].*export MASTER_ADDR"):
        map_environment(env)
    env = STEP | {"SLURM_NNODES": "2", "MASTER_ADDR": "node1"}
    map_environment(env)
    assert env["MASTER_ADDR"] == "node1"


def test_one_process_of_a_job_of_many_is_refused() -> None:
    """A batch script that forgets srun would otherwise wait for ranks that never come."""
    env = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    with pytest.raises(ValueError, match="4 tasks but only one process runs; start it with `srun`"):
        map_environment(env)


def test_rank_0_answers_for_all() -> None:
    def refuse() -> None:
        raise ValueError("no such thing")

    assert from_rank_0(lambda: 7) == 7
    with pytest.raises(SharedError, match="no such thing"):
        from_rank_0(refuse)
    with pytest.raises(SharedError, match=r"^/proc/nothing/x: No such file or directory$"):
        from_rank_0(lambda: Path("/proc/nothing/x").mkdir())
    with pytest.raises(KeyError, match="format"):
        from_rank_0(lambda: {}["format"])


MISTAKE = """
import sys, torch.distributed as td
from igpt_ds import cli, dist
td.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=dist.rank(), world_size=2)
cli.run(lambda argv: dist.from_rank_0(lambda: {}["format"]))
"""


def test_a_mistake_of_rank_0_reaches_the_others(launch: Any, tmp_path: Path) -> None:
    """They would wait for it for ever: the traceback is rank 0's, and the others leave without a word."""
    program = tmp_path / "mistake.py"
    program.write_text(MISTAKE)
    ranks = [launch.start([program, tmp_path / "meeting"], env={"RANK": rank, "WORLD_SIZE": "2"}) for rank in ("0", "1")]
    said = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 2]
    assert "KeyError: 'format'" in said[0]
    assert said[1] == ""


def test_without_sequence_groups_every_rank_has_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    start_sequence_groups(1)
    assert sequence_group() is None
    assert (data_rank(), data_world_size(), sequence_rank(), sequence_size()) == (5, 8, 0, 1)
