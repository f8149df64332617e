"""The BERT objective's network: against plain loops, and that nothing of a hidden pixel is seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.model.objectives import draw_masks, masked_nats
from igpt_ds.model.store import fresh_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.plan.costs import parameters


@pytest.fixture
def bert(telling: Callable[[str], Transformer]) -> Transformer:
    return telling("bert")


@pytest.fixture
def mask(tokens: torch.Tensor) -> torch.Tensor:
    return draw_masks(4, np.arange(len(tokens)), tokens.size(1), 0.3)


def slow_forward(model: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Facts of the released code in float64, one position after the other: every position looks at all of them."""
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    C, H, T = model.config.n_embd, model.config.n_head, model.config.n_ctx
    D = C // H

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / math.sqrt(float((x * x).sum()) / C + 1e-5) * gain

    images = []
    for row, hidden in zip(tokens.tolist(), mask.tolist(), strict=True):
        h = []
        for i in range(T):
            content = torch.zeros(C, dtype=torch.float64) if hidden[i] else weights["wte.weight"][row[i]]
            h.append(content + weights["wpe"][i])
        for layer in range(model.config.n_layer):
            block = {name.removeprefix(f"blocks.{layer}."): weight for name, weight in weights.items()}
            qkv = [block["attn.c_attn.weight"] @ norm(x, block["ln_1.weight"]) for x in h]
            for i in range(T):
                heads = []
                for head in range(H):
                    q, k, v = (slice(part * C + head * D, part * C + (head + 1) * D) for part in range(3))
                    scores = [float(qkv[i][q] @ qkv[j][k]) / math.sqrt(D) for j in range(T)]
                    total = sum(math.exp(score) for score in scores)
                    heads.append(sum(math.exp(scores[j]) / total * qkv[j][v] for j in range(T)))
                h[i] = h[i] + block["attn.c_proj.weight"] @ torch.cat(heads)
            for i in range(T):
                x = block["mlp.c_fc.weight"] @ norm(h[i], block["ln_2.weight"])
                h[i] = h[i] + block["mlp.c_proj.weight"] @ (x / (1 + torch.exp(-1.702 * x)))
        images.append(torch.stack([weights["head.weight"] @ norm(x, weights["ln_f.weight"]) for x in h]))
    return torch.stack(images)


def test_logits_equal_a_slow_reference(bert: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    torch.testing.assert_close(bert(tokens, mask).double(), slow_forward(bert, tokens, mask), atol=2e-5, rtol=1e-5)


def test_nothing_of_a_hidden_pixel_is_seen(bert: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Whatever stands there, the logits are the same at every position, to the last bit."""
    logits = bert(tokens, mask)
    for colour in range(bert.config.n_vocab):
        assert torch.equal(bert(torch.where(mask, colour, tokens), mask), logits)


def test_every_other_pixel_is_seen_from_everywhere(bert: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    logits = bert(tokens, mask)
    for i in range(tokens.size(1)):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % bert.config.n_vocab
        differs = (bert(changed, mask) - logits).abs().amax(dim=2) > 0
        assert torch.equal(differs.all(dim=1), ~mask[:, i])
        assert torch.equal(differs.any(dim=1), ~mask[:, i])


def test_a_hidden_pixel_keeps_its_position(bert: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    h = bert.embed(tokens, mask)
    for b, i in mask.nonzero().tolist():
        assert torch.equal(h[b, i], bert.wpe[i])
    for b, i in (~mask).nonzero().tolist():
        assert torch.equal(h[b, i], bert.wte.weight[tokens[b, i]] + bert.wpe[i])


def test_there_is_no_sos_and_one_vector_less(config: ModelConfig, bert: Transformer) -> None:
    causal = fresh_model(config, seed=1)
    names, others = set(bert.state_dict()), set(causal.state_dict())
    assert others - names == {"sos"}
    assert names <= others
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (causal, bert)]
    assert sizes[0] - sizes[1] == config.n_embd
    assert sizes == [parameters(config, "ar"), parameters(config, "bert")]


def test_loss_at_step_0_is_the_log_of_the_colours(config: ModelConfig, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    logits = fresh_model(config, seed=0, objective="bert")(tokens, mask)
    assert masked_nats(logits, tokens, mask).tolist() == pytest.approx([math.log(config.n_vocab)] * len(tokens), abs=1e-6)


def test_activation_checkpointing_changes_nothing(bert: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    twin = Transformer(bert.config, activation_checkpointing="full", objective="bert")
    twin.load_state_dict(bert.state_dict())
    for network in (bert, twin):
        masked_nats(network(tokens, mask), tokens, mask).mean().backward()
    for one, other in zip(bert.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_residuals_are_of_the_whole_image(bert: Transformer, tokens: torch.Tensor) -> None:
    layers = list(bert.residuals(tokens))
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(bert.head(layers[-1][1]), bert(tokens, nothing))


def test_misuse_is_noticed(bert: Transformer, model: Transformer, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="the bert objective alone takes a mask, and needs one"):
        bert(tokens)
    with pytest.raises(AssertionError, match="the bert objective alone takes a mask"):
        model(tokens, mask)
    with pytest.raises(AssertionError, match="an auto-regressive model hides nothing"):
        model.embed(tokens, mask)
