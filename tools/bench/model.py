"""Measures the model beside its peers on one core in fp32, as medians of turns. Exit status: 1 if a bar is missed.

HF is Hugging Face's ImageGPT with our weights. --quick takes about three minutes; --toy runs everything in seconds, without bars.

    python tools/bench/model.py --quick --out bench_model.json
    python tools/bench/model.py --show docs/bench_model.json
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import BenchRow, medians

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import CHECKPOINTING, ModelConfig

with lazy.imports():
    import torch
    from plain import Plain
    from torch import Tensor

    from igpt_ds.model.interchange.hf import write_hf
    from igpt_ds.model.objectives import autoregressive_loss
    from igpt_ds.model.sampling import sample
    from igpt_ds.model.transformer import Transformer


PACKAGES = ("torch", "transformers")
HF = "HF ImageGPT"
Step = Callable[..., Any]  # step(n) reads only the first n pixels


@dataclass(frozen=True)
class World:
    """The number of turns and the sizes."""

    quick: bool
    toy: bool

    @property
    def turns(self) -> int:
        """The number of turns of each contender."""
        return 1 if self.toy else 5 if self.quick else 15

    def config(self, n_layer: int, n_px: int) -> ModelConfig:
        """iGPT-S's width and heads with fewer layers; for --toy a 16th of the width and an 8th of the side."""
        if self.toy:
            return ModelConfig(n_layer=n_layer, n_head=2, n_embd=32, n_px=max(4, n_px // 8), n_vocab=16)
        return ModelConfig(n_layer=n_layer, n_head=8, n_embd=512, n_px=n_px)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen measurements, prints the table, writes the JSON."""
    measures = {function.__name__: function for function in (step, long_step, checkpointing, sampling, features)}
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "fewer turns", measures)
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory of the measured processes returns to the system at once
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the start and stop messages of the profiler
    with harness.one_core():
        rows = [row for name in args.only or measures for row in measures[name](World(args.quick, args.toy))]
    harness.finish([replace(row, bar=None) for row in rows] if args.toy else rows, args.out, args.quick, PACKAGES)


# --------------------------------------------------------------------------------------------------- contenders


def our_model(config: ModelConfig, mode: str = "none") -> Transformer:
    """Our model with weights of one seed. The output matrix is random, because zeros would make every gradient zero."""
    torch.manual_seed(0)
    model = Transformer(config, activation_checkpointing=mode)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def hf_model(config: ModelConfig) -> Any:
    """Hugging Face's ImageGPT with the same weights and without dropout, made by our export."""
    from transformers import ImageGPTForCausalImageModeling
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        colors = np.random.default_rng(0).uniform(-1, 1, (config.n_vocab, 3)).astype(np.float32)
        write_hf(Path(directory) / "hf", config, dict(our_model(config).state_dict()), colors)
        return ImageGPTForCausalImageModeling.from_pretrained(
            Path(directory) / "hf", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )


def _some_tokens(config: ModelConfig, B: int) -> Tensor:
    return torch.randint(config.n_vocab, (B, config.n_ctx), generator=torch.Generator().manual_seed(1))


def train_step(kind: str, config: ModelConfig) -> Step:
    """One training step of a contender on one image: forward, loss, backward, Adam. It reads the first n pixels."""
    if kind == HF:
        model = hf_model(config).train()
    else:
        model = (Plain(config, kind == "plain") if kind in ("nanoGPT", "plain") else our_model(config, kind)).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    tokens = _some_tokens(config, 1)

    def run(n: int | None = None) -> float:
        x = tokens[:, :n]
        logits = model(input_ids=shifted(x, config.n_vocab), use_cache=False).logits if kind == HF else model(x)
        loss = autoregressive_loss(logits, x)
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=False)  # keeps the memory of the gradients between steps
        return float(loss.detach())

    return run


def shifted(tokens: Tensor, n_vocab: int) -> Tensor:
    """The input of HF for tokens [B, T]: [sos, x_0 .. x_{T-2}], with sos as the token n_vocab."""
    return torch.cat([torch.full((len(tokens), 1), n_vocab), tokens[:, :-1]], dim=1)


def pooling(kind: str, config: ModelConfig, B: int) -> Step:
    """Averages over the positions of all layers: ours as tools/extract_features.py, normed and raw; HF's raw."""
    model: Any = (hf_model if kind == HF else our_model)(config).eval()
    tokens = _some_tokens(config, B)

    @torch.inference_mode()
    def run(n: int | None = None) -> list[np.ndarray]:
        if kind == HF:
            inputs = shifted(tokens[:, :n], config.n_vocab)
            states = model.transformer(input_ids=inputs, use_cache=False, output_hidden_states=True).hidden_states
            return [h.mean(1).numpy() for h in states]
        pooled = ([a.mean(1, dtype=torch.float32).numpy() for a in pair] for pair in model.residuals(tokens[:, :n]))
        return [raw for raw, _ in pooled]

    return run


# --------------------------------------------------------------------------------------------------- memory


def peak_bytes(make: Callable[..., Step], *args: Any) -> float:
    """The peak memory of the second call of make(*args)() beyond the memory before it, in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (make, args))


def _peak_bytes(make: Callable[..., Step], args: tuple[Any, ...]) -> float:
    torch.set_num_threads(1)
    run = make(*args)
    run(8)  # a few pixels: allocates gradients, Adam's moments and the buffers of the libraries
    return harness.peak_beyond(run)


def kept_bytes(mode: str, config: ModelConfig) -> float:
    """The bytes that a forward pass keeps for the backward pass, without the weights.

    The allocator is asked: hooks on saved tensors do not see what a checkpoint keeps.
    """
    model, tokens = our_model(config, mode), _some_tokens(config, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = autoregressive_loss(model(tokens), tokens)
    loss.backward()  # the activations exist until here
    return float(sum(event.self_cpu_memory_usage for event in profiled.key_averages()))


# --------------------------------------------------------------------------------------------------- measurements


def step(world: World) -> list[BenchRow]:
    """A training step at iGPT-S's width and length, with 4 of its 24 layers."""
    config = world.config(4, 32)
    seconds = medians(_equal_steps(config, "nanoGPT", "plain"), world.turns, turn_seconds=0)
    what = f"training step, L={config.n_layer} d={config.n_embd} T={config.n_ctx}"
    peers = ((HF, HF, 1.6), ("nanoGPT", "plain nanoGPT model", 1.05), ("plain", "plain torch, our norm and GELU", None))
    return [BenchRow(what, "steps/s", 1 / seconds["none"], 1 / seconds[kind], name, bar) for kind, name, bar in peers]


def _equal_steps(config: ModelConfig, *others: str) -> dict[str, Step]:
    steps = {kind: train_step(kind, config) for kind in ("none", HF, *others)}
    assert abs(steps["none"]() / steps[HF]() - 1) < 1e-4, "the losses differ"
    return steps


def long_step(world: World) -> list[BenchRow]:
    """A training step of one layer on a 64x64 image: time, and memory beyond weights, gradients and moments."""
    config = world.config(1, 64)
    seconds = medians(_equal_steps(config), max(1, world.turns // 2), turn_seconds=0)
    mib = {kind: peak_bytes(train_step, kind, config) / 2**20 for kind in ("none", HF)}
    what = f"L={config.n_layer} d={config.n_embd} T={config.n_ctx}"
    return [
        BenchRow(f"training step, {what}", "steps/s", 1 / seconds["none"], 1 / seconds[HF], HF, 2.5),
        BenchRow(f"memory of a training step, {what}", "MiB", mib["none"], mib[HF], HF, 0.4, at_most=True),
    ]


def checkpointing(world: World) -> list[BenchRow]:
    """The time and the memory of recomputing activations."""
    config = world.config(4, 32)
    seconds = medians({mode: train_step(mode, config) for mode in CHECKPOINTING}, world.turns, turn_seconds=0)
    mib, rows = {mode: kept_bytes(mode, config) / 2**20 for mode in CHECKPOINTING}, []
    for mode, time_bar, byte_bar in (("selective", 1.12, 0.6), ("full", 1.34, None)):
        name = f"{mode} activation checkpointing"
        rows.append(BenchRow(f"{name}, time of a step", "s", seconds[mode], seconds["none"], "none", time_bar, at_most=True))
        rows.append(BenchRow(f"{name}, activations kept", "MiB", mib[mode], mib["none"], "none", byte_bar, at_most=True))
    return rows


def sampling(world: World) -> list[BenchRow]:
    """Sampling whole images: with cached keys and values, without, and by HF's generate with its cache."""
    with torch.inference_mode():
        return _sampling(world)


def _sampling(world: World) -> list[BenchRow]:
    rows, sizes = [], (16, 16 if world.quick else 32)  # without a cache 32x32 takes minutes
    for B, n_px, peer, bar in ((1, sizes[0], "no cache", 6.0), (4, sizes[1], "HF generate", 1.3)):
        shape = world.config(4, n_px)
        model, empty = our_model(shape).eval(), torch.zeros(B, 0, dtype=torch.int64)
        ours = partial(sample, model, empty, torch.Generator().manual_seed(0))
        theirs = partial(ours, use_cache=False) if peer == "no cache" else partial(_generate, hf_model(shape).eval(), shape, B)
        seconds = medians({"ours": ours, peer: theirs}, max(1, world.turns // 5), turn_seconds=0)
        note = f"L={shape.n_layer} d={shape.n_embd}, {B} images of {shape.n_px}x{shape.n_px}"
        rate = {name: B * shape.n_ctx / value for name, value in seconds.items()}
        rows.append(BenchRow("sampling", "pixels/s", rate["ours"], rate[peer], peer, bar, note=note))
    return rows


def _generate(model: Any, config: ModelConfig, B: int) -> None:
    start, T = torch.full((B, 1), config.n_vocab), config.n_ctx
    assert model.generate(start, max_new_tokens=T, do_sample=True, top_k=0, use_cache=True).shape == (B, T + 1)


def features(world: World) -> list[BenchRow]:
    """The features of all layers: time against HF's hidden states, and memory at 2 and at 8 layers."""
    config, B = world.config(4 if world.quick else 8, 32), 2
    contenders = {kind: pooling(kind, config, B) for kind in ("ours", HF)}
    for ours, theirs in zip(contenders["ours"]()[:-1], contenders[HF]()[: config.n_layer], strict=True):
        assert np.abs(ours - theirs).max() < 1e-3  # h^0 to h^(L-1); HF's last one is normed
    seconds = medians(contenders, world.turns, turn_seconds=0)
    mib = {L: peak_bytes(pooling, "ours", world.config(L, 32), B) / 2**20 for L in (2, 8)}
    note = f"L={config.n_layer} d={config.n_embd} T={config.n_ctx}"
    return [
        BenchRow(
            "features of all layers", "images/s", B / seconds["ours"], B / seconds[HF], f"{HF}, hidden states", 1.5, note=note
        ),
        BenchRow("memory of features", "MiB", mib[8], mib[2], "itself with 2 layers", 1.1, at_most=True, note="8 layers"),
    ]


if __name__ == "__main__":
    cli.run(main)
