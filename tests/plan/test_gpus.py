"""The table of GPUs: the names that torch reports find their own row, and no other."""

from __future__ import annotations

import re

import pytest

from igpt_ds.plan.gpus import GPUS, OTHER_PEAKS, find_gpu, peak_flops

NAMES = {  # as torch reports them -> the row
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H20": "h20",
    "NVIDIA H20-3e": "h20",
    "NVIDIA H200": "h200-141g",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA B200": "b200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA A800-SXM4-80GB": "a100-80g",
    "AMD Instinct MI300X": "mi300x",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_finds_its_row(name: str) -> None:
    assert peak_flops(name) == GPUS[NAMES[name]].peak
    assert find_gpu(name) is GPUS[NAMES[name]]
    model = name.removeprefix("NVIDIA ").removeprefix("AMD Instinct ")
    assert [gpu.name for gpu in GPUS.values() if re.fullmatch(gpu.devices, model)] == [NAMES[name]]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA L40",
        "NVIDIA L4",
        "NVIDIA GB300",
        "NVIDIA GH200 96GB",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100",
        "AMD Instinct MI300A",
        "NVIDIA GeForce RTX 4090",
        "CPU",
        "",
    ],
)
def test_a_similar_name_finds_none(name: str) -> None:
    assert peak_flops(name) is None


def test_the_peaks_of_one_kind_differ_by_their_board() -> None:
    peaks = {name: GPUS[name].peak for name in ("h100-80g", "h100-pcie", "h100-nvl", "h200-nvl", "h20", "b200", "gb200")}
    assert peaks == dict(zip(peaks, (989.4e12, 756e12, 835e12, 835e12, 148e12, 2250e12, 2500e12), strict=True))
    assert peak_flops("NVIDIA GH200 480GB") == 989.4e12
    assert peak_flops("Tesla V100-PCIE-16GB") == 112e12 < 125e12 == peak_flops("Tesla V100-SXM2-32GB")


def test_every_gpu_is_slower_in_practice_than_printed() -> None:
    assert len({gpu.devices for gpu in GPUS.values()} | set(OTHER_PEAKS)) == len(GPUS) + len(OTHER_PEAKS)
    for gpu in GPUS.values():
        assert gpu.attention < gpu.gemm < gpu.peak
        assert 0.3 < gpu.attention / gpu.peak < 0.65
        assert 20e9 < gpu.nvlink < gpu.hbm
