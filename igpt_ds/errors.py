"""The errors that a user can mend: bad input, and what the operating system refuses. `cli.run` turns them into one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the text names the value, the file and the fix. A plain ValueError of a library keeps its traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: one line."""
        return [f"{type(self).__name__}: {self}"]


_FIXES = {
    errno.ENOSPC: "free some space there and run the same command again",
    errno.EDQUOT: "free some space there or ask for a higher quota, and run the same command again",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a file system without it",
    errno.EIO: "the disk or the network file system failed; check it, or use a copy on another disk",
    errno.ESTALE: "the network file system lost the file; run the same command again",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.EISDIR: "name a file",
    errno.ENOENT: "check the path",
    errno.ELOOP: "replace the symbolic link by the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer workers",
    errno.ENFILE: "close other programs that hold files open",
    errno.ENOMEM: "use fewer workers, or a machine with more memory",
    errno.ETXTBSY: "end the program that uses it",
    errno.EEXIST: "remove it, or choose another name",
}

_TEMPORARY = re.compile(r"(?<=/)\.([^/]+)\.[0-9a-f]{12}\.partial")


@contextmanager
def naming(path: os.PathLike[str] | str) -> Iterator[None]:
    """An OSError of the block that does not name a file, such as that of a write to a full disk, names `path`.

    Temporary names are told as the names that the files would get.
    """
    try:
        yield
    except OSError as error:
        number, words, name = error.errno, error.strerror, _name(error)
        if number is None and "requested and" in str(error):  # numpy leaves out the reason of a short write
            number, words = errno.ENOSPC, f"a write was cut short ({error})"
        told = os.fspath(path) if name is None else name
        told = _TEMPORARY.sub(r"\1", told)
        if number is None or told == name:
            raise
        raise OSError(number, words, told) from None


def reason(error: OSError) -> str:
    """The reason of an OSError without its number, and the fix."""
    fix = f"; {_FIXES[error.errno]}" if error.errno in _FIXES else ""
    return f"{error.strerror or error}{fix}"


def error_text(error: BaseException) -> str:
    """An error as text: for an OSError the file, the reason and the fix."""
    if not isinstance(error, OSError):
        return str(error)
    name = _name(error)
    return reason(error) if name is None else f"{name}: {reason(error)}"


def _name(error: OSError) -> str | None:
    name = error.filename if error.filename2 is None else error.filename2  # of a rename: the final name
    return os.fsdecode(name) if isinstance(name, str | bytes) else None
