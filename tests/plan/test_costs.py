"""Counts against numbers worked out apart from them: a table of the paper's sizes, and DeepSpeed's own estimator."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.config import SIZES, ModelConfig, get_recipe
from igpt_ds.plan.costs import (
    CONTEXT,
    GIB,
    LIVE_PARAMETERS,
    RankLayout,
    checkpoint_bytes,
    exchanged_bytes,
    forward_flops_per_token,
    memory,
    parameters,
    train_flops_per_token,
    validation_batch,
    wire_bytes,
)

XL = get_recipe("igpt_xl_ar_64").model

# (size, n_px) -> parameters, GFLOPs a token to train: full attention and causal half, TFLOPs of an image's causal forward pass
TABLE = {
    ("s", 32): ("76.6M", "0.606", "0.530", "0.181"),
    ("s", 48): ("77.2M", "0.794", "0.624", "0.480"),
    ("s", 64): ("78.1M", "1.059", "0.757", "1.033"),
    ("m", 32): ("455.2M", "3.174", "2.948", "1.006"),
    ("m", 48): ("456.5M", "3.740", "3.231", "2.481"),
    ("m", 64): ("458.3M", "4.533", "3.627", "4.952"),
    ("l", 32): ("1.362B", "9.064", "8.611", "2.939"),
    ("l", 48): ("1.364B", "10.197", "9.178", "7.048"),
    ("l", 64): ("1.367B", "11.782", "9.970", "13.61"),
    ("xl", 32): ("6.801B", "43.04", "41.91", "14.31"),
    ("xl", 48): ("6.805B", "45.87", "43.33", "33.27"),
    ("xl", 64): ("6.811B", "49.84", "45.31", "61.86"),
}


def as_printed(value: float, like: str) -> str:
    """The value with as many digits behind the point."""
    return f"{value:.{len(like.partition('.')[2].rstrip('MB'))}f}"


@pytest.mark.parametrize(("size", "n_px"), TABLE)
def test_parameters_and_flops_are_those_of_the_table(size, n_px):
    config = ModelConfig(**SIZES[size], n_px=n_px)
    weights, full, causal, image = TABLE[size, n_px]
    assert as_printed(parameters(config) / (1e6 if weights[-1] == "M" else 1e9), weights) + weights[-1] == weights
    assert as_printed(train_flops_per_token(config) / 1e9, full) == full
    assert as_printed(train_flops_per_token(config, causal=True) / 1e9, causal) == causal
    assert as_printed(forward_flops_per_token(config, causal=True) * config.n_ctx / 1e12, image) == image


def test_xl_is_counted_exactly():
    assert parameters(XL) == 6_810_875_904
    assert parameters(XL, "bert") == parameters(XL) - XL.n_embd
    assert checkpoint_bytes(parameters(XL)) == 81_730_510_848
    assert checkpoint_bytes(10, stage=2, weight_bytes=4) == 160


# Bytes a parameter, and GiB of XL's on one GPU: fp32 accumulation, bf16 accumulation, and fp32 throughout.
@pytest.mark.parametrize(
    ("layout", "size", "gib"),
    [
        (RankLayout(1), 18, 114.2),
        (RankLayout(1, accumulation_bytes=2), 16, 101.5),
        (RankLayout(1, precision="fp32"), 20, 126.9),
    ],
)
def test_model_states_of_xl(layout, size, gib):
    one = memory(XL, layout)
    assert one.states == size * parameters(XL)
    assert one.states / GIB == pytest.approx(gib, abs=0.05)
    eight = memory(XL, dataclasses.replace(layout, world_size=8))
    assert eight.states * 8 == one.states


def test_what_each_stage_shards():
    P, N = parameters(XL), 64
    stages = {stage: memory(XL, RankLayout(N, stage=stage, accumulation_bytes=2)) for stage in (1, 2, 3)}
    assert [stages[stage].weights for stage in (1, 2, 3)] == [2 * P, 2 * P, 2 * P / N]
    assert [stages[stage].gradients for stage in (1, 2, 3)] == [2 * P, 2 * P / N, 2 * P / N]
    assert {held.optimizer for held in stages.values()} == {12 * P / N}
    assert memory(XL, RankLayout(N, hpz=8)).weights == 2 * P / N + 2 * P / 8
    away = memory(XL, RankLayout(N, offload_optimizer=True))
    assert (away.gradients, away.optimizer) == (0, 0)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (8, 8), (32, 8)])
def test_states_are_those_of_deepspeeds_estimator(nodes, gpus):
    """Which adds the largest layer gathered in fp32; ours gathers up to a billion weights in bf16, and counts that apart."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    largest = 4 * XL.n_embd**2
    _, estimated, gathered = estimate_zero3_model_states_mem_needs(parameters(XL), largest, gpus, nodes, cpu_offload=False)
    found = memory(XL, RankLayout(nodes * gpus))
    assert found.states + gathered == pytest.approx(estimated, rel=1e-6)
    assert found.workspace - CONTEXT < 2 * LIVE_PARAMETERS + 4 * 2e8 + 4 * 2e8 + 1


def test_activations_by_what_is_kept():
    token, logits = 2 * XL.n_embd * XL.n_ctx, 10 * XL.n_vocab * XL.n_ctx
    kept = [memory(XL, RankLayout(64, checkpointing=mode)).activations for mode in ("none", "selective", "full")]
    # 60 blocks, one of them complete while its gradients (10 C a token) are computed
    assert kept == [(60 * c + (16 - c) + 10) * token + logits for c in (16, 9, 1)]
    assert [size / GIB for size in kept] == pytest.approx([22.75, 13.07, 2.01], abs=0.02)
    assert memory(XL, RankLayout(64, micro_batch=2)).activations == 2 * memory(XL, RankLayout(64)).activations
    assert memory(XL, RankLayout(128, sequence_parallel=2)).activations == memory(XL, RankLayout(64)).activations / 2


def test_memory_decides_what_fits():
    needed = memory(XL, RankLayout(8))
    assert needed.fits(needed.total / 0.94)
    assert not needed.fits(needed.total)  # fragments need their share


def test_bytes_on_the_wire():
    P = parameters(XL)
    assert wire_bytes(XL, RankLayout(64)) / 1e9 == pytest.approx(40.9 * 63 / 64, abs=0.05)
    assert wire_bytes(XL, RankLayout(64, accumulation=4)) == 4 * wire_bytes(XL, RankLayout(64))
    assert wire_bytes(XL, RankLayout(64, stage=1)) == wire_bytes(XL, RankLayout(64, stage=1, accumulation=4)) == 4 * P * 63 / 64
    assert wire_bytes(XL, RankLayout(64, stage=2, accumulation=4)) == 10 * P * 63 / 64
    assert exchanged_bytes(XL, RankLayout(64)) == 0
    assert exchanged_bytes(XL, RankLayout(128, sequence_parallel=2)) == 8 * 2048 * 3072 * 2 * 60 / 2
    again = RankLayout(128, sequence_parallel=2, checkpointing="full")
    assert exchanged_bytes(XL, again) == 1.5 * exchanged_bytes(XL, RankLayout(128, sequence_parallel=2))


def test_a_validation_reads_more_at_once_and_holds_no_more_than_a_training_step():
    batches = {mode: validation_batch(XL, RankLayout(64, checkpointing=mode), 5000) for mode in ("none", "selective", "full")}
    assert batches == {"none": 8, "selective": 8, "full": 5}
    assert validation_batch(XL, RankLayout(8, micro_batch=2), 5000) == 16
    assert validation_batch(XL, RankLayout(8), 50) == 7  # ceil(50 / 8): all ranks read once
    assert validation_batch(XL, RankLayout(128, sequence_parallel=2), 5000) == 8
    assert validation_batch(dataclasses.replace(XL, n_layer=1), RankLayout(1), 5000) == 1


def test_one_rank_sends_nothing():
    assert wire_bytes(XL, RankLayout(1)) == 0


@given(
    world_size=st.sampled_from([1, 2, 8, 64]),
    micro_batch=st.integers(1, 8),
    stage=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(["none", "selective", "full"]),
)
def test_more_ranks_never_need_more_memory_each(world_size, micro_batch, stage, mode):
    few, many = (
        memory(XL, RankLayout(ranks, micro_batch, stage=stage, checkpointing=mode)) for ranks in (world_size, 2 * world_size)
    )
    assert many.states <= few.states
    assert many.activations == few.activations
