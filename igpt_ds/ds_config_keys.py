"""Keys of a ds_config that are refused: unknown ones, those that DeepSpeed removed, and values that would break a run.

Called by ds_config.py and train/engine.py. DeepSpeed is not needed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from igpt_ds.errors import InputError

# Keys that DeepSpeed 0.19 removed or renamed; many files on the web have them.
_NOTHING = "nothing replaces it; remove the key"
_REMOVED = {
    "amp": "use bf16 or fp16",
    "bfloat16": "its name is bf16",
    "compression_training": _NOTHING,
    "curriculum_learning": _NOTHING,
    "eigenvalue": _NOTHING,
    "elasticity": "--resume auto continues on any number of ranks; remove the key",
    "graph_harvesting": _NOTHING,
    "nebula": "this project writes its own checkpoints; remove the key",
    "progressive_layer_drop": _NOTHING,
    "quantize_training": _NOTHING,
    "sparse_attention": _NOTHING,
    "sparse_gradients": _NOTHING,
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "use zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.mics_hierarchical_params_gather": "use zero_optimization.zero_hpz_partition_size",
    "zero_optimization.mics_shard_size": "use zero_optimization.zero_hpz_partition_size",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "tools/consolidate.py gathers the weights; remove the key",
    "zero_optimization.zeropp_loco_param": _NOTHING,
}
_DTYPES = (None, "fp32", "bf16", "fp16")
_KNOWN_DTYPES = "must be fp32, bf16 or fp16"
_NVME = "is not supported: DeepSpeed copies those files into a checkpoint by itself, without a sha256; use cpu"
# Keys that DeepSpeed reads but that break a run or change nothing: (dotted name, test of a harmful value, why).
_REFUSED: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("activation_checkpointing", lambda value: True, "has no effect here: igpt_ds.activation_checkpointing decides; remove it"),
    ("checkpoint.load_universal", bool, "breaks --resume auto: checkpoints of this project are not universal ones; remove it"),
    ("communication_data_type", lambda value: value not in _DTYPES, _KNOWN_DTYPES),
    ("data_types.grad_accum_dtype", lambda value: value not in _DTYPES, _KNOWN_DTYPES),
    ("prescale_gradients", bool, "fails at ZeRO stage 3 and changes nothing at the others; remove it"),
    ("seq_parallel_communication_data_type", lambda value: value not in _DTYPES, _KNOWN_DTYPES),
    ("zero_optimization.offload_optimizer.device", lambda value: value == "nvme", _NVME),
    ("zero_optimization.offload_param.device", lambda value: value == "nvme", _NVME),
    (
        "zero_optimization.sub_group_size",
        lambda value: not isinstance(value, int) or isinstance(value, bool) or value < 1,
        "must be a whole number of at least 1: the number of weights per optimizer sub-group",
    ),
)


def refuse_harmful(values: Mapping[str, object], path: Path) -> None:
    """Refuses values that DeepSpeed accepts but that break a run of this project or change nothing."""
    for name, harmful, why in _REFUSED:
        *sections, key = name.split(".")
        where: object = values
        for section in sections:
            where = where.get(section) if isinstance(where, Mapping) else None
        if isinstance(where, Mapping) and key in where and harmful(where[key]):
            raise InputError(f"ds_config {path}: {name}={where[key]!r} {why}")


def refuse_removed(section: Iterable[str], path: Path, prefix: str = "") -> None:
    """Refuses keys of a section that DeepSpeed 0.19 removed, and names the replacement."""
    for key in section:
        if prefix + key in _REMOVED:
            raise InputError(f"ds_config {path}: DeepSpeed 0.19 has no {prefix + key!r} any more; {_REMOVED[prefix + key]}")


def refuse_unknown(section: Iterable[str], known: Iterable[str], path: Path, prefix: str = "") -> None:
    """Refuses unknown keys of a section, and names the nearest known key.

    Args:
        prefix: the section's dotted name and a final dot; empty for the top level.
    """
    refuse_removed(section, path, prefix)
    names = list(known)
    for key in section:
        if key not in names:
            nearest = difflib.get_close_matches(key, names, 1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise InputError(f"ds_config {path}: unknown key {prefix + key!r}{hint}; known: {', '.join(names)}")
