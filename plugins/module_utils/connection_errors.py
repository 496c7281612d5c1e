# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a node could not be asked, in one sentence, from the texts of ssh, sudo and the shell."""

from __future__ import annotations

import re


def last_line(text: str) -> str:
    """Return the last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Warning: Permanently added" not in line]
    return lines[-1][:200].rstrip(".") if lines else "no reason was given"


def reason_of(message: str) -> str:
    """Return ssh's reason without what Ansible and ssh say around it."""
    text = re.sub(r"^.*(Failed to connect to the host via ssh|Make sure this host can be reached over ssh):\s*", "", message, flags=re.S)
    line = last_line(text)
    line = re.sub(r"^ssh: connect to host \S+ port \d+: ", "", line)
    return re.sub(r"^ssh: ", "", line)


def explain(
    message: str, output: str, unreachable: bool, user: str, address: str, python: str, boot_command: str, missing_key: str = ""
) -> str:
    """Return "what is the case; what to do".

    Args:
        message: Ansible's message.
        output: everything that the remote side printed.
        unreachable: whether Ansible calls the host unreachable.
        user: the user to log in as.
        address: the address to log in to.
        python: the Python that modules run with.
        boot_command: the command that boots this node, for nodes of a lab.
        missing_key: the private key's path where there is no such file.
    """
    text = f"{message}\n{output}"
    lower = text.lower()
    if "sudo" in lower or "become" in lower or "privilege" in lower or "incorrect password" in lower:
        return (
            f"{user} has no sudo without a password ({last_line(message)}); "
            "give the user passwordless sudo or run the play with --ask-become-pass"
        )
    if unreachable:
        if "host key" in lower:
            cure = f"compare the key and accept it with: ssh {user}@{address}"
        elif "permission denied" in lower and missing_key:
            cure = f"correct ansible_ssh_private_key_file, since there is no file {missing_key}"
        elif "permission denied" in lower:
            cure = f"copy your key with: ssh-copy-id {user}@{address}"
        elif "bad configuration option" in lower or "command-line" in lower:
            cure = "correct ansible_ssh_common_args or ansible_ssh_extra_args"
        elif boot_command:
            cure = f"boot the lab with: {boot_command}"
        elif "could not resolve hostname" in lower:
            cure = "set ansible_host to the node's address"
        else:
            cure = f"check ansible_host and try: ssh {user}@{address}"
        return f"cannot be reached by SSH at {address} ({reason_of(message)}); {cure}"
    if re.search(r"python\S*: (command )?not found|No such file or directory|interpreter", text):
        return f"no Python answers at {python}; install it (apt install python3) or set ansible_python_interpreter"
    return f"the node could not be examined ({last_line(message)}); repair what this says and run again"
