"""Words for people: counts, durations, and the command that comes next. In: values. Out: text. Programs and reports call it."""

from __future__ import annotations

import os
import shlex


def count(n: int, thing: str, things: str | None = None) -> str:
    """A number with its noun: "1 rank", "2 ranks", "1,640 images"."""
    return f"{n:,} {thing if n == 1 else things or f'{thing}s'}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "45 s", "3 min 20 s", "2 h 5 min", "8 d 14 h"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    for place, (name, size) in enumerate(units[:-1]):
        if whole >= size:
            rest, small = divmod(whole % size, units[place + 1][1])[0], units[place + 1][0]
            return f"{whole // size} {name} {rest} {small}" if rest else f"{whole // size} {name}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    """Seconds as "0:45", "3:20" or "26:05:09", for columns."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def next_command(*words: str | os.PathLike[str], label: str = "next") -> str:
    """The closing line of a program: the command that a user types next, quoted for a shell.

    Args:
        words: a program and its flags.
        label: "or" for a second command.
    """
    return f"{label + ':':<6}{shlex.join(os.fspath(word) for word in words)}"
