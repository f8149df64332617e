"""The ds_configs that come with the package. In: a name or a path. Out: a file, or the candidates of a plan."""

from __future__ import annotations

from pathlib import Path

from igpt_ds.command_line.nearest import did_you_mean, nearest, unknown_value
from igpt_ds.ds_config import SHIPPED, DsConfig, load_ds_config
from igpt_ds.errors import InputError


def ds_config_names() -> list[str]:
    """The names that --ds_config takes beside paths."""
    return [path.stem for path in sorted(SHIPPED.glob("*.json"))]


def find_ds_config(text: str) -> Path:
    """The file of --ds_config: the path of a file, or the name of a shipped ds_config, such as zero3_bf16.

    Raises:
        ValueError: a word without a directory that is neither; the error names the nearest.
    """
    path = Path(text)
    name = path.name.removesuffix(".json")
    if not path.is_file() and str(path.parent) in (".", SHIPPED.name):
        if name not in ds_config_names() and path.suffix:
            raise InputError(f"{path} does not exist{did_you_mean(nearest(name, ds_config_names()))}")
        if name not in ds_config_names():
            raise InputError(f"{unknown_value(name, ds_config_names())}, or the path of a file")
        return SHIPPED / f"{name}.json"
    return path


def shipped(checkpointing: str | None = None) -> dict[str, DsConfig]:
    """The bf16 ds_configs by file name, without those that fix sequence parallelism, which the plan varies itself.

    Args:
        checkpointing: only those with this mode of activation checkpointing.
    """
    found = {path.name: load_ds_config(path) for path in sorted(SHIPPED.glob("*.json"))}
    wanted = {
        name: values
        for name, values in found.items()
        if values.get("bf16", {}).get("enabled") and "sequence_parallel" not in values.get("igpt_ds", {})
    }
    if checkpointing:
        modes = {name: values.get("igpt_ds", {}).get("activation_checkpointing", "none") for name, values in wanted.items()}
        wanted = {name: values for name, values in wanted.items() if modes[name] == checkpointing}
    return wanted
