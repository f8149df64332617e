"""What every entry point shares: a strict argument parser, and one-line errors with a non-zero exit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that refuses abbreviated flags and shows defaults; `description` is the tool's docstring."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the docstring's line breaks and adds each flag's default."""

    return argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Calls `main(argv=None)`; a ValueError (bad input) or OSError becomes one line on stderr and exit status 2.

    Every rank of a launch meets the same bad input, so before the ranks have joined only the first rank of each node speaks.
    Joined ranks are parted at the end: an interpreter that ends while gloo's threads live aborts now and then.
    """
    try:
        main(None)
    except (ValueError, OSError) as error:
        joined = _joined_ranks()
        if joined or os.environ.get("LOCAL_RANK", "0") == "0":
            line = "; ".join(part.strip() for part in str(error).splitlines())
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if joined:
            os._exit(2)  # at once: the other ranks may wait in a collective, and parting would wait for them
        sys.exit(2)
    if joined := _joined_ranks():
        joined.destroy_process_group()


def _joined_ranks() -> Any:
    """torch.distributed once the ranks have joined, else None; does not import torch for a program that has no use for it."""
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if torch is not None and joined else None
