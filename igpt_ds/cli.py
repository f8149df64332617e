"""What every entry point shares: an argument parser, printable output, and one-line errors with a non-zero exit."""

from __future__ import annotations

import argparse
import contextlib
import locale
import os
import pwd
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from igpt_ds.command_line.parser import Parser, program
from igpt_ds.errors import InputError, error_text, naming
from igpt_ds.launcher import RANK_VARIABLES, LaunchError, restore_devices
from igpt_ds.threads import sleep_while_waiting

STOPPED = 85  # exit status: stopped early with everything saved; the same command with --resume auto continues
HUNG = 86  # exit status: a rank made no progress for too long; its stacks are in RUN_DIR/stacks

_OUTPUT = "standard output"
_AFTER_OTHERS = 2.0  # seconds; the launcher polls once a second, and must find a killed rank before the ranks that it takes along

# Control characters, marks that change the direction of text, line separators, and bytes of names that are not UTF-8.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BAR = re.compile(r"\r|\n*(\x1b\[A)*$")  # how tqdm starts a progress bar's line, or moves between the lines of several


def parser(description: str) -> Parser:
    """An argument parser whose mistakes are one line; `description` is the program's docstring."""
    return Parser(description)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag of the device that a tool computes on."""
    text = "device; auto takes a GPU if one exists, else the CPU"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


class SharedError(InputError):
    """Bad input that every rank raises at the same place, so only rank 0 prints it."""


class FinishedError(InputError):
    """An earlier run of the same command finished the result and was killed just before it ended, so nothing is left to do."""


_at_end: list[Callable[[str], None]] = []


def at_end(tell: Callable[[str], None]) -> None:
    """Makes `run` call `tell` before the process ends, with the error as one line, or "" without an error."""
    _at_end.append(tell)


def _tell(error: str) -> None:
    while _at_end:
        _at_end.pop()(error)


def printable(text: str) -> str:
    """A text without control characters, which may come from names of files and labels: each is an escape such as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable:
    """A text stream that writes `printable` text. On a terminal it leaves tqdm's progress bars as they are."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Writes the text. An OSError names the stream."""
        bar = _BAR.match(text) if self._stream.isatty() else None
        start = bar.end() if bar else 0
        encoding = self._stream.encoding or "utf-8"  # escapes also stand for characters that it does not have
        known = printable(text[start:]).encode(encoding, "backslashreplace").decode(encoding)
        with naming(self._name):
            self._stream.write(text[:start] + known)
        return len(text)

    def flush(self) -> None:
        """Empties the buffer."""
        with naming(self._name):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_printable() -> None:
    """From now on, all that this process prints through sys.stdout and sys.stderr is printable in any locale."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # tracebacks and help of newer Pythons
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (None: closed by the parent process)
        if not isinstance(stream, _Printable):
            setattr(sys, name, _Printable(stream, _OUTPUT if name == "stdout" else "standard error"))


def _read_utf8() -> None:
    """Libraries open their own files, which hold UTF-8, in the encoding of the locale: torch's compiler does."""
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
        for name in ("C.UTF-8", "en_US.UTF-8"):
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                return


def _have_home() -> None:
    """Libraries keep caches in the home directory, and some fail, or make a directory "~", if it is missing."""
    try:
        home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container that does not know the user
        home = ""
    if not os.access(home, os.X_OK):
        home = tempfile.mkdtemp(prefix="igpt_ds_home.")
        print(f"HOME is missing; libraries keep their caches in {home}; export HOME to keep them", file=sys.stderr)
    os.environ["HOME"] = home


@contextlib.contextmanager
def unread_output() -> Iterator[None]:
    """For the lines of a long run, which continues without them if their reader, such as `tee`, has ended."""
    try:
        yield
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    """Python flushes the buffer once more when it ends, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[Sequence[str] | None], None], ranks: bool = False) -> None:
    """Calls `main(argv=None)`; an InputError or OSError becomes one line on stderr and exit status 2.

    Any other exception, such as a ValueError of a library, is a mistake in this code: a traceback and exit status 1.

    A program that launchers start has `ranks`. Any other one ignores a launcher's variables, which a shell may still have.

    SystemExit(STOPPED) ends every rank with that status.

    Every rank of a launch meets the same bad input, so before the ranks have joined only the first rank of each node prints it.
    """
    if not ranks:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    else:
        restore_devices(os.environ)
    sleep_while_waiting(os.environ)
    _print_printable()
    _read_utf8()
    try:
        _have_home()
        main(None)
        sys.stdout.flush()
        _tell("")
    except FinishedError as finished:
        print(finished, flush=True)
        _tell("")
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        _discard_output()
        sys.exit(141)
    except (InputError, OSError) as error:
        _refuse(error)
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr, flush=True)
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


def _refuse(error: InputError | OSError) -> NoReturn:
    """Prints the error as one line and exits with status 2."""
    joined = _joined_ranks()
    silent = isinstance(error, SharedError) and os.environ.get("RANK", "0") != "0"
    if not silent and (joined or isinstance(error, LaunchError) or os.environ.get("LOCAL_RANK", "0") == "0"):
        line = "; ".join(part.strip() for part in error_text(error).split("\n") if part.strip())
        with contextlib.suppress(OSError):
            print(f"{program()}: error: {line}", file=sys.stderr, flush=True)
    if isinstance(error, OSError) and error.filename == _OUTPUT:
        _discard_output()
    _tell(error_text(error))
    if joined:
        _leave(2)  # without the barrier, which would wait for ranks that may be in a collective
    sys.exit(2)


def _leave(status: int) -> None:
    # About one launch in twenty aborts if the interpreter shuts down while gloo's threads still release Python objects.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _joined_ranks() -> Any:
    """torch.distributed once the ranks have joined, otherwise None. It never imports torch itself."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
