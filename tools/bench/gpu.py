"""Measures the model on one Hopper GPU within nine minutes, a process a size. Exit status: 1 if a bar is missed or a part fails.

Each line of training has the plan's prediction beside it. MFU is the FLOPs of plan/costs.py over the bf16 peak of the data sheet:
in PaLM's convention in the table, causal in the notes. A part that does not fit the memory or time becomes a row that says so.
The order: the host's time of a ZeRO-3 step, the device's limits, XL under ZeRO-3, and what fits the rest of the time. --toy runs
everything on a CPU at tiny sizes.

    python tools/bench/gpu.py --out bench_gpu.json
    python tools/bench/gpu.py --show bench_gpu.json
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import BenchRow, read_bench

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import CHECKPOINTING, ModelConfig
from igpt_ds.errors import InputError
from igpt_ds.plan import costs

with lazy.imports():
    import gpu_zero3
    import torch
    import torch.nn.functional as F
    from device import BANDWIDTH, DeviceSession, run_process
    from torch import Tensor, nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from igpt_ds.model.objectives import autoregressive_loss
    from igpt_ds.model.sampling import Decoder, choose
    from igpt_ds.model.transformer import Transformer


MINUTES = 9.0
# The parts that share a process, in their order, and the most seconds of each process. An engine of DeepSpeed keeps its memory
# until its process ends, so each of its sizes has its own.
PROCESSES = {
    ("host",): 60.0,
    ("ceilings",): 60.0,
    ("zero3_4",): 120.0,
    ("zero3_8",): 120.0,
    ("slices",): 150.0,
    ("small", "sampling", "hf"): 120.0,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen parts, prints the table, writes the JSON."""
    names = [name for names in PROCESSES for name in names]
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="parts to run")
    parser.add_argument("--toy", action="store_true", help="run at tiny sizes on a CPU without bars, to test the program")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"limit of the whole benchmark (default: {MINUTES:g})")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows and the facts of the device to (default: none)")
    parser.add_argument("--show", type=Path, help="JSON file of --out whose table is printed; nothing is measured")
    args = parser.parse_args(argv)
    if args.show:
        print(read_bench(args.show).table(with_cores=False))
        return
    slack = 10.0 if args.toy else 1.0  # a CPU that runs tests may be busy
    end = time.monotonic() + 60 * slack * args.minutes
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name before torch 2.9, which may be the user's
        # Torch reads it at the first tensor.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    lazy.load()
    if not args.toy and not torch.cuda.is_available():
        raise InputError("torch sees no GPU here; --toy runs on a CPU")
    session = DeviceSession(args.toy, args.out, torch.device("cpu" if args.toy else "cuda"), end, slack=slack)
    processes = {parts: seconds for parts, seconds in PROCESSES.items() if set(parts) & set(args.only)}
    if len(processes) == 1:
        for name in args.only:
            with session.device if name in PLAIN else nullcontext():  # DeepSpeed places its tensors itself
                (PLAIN | gpu_zero3.PARTS)[name](session)
    else:
        for parts, seconds in processes.items():
            run_process(session, Path(__file__), [name for name in parts if name in args.only], seconds)
    if args.toy:
        session.rows = [replace(row, bar=None) for row in session.rows]
    if args.out is not None:
        session.benchmark().write(args.out)
    print(session.benchmark().table(with_cores=False))
    missed = [f"{row.what} ({row.peer_name})" for row in session.rows if not row.holds]
    failed = [row.what for row in session.rows if row.note.startswith("failed")]
    if missed or failed:
        print(f"missed: {', '.join(missed) or 'none'}; failed: {', '.join(failed) or 'none'}", file=sys.stderr)
        sys.exit(1)


# --------------------------------------------------------------------------------------------------- parts


def ceilings(session: DeviceSession) -> None:
    """The limits of the device: products of random numbers (zeros are faster), a copy, attention alone."""

    def product(M: int, K: int, N: int) -> list[BenchRow]:
        a, b = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((M, K), (K, N)))
        seconds = session.seconds(lambda: a @ b)
        return [session.flops_row(f"product {M} x {K} x {N}", 2.0 * M * K * N, seconds, session.plan_says(session.gpu.gemm))]

    def attention(backend: SDPBackend, backward: bool) -> list[BenchRow]:
        B, H, T, D = (1, 2, 16, 16) if session.toy else (4, 24, 4096, 128)
        q, k, v, dy = (torch.randn(B, H, T, D, dtype=torch.bfloat16, requires_grad=backward and i < 3) for i in range(4))

        def run() -> None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if backward:
                y.backward(dy)

        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name.lower()
        with sdpa_kernel([backend]):
            seconds = session.seconds(run)
        flops = 2.0 * B * H * T * T * D * (3.5 if backward else 1)  # causal: half of the square; backward is 2.5 forwards
        plan = session.plan_says(session.gpu.attention)
        name = f"attention {backend.name.lower()}, {'both ways' if backward else 'forward'}"
        return [session.flops_row(name, flops, seconds, f"B={B} H={H} T={T} D={D}, causal FLOPs; torch takes {chosen}; {plan}")]

    sizes = [(8192, 8192, 8192), *((16384, K, N) for K, N in ((3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072)))]
    for M, K, N in [(32, 32, 32)] if session.toy else sizes:
        session.attempt(f"product {M} x {K} x {N}", 5, partial(product, M, K, N))
    session.attempt("copy", 5, partial(_copy, session))
    fastest = [SDPBackend.MATH] if session.toy else [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    for backend in fastest:
        for backward in (False, True):
            session.attempt(f"attention {backend.name.lower()}", 5, partial(attention, backend, backward))


def _copy(session: DeviceSession) -> list[BenchRow]:
    a = torch.ones(2**10 if session.toy else 2**31, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / session.seconds(lambda: b.copy_(a))
    session.bandwidth = rate
    plan = f"the plan assumes {session.gpu.hbm / 1e12:.2f}"
    return [BenchRow("copy", "TB/s", rate / 1e12, BANDWIDTH / 1e12, "printed bandwidth of an H200", note=plan)]


def slices(session: DeviceSession) -> None:
    """20 of XL's 60 layers in plain torch: each mode of activation checkpointing, eager and compiled."""
    best, config = 0.0, session.config("xl", 64, 20)  # of those without checkpointing
    for compiled in (False, True):
        for mode in CHECKPOINTING:
            what = f"XL slice, {config.n_layer} layers, {mode} checkpointing, {'compiled' if compiled else 'eager'}"
            rate = session.attempt(what, 35, partial(_train, session, what, config, 4, mode, compiled))
            best = max(best, rate or 0.0) if mode == "none" else best
    peak, source = session.peak_and_source
    session.rows.append(BenchRow("XL slice, the best without checkpointing", "TFLOP/s", best, peak / 1e12, source, 0.58))


def _train(session: DeviceSession, what: str, config: ModelConfig, B: int, mode: str, compiled: bool) -> list[BenchRow]:
    model = Transformer(config, activation_checkpointing=mode)
    nn.init.normal_(model.head.weight, std=0.02)
    if compiled:
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager" if session.toy else "inductor")
    layout = costs.RankLayout(1, B, stage=0, checkpointing=mode)
    return [session.step_row(what, config, layout, session.seconds(_stepper(model, model, config, B)))]


def _stepper(model: nn.Module, forward: Callable[[Tensor], Tensor], config: ModelConfig, B: int) -> Callable[[], None]:
    """A training step in bf16 with fp32 masters and moments: 16 bytes per parameter, as in DeepSpeed's bf16."""
    model.bfloat16()
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    adam = torch.optim.Adam(masters, lr=1e-5, fused=True)
    tokens = torch.randint(config.n_vocab, (B, config.n_ctx))

    def run() -> None:
        autoregressive_loss(forward(tokens), tokens).backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return run


def hf(session: DeviceSession) -> None:
    """Hugging Face's ImageGPT beside our model at the shape of the slice, one image per step."""
    from_peak = session.peak / 1e12
    for n_layer in (20, 4):
        config = session.config("xl", 64, n_layer)
        what = f"XL slice, {n_layer} layers, one image, against HF ImageGPT"

        def both(config: ModelConfig = config, what: str = what) -> list[BenchRow]:
            theirs = session.step_row(what, config, costs.RankLayout(1), session.seconds(_hf_stepper(config)))
            gc.collect()
            (ours,) = _train(session, what, config, 1, "none", False)
            return [replace(ours, peer=theirs.ours, peer_name="HF ImageGPT, bf16", note=f"of {from_peak:.0f} TFLOP/s")]

        session.attempt(what, 25, both)


def _hf_stepper(config: ModelConfig) -> Callable[[], None]:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    shape = ImageGPTConfig(
        vocab_size=config.n_vocab + 1,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_ctx,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = ImageGPTForCausalImageModeling(shape).train()

    def logits(tokens: Tensor) -> Tensor:
        start = torch.full((len(tokens), 1), config.n_vocab)
        return model(input_ids=torch.cat([start, tokens[:, :-1]], dim=1), use_cache=False).logits

    return _stepper(model, logits, config, 1)


def small(session: DeviceSession) -> None:
    """iGPT-S on 32x32 images: training, and the features of all layers."""
    config, B = session.config("s", 32), 2 if session.toy else 64
    for compiled in (False, True):
        what = f"S training, {'compiled' if compiled else 'eager'}"
        session.attempt(what, 20, partial(_train, session, what, config, B, "none", compiled))

    def features() -> list[BenchRow]:
        model, tokens = Transformer(config).eval(), torch.randint(config.n_vocab, (2 * B, config.n_ctx))

        @torch.inference_mode()
        def run() -> None:
            with _autocast(session):
                torch.stack([a.mean(1, dtype=torch.float32) for pair in model.residuals(tokens) for a in pair]).cpu()

        rate = 2 * B / session.seconds(run)
        half = session.peak / 2 / (costs.forward_flops_per_token(config, causal=True) * config.n_ctx)
        return [BenchRow("S features of all layers", "images/s", rate, half, "half of the printed peak, causal FLOPs")]

    session.attempt("S features of all layers", 15, features)


def _autocast(session: DeviceSession) -> AbstractContextManager[Any]:
    return nullcontext() if session.toy else torch.autocast(session.device.type, torch.bfloat16)


def sampling(session: DeviceSession) -> None:
    """Pixels per second near the end of an image, where keys and values are longest, beside reading every byte once."""
    with torch.inference_mode():
        session.attempt("copy", 5, partial(_copy, session))
    session.rows.pop()  # a row of the ceilings
    for size, n_px, B in (("xl", 64, 1), ("xl", 64, 16), ("s", 32, 512)):
        config = session.config(size, n_px)
        what = f"sampling {size.upper()} {n_px}x{n_px}, {B} at once"
        with torch.inference_mode():
            session.attempt(what, 20, partial(_draw, session, what, config, 2 if session.toy else B))


def _draw(session: DeviceSession, what: str, config: ModelConfig, B: int) -> list[BenchRow]:
    steps = 4 if session.toy else 64
    P = config.n_ctx - 2 * steps
    decoder, u = Decoder(Transformer(config).eval(), B, torch.bfloat16), torch.rand(B, dtype=torch.float64)
    logits = decoder.prefill(torch.randint(config.n_vocab, (B, P)))

    def run() -> None:
        nonlocal logits
        logits = decoder.step(choose(logits, u))

    seconds = session.seconds(run, warm_up=10, times=steps)
    read = 2.0 * costs.parameters(config) + 4.0 * B * config.n_layer * config.n_embd * decoder.length
    return [BenchRow(what, "pixels/s", B / seconds, B * session.bandwidth / read, "the memory's bandwidth, copying")]


PLAIN: dict[str, Callable[[DeviceSession], None]] = {part.__name__: part for part in (ceilings, slices, hf, small, sampling)}


if __name__ == "__main__":
    cli.run(main)
