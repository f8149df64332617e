"""The released arithmetic, against slow plain references."""

import math

import pytest
import torch

from igpt_ds.config import SIZES, ModelConfig
from igpt_ds.model.objectives import autoregressive_loss, image_nats
from igpt_ds.model.store import fresh_model
from igpt_ds.model.transformer import Transformer, init_std
from igpt_ds.plan.costs import parameters

# facts of the paper's sizes: (size, n_px) -> exact number of parameters
COUNTS = {
    ("s", 32): 76_571_648,
    ("m", 32): 455_157_760,
    ("l", 32): 1_362_250_752,
    ("l", 48): 1_364_216_832,
    ("xl", 32): 6_801_438_720,
    ("xl", 64): 6_810_875_904,
}


@pytest.mark.parametrize(("size", "n_px"), COUNTS)
def test_parameter_counts_are_the_papers(size: str, n_px: int) -> None:
    config = ModelConfig(**SIZES[size], n_px=n_px)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == COUNTS[size, n_px] == parameters(config)


def test_loss_at_step_0_is_the_log_of_the_colours(config: ModelConfig, tokens: torch.Tensor) -> None:
    logits = fresh_model(config, seed=0)(tokens)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert autoregressive_loss(logits, tokens).item() == pytest.approx(math.log(config.n_vocab), abs=1e-6)


def slow_forward(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The released code, one image and one head at a time, in float64: einsum-free, with an explicit mask and softmax."""
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    C, H = model.config.n_embd, model.config.n_head
    D = C // H

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * gain

    images = []
    for row in tokens:
        pixels = [weights["sos"]] + [weights["wte.weight"][pixel] for pixel in row[:-1]]
        h = torch.stack(pixels) + weights["wpe"]
        for layer in range(model.config.n_layer):
            block = {name.removeprefix(f"blocks.{layer}."): weight for name, weight in weights.items()}
            qkv = norm(h, block["ln_1.weight"]) @ block["attn.c_attn.weight"].T
            heads = []
            for head in range(H):
                q, k, v = (qkv[:, part * C + head * D : part * C + (head + 1) * D] for part in range(3))
                scores = q @ k.T / math.sqrt(D)
                scores = scores + torch.full_like(scores, -1e10).triu(1)
                heads.append(scores.softmax(-1) @ v)
            h = h + torch.cat(heads, -1) @ block["attn.c_proj.weight"].T
            x = norm(h, block["ln_2.weight"]) @ block["mlp.c_fc.weight"].T
            h = h + (x / (1 + torch.exp(-1.702 * x))) @ block["mlp.c_proj.weight"].T
        images.append(norm(h, weights["ln_f.weight"]) @ weights["head.weight"].T)
    return torch.stack(images)


def test_logits_equal_a_slow_reference(model: Transformer, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(model(tokens).double(), slow_forward(model, tokens), atol=2e-5, rtol=1e-5)


def test_causality(model: Transformer, tokens: torch.Tensor) -> None:
    """Logits at i depend on the pixels before i, on none after, and never on the last one."""
    logits = model(tokens)
    for i in range(tokens.size(1)):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % model.config.n_vocab
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert torch.all(difference[: i + 1] == 0)
        assert torch.all(difference[i + 1 :] > 0)


# What the tables say for C = 128, L = 2, worked out by hand: 128^-0.5, (128 * 2)^-0.5, (0.125 / 128)^0.5, 0.25 (128 * 2)^-0.5.
STDS = {
    "released": {"wte": 0.02, "sos": 0.02, "wpe": 0.01, "qkv": 0.088388, "attn_out": 0.0625, "mlp_in": 0.02, "mlp_out": 0.02},
    "sparse_transformer": {
        **{"wte": 0.01, "sos": 0.01, "wpe": 0.01},
        **{"qkv": 0.03125, "attn_out": 0.015625, "mlp_in": 0.03125, "mlp_out": 0.015625},
    },
}
TENSORS = {
    "wte": "wte.weight",
    "sos": "sos",
    "wpe": "wpe",
    "qkv": "blocks.1.attn.c_attn.weight",
    "attn_out": "blocks.1.attn.c_proj.weight",
    "mlp_in": "blocks.1.mlp.c_fc.weight",
    "mlp_out": "blocks.1.mlp.c_proj.weight",
}


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("init", STDS)
def test_fresh_standard_deviations(init: str, objective: str) -> None:
    wide = ModelConfig(n_layer=2, n_head=4, n_embd=128, n_px=16, n_vocab=512)
    weights = fresh_model(wide, seed=0, objective=objective, init=init).state_dict()
    for name, std in STDS[init].items():
        if name == "sos" and objective == "bert":
            continue
        weight = weights[TENSORS[name]]
        tolerance = 0.2 if name == "sos" else 0.03  # sos has C values only
        assert weight.std().item() == pytest.approx(std, rel=tolerance), name
        assert weight.mean().item() == pytest.approx(0, abs=5 * std / weight.numel() ** 0.5), name
    assert not weights["head.weight"].any()
    assert all(torch.all(weight == 1) for name, weight in weights.items() if "ln_" in name)


@pytest.mark.parametrize(
    ("size", "qkv", "attn_out"),
    [("s", 0.04419, 0.00902), ("m", 0.03125, 0.00521), ("l", 0.02552, 0.00368), ("xl", 0.01804, 0.00233)],
)
def test_the_released_models_standard_deviations(size: str, qkv: float, attn_out: float) -> None:
    table = init_std(ModelConfig(**SIZES[size]))
    assert table["attn.c_attn"] == pytest.approx(qkv, abs=5e-6)
    assert table["attn.c_proj"] == pytest.approx(attn_out, abs=5e-6)


def test_sparse_transformer_is_the_sibling_codes_arithmetic() -> None:
    """Its variances are written with the number of inputs of each product, 4 C of them out of the MLP."""
    config = ModelConfig(**SIZES["l"])
    C, L = config.n_embd, config.n_layer
    table = init_std(config, "sparse_transformer")
    assert table["attn.c_proj"] == pytest.approx(math.sqrt(0.125 * 0.5 / C / L), rel=1e-12)
    assert table["mlp.c_proj"] == pytest.approx(math.sqrt(0.5 / (4 * C) / L * 0.5), rel=1e-12)
    assert table["attn.c_attn"] == table["mlp.c_fc"] == pytest.approx(math.sqrt(0.125 / C), rel=1e-12)


def test_activation_checkpointing_changes_nothing(model: Transformer, tokens: torch.Tensor) -> None:
    twin = Transformer(model.config, activation_checkpointing="full")
    twin.load_state_dict(model.state_dict())
    losses = []
    for network in (model, twin):
        loss = autoregressive_loss(network(tokens), tokens)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_residuals_end_in_the_logits(model: Transformer, tokens: torch.Tensor) -> None:
    layers = list(model.residuals(tokens))
    assert len(layers) == model.config.n_layer + 1
    torch.testing.assert_close(model.head(layers[-1][1]), model(tokens))
    torch.testing.assert_close(layers[0][0], model.embed(tokens))


def test_image_nats_are_the_mean_over_pixels(model: Transformer, tokens: torch.Tensor) -> None:
    logits = model(tokens)
    by_hand = -logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2).mean(1)
    torch.testing.assert_close(image_nats(logits, tokens), by_hand)
    torch.testing.assert_close(autoregressive_loss(logits, tokens), by_hand.mean())
