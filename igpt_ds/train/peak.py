"""The peak speed of a device, for MFU.

In: a device. Out: FLOP/s, and where they are from. Called by train/session.py, train/metrics.py and tools/bench/device.py.
"""

from __future__ import annotations

import time

import torch

from igpt_ds import dist
from igpt_ds.model.cpu_kernels import linear
from igpt_ds.plan.gpus import peak_flops

LARGE = {"gpu": 8192, "cpu": 1024}  # side of the matrices whose product is the peak of an unknown device


def utilisation(flops: float, peak: float) -> float | None:
    """Model FLOPs utilisation, 0..1, from FLOP/s; None above the peak, because then the peak must be wrong."""
    return flops / peak if flops <= peak else None


def peak_of_all_ranks(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of all ranks together, device and source in words); see `peak_of`."""
    peak, source = peak_of(device, precision)
    return float(dist.sum_over_ranks(torch.tensor(peak, dtype=torch.float64, device=device))), source


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s, device and source in words): the vendor's bf16 peak of a known GPU, else a large product measured here."""
    cpu = device.type == "cpu"
    name = "CPU" if cpu else torch.get_device_module(device).get_device_name(device)
    if (printed := peak_flops(name)) is not None:
        return printed, f"{name}, printed bf16 peak"
    usual, n = torch.float32 if cpu else torch.bfloat16, LARGE["cpu" if cpu else "gpu"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, usual)
    return measured_product(device, dtype, n), f"{name}, measured: a product of {n} x {n} in {str(dtype)[6:]}"


def measured_product(device: torch.device, dtype: torch.dtype, n: int, repeats: int = 5) -> float:
    """FLOP/s of the product of two [n, n] matrices of random numbers, the best of some repeats."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return 2 * n**3 / min(_product_seconds(x) for _ in range(repeats))


def _product_seconds(x: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(x, x).sum().item()  # .item() waits for the device
    return time.perf_counter() - start
