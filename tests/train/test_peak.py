"""The peak speed of a device, and the share of it that a run uses."""

from __future__ import annotations

import torch

from igpt_ds.train.peak import measured_product, peak_of_all_ranks, utilisation


def test_more_than_the_peak_is_unknown() -> None:
    assert utilisation(2.0, 4.0) == 0.5
    assert utilisation(4.1, 4.0) is None


def test_the_peak_of_an_unknown_device_is_measured() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < measured_product(cpu, torch.bfloat16, n=64) < 1e13
    peak, source = peak_of_all_ranks(cpu, "fp32")
    assert peak > 1e9
    assert source == "CPU, measured: a product of 1024 x 1024 in float32"
