"""The device of a rank: GPUs that lie idle are told, each rank finds its own, and ranks that differ are refused."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td

from igpt_ds import dist
from igpt_ds.devices import (
    Arrival,
    TorchBuild,
    answer_to_all,
    arrive,
    current_device,
    device_conflict,
    device_index,
    find_gpus,
    refuse_idle_gpus,
)

WHEEL = TorchBuild("2.13.0+cpu", None, None, works=False)
OLD = TorchBuild("2.13.0", "13.0", None, False, "The NVIDIA driver on your system is too old (found version 11040)")
ON_HOST = Arrival("cuda", "node1", "GPU-a")


def machine(root: Path, *devices: str, pci: tuple[str, str] | None = None, smi: str | None = None) -> dict[str, Any]:
    """A root directory with files in /dev, a device on the PCI bus, and an nvidia-smi; as arguments."""
    for directory in ("dev", "bin", "sys/bus/pci/devices/0000:1b:00.0"):
        (root / directory).mkdir(parents=True)
    for name in devices:
        (root / "dev" / name).touch()
    if pci:
        for name, value in zip(("vendor", "class"), pci, strict=True):
            (root / "sys/bus/pci/devices/0000:1b:00.0" / name).write_text(f"{value}\n")
    if smi is not None:
        (root / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (root / "bin" / "nvidia-smi").chmod(0o755)
    return {"env": {"PATH": str(root / "bin")}, "root": root}


@pytest.mark.parametrize(
    ("devices", "pci", "smi", "found"),
    [
        ((), None, None, ""),
        (("nvidiactl", "nvidia-uvm"), None, None, ""),
        (("nvidia0", "nvidia1"), None, None, "NVIDIA GPUs (/dev/nvidia0)"),
        ((), None, "echo 'GPU 0: NVIDIA H100'", "NVIDIA GPUs (nvidia-smi)"),
        ((), None, "echo 'No devices found.'", ""),
        ((), None, "exit 0", ""),  # a stub of a container
        ((), None, "exit 9", ""),  # the image of GPU nodes on a node without GPUs
        ((), ("0x10de", "0x030200"), "exit 9", "NVIDIA GPUs (nvidia-smi fails)"),
        (("kfd",), ("0x1002", "0x030000"), None, ""),  # the graphics of a processor
        (("kfd",), ("0x1002", "0x120000"), None, "AMD GPUs (/dev/kfd)"),
    ],
)
def test_gpus_are_found_without_torch(devices: Any, pci: Any, smi: str | None, found: str, tmp_path: Path) -> None:
    said = find_gpus(**machine(tmp_path, *devices, pci=pci, smi=smi))
    assert said.endswith(found)
    assert bool(said) is bool(found)


@pytest.mark.parametrize(
    ("build", "env", "words"),
    [
        (WHEEL, {}, ["/dev/nvidia0", "2.13.0+cpu is built without CUDA", "pip install", "torch==2.13.0", "DS_ACCELERATOR=cpu"]),
        (OLD, {}, ["driver on your system is too old", "; update the NVIDIA driver"]),
        (replace(OLD, why="Error 802: system not yet initialized"), {}, ["start nvidia-fabricmanager"]),
        (replace(OLD, why="Found no NVIDIA driver on your system"), {}, ["docker run --gpus all"]),
        (replace(OLD, why="No CUDA GPUs are available"), {}, ["sbatch --gpus-per-node"]),
        (OLD, {"CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES='' hides them; unset CUDA_VISIBLE_DEVICES"]),
        (replace(OLD, why=""), {}, ["run nvidia-smi"]),
    ],
)
def test_idle_gpus_are_refused_with_the_reason_and_the_fix(build: Any, env: Any, words: list[str], tmp_path: Path) -> None:
    here = machine(tmp_path, "nvidia0")
    with pytest.raises(ValueError, match="this machine has NVIDIA GPUs") as refused:
        refuse_idle_gpus(here["env"] | env, tmp_path, build)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    refuse_idle_gpus(here["env"] | env | {"DS_ACCELERATOR": "cpu"}, tmp_path, build)
    refuse_idle_gpus(here["env"] | env, tmp_path, replace(build, works=True))
    refuse_idle_gpus(here["env"] | env, tmp_path / "elsewhere", build)


def test_amd_gpus_beside_a_torch_for_cuda_are_refused(tmp_path: Path) -> None:
    here = machine(tmp_path, "kfd", pci=("0x1002", "0x120000"))
    with pytest.raises(ValueError, match=r"AMD GPUs .* is built without ROCm; run make TORCH=rocm"):
        refuse_idle_gpus(**here, build=replace(OLD, why=""))
    for why, fix in (("No HIP GPUs are available", "sbatch --gpus-per-node"), ("", "run rocm-smi and dmesg")):
        with pytest.raises(ValueError, match=f"built for ROCm 7.1.*{fix}"):
            refuse_idle_gpus(**here, build=TorchBuild("2.13.0+rocm7.1", None, "7.1", False, why))


@pytest.mark.parametrize(("local_rank", "count", "index"), [(0, 8, 0), (7, 8, 7), (3, 1, 0), (1, 2, 1)])
def test_the_number_of_a_device_is_not_that_of_its_rank(local_rank: int, count: int, index: int) -> None:
    assert device_index(local_rank, count) == index


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="number 4 of its node and sees 4 GPUs; start at most 4 ranks"):
        device_index(4, 4)


@pytest.mark.parametrize("ours", [{}, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}])
def test_deepspeed_reads_the_number_of_the_device(ours: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ({"LOCAL_RANK": "3"} | ours).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        dist.tell_device_index(0)
        assert dist.local_rank() == 3
        assert {os.environ[name] for name in ("LOCAL_RANK", *ours)} == {"0"}


@pytest.mark.parametrize(
    ("others", "conflict"),
    [
        ([Arrival("cuda", "node1", "GPU-b"), Arrival("cuda", "node2", "GPU-a")], ""),
        ([Arrival("cuda", "node1"), Arrival("cuda", "node1")], ""),  # a torch without UUIDs
        ([Arrival("cuda", "node1", "GPU-a")], "ranks 0, 1 on node1 have the same GPU, GPU-a; start one rank a GPU"),
        ([Arrival("cpu", "node2")], "rank 0 on node1 has the device cuda and rank 1 on node2 has cpu; give every rank a GPU"),
        ([ON_HOST, Arrival("cpu", "node2", problem="no driver; x")], "rank 2 on node2: no driver; x"),
        (2 * [Arrival("cpu", "node2", problem="no; x")], "rank 1 on node2: no; x (2 of 3 ranks cannot train)"),
    ],
)
def test_devices_that_do_not_fit_together_are_named(others: list[Arrival], conflict: str) -> None:
    assert device_conflict([ON_HOST, *others]).startswith(conflict)
    assert bool(device_conflict([ON_HOST, *others])) is bool(conflict)


def test_every_rank_gets_the_answer() -> None:
    store, said = td.HashStore(), dict[int, str]()

    def rank(number: int) -> None:
        said[number] = answer_to_all(store, number, 3, Arrival("cpu", "a") if number else ON_HOST)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(said.values())) == 1
    assert said[2].startswith("rank 0 on node1 has the device cuda and rank 1 on a has cpu")


def test_the_cpu_that_is_asked_for_is_the_device() -> None:
    assert current_device() == torch.device("cpu")
    device, arrival = arrive(3, "cpu")
    assert (device.type, arrival.device, arrival.problem) == ("cpu", "cpu", "")
    assert "unset DS_ACCELERATOR" in arrive(0, "cuda")[1].problem
