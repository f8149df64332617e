"""What training costs, counted: parameters, FLOPs, bytes that a rank holds, bytes on the wire.

A shape (a ModelConfig, or anything with its sizes) and a layout of ranks enter, numbers leave. How long it takes is
`step_time.py`. Called by plan.py, by train/metrics.py for MFU, by the benchmarks and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

GIB = 2**30


class Shape(Protocol):
    """The sizes that costs depend on; `config.ModelConfig` has them."""

    @property
    def n_layer(self) -> int:
        """L, the blocks."""

    @property
    def n_embd(self) -> int:
        """C, the width."""

    @property
    def n_ctx(self) -> int:
        """T, the tokens of an image."""

    @property
    def n_vocab(self) -> int:
        """V, the colours."""


# Dense bf16 FLOP/s that the makers print for one GPU, by the name torch reports (longest match wins).
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "V100": 125e12,
}

# Memory beside states and activations, in bytes: CUDA's context with NCCL's buffers, and DeepSpeed's buckets by our ds_configs.
CONTEXT = 1.5 * GIB
LIVE_PARAMETERS = 1e9  # stage3_max_live_parameters: gathered weights that may be held at once
REDUCE_BUCKET, SUB_GROUP = 2e8, 2e8  # elements
SPARE = 0.05  # of a GPU's memory that fragments take


@dataclass(frozen=True)
class Layout:
    """How a run lies on its ranks. With sequence_parallel ranks an image, micro_batch counts the images of such a group."""

    world_size: int
    micro_batch: int = 1
    accumulation: int = 1
    sequence_parallel: int = 1
    stage: int = 3
    precision: str = "bf16"
    checkpointing: str = "none"
    accumulation_bytes: int = 4  # of a gradient that is summed over micro steps
    hpz: int = 1  # ranks of a secondary copy of the weights (zero_hpz_partition_size)
    offload_optimizer: bool = False
    overlap: bool = True  # whether communication may hide behind arithmetic (overlap_comm)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight that takes part in products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def images(self) -> int:
        """Images of one step."""
        return self.micro_batch * self.accumulation * (self.world_size // self.sequence_parallel)


def parameters(config: Shape, objective: str = "ar") -> int:
    """The exact number of weights: blocks of 12 C^2 + 2 C, two [V, C] tables, T positions, ln_f, and sos unless for "bert"."""
    C, L = config.n_embd, config.n_layer
    return L * (12 * C * C + 2 * C) + 2 * config.n_vocab * C + config.n_ctx * C + (2 if objective == "ar" else 1) * C


def forward_flops_per_token(config: Shape, causal: bool) -> float:
    """FLOPs of a forward pass per token: 2 per matmul weight and 4 C T per layer of attention, half of that if causal.

    The full square is the convention of PaLM, nanoGPT and llm-foundry; the causal half counts what is computed.
    """
    attention = 4 * config.n_layer * config.n_embd * config.n_ctx * (0.5 if causal else 1.0)
    return 2 * multiplied(config) + attention


def train_flops_per_token(config: Shape, causal: bool = False) -> float:
    """Forward and backward: three times the forward pass. Recomputation is not counted, so this is MFU's numerator."""
    return 3 * forward_flops_per_token(config, causal)


def multiplied(config: Shape) -> int:
    """The weights that take part in products: all but the embeddings, the gains and sos."""
    return 12 * config.n_layer * config.n_embd**2 + config.n_vocab * config.n_embd


def peak_flops(device_name: str) -> float | None:
    """The printed dense bf16 peak of a GPU, or None for a device not in the table."""
    matches = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def states(self) -> float:
        """What is left between two steps: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.states + self.activations + self.workspace


def offloaded_bytes(config: Shape, layout: Layout) -> float:
    """Bytes that a rank's offloaded optimizer and gradients take of the host's memory."""
    each = 12 + layout.accumulation_bytes if layout.offload_optimizer else 0
    return each * parameters(config) / layout.world_size


def memory(config: Shape, layout: Layout) -> Memory:
    """Bytes a rank holds: model states by ZeRO stage, the activations of one micro step, and buffers by the constants above.

    States, for each parameter: a weight of 2 B (fp32: 4), a gradient of `accumulation_bytes`, fp32 master weight and two moments
    of 12 B. Stage 1 shards the last, 2 the gradients as well, 3 all. hpZ adds a second copy of the weights on each group of hpz
    ranks. An offloaded optimizer and its gradients lie in the host's memory.

    Activations per token and block: "none" keeps 16 C (each norm's input and output, q k v, attention, and 4 C on either side of
    quick-GELU), "selective" 9 C (the block's input, q k v, attention, and before quick-GELU), "full" the 1 C of the block's
    input; what is recomputed makes one block complete again, beside 10 C of gradients in flight.
    """
    P, size, C, L = parameters(config), layout.weight_bytes, config.n_embd, config.n_layer
    N, stage = layout.world_size, layout.stage
    weights = size * P / (N if stage == 3 else 1) + (size * P / layout.hpz if layout.hpz > 1 else 0)
    gradients = layout.accumulation_bytes * P / (N if stage >= 2 else 1)
    optimizer = 12 * P / N
    kept = {"none": 16, "selective": 9, "full": 1}[layout.checkpointing]
    held = kept * L + (16 - kept) + 10
    tokens = layout.micro_batch * config.n_ctx / layout.sequence_parallel
    activations = tokens * (held * C * size + 10 * config.n_vocab)
    if layout.offload_optimizer:
        gradients, optimizer = 0, 0
    buckets = 2 * min(REDUCE_BUCKET, P) * size + 4 * min(SUB_GROUP, P / N)  # two buckets overlap; a sub-group's fp32 gradient
    gathered = size * min(LIVE_PARAMETERS, P) * (1 - 1 / N) if stage == 3 else 0
    return Memory(weights, gradients, optimizer, activations, CONTEXT + buckets + gathered)


def fits(config: Shape, layout: Layout, gpu_bytes: float) -> bool:
    """Whether a rank's memory stays below that of its GPU, less what fragments take."""
    return memory(config, layout).total <= (1 - SPARE) * gpu_bytes


def wire_bytes(config: Shape, layout: Layout) -> float:
    """Bytes that one GPU sends in a step, of collectives over all ranks and of the exchanges of sequence parallelism.

    Stage 3 gathers the weights for the forward and the backward pass and reduces the gradients in every micro step; stage 2
    reduces in every micro step and gathers once a step; stage 1 does both once a step. Each moves size * P * (N - 1) / N.
    """
    rounds = {1: 2, 2: layout.accumulation + 1, 3: 3 * layout.accumulation}[layout.stage]
    N = layout.world_size
    return rounds * layout.weight_bytes * parameters(config) * (N - 1) / N + layout.accumulation * exchanged_bytes(config, layout)


def exchanges(layout: Layout) -> int:
    """Tensors a block that change hands in a micro step of sequence parallelism."""
    if layout.sequence_parallel == 1:
        return 0
    return 8 if layout.checkpointing == "none" else 12


def exchanged_bytes(config: Shape, layout: Layout) -> float:
    """Bytes that one GPU sends in a micro step of sequence parallelism: 0 where each image has one rank.

    q, k, v and the output change hands around attention, in the forward pass, and their gradients in the backward pass, and the
    forward pass once more where it is recomputed: 8 or 12 tensors of [T / sp, C] a block, of which sp - 1 parts leave.
    """
    sp = layout.sequence_parallel
    tokens = layout.micro_batch * config.n_ctx / sp
    return exchanges(layout) * tokens * config.n_embd * layout.weight_bytes * (sp - 1) / sp * config.n_layer


def checkpoint_bytes(config: Shape, objective: str = "ar") -> float:
    """Bytes of one checkpoint: fp32 master weights and two moments."""
    return 12 * parameters(config, objective)
