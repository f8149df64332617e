"""The interface to DeepSpeed. In: a run. Out: a ZeRO engine around a fresh or pre-trained transformer.

Called by train/session.py and train/loop.py.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_ds import devices, dist
from igpt_ds.cli import SharedError
from igpt_ds.config import Finetune, Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import DsConfig, Run
from igpt_ds.ds_config_keys import refuse_unknown
from igpt_ds.errors import InputError
from igpt_ds.launcher import map_environment
from igpt_ds.model.classifier import CLASS_HEAD, Classifier
from igpt_ds.model.dropout import Dropout
from igpt_ds.model.store import open_weights
from igpt_ds.model.transformer import Transformer
from igpt_ds.threads import keep_freed_memory
from igpt_ds.train import ds_patches
from igpt_ds.train.engine_protocol import Engine
from igpt_ds.train.safety.build_locks import wait_for_builds

# The loss that a run minimises: (engine, micro batch on its device) -> a scalar. Pre-training and fine-tuning differ only in it.
LossFunction = Callable[[Engine, Batch], Tensor]


def start_ranks(time_limit: timedelta = dist.TIME_LIMIT) -> torch.device:
    """Joins the process group and returns this rank's device: its GPU, or the CPU if there is none or it is asked for.

    Args:
        time_limit: of each collective.

    Raises:
        SharedError: on every rank, if a rank has GPUs that torch cannot use, or the devices of the ranks do not fit together.
    """
    _quiet()
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    map_environment(os.environ)
    accelerator = get_accelerator()
    device, arrival = devices.arrive(dist.local_rank(), accelerator.device_name())
    dist.join(accelerator.communication_backend_name(), time_limit, arrival)
    if device.type != "cpu":
        dist.tell_device_index(device.index)

    # On a CPU DeepSpeed would compile a shared-memory all-reduce at its first start, and fail without ninja. gloo does the same.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, timeout=time_limit)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _quiet() -> None:
    # Settings that must precede the import of DeepSpeed, and fewer log lines.
    chosen = "DS_ACCELERATOR" in os.environ or torch.accelerator.is_available()
    if not chosen:
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed logs a warning
    # torch 2.13 deprecates names of collectives that DeepSpeed 0.19 still calls, and warns at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    try:
        import deepspeed
    except ValueError as error:  # an unknown DS_ACCELERATOR, or one whose package is missing
        raise InputError(f"DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR')}: {error}; unset DS_ACCELERATOR") from None

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not chosen:
        del os.environ["DS_ACCELERATOR"]  # DeepSpeed has read it. It is the user's word, which `refuse_idle_gpus` reads


def check_ds_config(values: DsConfig, path: Path) -> None:
    """Checks the sections of a ds_config before anything is built.

    Args:
        values: the result of `load_ds_config`, which has checked the top level.

    Raises:
        ValueError: a key that DeepSpeed does not know, with the nearest that it knows, or a wrong value.
    """
    _quiet()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
    }
    plain = {  # DeepSpeed has no model of these sections: it looks up the names it knows
        "checkpoint": ["load_universal", "parallel_write", "tag_validation", "use_node_local_storage", "writer"],
        "data_types": ["buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"],
        "flops_profiler": list(vars(DeepSpeedFlopsProfilerConfig({}))),
        "torch_autocast": ["dtype", "enabled", "lower_precision_safe_modules"],
    }
    for name, known in plain.items():
        refuse_unknown(_section(values, name, path), known, path, f"{name}.")
    for name, model in models.items():
        section = _section(values, name, path)
        _refuse_unknown_fields(section, model, path, f"{name}.")
        try:
            model(**section)
        except (ValueError, AssertionError) as error:
            first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
            where = ".".join([name, *map(str, first["loc"])])
            raise InputError(f"ds_config {path}: {where}: {first['msg']}") from None


def _section(values: Mapping[str, object], name: str, path: Path) -> dict[str, object]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise InputError(f"ds_config {path}: {name!r} must be an object, not {section!r}")
    return section


def _refuse_unknown_fields(section: Any, model: Any, path: Path, prefix: str) -> None:
    if not isinstance(section, dict):
        return  # the model says what is wrong with it
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    fields = {name: field for name, field in fields.items() if not (field.json_schema_extra or {}).get("deprecated")}
    refuse_unknown(section, fields, path, prefix)
    for name, value in section.items():
        kinds = [fields[name].annotation, *typing.get_args(fields[name].annotation)]
        for inner in (kind for kind in kinds if hasattr(kind, "model_fields")):
            _refuse_unknown_fields(value, inner, path, f"{prefix}{name}.")


def build_model(run: Run) -> Transformer:
    """A new transformer on this rank, with weights drawn from the recipe's seed. Stage 3 shards each weight once it is drawn.

    First divides the ranks into the run's sequence groups.
    """
    import deepspeed

    if run.stage == 3:
        ds_patches.apply()
    dist.start_sequence_groups(run.sequence_parallel)
    seed_everything(run.recipe.seed)
    with deepspeed.zero.Init(config_dict_or_path=run.ds_config, enabled=run.stage == 3):
        recipe, group = run.recipe, dist.sequence_group()
        more: dict[str, Any] = {name: getattr(recipe, name) for name in ("objective", "init", "head_std")}
        more |= {"activation_checkpointing": run.activation_checkpointing, "group": group}
        if recipe.finetune is None:
            model = Transformer(recipe.model, **more)
        else:
            model = Classifier(recipe.model, recipe.finetune.n_classes, recipe.finetune.layer, **more)
    if recipe.model.tied_embeddings and run.stage == 3:  # the head reads the sharded matrix of another module
        deepspeed.zero.register_external_parameter(model.head, model.wte.weight)
    return model


def take_weights(model: Transformer, model_dir: Path, stage: int) -> None:
    """Copies the weights of a model dir, except the class head, into a model made by `build_model`.

    Under stage 3 rank 0 reads one tensor at a time and sends it to the other ranks; each keeps its part, so no rank holds more
    than one tensor. A model in bf16 or fp16 rounds the stored float32 weights; the optimizer's copy starts from the rounded ones.
    """
    import deepspeed

    with open_weights(model_dir) as stored, torch.no_grad():
        for name, weight in model.named_parameters():
            if name == CLASS_HEAD:
                continue
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=stage == 3):
                if stage < 3 or dist.rank() == 0:
                    weight.copy_(stored(name))


def build_engine(run: Run, pretrained: Path | None = None) -> Engine:
    """A DeepSpeedEngine around a new transformer.

    Args:
        pretrained: the model dir whose weights training starts from; None for fresh weights.

    DeepSpeed does not know the sequence groups: it shards over all ranks and averages gradients over all of them. That is right,
    because `image_loss` gives each rank an equal share of an image's loss.
    """
    import deepspeed

    wait_for_builds()
    if run.precision == "fp16" and devices.current_device().type == "cpu":
        raise SharedError("DeepSpeed supports fp16 only on a GPU; use a --ds_config in bf16 or fp32")
    model = build_model(run)
    if pretrained is not None:
        take_weights(model, pretrained, run.stage)
    offload = run.ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    optimizer = build_optimizer(model, run.recipe, offload)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.ds_config)
    return engine


def build_optimizer(model: Transformer, recipe: Recipe, offload: bool = False) -> torch.optim.Optimizer:
    """Adam, or with weight_decay AdamW (decoupled: each step multiplies a weight by 1 - lr * weight_decay).

    Matrices that the loss reads decay, as in GPT-2's ports: the products, wte, wpe and the heads, but not the gains of the norms
    and sos. They are two groups of the optimizer; without weight decay all weights are one. A tied matrix is one weight.

    Args:
        offload: the optimizer runs on the host (DeepSpeedCPUAdam).
    """
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if recipe.weight_decay:
        decays = {weight: _decays(name, weight, recipe.finetune) for name, weight in model.named_parameters()}
        groups = [
            {"params": [weight for weight, found in decays.items() if found is wanted], "weight_decay": decay}
            for wanted, decay in ((True, recipe.weight_decay), (False, 0.0))
        ]
    values: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=recipe.weight_decay > 0, **values)
        return cpu_adam
    adam = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
    return adam(groups, **values, fused=devices.current_device().type != "cpu")


def _decays(name: str, weight: nn.Parameter, finetune: Finetune | None) -> bool:
    """Whether weight decay changes a weight: a matrix that the loss reads. ZeRO has gradients of zero for the others."""
    if finetune is not None and finetune.loss == "clf":
        block = re.match(r"blocks\.(\d+)\.", name)
        if name == "head.weight" or (block and int(block[1]) >= finetune.layer):
            return False
    return len(getattr(weight, "ds_shape", weight.shape)) > 1  # ZeRO-3 leaves an empty vector and the shape of the whole


def with_dropout(engine: Engine, recipe: Recipe, batch: Batch) -> Callable[..., Any]:
    """The network of a training loss: the engine, with the recipe's dropout by the images' positions in the stream."""
    if not recipe.dropout:
        return engine
    return partial(
        engine, dropout=Dropout(recipe.dropout, recipe.seed, batch.positions, recipe.model.n_ctx, dist.sequence_group())
    )


def take_step(
    engine: Engine,
    micro_batches: list[Batch],
    loss_function: LossFunction,
    lr: float,
    before_update: Callable[[], None] = lambda: None,
) -> Tensor:
    """One optimizer step: forward and backward over the micro batches, then the update at this learning rate.

    Args:
        before_update: called when the gradients are complete.

    Returns:
        This rank's loss, the mean over its micro batches, as a scalar tensor on its device.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=engine.device)
    for number, batch in enumerate(micro_batches, start=1):
        loss = loss_function(engine, batch)
        # An infinite loss may have finite gradients. NaN has none, so DeepSpeed skips the update on all ranks.
        engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        if number == len(micro_batches):
            before_update()
        engine.step()  # updates only after the last micro batch of the accumulation
        total += loss.detach()
    return total / len(micro_batches)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
