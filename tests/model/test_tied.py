"""Tied embeddings: one matrix for the pixels' embedding and for their logits, with one name everywhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from igpt_ds.config import ModelConfig
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.objectives import autoregressive_loss
from igpt_ds.model.sampling import Decoder
from igpt_ds.model.store import fresh_model, load_model, load_without_blocks, save_model
from igpt_ds.model.transformer import Transformer
from igpt_ds.plan.costs import parameters, train_flops_per_token


@pytest.fixture
def tied(config: ModelConfig) -> Transformer:
    return fresh_model(replace(config, tied_embeddings=True), seed=0)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_one_matrix_counts_once(config: ModelConfig, objective: str) -> None:
    shape = replace(config, tied_embeddings=True)
    model = fresh_model(shape, seed=0, objective=objective)
    assert sum(weight.numel() for weight in model.parameters()) == parameters(shape, objective)
    assert parameters(config, objective) - parameters(shape, objective) == config.n_vocab * config.n_embd
    assert train_flops_per_token(shape) == train_flops_per_token(config)
    assert model.head.weight is model.wte.weight
    assert "head.weight" not in model.state_dict()
    assert Classifier(shape, 3, 2, objective=objective).head.weight.shape == (8, 16)


def test_logits_and_gradients_are_those_of_two_equal_matrices(
    config: ModelConfig, tied: Transformer, tokens: torch.Tensor
) -> None:
    two = Transformer(config)
    two.load_state_dict(tied.state_dict() | {"head.weight": tied.wte.weight.detach().clone()})
    losses = [autoregressive_loss(model(tokens), tokens) for model in (tied, two)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(tied.wte.weight.grad, two.wte.weight.grad + two.head.weight.grad)
    twin = copy.deepcopy(tied)
    assert twin.head.weight is twin.wte.weight is not tied.wte.weight


@torch.no_grad()
def test_a_model_dir_holds_the_matrix_once(tied: Transformer, tokens: torch.Tensor, tiny_dataset: Path, tmp_path: Path) -> None:
    info = {"config": tied.config, "objective": "ar", "palette_hash": "a", "step": 1, "images_seen": 1, "dropout": 0.1}
    save_model(tmp_path / "m", tied.state_dict(), info, tiny_dataset / "palette.npy")
    assert "head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    model, found = load_model(tmp_path / "m")
    assert (found.config, found.dropout, found.weight_decay) == (tied.config, 0.1, 0.0)
    assert torch.equal(model(tokens), tied(tokens))
    assert torch.equal(load_without_blocks(tmp_path / "m")[0].head.weight, tied.wte.weight)
    decoder = Decoder(model, len(tokens))
    torch.testing.assert_close(decoder.prefill(tokens[:, :5]), tied(tokens)[:, 5])


def test_the_heads_standard_deviation(config: ModelConfig) -> None:
    wide = ModelConfig(n_layer=1, n_head=2, n_embd=64, n_px=4, n_vocab=512)
    for shape, table in ((wide, "head"), (replace(wide, tied_embeddings=True), "wte")):
        for std in (0.05, 0.0):
            torch.manual_seed(0)
            weight = getattr(Transformer(shape, head_std=std), table).weight
            assert weight.std().item() == pytest.approx(std or (0.02 if table == "wte" else 0.0), rel=0.02)
    plain, drawn = fresh_model(config, seed=0).state_dict(), fresh_model(config, seed=0, head_std=0.1).state_dict()
    assert [name for name in plain if not torch.equal(plain[name], drawn[name])] == ["head.weight"]
    torch.manual_seed(0)
    assert Classifier(wide, 100, 1, head_std=0.05).class_head.weight.std().item() == pytest.approx(0.05, rel=0.05)
