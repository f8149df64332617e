"""The arithmetic of a run, against numbers worked out apart from it."""

import pytest

from igpt_ds.config import CHECKPOINTING, SIZES, ModelConfig, get_recipe
from igpt_ds.plan import (
    GIB,
    describe,
    main,
    memory_per_rank,
    parameters,
    peak_flops,
    recommended_checkpointing,
    train_flops_per_token,
)

# (size, n_px) -> GFLOPs a token to train: full attention, causal half
GFLOPS = {("s", 32): (0.606, 0.530), ("m", 48): (3.740, 3.231), ("l", 48): (10.197, 9.178), ("xl", 64): (49.84, 45.31)}


@pytest.mark.parametrize(("size", "n_px"), GFLOPS)
def test_flops_per_token(size: str, n_px: int) -> None:
    config = ModelConfig(**SIZES[size], n_px=n_px)
    found = [train_flops_per_token(config, causal) / 1e9 for causal in (False, True)]
    assert found == pytest.approx(GFLOPS[size, n_px], rel=1e-3)


def test_memory_of_xl() -> None:
    """bf16 with fp32 accumulation takes 18 bytes a parameter, 114.2 GiB on one GPU; n ranks share them."""
    config = get_recipe("igpt_xl_ar_64").model
    one, eight = (memory_per_rank(config, n, 1, "bf16", "full") for n in (1, 8))
    assert (one.total - one.activations) / GIB == pytest.approx(114.2, abs=0.05)
    assert (eight.total - eight.activations) * 8 == pytest.approx(one.total - one.activations)
    assert memory_per_rank(config, 1, 1, "bf16", "none").activations > 10 * one.activations


def test_peak_of_a_gpu_by_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("a device nobody knows") is None


def test_the_plan_names_what_matters() -> None:
    recipe = get_recipe("igpt_xl_ar_64")
    text = describe(recipe, 8, 8, 1, "bf16", "full")
    assert f"{parameters(recipe.model):,}" in text
    assert "8 ranks x micro batch 8 x accumulation 1" in text


def test_the_mode_that_recomputes_least_is_recommended() -> None:
    """The first that fits: more memory never asks for more recomputation."""
    config = get_recipe("igpt_xl_ar_64").model
    assert recommended_checkpointing(config, 64, 1, "bf16") == "none"
    assert recommended_checkpointing(config, 8, 8, "bf16") == "full"
    assert recommended_checkpointing(config, 1, 1, "bf16") is None
    for mode in CHECKPOINTING:
        needed = memory_per_rank(config, 8, 4, "bf16", mode).total / 0.9
        assert recommended_checkpointing(config, 8, 4, "bf16", needed * 1.001) == mode
    assert "recommended     activation checkpointing none on a GPU of 80 GB (none " in describe(
        get_recipe("igpt_xl_ar_64"), 64, 1, 1, "bf16", "full"
    )


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--recipe", "igpt_s_ar_32", "--gpus", "8", "--micro_batch", "4"])
    assert "76,571,648" in capsys.readouterr().out
    with pytest.raises(ValueError, match="gpus=0 must be at least 1"):
        main(["--recipe", "igpt_s_ar_32", "--gpus", "0"])
    with pytest.raises(ValueError, match="gpu_memory=0 must be a positive number of GB"):
        main(["--recipe", "igpt_s_ar_32", "--gpus", "8", "--gpu_memory", "0"])
    with pytest.raises(ValueError, match="batch_images=128 does not divide into 48 ranks; nearest that does: 96 or 144"):
        main(["--recipe", "igpt_s_ar_32", "--gpus", "48"])
