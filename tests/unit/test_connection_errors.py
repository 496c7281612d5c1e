"""Why a node could not be asked, from texts that ssh, sudo and shells really print."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import connection_errors

FAILED = "Failed to connect to the host via ssh: "


def explain(message, output="", unreachable=False, boot=""):
    return connection_errors.explain(message, output, unreachable, "ops", "198.18.0.5", "/usr/bin/python3", boot)


@pytest.mark.parametrize(
    ("message", "output", "unreachable", "sentence"),
    [
        (
            FAILED + "ssh: connect to host 198.18.0.5 port 22: No route to host",
            "",
            True,
            "cannot be reached by SSH at 198.18.0.5 (No route to host); "
            "check ansible_host and try: ssh ops@198.18.0.5",
        ),
        (
            FAILED + "ssh: Could not resolve hostname gpu99: Name or service not known",
            "",
            True,
            "cannot be reached by SSH at 198.18.0.5 (Could not resolve hostname gpu99: Name or service not known); "
            "set ansible_host to the node's address",
        ),
        (
            FAILED + "ops@198.18.0.5: Permission denied (publickey).",
            "",
            True,
            "cannot be reached by SSH at 198.18.0.5 (ops@198.18.0.5: Permission denied (publickey)); "
            "copy your key with: ssh-copy-id ops@198.18.0.5",
        ),
        (
            FAILED + "No ED25519 host key is known for 198.18.0.5 and you have requested strict checking.\r\n"
            "Host key verification failed.",
            "",
            True,
            "cannot be reached by SSH at 198.18.0.5 (Host key verification failed); "
            "compare the key and accept it with: ssh ops@198.18.0.5",
        ),
        (
            "Task failed: Missing sudo password",
            "",
            False,
            "ops has no sudo without a password (Task failed: Missing sudo password); "
            "give the user passwordless sudo or run the play with --ask-become-pass",
        ),
        (
            "The module interpreter '/usr/bin/python3' was not found.",
            "/bin/sh: 1: /usr/bin/python3: not found\r\n",
            False,
            "no Python answers at /usr/bin/python3; install it (apt install python3) or set ansible_python_interpreter",
        ),
        (
            "MODULE FAILURE",
            "",
            False,
            "the node could not be examined (MODULE FAILURE); repair what this says and run again",
        ),
        ("", "", False, "the node could not be examined (no reason was given); repair what this says and run again"),
    ],
)
def test_sentences(message, output, unreachable, sentence):
    assert explain(message, output, unreachable) == sentence


def test_a_node_of_the_lab_is_booted_rather_than_searched():
    text = explain(FAILED + "ssh: connect to host 198.18.0.5 port 22: No route to host", "", True, "make lab")
    assert text.endswith("; boot the lab with: make lab")


def test_the_warning_about_known_hosts_is_not_the_reason():
    text = "ssh: connect to host x port 22: Connection refused\r\nWarning: Permanently added 'x' (ED25519) to the list of known hosts."
    assert connection_errors.last_line(text) == "ssh: connect to host x port 22: Connection refused"
