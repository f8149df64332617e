"""Recipes hold the paper's numbers, a ds_config holds nothing of theirs, and joining them is exact."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.config import RECIPES, SIZES, ModelConfig, get_recipe, override, recipe_from_dict, recipe_to_dict
from igpt_ds.ds_config import batch_layout, join, load_ds_config, run_to_dict

S_32 = RECIPES["igpt_s_ar_32"]


def write(path, value):
    path.write_text(json.dumps(value))
    return path


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


def test_n_ctx_is_one_token_a_pixel():
    assert ModelConfig(**SIZES["s"], n_px=48).n_ctx == 2304


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_layer": 0}, r"^n_layer=0 must be a whole number of at least 1$"),
        ({"n_px": 3.5}, r"^n_px=3\.5 must be a whole number"),
        ({"n_head": 3, "n_embd": 16}, r"^n_embd=16 is not a multiple of n_head=3$"),
        ({"n_vocab": 65537}, r"^n_vocab=65537 does not fit the shards' 16-bit tokens; at most 65536$"),
        ({"batch_images": 0}, r"^batch_images=0 must be a whole number of at least 1$"),
        ({"batch_images": 1.5}, r"^batch_images=1\.5 must be a whole number of at least 1$"),
        ({"steps": -1}, r"^steps=-1 must be a whole number of at least 1$"),
        ({"steps": 100, "warmup_steps": 101}, r"^warmup_steps=101 must lie between 0 and steps=100$"),
        ({"lr": 0.0}, r"^lr=0\.0 must be a positive number$"),
        ({"lr": float("inf")}, r"^lr=inf must be a positive number$"),
        ({"lr": float("nan")}, r"^lr=nan must be a positive number$"),
        ({"eps": -1e-8}, r"^eps=-1e-08 must be a positive number$"),
        ({"clip": -1.0}, r"^clip=-1\.0 must not be negative \(0 turns clipping off\)$"),
        ({"augment_pad": 32}, r"^augment_pad=32 must lie between 0 and n_px - 1 = 31$"),
        ({"betas": (0.9, 1.0)}, r"^betas=\(0\.9, 1\.0\) must be two numbers in \[0, 1\)$"),
        ({"betas": (0.9,)}, r"^betas=\(0\.9,\) must be two numbers in \[0, 1\)$"),
        ({"objective": "bart"}, r"^objective='bart' is unknown; known: ar, bert$"),
        ({"init": "xavier"}, r"^init='xavier' is unknown; known: released, sparse_transformer$"),
        ({"mask_prob": 0.0}, r"^mask_prob=0\.0 must lie between 0 and 1; the paper takes 0\.15$"),
        ({"mask_prob": 1.0}, r"^mask_prob=1\.0 must lie between 0 and 1"),
        ({"mask_prob": float("nan")}, r"^mask_prob=nan must lie between 0 and 1"),
        ({"mask_prob": 0.2}, r"^mask_prob=0\.2 means nothing to igpt_s_ar_32: its objective is ar$"),
        ({"lrr": 1}, r"^recipe has no 'lrr'; it has batch_images, .*, lr, .*, n_layer, "),
    ],
)
def test_override_refuses(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        override(S_32, changes)


def test_override_reaches_knobs_and_shape_and_changes_nothing_else():
    changed = override(S_32, {"lr": 0.01, "n_layer": 2})
    assert (changed.lr, changed.model.n_layer) == (0.01, 2)
    assert override(changed, {"lr": S_32.lr, "n_layer": 24}) == S_32
    assert override(RECIPES["igpt_s_bert_32"], {"mask_prob": 0.2}).mask_prob == 0.2


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^recipe 'igpt_s' is unknown; known: .*, igpt_s_ar_32, .*igpt_l_bert_32$"):
        get_recipe("igpt_s")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_recipe_survives_json(recipe):
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe))), "run.json") == recipe


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda values: values.pop("model"), r"^run\.json is not a recipe: 'model'$"),
        (lambda values: values.update(lrr=1), r"^run\.json is not a recipe: .*'lrr'$"),
        (lambda values: values.update(lr="fast"), r"^run\.json is not a recipe: "),
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


# ------------------------------------------------------------------------------------------------- ds_config


def test_a_good_ds_config_is_returned_as_it_is(tmp_path):
    values = {"zero_optimization": {"stage": 3}, "igpt_ds": {"activation_checkpointing": "full"}, "bf16": {"enabled": True}}
    assert load_ds_config(write(tmp_path / "a.json", values)) == values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([], r"a\.json must hold one JSON object$"),
        ({"train_batch_size": 8}, r"a\.json: 'train_batch_size' is set by the recipe as batch_images; remove it here$"),
        ({"gradient_clipping": 1.0}, r"'gradient_clipping' is set by the recipe as clip; "),
        ({"gradient_accumulation_steps": 2}, r"'gradient_accumulation_steps' is set by the recipe as batch_images \(the accum"),
        ({"optimizer": {"type": "Adam"}}, r"'optimizer' is set by the recipe as lr, betas and eps; "),
        ({"scheduler": {}}, r"'scheduler' is set by the recipe as lr, warmup_steps and steps; "),
        ({"gradient_cliping": 1.0}, r"a\.json: unknown key 'gradient_cliping'; known: igpt_ds, activation_checkpointing, "),
        ({"igpt_ds": {"checkpointing": "full"}}, r"a\.json: unknown key 'checkpointing' in 'igpt_ds'; known: activation_ch"),
        (
            {"igpt_ds": {"activation_checkpointing": "half"}},
            r"activation_checkpointing='half' is unknown; known: none, selective, full$",
        ),
        ({"zero_optimization": {"stage": 2}}, r"a\.json: zero_optimization\.stage=2; this project trains and consolidates st"),
        ({}, r"zero_optimization\.stage=None; "),
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, r"a\.json: fp16 is not supported; use bf16 or neither$"),
        ({"zero_optimization": 3}, r"a\.json: 'zero_optimization' must be an object, not 3$"),
        ({"igpt_ds": "full"}, r"a\.json: 'igpt_ds' must be an object, not 'full'$"),
        ({"bf16": True}, r"a\.json: 'bf16' must be an object, not True$"),
        (
            {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"},
            r"a\.json: train_micro_batch_size_per_gpu='auto' must be a whole number of at least 1$",
        ),
    ],
)
def test_a_bad_ds_config_is_refused_by_name(tmp_path, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_ds_config(write(tmp_path / "a.json", values))


# ------------------------------------------------------------------------------------------------------ join


@given(micro_batch=st.integers(1, 64), accumulation=st.integers(1, 64), world_size=st.integers(1, 512))
def test_batch_layout_multiplies_out(micro_batch, accumulation, world_size):
    batch_images = micro_batch * accumulation * world_size
    assert batch_layout(batch_images, micro_batch, world_size) == (micro_batch, accumulation)
    assert batch_layout(batch_images, None, world_size) == (micro_batch * accumulation, 1)


@given(batch_images=st.integers(1, 10_000), micro_batch=st.integers(1, 64), world_size=st.integers(1, 512))
def test_the_batches_named_as_nearest_do_divide(batch_images, micro_batch, world_size):
    try:
        found, accumulation = batch_layout(batch_images, micro_batch, world_size)
        assert found * accumulation * world_size == batch_images
    except ValueError as error:
        named = [int(word) for word in str(error).partition("nearest that does: ")[2].split(" or ")]
        assert named
        for batch in named:
            batch_layout(batch, micro_batch, world_size)
            assert 0 < abs(batch - batch_images) < micro_batch * world_size


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match=r"^batch_images=130 does not divide into 8 ranks x micro batch 4; .*: 128 or 160$"):
        batch_layout(130, 4, 8)
    with pytest.raises(ValueError, match=r"^batch_images=3 does not divide into 8 ranks; nearest that does: 8$"):
        batch_layout(3, None, 8)


@pytest.mark.parametrize("micro_batch", [0, -4])
def test_a_micro_batch_below_one_is_refused(micro_batch):
    with pytest.raises(ValueError, match=rf"^micro_batch={micro_batch} must be at least 1$"):
        batch_layout(128, micro_batch, 8)


def test_join_writes_what_the_recipe_owns_and_keeps_the_rest():
    ds_config = {"zero_optimization": {"stage": 3}, "igpt_ds": {"activation_checkpointing": "full"}, "bf16": {"enabled": True}}
    run = join(S_32, ds_config, world_size=4, micro_batch=8)
    assert run.ds_config == {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
    }
    assert (run.micro_batch, run.accumulation, run.activation_checkpointing, run.precision) == (8, 4, "full", "bf16")
    assert "train_batch_size" not in ds_config


def test_join_takes_the_micro_batch_of_the_flag_then_of_the_ds_config_then_the_whole_share():
    ds_config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}
    assert join(S_32, ds_config, 4, micro_batch=16).micro_batch == 16
    assert join(S_32, ds_config, 4).micro_batch == 2
    run = join(S_32, {"zero_optimization": {"stage": 3}}, 4)
    assert (run.micro_batch, run.accumulation, run.precision, run.activation_checkpointing) == (32, 1, "fp32", "none")


def test_a_run_is_printable_and_its_recipe_can_be_given_back():
    run = join(S_32, {"zero_optimization": {"stage": 3}}, 4)
    printed = json.loads(json.dumps(run_to_dict(run)))
    assert recipe_from_dict(printed["recipe"], "run.json") == S_32
    assert printed["world_size"] == 4


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        S_32.lr = 1.0
