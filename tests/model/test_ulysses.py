"""Sequence parallelism over threads that speak gloo to each other: the same collectives as between processes, in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TypeVar

import pytest
import torch
import torch.distributed as td
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_ds.config import CHECKPOINTING, ModelConfig
from igpt_ds.model.dropout import Dropout
from igpt_ds.model.objectives import draw_masks, image_loss
from igpt_ds.model.transformer import Transformer
from igpt_ds.model.ulysses import mean_over_tokens, part, to_heads, to_tokens
from igpt_ds.plan.costs import RankLayout, exchanged_bytes

T_ = TypeVar("T_")
HEADS = 24
PARTS = [2, 3, 4, 6, 8, 12, 24]  # ranks that 24 heads divide into
ODD = ModelConfig(n_layer=2, n_head=HEADS, n_embd=2 * HEADS, n_px=25, n_vocab=8)  # 625 tokens, which nearly nothing divides
SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=32, n_px=4, n_vocab=8)


def in_group(size: int, function: Callable[[td.ProcessGroup], T_]) -> list[T_]:
    """What a function of the process group returns on each rank of a new group."""
    store = td.HashStore()

    def rank(number: int) -> T_:
        gloo = td.ProcessGroupGloo(store, number, size, timedelta(seconds=60))
        group = td.ProcessGroup(store, number, size)
        group._register_backend(torch.device("cpu"), td.ProcessGroup.BackendType.GLOO, gloo)
        group._set_default_backend(td.ProcessGroup.BackendType.GLOO)
        return function(group)

    with ThreadPoolExecutor(size) as executor:
        return list(executor.map(rank, range(size)))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("sp", "T"), [(sp, T) for sp in PARTS for T in (48, 50, 625, 4096) if (sp - 1) * -(-T // sp) < T])
def test_tokens_become_heads_and_heads_tokens(sp: int, T: int) -> None:
    """Each rank's tensors are those that are cut out of the whole one, whether or not sp divides the tokens."""
    B, D = 2, 2
    whole = drawn(B, T, 3, HEADS, D)

    def both(group: td.ProcessGroup) -> tuple[Tensor, Tensor]:
        return to_heads(whole[:, part(group, T)], T, group), to_tokens(mine(whole[:, :, 0], group), group)

    def mine(x: Tensor, group: td.ProcessGroup) -> Tensor:  # [B, T, H, D] -> [B, h, T, D]
        return x[:, :, group.rank() * HEADS // sp :][:, :, : HEADS // sp].transpose(1, 2)

    covered = []
    for rank, (heads, tokens) in enumerate(in_group(sp, both)):
        first = rank * HEADS // sp
        assert torch.equal(heads, whole[:, :, :, first : first + HEADS // sp].permute(2, 0, 3, 1, 4))
        covered.append(tokens)
    assert torch.equal(torch.cat(covered, dim=1), whole[:, :, 0])


@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 3), t=st.integers(1, 4), short=st.integers(0, 3), h=st.integers(1, 3), sp=st.integers(1, 5))
def test_the_two_exchanges_are_inverse_and_so_are_their_gradients(B: int, t: int, short: int, h: int, sp: int) -> None:
    D, T = 2, t * sp - min(short, t - 1, sp - 1)
    if (sp - 1) * -(-T // sp) >= T:
        return
    whole, g = drawn(B, T, 3, sp * h, D), drawn(2, B, T, sp * h, D)[1]

    def there_and_back(group: td.ProcessGroup) -> tuple[Tensor, Tensor]:
        here = part(group, T)
        x = whole[:, here].clone().requires_grad_()
        _, k, _ = to_heads(x, T, group)
        y = to_tokens(k, group)
        (y * g[:, here]).sum().backward()
        assert x.grad is not None
        return y, x.grad

    for rank, (y, gradient) in enumerate(in_group(sp, there_and_back)):
        here = slice(rank * -(-T // sp), (rank + 1) * -(-T // sp))
        assert torch.equal(y, whole[:, here, 1])
        assert torch.equal(gradient[:, :, 1], g[:, here])
        assert not gradient[:, :, ::2].any()


def test_a_group_in_bf16() -> None:
    whole = drawn(2, 16, 3, 4, 8, dtype=torch.bfloat16)
    for rank, heads in enumerate(in_group(4, lambda group: to_heads(whole[:, part(group, 16)], 16, group))):
        assert torch.equal(heads, whole[:, :, :, rank : rank + 1].permute(2, 0, 3, 1, 4))


def awake(config: ModelConfig, objective: str, mode: str = "none", dtype: torch.dtype = torch.float32) -> Transformer:
    """Fresh weights, with gains and a head that matter."""
    torch.manual_seed(0)
    model = Transformer(config, mode, objective).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.normal_(std=0.3, generator=generator)
        for name, weight in model.named_parameters():
            if "ln_" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    return model


def joined(model: Transformer, group: td.ProcessGroup) -> Transformer:
    """A copy of the model as a rank of the group has it."""
    weight = model.head.weight
    mine = Transformer(model.config, model.activation_checkpointing, model.objective, group=group).to(weight.dtype)
    mine.load_state_dict(model.state_dict())
    return mine


def images(config: ModelConfig, B: int) -> tuple[Tensor, Tensor]:
    """Tokens and numbers of B images."""
    tokens = torch.randint(0, config.n_vocab, (B, config.n_ctx), generator=torch.Generator().manual_seed(2))
    return tokens, torch.arange(100, 100 + B)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    assert all(weight.grad is not None for weight in module.parameters()), "ZeRO would wait for it"
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def check_equal_to_one(model: Transformer, sp: int, dp: int, B: int, atol: float, seed: int = 3) -> None:
    """The mean over sp x dp ranks of losses and of gradients, as ZeRO takes it, is what one process gets from all B images."""
    tokens, numbers = images(model.config, B)
    alone = copy.deepcopy(model)
    drop = Dropout(0.2, seed, numbers, model.config.n_ctx)
    loss = image_loss(model.objective, seed, 0.3)(partial(alone, dropout=drop), tokens, numbers).mean()
    loss.backward()
    share = B // dp

    def rank(group: td.ProcessGroup, first: int) -> tuple[Tensor, dict[str, Tensor]]:
        mine, some = joined(model, group), slice(first, first + share)
        drop = Dropout(0.2, seed, numbers[some], model.config.n_ctx, group)
        loss = image_loss(model.objective, seed, 0.3, group)(partial(mine, dropout=drop), tokens[some], numbers[some]).mean()
        loss.backward()
        return loss.detach(), gradients(mine)

    groups = [in_group(sp, partial(rank, first=i * share)) for i in range(dp)]
    found = [pair for group in groups for pair in group]
    assert len(found) == sp * dp
    assert torch.stack([loss for loss, _ in found]).mean().item() == pytest.approx(loss.item(), abs=atol)
    for name, expected in gradients(alone).items():
        mean = torch.stack([of_rank[name] for _, of_rank in found]).mean(0)
        assert expected.any(), name
        torch.testing.assert_close(
            mean, expected, atol=atol, rtol=1e-5 if atol < 1e-3 else 0.05, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize(("sp", "dp"), [(2, 2), (4, 1)])
def test_loss_and_gradients_on_four_ranks_equal_one(sp: int, dp: int, objective: str, mode: str) -> None:
    check_equal_to_one(awake(SMALL, objective, mode), sp, dp, B=6, atol=1e-6)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("sp", [3, 4, 6, 8])
def test_24_heads_on_as_many_ranks_as_divide_them(sp: int, objective: str) -> None:
    """625 tokens: the last rank has fewer than the others."""
    check_equal_to_one(awake(ODD, objective), sp, 1, B=2, atol=2e-6)


def test_close_in_bf16() -> None:
    check_equal_to_one(awake(SMALL, "ar", "selective", dtype=torch.bfloat16), 2, 2, B=4, atol=1e-2)


def test_a_rank_without_any_masked_token_counts_nothing() -> None:
    """The mean is over the whole image's masked tokens, not over what each rank happens to hold."""
    config = ModelConfig(n_layer=1, n_head=8, n_embd=16, n_px=4, n_vocab=8)
    _, numbers = images(config, 5)
    mask = draw_masks(3, numbers.numpy(), 16, 0.3)
    counts = mask.view(5, 8, 2).sum(2)
    assert (counts == 0).any()
    assert (counts == 2).any()
    check_equal_to_one(awake(config, "bert"), 8, 1, B=5, atol=1e-6)


class Exchanged(TorchDispatchMode):
    """Counts the numbers that this thread puts into all-to-alls."""

    count = 0

    def __torch_dispatch__(self, operation: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None):  # type: ignore[no-untyped-def]
        if operation is torch.ops.c10d.alltoall_base_.default:
            self.count += args[1].numel()
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize(("mode", "each"), [("none", 8), ("selective", 12), ("full", 12)])
def test_numbers_exchanged_for_a_token_and_a_block(mode: str, each: int, sp: int) -> None:
    """3 C to the heads and C back, forward and backward: 8 C. Recomputation exchanges again, rather than keep 4 C a token."""
    model = awake(SMALL, "ar", mode)
    tokens, numbers = images(SMALL, 3)

    def rank(group: td.ProcessGroup) -> int:
        mine = joined(model, group)
        with Exchanged() as exchanged:
            image_loss("ar", 0, 0.3, group)(mine, tokens, numbers).mean().backward()
        return exchanged.count

    numbers_exchanged = each * SMALL.n_embd * 3 * SMALL.n_ctx // sp * SMALL.n_layer
    assert in_group(sp, rank) == [numbers_exchanged] * sp
    layout = RankLayout(sp, micro_batch=3, sequence_parallel=sp, precision="fp32", checkpointing=mode)
    assert exchanged_bytes(SMALL, layout) == 4 * numbers_exchanged * (sp - 1) / sp  # the plan's; a part stays where it is


@pytest.mark.parametrize("config", [SMALL, ODD])
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_residuals_and_features_of_a_group_are_those_of_one(objective: str, config: ModelConfig) -> None:
    model = awake(config, objective)
    tokens, _ = images(config, 2)
    alone = [(h.detach(), n.detach()) for h, n in model.residuals(tokens)]

    def rank(group: td.ProcessGroup) -> None:
        here, mine = part(group, config.n_ctx), joined(model, group)
        with torch.no_grad():
            layers = list(mine.residuals(tokens))
            assert len(layers) == config.n_layer + 1
            for found, whole in zip(layers, alone, strict=True):
                for x, expected in zip(found, whole, strict=True):
                    torch.testing.assert_close(x, expected[:, here], atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(mine.pooled(x), expected.mean(1), atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(model.pooled(expected), expected.mean(1))

    in_group(4, rank)


def test_a_loss_of_features_has_the_gradient_of_one_rank() -> None:
    """As a probe or a class head would be trained: each rank computes the same loss of the pooled features."""
    x, weight = drawn(3, 10, 5).requires_grad_(), drawn(5, 4)
    loss = (mean_over_tokens(x, 10, None) @ weight).square().sum()
    (expected,) = torch.autograd.grad(loss, x)

    def rank(group: td.ProcessGroup) -> tuple[Tensor, Tensor]:
        mine = x.detach()[:, part(group, 10)].requires_grad_()
        loss = (mean_over_tokens(mine, 10, group) @ weight).square().sum()
        loss.backward()
        assert mine.grad is not None
        return loss.detach(), mine.grad

    found = in_group(4, rank)  # 3, 3, 3 and 1 tokens
    assert [loss.item() for loss, _ in found] == pytest.approx([loss.item()] * 4)
    # Each token is on one rank, so that the mean over four ranks is a quarter of what the rank that holds it says.
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found], dim=1) / 4, expected)


def test_part_of_an_image_is_refused() -> None:
    with pytest.raises(AssertionError, match="divides whole images"):
        in_group(2, lambda group: joined(awake(SMALL, "ar"), group).embed(images(SMALL, 1)[0][:, :8]))
