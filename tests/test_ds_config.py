"""A ds_config holds nothing of a recipe's, and joining the two is exact."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.config import RECIPES, Finetune, override, recipe_from_dict
from igpt_ds.ds_config import batch_layout, join, load_ds_config, run_to_dict
from igpt_ds.leaf_modules import BLOCK
from igpt_ds.model.transformer import Block, Transformer

S_32 = RECIPES["igpt_s_ar_32"]
XL_64 = RECIPES["igpt_xl_ar_64"]


def write(path, value):
    path.write_text(json.dumps(value))
    return path


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
        ({"gradient_cliping": 1.0}, r"a\.json: unknown key 'gradient_cliping'.*; known: igpt_ds, bf16, "),
        ({"igpt_ds": {"checkpointing": "full"}}, r"a\.json: unknown key 'igpt_ds\.checkpointing' \(did you mean 'activation_c"),
        (
            {"igpt_ds": {"activation_checkpointing": "half"}},
            r"activation_checkpointing='half' is unknown; known: none, selective, full$",
        ),
        ({"zero_optimization": {"stage": 0}}, r"a\.json: zero_optimization\.stage=0 must be 1, 2 or 3$"),
        ({"zero_optimization": {"stage": True}}, r"a\.json: zero_optimization\.stage=True must be 1, 2 or 3$"),
        ({}, r"zero_optimization\.stage=None must be 1, 2 or 3$"),
        (
            {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
            r"a\.json: fp16 and bf16 are both enabled; choose one$",
        ),
        ({"igpt_ds": {"sequence_parallel": 0}}, r"a\.json: sequence_parallel=0 must be a whole number of at least 1$"),
        ({"igpt_ds": {"sequence_parallel": True}}, r"a\.json: sequence_parallel=True must be a whole number"),
        ({"igpt_ds": {"sequence_parallel": "2"}}, r"a\.json: sequence_parallel='2' must be a whole number"),
        ({"zero_optimisation": {}}, r"unknown key 'zero_optimisation' \(did you mean 'zero_optimization'\?\); known: igpt_ds, "),
        (
            {"elasticity": {}},
            r"a\.json: DeepSpeed 0\.19 has no 'elasticity' any more; --resume auto continues on any number of ranks",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
            r"no 'zero_optimization\.mics_shard_size' any more; use zero_optimization\.zero_hpz_partition_size$",
        ),
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
        "zero_optimization": {"stage": 3, "leaf_module": {"classes": [BLOCK]}},
        "bf16": {"enabled": True},
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
    }
    assert (run.micro_batch, run.accumulation, run.activation_checkpointing, run.precision) == (8, 4, "full", "bf16")
    assert (run.sequence_parallel, run.stage) == (1, 3)
    assert "train_batch_size" not in ds_config


@pytest.mark.parametrize(
    ("zero", "layer", "leaves"),
    [
        ({"stage": 2}, None, None),
        ({"stage": 3, "leaf_module": {"classes": []}}, None, {"classes": []}),  # a ds_config may switch them off
        ({"stage": 3}, 3, {"classes": [BLOCK]}),
        ({"stage": 3}, 1, {"classes": [], "names": ["blocks.0", "blocks.2"]}),  # the head reads a norm of block 1 outside it
    ],
)
def test_blocks_are_leaf_modules_of_zero_3(zero, layer, leaves):
    model = replace(S_32.model, n_layer=3)
    finetune = None if layer is None else Finetune(n_classes=3, layer=layer, start="")
    run = join(replace(S_32, model=model, finetune=finetune), {"zero_optimization": zero}, 4)
    assert run.ds_config["zero_optimization"].get("leaf_module") == leaves


def test_the_leaf_modules_are_what_the_network_calls_them():
    assert f"{Block.__module__}.{Block.__qualname__}" == BLOCK
    with torch.device("meta"):
        assert isinstance(dict(Transformer(S_32.model).named_modules())["blocks.0"], Block)


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


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"checkpoint": {"load_universal": True}}, r"checkpoint\.load_universal=True breaks --resume auto: "),
        ({"prescale_gradients": True}, r"prescale_gradients=True fails at ZeRO stage 3 and changes nothing at the others"),
        ({"activation_checkpointing": {}}, r"activation_checkpointing=\{\} has no effect here: igpt_ds\.activation_check"),
        ({"data_types": {"grad_accum_dtype": "fp33"}}, r"data_types\.grad_accum_dtype='fp33' must be fp32, bf16 or fp16$"),
        ({"communication_data_type": "fp64"}, r": communication_data_type='fp64' must be fp32, bf16 or fp16$"),
        ({"seq_parallel_communication_data_type": 1}, r"seq_parallel_communication_data_type=1 must be fp32, bf16 or fp16$"),
        *(
            (
                {"zero_optimization": {"stage": 3, "sub_group_size": size}},
                rf"sub_group_size={size!r} must be a whole number of at ",
            )
            for size in (0, -1, 1e9, "1", True)
        ),
    ],
)
def test_what_deepspeed_takes_and_a_run_does_not_survive_is_refused(tmp_path, values, complaint):
    path = write(tmp_path / "a.json", {"zero_optimization": {"stage": 3}} | values)
    with pytest.raises(ValueError, match=complaint) as error:
        load_ds_config(path)
    assert str(error.value).startswith(f"ds_config {path}: ")


def test_the_harmless_values_of_harmful_keys_are_accepted(tmp_path):
    values = {"checkpoint": {"load_universal": False}, "prescale_gradients": False, "data_types": {"grad_accum_dtype": None}}
    values |= {"communication_data_type": "bf16", "zero_optimization": {"stage": 3, "sub_group_size": 1}}
    assert load_ds_config(write(tmp_path / "a.json", values)) == values


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_and_precision_are_the_ds_configs(tmp_path, stage, precision):
    values = {"zero_optimization": {"stage": stage}} | ({} if precision == "fp32" else {precision: {"enabled": True}})
    run = join(S_32, load_ds_config(write(tmp_path / "a.json", values)), 4)
    assert (run.stage, run.precision) == (stage, precision)


def test_ranks_that_share_an_image_count_once_in_the_batch():
    run = join(XL_64, {"zero_optimization": {"stage": 3}, "igpt_ds": {"sequence_parallel": 4}}, world_size=256)
    assert (run.micro_batch, run.accumulation, run.sequence_parallel) == (1, 1, 4)
    # DeepSpeed's own arithmetic holds, in which every rank takes its own images.
    assert run.ds_config["train_batch_size"] == 1 * 1 * 256 == XL_64.batch_images * 4


@pytest.mark.parametrize(
    ("world_size", "parts", "changes", "complaint"),
    [
        (6, 4, {}, r"^sequence_parallel=4 does not divide ranks=6; here it may be 1, 2, 3, 6$"),
        (10, 5, {}, r"^sequence_parallel=5 does not divide n_head=24; here it may be 1, 2$"),
        (32, 16, {"n_head": 16, "n_px": 6}, r"=16 leaves a rank none of n_ctx=36 tokens; here it may be 1, 2, 4, 8$"),
    ],
)
def test_sequence_parallelism_that_does_not_divide_is_refused(world_size, parts, changes, complaint):
    ds_config = {"zero_optimization": {"stage": 3}, "igpt_ds": {"sequence_parallel": parts}}
    with pytest.raises(ValueError, match=complaint):
        join(override(XL_64, **changes), ds_config, world_size)


@given(world_size=st.integers(1, 256), parts=st.integers(1, 32), micro_batch=st.none() | st.integers(1, 8))
def test_what_is_joined_multiplies_out(world_size, parts, micro_batch):
    ds_config = {"zero_optimization": {"stage": 3}, "igpt_ds": {"sequence_parallel": parts}}
    try:
        run = join(XL_64, ds_config, world_size, micro_batch)
    except ValueError:
        divides = math.gcd(world_size, 24) % parts == 0
        assert not divides or 64 % (world_size // parts * (micro_batch or 1))
        return
    assert run.micro_batch * run.accumulation * (world_size // parts) == 64
