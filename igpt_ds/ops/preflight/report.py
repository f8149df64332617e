"""A `PreflightResult` as text: a table with one line per node, and below it each finding with what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from igpt_ds.console import count
from igpt_ds.ops.preflight.verdict import PreflightResult

HEADS = ("node", "ranks", "GPUs", "free GiB", "driver", "TFLOP/s", "inside GB/s", "across GB/s", "clock s", "disk GB", "shards")


def result_text(result: PreflightResult, seconds: float) -> str:
    """The table, the findings, and a last line with the outcome and the duration in seconds."""
    names = list(dict.fromkeys(result.nodes.values()))
    rows = [(*_row(result, name), "BAD" if name in result.bad_nodes else "") for name in names]
    lines = [*aligned_lines((*HEADS, ""), rows), "", *map(str, result.findings)]
    if result.bad_nodes:
        lines.append(f"bad_nodes: {','.join(result.bad_nodes)}")
    end = {0: "all checks passed", 2: "bad input, the same on all nodes", 3: "some nodes are not fit"}[result.status]
    speeds = [report.all_reduce for report in result.reports.values() if report.all_reduce]
    together = f"; all-reduce over all ranks at {min(speeds):.3g} GB/s" if speeds else ""
    lines.append(
        f"preflight of {count(len(result.nodes), 'rank')} on {count(len(names), 'node')}: {end}{together}; {seconds:.1f} s"
    )
    return "\n".join(lines)


def aligned_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their longest cell, without the columns that are empty in every row."""
    kept = [place for place in range(len(heads)) if any(row[place] not in ("", "-") for row in rows)]
    widths = [max(len(line[place]) for line in (heads, *rows)) for place in kept]
    return [
        "  ".join(line[place].ljust(width) for place, width in zip(kept, widths, strict=True)).rstrip() for line in (heads, *rows)
    ]


def _row(result: PreflightResult, node: str) -> tuple[str, ...]:
    ranks = [rank for rank, name in result.nodes.items() if name == node]
    reports = [result.reports[rank] for rank in ranks if rank in result.reports]
    first = next((report for report in reports if report.shards is not None), reports[0] if reports else None)
    gpus = first.gpus or () if first else ()
    free = [gpu.free / 2**30 for report in reports for gpu in report.gpus or () if gpu.free is not None]

    def least(values: list[float], text: Callable[[float], str] = "{:.3g}".format) -> str:
        return text(min(values)) if values else "-"

    def links(kind: str) -> list[float]:
        return [report.links[kind] for report in reports if report.links and kind in report.links]

    return (
        node,
        f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
        f"{len(gpus)} x {gpus[0].name}" if gpus else "-",
        least(free, "{:.1f}".format),
        gpus[0].driver if gpus else "-",
        least([speed for report in reports for speed in (report.speed or {}).values()]),
        least(links("inside")),
        least(links("across")),
        f"{first.clock:+.3f}" if first and first.clock is not None else "-",
        f"{first.disk.bytes / 1e9:.1f}" if first and first.disk else "-",
        str(sum(about.shards for about in first.shards)) if first and first.shards is not None else "-",
    )
