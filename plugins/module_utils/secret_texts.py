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
# What can only be a host: what has no dot may as well be a user, or a password up to its first slash.
HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+\.?|localhost)(:\d{1,5})?")
# What can only be a user with the beginning of a password: a colon, and no port behind it.
USER = re.compile(r"[^:\[]*:(?!\d{1,5}(\W|$)).")
# A user and password that are hidden already, as pip and uv do it.
HIDDEN_USER = re.compile(r"([^/@:]*:)?\*{3,}@(?=[^/@]*(/|$))")
# A URL that is itself quoted, as in another one's query.
QUOTED = re.compile(r"%((?:25){0,5})3A%(?:25)*2F%(?:25)*2F", re.IGNORECASE)
# What a text has for one that it has cut off.
CUT = re.compile(r"(…|\.\.\.)\W{0,5}$")
# Parameters of a URL that let somebody in.
PARAMETER = re.compile(r"([?&;][\w.-]*(?:token|passw(?:or)?d|secret|signature|api_?key|\bsig)=)[^&#\s'\"<>)]+", re.IGNORECASE)
# scrypt's cost, about 50 ms and 16 MiB a call.
COST = {"n": 2**14, "r": 8, "p": 1}


def redacted(text: str) -> str:
    """Return a text in which no URL has a user, a password or a token.

    A password may hold what should have been quoted, so it reaches to the last @ of the word, and over words where a user
    and the beginning of a password can be nothing else. That hides a host now and then whose path holds an @.
    """
    return _redacted(text, False)


def has_credentials(text: str) -> bool:
    """Return whether a text has a URL with what can only be a user, a password or a token."""
    return _redacted(text, True) != text


def unclear(url: str) -> bool:
    """Return whether it cannot be told where the user and password of a URL end: one has a character that is not quoted."""
    plain, _userinfo = split_url(url)
    if "@" not in plain:
        return False
    match = re.fullmatch(r"(?:[A-Za-z][A-Za-z0-9+.-]*://([^\s/]+)|file://|(?=/[^/]))(/\S*)?", plain)  # a mirror may be a path
    return not match or bool(match[1] and not HOST.fullmatch(match[1])) or redacted(plain) != plain


def value_redacted(text: str) -> str:
    """Return a value as a text without users and passwords, of which nobody knows what it was to be: more is hidden."""
    return redacted(re.sub(r"://.*@", f"://{HIDDEN}@", text, flags=re.DOTALL))


def _redacted(text: str, sure: bool) -> str:
    """Return a text without users and passwords of URLs: with those that it may have, or only those that it has for sure."""
    if "://" in text or QUOTED.search(text):
        words = re.findall(r"\s+|\S+", text)
        done, position = [], 0
        while position < len(words):
            word, opened = _word(words[position], sure)
            last = _last_of_password(words, position) if opened else position
            done.append(word if last == position else f"{word[:opened]}{HIDDEN}@{words[last].rpartition('@')[2]}")
            position = last + 1
        text = "".join(done)
    return PARAMETER.sub(rf"\1{HIDDEN}", text)


def _last_of_password(words: t.Sequence[str], first: int) -> int:
    """Return the last word of a line with an @ before the next URL; the first one where there is none."""
    last = first
    for position in range(first + 1, len(words)):
        if "\n" in words[position] or "://" in words[position]:
            break
        if "@" in words[position]:
            last = position
    return last


def _word(word: str, sure: bool) -> tuple[str, int]:
    """Return a word without users and passwords, and where in it a user begins whose password goes on behind it; 0 for nowhere."""
    quoted = QUOTED.search(word)
    if quoted:
        unquoted = word[quoted.end() :]
        times = 1 + quoted[1].count("25")  # a URL in a query in a query
        for _time in range(times):
            unquoted = unquote(unquoted)
        plain = _word("://" + unquoted, sure)[0][len("://") :]
        if plain != unquoted:
            for _time in range(times):
                plain = quote(plain, safe="*")
            word = word[: quoted.end()] + plain
    last, cut = word.rfind("@"), None if sure else CUT.search(word)
    done, at, length = [], 0, 0
    for found in re.finditer("://", word):
        begin = found.end()
        if found.start() < at:
            continue
        done.append(word[at:begin])
        length += begin - at
        hidden = HIDDEN_USER.match(word, begin)
        if hidden:
            done.append(f"{HIDDEN}@")
            length, at = length + len(done[-1]), hidden.end()
            continue
        slash = word.find("/", begin)
        authority = word[begin : slash if slash >= 0 else len(word)]
        user = bool(USER.match(authority))
        maybe = not sure and bool(authority) and not HOST.fullmatch(authority) and begin <= last < len(word) - 1
        if last >= begin and ("@" in authority or user or maybe):
            return "".join([*done, HIDDEN, word[last:]]), 0
        if cut and begin <= cut.start() and last < begin and (user or slash < 0):
            return "".join([*done, HIDDEN, cut.group()]), 0
        if user:
            return "".join([*done, word[begin:]]), length
        at = begin
    return "".join([*done, word[at:]]), 0


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
