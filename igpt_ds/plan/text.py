"""A plan in words: what `plan.estimate` knows enters, plain text to be read or pasted leaves. Called by plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GIB = 2**30


def describe(options: Sequence[dict[str, Any]], spare: float) -> str:
    """The first of several ways to run a recipe, and why not the others.

    Args:
        options: rows of `plan.estimate`, the recommended one first.
        spare: share of a GPU's memory that must stay free.
    """
    one = options[0]
    lines = [*_what(one), *_layout(one), *_memory(one, spare), *_time(one)]
    if len(options) > 1:
        lines += [
            "",
            "The ds_configs, each with its fastest layout that fits, or else the one that needs least memory:",
            *_choices(options),
        ]
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _what(one: dict[str, Any]) -> list[str]:
    causal = f", {one['flops_per_token_causal'] / 1e9:.3f} G (causal half)" if one["objective"] == "ar" else ""
    return [
        _line("recipe", f"{one['recipe']}: {one['model']}"),
        _line("parameters", f"{one['parameters']:,}"),
        _line(
            "training FLOPs", f"{one['flops_per_token'] / 1e9:.3f} G a token (full attention){causal}; {one['flops']:.3e} in all"
        ),
    ]


def _layout(one: dict[str, Any]) -> list[str]:
    shared = one["sequence_parallel"]
    groups = one["gpus"] // shared
    ranks = (
        f"{groups} rank{'s' if groups > 1 else ''}" if shared == 1 else f"{groups} groups of {shared} ranks that share an image"
    )
    flags = f"--ds_config {one['ds_config']} --micro_batch {one['micro_batch']}"
    cast = " (summed in half precision: choose another ds_config)" if one["rough"] else ""
    return [
        _line(
            "batch",
            f"{one['batch_images']} images = {ranks} x micro batch {one['micro_batch']} x "
            f"accumulation {one['accumulation']}{cast}; "
            f"{one['tokens']:,} tokens a step, {one['steps']:,} steps, of which {one['warmup_steps']:,} warm up",
        ),
        _line("ds_config", f"{flags}" + (f" --sequence_parallel {shared}" if shared > 1 else "")),
        _line("", f"ZeRO stage {one['stage']}, {one['precision']}, activation checkpointing {one['activation_checkpointing']};"),
        _line("", _reason(one)),
    ]


def _reason(one: dict[str, Any]) -> str:
    kept = {
        "none": "all activations are kept, so that nothing is computed twice",
        "selective": "half of the activations are kept, and what is cheap is computed twice",
        "full": "one tensor a block is kept, and each block is computed twice",
    }[one["activation_checkpointing"]]
    if one["gpus"] == 1:
        return kept
    seconds = one["communication_seconds"]
    hidden = 1 - (one["exposed_seconds"] - one["exchange_seconds"]) / seconds
    return f"{kept}; {100 * hidden:.0f} % of {seconds:.3f} s of communication hide behind arithmetic"


def _memory(one: dict[str, Any], spare: float) -> list[str]:
    parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in one["memory"].items() if name != "total")
    limit = (1 - spare) * one["gpu_bytes"] / GIB
    verdict = "fits" if one["fits"] else "DOES NOT FIT"
    return [
        _line("memory a GPU", f"{one['memory']['total'] / GIB:.2f} GiB = {parts}"),
        *([_line("", f"and {host / GIB:.1f} GiB of host memory a node")] if (host := one["host_bytes_a_node"]) else []),
        _line("", f"{verdict} the {limit:.1f} GiB that one {one['gpu']} of {one['gpu_bytes'] / 1e9:.0f} GB leaves"),
    ]


def _time(one: dict[str, Any]) -> list[str]:
    kept = one["checkpoints_kept"]
    return [
        _line(
            "network",
            f"{one['wire_bytes'] / 1e9:.1f} GB a GPU and step; {one['node_gbit']:,.0f} Gbit/s a node of {one['node_gpus']}",
        ),
        _line(
            "step",
            f"{one['step_seconds']:.3f} s = arithmetic {one['arithmetic_seconds']:.3f} + communication not hidden "
            f"{one['exposed_seconds']:.3f} + update {_update(one):.3f}",
        ),
        _line("MFU expected", f"{100 * one['mfu']:.1f} % (full attention), {100 * one['mfu_causal']:.1f} % (causal)"),
        _line("time", f"{one['days']:.1f} days on {one['gpus']} {one['gpu']}: {one['gpu_hours']:,.0f} GPU-hours"),
        _line("cost", f"${one['dollars']:,.0f} at ${one['dollars_per_gpu_hour']:g} a GPU-hour"),
        _line(
            "disk",
            f"{one['checkpoint_bytes'] / 1e9:.2f} GB a checkpoint; {kept} kept and one being written: "
            f"{one['disk_bytes'] / 1e9:,.1f} GB",
        ),
    ]


def _update(one: dict[str, Any]) -> float:
    return float(one["step_seconds"] - one["arithmetic_seconds"] - one["exposed_seconds"])


def _choices(options: Sequence[dict[str, Any]]) -> list[str]:
    rows = [("ds_config", "micro x acc x sp", "GiB", "step s", "MFU %", "days", "")]
    rows += [(one["ds_config"], *_numbers(one), _why(one, options[0])) for one in options]
    return _columns(rows)


def _numbers(one: dict[str, Any]) -> tuple[str, ...]:
    split = f"{one['micro_batch']} x {one['accumulation']} x {one['sequence_parallel']}"
    gib = f"{one['memory']['total'] / GIB:.1f}"
    return split, gib, f"{one['step_seconds']:.3f}", f"{100 * one['mfu']:.1f}", f"{one['days']:.1f}"


def _why(one: dict[str, Any], best: dict[str, Any]) -> str:
    if not one["fits"]:
        return "does not fit"
    if one is best:
        return "recommended"
    more = one["step_seconds"] / best["step_seconds"] - 1
    if abs(more) < 0.001:
        return "as fast"
    return f"{100 * more:.1f} % slower" if more > 0 else f"{-100 * more:.1f} % faster, too little for its risks"


def describe_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each number of GPUs, of its recommended way to run.

    Args:
        rows: of `plan.estimate`, or {"gpus", "reason"} where nothing works.
    """
    head = ("GPUs", "ds_config", "micro x acc x sp", "GiB", "step s", "MFU %", "days", "GPU-hours", "dollars")
    lines: list[tuple[str, ...]] = [head]
    for one in rows:
        if "reason" in one:
            lines.append((str(one["gpus"]), one["reason"]))
        elif not one["fits"]:
            lines.append((str(one["gpus"]), f"nothing fits; {one['ds_config']} comes nearest", *_numbers(one)[:2]))
        else:
            money = (f"{one['gpu_hours']:,.0f}", f"{one['dollars']:,.0f}")
            lines.append((str(one["gpus"]), one["ds_config"], *_numbers(one), *money))
    known = [one for one in rows if "reason" not in one]
    title = [f"{known[0]['recipe']} on {known[0]['gpu']}, {known[0]['node_gbit']:,.0f} Gbit/s a node"] if known else []
    return "\n".join([*title, *_columns(lines)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    # The first row is the widest; shorter ones, which tell why there is nothing to tell, do not stretch its columns.
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(word) for word in column) for column in zip(*whole, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip() for row in rows]
