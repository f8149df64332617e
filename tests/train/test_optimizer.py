"""Adam and its weight decay: which weights decay, by how much, and that nothing changes without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from igpt_ds.config import Finetune, Recipe, override
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.transformer import Transformer
from igpt_ds.train.engine import build_optimizer

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def test_without_decay_there_is_one_group_of_adam(recipe: Recipe) -> None:
    model = Transformer(recipe.model)
    optimizer = build_optimizer(model, recipe)
    assert type(optimizer) is torch.optim.Adam
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters()))]


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_alone_decay(recipe: Recipe, tied: bool) -> None:
    recipe = override(recipe, weight_decay=0.25, tied_embeddings=tied)
    model = Transformer(recipe.model, head_std=0.1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, recipe)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        matrix = name in ("wte.weight", "wpe", "head.weight") or ".attn." in name or ".mlp." in name
        assert torch.equal(weight, before[name] * (1 - 0.1 * 0.25) if matrix else before[name]), name


def test_a_sharded_weight_is_known_by_its_whole_shape(recipe: Recipe) -> None:
    """ZeRO-3 leaves an empty vector and `ds_shape`."""
    model = Transformer(recipe.model)
    for weight in model.parameters():
        weight.ds_shape = weight.shape  # type: ignore[attr-defined]
        weight.data = torch.empty(0)
    optimizer = build_optimizer(model, dataclasses.replace(recipe, weight_decay=0.01))
    vectors = [weight for name, weight in model.named_parameters() if "ln_" in name or name == "sos"]
    assert list(map(id, optimizer.param_groups[1]["params"])) == list(map(id, vectors))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_what_the_class_loss_does_not_read_keeps_its_weights(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, weight_decay=0.01, finetune=Finetune(3, 1, "", "clf"))
    model = Classifier(recipe.model, 3, 1)
    decaying = set(map(id, build_optimizer(model, recipe).param_groups[0]["params"]))
    names = {name for name, weight in model.named_parameters() if id(weight) in decaying}
    assert names == {"wte.weight", "wpe", "class_head.weight", *(f"blocks.0.{name}.weight" for name in MATRICES)}
