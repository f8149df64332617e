"""A verdict of `preflight.py` as text: a table with a line a node, and below it each finding with what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from igpt_ds.ops.preflight.verdict import Verdict

HEADS = ("node", "ranks", "GPUs", "free GiB", "driver", "TFLOP/s", "inside GB/s", "across GB/s", "clock s", "disk GB", "shards")


def describe(verdict: Verdict, seconds: float) -> str:
    """The report: table, findings, and a last line that says what came of it."""
    names = list(dict.fromkeys(verdict.nodes.values()))
    rows = [(*_row(verdict, name), "BAD" if name in verdict.bad_nodes else "") for name in names]
    lines = [*table((*HEADS, ""), rows), "", *map(str, verdict.findings)]
    if verdict.bad_nodes:
        lines.append(f"bad_nodes: {','.join(verdict.bad_nodes)}")
    end = {0: "all is well", 2: "bad input, the same on all nodes", 3: "some nodes are not fit"}[verdict.status]
    speeds = [report["all_reduce"] for report in verdict.reports.values() if report.get("all_reduce")]
    together = f"; all-reduce over all ranks at {min(speeds):.3g} GB/s" if speeds else ""
    lines.append(f"preflight of {len(verdict.nodes)} ranks on {len(names)} nodes: {end}{together}; {seconds:.1f} s")
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as what stands in them; a column in which nothing stands is left out."""
    kept = [place for place in range(len(heads)) if any(row[place] not in ("", "-") for row in rows)]
    widths = [max(len(line[place]) for line in (heads, *rows)) for place in kept]
    return [
        "  ".join(line[place].ljust(width) for place, width in zip(kept, widths, strict=True)).rstrip() for line in (heads, *rows)
    ]


def _row(verdict: Verdict, node: str) -> tuple[str, ...]:
    ranks = [rank for rank, name in verdict.nodes.items() if name == node]
    reports = [verdict.reports[rank] for rank in ranks if rank in verdict.reports]
    first: dict[str, Any] = next((report for report in reports if "shards" in report), reports[0] if reports else {})
    gpus = first.get("gpus", [])

    free = [gpu["free"] / 2**30 for report in reports for gpu in report.get("gpus", []) if gpu["free"] is not None]

    def least(values: list[float], text: Callable[[float], str] = "{:.3g}".format) -> str:
        return text(min(values)) if values else "-"

    def links(kind: str) -> list[float]:
        return [report["links"][kind] for report in reports if kind in report.get("links", {})]

    return (
        node,
        f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
        f"{len(gpus)} x {gpus[0]['name']}" if gpus else "-",
        least(free, "{:.1f}".format),
        gpus[0]["driver"] if gpus else "-",
        least([speed for report in reports for speed in report.get("speed", {}).values()]),
        least(links("inside")),
        least(links("across")),
        f"{first['clock']:+.3f}" if "clock" in first else "-",
        f"{first['disk']['bytes'] / 1e9:.1f}" if "disk" in first else "-",
        str(sum(about["shards"] for about in first["shards"])) if "shards" in first else "-",
    )
