"""What one rank finds out alone about its machine before a run: code, packages, configs, GPUs, disks, shards, speed.

In: the paths and the recipe of the planned run. Out: a `NodeReport` per rank. A check that fails is an error in the report and
does not end the program, because rank 0 must tell an error of one node from an error of all nodes. `verdict.py`
compares the reports; tools/preflight.py calls both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from igpt_ds import dist
from igpt_ds.config import Recipe, recipe_to_dict
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.shards.record import END
from igpt_ds.devices import TorchBuild, current_device, device_id, refuse_idle_gpus, synchronize, torch_build
from igpt_ds.ds_config import join, load_ds_config, precision_of
from igpt_ds.errors import InputError, error_text, reason
from igpt_ds.files import atomic_file, sha256_file
from igpt_ds.launcher import node_name
from igpt_ds.ops.preflight.record import GpuReport, NodeReport, ShardsReport, Space
from igpt_ds.plan.costs import checkpoint_bytes, parameters
from igpt_ds.provenance import git_commit
from igpt_ds.train.checkpoint.directory import list_checkpoints

_RUN = {"recipe", "ds_config"}
_NEEDS = {"ds_config": _RUN, "needed": _RUN, "gpus": {"accelerator"}, "speed": {"accelerator", "gpus"}}  # checks of checks
PACKAGES = ("torch", "deepspeed", "numpy", "webdataset")
MOST_ERRORS = 5  # of shards, reported one by one
_READERS = 16  # shards checked at the same time: the file server is the slow part
_GPU_SECONDS, _GPU_N = 1.0, 8192  # long enough for a GPU to reach its steady clock
_CPU_SECONDS, _CPU_N = 0.5, 384


@dataclass(frozen=True)
class PlannedRun:
    """What the planned run reads and writes. The recipe is a function, because a node may be unable to read its file."""

    recipe: Callable[[], Recipe]
    ds_config: Path
    data: tuple[Path, ...]
    run_dir: Path
    ranks: int
    micro_batch: int | None
    keep_last: int
    keep_every: int
    splits: list[str] | None = None  # to check on disk; None: all. Streamed splits are not checked


def local_ranks() -> int:
    """The number of ranks on this node; 1 if no launcher says it."""
    named = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = list(_counts(named))
    node = int(os.environ.get("SLURM_NODEID", "0")) if len(counts) > 1 else 0
    return counts[node] if node < len(counts) else 1


def host_of_rank(rank: int, env: Mapping[str, str]) -> str | None:
    """The node of a rank in SLURM's default block layout; None outside SLURM or in another layout."""
    names, counts = list(_names(env.get("SLURM_STEP_NODELIST", ""))), list(_counts(env.get("SLURM_STEP_TASKS_PER_NODE", "")))
    placed = [name for name, count in zip(names, counts, strict=False) for _ in range(count)]
    return placed[rank] if len(names) == len(counts) and rank < len(placed) else None


def _counts(text: str) -> Iterator[int]:
    """SLURM's shorthand: "2(x3),1" -> 2, 2, 2, 1."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _names(text: str) -> Iterator[str]:
    """SLURM's shorthand: "gpu[01-03,7],login" -> gpu01, gpu02, gpu03, gpu7, login."""
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first or 0), int(last or first or 0) + 1):
                yield f"{prefix}{number:0{len(first)}d}{suffix}" if first else f"{prefix}{suffix}"


def attempt(report: NodeReport, check: str, find_out: Callable[[], Any]) -> NodeReport:
    """Runs a check: the report with the check's result, or with its error in `errors`."""
    try:
        return replace(report, **{check: find_out()})
    except Exception as error:  # any error is a finding about this node; the other checks continue
        line = (error_text(error).strip() or type(error).__name__).splitlines()[0]
        return replace(report, errors={**report.errors, check: line})


def run_node_checks(plan: PlannedRun, mark: str, progress: Callable[[str], None]) -> NodeReport:
    """Runs the checks that a rank does alone.

    Args:
        mark: name of a file that rank 0 wrote into the run directory.
        progress: called with the name of each check before it starts, so that a hung check can be named.
    """
    report = NodeReport(dist.rank(), dist.local_rank(), node_name())
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("code", package_hash),
        ("packages", package_versions),
        ("recipe", lambda: recipe_hash(plan.recipe())),
        ("ds_config", lambda: ds_config_hash(plan)),
        ("accelerator", accelerator),
        ("gpus", gpus),
        ("speed", lambda: matmul_speeds(report.gpus)),
    ]
    if dist.local_rank() == 0:
        checks += [
            ("commit", git_commit),
            ("shm", lambda: free_space(Path("/dev/shm"))),
            ("run_dir", lambda: write_and_read(plan.run_dir, mark)),
            ("disk", lambda: free_space(plan.run_dir)),
            ("needed", lambda: needed_space(plan)),
            ("shards", lambda: tuple(shards_report(path, plan.splits) for path in plan.data)),
        ]
    for check, find_out in checks:
        if not _NEEDS.get(check, set()).isdisjoint(report.errors):
            continue  # it would repeat the error
        progress(check)
        report = attempt(report, check, find_out)
    return report


def package_hash(package: Path = Path(__file__).parents[2]) -> str:
    """sha256 of the names and bytes of the package's Python files and of train.py. Needs no git."""
    digest = hashlib.sha256()
    for file in [*sorted(package.rglob("*.py")), package.parent / "train.py"]:
        if file.is_file():
            digest.update(f"{file.relative_to(package.parent)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run uses; "missing" if one is not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of the recipe's values."""
    return hashlib.sha256(json.dumps(recipe_to_dict(recipe), sort_keys=True).encode()).hexdigest()


def ds_config_hash(plan: PlannedRun) -> str:
    """sha256 of the values of the ds_config; the layout of the file does not matter.

    Raises:
        ValueError: the file is damaged, or does not fit the recipe on the ranks of the planned run.
    """
    join(plan.recipe(), values := load_ds_config(plan.ds_config), plan.ranks, plan.micro_batch)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def accelerator(build: TorchBuild | None = None, root: Path = Path("/")) -> str:
    """The kind of device that this rank computes on: "cuda", "cpu". A ValueError if GPUs lie idle beside a torch for CPUs."""
    build = build or torch_build()
    if build.cuda is build.hip:  # both None: otherwise the node is at fault, and not the packages
        refuse_idle_gpus(os.environ, root, build)
    return current_device().type


def gpus() -> tuple[GpuReport, ...]:
    """The GPUs that this rank sees, with the free memory of its own ones; empty if it computes on the CPU."""
    refuse_idle_gpus()
    if current_device().type != "cuda":
        return ()
    about = Path("/proc/driver/nvidia/version")
    text = about.read_text(encoding="utf-8", errors="replace") if about.exists() else ""
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    known = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        # The question takes half a GiB of that GPU, so each rank asks only about its own.
        free = torch.cuda.mem_get_info(number)[0] if number in own_gpus() else None
        driver, uuid = found.group(1) if found else "unknown", device_id(torch.device("cuda", number))
        known.append(GpuReport(facts.name, free, facts.total_memory, driver, uuid))
    return tuple(known)


def own_gpus() -> range:
    """The numbers of the GPUs that this rank checks: all of the node if it is the only rank there, else its own."""
    count = torch.cuda.device_count()
    mine = dist.local_rank() if count > 1 else 0
    return range(count) if local_ranks() == 1 else range(mine, min(mine + 1, count))


def matmul_speeds(found: tuple[GpuReport, ...] | None) -> dict[str, float]:
    """TFLOP/s of a matrix product, by the number of the GPU.

    bf16 on a GPU: the median over a second, so that the GPU reaches its steady clock. float32 on a CPU, under "cpu": the best of
    many short products, because other processes compute there too.
    """
    devices = {str(number): torch.device("cuda", number) for number in own_gpus()} if found else {"cpu": torch.device("cpu")}
    return {name: _matmul(device) for name, device in devices.items()}


def _matmul(device: torch.device) -> float:
    cuda = device.type != "cpu"
    n, length = (_GPU_N, _GPU_SECONDS) if cuda else (_CPU_N, _CPU_SECONDS)
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16 if cuda else torch.float32)
    seconds: list[float] = []
    end = time.perf_counter() + length
    while time.perf_counter() < end or len(seconds) < 5:
        start = time.perf_counter()
        product = x @ x
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not torch.isfinite(product).all():
        raise InputError(f"a matrix product on {device} is not finite")
    return 2 * n**3 / (statistics.median(seconds) if cuda else min(seconds)) / 1e12


def free_space(path: Path) -> Space:
    """The free space of a file system."""
    about = os.statvfs(path)
    return Space(about.f_bavail * about.f_frsize, about.f_favail if about.f_files else None)


def needed_space(plan: PlannedRun) -> Space:
    """The space that future checkpoints take, beside the existing ones.

    At most keep_last of them exist while one more is written, and those at multiples of keep_every are never deleted.
    """
    recipe = plan.recipe()
    values, weights = load_ds_config(plan.ds_config), parameters(recipe.model, recipe.objective)
    size = checkpoint_bytes(weights, values["zero_optimization"]["stage"], 4 if precision_of(values) == "fp32" else 2)
    kept = plan.keep_last + 1 + (recipe.steps // plan.keep_every if plan.keep_every else 0)
    count = max(1, kept - len(list_checkpoints(plan.run_dir / "checkpoints")))
    files = 2 * dist.world_size() + 4  # weights and optimizer of each rank, and the manifest
    return Space(count * size, count * files + 100)


def write_and_read(run_dir: Path, mark: str) -> bool:
    """Writes, renames and reads a file in the run directory, and looks for the file that rank 0 wrote there.

    Raises:
        ValueError: the file reads back differently, or rank 0's file is missing, so this is another directory.
    """
    content = uuid.uuid4().hex
    file = run_dir / f".preflight-{content}"
    try:
        with atomic_file(file, "w") as out:
            out.write(content)
        if file.read_text(encoding="utf-8") != content:
            raise InputError(f"{file} does not hold what was written to it")
    finally:
        file.unlink(missing_ok=True)
    if not (run_dir / mark).exists():
        raise InputError(f"{run_dir} is another directory here than on rank 0's node")
    return True


def shards_report(path: Path, splits: list[str] | None = None) -> ShardsReport:
    """Checks the index and the first and last bytes of every shard of a dataset directory, or of some of its splits.

    Raises:
        ValueError: not a dataset directory, or its index has another version or was changed.
    """
    index = read_index(path)
    entries = [entry for name, split in index.splits.items() if splits is None or name in splits for entry in split.shards]
    with ThreadPoolExecutor(_READERS) as threads:
        found = [error for error in threads.map(lambda entry: _shard_error(path / entry.name, entry.bytes), entries) if error]
    return ShardsReport(str(path), sha256_file(path / "index.json"), len(entries), tuple(found[:MOST_ERRORS]))


def _shard_error(file: Path, size: int) -> str:
    try:
        with open(file, "rb") as shard:
            head = shard.read(512)
            if (found := shard.seek(0, os.SEEK_END)) != size:
                return f"{file} has {found} bytes instead of {size}"
            shard.seek(-len(END), os.SEEK_END)
            whole = size == len(END) or (head[257:262] == b"ustar" and shard.read() == END)
            return "" if whole else f"{file} does not begin and end as a tar file does"
    except OSError as error:
        return f"{file}: {reason(error)}"
