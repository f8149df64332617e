"""Seeded damage to files, and what a reader makes of it. Nothing of igpt_ds is imported.

In: the bytes of a good file. Out: damaged copies, each with its kind. The same seed gives the same copies. Bytes are flipped,
cut, added, zeroed and moved. JSON files and files of JSON lines also lose keys, change types, swap values and get numbers that
no reader expects. `judge` calls a reader and says whether the damage had an effect.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutation = tuple[str, bytes]  # kind, content
Places = list[tuple[Any, Any]]  # (container, key) of each value

HUGE = (10**9, 10**30, -(10**19), 1e308, 2**63)
OTHER_TYPES = (None, True, 0, -1, 0.5, "", "text", [], {}, [[["x"]]], {"x": 1})
TEXTS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 2000, "\\u0000", '"\\ud800"', "")


def mutations(content: bytes, seed: int, count: int) -> Iterator[Mutation]:
    """`count` damaged copies of a file, half of them damaged as JSON where the file is JSON or a file of JSON lines."""
    chance = random.Random(seed)
    structured = _is_json(content)
    lines = [] if structured else content.split(b"\n")[:-1]
    rows = bool(lines) and all(map(_is_json, lines))
    for number in range(count):
        if structured and number % 2:
            yield mutate_json(content, chance)
        elif rows and number % 2:
            line = chance.randrange(len(lines))
            kind, changed = mutate_json(lines[line], chance)
            yield f"line {line + 1}: {kind}", b"\n".join([*lines[:line], changed, *lines[line + 1 :]]) + b"\n"
        else:
            yield mutate_bytes(content, chance)


def mutate_bytes(content: bytes, chance: random.Random) -> Mutation:
    """Damage to bytes: a flipped bit or byte, a cut, an extension, a hole, a copied or moved piece."""
    size = len(content)
    place, length = chance.randrange(max(1, size)), chance.randrange(1, max(2, min(64, size)))
    piece = content[place : place + length]
    kind = chance.choice(("bit", "bit", "byte", "cut", "hole", "zeros", "twice", "end", "front", "empty", "header", "mark"))
    made = {
        "bit": lambda: _with(content, place, bytes([content[place] ^ 1 << chance.randrange(8)])),
        "byte": lambda: _with(content, place, bytes([chance.randrange(256)])),
        "cut": lambda: content[:place],
        "hole": lambda: content[:place] + content[place + length :],
        "zeros": lambda: _with(content, place, bytes(len(piece))),
        "twice": lambda: content[:place] + piece + content[place:],
        "end": lambda: content + bytes(chance.randrange(256) for _ in range(length)),
        "front": lambda: bytes(chance.randrange(256) for _ in range(length)) + content,
        "empty": lambda: b"",
        "header": lambda: _with(content, min(place, 127), bytes([chance.choice(b"0123456789\xff")])),
        "mark": lambda: b"\xef\xbb\xbf" + content,
    }
    return f"{kind} at {place}", made[kind]()


def mutate_json(content: bytes, chance: random.Random) -> Mutation:
    """Damage to one JSON object: a missing, renamed or doubled key, another type, two swapped values, a huge or odd number."""
    values = json.loads(content)
    places = list(_places(values))
    if not places:
        return "other top", chance.choice((b"null", b"3", b'"text"', b"[]", b"[1, 2]"))
    inside, key = chance.choice(places)
    kind = chance.choice(("delete", "type", "swap", "huge", "digit", "rename", "text", "doubled", "top"))
    if kind == "delete":
        del inside[key]
    elif kind == "type":
        inside[key] = chance.choice(OTHER_TYPES)
    elif kind == "swap":
        other, there = chance.choice(places)
        inside[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(inside[key])
    elif kind == "huge":
        inside[key] = chance.choice(HUGE)
    elif kind == "digit":
        numbers = [(one, at) for one, at in places if type(one[at]) in (int, float)] or [(inside, key)]
        one, at = chance.choice(numbers)
        one[at] = one[at] + 1 if type(one[at]) in (int, float) else "1"
    elif kind == "rename" and isinstance(inside, dict):
        inside[f"{key}_"] = inside.pop(key)
    elif kind == "top":
        return "other top", chance.choice((b"null", b"3", b'"text"', b"[]", b"{}"))
    elif kind in ("text", "doubled"):
        inside[key] = "@here@"
        text = chance.choice(TEXTS) if kind == "text" else '1, "version": 1'
        return f"{kind} {text[:12]} at {key}", json.dumps(values).replace('"@here@"', text).encode()
    return f"{kind} at {key}", json.dumps(values).encode()


def judge(read: Callable[[], Any], good: Any, name: str) -> str:
    """What a reader makes of a damaged file: "same", "error", "silent" if the value differs, or the fault in words.

    A good error is a ValueError or OSError in one line with the file's name.
    """
    try:
        found = read()
    except OSError as error:
        return "error" if name in str(error.filename) else f"OSError without the file: {error}"
    except ValueError as error:
        text = str(error)
        if "\n" in text or name not in text or len(text) > 2000:
            return f"no clear error: {type(error).__name__} {text[:500]!r}"
        return "error"
    except Exception as error:  # what a user would see as a traceback
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    return "same" if found == good else "silent"


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _with(content: bytes, place: int, piece: bytes) -> bytes:
    return content[:place] + piece + content[place + len(piece) :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)
