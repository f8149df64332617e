"""Losses against loops over single pixels; masks against the frequencies and the independence that they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.model.objectives import autoregressive_loss, draw_masks, image_loss, image_nats, masked_nats
from igpt_ds.model.transformer import Transformer

# ------------------------------------------------------------------------------------------------------ losses


def pixel_nats(logits: torch.Tensor, tokens: torch.Tensor, b: int, i: int) -> float:
    """-log p of one pixel, by the definition of a softmax in Python's floats."""
    row = logits[b, i].tolist()
    return math.log(sum(math.exp(x) for x in row)) - row[int(tokens[b, i])]


def test_masked_nats_are_the_mean_over_each_images_masked_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(5, 16, 8, generator=random), torch.randint(0, 8, (5, 16), generator=random)
    mask = draw_masks(3, np.arange(5), 16, 0.3)
    expected = []
    for b in range(5):
        chosen = [pixel_nats(logits, tokens, b, i) for i in range(16) if mask[b, i]]
        expected.append(sum(chosen) / len(chosen))
    found = masked_nats(logits, tokens, mask)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(masked_nats(logits, tokens, everything), image_nats(logits, tokens))


def test_only_masked_logits_are_moved() -> None:
    logits = torch.zeros(2, 16, 8, requires_grad=True)
    mask = draw_masks(3, np.arange(2), 16, 0.3)
    masked_nats(logits, torch.zeros(2, 16, dtype=torch.int64), mask).mean().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_losses_in_bf16_are_computed_in_fp32() -> None:
    logits = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, mask = torch.zeros(2, 16, dtype=torch.int64), draw_masks(0, np.arange(2), 16, 0.5)
    assert torch.equal(masked_nats(logits, tokens, mask), masked_nats(logits.float(), tokens, mask))


def test_the_loss_of_an_objective(model: Transformer, tokens: torch.Tensor) -> None:
    numbers = torch.tensor([4, 10**12, 0, 7, 8])
    causal = image_loss("ar", 3, 0.15)(model, tokens, numbers)
    assert torch.equal(causal.mean(), autoregressive_loss(model(tokens), tokens))

    masked = Transformer(model.config, objective="bert")
    torch.nn.init.normal_(masked.head.weight)
    found = image_loss("bert", 3, 0.25)(masked, tokens, numbers)
    mask = draw_masks(3, numbers.numpy(), 16, 0.25)
    logits = masked(tokens, mask)
    for b in range(5):
        chosen = [pixel_nats(logits, tokens, b, i) for i in range(16) if mask[b, i]]
        assert found[b].item() == pytest.approx(sum(chosen) / len(chosen), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mask_prob", [0.15, 0.2, 0.5])
def test_each_pixel_is_hidden_with_the_stated_probability(mask_prob: float) -> None:
    B, T = 4000, 64
    mask = draw_masks(1, np.arange(B), T, mask_prob).double().numpy()
    sigma = math.sqrt(mask_prob * (1 - mask_prob))
    assert abs(mask.mean() - mask_prob) < 4 * sigma / math.sqrt(B * T)
    assert np.abs(mask.mean(0) - mask_prob).max() < 5 * sigma / math.sqrt(B)  # at every place alike
    counts = mask.sum(1)
    assert counts.var() == pytest.approx(T * sigma**2, rel=0.1)  # of a binomial: pixels of an image do not follow each other
    centred = mask - mask_prob
    for shift in (1, 8):  # neighbours in a row, in a column
        assert abs((centred[:, shift:] * centred[:, :-shift]).mean()) < 5 * sigma**2 / math.sqrt(B * (T - shift))
    assert abs((centred[1:] * centred[:-1]).mean()) < 5 * sigma**2 / math.sqrt((B - 1) * T)  # neighbours in the stream


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64),
    first=st.integers(0, 10**15),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    T=st.integers(1, 40),
    mask_prob=st.floats(1e-6, 1 - 1e-6),
)
def test_masks_are_a_function_of_the_number_alone(seed: int, first: int, cuts: list[int], T: int, mask_prob: float) -> None:
    """Drawn together, in micro batches of any size, in any order or alone: the same, and never empty."""
    numbers = first + np.arange(sum(cuts))
    whole = draw_masks(seed, numbers, T, mask_prob)
    assert (whole.dtype, whole.shape) == (torch.bool, (len(numbers), T))
    assert whole.any(dim=1).all()
    parts = np.split(numbers, np.cumsum(cuts)[:-1])
    assert torch.equal(torch.cat([draw_masks(seed, part, T, mask_prob) for part in parts]), whole)
    assert torch.equal(draw_masks(seed, numbers[::-1], T, mask_prob), whole.flip(0))


def test_another_seed_or_another_epoch_is_another_mask() -> None:
    n_images, T = 1000, 256
    first, later, seeded = (draw_masks(seed, np.arange(4) + start, T, 0.15) for seed, start in ((1, 0), (1, n_images), (2, 0)))
    for other in (later, seeded):
        assert all(0 < (one ^ two).sum() < T / 2 for one, two in zip(first, other, strict=True))


def test_an_image_of_few_pixels_has_one_masked_at_least() -> None:
    """Where none was drawn any of them is taken alike, and the loss is a number."""
    B, T = 3000, 4
    mask = draw_masks(5, np.arange(B), T, 0.001)
    alone = mask[mask.sum(1) == 1].double()
    assert len(alone) > 0.99 * B
    assert (alone.mean(0) - 1 / T).abs().max() < 5 * math.sqrt(3 / 16 / B)
    loss = masked_nats(torch.zeros(B, T, 8), torch.zeros(B, T, dtype=torch.int64), mask)
    torch.testing.assert_close(loss, torch.full((B,), math.log(8)))


def test_masks_are_frozen() -> None:
    """A resumed run must hide the same pixels."""
    hidden = [row.nonzero().ravel().tolist() for row in draw_masks(7, np.array([0, 1, 10**12]), 32, 0.15)]
    assert hidden == [[3, 17, 19, 27, 31], [2, 7, 14, 17, 29], [1, 2, 3, 8, 20]]
