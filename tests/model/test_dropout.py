"""Dropout: its masks are a pure function, whatever computes the block and however the images are divided."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from igpt_ds.config import CHECKPOINTING, ModelConfig
from igpt_ds.model.dropout import Dropout
from igpt_ds.model.objectives import image_loss
from igpt_ds.model.transformer import Transformer


def test_the_stated_share_is_zeroed_and_the_mean_stays() -> None:
    x = torch.ones(4, 16, 512, dtype=torch.float64)
    y = Dropout(0.3, 0, torch.arange(4), 16)(x, 0)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    assert (y == 0).double().mean().item() == pytest.approx(0.3, abs=0.015)  # six standard deviations


def test_a_mask_is_a_function_of_seed_image_and_place() -> None:
    x, numbers = torch.ones(3, 16, 8), torch.tensor([7, 10**12, 9])
    drop = Dropout(0.5, 1, numbers, 16)
    base = drop(x, 0)
    torch.manual_seed(5)  # torch's own generators do not matter
    assert torch.equal(drop(x, 0), base)
    alone = Dropout(0.5, 1, numbers[1:2], 16)
    assert torch.equal(alone(x[1:2], 0), base[1:2])
    others = [drop(x, place) for place in (1, 2, 3)]
    others += [Dropout(0.5, seed, numbers + later, 16)(x, 0) for seed, later in ((2, 0), (1, 10))]
    patterns = {tuple(one.flatten().tolist()) for one in (base, *others)} | {tuple(image.flatten().tolist()) for image in base}
    assert len(patterns) == 6 + 3


def test_the_derivative_is_the_mask() -> None:
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    drop = Dropout(0.4, 0, torch.arange(2), 16)
    assert torch.autograd.gradcheck(lambda one: drop(one, 1), (x,))
    half = torch.randn(2, 16, 8, dtype=torch.bfloat16)
    assert drop(half, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_every_activation_checkpointing_and_every_division_of_the_images_drops_the_same(objective: str) -> None:
    config = ModelConfig(n_layer=3, n_head=2, n_embd=16, n_px=4, n_vocab=8)
    tokens, numbers = torch.randint(8, (4, 16), generator=torch.Generator().manual_seed(1)), torch.arange(100, 104)
    nats = image_loss(objective, 3, 0.3)
    found = []
    for mode in CHECKPOINTING:
        torch.manual_seed(0)
        model = Transformer(config, mode, objective, head_std=0.5)
        loss = nats(partial(model, dropout=Dropout(0.3, 3, numbers, 16)), tokens, numbers).mean()
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, other) for rest in found[1:] for one, other in zip(found[0], rest, strict=True))
    halves = [
        nats(partial(model, dropout=Dropout(0.3, 3, numbers[some], 16)), tokens[some], numbers[some]) for some in ([0, 2], [1, 3])
    ]
    assert torch.cat(halves).mean().item() == pytest.approx(found[0][0].item(), abs=1e-6)
    assert abs(found[0][0].item() - nats(model, tokens, numbers).mean().item()) > 1e-3
    model.eval()
    with pytest.raises(AssertionError, match="training alone"):
        model(tokens, numbers[:, None].expand(4, 16) > 0 if objective == "bert" else None, Dropout(0.3, 3, numbers, 16))
