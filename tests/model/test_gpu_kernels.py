"""What runs on GPUs: quick-GELU's kernels in Triton's interpreter, attention's order, and where a step makes its tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from igpt_ds.model import fused
from igpt_ds.model.fused import choose_attention, first_that_works, gelu_kernels

# The largest difference from the exact result is one rounding in bf16 and fp16, and 2^-17 in fp32.
KERNELS = """
import torch
from igpt_ds.model import triton_gelu

torch.manual_seed(0)
for dtype, places in ((torch.float32, 17), (torch.float16, 10), (torch.bfloat16, 7)):
    for shape in ((3, 5, 7), (4, 600), (1,), (0, 3)):
        x, g = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        exact = x.double().requires_grad_()
        y = exact * torch.sigmoid(1.702 * exact)
        (dx,) = torch.autograd.grad(y, exact, g.double())
        for found, wanted in ((triton_gelu.forward(x), y.detach()), (triton_gelu.backward(g, x), dx)):
            assert found.dtype == dtype and found.shape == x.shape
            torch.testing.assert_close(found.double(), wanted, rtol=2.0**-places, atol=2.0 ** -(places + 3))
    wide = torch.randn(6, 8).to(dtype).t()
    torch.testing.assert_close(triton_gelu.forward(wide), triton_gelu.forward(wide.contiguous()), rtol=0, atol=0)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="torch for CPUs brings no Triton")
def test_the_kernels_of_quick_gelu_equal_the_exact_result() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr


def test_without_a_gpu_quick_gelu_is_made_of_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gelu_kernels(torch.device("cpu")) is None
    gelu_kernels.cache_clear()
    with pytest.warns(UserWarning, match="quick-GELU by torch's operations, since Triton fails here"):
        assert gelu_kernels(torch.device("cuda", 7)) is None  # no such device, or no Triton
    gelu_kernels.cache_clear()


def test_the_first_kernel_that_works_is_taken() -> None:
    tried = []

    def attend(kernel: SDPBackend) -> None:
        tried.append(kernel)
        if kernel != SDPBackend.FLASH_ATTENTION:
            raise RuntimeError("no execution plan")

    assert first_that_works(fused._KERNELS, attend) == SDPBackend.FLASH_ATTENTION
    assert tried == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert first_that_works((SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH), attend) == SDPBackend.MATH


@pytest.mark.parametrize(("kernel", "works"), [(SDPBackend.MATH, True), (SDPBackend.CUDNN_ATTENTION, False)])
def test_a_kernel_is_tried_both_ways(kernel: SDPBackend, works: bool) -> None:
    qkv: Any = torch.empty(3, 1, 2, 8, 4)
    with warnings.catch_warnings():
        found = first_that_works((kernel, SDPBackend.OVERRIDEABLE), lambda one: fused._attend(one, qkv, True))
    assert found == (kernel if works else SDPBackend.OVERRIDEABLE)
    assert choose_attention((1, 2, 64, 16), True, torch.device("cpu"), torch.float32) == "flash"
