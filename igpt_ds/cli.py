"""What every entry point shares: a strict argument parser, and one-line errors with a non-zero exit."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from igpt_ds.launcher import RANK_VARIABLES, LaunchError

STOPPED = 85  # exit status: stopped early with everything saved; the same command with --resume auto continues
HUNG = 86  # exit status: a rank made no progress for too long; its stacks are in RUN_DIR/stacks

_AFTER_OTHERS = 2.0  # seconds; the launcher polls once a second, and must find a killed rank before the ranks that it takes along


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that refuses abbreviated flags and shows defaults; `description` is the tool's docstring."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the docstring's line breaks. Adds each flag's default, except None, False, [] and what the help text names."""

        def _get_help_string(self, action: argparse.Action) -> str | None:
            named = "(default" in (action.help or "") or action.default in (None, []) or action.default is False
            return action.help if named else super()._get_help_string(action)

    return argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)


class SharedError(ValueError):
    """Bad input that every rank raises at the same place, so only rank 0 prints it."""


class FinishedError(ValueError):
    """An earlier run of the same command finished the result and was killed just before it ended, so nothing is left to do."""


_at_end: list[Callable[[str], None]] = []


def at_end(tell: Callable[[str], None]) -> None:
    """Makes `run` call `tell` before the process ends, with the error as one line, or "" without an error."""
    _at_end.append(tell)


def _tell(error: str) -> None:
    while _at_end:
        _at_end.pop()(error)


def run(main: Callable[[Sequence[str] | None], None], ranks: bool = False) -> None:
    """Calls `main(argv=None)`; a ValueError (bad input) or OSError becomes one line on stderr and exit status 2.

    A program that launchers start has `ranks`. Any other one ignores a launcher's variables, which a shell may still have.

    SystemExit(STOPPED) ends every rank with that status.

    Every rank of a launch meets the same bad input, so before the ranks have joined only the first rank of each node prints it.
    """
    if not ranks:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    try:
        main(None)
        _tell("")
    except FinishedError as finished:
        print(finished, flush=True)
        _tell("")
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        joined = _joined_ranks()
        silent = isinstance(error, SharedError) and os.environ.get("RANK", "0") != "0"
        if not silent and (joined or isinstance(error, LaunchError) or os.environ.get("LOCAL_RANK", "0") == "0"):
            line = "; ".join(part.strip() for part in error_text(error).splitlines())
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
        _tell(error_text(error))
        if joined:
            _leave(2)  # without the barrier, which would wait for ranks that may be in a collective
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        _tell("interrupted")
        if _joined_ranks():
            _leave(130)
        sys.exit(130)
    except SystemExit as end:
        if end.code == STOPPED and (joined := _joined_ranks()):
            joined.destroy_process_group()
            _leave(STOPPED)
        raise
    except Exception as error:
        _tell(f"{type(error).__name__}: {error}")
        if joined := _joined_ranks():
            sys.excepthook(type(error), error, error.__traceback__)
            if joined.get_world_size() > 1:
                time.sleep(_AFTER_OTHERS)
            _leave(1)
        raise
    if joined := _joined_ranks():
        joined.destroy_process_group()
        _leave(0)


def error_text(error: Exception) -> str:
    """An error as text: for an OSError the file and the reason, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        fix = "; free some space there and run the same command again" if error.errno == errno.ENOSPC else ""
        return f"{error.filename}: {error.strerror}{fix}"
    return str(error)


def _leave(status: int) -> None:
    # About one launch in twenty aborts if the interpreter shuts down while gloo's threads still release Python objects.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _joined_ranks() -> Any:
    """torch.distributed once the ranks have joined, otherwise None. It never imports torch itself."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
