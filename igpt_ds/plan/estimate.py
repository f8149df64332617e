"""The estimate of one training run: memory, time, money and disk, computed without a GPU.

In: a `Run` (a recipe joined with a ds_config), the machines, and the price. Out: an `Estimate`, whose `to_json` is a row of
`python -m igpt_ds.plan --json`. costs.py counts and step_time.py turns the counts into seconds. Called by options.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from igpt_ds.config import Recipe
from igpt_ds.ds_config import Run
from igpt_ds.plan.costs import (
    KEEP_LAST,
    LIVE_PARAMETERS,
    SPARE,
    VAL_EVERY,
    VAL_IMAGES,
    Memory,
    RankLayout,
    checkpoint_bytes,
    copied_bytes,
    memory,
    offloaded_bytes,
    parameters,
    train_flops_per_token,
    validation_batch,
    wire_bytes,
)
from igpt_ds.plan.step_time import Cluster, Step, step_time, validation_time

DOLLARS = 2.5  # for one hour of an H100 in 2026; providers ask 2 to 3.5
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def rank_layout(run: Run) -> RankLayout:
    """The parts of a run's configuration that its costs depend on."""
    zero = run.ds_config["zero_optimization"]
    accumulated = run.ds_config.get("data_types", {}).get("grad_accum_dtype", run.precision)
    return RankLayout(
        run.world_size,
        run.micro_batch,
        run.accumulation,
        run.sequence_parallel,
        run.stage,
        run.precision,
        run.activation_checkpointing,
        accumulation_bytes=BYTES.get(accumulated, 4),
        hpz=zero.get("zero_hpz_partition_size", 1),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        overlap=zero.get("overlap_comm", run.stage == 3),
        live=zero.get("stage3_max_live_parameters", LIVE_PARAMETERS),
        reuse=zero.get("stage3_max_reuse_distance", LIVE_PARAMETERS),
    )


@dataclass(frozen=True)
class Price:
    """What an estimate needs beside the run and the machines: the price of a GPU-hour, which checkpoints stay on disk, and how
    many images are validated how often."""

    dollars: float = DOLLARS  # per GPU-hour
    keep_last: int = KEEP_LAST
    keep_every: int = 0  # steps; 0: no checkpoint is kept for good
    val_images: int = VAL_IMAGES
    val_every: int = VAL_EVERY  # steps; 0: only before the first step and after the last
    background: bool = True  # whether checkpoints are written from copies in host memory (--save async)


@dataclass(frozen=True)
class Estimate:
    """The estimated costs of one run. Units are bytes, seconds and dollars unless a name says otherwise."""

    run: Run
    ds_config: str  # file name
    cluster: Cluster
    price: Price
    layout: RankLayout
    memory: Memory  # of one rank
    step: Step
    validation: float  # seconds of one

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.run.recipe

    @property
    def gpus(self) -> int:
        """Ranks, one GPU each."""
        return self.run.world_size

    @property
    def model(self) -> str:
        """The model's shape in words."""
        config = self.recipe.model
        return f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.n_px}x{config.n_px} pixels"

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return parameters(self.recipe.model, self.recipe.objective)

    @property
    def half_precision_sum(self) -> bool:
        """Whether the gradients of several micro steps are summed in half precision, which loses digits."""
        return self.layout.accumulation_bytes < 4 and self.run.accumulation > 1

    @property
    def node_gbit(self) -> float:
        """Gbit/s of all network cards of a node together."""
        return self.cluster.node_network * 8 / 1e9

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.recipe.batch_images * self.recipe.model.n_ctx

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, with the full square of attention."""
        return train_flops_per_token(self.recipe.model)

    @property
    def flops_per_token_causal(self) -> float:
        """Training FLOPs per token, with half of the square for "ar"; "bert" attends to the full square."""
        return train_flops_per_token(self.recipe.model, causal=self.recipe.objective == "ar")

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run, with the full square of attention."""
        return self.flops_per_token * self.tokens * self.recipe.steps

    @property
    def host_bytes_a_node(self) -> float:
        """Host memory of one node that the offloaded optimizer takes."""
        return offloaded_bytes(self.recipe.model, self.layout) * min(self.cluster.node_gpus, self.gpus)

    @property
    def copied_bytes_a_node(self) -> int:
        """Host memory of one node that --save async takes: that of the node of rank 0."""
        ranks = min(self.cluster.node_gpus, self.gpus)
        layout = self.layout
        found = copied_bytes(self.parameters, layout.world_size, layout.stage, layout.weight_bytes, ranks=ranks)
        return found if self.price.background else 0

    @property
    def usable_gpu_bytes(self) -> float:
        """Memory of one GPU without the share that fragmentation takes."""
        return (1 - SPARE) * self.cluster.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether a rank's memory fits its GPU."""
        return self.memory.fits(self.cluster.gpu.memory)

    @property
    def wire_bytes(self) -> float:
        """Bytes that one GPU sends in a step."""
        return wire_bytes(self.recipe.model, self.layout)

    @property
    def exposed_seconds(self) -> float:
        """Communication of a step that arithmetic does not hide, with the exchanges of sequence parallelism."""
        return self.step.exposed + self.step.exchange

    @property
    def mfu_causal(self) -> float:
        """Model FLOPs utilisation by `flops_per_token_causal`."""
        return self.step.mfu * (self.flops_per_token_causal / self.flops_per_token)

    @property
    def validation_batch(self) -> int:
        """Images that a rank, or a group that shares images, validates at once."""
        return validation_batch(self.recipe.model, self.layout, self.price.val_images)

    @property
    def validation_seconds(self) -> float:
        """Seconds of all validations."""
        every, steps = self.price.val_every, self.recipe.steps
        return self.validation * (1 + (math.ceil(steps / every) if every else 1))

    @property
    def validation_share(self) -> float:
        """Share of the run's time that validation takes."""
        return self.validation_seconds / (3600 * self.hours)

    @property
    def hours(self) -> float:
        """Hours of the whole run, with its validations."""
        return (self.recipe.steps * self.step.seconds + self.validation_seconds) / 3600

    @property
    def days(self) -> float:
        """Days of the whole run."""
        return self.hours / 24

    @property
    def gpu_hours(self) -> float:
        """Hours of the whole run times GPUs."""
        return self.hours * self.gpus

    @property
    def dollars(self) -> float:
        """Price of the whole run."""
        return self.gpu_hours * self.price.dollars

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint."""
        return checkpoint_bytes(self.parameters, self.layout.stage, self.layout.weight_bytes)

    @property
    def checkpoints_kept(self) -> int:
        """Checkpoints on disk at the end of the run."""
        return self.price.keep_last + (self.recipe.steps // self.price.keep_every if self.price.keep_every else 0)

    @property
    def disk_bytes(self) -> float:
        """Disk space for the checkpoints that are kept and one that is being written."""
        return self.checkpoint_bytes * (self.checkpoints_kept + 1)

    def to_json(self) -> dict[str, object]:
        """The estimate as a flat JSON object; its keys are the format of `--json`."""
        recipe, run, step = self.recipe, self.run, self.step
        return {
            "recipe": recipe.name,
            "objective": recipe.objective,
            "model": self.model,
            "parameters": self.parameters,
            "ds_config": self.ds_config,
            "gpu": self.cluster.gpu.name,
            "gpu_bytes": self.cluster.gpu.memory,
            "node_gpus": self.cluster.node_gpus,
            "node_gbit": self.node_gbit,
            "gpus": self.gpus,
            "batch_images": recipe.batch_images,
            "micro_batch": run.micro_batch,
            "accumulation": run.accumulation,
            "sequence_parallel": run.sequence_parallel,
            "stage": run.stage,
            "hpz": self.layout.hpz,
            "precision": run.precision,
            "rough": self.half_precision_sum,
            "activation_checkpointing": run.activation_checkpointing,
            "tokens": self.tokens,
            "steps": recipe.steps,
            "warmup_steps": recipe.warmup_steps,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_causal": self.flops_per_token_causal,
            "flops": self.flops,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "host_bytes_a_node": self.host_bytes_a_node,
            "copied_bytes_a_node": self.copied_bytes_a_node,
            "fits": self.fits,
            "wire_bytes": self.wire_bytes,
            "step_seconds": step.seconds,
            "arithmetic_seconds": step.arithmetic,
            "communication_seconds": step.communication,
            "exposed_seconds": self.exposed_seconds,
            "exchange_seconds": step.exchange,
            "host_seconds": step.host,
            "waiting_seconds": step.waiting,
            "leads": step.leads,
            "validation_images": self.price.val_images,
            "validation_batch": self.validation_batch,
            "validation_share": self.validation_share,
            "mfu": step.mfu,
            "mfu_causal": self.mfu_causal,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "dollars_per_gpu_hour": self.price.dollars,
            "dollars": self.dollars,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints_kept": self.checkpoints_kept,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class NoPlan:
    """A number of GPUs on which the run cannot be laid out, and the reason."""

    gpus: int
    reason: str

    def to_json(self) -> dict[str, object]:
        """The row of `--json`."""
        return asdict(self)


def estimate(run: Run, ds_config: str, cluster: Cluster, price: Price) -> Estimate:
    """Estimates one run; `ds_config` is the name of its file."""
    config, layout = run.recipe.model, rank_layout(run)
    causal = run.recipe.objective == "ar"
    step = step_time(config, layout, cluster, causal)
    validation = validation_time(config, layout, cluster, price.val_images, causal)
    return Estimate(run, ds_config, cluster, price, layout, memory(config, layout), step, validation)
