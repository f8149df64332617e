"""How long a training step takes: a shape, a layout of ranks and a cluster enter, seconds leave. Called by plan.py.

Nothing is measured here: each constant says where it comes from, and two published scaling curves hold the whole in
tests/plan/test_step_time.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from igpt_ds.plan.costs import (
    REDUCE_BUCKET,
    Layout,
    Shape,
    exchanged_bytes,
    exchanges,
    multiplied,
    parameters,
    train_flops_per_token,
)


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are those reached in practice, but for `peak`, to which MFU refers."""

    name: str
    memory: float  # bytes, as the maker prints them
    peak: float  # dense bf16 FLOP/s, printed
    gemm: float  # FLOP/s of large bf16 products
    attention: float  # FLOP/s of a flash attention kernel
    hbm: float  # bytes a second of its memory
    nvlink: float  # bytes a second of collectives inside a node


# Printed: NVIDIA's data sheets of A100 (2020), H100 and H200 SXM (2023, 2024) and HGX B200 (2024): bytes, dense bf16 peak.
# Reached. H100: products 680e12 in the middle of training (794.5e12 alone) and NVLink, pairwise 396e9 of 450e9, from S. Bekman's
# ml-engineering; attention 480e12 by cuDNN 9 or FlashAttention 3 at head dimension 128; memory 0.9 of what is printed, which is
# what a copy on an H200 reached (4.3e12 of 4.8e12). A100: products 268e12 alone (ml-engineering), attention 0.63 of the peak
# (FlashAttention 2). B200: H100's fractions of its printed rates; nobody has checked that here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40e9, 312e12, 260e12, 196e12, 1.4e12, 230e9),
        Gpu("a100-80g", 80e9, 312e12, 260e12, 196e12, 1.83e12, 230e9),
        Gpu("h100-80g", 80e9, 989.4e12, 680e12, 480e12, 3.0e12, 360e9),
        Gpu("h200-141g", 141e9, 989.4e12, 700e12, 500e12, 4.3e12, 360e9),
        Gpu("b200", 180e9, 2250e12, 1550e12, 1090e12, 7.2e12, 720e9),
    )
}

# The two fitted constants: the share of those rates that a training step reaches, and the latency of a hop of a ring between
# nodes. Fitted to llm-foundry's 7B on 8 to 512 H100 and to Fernandez et al. (arXiv 2411.13055) on 128 to 2048.
EFFICIENCY, HOP = 0.72, 5e-6
HOP_INSIDE = 2e-6  # seconds, inside a node
NEVER_HIDDEN = 0.10  # of the communication that could hide behind arithmetic
NIC_SHARE = 0.92  # of a network card's printed rate that collectives reach
BETWEEN_STEPS = 0.004  # seconds of Python, logging and synchronisation
ALL_TO_ALL_CALL = 10e-6  # seconds to start one exchange of sequence parallelism
ELEMENTWISE, RECOMPUTED = 30, 0.6  # bytes a token, C and block of fused norms and activations; the share "selective" repeats
ADAM_BYTES = 28  # read and written a parameter: fp32 master, two moments and gradient, and the bf16 weight
PCIE, HOST_MEMORY = 25e9, 30e9  # bytes a second of one GPU's link to its host, and its share of the host's memory (assumed)
GATHER_BUCKET = 5e8  # elements, allgather_bucket_size of stages 1 and 2


@dataclass(frozen=True)
class Cluster:
    """Where it runs: GPUs, how many share a node, and the bytes a second of all network cards of a node together."""

    gpu: Gpu
    node_gpus: int = 8
    node_network: float = 8 * 50e9

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second at which a ring over consecutive ranks moves what each of them holds."""
        return self.gpu.nvlink if ranks <= self.node_gpus else min(self.gpu.nvlink, NIC_SHARE * self.node_network)

    def collective(self, size: float, ranks: int, calls: int) -> float:
        """Seconds to gather or reduce-scatter `size` bytes over the ranks in `calls` messages."""
        hop = HOP if ranks > self.node_gpus else HOP_INSIDE
        return calls * hop * (ranks - 1) + size * (ranks - 1) / ranks / self.bandwidth(ranks)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step and where they go; `communication` counts what is hidden as well."""

    arithmetic: float
    communication: float
    exposed: float  # communication that arithmetic does not hide
    exchange: float  # of sequence parallelism
    update: float  # Adam, and what lies between two steps
    mfu: float  # of the printed peak, attention counted in full (PaLM)

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.arithmetic + self.exposed + self.exchange + self.update


def step_time(config: Shape, layout: Layout, cluster: Cluster, causal: bool = True) -> Step:
    """The cost model: arithmetic by the rates of its kinds, collectives by rings, one hidden behind the other where it can be.

    A micro step takes the longer of its arithmetic and its communication, and NEVER_HIDDEN of the latter. Stages 1 and 2 gather
    their weights after the update, where nothing hides it.

    Args:
        causal: half of the attention's square is computed ("ar"); all of it for "bert".
    """
    gpu, L, C, T = cluster.gpu, config.n_layer, config.n_embd, config.n_ctx
    matmul, square = multiplied(config), (0.5 if causal else 1.0) * 4 * L * T * C
    elementwise = ELEMENTWISE * L * C / gpu.hbm
    forward = 2 * matmul / gpu.gemm + square / gpu.attention + elementwise
    backward = 4 * matmul / gpu.gemm + 2.5 * square / gpu.attention + 2 * elementwise  # flash attention recomputes its scores
    again = {"none": 0.0, "selective": RECOMPUTED * elementwise, "full": forward}[layout.checkpointing]
    tokens = layout.micro_batch * T / layout.sequence_parallel
    micro = tokens * (forward + backward + again) / EFFICIENCY
    hidden, late = _communication(config, layout, cluster)
    communication = hidden * (1 if layout.stage == 1 else layout.accumulation)
    covered = micro * (1 if layout.stage == 1 else layout.accumulation)  # stage 1 reduces beside the last micro step
    exposed = max(communication - covered, 0.0) + NEVER_HIDDEN * communication if layout.overlap else communication
    sp = layout.sequence_parallel
    calls = exchanges(layout) / 2 * L * ALL_TO_ALL_CALL  # q, k and v go together, the output alone
    exchange = layout.accumulation * (exchanged_bytes(config, layout) / cluster.bandwidth(sp) + calls)
    N = layout.world_size
    update = _update(parameters(config) / N, layout.offload_optimizer, gpu) + BETWEEN_STEPS
    arithmetic = layout.accumulation * micro
    exposed += late
    seconds = arithmetic + exposed + exchange + update
    flops = train_flops_per_token(config) * T * layout.images / N
    return Step(arithmetic, communication + late, exposed, exchange, update, flops / seconds / gpu.peak)


def _communication(config: Shape, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    # Seconds of a round that may hide behind arithmetic, and of what comes after the update.
    P, N, size = parameters(config), layout.world_size, layout.weight_bytes * parameters(config)
    if layout.stage == 3:
        calls = config.n_layer  # one a block, as long as the prefetch bucket holds a whole one
        again = min(layout.hpz, N) if layout.hpz > 1 else N
        return 2 * cluster.collective(size, N, calls) + cluster.collective(size, again, calls), 0.0
    reduced = cluster.collective(size, N, math.ceil(P / REDUCE_BUCKET))
    return reduced, cluster.collective(size, N, math.ceil(P / GATHER_BUCKET))


def _update(shard: float, offloaded: bool, gpu: Gpu) -> float:
    # Seconds of Adam on a rank's part of the parameters; offloaded, fp32 gradients go down, weights come up, the host computes.
    return shard * (6 / PCIE + ADAM_BYTES / HOST_MEMORY) if offloaded else shard * ADAM_BYTES / gpu.hbm
