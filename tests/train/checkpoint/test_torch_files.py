"""What torch.save writes is read without being run, and what is written torch reads."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds.train.checkpoint import torch_files
from igpt_ds.train.checkpoint.torch_files import Foreign, NewTensor, StoredTensor, read_torch_file, write_torch_file


class Scaler:
    """An object of a class of somebody's, with a state."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        return (os.system, ("touch exploded",))


CONTENT = {
    "flat": torch.arange(10, dtype=torch.float32),
    "view": torch.arange(10, dtype=torch.bfloat16)[2:7],
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "scalar": torch.tensor(7.0),
    "nothing": torch.empty(0),
    "shapes": [OrderedDict(a=torch.Size([2, 3]))],
    "scaler": Scaler(2.5),
    "numpy": np.random.default_rng(0).bit_generator.state | {"keys": np.arange(3)},
    "words": ("x", None, 3, b"bytes"),
    "dtype": torch.float16,
}


def same(left: object, right: object) -> None:
    """Both hold the same, down to their types."""
    for name in CONTENT:
        a, b = left[name], right[name]
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.detach(), b.detach())
        elif name == "scaler":
            assert (type(b), b.scale) == (Scaler, 2.5)
        elif name == "numpy":
            assert (a["keys"] == b["keys"]).all()
            assert a["state"] == b["state"]
        else:
            assert a == b


@pytest.mark.parametrize("mmap", [False, True])
def test_read_and_written_back_torch_finds_the_same(tmp_path: Path, mmap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "BLOCK", 12)  # several blocks even for these
    torch.save(CONTENT, tmp_path / "a.pt")
    content = read_torch_file(tmp_path / "a.pt")
    assert isinstance(content["flat"], StoredTensor)
    assert torch.equal(content["view"].read(), CONTENT["view"])
    part = [bytes(block) for block in content["flat"].blocks(3, 4)]
    assert [len(block) for block in part] == [12, 4]
    assert b"".join(part) == torch.arange(3, 7, dtype=torch.float32).numpy().tobytes()
    assert isinstance(content["scaler"], Foreign)
    write_torch_file(tmp_path / "b.pt", content)
    same(CONTENT, torch.load(tmp_path / "b.pt", weights_only=False, mmap=mmap))
    write_torch_file(tmp_path / "c.pt", read_torch_file(tmp_path / "b.pt"))
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


def test_a_tensor_made_of_blocks(tmp_path: Path) -> None:
    new = NewTensor(torch.float32, (2, 2), lambda: iter([bytes(4), torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()]))
    write_torch_file(tmp_path / "a.pt", [new])
    assert torch.equal(torch.load(tmp_path / "a.pt")[0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    position = read_torch_file(tmp_path / "a.pt")[0].position
    assert position % 64 == 0


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"bomb": Bomb()}, tmp_path / "a.pt")
    content = read_torch_file(tmp_path / "a.pt")
    write_torch_file(tmp_path / "b.pt", content)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "b.pt", weights_only=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no archive"),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: torch.save(torch.ones(2, 3).t(), path),
        lambda path: torch.save(torch.ones(2, dtype=torch.complex64), path),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, damage: object) -> None:
    torch.save(CONTENT, tmp_path / "a.pt")
    damage(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is not a file of torch\.save that this code reads"):
        read_torch_file(tmp_path / "a.pt")


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    torch.save(torch.ones(1000), tmp_path / "a.pt")
    stored = read_torch_file(tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 900)
    with pytest.raises(ValueError, match=r"a\.pt ends in the middle of a tensor"):
        stored.read()
