"""The file of a snapshot has the bytes that torch.save would have written when it was taken."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from igpt_ds.train.checkpoint.disk import CheckpointWriter
from igpt_ds.train.checkpoint.snapshot import LOWEST_PRIORITY, Buffers, Snapshot, lower_priority


def state() -> dict[str, Any]:
    """Every kind of tensor that DeepSpeed saves: views of one storage, parameters, empty ones, every dtype; and plain objects."""
    flat, weight = torch.randn(100), torch.nn.Parameter(torch.randn(3, 4))
    weight.ds_id = 7  # type: ignore[attr-defined]  # torch saves such attributes
    types = [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool]
    return {
        "views": [flat[10:20], flat.view(10, 10).t(), flat],
        "weights": OrderedDict(one=weight, same=weight, none=torch.empty(0)),
        "types": [torch.ones(5).to(kind) for kind in types],
        "rng": torch.get_rng_state(),
        "plain": (torch.Size([3]), torch.float16, 1.5, "text", None),
    }


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_its_bytes_are_those_of_the_moment_and_buffers_are_reused() -> None:
    buffers, sizes, values = Buffers(), set(), state()
    for _ in range(3):
        buffers.reuse()
        expected, snapshot = saved(values), Snapshot(values, buffers)
        snapshot.copy()
        values["views"][2].add_(1)
        values["weights"]["one"].data.mul_(2)
        file = io.BytesIO()
        snapshot.write(file)
        assert file.getvalue() == expected
        sizes.add(buffers.bytes)
    assert len(sizes) == 1
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in values["views"]}
    assert sum(held.values()) <= sizes.pop() <= len(expected)
    assert torch.UntypedStorage(4).cpu().device.type == "cpu"  # torch is as before


def test_a_writer_with_buffers_writes_later_and_tells_of_a_full_disk(tmp_path: Path) -> None:
    values = state()
    at_once, later = CheckpointWriter(None), CheckpointWriter(None, Buffers())
    for writer, name in ((at_once, "a"), (later, "b")):
        (tmp_path / name).mkdir()
        writer.save(values, str(tmp_path / name / "x.pt"))
    assert not (tmp_path / "b" / "x.pt").exists()
    later.copy_held()
    values["views"][2].zero_()
    later.write_held()
    assert later.entries == at_once.entries
    assert (tmp_path / "b" / "x.pt").read_bytes() == (tmp_path / "a" / "x.pt").read_bytes()
    full = CheckpointWriter(None, Buffers())
    full.save({"x": torch.zeros(1_000_000)}, "/dev/full")
    assert full.error == ""
    full.write_held()
    assert full.error.startswith("/dev/full: No space left on device")


def test_only_the_writing_thread_yields_its_core() -> None:
    found: list[int] = []

    def write() -> None:
        lower_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert found == [LOWEST_PRIORITY]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
