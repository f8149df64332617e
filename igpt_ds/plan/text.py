"""A plan as plain text. In: estimates. Out: lines for the terminal or a proposal. Called by command.py and recipes.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from igpt_ds.console import count, duration
from igpt_ds.plan.costs import FAST_KEPT, GIB, LIVE_PARAMETERS, keeps_weights
from igpt_ds.plan.estimate import Estimate, NoPlan
from igpt_ds.plan.goodput import GPU_MTBF, NODE_DISK, best_interval


def describe_plan(options: Sequence[Estimate]) -> str:
    """The recommended way to run a recipe, and a table that compares it with the others.

    Args:
        options: at least one estimate, the recommended one first.
    """
    one = options[0]
    lines = [*_what(one), *_layout(one), *_memory(one), *_time(one)]
    if len(options) > 1:
        lines += [
            "",
            "Every ds_config with its fastest layout that fits; where none fits, with the layout that needs least memory:",
            *_choices(options),
        ]
    return "\n".join(lines)


def fast_line(one: Estimate, copies: bool) -> str:
    """What --fast_dir takes on a disk of each node, with --fast_copies or without."""
    ranks = min(one.cluster.node_gpus, one.gpus)
    twice = copies and one.gpus > one.cluster.node_gpus
    needed = (FAST_KEPT + 1) * one.checkpoint_bytes / 1e9 * ranks / one.gpus * (2 if twice else 1)
    whose = " of its own and of another node's" if twice else ""
    return _line("fast_dir", f"{FAST_KEPT} states{whose} and one being written: {needed:,.1f} GB a node")


def _line(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _what(one: Estimate) -> list[str]:
    causal = f", {one.flops_per_token_causal / 1e9:.3f} G (causal half)" if one.recipe.objective == "ar" else ""
    return [
        _line("recipe", f"{one.recipe.name}: {one.model}"),
        _line("parameters", f"{one.parameters:,}" + (", embeddings tied" if one.recipe.model.tied_embeddings else "")),
        _line("training FLOPs", f"{one.flops_per_token / 1e9:.3f} G a token (full attention){causal}; {one.flops:.3e} in total"),
    ]


def _layout(one: Estimate) -> list[str]:
    run, recipe = one.run, one.recipe
    shared = run.sequence_parallel
    groups = one.gpus // shared
    ranks = count(groups, "rank") if shared == 1 else f"{groups} groups of {shared} ranks that share an image"
    flags = f"--ds_config {one.ds_config} --micro_batch {run.micro_batch}"
    cast = " (gradients summed in half precision: choose another ds_config)" if one.half_precision_sum else ""
    weights = " with weights kept after the forward pass" if keeps_weights(recipe.model, one.layout) and one.gpus > 1 else ""
    return [
        _line(
            "batch",
            f"{recipe.batch_images} images = {ranks} x micro batch {run.micro_batch} x accumulation {run.accumulation}{cast}; "
            f"{one.tokens:,} tokens a step, {recipe.steps:,} steps with {recipe.warmup_steps:,} of warm-up",
        ),
        _line("ds_config", f"{flags}" + (f" --sequence_parallel {shared}" if shared > 1 else "")),
        _line("", f"ZeRO stage {run.stage}{weights}, {run.precision}, activation checkpointing {run.activation_checkpointing};"),
        _line("", _reason(one)),
    ]


def _reason(one: Estimate) -> str:
    kept = {
        "none": "all activations are kept and nothing is recomputed",
        "selective": "half of the activations are kept and the cheap ones are recomputed",
        "full": "one tensor per block is kept and every block is recomputed",
    }[one.run.activation_checkpointing]
    if one.gpus == 1:
        return kept
    seconds = one.step.communication
    return f"{kept}; {100 * (1 - one.step.exposed / seconds):.0f} % of {seconds:.3f} s of communication overlaps with arithmetic"


def _memory(one: Estimate) -> list[str]:
    gpu = one.cluster.gpu
    parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(one.memory).items())
    verdict = "fits" if one.fits else "DOES NOT FIT"
    return [
        _line("memory a GPU", f"{one.memory.total / GIB:.2f} GiB = {parts}"),
        *([_line("", f"and {host / GIB:.1f} GiB of host memory a node")] if (host := one.host_bytes_a_node) else []),
        *(
            [_line("", f"and {copy / GIB:.1f} GiB of host memory a node for --save async")]
            if (copy := one.copied_bytes_a_node) > GIB / 20
            else []
        ),
        _line("", f"{verdict}: {one.usable_gpu_bytes / GIB:.1f} GiB are usable on one {gpu.name} of {gpu.memory / 1e9:.0f} GB"),
    ]


def _time(one: Estimate) -> list[str]:
    step, gpu = one.step, one.cluster.gpu.name
    network = f"{one.wire_bytes / 1e9:.1f} GB a GPU and step; {one.node_gbit:,.0f} Gbit/s a node of {one.cluster.node_gpus}"
    seconds = (
        f"{step.seconds:.3f} s = arithmetic {step.arithmetic:.3f} + communication not hidden {one.exposed_seconds:.3f} "
        f"+ waiting for the host {step.waiting:.3f} + update {step.update:.3f}"
    )
    leads = (
        f"the {step.leads}; GPU {step.arithmetic:.3f} s, network {step.communication + step.exchange:.3f} s, "
        f"Python of the host {step.host:.3f} s a step"
    )
    images = f"{one.price.val_images:,} images in batches of {one.validation_batch} a rank"
    validation = f"{images}: {one.validation:.1f} s each, {100 * one.validation_share:.1f} % of the run"
    disk = (
        f"{one.checkpoint_bytes / 1e9:.2f} GB a checkpoint; {one.checkpoints_kept} kept and one being written: "
        f"{one.disk_bytes / 1e9:,.1f} GB"
    )
    return [
        _line("network", network),
        _line("step", seconds),
        _line("what leads", leads),
        _line("MFU expected", f"{100 * step.mfu:.1f} % (full attention), {100 * one.mfu_causal:.1f} % (causal)"),
        _line("validation", validation),
        _line("time", f"{run_time(one.hours)} on {one.gpus} {gpu}: {one.gpu_hours:,.0f} GPU-hours"),
        _line("cost", f"${one.dollars:,.0f} at ${one.price.dollars:g} a GPU-hour"),
        _line("saves", _saves(one)),
        _line("disk", disk),
    ]


def _saves(one: Estimate) -> str:
    nodes = -(-one.gpus // one.cluster.node_gpus)
    save, mtbf = one.checkpoint_bytes / (nodes * NODE_DISK), GPU_MTBF / one.gpus
    steps = max(1, round(best_interval(save, mtbf) / one.step.seconds))
    failures = f"a failure in {run_time(mtbf / 3600)}"
    return f"--save_every {steps}: a save takes {save:.1f} s at {NODE_DISK / 1e9:g} GB/s a node, {failures}; auto measures both"


def run_time(hours: float) -> str:
    """The duration of a run: days, or hours and minutes below a day."""
    return f"{hours / 24:,.1f} days" if hours >= 24 else duration(3600 * hours)


def _choices(options: Sequence[Estimate]) -> list[str]:
    rows = [("ds_config", "micro x acc x sp", "GiB", "step s", "MFU %", "days", "leads", "")]
    rows += [(one.ds_config, *_numbers(one), _verdict(one, options[0])) for one in options]
    return columns(rows)


def _numbers(one: Estimate) -> tuple[str, str, str, str, str, str]:
    split = f"{one.run.micro_batch} x {one.run.accumulation} x {one.run.sequence_parallel}"
    gib = f"{one.memory.total / GIB:.1f}"
    return split, gib, f"{one.step.seconds:.3f}", f"{100 * one.step.mfu:.1f}", f"{one.days:.1f}", one.step.leads


def _verdict(one: Estimate, best: Estimate) -> str:
    if not one.fits:
        return "does not fit"
    if one is best:
        return "recommended"
    more = one.step.seconds / best.step.seconds - 1
    if abs(more) < 0.001:
        return "as fast"
    cost = "memory" if one.layout.live > LIVE_PARAMETERS else "risks"
    return f"{100 * more:.1f} % slower" if more > 0 else f"{-100 * more:.1f} % faster, too little for its {cost}"


def describe_table(rows: Sequence[Estimate | NoPlan]) -> str:
    """A table with one line for each number of GPUs: its recommended way to run, or the reason why there is none."""
    head = ("GPUs", "ds_config", "micro x acc x sp", "GiB", "step s", "MFU %", "days", "leads", "GPU-hours", "dollars")
    lines: list[tuple[str, ...]] = [head]
    for one in rows:
        if isinstance(one, NoPlan):
            lines.append((str(one.gpus), one.reason))
        elif not one.fits:
            lines.append((str(one.gpus), f"nothing fits; {one.ds_config} comes nearest", *_numbers(one)[:2]))
        else:
            money = (f"{one.gpu_hours:,.0f}", f"{one.dollars:,.0f}")
            lines.append((str(one.gpus), one.ds_config, *_numbers(one), *money))
    known = next((one for one in rows if isinstance(one, Estimate)), None)
    title = [f"{known.recipe.name} on {known.cluster.gpu.name}, {known.node_gbit:,.0f} Gbit/s a node"] if known else []
    return "\n".join([*title, *columns(lines)])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with aligned columns; the first row is the head."""
    # Rows shorter than the head hold a reason instead of numbers; they do not widen the columns.
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(word) for word in column) for column in zip(*whole, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip() for row in rows]
