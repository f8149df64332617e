"""Tables as Markdown: any text may stand in a cell, since names of data sets are those of folders. Their one writer and reader.

In: cells. Out: lines that begin and end with "|". `evaluate/report/`, `ops/torture/` and the tools write tables with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def one_line(text: str) -> str:
    """Text in which a line break or a control character stands as `\\n` or `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown_cell(text: str) -> str:
    """Text for a cell: a "|" does not end it, and a line break or a control character stands there as `\\n` or `\\x1b`."""
    return re.sub(r"[\\|]", r"\\\g<0>", one_line(text))


def as_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(map(markdown_cell, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def read_cells(line: str) -> list[str]:
    """The texts of a table's line."""
    inner = re.findall(r"((?:\\.|[^|\\])*)\|", line.strip().removeprefix("|"))
    return [re.sub(r"\\([\\|])", r"\1", cell.strip()) for cell in inner]
