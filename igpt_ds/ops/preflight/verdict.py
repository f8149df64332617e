"""Compares the reports of all ranks: which nodes are not fit for the run, why, and what to do about each.

In: the `NodeReport` of every rank, and the ranks that never arrived. Out: findings by node and an exit status. Called by
tools/preflight.py on rank 0.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from igpt_ds.ops.preflight.record import NodeReport

FORMAT, VERSION = "igpt_ds.preflight", 1
FINE, BAD_INPUT, BAD_NODES = 0, 2, 3  # exit statuses

SLOW = 0.8  # of the median of all ranks: a GPU or link below this slows every rank of the job
SLOW_CPU_LINK = 0.3  # the same for gloo, which shares its cores with other processes
FREE_GPU = 0.9  # of a GPU's memory that must be free
CLOCK_SECONDS = 1.0  # largest clock offset of a node: heartbeats and file times are compared between nodes
SHM_BYTES = 64 << 20  # of /dev/shm per rank, which NCCL takes for its rings
LOSS_SPREAD = 0.05  # nats, largest difference between ranks that computed the same step

SAME = ("code", "packages", "recipe", "ds_config", "commit", "accelerator")
# What the user gives. If all nodes have the same error in it, the input is wrong and other nodes would not help.
INPUTS = {"accelerator", "recipe", "ds_config", "shards", "run_dir", "disk", "needed", "step"}
FIXES = {
    "arrival": "check that the node is up (sinfo -N, ping, its slurmd log), and exclude it until then",
    "report": "find what hangs there (dmesg, a dead network disk, nvidia-smi), and exclude the node until it is repaired",
    "code": "install the same code on every node, or start from one shared directory",
    "commit": "check out the same commit on every node",
    "packages": "install the same packages on every node: pip install -r requirements.txt",
    "recipe": "give every node the same --recipe or --config and knobs",
    "ds_config": "give every node the same --ds_config file",
    "accelerator": "give every rank a GPU, or export DS_ACCELERATOR=cpu for all of them",
    "device": "see the error",
    "gpus": "run nvidia-smi there; end the process that holds the memory, or exclude the node",
    "driver": "install the same driver on every node, or exclude the node",
    "speed": "run nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,ECC there and look for other processes, or exclude the node",
    "links": "check the network card and cable (ibstat, nvidia-smi topo -m, NCCL_DEBUG=INFO), or exclude the node",
    "clock": "start chrony or ntpd there",
    "shm": "make /dev/shm larger (docker --shm-size, mount -o remount,size=)",
    "run_dir": "put --run_dir on a disk that all nodes share and can write",
    "disk": "free some space, lower --keep_last, or put --run_dir on another disk",
    "needed": "see the error",
    "shards": "copy the shards there again, or put them on a shared disk",
    "step": "see the error; NCCL_DEBUG=INFO says more",
}


@dataclass(frozen=True)
class Finding:
    """One problem on one node."""

    node: str
    ranks: list[int]
    check: str
    what: str
    common: bool = False  # all nodes have it, so other nodes would not help

    def __str__(self) -> str:
        where = "all nodes" if self.common else self.node
        ranks = f" (rank {', '.join(map(str, self.ranks))})" if self.ranks and not self.common else ""
        fix = "" if "; " in self.what else f"; {FIXES[self.check]}"  # many errors say already what to do
        return f"{where}{ranks}: {self.check}: {self.what}{fix}"


@dataclass(frozen=True)
class PreflightResult:
    """The outcome of the preflight."""

    nodes: dict[int, str]  # of each rank
    reports: dict[int, NodeReport]  # of each rank that made one
    findings: list[Finding]

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes to exclude, by rank."""
        bad = {finding.node for finding in self.findings if not finding.common}
        return [node for node in dict.fromkeys(self.nodes.values()) if node in bad]

    @property
    def status(self) -> int:
        """The exit status. Bad input comes before bad nodes, because excluding nodes does not help then."""
        if any(finding.common for finding in self.findings):
            return BAD_INPUT
        return BAD_NODES if self.findings else FINE

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        findings = [asdict(finding) | {"fix": FIXES[finding.check]} for finding in self.findings]
        about = {"format": FORMAT, "version": VERSION, "status": self.status, "bad_nodes": self.bad_nodes}
        return about | {
            "findings": findings,
            "nodes": self.nodes,
            "reports": [self.reports[rank].to_dict() for rank in sorted(self.reports)],
        }


def compare_reports(
    nodes: dict[int, str], reports: dict[int, NodeReport], absent: dict[int, str], silent: dict[int, str]
) -> PreflightResult:
    """Compares all reports.

    Args:
        nodes: the node of every rank, by rank.
        reports: of the ranks that made one.
        absent: ranks that never arrived, with how long rank 0 waited, in words.
        silent: ranks that arrived and then hung, with where, in words.
    """
    found = [(rank, "arrival", f"did not arrive {words}") for rank, words in absent.items()]
    found += [(rank, "report", f"hangs {words}") for rank, words in silent.items()]
    for rank, report in reports.items():
        found += [(rank, _check_of(what), text) for what, text in report.errors.items()]
    for check in (_different, _slow, _memory, _disks, _shards, _clocks, _losses):
        found += check(reports)
    findings = [replace(finding, common=common) for finding, common in _commons(_by_node(found, nodes), set(nodes.values()))]
    alone = [finding for finding in findings if not finding.common]
    return PreflightResult(nodes, reports, _once([finding for finding in findings if finding.common]) + alone)


def _commons(findings: list[Finding], everywhere: set[str]) -> Iterator[tuple[Finding, bool]]:
    """Each finding, and whether all nodes have one of its check."""
    for finding in findings:
        having = {other.node for other in findings if other.check == finding.check}
        wide = finding.check in INPUTS or len(everywhere) > 1
        yield finding, finding.check not in ("arrival", "report") and wide and having == everywhere


Found = tuple[int, str, str]  # rank, check, what is wrong


def _check_of(what: str) -> str:
    return {"all_reduce": "links"}.get(what, what)


def _by_node(found: Iterable[Found], nodes: dict[int, str]) -> list[Finding]:
    findings: dict[tuple[str, str, str], Finding] = {}
    for rank, check, what in sorted(found):
        finding = findings.setdefault((nodes[rank], check, what), Finding(nodes[rank], [], check, what))
        finding.ranks.append(rank)
    return list(findings.values())


def _once(findings: list[Finding]) -> list[Finding]:
    """Findings of all nodes, each text once."""
    return list({(finding.check, finding.what): finding for finding in reversed(findings)}.values())[::-1]


def _different(reports: dict[int, NodeReport]) -> Iterator[Found]:
    """Ranks that differ from most ranks; without a majority, from the lowest rank."""
    for check in SAME:
        yield from _minority(reports, check, lambda report, check=check: getattr(report, check))  # type: ignore[misc]
    yield from _minority(reports, "gpus", lambda report: [gpu.name for gpu in report.gpus or ()])
    yield from _minority(reports, "driver", lambda report: sorted({gpu.driver for gpu in report.gpus or ()}))
    for path in {about.path for report in reports.values() for about in report.shards or ()}:
        yield from _minority(reports, "shards", lambda report, path=path: _index(report, path))  # type: ignore[misc]


def _index(report: NodeReport, path: str) -> str | None:
    found = [about.index for about in report.shards or () if about.path == path]
    return f"{path}/index.json of sha256 {found[0][:12]}" if found else None


def _minority(reports: dict[int, NodeReport], check: str, value: Callable[[NodeReport], Any]) -> Iterator[Found]:
    values = {rank: value(report) for rank, report in sorted(reports.items())}
    known = {rank: mine for rank, mine in values.items() if mine is not None}
    if len({str(mine) for mine in known.values()}) < 2:
        return
    usual = Counter(map(str, known.values())).most_common(1)[0][0]  # of equally many, that of the lowest rank
    model = next(mine for mine in known.values() if str(mine) == usual)
    for rank, mine in known.items():
        if str(mine) != usual:
            yield rank, check, f"has {_short(mine, model)} where most have {_short(model, mine)}"


def _short(mine: Any, other: Any) -> str:
    if isinstance(mine, dict):
        return ", ".join(f"{name} {version}" for name, version in mine.items() if other.get(name) != version)
    if isinstance(mine, list):
        return ", ".join(f"{count} x {name}" for name, count in Counter(mine).items()) or "none"
    return str(mine)[:12] if " " not in str(mine) else str(mine)  # a hash, or a text that contains one


def _slow(reports: dict[int, NodeReport]) -> Iterator[Found]:
    """Ranks whose matrix products or links are far slower than the median."""
    speeds = {(rank, name): speed for rank, report in reports.items() for name, speed in (report.speed or {}).items()}
    middle = statistics.median(speeds.values()) if speeds else 0.0
    for (rank, name), speed in speeds.items():
        if speed < SLOW * middle:
            device = "the CPU" if name == "cpu" else f"GPU {name}"
            yield rank, "speed", f"{device} computes {speed:.3g} TFLOP/s, {speed / middle:.2f} of the median {middle:.3g}"
    for kind in ("inside", "across"):
        links = {rank: report.links[kind] for rank, report in reports.items() if report.links and kind in report.links}
        middle = statistics.median(links.values()) if links else 0.0
        for rank, speed in links.items():
            if speed < (SLOW if reports[rank].gpus else SLOW_CPU_LINK) * middle:
                text = f"{speed:.3g} GB/s, {speed / middle:.2f} of the median {middle:.3g}"
                yield rank, "links", f"exchanges {text} with its neighbours {kind} {'its node' if kind == 'inside' else 'nodes'}"


def _memory(reports: dict[int, NodeReport]) -> Iterator[Found]:
    """GPUs that are missing, shared or full. A rank measures the free memory of its own GPU alone."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, report in reports.items():
        gpus = report.gpus or ()
        if len(gpus) > 1 and report.local_rank >= len(gpus):
            yield rank, "gpus", f"has no GPU: it is the node's rank {report.local_rank} and sees {len(gpus)}"
        for number, gpu in enumerate(gpus):
            if gpu.free is not None and gpu.uuid:
                users.setdefault((report.node, gpu.uuid), []).append(rank)
            if gpu.free is not None and gpu.free < FREE_GPU * gpu.bytes:
                text = f"{gpu.free / 2**30:.1f} of {gpu.bytes / 2**30:.1f} GiB free"
                yield rank, "gpus", f"GPU {number} has {text}: another process holds the rest"
    for (_, uuid), ranks in users.items():
        yield from ((rank, "gpus", f"{len(ranks)} ranks have the GPU {uuid}; start one rank a GPU") for rank in ranks[1:])


def _disks(reports: dict[int, NodeReport]) -> Iterator[Found]:
    ranks = Counter(report.node for report in reports.values())
    for rank, report in reports.items():
        if report.shm and report.shm.bytes < (need := SHM_BYTES * ranks[report.node]):
            yield rank, "shm", f"/dev/shm has {report.shm.bytes >> 20} MiB free and {need >> 20} are needed"
        free, needed = report.disk, report.needed
        if free is None or needed is None:
            continue
        if free.bytes < needed.bytes:
            text = f"{free.bytes / 1e9:.2f} GB are free and checkpoints will take {needed.bytes / 1e9:.2f} more"
            yield rank, "disk", text
        if free.files is not None and needed.files is not None and free.files < needed.files:
            yield rank, "disk", f"{free.files:,} files (inodes) are free and checkpoints will take {needed.files:,} more"


def _shards(reports: dict[int, NodeReport]) -> Iterator[Found]:
    for rank, report in reports.items():
        yield from ((rank, "shards", error) for about in report.shards or () for error in about.errors)


def _clocks(reports: dict[int, NodeReport]) -> Iterator[Found]:
    for rank, report in reports.items():
        if report.local_rank == 0 and abs(seconds := report.clock or 0.0) > CLOCK_SECONDS:
            yield rank, "clock", f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others'"


def _losses(reports: dict[int, NodeReport]) -> Iterator[Found]:
    """Ranks that computed another loss from the same weights and the same image: their arithmetic is wrong."""
    losses = {rank: report.step.second_loss for rank, report in reports.items() if report.step and report.step.same_image}
    middle = statistics.median(losses.values()) if losses else 0.0
    for rank, loss in losses.items():
        if abs(loss - middle) > LOSS_SPREAD:
            yield rank, "step", f"computes a loss of {loss:.4f} where the others have {middle:.4f}: its arithmetic is wrong"
