"""Counts what training costs: parameters, FLOPs, bytes in the memory of a rank, bytes on the network.

In: a shape (a ModelConfig, or anything with the same sizes) and a layout of ranks. Out: numbers. `step_time.py` turns them into
seconds. Called by estimate.py, by train/metrics.py for MFU, by the benchmarks and by tests.
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

    @property
    def tied_embeddings(self) -> bool:
        """Whether the [V, C] matrix of the head is that of the embedding."""


# Memory for CUDA's context and NCCL's buffers in bytes; the sizes of DeepSpeed's buckets in our ds_configs.
CONTEXT = 1.5 * GIB
LIVE_PARAMETERS = 1e9  # weights, the default of stage3_max_live_parameters and of stage3_max_reuse_distance
REDUCE_BUCKET, SUB_GROUP = 2e8, 2e8  # elements
SPARE = 0.05  # share of a GPU's memory that fragmentation takes
VAL_IMAGES, VAL_EVERY = 5000, 1000  # images of a validation and steps between two: the defaults of train.py
VAL_BATCHES = 8  # micro batches of a training step that a validation reads at once, where memory allows
KEEP_LAST = 2  # newest checkpoints that a run keeps: the default of --keep_last
FAST_KEPT = 2  # newest states that it keeps in --fast_dir


@dataclass(frozen=True)
class RankLayout:
    """How a run is spread over its ranks. `micro_batch` counts the images of one group of `sequence_parallel` ranks."""

    world_size: int
    micro_batch: int = 1
    accumulation: int = 1
    sequence_parallel: int = 1
    stage: int = 3
    precision: str = "bf16"
    checkpointing: str = "none"
    accumulation_bytes: int = 4  # of a gradient while micro steps are summed
    hpz: int = 1  # ranks that share a secondary copy of the weights (zero_hpz_partition_size)
    offload_optimizer: bool = False
    overlap: bool = True  # whether communication overlaps with arithmetic (overlap_comm)
    live: float = LIVE_PARAMETERS  # gathered weights that stage 3 holds at once (stage3_max_live_parameters)
    reuse: float = LIVE_PARAMETERS  # stage 3 keeps a weight that is used again this soon (stage3_max_reuse_distance)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight in the forward pass."""
        return 4 if self.precision == "fp32" else 2

    @property
    def groups(self) -> int:
        """Groups of ranks that share an image: all ranks, if none do."""
        return self.world_size // self.sequence_parallel

    @property
    def images(self) -> int:
        """Images of one step."""
        return self.micro_batch * self.accumulation * self.groups


def parameters(config: Shape, objective: str = "ar") -> int:
    """The exact number of weights: blocks of 12 C^2 + 2 C, two [V, C] tables, T positions, ln_f, and sos unless for "bert".

    Tied embeddings have one table. It counts once in weights, gradients, optimizer and checkpoints, and its product with the
    logits stays: FLOPs do not change. Dropout keeps nothing for the backward pass, which draws the masks again.
    """
    C, L, tables = config.n_embd, config.n_layer, 1 if config.tied_embeddings else 2
    return L * (12 * C * C + 2 * C) + tables * config.n_vocab * C + config.n_ctx * C + (2 if objective == "ar" else 1) * C


def forward_flops_per_token(config: Shape, causal: bool) -> float:
    """FLOPs of a forward pass per token: 2 per matmul weight and 4 C T per layer of attention, half of that if causal.

    PaLM, nanoGPT and llm-foundry count the full square; the causal half is what a causal kernel computes.
    """
    attention = 4 * config.n_layer * config.n_embd * config.n_ctx * (0.5 if causal else 1.0)
    return 2 * multiplied(config) + attention


def train_flops_per_token(config: Shape, causal: bool = False) -> float:
    """FLOPs of forward and backward: three times the forward pass. The numerator of MFU, so recomputation is not counted."""
    return 3 * forward_flops_per_token(config, causal)


def multiplied(config: Shape) -> int:
    """The number of weights used in matrix products: all but the embeddings, the gains and sos."""
    return 12 * config.n_layer * config.n_embd**2 + config.n_vocab * config.n_embd


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
        """Model states: weights, gradients and optimizer, held between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.states + self.activations + self.workspace

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU of that size holds it and keeps `SPARE` free for fragmentation."""
        return self.total <= (1 - SPARE) * gpu_bytes


def offloaded_bytes(config: Shape, layout: RankLayout) -> float:
    """Bytes of host memory for the offloaded optimizer and gradients of one rank; 0 without offloading."""
    each = 12 + layout.accumulation_bytes if layout.offload_optimizer else 0
    return each * parameters(config) / layout.world_size


def memory(config: Shape, layout: RankLayout) -> Memory:
    """Bytes that one rank holds: model states by ZeRO stage, activations of one micro step, and buffers by the constants above.

    States per parameter: a weight of 2 B (fp32: 4), a gradient of `accumulation_bytes`, and 12 B of fp32 master weight and two
    moments. Stage 1 shards the 12 B, stage 2 also the gradients, stage 3 everything. hpZ adds a second copy of the weights per
    group of hpz ranks. An offloaded optimizer and its gradients are in host memory.

    Activations per token and block: "none" keeps 16 C (input and output of each norm, q k v, attention, and 4 C before and after
    quick-GELU), "selective" 9 C (the block's input, q k v, attention, and the input of quick-GELU), "full" 1 C (its input).
    During the backward pass one recomputed block is held in full, with 10 C of gradients.
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
    buckets = 2 * min(REDUCE_BUCKET, P) * size + 4 * min(
        SUB_GROUP, P / N
    )  # two overlapping buckets; the fp32 gradient of a sub-group
    gathered = size * min(layout.live, P) * (1 - 1 / N) if stage == 3 else 0
    return Memory(weights, gradients, optimizer, activations, CONTEXT + buckets + gathered)


def wire_bytes(config: Shape, layout: RankLayout) -> float:
    """Bytes that one GPU sends in a step: collectives over all ranks, and the exchanges of sequence parallelism.

    Stage 3 gathers the weights for the forward pass and reduces the gradients in every micro step, and gathers again for the
    backward pass unless it keeps them; stage 2 reduces in every micro step and gathers once a step; stage 1 does both once a
    step. Each moves size * P * (N - 1) / N.
    """
    each = 2 if keeps_weights(config, layout) else 3
    rounds = {1: 2, 2: layout.accumulation + 1, 3: each * layout.accumulation}[layout.stage]
    N = layout.world_size
    return rounds * layout.weight_bytes * parameters(config) * (N - 1) / N + layout.accumulation * exchanged_bytes(config, layout)


def keeps_weights(config: Shape, layout: RankLayout) -> bool:
    """Whether stage 3 keeps what it gathers for the forward pass until the backward pass, so that it gathers once.

    DeepSpeed counts the weights that it uses between two uses of a block: up to 2 P, and 3 P where blocks are computed again.
    """
    P, passes = parameters(config), 2 if layout.checkpointing == "none" else 3
    return layout.stage == 3 and layout.live >= P and layout.reuse >= passes * P


def validation_batch(config: Shape, layout: RankLayout, n_images: int) -> int:
    """The images that a rank, or a group that shares images, reads at once to validate on n_images.

    VAL_BATCHES times the micro batch, or fewer, so that a validation holds no more activations than a training step. A forward
    pass holds one block: its input, the input of the MLP's norm and its output, and 12 C in quick-GELU, which are 16 C with the
    residual.
    """
    size, each = layout.weight_bytes, layout.micro_batch * config.n_ctx / layout.sequence_parallel
    held = each * (16 * config.n_embd * size + 10 * config.n_vocab)
    times = max(1, min(VAL_BATCHES, int(memory(config, layout).activations / held)))
    return min(times * layout.micro_batch, -(-n_images // layout.groups))


def exchanges(layout: RankLayout) -> int:
    """The number of tensors per block that sequence parallelism exchanges in a micro step."""
    if layout.sequence_parallel == 1:
        return 0
    return 8 if layout.checkpointing == "none" else 12


def exchanged_bytes(config: Shape, layout: RankLayout) -> float:
    """Bytes that one GPU sends in a micro step of sequence parallelism; 0 if each image is on one rank.

    The forward pass exchanges q, k, v and the output of attention, the backward pass their gradients, and recomputation repeats
    the forward pass: 8 or 12 tensors of [T / sp, C] per block. A rank sends sp - 1 of the sp parts of each.
    """
    sp = layout.sequence_parallel
    tokens = layout.micro_batch * config.n_ctx / sp
    return exchanges(layout) * tokens * config.n_embd * layout.weight_bytes * (sp - 1) / sp * config.n_layer


def checkpoint_bytes(n_parameters: int, stage: int = 3, weight_bytes: int = 2) -> int:
    """Bytes of one checkpoint: fp32 master weights and two moments, 12 B per parameter; below stage 3 also the weights."""
    return (12 + (weight_bytes if stage < 3 else 0)) * n_parameters


def copied_bytes(
    n_parameters: int, world_size: int, stage: int = 3, weight_bytes: int = 2, *, ranks: int, first: bool = True
) -> int:
    """Bytes of host memory for the copies that some ranks of a node hold while a checkpoint is written (--save async).

    Args:
        ranks: how many.
        first: whether rank 0 is among them, which also saves the weights below stage 3.
    """
    weights = weight_bytes * n_parameters if stage < 3 and first else 0
    return -(-12 * n_parameters * ranks // world_size) + weights
