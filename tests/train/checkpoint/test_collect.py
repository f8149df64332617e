"""A state whose parts are on several nodes: when they are one whole state, and what is sent between two nodes."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as td

from igpt_ds.cli import SharedError
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.errors import InputError
from igpt_ds.train.checkpoint import collect, neighbours
from igpt_ds.train.checkpoint.collect import _together, collect_newest
from igpt_ds.train.checkpoint.directory import checkpoint_name
from igpt_ds.train.checkpoint.manifest import FileEntry, Manifest, file_entry, read_checkpoint, write_manifest
from igpt_ds.train.checkpoint.neighbours import Neighbours
from igpt_ds.train.checkpoint.tiers import Tier, run_tier

RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), 12, 100, 0.01, 3)


def part(*ranks: int, start: str = "a", stage: int = 3, world_size: int = 2) -> dict[int, Manifest]:
    """The states of a node that has the files of some ranks: step 5."""
    of_ranks = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in ranks for kind in ("model", "optim")]
    files = tuple(FileEntry(name, 1, "0" * 64) for name in of_ranks)
    facts = {"recipe": RECIPE, "data": DataFacts("shards", "a", "p", 2), "precision": "fp32", "files": files, "start": start}
    return {5: Manifest(**facts, step=5, images_seen=5, world_size=world_size, stage=stage)}  # type: ignore[arg-type]


def test_parts_are_a_state_if_every_rank_has_one() -> None:
    assert _together([part(0), part(1)])[5].manifest.is_whole
    assert not _together([part(0), {}])[5].manifest.is_whole
    assert not _together([part(0), part(1, start="b")])[5].manifest.is_whole  # of two branches of the run
    assert _together([part(0, start="b"), part(0, 1), {}])[5].manifest.is_whole  # a node came back with a part of another one
    assert not _together([part(0, 1, world_size=3)])[5].manifest.is_whole
    assert not _together([part(0, 1, stage=2)])[5].manifest.is_whole  # the whole weights are missing
    lost = _together([part(0, 1), {}])[5]
    assert (lost.manifest.is_whole, lost.holders) == (True, ((0,),) * 4)
    assert _together([part(0, 1), part(1, 0)])[5].holders == ((0, 1),) * 4


def no_space(*_: object) -> str:
    raise OSError(28, "No space left on device", "/run")


@pytest.fixture
def held(tmp_path: Path) -> tuple[Tier, Tier]:
    """The disk of a node with a whole state of step 5, and the empty run directory."""
    node, run = Tier(tmp_path / "node", tmp_path / "run", ranks=(0,), fast=True), run_tier(tmp_path / "run")
    state = node.directory / checkpoint_name(5)
    state.mkdir(parents=True)
    names = [f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]
    for name in names:
        (state / name).write_bytes(b"x" * 10)
    manifest = replace(part(0, world_size=1)[5], files=tuple(file_entry(state / name) for name in names))
    write_manifest(state, manifest)
    return node, run


def test_a_state_is_put_together_or_what_is_damaged_is_named(held: tuple[Tier, Tier]) -> None:
    node, run = held
    assert collect_newest(node, run, -1, None, []) == 5
    assert read_checkpoint(run.directory / checkpoint_name(5)).manifest.is_whole
    shutil.rmtree(run.directory)
    next(node.directory.glob("*/*optim*")).write_bytes(b"y" * 10)
    reasons: list[str] = []
    assert collect_newest(node, run, -1, None, reasons) == 5
    assert "optim_states.pt is damaged (sha256 differs, on the node of rank 0)" in reasons[0]
    assert not list(run.directory.iterdir())


@pytest.mark.parametrize("what", ["make_unfinished", "_copy_file"])
def test_without_space_in_the_run_directory_no_state_is_given_up(
    what: str, held: tuple[Tier, Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, run = held
    monkeypatch.setattr(collect, what, no_space)
    with pytest.raises(SharedError, match=r"step 5 cannot be put together in .*No space left.*; the states of the nodes stay"):
        collect_newest(node, run, -1, None, [])
    assert read_checkpoint(node.directory / checkpoint_name(5)).manifest.is_whole
    assert not run.directory.exists() or not list(run.directory.iterdir())


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[Neighbours]:
    """Two ranks that send to each other, in threads of this process."""
    store = td.HashStore()
    found: list[Neighbours | None] = [None, None]

    def join(rank: int) -> None:
        group = td.ProcessGroupGloo(td.PrefixStore("pair", store), rank, 2)
        found[rank] = Neighbours(group, 1 - rank, (1 - rank,))

    in_threads(join)
    monkeypatch.setattr(td, "isend", lambda tensor, to, group: group.send([tensor], to, 0))
    monkeypatch.setattr(td, "irecv", lambda tensor, source, group: group.recv([tensor], source, 0))
    monkeypatch.setattr(neighbours, "CHUNK", 100)
    return [one for one in found if one is not None]


def in_threads(call: object) -> None:
    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("sizes", [(1000, 1000), (1, 950), (100, 201)])
def test_each_node_gets_the_files_of_the_other(pair: list[Neighbours], tmp_path: Path, sizes: tuple[int, int]) -> None:
    names = ("zero.pt", "one.pt")
    entries, got = [], {}
    for rank, size in enumerate(sizes):
        (tmp_path / str(rank)).mkdir()
        path = tmp_path / str(rank) / names[rank]
        path.write_bytes(bytes(range(256)) * 4 if size > 1000 else bytes(i % 251 for i in range(size)))
        entries.append(file_entry(path))

    def exchange(rank: int) -> None:
        got[rank] = pair[rank].exchange(tmp_path / str(rank), [entries[rank]])

    in_threads(exchange)
    assert got == {0: [entries[1]], 1: [entries[0]]}
    for rank in range(2):
        assert (tmp_path / "0" / names[rank]).read_bytes() == (tmp_path / "1" / names[rank]).read_bytes()


def test_a_rank_that_fails_does_not_hold_up_the_other(pair: list[Neighbours], tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / f"{rank}.pt").write_bytes(b"x" * 950)
    entries = [file_entry(tmp_path / str(rank) / f"{rank}.pt") for rank in range(2)]
    (tmp_path / "0" / "0.pt").unlink()  # what rank 0 sends
    errors = {}

    def exchange(rank: int) -> None:
        try:
            pair[rank].exchange(tmp_path / str(rank), [entries[rank]])
        except InputError as error:
            errors[rank] = str(error)

    in_threads(exchange)
    assert "0.pt" in errors[0]
    assert "differs from what was sent" in errors[1]
    assert (tmp_path / "0" / "1.pt").read_bytes() == b"x" * 950
