# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Secrets in texts: user and password of URLs, values that are vaulted, values of an environment.

What people see passes through here: sentences, results, and what tools print.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import typing as t
from urllib.parse import quote, unquote

# What stands in the place of a secret.
HIDDEN = "***"
VAULTED = "(vaulted)"
# A shorter secret is hidden where it stands as a word only: else it would hide letters of every other word.
SHORT = 8
# A user and password before the host of a URL. A password may hold an unquoted @, so it reaches to the last one.
USERINFO = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/<>]*@")
# The same in a URL that is itself quoted, as in another one's query.
QUOTED_USERINFO = re.compile(r"(%3A%2F%2F)(?:(?!%2F)[^\s/<>])*%40", re.IGNORECASE)
# scrypt's cost, about 50 ms and 16 MiB a call.
COST = {"n": 2**14, "r": 8, "p": 1}


def redacted(text: str) -> str:
    """Return a text in which no URL has a user or password."""
    text = USERINFO.sub(rf"\1{HIDDEN}@", text)
    return QUOTED_USERINFO.sub(rf"\1{HIDDEN}%40", text)


def split_url(url: str) -> tuple[str, str]:
    """Return a URL without its user and password, and both as they stand in it (C(user:password), empty for none)."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/]*)@(.*)", url, re.DOTALL)
    return (match.group(1) + match.group(3), match.group(2)) if match else (url, "")


def join_url(url: str, userinfo: str) -> str:
    """Return a URL with its user and password. What would end them early is quoted, as it should have been written."""
    scheme, separator, rest = url.partition("://")
    if not userinfo or not separator:
        return url
    return f"{scheme}://{quote(userinfo, safe=':%!$&*+,;=~()' + chr(39))}@{rest}"


def with_credentials(url: str, known: t.Mapping[str, str]) -> str:
    """Return a URL with the user and password of the longest known URL that it is, or lies below.

    Args:
        url: without user and password.
        known: C(user:password) by URL without them.
    """
    fitting = [place for place in known if url.rstrip("/") == place.rstrip("/") or url.startswith(place.rstrip("/") + "/")]
    return join_url(url, known[max(fitting, key=len)]) if fitting else url


def user_and_password(userinfo: str) -> tuple[str, str]:
    """Return user and password as they are sent, with nothing quoted."""
    user, _colon, password = userinfo.partition(":")
    return unquote(user), unquote(password)


def of_userinfo(userinfo: str) -> set[str]:
    """Return all texts by which C(user:password) could show: whole, the password alone, unquoted, and as a header has them."""
    user, password = user_and_password(userinfo)
    plain = password or user  # a token may stand alone
    header = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {userinfo, unquote(userinfo), header, userinfo.partition(":")[2] or userinfo, plain, quote(plain, safe="")} - {""}


def masked(text: str, secrets: t.Iterable[str], word: str = VAULTED) -> str:
    """Return a text with a word in the place of every secret, of one that is cut off, and of one that Python has quoted."""
    forms = {form for secret in secrets if secret for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))}
    for secret in sorted(forms, key=len, reverse=True):
        pattern = re.escape(secret) if len(secret) >= SHORT else rf"(?<!\w){re.escape(secret)}(?!\w)"
        text = re.sub(pattern, lambda _match: word, text)
        for cut in re.finditer("…", text):
            # What a sentence has cut off may be the end of a secret.
            before = text[: cut.start()]
            length = next((size for size in range(min(len(secret), len(before)), 2, -1) if before.endswith(secret[:size])), 0)
            if length:
                text = before[:-length] + word + text[cut.start() :]
                break
    return text


@functools.lru_cache(maxsize=64)
def _scrypt(text: str, salt: str) -> str:
    return hashlib.scrypt(text.encode(), salt=salt.encode(), dklen=16, **COST).hex()


def fingerprint(values: t.Mapping[str, t.Any], salt: str) -> str:
    """Return what changes with any value of an environment; empty for none.

    It becomes part of names that everybody may read, such as a release's. A plain hash of a short password could be
    reversed there by trying all of them, and a key that is kept somewhere would have to be the same for all who work on
    the cluster. So each try is made as costly as scrypt makes it, and the salt makes tables of one job useless for others.
    """
    return _scrypt(json.dumps({str(name): str(value) for name, value in values.items()}, sort_keys=True), salt) if values else ""
