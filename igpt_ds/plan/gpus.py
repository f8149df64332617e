"""The kinds of GPU: what their data sheets print, and the rates that they reach in practice. In: a name. Out: a `Gpu`.

The one table of GPUs. The plan takes a GPU by its key (`--gpu h100-80g`), the trainer and the benchmarks take the printed peak by
the name that torch reports. That name must match as a whole: an H100 PCIe is no H100 SXM, a GB200 no B200, a GH200 no H200, and
a MIG slice of any of them has no printed peak.

Memory, bf16 peak (dense; the sheets print twice as much, "with sparsity") and float32 (without TF32, which torch takes only when
asked to) are the vendors':
A100, A800: NVIDIA A100 Tensor Core GPU data sheet (2021) and A800's. H100 SXM, PCIe and NVL: NVIDIA H100 Tensor Core GPU data
sheet (2024; SXM and PCIe also in the H100 architecture white paper). H800: the H100's with 400 GB/s of NVLink. H20: NVIDIA H20
data sheet (96 GB; H20-3e has 141 GB). H200 SXM and NVL: NVIDIA H200 data sheet (2024). B200, B300: NVIDIA HGX platform table
(2025) over 8 GPUs. GB200: NVIDIA GB200 NVL72 table over 72 GPUs. L40S: NVIDIA L40S data sheet (2023). MI300X: AMD Instinct MI300X
data sheet (2023). V100: NVIDIA V100 data sheet (2020), whose peak is that of fp16. GH200: NVIDIA GH200 data sheet.

The rates in practice are measured by others for A100, H100 and H200 only. H100: matrix products 680e12 during training (794.5e12
alone) and NVLink 396e9 of 450e9 pairwise, from S. Bekman's ml-engineering; attention 480e12 by cuDNN 9 or FlashAttention 3 at
head dimension 128; memory 0.9 of the data sheet, as a copy on an H200 reaches (4.3e12 of 4.8e12). A100: products 268e12 alone
(ml-engineering), attention 0.63 of the peak (FlashAttention 2). All others are unchecked: the H100's fractions of the data sheet
(products 0.69, attention 0.485, memory 0.9, NVLink 0.8 of one direction). MI300X: products 0.5 and attention 0.35 (assumed from
ml-engineering's 0.51 to 0.58 for products alone). GPUs without NVLink between all of a node: 0.8 of PCIe, 64e9 (L40S 32e9).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. `peak` is the rate of the data sheet, the reference of MFU; the other rates are those reached in practice."""

    name: str
    devices: str  # regular expression for the whole name that torch reports, without the vendor
    memory: float  # bytes, from the data sheet
    peak: float  # dense bf16 FLOP/s, from the data sheet
    gemm: float  # FLOP/s of large bf16 products
    attention: float  # FLOP/s of a flash attention kernel
    hbm: float  # bytes a second of its memory
    nvlink: float  # bytes a second of collectives inside a node
    fp32: float  # FLOP/s of float32 without TF32, from the data sheet


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", "A100-(SXM4?|PCIE)-40GB", 40e9, 312e12, 260e12, 196e12, 1.4e12, 230e9, 19.5e12),
        Gpu("a100-80g", "A[18]00(-SXM4?-80GB| 80GB PCIe)", 80e9, 312e12, 260e12, 196e12, 1.83e12, 230e9, 19.5e12),
        Gpu("h100-80g", "H100 80GB HBM3", 80e9, 989.4e12, 680e12, 480e12, 3.0e12, 360e9, 67e12),
        Gpu("h100-pcie", "H100 PCIe", 80e9, 756e12, 520e12, 367e12, 1.8e12, 51e9, 51e12),
        Gpu("h100-nvl", "H100 NVL", 94e9, 835e12, 575e12, 405e12, 3.5e12, 51e9, 60e12),
        Gpu("h800", "H800", 80e9, 989.4e12, 680e12, 480e12, 3.0e12, 160e9, 67e12),
        Gpu("h20", "H20(-3e)?", 96e9, 148e12, 102e12, 72e12, 3.6e12, 360e9, 44e12),
        Gpu("h200-141g", "H200", 141e9, 989.4e12, 700e12, 500e12, 4.3e12, 360e9, 67e12),
        Gpu("h200-nvl", "H200 NVL", 141e9, 835e12, 575e12, 405e12, 4.3e12, 51e9, 60e12),
        Gpu("b200", "B200", 180e9, 2250e12, 1550e12, 1090e12, 7.2e12, 720e9, 75e12),
        Gpu("b300", "B300( SXM6( AC)?)?", 270e9, 2250e12, 1550e12, 1090e12, 7.2e12, 720e9, 75e12),
        Gpu("gb200", "GB200", 186e9, 2500e12, 1720e12, 1210e12, 7.2e12, 720e9, 80e12),
        Gpu("l40s", "L40S", 48e9, 362e12, 250e12, 175e12, 0.78e12, 25e9, 91.6e12),
        Gpu("mi300x", "MI300X( OAM)?", 192e9, 1307.4e12, 650e12, 455e12, 4.8e12, 350e9, 163.4e12),
    )
}
# GPUs that train but that no plan is made for, by the same expressions.
OTHER_PEAKS = {
    "V100-SXM2-(16|32)GB": 125e12,
    "V100-PCIE-(16|32)GB": 112e12,
    "H800 PCIe": 756e12,
    "GH200 (480GB|120GB|144G HBM3e)": 989.4e12,
}


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU with the name that torch reports; None for a device that is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.devices, _model(device_name))), None)


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU from its data sheet; None for a device that is in neither table."""
    gpu = find_gpu(device_name)
    others = (peak for names, peak in OTHER_PEAKS.items() if re.fullmatch(names, _model(device_name)))
    return gpu.peak if gpu else next(others, None)


def _model(device_name: str) -> str:
    """The name without the vendor's."""
    return re.sub(r"^(NVIDIA |AMD Instinct |Tesla )", "", device_name.strip())
