"""The state file of an SGD probe, from which an interrupted probe continues. It is written and read only here.

In: accuracies of finished groups of rates, and the weights of the unfinished group. Out: a torch file, and an `SgdState` from it.
Called by `sgd_search.py`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_ds.errors import InputError
from igpt_ds.files import atomic_file
from igpt_ds.plain_files import check_file
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

STATE = Format("igpt_ds.sgd_state", "state of a probe", "remove it", version=1, sealed=1, oldest=0)


@dataclass(frozen=True)
class StateFile:
    """Where the state of a probe is written, and how often."""

    path: Path
    save_every: int = 10_000  # steps between two writings


@dataclass(frozen=True)
class RateResults:
    """What the probes of a group of rates reached: one value for each rate."""

    finite: list[bool]  # False: the rate diverged
    accuracies: dict[str, list[float]]  # by the name of the rows; 0 if the rate diverged


@dataclass(frozen=True)
class UnfinishedGroup:
    """A group of rates whose fit is not finished."""

    name: str
    step: int
    weights: dict[str, Tensor]  # of `Sgd.state`


@dataclass(frozen=True)
class SgdState:
    """How far a probe is."""

    done: dict[str, RateResults] = field(default_factory=dict)  # by the name of the group
    begun: UnfinishedGroup | None = None


def read_state(file: Path, identity: Mapping[str, object], device: str) -> SgdState:
    """The state in a file.

    Args:
        identity: what the probe is of, as `write_state` got it.

    Raises:
        ValueError: the file is torn or damaged, or it belongs to a probe of another identity.
    """
    check_file(file)
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise InputError(f"{file} is torn or not the state of a probe ({type(error).__name__}); remove it") from None
    what, fix = f"{STATE.what} {file}", STATE.fix
    STATE.opened(_as_json(saved), what)
    theirs = record_from(_Saved, saved, what, fix)
    for name, value in identity.items():
        was = theirs.identity.get(name, "nothing")
        if type(was) is not type(value) or was != value:
            raise InputError(f"{file} was begun with {name} {was!r}, now it is {value!r}; remove it, or name another --out")
    done = {}
    for group, values in theirs.done.items():
        about, lists = f"{what} done {group!r}", {name: value for name, value in values.items() if name != "finite"}
        done[group] = record_from(RateResults, {"accuracies": lists} | values, about, fix)
    return SgdState(done, theirs.begun)


@dataclass(frozen=True)
class _Saved:
    """The content of the file."""

    identity: dict[str, object]
    done: dict[str, dict[str, object]]
    begun: UnfinishedGroup | None = None


def write_state(file: Path, identity: Mapping[str, object], state: SgdState) -> None:
    """Writes the state atomically."""
    saved: dict[str, object] = {"done": {name: {"finite": one.finite, **one.accuracies} for name, one in state.done.items()}}
    if state.begun:
        saved["begun"] = {"name": state.begun.name, "step": state.begun.step, "weights": state.begun.weights}
    saved = {"format": STATE.name, "version": STATE.version, "identity": dict(identity)} | saved
    content = io.BytesIO()
    torch.save(saved | {"sha256": STATE.seal(_as_json(saved))["sha256"]}, content)
    with atomic_file(file) as out:  # torch.save itself would leave out why a write failed
        out.write(content.getbuffer())


def _as_json(value: Any) -> Any:
    """A value of the file for its sha256: a tensor counts by its type, its shape and the sha256 of its bytes."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content.data).hexdigest()]
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return value if isinstance(value, str | int) or value is None else repr(value)
