# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of a host's values are vaulted: encrypted by themselves (!vault), or in a file that is encrypted as a whole."""

from __future__ import annotations

import functools
import typing as t

from ansible.parsing.vault import EncryptedString, is_encrypted
from ansible_collections.onprem.torch.plugins.module_utils.secret_texts import SHORT

try:  # the tag that tells where a value was read is internal to ansible-core (2.19 and later)
    from ansible._internal._datatag._tags import Origin
except ImportError:  # values of encrypted files are not recognised then; those that are encrypted by themselves are
    Origin = None

# What plays and Ansible itself keep among a host's variables: results and tables, which no one vaults.
NOT_THE_USERS = ("__", "ansible_play", "ansible_facts", "cluster_plan", "groups", "hostvars", "vars")


@functools.lru_cache(maxsize=1024)
def encrypted_file(path: str) -> bool:
    """Return whether a file is encrypted as a whole."""
    try:
        with open(path, "rb") as stream:
            return is_encrypted(stream.read(64))
    except OSError:
        return False


def texts(value: t.Any) -> set[str]:
    """Return the plain texts of all that is vaulted in a value, however deep it lies."""
    if isinstance(value, EncryptedString):
        try:
            return {str(value)}
        except Exception:  # without its key it cannot be shown either
            return set()
    if isinstance(value, dict):
        return set().union(*(texts(entry) for entry in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(texts(entry) for entry in value))
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and Origin:
        origin = Origin.get_tag(value)
        if origin and origin.path and encrypted_file(str(origin.path)):
            return {str(value)}
    return set()


def of_host(raw: t.Mapping[str, t.Any]) -> set[str]:
    """Return the plain texts of all that is vaulted among a host's variables as they stand in the inventory."""
    return set().union(*(texts(value) for name, value in raw.items() if not name.startswith(NOT_THE_USERS))) - {""}


def shown_by(raw: t.Mapping[str, t.Any], variable: str, words: t.Sequence[t.Any]) -> bool:
    """Return whether the words that a variable gives hold a vaulted value.

    A plain list that stands in an encrypted file beside others is no secret for that alone.
    """
    return among(of_host({name: value for name, value in raw.items() if name != variable}) | by_themselves(raw.get(variable)), words)


def among(secrets: t.Iterable[str], words: t.Sequence[t.Any]) -> bool:
    """Return whether a word is a secret, or holds one that is long enough to be told from other text."""
    return any(secret == str(word) or (len(secret) >= SHORT and secret in str(word)) for secret in secrets if len(secret) > 3 for word in words)


def by_themselves(value: t.Any) -> set[str]:
    """Return the plain texts of what is encrypted by itself in a value, not as a part of its file."""
    if isinstance(value, dict):
        return set().union(*(by_themselves(entry) for entry in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(by_themselves(entry) for entry in value))
    return texts(value) if isinstance(value, EncryptedString) else set()
