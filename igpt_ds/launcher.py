"""What a launcher says in the environment, and the command that started it. In: variables. Out: the five that torch reads.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and mpirun have names of their own,
which are mapped. Values that cannot be right are refused here; an address that does not answer is refused by `dist.join`.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.errors import InputError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MOST_RANKS = 1 << 16
DEFAULT_PORT = 29500  # torch's and DeepSpeed's
_UNSET = "start with torchrun, deepspeed, srun or mpirun, or run `unset RANK WORLD_SIZE LOCAL_RANK` to train with one process"


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """The name of this node; under SLURM, the name that --exclude takes."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


class LaunchError(InputError):
    """Ranks that cannot meet. Each tells it, for no rank knows which of them a person sees."""


@dataclass(frozen=True)
class _Names:
    """A launcher's own names: of the rank, of the number of ranks, of the rank and the number of ranks on this machine."""

    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


# The first whose rank is set decides. In a SLURM job they come before SLURM, whose variables then describe mpirun itself.
_LAUNCHERS = (
    _Names("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    _Names("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    _Names(
        "PALS_RANKID", ("PALS_SIZE", "PMI_SIZE"), ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"), ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE")
    ),
    _Names("PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
)
_SLURM = _Names("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ())


def several_ranks(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several ranks."""
    return environment.get("WORLD_SIZE", "1") != "1"


def map_environment(env: MutableMapping[str, str]) -> None:
    """Sets those of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT that the launcher did not set.

    Under srun and mpirun they come from the variables of these; without a launcher the process is rank 0 of 1. A single rank
    needs no address: it takes a free port of this machine, unless torchrun hosts the meeting.

    Raises:
        LaunchError: an incomplete or impossible set of variables, or a SLURM job of several tasks that srun did not start.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        _map_launcher(env)
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in env and other not in env:
            raise LaunchError(f"{name}={env[name]} is set but {other} is not, and a launcher sets both; {_UNSET}")
    world = _number(env, "WORLD_SIZE", 1, MOST_RANKS)
    rank = _number(env, "RANK", 0, world - 1)
    if world == 1:
        env.setdefault("LOCAL_RANK", "0")
    elif "LOCAL_RANK" not in env:
        raise LaunchError(
            f"RANK={rank} and WORLD_SIZE={world} are set but LOCAL_RANK, the rank on this machine, is not; {_UNSET}"
        )
    _number(env, "LOCAL_RANK", 0, world - 1)
    if world == 1 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", "0"  # a port that is free when the process opens it


def restore_devices(env: MutableMapping[str, str]) -> None:
    """Gives a rank the GPUs that SLURM gave its node, where a site limits them by CUDA_VISIBLE_DEVICES alone.

    The deepspeed launcher replaces CUDA_VISIBLE_DEVICES by 0, 1, ... for its slots: other GPUs, if SLURM said "2,3" or UUIDs.
    slurm/one_node.sh keeps what it was. Called before anything asks CUDA.
    """
    given, slots = env.get("IGPT_DS_VISIBLE_DEVICES"), env.get("CUDA_VISIBLE_DEVICES")
    if given and slots and given.count(",") == slots.count(","):
        env["CUDA_VISIBLE_DEVICES"] = given


def check_address(env: Mapping[str, str]) -> None:
    """Checks the address where several ranks meet.

    Raises:
        LaunchError: MASTER_ADDR or MASTER_PORT is missing, or is no port.
    """
    if env["WORLD_SIZE"] != "1":
        for name, example in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", DEFAULT_PORT)):
            if not env.get(name, "").strip():
                raise LaunchError(f"WORLD_SIZE={env['WORLD_SIZE']} but {name} is not set: export {name} ({example}), or {_UNSET}")
        _number(env, "MASTER_PORT", 1, 65535, f"choose a free port such as {DEFAULT_PORT}")


def _number(env: Mapping[str, str], name: str, least: int, most: int, fix: str = _UNSET) -> int:
    text = env[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        limits = f" below WORLD_SIZE={env['WORLD_SIZE']}" if name.endswith("RANK") else f" from {least} to {most}"
        raise LaunchError(f"{name}={env[name]!r} is no whole number{limits}; {fix}")
    return int(text)


def _map_launcher(env: MutableMapping[str, str]) -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK and a meeting place from what mpirun or srun says; one rank without them."""
    names = next((names for names in _LAUNCHERS if names.rank in env), None)
    slurm = names is None and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    if slurm:
        names = _SLURM
    if names is None:
        if (tasks := env.get("SLURM_NTASKS", "1")) != "1":
            raise LaunchError(f"SLURM gave this job {tasks} tasks but only one process runs; start it with `srun` or `deepspeed`")
        for name in RANK_VARIABLES:
            env[name] = "1" if name == "WORLD_SIZE" else "0"
        return
    env["RANK"], size = env[names.rank], _first(env, names.size)
    if size is None and not slurm:
        raise LaunchError(
            f"{names.rank}={env['RANK']} is set but {names.size[0]} is not, and mpirun sets both; unset {names.rank}"
        )
    env["WORLD_SIZE"] = size or "1"
    local_rank = _first(env, names.local_rank)
    env["LOCAL_RANK"] = env["RANK"] if local_rank is None else local_rank
    if env["WORLD_SIZE"] == "1":
        return
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env) if slurm else _this_machine(env, names)
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000 if slurm else DEFAULT_PORT))


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((env[name] for name in names if name in env), None)


def _this_machine(env: Mapping[str, str], names: _Names) -> str:
    """The address of this machine if mpirun started all ranks here."""
    local_size = _first(env, names.local_size)
    if local_size == env["WORLD_SIZE"] or (local_size is None and env["LOCAL_RANK"] == env["RANK"]):
        return "127.0.0.1"
    world = env["WORLD_SIZE"]
    raise LaunchError(
        f"mpirun started {world} ranks on several machines and MASTER_ADDR is not set; export the host of rank 0 as it"
    )


def _first_host(env: Mapping[str, str]) -> str:
    if env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1":
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise LaunchError(f"cannot expand the node list {nodes!r} with scontrol; export MASTER_ADDR yourself") from None


def resume_command() -> str:
    """The command that started all ranks, with --resume auto: the program's own, or its launcher's where that is an ancestor."""
    ours = [word for word in sys.argv if not word.startswith("--local_rank")]
    started, process = ["python", *ours], os.getppid()
    while process > 1:
        try:
            words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")[:-1]
            process = int(
                Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            )
        except (OSError, ValueError, IndexError):
            break
        if words[-len(ours) :] == ours:
            started = words
    if len(started) > len(ours) + 1 and Path(started[0]).name.startswith("python") and "/bin/" in started[1]:
        del started[0]  # `deepspeed` and `torchrun` are scripts
    while "--resume" in started[:-1]:
        at = started.index("--resume")
        del started[at : at + 2]
    return shlex.join([word for word in started if word != "--resume=auto"] + ["--resume", "auto"])
