"""The door to DeepSpeed: a run enters, a ZeRO-3 engine around a freshly built transformer leaves. Called by train.py."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_ds import dist
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import Run
from igpt_ds.model.transformer import Transformer

# What a run minimises: (engine, micro batch on its device) -> a scalar. Pre-training and fine-tuning differ in this alone.
LossFunction = Callable[[Any, Batch], Tensor]


def start_ranks() -> torch.device:
    """Joins the process group and returns this rank's device: its GPU, or the CPU where there is none."""
    dist.map_environment(os.environ)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.13 deprecates names of collectives that DeepSpeed 0.19 still calls, and says so at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce at its first start, and fail without ninja. gloo serves.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(dist.local_rank())
    return torch.device("cuda", dist.local_rank())


def build_engine(run: Run) -> Any:
    """A DeepSpeedEngine around a new transformer, its weights drawn from the recipe's seed and sharded as they are drawn."""
    import deepspeed

    seed_everything(run.recipe.seed)
    with deepspeed.zero.Init(config_dict_or_path=run.ds_config):
        model = Transformer(run.recipe.model, run.activation_checkpointing, run.recipe.objective, run.recipe.init)
    settings: dict[str, Any] = {"lr": run.recipe.lr, "betas": run.recipe.betas, "eps": run.recipe.eps}
    if run.ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(model.parameters(), adamw_mode=False, **settings)
    else:
        optimizer = torch.optim.Adam(model.parameters(), fused=torch.cuda.is_available(), **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.ds_config)
    return engine


def take_step(engine: Any, micro_batches: list[Batch], loss_function: LossFunction, lr: float) -> Tensor:
    """One optimizer step: forward and backward over the micro batches, then the update at this learning rate.

    Returns:
        This rank's loss, the mean over its micro batches, as a scalar tensor on its device.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        loss = loss_function(engine, batch)
        engine.backward(loss)
        engine.step()  # updates only after the last micro batch of the accumulation
        total += loss.detach()
    return total / len(micro_batches)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_states() -> dict[str, Any]:
    """The state of every generator of this rank, to be stored in a checkpoint."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """The inverse of `rng_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
