"""Measured choices at the start of a run on a CPU."""

import time

import pytest
import torch
import torch.nn.functional as F

from igpt_ds.config import ModelConfig
from igpt_ds.model import cpu_speed

TOY = ModelConfig(n_layer=1, n_head=2, n_embd=8, n_px=4, n_vocab=4)


def work(seconds):
    """Keeps the processor busy: the time in which a thread sleeps does not count."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def slowed(function, seconds):
    def slow(*args):
        work(seconds)
        return function(*args)

    return slow


@pytest.mark.parametrize(("torchs", "onednns", "product"), [(0.0, 0.02, "torch"), (0.01, 0.01, "torch"), (0.03, 0.0, "onednn")])
def test_the_product_is_measured_and_a_tie_is_torchs(torchs, onednns, product, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_ROWS", 8)
    monkeypatch.setattr(cpu_speed, "PRODUCTS", {"torch": slowed(F.linear, torchs), "onednn": slowed(F.linear, onednns)})
    assert cpu_speed.fastest_product.__wrapped__() == product


def test_an_unknown_product_is_refused(monkeypatch):
    monkeypatch.setenv(cpu_speed.PRODUCT_VARIABLE, "mkl")
    with pytest.raises(ValueError, match="IGPT_DS_CPU_PRODUCT is 'mkl'; known: torch, onednn"):
        cpu_speed.product_of_new_run()


@pytest.mark.parametrize(
    ("slow", "precision", "faster"), [("fp32", "fp32", "bf16"), ("fp32", "bf16", None), ("bf16", "bf16", "fp32")]
)
def test_a_faster_precision_is_named_and_no_random_number_is_drawn(slow, precision, faster, monkeypatch):
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    forward = cpu_speed.Block.forward

    def run(block, h):
        work(0.02 if h.dtype == dtypes[slow] else 0)
        return forward(block, h)

    monkeypatch.setattr(cpu_speed.Block, "forward", run)
    before = torch.get_rng_state()
    found = cpu_speed.faster_precision(TOY, precision, True, 2)
    assert (found and found[0]) == faster
    assert torch.equal(torch.get_rng_state(), before)
    assert cpu_speed.faster_precision(TOY, "fp16", True, 2) is None
