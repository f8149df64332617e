"""The effective DeepSpeed configuration. In: an engine. Out: the values it uses. A difference from the ds_config is an error.

DeepSpeed adds defaults, changes them between releases and silently overrides some keys; only its objects show the result.
Called by train/session.py after the engine is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.ds_config import Run
from igpt_ds.train.engine_protocol import Engine

_TOP = (
    "communication_data_type",
    "disable_python_gc",
    "dump_state",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_SECTIONS = {
    "activation_checkpointing": "activation_checkpointing_config",
    "bf16": "bfloat16_config",
    "compile": "compile_config",
    "flops_profiler": "flops_profiler_config",
    "fp16": "float16_config",
    "zero_optimization": "zero_config",
}


def effective_config(engine: Engine) -> dict[str, object]:
    """The values that an engine uses, as JSON with the keys of a ds_config; "engine" describes the built engine."""
    config = engine._config
    values = {name: getattr(config, name) for name in _TOP}
    for name, attribute in _SECTIONS.items():
        section = getattr(config, attribute)
        values[name] = section.model_dump(by_alias=True) if hasattr(section, "model_dump") else vars(section)
    weights, gradients = engine.get_data_types()
    # The optimizer's own value counts, if it has one.
    zero, optimizer = values["zero_optimization"], engine.optimizer
    for name in ("reduce_bucket_size", "sub_group_size"):
        zero[name] = int(getattr(optimizer, name, zero[name]))
    values["gradient_clipping"] = float(getattr(optimizer, "clip_grad", values["gradient_clipping"]))
    values["data_types"] = {"grad_accum_dtype": _short(gradients)}
    values["checkpoint"] = {"tag_validation": _tag_validation(config)}
    values["comms_logger"] = {"enabled": config.comms_config.comms_logger_enabled}
    values["torch_autocast"] = {"enabled": config.torch_autocast_enabled, "dtype": config.torch_autocast_dtype}
    values["engine"] = {
        "weights": _short(weights),
        "world_size": dist.world_size(),
        "optimizer": type(optimizer).__name__,
        "inner_optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "communication": _short(engine.communication_data_type),
    }
    plain: dict[str, object] = json.loads(json.dumps(values, default=_short))
    return plain


def _short(value: Any) -> str:
    words = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return words.get(str(value), str(value))


def _tag_validation(config: Any) -> str:
    if not config.checkpoint_tag_validation_enabled:
        return "Ignore"
    return "Fail" if config.checkpoint_tag_validation_fail else "Warn"


def differences(
    asked: Mapping[str, object], effective: Mapping[str, object], prefix: str = ""
) -> list[tuple[str, object, object]]:
    """(dotted name, asked, effective) of every value that differs. Values that DeepSpeed does not show are left out."""
    found = []
    for name, value in asked.items():
        if name not in effective:
            continue
        other = effective[name]
        if isinstance(value, dict) and isinstance(other, dict):
            found += differences(value, other, f"{prefix}{name}.")
        elif _plain(value) != _plain(other):
            found.append((prefix + name, value, other))
    return found


def _plain(value: object) -> object:
    if isinstance(value, str):
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(value.lower(), value.lower())
    return value


def check_effective(run: Run, effective: Mapping[str, object]) -> None:
    """Refuses an engine that does not use the values of its ds_config.

    Args:
        effective: the result of `effective_config`.

    Raises:
        SharedError: names the first value that differs, on every rank.
    """
    asked = dict(run.ds_config) | {"engine": {"weights": run.precision, "world_size": run.world_size}}
    for name, wanted, found in differences(asked, effective):
        raise SharedError(f"ds_config has {name}={wanted!r} but DeepSpeed uses {found!r}; write {found!r} or remove the key")
