"""JSON files and files of JSON lines: read within bounds, written atomically. An object can say its own sha256 (`seal`).

In: a path. Out: the value, or one error with the path and the fix. `sealed.py` reads and writes our formats with it; recipes,
ds_configs and files of others are read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from igpt_ds.errors import InputError, naming, reason
from igpt_ds.files import atomic_file
from igpt_ds.plain_files import check_file, is_missing

MAX_JSON_BYTES = 1 << 26  # of one file, parsed to at most 30 times as many bytes of memory
MAX_JSON_DEPTH = 64
MAX_ROWS_BYTES = 1 << 30  # of a .jsonl file
_CORRECT = "correct the file, or name another"


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically.

    Raises:
        ValueError: a number is not finite, which JSON does not have.
    """
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def read_json(path: Path, what: str, fix: str = _CORRECT, limit: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        what: what the file is, for the error: "shard index", "ds_config".
        fix: what the user can do about content that is not JSON.
        limit: the most bytes that such a file has.

    Raises:
        ValueError: the file is missing, unreadable or too large, or `parse_json` refuses its text.
    """
    where, end = f"{what} {path}", "" if fix == _CORRECT else f"; {fix}"
    try:
        return parse_json(read_text(path, where, fix, limit), where, fix)
    except FileNotFoundError:
        raise InputError(f"{where} does not exist{end}") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {reason(error)}{end}") from None


def read_text(path: Path, where: str, fix: str, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a JSON file, in UTF-8 whatever the locale. It reads no more than `limit` bytes.

    Raises:
        ValueError: the file has more bytes or is not UTF-8.
        OSError: it is missing or cannot be read.
    """
    check_file(path)
    with naming(path), open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{where} is not valid JSON of its kind: it has more than {limit:,} bytes; {fix}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error}; {fix}") from None
    if text.startswith("\ufeff"):
        raise InputError(f"{where} begins with a byte order mark; save it as UTF-8 without one")
    return text


def parse_json(text: str, where: str, fix: str = _CORRECT, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        where: names the text in errors.
        finite: refuses NaN, Infinity, and numbers so large that Python takes them as infinite.

    Raises:
        ValueError: it is not JSON, it is nested too deep, or an object has a key twice, of which Python would take the last.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> object:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice.append(next(key for key in names if names.count(key) > 1))
        return found

    numbers: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=once, **numbers)
        if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth_exceeds(value, MAX_JSON_DEPTH):
            raise InputError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        raise InputError(f"{where} is not valid JSON: {error}; {fix}") from None
    if twice:
        raise InputError(f"{where} has {twice[0][:60]!r} twice in one object; {'remove one of them' if fix == _CORRECT else fix}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise InputError(f"{text[:20]} is not a finite number")
    return number


def _depth_exceeds(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        insides = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [inner for inside in insides for inner in inside]
    return any(isinstance(one, dict | list) for one in level)


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of the values and, as "sha256", the hash of all others: each of our files and rows says its own.

    Raises:
        ValueError: a number is not finite.
    """
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != "sha256"}, allow_nan=False))
    return plain | {"sha256": _content_hash(plain)}


def refuse_changed(values: Mapping[str, Any], where: str, fix: str) -> None:
    """Compares a JSON object that has a "sha256" with it.

    Raises:
        ValueError: the object is not the one that was written.
    """
    if values["sha256"] != _content_hash(values):
        raise InputError(
            f"{where} was changed since it was written: its sha256 differs; it is damaged, or was edited by hand, as only "
            f"recipes and ds_configs may be; {fix}"
        )


def read_sealed(path: Path, what: str, fix: str) -> Any:
    """`read_json` of a file of the run at work, which `seal` made; one of older code has no sha256.

    Raises:
        ValueError: as `read_json` and `refuse_changed` do.
    """
    values = read_json(path, what, fix)
    if isinstance(values, dict) and "sha256" in values:
        refuse_changed(values, f"{what} {path}", fix)
        del values["sha256"]
    return values


def _content_hash(values: Mapping[str, Any]) -> str:
    content = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_lines(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; [] if the file is missing. A torn last line, left by a killed writer, is ignored.

    A torn line is the start of an object, or the zeros of a disk that lost power, without a newline.

    Args:
        strict: for a file that is written whole, with a reader that checks each "sha256" itself: refuses a torn line, NaN and
            infinity, and leaves the "sha256" in its row.

    Raises:
        ValueError: any other line that is not a JSON object or was changed since it was written, or the file is not text.
    """
    if is_missing(path):
        return []
    rows = []
    lines = read_text(path, str(path), "name another file", MAX_ROWS_BYTES).split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        try:
            rows.append(parse_row(line, f"{path} line {number}", strict))
        except ValueError:
            if strict or number < len(lines) or line[:1] not in ("{", "\0") or line.rstrip().endswith("}"):
                raise
            print(f"{path} line {number} is torn and was left out", file=sys.stderr, flush=True)
    return rows


def parse_row(line: str, where: str, strict: bool = False) -> dict[str, Any]:
    """The row in one line of a .jsonl file; arguments and errors are those of `read_json_lines`."""
    fix = "remove the line, or name another file"
    row = parse_json(line, where, fix, finite=strict)
    if not isinstance(row, dict):
        raise InputError(f"{where} is not valid JSON of a row: it is no object; {fix}")
    if "sha256" in row and not strict:
        refuse_changed(row, where, fix)
        del row["sha256"]
    return row


def json_line(row: Mapping[str, object]) -> str:
    """A row of a .jsonl file with its own sha256."""
    return json.dumps(seal(row)) + "\n"


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a whole .jsonl file atomically."""
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(dict(row)) + "\n" for row in rows)
