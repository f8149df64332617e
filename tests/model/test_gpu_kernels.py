"""What runs on GPUs: quick-GELU's kernels in Triton's interpreter, attention's order, and where a step makes its tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igpt_ds.config import CHECKPOINTING, RECIPES, ModelConfig
from igpt_ds.data.loader import Batch
from igpt_ds.model import fused
from igpt_ds.model.fused import choose_attention, first_that_works, gelu_kernels
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.engine import take_step
from igpt_ds.train.loop import pretraining_loss

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


class MadeOnCpu(TorchDispatchMode):
    """Notes each operation whose result is a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = list[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        # torch 2.11's checkpointing makes tensors without elements.
        if any(isinstance(one, Tensor) and one.device.type == "cpu" and one.numel() for one in tree_leaves(found)):
            self.operations.append(str(operation))
        return found


class PlainEngine:
    """What a training step needs of an engine, over plain torch, with everything on one device."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.model, self.device = model, torch.device(device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def __call__(self, *inputs: Tensor, **more: Any) -> Tensor:
        return self.model(*inputs, **more)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()


# On the CPU by intent: the numbers of a few images, and the masks that are drawn from them and then moved.
NUMBERS = {"aten.arange.start"}
DRAWN = {"ar": NUMBERS, "bert": NUMBERS | {"aten.detach.default", "aten.lift_fresh.default"}}


@pytest.mark.parametrize(("objective", "mode"), [*(("ar", mode) for mode in CHECKPOINTING), ("bert", "selective")])
def test_a_step_makes_no_tensor_on_the_cpu(objective: str, mode: str) -> None:
    """The meta device takes the GPU's way through the model and has no numbers. A tensor of the CPU among its own is an error."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_px=4, n_vocab=8)
    recipe = replace(RECIPES["digits_nano_ar_8"], model=config, objective=objective, batch_images=3)
    with torch.device("meta"):
        model = Transformer(config, mode, objective).bfloat16()
    tokens, labels = torch.zeros(3, config.n_ctx, dtype=torch.uint16), torch.zeros(3, dtype=torch.int64)
    engine: Any = PlainEngine(model, "meta")
    with MadeOnCpu() as made:
        batch = Batch(tokens, labels, 0).to("meta")
        loss = take_step(engine, [batch, batch], pretraining_loss(recipe), 0.1)
    assert (batch.tokens.device.type, batch.labels.device.type, loss.device.type) == ("meta", "meta", "meta")
    assert set(made.operations) <= DRAWN[objective], made.operations
    assert all(weight.grad is not None and weight.grad.device.type == "meta" for weight in model.parameters())
