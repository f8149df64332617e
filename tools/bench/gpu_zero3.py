"""The parts of tools/bench/gpu.py that build an engine of DeepSpeed. In: the session of a device. Out: rows.

Each runs in a process of its own, because the memory of a destroyed engine stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device import DeviceSession
from harness import BenchRow
from torch import Tensor

from igpt_ds.config import ModelConfig, get_recipe, override
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.model.objectives import autoregressive_loss
from igpt_ds.plan import costs
from igpt_ds.train.engine import build_engine, start_ranks, take_step
from igpt_ds.train.engine_protocol import Engine

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero3_bf16_full_checkpointing.json"


def host(session: DeviceSession) -> None:
    """The host's time of a ZeRO-3 step of XL's 60 blocks, whose tensors are tiny, beside what the plan gives the GPU for XL."""

    def measure() -> list[BenchRow]:
        config = ModelConfig(n_layer=2 if session.toy else 60, n_head=2, n_embd=32, n_px=4, n_vocab=16)
        engine, step, _ = _engine(session, config, 1)
        seconds = session.seconds(step, warm_up=4, times=10)
        engine.destroy()
        layout = costs.RankLayout(1, 4, checkpointing="full")
        planned = session.planned(session.config("xl", 64), layout)
        what = f"host time of a ZeRO-3 step, {config.n_layer} blocks, full checkpointing"
        peer, note = "XL's time on the GPU with 4 images in the plan", f"the plan assumes {1e3 * planned.host:.0f}"
        on_gpu = 1e3 * (planned.arithmetic + planned.update)
        return [BenchRow(what, "ms", 1e3 * seconds, on_gpu, peer, 1.0, at_most=True, note=note)]

    session.attempt("host time of a ZeRO-3 step", 60, measure)


def zero3(session: DeviceSession, B: int) -> None:
    """The whole XL under ZeRO-3 at world size 1: MFU, time and memory beside the plan's."""
    session.attempt(f"XL under ZeRO-3, {B} images", 120, partial(_whole, session, B))


def _whole(session: DeviceSession, B: int) -> list[BenchRow]:
    config = session.config("xl", 64)
    engine, step, layout = _engine(session, config, B)
    seconds = session.seconds(step, warm_up=2, times=6)
    what = f"XL under ZeRO-3, {layout.checkpointing} checkpointing, {B} images"
    row = replace(session.step_row(what, config, layout, seconds), bar=0.52)
    predicted = (costs.memory(config, layout).total - costs.CONTEXT) / costs.GIB  # torch does not count the context
    measured = torch.cuda.max_memory_allocated() / costs.GIB if session.device.type == "cuda" else 0.0
    engine.destroy()
    plan = "igpt_ds.plan"
    return [
        row,
        BenchRow(f"step of {what}", "s", seconds, session.planned(config, layout).seconds, plan),
        BenchRow(f"memory of {what}", "GiB", measured, predicted, plan),
    ]


def _engine(session: DeviceSession, config: ModelConfig, B: int) -> tuple[Engine, Callable[[], Tensor], costs.RankLayout]:
    """An engine with fp32 masters and full checkpointing, its training step, and its layout for the plan."""
    os.environ.setdefault("DS_ACCELERATOR", session.device.type)  # --toy is for the CPU
    device = start_ranks()
    run = join(override(get_recipe("igpt_xl_ar_64"), **asdict(config), batch_images=B), load_ds_config(DS_CONFIG), 1, B)
    engine = build_engine(run)
    tokens = torch.randint(config.n_vocab, (B, config.n_ctx), device=device)

    def loss(network: Any, batch: Batch) -> Tensor:
        return autoregressive_loss(network(batch.tokens), batch.tokens)

    layout = costs.RankLayout(1, B, precision=run.precision, checkpointing=run.activation_checkpointing)
    return engine, lambda: take_step(engine, [Batch(tokens, tokens[:, 0], 0)], loss, 1e-5), layout


PARTS: dict[str, Callable[[DeviceSession], None]] = {
    "host": host,
    "zero3_4": partial(zero3, B=4),
    "zero3_8": partial(zero3, B=8),
}
