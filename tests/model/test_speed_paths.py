"""The fast paths of the model: hand-written derivatives against eager float64, and what each mode of checkpointing keeps."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_ds.config import CHECKPOINTING, ModelConfig
from igpt_ds.model import cpu_kernels, fused
from igpt_ds.model.objectives import autoregressive_loss
from igpt_ds.model.store import fresh_model
from igpt_ds.model.transformer import Transformer, attention_backend
from igpt_ds.plan.costs import RankLayout, memory

pytestmark = pytest.mark.usefixtures("product")


def attends_in_bfloat16() -> bool:
    """Whether torch's attention works in bfloat16: on a processor with AVX-512 it fails if ATEN_CPU_CAPABILITY hides that."""
    try:
        x = torch.ones(1, 1, 64, 16, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
    except RuntimeError:
        return False
    return True


in_bfloat16 = pytest.mark.skipif(not attends_in_bfloat16(), reason="torch's attention fails in bfloat16 here")
WIDE = ModelConfig(n_layer=3, n_head=4, n_embd=64, n_px=8, n_vocab=16)


@pytest.fixture(params=cpu_kernels.PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file runs with both products, whatever the machine prefers."""
    monkeypatch.setattr(cpu_kernels, "_used", None)
    cpu_kernels.use(request.param)
    return request.param


def eager_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def eager_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * gain


def eager_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def our_norm(x: Tensor, gain: Tensor) -> Tensor:
    return cpu_kernels.rms_norm(x, gain, eps=1e-5)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    return scores.softmax(dim=-1) @ v


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cpu_kernels.attention(q, k, v, causal=True)


PAIRS = [
    pytest.param(cpu_kernels.linear, eager_linear, [(2, 5, 8), (7, 8)], id="linear"),
    pytest.param(cpu_kernels.linear, eager_linear, [(6, 8), (24, 8)], id="linear of a matrix"),
    pytest.param(our_norm, eager_norm, [(2, 5, 8), (8,)], id="norm"),
    pytest.param(our_norm, eager_norm, [(6, 8), (8,)], id="norm of a matrix"),
    pytest.param(fused.quick_gelu, eager_gelu, [(2, 5, 8)], id="quick-GELU"),
    pytest.param(our_attention, eager_attention, [(2, 3, 5, 8)] * 3, id="attention"),
]


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("ours", "eager", "shapes"), PAIRS)
def test_derivatives_are_those_of_finite_differences(ours: Callable, eager: Callable, shapes: list) -> None:
    assert torch.autograd.gradcheck(ours, drawn(shapes, torch.float64))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("ours", "eager", "shapes"), PAIRS)
def test_values_and_gradients_equal_eager_float64(
    ours: Callable, eager: Callable, shapes: list, dtype: torch.dtype, rtol: float
) -> None:
    arguments = drawn(shapes, dtype)
    doubles = [argument.detach().double().requires_grad_() for argument in arguments]
    value, exact = ours(*arguments), eager(*doubles)
    assert value.dtype == dtype
    g = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = [value, *torch.autograd.grad(value, arguments, g)]
    wanted = [exact, *torch.autograd.grad(exact, doubles, g.double())]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() <= rtol * other.abs().max()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_product_with_one_frozen_side(frozen: int) -> None:
    sides = drawn([(2, 5, 8), (7, 8)], torch.float32)
    sides[frozen].requires_grad_(False)
    cpu_kernels.linear(*sides).sum().backward()
    assert [side.grad is None for side in sides] == [frozen == 0, frozen == 1]
    eager = drawn([(2, 5, 8), (7, 8)], torch.float32)
    eager_linear(*eager).sum().backward()
    torch.testing.assert_close(sides[1 - frozen].grad, eager[1 - frozen].grad)


def test_nothing_is_differentiated_twice() -> None:
    (x,) = drawn([(4,)], torch.float64)
    (first,) = torch.autograd.grad(fused.quick_gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_decides_as_it_does_for_torchs_own_product() -> None:
    x, weight = drawn([(3, 8), (7, 8)], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpu_kernels.linear(x, weight), F.linear(x, weight))
        assert cpu_kernels.linear(x, weight).dtype == torch.bfloat16


def test_the_product_in_use_runs(product: str) -> None:
    x, weight = drawn([(3, 8), (7, 8)], torch.float32)
    assert cpu_kernels.used() == product
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        cpu_kernels.linear(x, weight)
    assert ("mkldnn::_linear_pointwise" in {event.key for event in seen.key_averages()}) == (product == "onednn")


def test_without_onednn_torchs_own_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn([(3, 8), (7, 8)], torch.float32)
    monkeypatch.setattr(cpu_kernels, "ONEDNN_PRODUCT", None)
    cpu_kernels.use("onednn")
    assert cpu_kernels.used() == "torch"
    assert torch.equal(cpu_kernels.linear(x, weight), F.linear(x, weight))
    assert torch.equal(cpu_kernels.packed_linear(weight, 3)(x), F.linear(x, weight))


def test_a_packed_weight_gives_the_same_product() -> None:
    x, weight = (side.detach() for side in drawn([(3, 8), (7, 8)], torch.float32))
    torch.testing.assert_close(cpu_kernels.packed_linear(weight, 3)(x), x @ weight.t())


@pytest.mark.parametrize(("vendor", "product"), [("GenuineIntel", "torch"), ("AuthenticAMD", "onednn"), (None, "torch")])
def test_the_vendor_decides_where_nothing_is_measured(vendor: str | None, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path, **how: str) -> str:
        if vendor is None:
            raise FileNotFoundError
        return f"vendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert cpu_kernels.usual.__wrapped__() == product


def test_this_torch_has_onednns_product() -> None:
    """A training step on an AMD core takes 1.6 times as long without; a torch that drops the name needs another one."""
    assert cpu_kernels.ONEDNN_PRODUCT is not None


def eager_loss(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """The whole network in plain operations, in the weights' own precision."""
    B, T = tokens.shape
    h = torch.cat([weights["sos"].expand(B, 1, -1), weights["wte.weight"][tokens[:, :-1]]], dim=1) + weights["wpe"]
    D = config.n_embd // config.n_head
    for layer in range(config.n_layer):
        at = f"blocks.{layer}."
        qkv = eager_norm(h, weights[at + "ln_1.weight"]) @ weights[at + "attn.c_attn.weight"].t()
        q, k, v = (part.view(B, T, config.n_head, D).transpose(1, 2) for part in qkv.split(config.n_embd, dim=2))
        scores = (q @ k.transpose(2, 3) / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(h.shape)
        h = h + y @ weights[at + "attn.c_proj.weight"].t()
        x = eager_norm(h, weights[at + "ln_2.weight"]) @ weights[at + "mlp.c_fc.weight"].t()
        h = h + eager_gelu(x) @ weights[at + "mlp.c_proj.weight"].t()
    logits = eager_norm(h, weights["ln_f.weight"]) @ weights["head.weight"].t()
    return -logits.log_softmax(dim=-1).gather(2, tokens[:, :, None]).mean()


@pytest.fixture
def wide() -> Transformer:
    model = fresh_model(WIDE, seed=1)
    with torch.no_grad():
        model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
        for name, weight in model.named_parameters():
            if "ln_" in name:
                weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return model


def twin(model: Transformer, mode: str) -> Transformer:
    other = Transformer(model.config, activation_checkpointing=mode)
    other.load_state_dict(model.state_dict())
    return other


def wide_tokens(B: int) -> Tensor:
    return torch.randint(0, WIDE.n_vocab, (B, WIDE.n_ctx), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_loss_and_gradients_of_every_mode_equal_eager_float64(wide: Transformer, mode: str) -> None:
    network, tokens = twin(wide, mode), wide_tokens(3)
    loss = autoregressive_loss(network(tokens), tokens)
    loss.backward()
    doubles = {name: weight.detach().double().requires_grad_() for name, weight in wide.named_parameters()}
    exact = eager_loss(doubles, WIDE, tokens)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for name, weight in network.named_parameters():
        wanted = doubles[name].grad
        assert (weight.grad.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@in_bfloat16
@pytest.mark.parametrize("precision", ["bfloat16 weights", "autocast"])
def test_modes_agree_in_bfloat16(wide: Transformer, precision: str) -> None:
    """To the last bit: what is recomputed is what was there."""
    tokens, found = wide_tokens(2), []
    for mode in CHECKPOINTING:
        network = twin(wide, mode)
        network = network.bfloat16() if precision == "bfloat16 weights" else network
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = autoregressive_loss(network(tokens), tokens)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in network.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class Storages(TorchDispatchMode):
    """Remembers every piece of memory that an operation returns, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def kept_per_token_and_block(model: Transformer, B: int) -> float:
    """Numbers that the blocks keep between forward and backward, in units of C."""
    h = model.embed(wide_tokens(B))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with Storages() as storages:
        for block in model.blocks:
            h = fused.run_block(block, h, model.activation_checkpointing)
    assert h.requires_grad
    for pointer in own:
        storages.seen.pop(pointer, None)
    return storages.alive() / (h.element_size() * h.numel() * WIDE.n_layer)


def test_activations_kept_are_what_the_plan_says(wide: Transformer) -> None:
    kept = {mode: kept_per_token_and_block(twin(wide, mode), B=4) for mode in CHECKPOINTING}
    assert kept["none"] == pytest.approx(16, rel=0.03)  # beside the C's: a number a row for norms, one a head for attention
    assert kept["selective"] == pytest.approx(9, rel=0.03)
    assert kept["full"] == pytest.approx(1, rel=0.03)
    assert kept["selective"] <= 0.6 * kept["none"]
    deep, deeper = (ModelConfig(n_layer=L, n_head=4, n_embd=64, n_px=8, n_vocab=16) for L in (3, 4))
    for mode, held in kept.items():
        few, more = (memory(config, RankLayout(1, precision="fp32", checkpointing=mode)).activations for config in (deep, deeper))
        assert (more - few) / (4 * WIDE.n_ctx * WIDE.n_embd) == pytest.approx(held, rel=0.03)


@in_bfloat16
def test_as_much_is_kept_in_bfloat16(wide: Transformer) -> None:
    kept = {mode: kept_per_token_and_block(twin(wide, mode).bfloat16(), B=4) for mode in ("selective", "full")}
    assert kept == {"selective": pytest.approx(9, rel=0.03), "full": pytest.approx(1, rel=0.03)}


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_nothing_outlives_the_backward_pass(wide: Transformer, mode: str) -> None:
    network, tokens = twin(wide, mode), wide_tokens(2)
    autoregressive_loss(network(tokens), tokens).backward()
    gradients = [weight.grad for weight in network.parameters()]
    for gradient in gradients:
        gradient.zero_()
    gc.collect()
    gc.disable()
    try:
        with Storages() as storages:
            autoregressive_loss(network(tokens), tokens).backward()
        own = {tensor.untyped_storage().data_ptr() for tensor in [tokens, *network.parameters(), *gradients]}
        left = [size for at, (reference, size) in storages.seen.items() if at not in own and not reference.expired()]
    finally:
        gc.enable()
    assert not left


def test_evaluation_keeps_and_recomputes_nothing(wide: Transformer) -> None:
    tokens = wide_tokens(1)
    for mode in CHECKPOINTING:
        with torch.no_grad():
            assert torch.equal(twin(wide, mode)(tokens), wide(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)])
@pytest.mark.parametrize("flash", [True, False])
def test_the_attention_backend_is_the_one_that_runs(dtype: torch.dtype, flash: bool) -> None:
    backends = [torch.nn.attention.SDPBackend.MATH] + [torch.nn.attention.SDPBackend.FLASH_ATTENTION] * flash
    model = Transformer(WIDE).to(dtype)
    with torch.nn.attention.sdpa_kernel(backends):
        named = attention_backend(WIDE, True, torch.device("cpu"), dtype)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            model(wide_tokens(1))
    ran = {event.key for event in seen.key_averages()}
    assert named == ("flash" if flash else "math")
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == flash
    assert ("aten::_scaled_dot_product_attention_math" in ran) != flash


def test_misuse_is_noticed() -> None:
    with pytest.raises(AssertionError, match="half"):
        Transformer(WIDE, activation_checkpointing="half")
