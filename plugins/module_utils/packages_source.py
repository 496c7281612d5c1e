# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The repository of the module nvidia_packages: its verified key, and the source that names both."""

from __future__ import annotations

import os
import re

from ansible.module_utils.urls import fetch_url
from ansible_collections.onprem.torch.plugins.module_utils import apt_sources, apt_state, openpgp, secret_texts
from ansible_collections.onprem.torch.plugins.module_utils.packages_files import Files
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run

KEYRINGS = "/etc/apt/keyrings"
SOURCES = "/etc/apt/sources.list.d/onprem-torch-nvidia.sources"
# Sources are for everybody to read; apt takes user and password from here before it gives up root (apt_auth.conf(5)).
AUTH = "/etc/apt/auth.conf.d/onprem-torch-nvidia.conf"


def fingerprints(path: str) -> list[str]:
    """Return the fingerprints of the keys in a file; none of what is no such file."""
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as stream:
        try:
            return openpgp.fingerprints(stream.read())
        except openpgp.KeyFileError:
            return []


def auth_line(url: str, user: str, password: str) -> str:
    """Return the line of apt_auth.conf(5) for a repository; without the scheme apt would send nothing over plain http."""
    return f"machine {url.rstrip('/')}/ login {user} password {password}\n"


class Source:
    """The repository that packages come from."""

    def __init__(self, run: Run, files: Files) -> None:
        self.run = run
        self.files = files
        self.wanted = run.repository.get("key_fingerprint", "").replace(" ", "").upper()

    def joined(self) -> str:
        """Return the keyring of a source of somebody else that names the repository too; empty where there is none.

        apt reads no sources at all where two of them name a repository with different keyrings, so that ours takes theirs
        if it holds the key. That is how NVIDIA's package cuda-keyring leaves a node.
        """
        url, keyring = self.run.repository["url"], ""
        for entry in apt_sources.flat(apt_sources.collect(), url, SOURCES):
            if entry.signed_by and self.wanted not in fingerprints(entry.signed_by):
                by = f"the keyring {entry.signed_by}" if entry.signed_by.startswith("/") else "a key in that file"
                self.run.fail(
                    f"{entry.path} names the repository {url} with {by}, which does not hold the key {self.wanted}, but apt reads "
                    "no sources where two disagree about a repository; remove that source"
                )
            keyring = entry.signed_by or keyring
        return keyring

    def key(self) -> str:
        """Let the repository's key lie on the node, and return its path; any other key is refused."""
        keyring = self.joined()
        if keyring:
            return keyring
        wanted = self.wanted
        url = self.run.repository["key_url"]
        for path in (f"{KEYRINGS}/onprem-torch-nvidia.{end}" for end in ("asc", "gpg")):
            if fingerprints(path) == [wanted]:
                return path
        answer, info = fetch_url(self.run.module, secret_texts.with_credentials(url, self.run.credentials), timeout=20)
        if info["status"] in (401, 403):
            self.run.fail(
                f"{url} refuses the user or password ({info['status']}); correct them in cuda_repository_key_url, "
                "cuda_repository_url or cluster_mirror, as in https://USER:PASSWORD@HOST/PATH"
            )
        if answer is None or info["status"] not in (200, None):
            self.run.fail(
                f"the key of the repository {self.run.repository['url']} cannot be fetched from {url} ({info['msg']}); "
                "correct cuda_repository_key_url, or let this node reach it"
            )
        data = answer.read()
        try:
            found = openpgp.fingerprints(data)
        except openpgp.KeyFileError as error:
            self.run.fail(f"{url} is no key for the repository {self.run.repository['url']} ({error}); correct cuda_repository_key_url")
        if found != [wanted]:
            self.run.fail(
                f"the key at {url} has the fingerprint {', '.join(found)}, but {wanted or 'a known one'} was expected, so it is "
                "refused; find out who changed it, and set cuda_repository_key_fingerprint only if you trust it"
            )
        path = f"{KEYRINGS}/onprem-torch-nvidia.{'asc' if openpgp.is_armored(data) else 'gpg'}"
        self.run.before[path], self.run.after[path] = "", f"key {wanted}\n"
        if not self.run.check:
            self.files.replace(path, data)
        return path

    def auth(self) -> None:
        """Let apt know the repository's user and password, which are in no file that others can read."""
        url = self.run.repository["url"]
        userinfo = secret_texts.split_url(secret_texts.with_credentials(url, self.run.credentials))[1]
        if not userinfo:
            self.files.remove_secret(AUTH)
            return
        user, password = secret_texts.user_and_password(userinfo)
        if re.search(r"\s", user + password):
            self.run.fail("the password of cuda_repository_url or cluster_mirror has a space, which apt cannot read; choose another one")
        self.files.put_secret(AUTH, auth_line(url, user, password))

    def put(self) -> None:
        """Let the repository's key and source lie on the node."""
        if self.run.repository:
            self.auth()
            self.files.put(SOURCES, apt_state.source(self.run.repository["url"], self.key()))
