"""Measures the start of training on 100 million images: seconds, memory, opens and stats of rank 0 of 1, 64 and 512.

    python tools/bench/shards.py --out bench_shards.json
    python tools/bench/shards.py --show docs/bench_shards.json

The 6,104 shards are sparse files, which take no space. Each row is a process of its own that does what rank 0 of so many ranks
does from opening the shards to the first step, without the messages between ranks. Opens and stats are real and counted. The
bytes are counted and not read: the sha256 is taken from the index, and the seconds of hashing are the bytes over this machine's
rate.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.data.mixture import Mixture
from igpt_ds.data.palette import fit_palette, save_palette
from igpt_ds.data.shards import verify
from igpt_ds.data.shards.dataset import DamagedImagesError, ShardSet
from igpt_ds.data.shards.index import ShardEntry, ShardIndex, read_index, split_entry, write_index
from igpt_ds.data.shards.record import END, record_dtype
from igpt_ds.data.shards.verified import VerifiedShard, checks_of, read_verified, run_checks, write_verified
from igpt_ds.files import sha256_file
from igpt_ds.json_files import read_json, write_json
from igpt_ds.plain_files import check_file
from igpt_ds.schema import record_from

N_PX = 32


@dataclass(frozen=True)
class StartTask:
    """One rank of a start."""

    data: str
    record: str  # the verified.json, which rank 0 writes
    rank: int
    ranks: int
    out: str


class Counts:
    """Opens and stats of files in a directory, and the bytes of those that were hashed."""

    def __init__(self, data: Path) -> None:
        self.opens = self.stats = self.bytes = 0
        self._within, self._stat = f"{data}{os.sep}", os.stat
        self._sha256 = {str(data / shard.name): shard.sha256 for shard in read_index(data).splits["train"].shards}
        sys.addaudithook(self._hear)
        os.stat = self._count_stat
        verify.sha256_file = self._hash

    def _hear(self, event: str, what: Any) -> None:
        self.opens += event == "open" and str(what[0]).startswith(self._within)

    def _count_stat(self, path: Any, *words: Any, **named: Any) -> os.stat_result:
        self.stats += str(path).startswith(self._within)
        return self._stat(path, *words, **named)

    def _hash(self, path: Path) -> str:
        check_file(path)
        with open(path, "rb") as file:
            self.bytes += os.fstat(file.fileno()).st_size
        return self._sha256[str(path)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the starts, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "the same: one process a start")
    parser.add_argument("--work", type=Path, help="directory for the sparse shards (default: a temporary directory)")
    parser.add_argument("--task", type=Path, help="used by this program for its processes")
    args = parser.parse_args(argv)
    if args.task:
        one_rank(record_from(StartTask, read_json(args.task, "task"), f"task {args.task}", "leave --task out"))
    elif args.show:
        print(harness.read_bench(args.show).table())
    else:
        with tempfile.TemporaryDirectory(prefix="bench_shards.", dir=args.work) as work:
            rows = starts(Path(work), *((96, 16) if args.toy else (6104, 16384)))
        harness.finish(rows, args.out, args.quick, ("numpy",))


def starts(work: Path, n_shards: int, each: int) -> list[BenchRow]:
    """The rows: a first start and a later one for each number of ranks."""
    data, size = sparse_dataset(work / "sparse", n_shards, each), each * record_dtype(N_PX).itemsize + len(END)
    rate, rows, record = hash_rate(work / "bytes"), list[BenchRow](), work / "verified.json"
    alone, images = n_shards * size / rate, n_shards * each
    for ranks in (1, 64, 512):
        record.unlink(missing_ok=True)
        first, later = (
            start_rank(work, StartTask(str(data), str(record), 0, ranks, str(work / "answer.json"))) for _ in range(2)
        )
        of = f"{images / 1e6:.3g} M images, {ranks} rank{'s' * (ranks > 1)}"
        for name, found in (("first", first), ("later", later)):
            seconds, note = found["seconds"] + found["bytes"] / rate, f"{found['bytes'] / 1e9:.3g} GB hashed"
            rows.append(BenchRow(f"{name} start, {of}", "s", seconds, alone, "rank 0 hashes all", at_most=True, note=note))
        memory, bitmap = max(first["memory"], later["memory"]) / 1e6, images / 1e6
        rows.append(BenchRow(f"memory of a rank, {of}", "MB", memory, bitmap, "a byte an image", at_most=True))
        for what in ("opens", "stats"):
            note = f"later start {later[what]:.0f}; 64 images more: {first['batch_opens']:.0f} opens" if what == "opens" else ""
            note = note or f"later start {later[what]:.0f}"
            rows.append(BenchRow(f"{what} of a rank, {of}", "", first[what], n_shards, "all shards", at_most=True, note=note))
    return rows


def sparse_dataset(path: Path, n_shards: int, each: int) -> Path:
    """A dataset directory whose shards are sparse files: they have their size and take no space."""
    path.mkdir()
    palette, _ = fit_palette(np.repeat(np.arange(17, dtype=np.uint8)[:, None], 3, axis=1), 17)
    save_palette(path / "palette.npy", palette)
    size, shards = each * record_dtype(N_PX).itemsize + len(END), []
    for number in range(n_shards):
        shards.append(ShardEntry(f"train-{number:06d}.tar", each, size, f"{number:064x}"))
        with open(path / shards[-1].name, "wb") as file:
            file.truncate(size)
    split = split_entry(shards, palette.hash, N_PX)
    write_index(path, ShardIndex("sparse", N_PX, 17, "palette.npy", palette.hash, ["none"], {"train": split}))
    return path


def hash_rate(file: Path, size: int = 1 << 28) -> float:
    """Bytes a second that one core reads from the page cache and hashes."""
    file.write_bytes(bytes(size))
    start = time.perf_counter()
    sha256_file(file)
    return size / (time.perf_counter() - start)


def start_rank(work: Path, task: StartTask) -> dict[str, float]:
    """Runs one rank in a process of its own; what it did."""
    write_json(work / "task.json", asdict(task))
    subprocess.run([sys.executable, __file__, "--task", str(work / "task.json")], check=True)
    answer: dict[str, float] = read_json(Path(task.out), "answer")
    return answer


def one_rank(what: StartTask) -> None:
    """Opens the shards, verifies this rank's share, notes it, and reads 64 images."""
    os.environ |= {"WORLD_SIZE": str(what.ranks), "RANK": str(what.rank)}
    data, record = Path(what.data), Path(what.record)
    counts, memory, start = Counts(data), harness.own_memory(), time.perf_counter()
    images = Mixture([ShardSet(data, "train")])
    before = read_verified(record, [data])
    checks = checks_of(images.shard_sets, "once", [False], before)
    mine = checks[what.rank :: what.ranks]
    results = list(run_checks(mine))
    for check, (_, was_read) in zip(mine, results, strict=True):
        if was_read:
            check.shards.trust(check.number)
    found = [results[i // what.ranks % len(results)][0] for i in range(len(checks))]  # as other ranks would send
    seconds, opens, stats = time.perf_counter() - start, counts.opens, counts.stats
    if counts.bytes:
        times = [(data / check.entry.name).stat().st_mtime_ns for check in checks]
        known = [VerifiedShard(one.bytes, mtime_ns) for one, mtime_ns in zip(found, times, strict=True)]
        start = time.perf_counter()
        write_verified(record, before.having(checks, known))
        seconds += time.perf_counter() - start
    answer = {"seconds": seconds, "memory": harness.own_memory() - memory, "opens": opens, "stats": stats}
    opens = counts.opens
    with suppress(DamagedImagesError):  # sparse files hold no images
        images.shard_sets[0].labels(np.arange(0, images.n_images, max(1, images.n_images // 64)))
    write_json(Path(what.out), answer | {"bytes": counts.bytes, "batch_opens": counts.opens - opens})


if __name__ == "__main__":
    cli.run(main)
