"""The report of one rank about its node: the record and its JSON.

node.py and ranks.py fill a report. It travels to rank 0 as JSON over board.py, where
verdict.py compares the reports of all ranks. `tools/preflight.py --json` writes them to a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from igpt_ds.schema import record_from


@dataclass(frozen=True)
class GpuReport:
    """One GPU that a rank sees."""

    name: str
    free: int | None  # bytes; None if another rank measures it
    bytes: int
    driver: str
    uuid: str = ""  # "" if torch does not know it


@dataclass(frozen=True)
class Space:
    """Space on a file system: what is free, or what checkpoints will take."""

    bytes: int
    files: int | None  # None if the file system does not count them


@dataclass(frozen=True)
class ShardsReport:
    """One dataset directory as a node sees it."""

    path: str
    index: str  # sha256 of index.json
    shards: int
    errors: tuple[str, ...]  # of the first shards that cannot be read


@dataclass(frozen=True)
class StepLosses:
    """Two small training steps on one rank."""

    first_loss: float  # nats per token
    second_loss: float
    seconds: float
    same_image: float  # 1 if every rank computed the same loss, 0 if each computed a part of it


@dataclass(frozen=True)
class NodeReport:
    """What one rank found out. A value is None if its check did not run or failed; then `errors` has the reason."""

    rank: int
    local_rank: int
    node: str
    errors: Mapping[str, str] = field(default_factory=dict)  # by check
    code: str | None = None  # hash of the package
    packages: Mapping[str, str] | None = None  # versions
    recipe: str | None = None  # hash
    ds_config: str | None = None  # hash
    accelerator: str | None = None  # the kind of device
    gpus: tuple[GpuReport, ...] | None = None
    speed: Mapping[str, float] | None = None  # TFLOP/s, by GPU
    commit: str | None = None
    shm: Space | None = None  # free in /dev/shm
    run_dir: bool | None = None
    disk: Space | None = None  # free
    needed: Space | None = None  # that checkpoints will take
    shards: tuple[ShardsReport, ...] | None = None
    device: str | None = None
    clock: float | None = None  # seconds ahead of the median rank
    all_reduce: float | None = None  # GB/s
    links: Mapping[str, float] | None = None  # GB/s "inside" the node and "across" nodes
    step: StepLosses | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, without the values that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def report_from_dict(values: object) -> NodeReport:
    """The inverse of `NodeReport.to_dict`.

    Raises:
        ValueError: a field is unknown, missing or of a wrong type, as when another version of the code made the report.
    """
    return record_from(NodeReport, values, "a preflight report", "install the same code on every node", strict=True)
