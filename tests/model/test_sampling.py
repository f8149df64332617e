"""The cache changes nothing; filters do what they say."""

import pytest
import torch

from igpt_ds.model.sampling import filter_logits, sample
from igpt_ds.model.transformer import Transformer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("given", [0, 1, 6, 15])
def test_cached_sampling_equals_full_recompute(model: Transformer, tokens: torch.Tensor, given: int) -> None:
    cached = sample(model, tokens[:, :given], seeded())
    recomputed = sample(model, tokens[:, :given], seeded(), use_cache=False)
    assert torch.equal(cached, recomputed)
    assert torch.equal(cached[:, :given], tokens[:, :given])


def test_cached_logits_equal_the_forward_pass(model: Transformer, tokens: torch.Tensor) -> None:
    caches = model.new_caches(tokens.size(0))
    with torch.no_grad():
        steps = [model.next_logits(tokens[:, :i], caches) for i in range(tokens.size(1))]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(tokens))


def test_samples_follow_the_model(model: Transformer) -> None:
    """First pixels of many samples have the frequencies that the model states."""
    with torch.no_grad():
        stated = model.next_logits(torch.zeros(1, 0, dtype=torch.int64), model.new_caches(1)).softmax(-1)[0]
    drawn = sample(model, torch.zeros(4000, 0, dtype=torch.int64), seeded())[:, 0]
    measured = torch.bincount(drawn, minlength=model.config.n_vocab) / 4000
    assert (measured - stated).abs().max() < 0.03


def test_top_k_keeps_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert filter_logits(logits, 0.5, 2).tolist() == [[float("-inf"), 6.0, 4.0, float("-inf")]]
    assert filter_logits(logits, 1.0, None).tolist() == logits.tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "message"), [(0.0, None, "temperature=0.0"), (1.0, 0, "top_k=0"), (1.0, 5, "top_k=5")]
)
def test_bad_filters_are_refused(temperature: float, top_k: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(1, 4), temperature, top_k)
