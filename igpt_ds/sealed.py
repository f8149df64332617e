"""Our JSON formats: a file says its format, its version and its own sha256. Their one reader and their one writer.

In: the fields of a record. Out: a file that `Format.read` opens again, or refuses in one line: the file, what is wrong, the fix.
Each format has a module that owns its `Format` and the dataclass of its fields (`schema.record_from`). Recipes and ds_configs,
which people write, have none of this and are read by `json_files.read_json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.errors import InputError
from igpt_ds.json_files import MAX_JSON_BYTES, read_json, refuse_changed, seal, write_json
from igpt_ds.schema import OtherVersionError, short

_HEADER = ("format", "version", "sha256")


@dataclass(frozen=True)
class Format:
    """One of our formats.

    Attributes:
        what: what a file is, for errors: "shard index".
        fix: what the user can do about a file that cannot be used.
        version: that is written.
        sealed: the first version with a sha256.
        oldest: the oldest version that is read; 0: also files that name neither format nor version.
        limit: the most bytes that a file has.
    """

    name: str
    what: str
    fix: str
    version: int
    sealed: int
    oldest: int
    limit: int = MAX_JSON_BYTES

    def seal(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object of a file with these fields."""
        return seal({"format": self.name, "version": self.version, **fields})

    def write(self, path: Path, fields: Mapping[str, Any]) -> None:
        """Writes a file with these fields, atomically, in the newest version."""
        write_json(path, self.seal(fields))

    def read(self, path: Path) -> dict[str, Any]:
        """The fields of a file, not yet compared with a dataclass.

        Raises:
            OtherVersionError: another format, or a version that this code does not read.
            ValueError: the file is missing, is not JSON, is no object, or was changed since it was written.
        """
        return self.opened(read_json(path, self.what, self.fix, self.limit), f"{self.what} {path}")

    def opened(self, values: object, where: str) -> dict[str, Any]:
        """The fields of a JSON object that `seal` made; raises as `read` does. `where` names the object in errors."""
        if not isinstance(values, dict):
            raise InputError(f"{where} has content {short(values)}, which is not an object; {self.fix}")
        if "sha256" in values:
            refuse_changed(values, where, self.fix)
        if self.oldest == 0 and not any(field in values for field in _HEADER):
            return values
        wanted = f"{self.name} version {' or '.join(map(str, range(max(1, self.oldest), self.version + 1)))}"
        for field in ("format", "version"):
            if field not in values:
                raise InputError(f"{where} is not {wanted}: it has no {field!r}; {self.fix}")
        name, version = values["format"], values["version"]
        if name != self.name or type(version) is not int or not self.oldest <= version <= self.version:
            found = f"version {short(version)} of {short(name)}"
            raise OtherVersionError(f"{where} is not {wanted}: it is {found}; {self.fix}, or read it with the code that wrote it")
        if version >= self.sealed and "sha256" not in values:
            raise InputError(f"{where} has no 'sha256', as every file of version {version} has; {self.fix}")
        return {field: value for field, value in values.items() if field not in _HEADER}
