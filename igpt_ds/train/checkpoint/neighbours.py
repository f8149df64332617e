"""Copies of each node's fast saves on the next node, so that a lost node takes no state along.

In: the files that a rank has just written, with their checksums. Out: the files of the ranks of the node before, in the same
directory. Each rank sends to one rank of the next node, the last node to the first, in a process group of its own: a thread calls
it while training goes on (saver.py). collect.py reads the copies of lost nodes. Called by train/checkpoint/saver.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as td
from torch import Tensor

from igpt_ds import dist
from igpt_ds.errors import InputError, error_text, naming
from igpt_ds.files import fsync_path
from igpt_ds.train.checkpoint.manifest import FileEntry
from igpt_ds.train.checkpoint.tiers import Tier

CHUNK = 1 << 23  # bytes of a message


@dataclass(frozen=True)
class Neighbours:
    """To which rank this one sends its files, and whose it receives."""

    group: td.ProcessGroup
    to: int
    sources: tuple[int, ...]

    def exchange(self, directory: Path, entries: Sequence[FileEntry]) -> list[FileEntry]:
        """Sends files of a directory and writes the received ones there. All ranks call this; a rank that fails goes on sending.

        Args:
            entries: of the files that this rank has written; none if it could not.

        Returns:
            The entries of the received files.

        Raises:
            ValueError, OSError: a file could not be read or written, or differs from what was sent.
        """
        mine = torch.frombuffer(bytearray(_packed(entries)), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in self.sources]
        self._swap(torch.tensor([len(mine)]), lengths)
        packed = [torch.empty(int(length), dtype=torch.uint8) for length in lengths]
        self._swap(mine, packed)
        theirs, errors = [_unpacked(bytes(each.numpy())) for each in packed], list[str]()
        for sent, *received in zip_longest(
            _chunks_of(directory, entries, errors), *(_room_for(directory, each, errors) for each in theirs)
        ):
            self._swap(sent, received)
        if errors:
            raise InputError(errors[0])
        return [entry for each in theirs for entry in each]

    def _swap(self, sent: Tensor | None, received: Sequence[Tensor | None]) -> None:
        """Sends one message and receives one from each source, those that have one."""
        under_way = [] if sent is None else [td.isend(sent, self.to, self.group)]
        pairs = zip(self.sources, received, strict=True)
        under_way += [td.irecv(tensor, source, self.group) for source, tensor in pairs if tensor is not None]
        for message in under_way:
            if message is not None:
                message.wait()


def find_neighbours(tier: Tier) -> Neighbours | None:
    """The neighbours of this rank; None if no copies are made. All ranks call this together."""
    if not tier.copies:
        return None
    nodes = sorted(set(dist.gather_objects(tier.members)))
    pairs = zip(nodes, nodes[1:] + nodes[:1], strict=True)
    receivers = {rank: after[place % len(after)] for node, after in pairs for place, rank in enumerate(node)}
    group = td.new_group(backend="gloo")
    assert isinstance(group, td.ProcessGroup)
    me = dist.rank()
    return Neighbours(group, receivers[me], tuple(rank for rank, receiver in receivers.items() if receiver == me))


def _packed(entries: Sequence[FileEntry]) -> bytes:
    return json.dumps([[entry.name, entry.bytes, entry.sha256] for entry in entries]).encode()


def _unpacked(packed: bytes) -> list[FileEntry]:
    return [FileEntry(name, size, sha256) for name, size, sha256 in json.loads(packed)]


def _parts(entry: FileEntry) -> Iterator[tuple[int, Tensor]]:
    """(offset, buffer) of each message of a file. All have the same buffer."""
    buffer = torch.zeros(min(CHUNK, entry.bytes), dtype=torch.uint8)
    for start in range(0, entry.bytes, CHUNK):
        yield start, buffer[: entry.bytes - start]


def _chunks_of(directory: Path, entries: Sequence[FileEntry], errors: list[str]) -> Iterator[Tensor]:
    """The content of files. What cannot be read is sent wrong: the receiver waits for it, and refuses it by its checksum."""
    for entry in entries:
        for start, part in _parts(entry):
            with _noted(errors), open(directory / entry.name, "rb") as file:
                file.seek(start)
                file.readinto(part.numpy().data)
            yield part


def _room_for(directory: Path, entries: Sequence[FileEntry], errors: list[str]) -> Iterator[Tensor]:
    """A buffer for each message of the files; what is in it is written before the next one."""
    for entry in entries:
        path, digest = directory / entry.name, hashlib.sha256()
        for _, part in _parts(entry):
            yield part
            digest.update(part.numpy().data)
            with _noted(errors), naming(path), open(path, "ab") as file:
                file.write(part.numpy().data)
        with _noted(errors):
            fsync_path(path)
        if digest.hexdigest() != entry.sha256:
            errors.append(f"{path} differs from what was sent (sha256)")


@contextmanager
def _noted(errors: list[str]) -> Iterator[None]:
    """Notes an error instead of raising it: the neighbours would wait for this rank."""
    try:
        yield
    except OSError as error:
        errors.append(error_text(error))
