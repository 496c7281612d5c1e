# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fingerprints of OpenPGP public keys (RFC 9580), so that a repository's key is checked where no gpg is installed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import typing as t

PUBLIC_KEY = 6


class NoKeyError(ValueError):
    """The data is no OpenPGP public key."""


def dearmor(data: bytes) -> bytes:
    """Return the binary form of a key, whether it comes armored or not.

    Raises:
        NoKeyError: the armor is damaged.
    """
    if not data.lstrip().startswith(b"-----BEGIN PGP"):
        return data
    blocks = []
    body: t.Optional[list[bytes]] = None
    for line in data.replace(b"\r", b"").split(b"\n"):
        line = line.strip()
        if line.startswith(b"-----BEGIN PGP"):
            body = []
        elif line.startswith(b"-----END PGP") and body is not None:
            blocks.append(b"".join(body))
            body = None
        elif body is not None and line and b":" not in line and not line.startswith(b"="):
            body.append(line)
    try:
        return b"".join(base64.b64decode(block, validate=True) for block in blocks)
    except binascii.Error as error:
        raise NoKeyError(f"its armor is damaged ({error})") from error


def packets(data: bytes) -> t.Iterator[tuple[int, bytes]]:
    """Yield tag and body of each packet (RFC 9580, 4.2).

    Raises:
        NoKeyError: the data is no sequence of packets.
    """
    at = 0
    while at < len(data):
        head = data[at]
        if not head & 0x80:
            raise NoKeyError("it is no OpenPGP key")
        at += 1
        try:
            if head & 0x40:
                tag = head & 0x3F
                size = data[at]
                at += 1
                if 192 <= size < 224:
                    size = ((size - 192) << 8) + data[at] + 192
                    at += 1
                elif size == 255:
                    size = int.from_bytes(data[at : at + 4], "big")
                    at += 4
                elif size >= 224:
                    raise NoKeyError("it has packets of partial length")
            else:
                tag = (head & 0x3C) >> 2
                width = 1 << (head & 0x03)
                if width > 4:
                    raise NoKeyError("it has a packet without a length")
                size = int.from_bytes(data[at : at + width], "big")
                at += width
        except IndexError as error:
            raise NoKeyError("it ends within a packet") from error
        if at + size > len(data):
            raise NoKeyError("it ends within a packet")
        yield tag, data[at : at + size]
        at += size


def fingerprints(data: bytes) -> list[str]:
    """Return the fingerprints of the primary keys, as upper-case hexadecimal digits.

    Raises:
        NoKeyError: the data is no OpenPGP public key.
    """
    found = []
    for tag, body in packets(dearmor(data)):
        if tag == PUBLIC_KEY:
            # Version 4: SHA-1 over 0x99, two bytes of length and the body (RFC 9580, 5.5.4.2).
            if body[:1] != b"\x04":
                raise NoKeyError("its key is not of version 4")
            found.append(hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper())
    if not found:
        raise NoKeyError("it holds no public key")
    return found
