"""Launchers are recognised by what they leave in the environment; what cannot be right is refused."""

from __future__ import annotations

import sys

import pytest

from igpt_ds.launcher import LaunchError, check_address, map_environment, restore_devices, resume_command

RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
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


@pytest.mark.parametrize(
    ("given", "slots", "expected"),
    [
        ("2,3", "0,1", "2,3"),
        ("GPU-a,GPU-b", "0,1", "GPU-a,GPU-b"),
        ("0,1,2", "0,1", "0,1"),
        ("", "0,1", "0,1"),
        ("2", None, None),
    ],
)
def test_a_rank_gets_the_gpus_of_slurm_back(given: str, slots: str | None, expected: str | None) -> None:
    env = {"IGPT_DS_VISIBLE_DEVICES": given} | ({} if slots is None else {"CUDA_VISIBLE_DEVICES": slots})
    restore_devices(env)
    assert env.get("CUDA_VISIBLE_DEVICES") == expected


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


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "said",
    [
        OPEN_MPI,
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
        {"PALS_RANKID": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "1"},
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"} | OPEN_MPI,  # mpirun's own SLURM step
    ],
)
def test_mpirun_is_mapped(said: dict[str, str]) -> None:
    env = dict(said)
    map_environment(env)
    check_address(env)
    assert {name: env[name] for name in RANKS} == RANKS


def test_mpirun_on_several_machines_needs_an_address() -> None:
    env = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(LaunchError, match="4 ranks on several machines and MASTER_ADDR is not set"):
        map_environment(dict(env))
    env["MASTER_ADDR"] = "node1"
    map_environment(env)
    assert (env["MASTER_ADDR"], env["LOCAL_RANK"]) == ("node1", "1")


def mapped(env: dict[str, str]) -> dict[str, str]:
    map_environment(env)
    return env


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"WORLD_SIZE": None}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK, the rank on this machine, is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "x"}, "RANK='x' is no whole number below WORLD_SIZE=2"),
        ({"RANK": "2"}, "RANK='2'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "\u0661"}, "RANK="),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK='2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_impossible_variables_are_refused_by_name(changes: dict[str, str | None], match: str) -> None:
    env = {name: value for name, value in (RANKS | changes).items() if value is not None}
    with pytest.raises(LaunchError, match=match):
        check_address(mapped(env))


def test_a_single_rank_ignores_the_address_of_another_launch() -> None:
    """Two launches with `--num_gpus 1` on one machine have the same port."""
    for ranks in ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        env = {"MASTER_ADDR": "no-host.invalid", "MASTER_PORT": "29500"} | ranks
        map_environment(env)
        assert (env["RANK"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("0", "127.0.0.1", "0")
    env |= {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    map_environment(env)
    assert env["MASTER_PORT"] == "29500"


def test_the_command_that_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", "--run_dir", "a b", "--resume", "auto", "--lr", "1"])
    assert resume_command() == "python train.py --run_dir 'a b' --lr 1 --resume auto"
