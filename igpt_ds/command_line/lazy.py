"""Imports that wait until the command line is checked. --help and a wrong flag are answered before torch is imported.

    with lazy.imports():
        import torch
        from igpt_ds.model.store import load_model

    def main(argv=None):
        args = parse(argv)
        lazy.load()

In the block each name is bound to a stand-in; `load` imports the modules and puts the real objects in place. Only the module that
runs as a program waits. When a test or a worker process imports the same file, the block imports at once. Python 3.15 has a
statement for this, `lazy import`.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_waiting: list[dict[str, Any]] = []  # the names of the program whose imports wait


class _StandIn:
    """What `import module` or `from module import name` binds until `load`."""

    def __init__(self, module: str, names: Sequence[str], path: tuple[str, ...] = ()) -> None:
        self._module, self._names, self._path = module, names, path

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(self._module, self._names, (*self._path, name))

    def __call__(self, *args: object, **kwargs: object) -> None:
        start = self._module if self._names else self._module.partition(".")[0]
        raise TypeError(f"{'.'.join((start, *self._path))} is used before lazy.load()")

    __mro_entries__ = __call__  # a class cannot derive from it

    def _found(self) -> Any:
        found = __import__(self._module, fromlist=self._names)
        for name in self._path:
            found = getattr(found, name)
        return found


@contextmanager
def imports() -> Iterator[None]:
    """The imports of the block wait for `load` if the importing module is the program itself."""
    if sys._getframe(2).f_globals["__name__"] != "__main__":
        yield
        return
    really = builtins.__import__

    def wait(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        return _StandIn(name, fromlist or ())

    _waiting[:] = [sys._getframe(2).f_globals]
    builtins.__import__ = wait
    try:
        yield
    finally:
        builtins.__import__ = really


def load() -> None:
    """Imports what waits."""
    while _waiting:
        names = _waiting.pop()
        for name, value in list(names.items()):
            if isinstance(value, _StandIn):
                names[name] = value._found()
