"""Estimates the duration of a training step. In: a shape, a layout of ranks and a cluster. Out: seconds.

No constant is measured here; each names its source. tests/plan/test_step_time.py compares the estimates with two published
scaling curves. Called by estimate.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from igpt_ds.plan.costs import (
    REDUCE_BUCKET,
    RankLayout,
    Shape,
    exchanged_bytes,
    exchanges,
    keeps_weights,
    multiplied,
    parameters,
    train_flops_per_token,
    validation_batch,
)
from igpt_ds.plan.gpus import Gpu
from igpt_ds.plan.host_time import FORWARD, host_seconds

# Two fitted constants: the share of those rates that a training step reaches, and the latency of one ring hop between nodes in
# seconds. Fitted to llm-foundry's 7B on 8 to 512 H100 and to Fernandez et al. (arXiv 2411.13055) on 128 to 2048.
EFFICIENCY, HOP = 0.72, 5e-6
HOP_INSIDE = 2e-6  # seconds, inside a node
NEVER_HIDDEN = 0.10  # share of the overlapping communication that still costs time
NIC_SHARE = 0.92  # share of a network card's nominal rate that collectives reach
BETWEEN_STEPS = 0.004  # seconds of Python, logging and synchronisation
ALL_TO_ALL_CALL = 10e-6  # seconds to start one exchange of sequence parallelism
FP32_SHARE = 0.75  # of the data sheet's rate that float32 products and attention reach before EFFICIENCY (assumed)
ELEMENTWISE, RECOMPUTED = (
    30,
    0.6,
)  # bytes a token, C and block of fused norms and activations; the share that "selective" recomputes
ADAM_BYTES = 28  # read and written a parameter: fp32 master, two moments and gradient, and the bf16 weight
PCIE, HOST_MEMORY = 25e9, 30e9  # bytes a second: a GPU's link to its host, and its share of host memory bandwidth (assumed)
GATHER_BUCKET = 5e8  # elements, allgather_bucket_size of stages 1 and 2


@dataclass(frozen=True)
class Cluster:
    """The machines: the kind of GPU, GPUs per node, and bytes a second of all network cards of a node together."""

    gpu: Gpu
    node_gpus: int = 8
    node_network: float = 8 * 50e9

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second of a ring over that many consecutive ranks."""
        return self.gpu.nvlink if ranks <= self.node_gpus else min(self.gpu.nvlink, NIC_SHARE * self.node_network)

    def collective(self, size: float, ranks: int, calls: int) -> float:
        """Seconds to gather or reduce-scatter `size` bytes over the ranks in `calls` messages."""
        hop = HOP if ranks > self.node_gpus else HOP_INSIDE
        return calls * hop * (ranks - 1) + size * (ranks - 1) / ranks / self.bandwidth(ranks)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by cause; `communication` includes the part that overlaps with arithmetic."""

    arithmetic: float
    communication: float
    exposed: float  # communication that arithmetic does not hide
    exchange: float  # of sequence parallelism
    update: float  # Adam, and the time between two steps
    host: float  # Python of the micro steps, beside which the GPU works
    flops: float  # of a rank, with the full square of attention (PaLM)
    peak: float  # FLOP/s of the data sheet

    @property
    def busy(self) -> float:
        """The time of the GPU in the micro steps, with communication that it waits for."""
        return self.arithmetic + self.exposed + self.exchange

    @property
    def waiting(self) -> float:
        """The time that the GPU waits for Python on its host."""
        return max(0.0, self.host - self.busy)

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.busy + self.waiting + self.update

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: relative to `Gpu.peak`, with the full square of attention."""
        return self.flops / self.seconds / self.peak

    @property
    def leads(self) -> str:
        """What the step takes longest for: "GPU", "host" or "network"."""
        if self.waiting:
            return "host"
        return "network" if self.communication + self.exchange > self.arithmetic else "GPU"


def step_time(config: Shape, layout: RankLayout, cluster: Cluster, causal: bool = True, host: bool = True) -> Step:
    """The cost model: arithmetic at the GPU's rates, collectives as rings, overlapping where `layout.overlap` says so.

    A micro step takes the longer of its arithmetic and its communication, plus NEVER_HIDDEN of the communication; and at least
    the time of its Python. Stages 1 and 2 gather their weights after the update, where nothing overlaps.

    Args:
        causal: whether attention computes half of its square ("ar") or all of it ("bert").
        host: whether the Python of DeepSpeed's ZeRO counts; False for other programs.
    """
    forward, backward, again = _token_seconds(config, layout, cluster.gpu, causal)
    sp, N = layout.sequence_parallel, layout.world_size
    micro = layout.micro_batch * config.n_ctx / sp * (forward + backward + again) / EFFICIENCY
    hidden, late = _communication(config, layout, cluster)
    communication = hidden * (1 if layout.stage == 1 else layout.accumulation)
    covered = micro * (1 if layout.stage == 1 else layout.accumulation)  # stage 1 reduces beside the last micro step
    exposed = max(communication - covered, 0.0) + NEVER_HIDDEN * communication if layout.overlap else communication
    calls = exchanges(layout) / 2 * config.n_layer * ALL_TO_ALL_CALL  # q, k and v go together, the output alone
    return Step(
        arithmetic=layout.accumulation * micro,
        communication=communication + late,
        exposed=exposed + late,
        exchange=layout.accumulation * (exchanged_bytes(config, layout) / cluster.bandwidth(sp) + calls),
        update=_update(parameters(config) / N, layout.offload_optimizer, cluster.gpu) + BETWEEN_STEPS,
        host=host_seconds(config.n_layer, layout) if host else 0.0,
        flops=train_flops_per_token(config) * config.n_ctx * layout.images / N,
        peak=cluster.gpu.peak,
    )


def validation_time(config: Shape, layout: RankLayout, cluster: Cluster, n_images: int, causal: bool = True) -> float:
    """Seconds of one validation: forward passes over `validation_batch` images, with one round of gathering in stage 3."""
    B, sp = validation_batch(config, layout, n_images), layout.sequence_parallel
    arithmetic = B * config.n_ctx / sp * _token_seconds(config, layout, cluster.gpu, causal)[0] / EFFICIENCY
    size = layout.weight_bytes * parameters(config)
    gather = cluster.collective(size, layout.world_size, config.n_layer) if layout.stage == 3 else 0.0
    once = replace(layout, micro_batch=B, accumulation=1, checkpointing="none")
    exchange = exchanged_bytes(config, once) / 2 / cluster.bandwidth(sp)
    host = FORWARD * host_seconds(config.n_layer, once)
    return math.ceil(n_images / (B * layout.groups)) * max(max(arithmetic, gather) + NEVER_HIDDEN * gather + exchange, host)


def _token_seconds(config: Shape, layout: RankLayout, gpu: Gpu, causal: bool) -> tuple[float, float, float]:
    # Seconds of a token's forward pass, backward pass and recomputation at the GPU's rates.
    L, C = config.n_layer, config.n_embd
    matmul, square = multiplied(config), (0.5 if causal else 1.0) * 4 * L * config.n_ctx * C
    whole = layout.precision == "fp32"
    gemm, attention = (FP32_SHARE * gpu.fp32,) * 2 if whole else (gpu.gemm, gpu.attention)
    elementwise = ELEMENTWISE * L * C / gpu.hbm * (2 if whole else 1)
    forward = 2 * matmul / gemm + square / attention + elementwise
    backward = 4 * matmul / gemm + 2.5 * square / attention + 2 * elementwise  # flash attention recomputes its scores
    return forward, backward, {"none": 0.0, "selective": RECOMPUTED * elementwise, "full": forward}[layout.checkpointing]


def _communication(config: Shape, layout: RankLayout, cluster: Cluster) -> tuple[float, float]:
    # Seconds of one round that can overlap with arithmetic, and of the collectives after the update.
    P, N, size = parameters(config), layout.world_size, layout.weight_bytes * parameters(config)
    if layout.stage == 3:
        calls = config.n_layer  # one per block, if the prefetch bucket holds a whole block
        again = min(layout.hpz, N) if layout.hpz > 1 else N
        second = 0.0 if keeps_weights(config, layout) else cluster.collective(size, again, calls)
        return 2 * cluster.collective(size, N, calls) + second, 0.0
    reduced = cluster.collective(size, N, math.ceil(P / REDUCE_BUCKET))
    return reduced, cluster.collective(size, N, math.ceil(P / GATHER_BUCKET))


def _update(shard: float, offloaded: bool, gpu: Gpu) -> float:
    # Seconds of Adam on a rank's shard. Offloaded: fp32 gradients go to the host, which computes and sends weights back.
    return shard * (6 / PCIE + ADAM_BYTES / HOST_MEMORY) if offloaded else shard * ADAM_BYTES / gpu.hbm
