"""Judges the reports of all ranks: which nodes are not fit for the run, why, and what to do about each.

In: what `node_checks.py` and `rank_checks.py` found on every rank, and who never came. Out: findings by node, an exit status, a
table. tools/preflight.py calls it, on rank 0.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT, VERSION = "igpt_ds.preflight", 1
FINE, BAD_INPUT, BAD_NODES = 0, 2, 3  # exit statuses

SLOW = 0.8  # of the median of all ranks: a slower product of matrices, or GPU link, slows every rank of the job
SLOW_CPU_LINK = 0.3  # the same for gloo, which shares its cores with everything else
FREE_GPU = 0.9  # of a GPU's memory that must be free
CLOCK_SECONDS = 1.0  # that a node's clock may be off: heartbeats and file times are compared between nodes
SHM_BYTES = 64 << 20  # of /dev/shm for each rank of a node, as NCCL takes for its rings
LOSS_SPREAD = 0.05  # nats, between ranks that computed the same step

SAME = ("code", "packages", "recipe", "ds_config", "commit")
# What a user gives: an error that all nodes share lies there, and no other node would do better.
INPUTS = {"recipe", "ds_config", "shards", "run_dir", "disk", "needed", "step"}
FIXES = {
    "arrival": "see whether the node is up (sinfo -N, ping, its slurmd log), and leave it out until it is",
    "report": "see what hangs there (dmesg, a dead network disk, nvidia-smi), and leave it out until it is mended",
    "code": "install the same code on every node, or start from one shared directory",
    "commit": "check out the same commit on every node",
    "packages": "install the same packages on every node: pip install -r requirements.txt",
    "recipe": "give every node the same --recipe or --config and knobs",
    "ds_config": "give every node the same --ds_config file",
    "gpus": "see nvidia-smi there; end what holds the memory, or leave the node out",
    "driver": "install the same driver on every node, or leave the node out",
    "speed": "see nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,ECC there, and what else computes on it; or leave the node out",
    "links": "see the network card and cable (ibstat, nvidia-smi topo -m, NCCL_DEBUG=INFO), or leave the node out",
    "clock": "start chrony or ntpd there",
    "shm": "make /dev/shm larger (docker --shm-size, mount -o remount,size=)",
    "run_dir": "put --run_dir on a disk that all nodes share and may write",
    "disk": "free some space, lower --keep_last, or put --run_dir on another disk",
    "needed": "see the error",
    "shards": "copy the shards there again, or put them on a disk that all nodes share",
    "step": "see the error; NCCL_DEBUG=INFO says more",
}


@dataclass
class Finding:
    """One thing that is wrong on one node."""

    node: str
    ranks: list[int]
    check: str
    what: str
    common: bool = False  # the same on all nodes: no other node would do better

    def __str__(self) -> str:
        where = "all nodes" if self.common else self.node
        ranks = f" (rank {', '.join(map(str, self.ranks))})" if self.ranks and not self.common else ""
        fix = "" if "; " in self.what else f"; {FIXES[self.check]}"  # many an error says already what to do
        return f"{where}{ranks}: {self.check}: {self.what}{fix}"


@dataclass
class Verdict:
    """What comes of it all."""

    nodes: dict[int, str]  # of each rank
    reports: dict[int, dict[str, Any]]  # of each rank that made one
    findings: list[Finding] = field(default_factory=list)

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes to leave out, in the order of their ranks."""
        bad = {finding.node for finding in self.findings if not finding.common}
        return [node for node in dict.fromkeys(self.nodes.values()) if node in bad]

    @property
    def status(self) -> int:
        """The exit status; bad input outweighs bad nodes, since leaving those out does not help."""
        if any(finding.common for finding in self.findings):
            return BAD_INPUT
        return BAD_NODES if self.findings else FINE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        findings = [asdict(finding) | {"fix": FIXES[finding.check]} for finding in self.findings]
        about = {"format": FORMAT, "version": VERSION, "status": self.status, "bad_nodes": self.bad_nodes}
        return about | {
            "findings": findings,
            "nodes": self.nodes,
            "reports": [self.reports[rank] for rank in sorted(self.reports)],
        }


def judge(nodes: dict[int, str], reports: dict[int, dict[str, Any]], absent: dict[int, str], silent: dict[int, str]) -> Verdict:
    """Compares all reports.

    Args:
        nodes: the node of every rank, by rank.
        reports: of the ranks that made one.
        absent: ranks that never came, with how long they were waited for, in words.
        silent: ranks that came and then hung, with where, in words.
    """
    verdict = Verdict(nodes, reports)
    found = [(rank, "arrival", f"did not come {words}") for rank, words in absent.items()]
    found += [(rank, "report", f"hangs {words}") for rank, words in silent.items()]
    for rank, report in reports.items():
        found += [(rank, _check_of(what), text) for what, text in report["errors"].items()]
    for check in (_different, _slow, _memory, _disks, _shards, _clocks, _losses):
        found += check(reports)
    verdict.findings = _by_node(found, nodes)
    everywhere = set(nodes.values())
    for finding in verdict.findings:
        others = {other.node for other in verdict.findings if other.check == finding.check}
        wide = finding.check in INPUTS or len(everywhere) > 1
        finding.common = finding.check not in ("arrival", "report") and wide and others == everywhere
    verdict.findings = _once([finding for finding in verdict.findings if finding.common]) + [
        finding for finding in verdict.findings if not finding.common
    ]
    return verdict


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
    """Of findings on all nodes, each text once."""
    return list({(finding.check, finding.what): finding for finding in reversed(findings)}.values())[::-1]


def _different(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    """Ranks that have something else than most; where there is no most, than rank 0."""
    for check in SAME:
        yield from _minority(reports, check, lambda report, check=check: report.get(check))  # type: ignore[misc]
    yield from _minority(reports, "gpus", lambda report: [gpu["name"] for gpu in report.get("gpus", [])])
    yield from _minority(reports, "driver", lambda report: sorted({gpu["driver"] for gpu in report.get("gpus", [])}))
    by_path = [{path["path"]: path["index"] for path in report.get("shards", [])} for report in reports.values()]
    for path in {path for paths in by_path for path in paths}:
        yield from _minority(reports, "shards", lambda report, path=path: _index(report, path))  # type: ignore[misc]


def _index(report: dict[str, Any], path: str) -> str | None:
    found = [about["index"] for about in report.get("shards", []) if about["path"] == path]
    return f"{path}/index.json of sha256 {found[0][:12]}" if found else None


def _minority(reports: dict[int, dict[str, Any]], check: str, value: Callable[[dict[str, Any]], Any]) -> Iterator[Found]:
    values = {rank: value(report) for rank, report in sorted(reports.items())}
    known = {rank: mine for rank, mine in values.items() if mine is not None}
    if len({str(mine) for mine in known.values()}) < 2:
        return
    usual = Counter(map(str, known.values())).most_common(1)[0][0]  # of equals, the first: the one of the lowest rank
    model = next(mine for mine in known.values() if str(mine) == usual)
    for rank, mine in known.items():
        if str(mine) != usual:
            yield rank, check, f"has {_short(mine, model)} where most have {_short(model, mine)}"


def _short(mine: Any, other: Any) -> str:
    if isinstance(mine, dict):
        return ", ".join(f"{name} {version}" for name, version in mine.items() if other.get(name) != version)
    if isinstance(mine, list):
        return ", ".join(f"{count} x {name}" for name, count in Counter(mine).items()) or "none"
    return str(mine)[:12] if " " not in str(mine) else str(mine)  # a hash, or a text that holds one already


def _slow(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    """Ranks whose products or links are far slower than the median's."""
    speeds = {(rank, name): speed for rank, report in reports.items() for name, speed in report.get("speed", {}).items()}
    middle = statistics.median(speeds.values()) if speeds else 0.0
    for (rank, name), speed in speeds.items():
        if speed < SLOW * middle:
            device = "the CPU" if name == "cpu" else f"GPU {name}"
            yield rank, "speed", f"{device} computes {speed:.3g} TFLOP/s, {speed / middle:.2f} of the median {middle:.3g}"
    for kind in ("inside", "across"):
        links = {rank: report["links"][kind] for rank, report in reports.items() if kind in report.get("links", {})}
        middle = statistics.median(links.values()) if links else 0.0
        for rank, speed in links.items():
            if speed < (SLOW if reports[rank].get("gpus") else SLOW_CPU_LINK) * middle:
                text = f"{speed:.3g} GB/s, {speed / middle:.2f} of the median {middle:.3g}"
                yield rank, "links", f"exchanges {text} with its neighbours {kind} {'its node' if kind == 'inside' else 'nodes'}"


def _memory(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    for rank, report in reports.items():
        gpus = report.get("gpus", [])
        if gpus and report["local_rank"] >= len(gpus):
            yield rank, "gpus", f"has no GPU: it is the node's rank {report['local_rank']} and sees {len(gpus)}"
        for number, gpu in enumerate(gpus):
            if gpu["free"] is not None and gpu["free"] < FREE_GPU * gpu["bytes"]:
                text = f"{gpu['free'] / 2**30:.1f} of {gpu['bytes'] / 2**30:.1f} GiB free"
                yield rank, "gpus", f"GPU {number} has {text}: another process holds the rest"


def _disks(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    ranks = Counter(report["node"] for report in reports.values())
    for rank, report in reports.items():
        if "shm" in report and report["shm"]["bytes"] < (need := SHM_BYTES * ranks[report["node"]]):
            yield rank, "shm", f"/dev/shm has {report['shm']['bytes'] >> 20} MiB free and {need >> 20} are needed"
        if "disk" not in report or "needed" not in report:
            continue
        free, needed = report["disk"], report["needed"]
        if free["bytes"] < needed["bytes"]:
            yield (
                rank,
                "disk",
                f"{free['bytes'] / 1e9:.2f} GB are free and checkpoints will take {needed['bytes'] / 1e9:.2f} more",
            )
        if free["files"] is not None and free["files"] < needed["files"]:
            yield rank, "disk", f"{free['files']:,} files (inodes) are free and checkpoints will take {needed['files']:,} more"


def _shards(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    for rank, report in reports.items():
        yield from ((rank, "shards", error) for about in report.get("shards", []) for error in about["errors"])


def _clocks(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    for rank, report in reports.items():
        if report["local_rank"] == 0 and abs(seconds := report.get("clock", 0.0)) > CLOCK_SECONDS:
            yield rank, "clock", f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others'"


def _losses(reports: dict[int, dict[str, Any]]) -> Iterator[Found]:
    """Ranks that computed another loss from the same weights and the same image: their arithmetic is broken."""
    losses = {rank: report["step"]["second_loss"] for rank, report in reports.items() if report.get("step", {}).get("same_image")}
    middle = statistics.median(losses.values()) if losses else 0.0
    for rank, loss in losses.items():
        if abs(loss - middle) > LOSS_SPREAD:
            yield rank, "step", f"computes a loss of {loss:.4f} where the others have {middle:.4f}: its arithmetic is wrong"
