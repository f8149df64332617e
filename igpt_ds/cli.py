"""What every entry point shares: a strict argument parser, and one-line errors with a non-zero exit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that refuses abbreviated flags and shows defaults; `description` is the tool's docstring."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the docstring's line breaks and adds each flag's default."""

    return argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Calls `main(argv=None)`; a ValueError (bad input) or OSError becomes one line on stderr and exit status 2.

    Every rank of a launch meets the same bad input, so before the ranks have joined only the first rank of each node speaks.
    """
    try:
        main(None)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or _ranks_have_joined():
            line = "; ".join(part.strip() for part in str(error).splitlines())
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        sys.exit(2)


def _ranks_have_joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
