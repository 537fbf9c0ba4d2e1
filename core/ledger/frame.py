"""The frame of a message: a header of 26 bytes in front of three sections.

| bytes | what |
| --- | --- |
| 2 | `FS` |
| 1 | version of the format, 1 |
| 1 | flags: which parts the message has, and the type of its values |
| 4 | CRC-32 of all other bytes, begun with that of what both ends know |
| 3 × 6 | lengths of the sections: masks, values, buffers |

Numbers are little-endian. What both ends know (names, shapes, masks they hold, round and client) is not sent
but goes into the checksum: a message for another model, round or client is refused as a damaged one is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from ..errors import RunError

MAGIC, VERSION = b"FS", 1
SECTIONS = 3
LENGTH = 6  # bytes of a section's length
HEADER = 8 + SECTIONS * LENGTH


class CorruptError(RunError):
    """Bytes that are no message, or not the one that was expected."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"corrupt message: {reason}")


def seal(flags: int, sections: Sequence[bytes], known: int) -> bytes:
    """A message of these sections; `known` is the CRC-32 of what both ends know."""
    lengths = b"".join(len(section).to_bytes(LENGTH, "little") for section in sections)
    start, body = MAGIC + bytes([VERSION, flags]), lengths + b"".join(sections)
    return start + _checksum(start, body, known) + body


def unseal(data: bytes, flags: int, known: int) -> list[bytes]:
    """The sections of a message. Raises CorruptError unless it is whole and the one that was expected."""
    if len(data) < HEADER:
        raise CorruptError(f"{len(data)} bytes, a header alone has {HEADER}")
    if data[:2] != MAGIC:
        raise CorruptError(f"it begins with {data[:2].hex()}, not {MAGIC.hex()}")
    if data[2] != VERSION:
        raise CorruptError(f"format {data[2]}; this version reads {VERSION}")
    if data[3] != flags:
        raise CorruptError(f"its flags are {data[3]:#04x}, {flags:#04x} was expected")
    places = range(8, HEADER, LENGTH)
    lengths = [int.from_bytes(data[at : at + LENGTH], "little") for at in places]
    if HEADER + sum(lengths) != len(data):
        raise CorruptError(f"{len(data)} bytes, its header says {HEADER + sum(lengths)}")
    if _checksum(data[:4], data[8:], known) != data[4:8]:
        raise CorruptError("its checksum is wrong: it is damaged, or meant for another receiver")
    sections, at = [], HEADER
    for length in lengths:
        sections.append(data[at : at + length])
        at += length
    return sections


def _checksum(start: bytes, rest: bytes, known: int) -> bytes:
    return zlib.crc32(rest, zlib.crc32(start, known)).to_bytes(4, "little")
