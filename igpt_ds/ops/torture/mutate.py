"""Damages one file. In: a seeded random generator and a file. Out: the damaged file, and what was done in words.

Files are damaged as disks, networks, editors and enemies do it: bits, lengths, copies of other parts, wrong values and types in
JSON, headers that lie, a pickle that runs a command, a fifo, a link, a Git LFS pointer.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.ops.torture.trial import RAN

Change = Callable[[random.Random, Path], None]
SIGNED, GADGET, MISSING = "a hostile text, signed", "a gadget", "missing"
WITHOUT_SILENT = (SIGNED, GADGET)  # these files say the sha256 of their content: a reader cannot know that an enemy wrote them
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 27262976\n" % (b"4d" * 32)


class _Gadget:
    """Its pickle makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary.absolute()}",)


def damage(random_: random.Random, file: Path, place: Path, around: Path) -> str:
    """Damages a file; returns the kind of damage.

    Args:
        place: the directory of the trial, where a gadget makes its file.
        around: the directory whose JSON files may hold the file's sha256, which a gadget refreshes.
    """
    kinds: list[str] = [*_ANY]
    if file.suffix in (".json", ".jsonl"):
        kinds += [kind for kind in _JSON if kind != SIGNED or file.suffix == ".json"] * 3
    elif file.suffix == ".npy":
        kinds += list(_NPY) * 2
    elif file.suffix == ".safetensors":
        kinds += ["length of the header", "header"] * 3
    kind = random_.choice([*kinds, GADGET, GADGET])
    if kind == GADGET:
        _gadget(random_, file, place / RAN, around)
    else:
        (_ANY | _JSON | _NPY | _TENSORS)[kind](random_, file)
    return kind


def _edit(change: Callable[[random.Random, bytearray], bytes | bytearray]) -> Change:
    def edited(random_: random.Random, file: Path) -> None:
        file.write_bytes(change(random_, bytearray(file.read_bytes())))

    return edited


def _part(random_: random.Random, content: bytearray) -> slice:
    first = random_.randrange(len(content) or 1)
    return slice(first, first + random_.choice((1, 8, 512, 4096)))


def _bit(random_: random.Random, content: bytearray) -> bytearray:
    if content:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    return content


def _fill(byte: Callable[[random.Random], int]) -> Callable[[random.Random, bytearray], bytearray]:
    def filled(random_: random.Random, content: bytearray) -> bytearray:
        part = _part(random_, content)
        content[part] = bytes(byte(random_) for _ in content[part])
        return content

    return filled


def _without(random_: random.Random, content: bytearray) -> bytearray:
    del content[_part(random_, content)]
    return content


def _twice(random_: random.Random, content: bytearray) -> bytearray:
    part = _part(random_, content)
    content[part.start : part.start] = content[part]
    return content


def _swapped(random_: random.Random, content: bytearray) -> bytearray:
    one, other = _part(random_, content), _part(random_, content)
    content[one], content[other] = content[other][: len(content[one])], content[one][: len(content[other])]
    return content


def _replaced(make: Callable[[Path], None]) -> Change:
    def replaced(random_: random.Random, file: Path) -> None:
        file.unlink()
        make(file)

    return replaced


_ANY: dict[str, Change] = {
    "bit": _edit(_bit),
    "another bit": _edit(_bit),
    "random part": _edit(_fill(lambda random_: random_.randrange(256))),
    "zeros": _edit(_fill(lambda random_: 0)),
    "part missing": _edit(_without),
    "part twice": _edit(_twice),
    "parts exchanged": _edit(_swapped),
    "end missing": _edit(lambda random_, content: content[: random_.randrange(len(content) or 1)]),
    "more at the end": _edit(lambda random_, content: content + bytes(random_.randrange(256) for _ in range(20))),
    "empty": _edit(lambda random_, content: b""),
    "LFS pointer": _edit(lambda random_, content: LFS),
    MISSING: _replaced(lambda file: None),
    "a directory": _replaced(lambda file: file.mkdir()),
    "a fifo": _replaced(lambda file: os.mkfifo(file)),
    "a dangling link": _replaced(lambda file: file.symlink_to("nothing")),
    "a link to itself": _replaced(lambda file: file.symlink_to(file.name)),
}

_HOSTILE = (
    *("../../etc/passwd", "/etc/passwd", "\x1b[31mred", "a\nb", "\udcff", "x" * 100_000, "pipe:touch ran"),
    *("$(touch ran)", "x; touch ran;", "`touch ran`", "x | touch ran", "--help", "-", ""),
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        1.5,
        10**9,
        1 << 40,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        [],
        {},
        [1],
        {"a": 1},
    ),
    *_HOSTILE,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON value."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def _json(change: Callable[[random.Random, Any, Any], None]) -> Change:
    """A change of one value somewhere in a JSON file, or in one row of a .jsonl."""

    def changed(random_: random.Random, file: Path) -> None:
        rows = file.suffix == ".jsonl"
        texts = file.read_text(encoding="utf-8").splitlines() if rows else [file.read_text(encoding="utf-8")]
        number = random_.randrange(len(texts)) if texts else 0
        value = json.loads(texts[number]) if texts else {}
        if places := _places(value):
            change(random_, *random_.choice(places))
            texts[number] = json.dumps(value, indent=None if rows else 1)
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")

    return changed


def _set(random_: random.Random, container: Any, key: Any) -> None:
    container[key] = random_.choice(_VALUES)


def _nudge(random_: random.Random, container: Any, key: Any) -> None:
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int | float):
        container[key] = value + random_.choice((-1, 1, 1000))
    elif isinstance(value, str):
        container[key] = value[:-1] + "0"
    else:
        _set(random_, container, key)


def _delete(random_: random.Random, container: Any, key: Any) -> None:
    del container[key]


def _add(random_: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container["surprise"] = random_.choice(_VALUES)
    else:
        container.append(container[key])


def _signed(random_: random.Random, file: Path) -> None:
    """An enemy's file: a hostile text in place of any text, under a sha256 that fits."""
    value = json.loads(file.read_text(encoding="utf-8"))
    texts = [(container, key) for container, key in _places(value) if isinstance(container[key], str) and key != "sha256"]
    if texts:
        container, key = random_.choice(texts)
        container[key] = random_.choice(_HOSTILE)
    if isinstance(value, dict) and "sha256" in value:
        content = {key: one for key, one in value.items() if key != "sha256"}
        value["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(value), encoding="utf-8")


def _deep(random_: random.Random, content: bytearray) -> bytes:
    return b"[" * 200_000


def _key_twice(random_: random.Random, content: bytearray) -> bytes:
    text = bytes(content)
    return text.replace(b"{", b'{"version": 1, "version": 1, ', 1)


_JSON: dict[str, Change] = {
    "another value": _json(_set),
    "a nearby value": _json(_nudge),
    "no such key": _json(_delete),
    "one more key": _json(_add),
    "deep nesting": _edit(_deep),
    "a key twice": _edit(_key_twice),
    SIGNED: _signed,
}


def _npy_header(random_: random.Random, content: bytearray) -> bytes:
    """Another shape or dtype in a header of the same length or another one."""
    shapes = ((1 << 60,), (1 << 20, 1 << 20), (-1,), (0,), (), (3, 10**9), (1,))
    dtypes = ("<f8", "<i8", "|u1", "|O", "<U9", ">u2", "|S4")
    header = {"descr": random_.choice(dtypes), "fortran_order": random_.random() < 0.3, "shape": random_.choice(shapes)}
    text = f"{header}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(content[128:])


_NPY: dict[str, Change] = {"header of an array": _edit(_npy_header)}


def _tensor_length(random_: random.Random, content: bytearray) -> bytes:
    length = random_.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1, struct.unpack("<Q", content[:8])[0] + 1))
    return struct.pack("<Q", length) + bytes(content[8:])


def _tensor_header(random_: random.Random, content: bytearray) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    random_.choice((_set, _nudge, _delete))(random_, *random_.choice(_places(header)))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(content[8 + length :])


_TENSORS: dict[str, Change] = {"length of the header": _edit(_tensor_length), "header": _edit(_tensor_header)}


def _gadget(random_: random.Random, file: Path, canary: Path, around: Path) -> None:
    """A pickle that runs a command, in a form that a reader of this file might load, with its sha256 and size refreshed."""
    before = file.read_bytes()
    content = pickle.dumps(_Gadget(canary))
    if file.suffix == ".npy":
        box, array = io.BytesIO(), np.empty(1, dtype=object)
        array[0] = _Gadget(canary)
        np.save(box, array, allow_pickle=True)
        content = box.getvalue()
    elif file.suffix in (".pt", ".bin") and random_.random() < 0.7:
        import torch

        box = io.BytesIO()
        torch.save({"module": _Gadget(canary)}, box)
        content = box.getvalue()
    file.write_bytes(content)
    old, new = (hashlib.sha256(text).hexdigest() for text in (before, content))
    for manifest in around.rglob("*.json"):
        text = manifest.read_text(encoding="utf-8", errors="replace") if manifest.is_file() else ""
        if old in text:
            manifest.write_text(text.replace(old, new).replace(f": {len(before)}", f": {len(content)}"), encoding="utf-8")
