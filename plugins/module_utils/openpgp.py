# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fingerprints of OpenPGP public keys, without gpg, which bare nodes lack.

Formats: RFC 4880, sections 4.2 (packet headers), 6.2 (ASCII armor) and 12.2 (fingerprints).
"""

from __future__ import annotations

import base64
import binascii
import hashlib

PUBLIC_KEY = 6


class KeyFileError(ValueError):
    """The file is no OpenPGP public key."""


def is_armored(data: bytes) -> bool:
    """Return whether a key is in ASCII armor."""
    return b"-----BEGIN PGP PUBLIC KEY BLOCK-----" in data


def dearmor(data: bytes) -> bytes:
    """Return the packets of all armored blocks of a file."""
    packets = b""
    body: list[bytes] | None = None
    for line in data.splitlines():
        word = line.strip()
        if word.startswith(b"-----BEGIN PGP PUBLIC KEY BLOCK"):
            body = []
        elif word.startswith(b"-----END PGP PUBLIC KEY BLOCK") and body is not None:
            try:
                packets += base64.b64decode(b"".join(body), validate=True)
            except binascii.Error as error:
                raise KeyFileError(f"the armor is broken ({error})") from error
            body = None
        elif body is not None and word and b":" not in word and not word.startswith(b"="):
            body.append(word)
    return packets


def fingerprints(data: bytes) -> list[str]:
    """Return the fingerprints of the primary keys of a key file, 40 capital hexadecimal digits each.

    Raises:
        KeyFileError: the file is broken, or holds no public key, or one of another version than 4.
    """
    packets = dearmor(data) if is_armored(data) else data
    found = []
    position = 0
    while position < len(packets):
        try:
            tag, body, position = packet(packets, position)
        except IndexError as error:
            raise KeyFileError("the file ends within a packet") from error
        if tag == PUBLIC_KEY and body[:1] != b"\x04":
            # Left out it would be trusted unseen.
            raise KeyFileError("it holds a key of another version than 4")
        if tag == PUBLIC_KEY:
            found.append(hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper())
    if not found:
        raise KeyFileError("it holds no OpenPGP public key")
    return found


def packet(data: bytes, start: int) -> tuple[int, bytes, int]:
    """Return tag, body and end of the packet that begins at ``start``."""
    head = data[start]
    if not head & 0x80:
        raise KeyFileError("it is no OpenPGP key")
    if head & 0x40:
        first = data[start + 1]
        if first < 192:
            length, begin = first, start + 2
        elif first < 224:
            length, begin = ((first - 192) << 8) + data[start + 2] + 192, start + 3
        elif first == 255:
            length, begin = int.from_bytes(data[start + 2 : start + 6], "big"), start + 6
        else:
            raise KeyFileError("it holds a packet of unknown length")
        tag = head & 0x3F
    else:
        size = head & 3
        if size == 3:
            raise KeyFileError("it holds a packet of unknown length")
        width = 1 << size
        length, begin = int.from_bytes(data[start + 1 : start + 1 + width], "big"), start + 1 + width
        tag = (head >> 2) & 0x0F
    if begin + length > len(data):
        raise IndexError
    return tag, data[begin : begin + length], begin + length
