"""A PNG without the chunks that are not pixels: text, times and colour notes cannot make good pixels unreadable.

PIL refuses a PNG with a text chunk above 1 MB or a wrong checksum in any chunk. Called by data/images.py.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = (b"tRNS", b"eXIf")  # transparency and orientation; critical chunks have a capital first letter


def without_notes(data: bytes) -> bytes:
    """The same picture: critical chunks, transparency and an intact eXIf; any other bytes are returned unchanged.

    A wrong checksum stays in a chunk that decides pixels, and the decoder refuses the file.
    """
    if not data.startswith(SIGNATURE):
        return data
    parts, at = [SIGNATURE], len(SIGNATURE)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        intact = kind != b"eXIf" or zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]
        if kind[:1].isupper() or (kind in _KEPT and intact):
            parts.append(data[at:end])
        at = end
        if kind == b"IEND":
            return b"".join(parts)
    return b"".join([*parts, data[at:]])  # a file that was cut; the decoder says so
