"""The cache changes nothing; filters do what they say; what is drawn has the distribution that the model states."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import ImageGPTForCausalImageModeling

from igpt_ds.config import ModelConfig
from igpt_ds.model.interchange.hf import write_hf
from igpt_ds.model.sampling import Decoder, Filter, choose, filter_logits, sample
from igpt_ds.model.store import fresh_model
from igpt_ds.model.transformer import Transformer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def speaking(config: ModelConfig) -> Transformer:
    """Fresh weights, but a head that prefers some colours."""
    model = fresh_model(config, seed=1)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("given", [0, 1, 6, 15])
def test_cached_sampling_equals_full_recompute(model: Transformer, tokens: torch.Tensor, given: int) -> None:
    cached = sample(model, tokens[:, :given], seeded())
    recomputed = sample(model, tokens[:, :given], seeded(), use_cache=False)
    assert torch.equal(cached, recomputed)
    assert torch.equal(cached[:, :given], tokens[:, :given])


@pytest.mark.parametrize("given", [0, 1, 9])
def test_cached_logits_equal_the_forward_pass(model: Transformer, tokens: torch.Tensor, given: int) -> None:
    B, T = tokens.shape
    with torch.inference_mode():
        decoder = Decoder(model, B)
        found = [decoder.prefill(tokens[:, :given])] + [decoder.step(tokens[:, i]) for i in range(given, T - 1)]
        torch.testing.assert_close(torch.stack(found, dim=1), model(tokens)[:, given:])


def test_cached_logits_in_bfloat16_are_those_of_the_model_but_for_rounding(model: Transformer, tokens: torch.Tensor) -> None:
    B, T = tokens.shape
    with torch.inference_mode():
        decoder = Decoder(model, B, torch.bfloat16)
        found = [decoder.prefill(tokens[:, :4])] + [decoder.step(tokens[:, i]) for i in range(4, T - 1)]
        expected = model(tokens)[:, 4:]
    difference = (torch.stack(found, dim=1) - expected).abs()
    assert 1e-5 < difference.max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("n_px", [5, 48])
def test_any_side_can_be_drawn(n_px: int) -> None:
    model = speaking(ModelConfig(n_layer=1, n_head=2, n_embd=8, n_px=n_px, n_vocab=8))
    prefix = torch.ones(2, n_px * (n_px - 2), dtype=torch.int64)
    drawn = sample(model, prefix, seeded())
    assert drawn.shape == (2, n_px * n_px)
    assert torch.equal(drawn, sample(model, prefix, seeded(), use_cache=False))


def test_the_seed_decides_and_batches_do_not(model: Transformer) -> None:
    nothing = torch.zeros(6, 0, dtype=torch.int64)
    together = sample(model, nothing, seeded())
    generator = seeded()
    apart = torch.cat([sample(model, part, generator) for part in nothing.split(4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, sample(model, nothing, torch.Generator().manual_seed(8)))
    assert len(together.unique(dim=0)) == 6


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 6, 0.9)])
def test_samples_follow_the_model(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Chi-squared over the joint distribution of the first two pixels, computed by plain forward passes."""
    model = speaking(ModelConfig(n_layer=1, n_head=2, n_embd=8, n_px=2, n_vocab=8))
    N, V = 5000, 8
    expected = np.zeros((V, V))
    with torch.no_grad():
        for first, second in itertools.product(range(V), range(V)):
            logits = model(torch.tensor([[first, second]]))[0]
            p = filter_logits(logits, Filter(temperature, top_k, top_p)).double().softmax(-1)
            expected[first, second] = p[0, first] * p[1, second]
    drawn = sample(model, torch.zeros(N, 0, dtype=torch.int64), seeded(), Filter(temperature, top_k, top_p))
    counts = np.zeros((V, V))
    np.add.at(counts, (drawn[:, 0].numpy(), drawn[:, 1].numpy()), 1)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.all() == (top_k is None)
    often = expected * N >= 5  # the test's own condition; rarer pairs are counted together
    observed = np.append(counts[often], counts[~often].sum())
    predicted = np.append(expected[often], expected[~often].sum()) * N
    keep = predicted > 0
    assert chisquare(observed[keep], predicted[keep]).pvalue > 0.01


def test_choose_walks_the_cumulative_distribution() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 1e-9], dtype=torch.float64)
    assert choose(p.log().expand(len(u), -1), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_top_k_keeps_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert filter_logits(logits, Filter(0.5, 2)).tolist() == [[float("-inf"), 0.0, -2.0, float("-inf")]]
    assert filter_logits(logits, Filter()).tolist() == logits.tolist()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_top_p_against_brute_force(top_p: float, top_k: int | None) -> None:
    logits = 2 * torch.randn(50, 11, generator=seeded())
    filtered = filter_logits(logits, Filter(0.8, top_k, top_p))
    for row, found in zip(filter_logits(logits, Filter(0.8, top_k)).double(), filtered, strict=True):
        p = row.softmax(-1).tolist()
        kept: list[int] = []
        for colour in sorted(range(11), key=lambda colour: -p[colour]):
            if sum(p[k] for k in kept) >= top_p or p[colour] == 0:
                break
            kept.append(colour)
        assert (found > float("-inf")).nonzero().flatten().tolist() == sorted(kept)
        assert found[kept].tolist() == pytest.approx(row[kept].tolist())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "message"),
    [
        (0.0, None, None, r"temperature=0.0 must be .* at least 1e-09; use top_k=1"),
        (1e-38, None, None, r"temperature=1e-38 must be"),
        (float("nan"), None, None, r"temperature=nan must be"),
        (float("inf"), None, None, r"temperature=inf must be"),
        (1.0, 0, None, r"top_k=0 must be at least 1"),
        (1.0, 9, None, r"top_k=9 must lie between 1 and the number of colours, 8"),
        (1.0, None, 0.0, r"top_p=0.0 must be greater than 0 and at most 1"),
        (1.0, None, 1.5, r"top_p=1.5 must be greater than 0 and at most 1"),
    ],
)
def test_bad_filters_are_refused(
    model: Transformer, temperature: float, top_k: int | None, top_p: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(1, 8), Filter(temperature, top_k, top_p))
    with pytest.raises(ValueError, match=message):
        sample(model, torch.zeros(1, 0, dtype=torch.int64), seeded(), Filter(temperature, top_k, top_p))


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    logits = 1e6 * torch.randn(20, 11, generator=seeded())
    assert torch.equal(filter_logits(logits, Filter(1e-9)).softmax(-1).argmax(-1), logits.argmax(-1))
    assert filter_logits(logits, Filter(1e-9)).softmax(-1).isfinite().all()


def test_a_broken_model_draws_nothing(config: ModelConfig) -> None:
    broken = fresh_model(config, seed=0)
    with torch.no_grad():
        broken.blocks[-1].mlp.c_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"the model's logits are not finite"):
        sample(broken, torch.zeros(1, 0, dtype=torch.int64), seeded())


def test_bert_models_draw_nothing(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="this model has 'bert'"):
        sample(fresh_model(config, 1, "bert"), torch.zeros(1, 0, dtype=torch.int64), seeded())


def test_greedy_drawing_equals_transformers_generate(model: Transformer, tokens: torch.Tensor, tmp_path: Path) -> None:
    """The likeliest colour at each pixel, by an independent model with a cache of its own; sos is its token V."""
    V, T = model.config.n_vocab, model.config.n_ctx
    write_hf(tmp_path / "hf", model.config, model.state_dict(), np.zeros((V, 3), dtype=np.float32))
    peer = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "hf").eval()
    given = torch.cat([torch.full((5, 1), V), tokens[:, :3]], dim=1)
    everything = {"attention_mask": torch.ones_like(given), "pad_token_id": V}  # else colour 0 is taken for padding
    theirs = peer.generate(given, **everything, max_length=T + 1, do_sample=False, use_cache=True)
    assert torch.equal(sample(model, tokens[:, :3], seeded(), Filter(top_k=1)), theirs[:, 1:])
