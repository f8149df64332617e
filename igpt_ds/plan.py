"""What a run costs, by arithmetic alone: parameters, FLOPs, bytes. `python -m igpt_ds.plan --recipe igpt_xl_ar_64 --gpus 64`.

Imports nothing but the standard library and the recipes; called by train.py (MFU, --dry_run) and from the shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from igpt_ds import cli
from igpt_ds.config import CHECKPOINTING, ModelConfig, Recipe, get_recipe
from igpt_ds.ds_config import batch_layout

GIB = 2**30
GPU_BYTES = 80e9  # of an H100 or A100

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


def parameters(config: ModelConfig, objective: str = "ar") -> int:
    """The exact number of weights: blocks of 12 C^2 + 2 C, two [V, C] tables, T positions, ln_f, and sos unless for "bert"."""
    C, L = config.n_embd, config.n_layer
    return L * (12 * C * C + 2 * C) + 2 * config.n_vocab * C + config.n_ctx * C + (2 if objective == "ar" else 1) * C


def forward_flops_per_token(config: ModelConfig, causal: bool) -> float:
    """FLOPs of a forward pass per token: 2 per matmul weight and 4 C T per layer of attention, half of that if causal.

    The full square is the convention of PaLM, nanoGPT and llm-foundry; the causal half counts what is computed.
    """
    C, L = config.n_embd, config.n_layer
    attention = 4 * L * C * config.n_ctx * (0.5 if causal else 1.0)
    return 2 * (12 * L * C * C + config.n_vocab * C) + attention


def train_flops_per_token(config: ModelConfig, causal: bool = False) -> float:
    """Forward and backward: three times the forward pass. Recomputation is not counted, so this is MFU's numerator."""
    return 3 * forward_flops_per_token(config, causal)


def peak_flops(device_name: str) -> float | None:
    """The printed dense bf16 peak of a GPU, or None for a device not in the table."""
    matches = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds under ZeRO-3, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(config: ModelConfig, world_size: int, micro_batch: int, precision: str, checkpointing: str) -> Memory:
    """Model states sharded over the ranks, and the activations of one micro step.

    bf16: weights 2 B, gradients accumulated in fp32 4 B, master weights and two moments 12 B each parameter. fp32: 4, 4, 8
    and a 4-byte flat copy. Activations per token and block: "none" keeps 16 C (each norm's input and output, q k v, attention,
    and 4 C on either side of quick-GELU), "selective" 9 C (the block's input, q k v, attention, and before quick-GELU), "full"
    the 1 C of the block's input; what is recomputed makes one block complete again, beside 10 C of gradients in flight.
    """
    N = parameters(config)
    half = precision == "bf16"
    size = 2 if half else 4
    C, L = config.n_embd, config.n_layer
    kept = {"none": 16, "selective": 9, "full": 1}[checkpointing]
    held = kept * L + (16 - kept) + 10
    tokens = micro_batch * config.n_ctx
    activations = tokens * (held * C * size + 10 * config.n_vocab)
    return Memory(size * N / world_size, 4 * N / world_size, 12 * N / world_size, activations)


def recommended_checkpointing(
    config: ModelConfig, world_size: int, micro_batch: int, precision: str, gpu_bytes: float = GPU_BYTES
) -> str | None:
    """The mode that recomputes least among those that fit a GPU with a tenth to spare for buffers; None where none does."""
    fits = (
        mode
        for mode in CHECKPOINTING
        if memory_per_rank(config, world_size, micro_batch, precision, mode).total < 0.9 * gpu_bytes
    )
    return next(fits, None)


def _advice(config: ModelConfig, world_size: int, micro_batch: int, precision: str, gpu_bytes: float) -> str:
    sizes = {mode: memory_per_rank(config, world_size, micro_batch, precision, mode).total / GIB for mode in CHECKPOINTING}
    choice = recommended_checkpointing(config, world_size, micro_batch, precision, gpu_bytes)
    listed = ", ".join(f"{mode} {size:.1f}" for mode, size in sizes.items())
    return f"{choice or 'more ranks or a smaller micro batch'} on a GPU of {gpu_bytes / 1e9:.0f} GB ({listed} GiB)"


def describe(
    recipe: Recipe,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    precision: str,
    checkpointing: str,
    gpu_bytes: float = GPU_BYTES,
) -> str:
    """A plan in plain text: what is trained, what it costs, what each rank holds, and what it should recompute."""
    config = recipe.model
    flops, causal = (train_flops_per_token(config, causal=kind) for kind in (False, True))
    tokens = recipe.batch_images * config.n_ctx
    memory = memory_per_rank(config, world_size, micro_batch, precision, checkpointing)
    days = recipe.steps * tokens * flops / (0.5 * PEAK_FLOPS["H100"] * world_size) / 86400
    half = f", {causal / 1e9:.3f} G (causal half)" if recipe.objective == "ar" else ""
    return "\n".join(
        (
            f"recipe          {recipe.name}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
            f"{config.n_px}x{config.n_px} pixels of {config.n_vocab} colours",
            f"parameters      {parameters(config, recipe.objective):,}",
            f"batch           {recipe.batch_images} images = {world_size} ranks x micro batch {micro_batch} x "
            f"accumulation {accumulation}; {tokens:,} tokens a step, {recipe.steps:,} steps",
            f"training FLOPs  {flops / 1e9:.3f} G a token (full attention){half}; {flops * tokens * recipe.steps:.3e} in all",
            f"memory a rank   {memory.total / GIB:.2f} GiB = weights {memory.weights / GIB:.2f} + gradients "
            f"{memory.gradients / GIB:.2f} + optimizer {memory.optimizer / GIB:.2f} + activations "
            f"{memory.activations / GIB:.2f} ({precision}, activation checkpointing {checkpointing}), and buffers",
            f"recommended     activation checkpointing {_advice(config, world_size, micro_batch, precision, gpu_bytes)}",
            f"checkpoint      {12 * parameters(config) / 1e9:.2f} GB each",
            f"time            {days:.1f} days on {world_size} H100 at an assumed MFU of 50 %",
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a recipe on a number of GPUs."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--recipe", required=True, help="name of a recipe")
    parser.add_argument("--gpus", type=int, default=1, help="number of ranks")
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step; all of them when left out")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and activations")
    parser.add_argument("--activation_checkpointing", choices=CHECKPOINTING, default="full", help="see memory a rank")
    parser.add_argument("--gpu_memory", type=float, default=GPU_BYTES / 1e9, help="GB of one GPU, for the recommendation")
    args = parser.parse_args(argv)
    recipe = get_recipe(args.recipe)
    if args.gpus < 1:
        raise ValueError(f"gpus={args.gpus} must be at least 1")
    if not args.gpu_memory > 0:
        raise ValueError(f"gpu_memory={args.gpu_memory:g} must be a positive number of GB")
    micro_batch, accumulation = batch_layout(recipe.batch_images, args.micro_batch, args.gpus)
    gpu_bytes, mode = args.gpu_memory * 1e9, args.activation_checkpointing
    print(describe(recipe, args.gpus, micro_batch, accumulation, args.precision, mode, gpu_bytes))


if __name__ == "__main__":
    cli.run(main)
