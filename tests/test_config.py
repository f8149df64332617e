"""Recipes hold the paper's numbers, and can be changed, printed and read back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from igpt_ds.config import RECIPES, SIZES, ModelConfig, get_recipe, override, recipe_from_dict, recipe_to_dict, with_warmup_epochs

S_32 = RECIPES["igpt_s_ar_32"]


# ------------------------------------------------------------------------------------------ sizes and recipes


def test_sizes_are_the_papers():
    assert {name: (size["n_layer"], size["n_embd"]) for name, size in SIZES.items() if name != "nano"} == {
        "s": (24, 512),
        "m": (36, 1024),
        "l": (48, 1536),
        "xl": (60, 3072),
    }
    assert [SIZES[name]["n_head"] for name in ("s", "m", "l", "xl")] == [8, 8, 16, 24]


def test_recipes_are_the_papers():
    table = {
        name: (recipe.objective, recipe.model.n_px, recipe.lr, recipe.batch_images, recipe.steps, recipe.betas)
        for name, recipe in RECIPES.items()
        if name.startswith("igpt_")
    }
    adam = (0.9, 0.95)
    assert table == {
        "igpt_s_ar_32": ("ar", 32, 0.003, 128, 1_000_000, adam),
        "igpt_m_ar_32": ("ar", 32, 0.003, 128, 1_000_000, adam),
        "igpt_l_ar_32": ("ar", 32, 0.001, 128, 1_000_000, adam),
        "igpt_l_ar_48": ("ar", 48, 0.01, 128, 1_000_000, adam),
        "igpt_xl_ar_64": ("ar", 64, 0.0003, 64, 2_000_000, adam),
        "igpt_s_bert_32": ("bert", 32, 0.01, 128, 1_000_000, adam),
        "igpt_m_bert_32": ("bert", 32, 0.003, 128, 1_000_000, adam),
        "igpt_l_bert_32": ("bert", 32, 0.001, 128, 1_000_000, adam),
    }
    for name, recipe in RECIPES.items():
        if name.startswith("igpt_"):
            assert recipe.model == ModelConfig(**SIZES[name.split("_")[1]], n_px=recipe.model.n_px)
            assert (recipe.mask_prob, recipe.init) == (0.15, "released")
    assert S_32.warmup_steps == 9609  # 1,281,167 x 0.96 = 1,229,920 images in batches of 128: one epoch, rounded up
    assert RECIPES["igpt_xl_ar_64"].warmup_steps == 19218


def test_warm_up_of_an_epoch_is_counted_in_batches_of_the_images_there_are():
    assert with_warmup_epochs(S_32, 1, 1_229_920).warmup_steps == S_32.warmup_steps
    assert with_warmup_epochs(S_32, 1, 128 * 7 + 1) == dataclasses.replace(S_32, warmup_steps=8)
    assert with_warmup_epochs(S_32, 0.5, 1280).warmup_steps == 5
    assert with_warmup_epochs(S_32, 0, 1280).warmup_steps == 0


@pytest.mark.parametrize(
    ("epochs", "complaint"),
    [
        (-1, r"^warmup_epochs=-1 must be a number of at least 0$"),
        (float("nan"), r"^warmup_epochs=nan must be a number of at least 0$"),
        (2, r"^warmup_epochs=2 of 128000000 images are 2000000 steps, more than steps=1000000$"),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(epochs, complaint):
    with pytest.raises(ValueError, match=complaint):
        with_warmup_epochs(S_32, epochs, 128_000_000)


def test_n_ctx_is_one_token_a_pixel():
    assert ModelConfig(**SIZES["s"], n_px=48).n_ctx == 2304


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_layer": 0}, r"^n_layer=0 must be a whole number of at least 1$"),
        ({"n_px": 3.5}, r"^n_px=3\.5 must be a whole number"),
        ({"n_head": 3, "n_embd": 16}, r"^n_embd=16 is not a multiple of n_head=3$"),
        ({"n_vocab": 65537}, r"^n_vocab=65537 does not fit the shards' 16-bit tokens; at most 65536$"),
        ({"n_layer": 65537}, r"^n_layer=65537 is too large; at most 65536$"),
        ({"batch_images": 0}, r"^batch_images=0 must be a whole number of at least 1$"),
        ({"batch_images": 1.5}, r"^batch_images=1\.5 must be a whole number of at least 1$"),
        ({"steps": -1}, r"^steps=-1 must be a whole number of at least 1$"),
        ({"steps": 100, "warmup_steps": 101}, r"^warmup_steps=101 must lie between 0 and steps=100$"),
        ({"lr": 0.0}, r"^lr=0\.0 must be a positive number$"),
        ({"lr": float("inf")}, r"^lr=inf must be a positive number$"),
        ({"lr": float("nan")}, r"^lr=nan must be a positive number$"),
        ({"eps": -1e-8}, r"^eps=-1e-08 must be a positive number$"),
        ({"clip": -1.0}, r"^clip=-1\.0 must be a number that is not negative \(0 turns clipping off\)$"),
        ({"clip": math.nan}, r"^clip=nan must be a number that is not negative"),
        ({"clip": math.inf}, r"^clip=inf must be a number that is not negative"),
        ({"dropout": 1.0}, r"^dropout=1\.0 must be at least 0 and below 1"),
        ({"dropout": math.nan}, r"^dropout=nan must be at least 0"),
        ({"weight_decay": -0.1}, r"^weight_decay=-0\.1 must be a number that is not negative"),
        ({"head_std": math.inf}, r"^head_std=inf must be a number that is not negative"),
        ({"tied_embeddings": 1}, r"^tied_embeddings=1 must be true or false$"),
        ({"augment_pad": 32}, r"^augment_pad=32 must lie between 0 and n_px - 1 = 31$"),
        ({"betas": (0.9, 1.0)}, r"^betas=\(0\.9, 1\.0\) must be two numbers in \[0, 1\)$"),
        ({"betas": (0.9,)}, r"^betas=\(0\.9,\) must be two numbers in \[0, 1\)$"),
        ({"objective": "bart"}, r"^objective='bart' is unknown; known: ar, bert$"),
        ({"init": "xavier"}, r"^init='xavier' is unknown; known: released, sparse_transformer$"),
        ({"mask_prob": 0.0}, r"^mask_prob=0\.0 must lie between 0 and 1; the paper takes 0\.15$"),
        ({"mask_prob": 1.0}, r"^mask_prob=1\.0 must lie between 0 and 1"),
        ({"mask_prob": float("nan")}, r"^mask_prob=nan must lie between 0 and 1"),
        ({"mask_prob": 0.2}, r"^mask_prob=0\.2 has no effect on igpt_s_ar_32: its objective is ar$"),
        ({"lrr": 1}, r"^recipe has no 'lrr'; it has batch_images, .*, lr, .*, n_layer, "),
    ],
)
def test_override_refuses(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        override(S_32, **changes)


def test_override_reaches_knobs_and_shape_and_changes_nothing_else():
    changed = override(S_32, lr=0.01, n_layer=2)
    assert (changed.lr, changed.model.n_layer) == (0.01, 2)
    assert override(changed, lr=S_32.lr, n_layer=24) == S_32
    assert override(RECIPES["igpt_s_bert_32"], mask_prob=0.2).mask_prob == 0.2


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"^recipe 'igpt_s' is unknown; did you mean igpt_s_ar_32 or igpt_s_bert_32\? known: .*_32$",
    ):
        get_recipe("igpt_s")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_recipe_survives_json(recipe):
    assert "tied_embeddings" not in recipe_to_dict(recipe)["model"]  # as older code wrote it
    for one in (recipe, override(recipe, dropout=0.1, weight_decay=0.01, head_std=0.02, tied_embeddings=True)):
        assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(one))), "run.json") == one


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda values: values.pop("model"), r"^run\.json is not a recipe: 'model'$"),
        (lambda values: values.update(lrr=1), r"^run\.json is not a recipe: .*'lrr'"),
        (lambda values: values.update(lr="fast"), r"^run\.json is not a recipe: "),
        (lambda values: values.update(lr=10**400), r"^run\.json is not a recipe: "),
        (lambda values: values["model"].update(n_layer=json.loads("[" * 900 + "]" * 900)), r"^run\.json"),
        (lambda values: values["model"].pop("n_embd"), r"^run\.json is not a recipe: .*'n_embd'$"),
        (lambda values: values.update(steps=0), r"^run\.json: steps=0 must be a whole number of at least 1$"),
    ],
)
def test_a_damaged_recipe_names_its_file(damage, complaint):
    values = recipe_to_dict(S_32)
    values["model"] = dict(values["model"])
    damage(values)
    with pytest.raises(ValueError, match=complaint):
        recipe_from_dict(values, "run.json")


def test_a_recipe_written_by_older_code_has_what_it_did_not_know():
    values = recipe_to_dict(S_32)
    del values["mask_prob"], values["init"]
    assert recipe_from_dict(values, "run.json") == S_32


def test_what_is_no_dict_is_no_recipe():
    with pytest.raises(ValueError, match=r"^run\.json is not a recipe: "):
        recipe_from_dict([1], "run.json")


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        S_32.lr = 1.0
