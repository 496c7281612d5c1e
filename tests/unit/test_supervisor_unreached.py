# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""A member that cannot reach rank 0 says whether a firewall can be the cause: real packets in a network namespace."""
from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import uuid

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from supervisor_support import PATH, load

supervisor = load()

TABLE = "table inet t {{ chain input {{ type filter hook input priority 0; tcp dport 29501 {verdict};\n}}\n}}\n"


@pytest.fixture
def namespace():
    """A network namespace with its loopback up."""
    if os.geteuid() or not shutil.which("nft") or not shutil.which("ip"):
        pytest.skip("needs root, nft and ip")
    name = "onprem-" + uuid.uuid4().hex[:8]
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-netns", name, "link", "set", "lo", "up"], check=True)
    yield ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("drop", "127.0.0.1 drops TCP from 127.0.0.2 to port 29501: look at its firewall, or it is off"),
        ("reject with icmpx admin-prohibited", "127.0.0.1 rejects TCP from 127.0.0.2 to port 29501, no route to host: look at its firewall, or it is off"),
        ("counter", "127.0.0.1 refuses TCP from 127.0.0.2 to port 29501: it does not run yet, or a firewall rejects it"),
    ],
    ids=["dropped", "rejected", "refused"],
)
def test_a_member_says_why_rank_0_is_not_reached(namespace, tmp_path, verdict, expected):
    subprocess.run([*namespace, "nft", "-f", "-"], input=TABLE.format(verdict=verdict), text=True, check=True)
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef\n")
    options = ["--job", "j", "--host", "lab2", "--node-rank", "1", "--nnodes", "2", "--coordinator", "127.0.0.1:29501", "--bind", "127.0.0.2"]
    options += ["--secret-file", str(tmp_path / "secret"), "--state-dir", str(tmp_path / "state"), "--release", "r1"]
    state = tmp_path / "state" / "state.json"
    text = ""
    with open(tmp_path / "log", "wb") as log:
        member = subprocess.Popen([*namespace, sys.executable, str(PATH), *options, "--", "true"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while expected not in text and time.monotonic() < deadline:
                time.sleep(0.1)
                text = json.loads(state.read_text())["text"] if state.exists() else ""
        finally:
            member.kill()
            member.wait()
    assert text == f"waiting for rank 0's supervisor at 127.0.0.1:29501 ({expected})", (tmp_path / "log").read_text()


CONNECT = "import socket, time; s = socket.socket(socket.{family}); s.setblocking(False); s.bind(('{own}', 0)); s.connect_ex(('{to}', 29501)); time.sleep(60)"


@pytest.mark.parametrize(
    ("family", "own", "to"),
    [("AF_INET", "127.0.0.2", "127.0.0.1"), ("AF_INET6", "::1", "::1"), ("AF_INET6", "::ffff:127.0.0.2", "::ffff:127.0.0.1")],
    ids=["IPv4", "IPv6", "IPv4 in IPv6"],
)
def test_a_connection_that_nobody_answers_is_seen_in_the_kernels_table(namespace, family, own, to):
    subprocess.run([*namespace, "nft", "-f", "-"], input=TABLE.format(verdict="drop"), text=True, check=True)
    child = subprocess.Popen([*namespace, sys.executable, "-c", CONNECT.format(family=family, own=own, to=to)])
    expected = [(own.replace("::ffff:", ""), to.replace("::ffff:", ""), 29501)]
    try:
        deadline, began, found = time.monotonic() + 30, time.monotonic(), []
        while found != expected and time.monotonic() < deadline:
            tables = subprocess.run([*namespace, "cat", *supervisor.TCP_TABLES], capture_output=True, text=True, check=True).stdout
            found = supervisor.unanswered(tables, os.getuid())
            time.sleep(0.2)
        assert found == expected
        counters = subprocess.run([*namespace, "cat", supervisor.TCP_COUNTERS], capture_output=True, text=True, check=True).stdout
        assert supervisor.repeated_requests(counters) >= supervisor.RESENT
        assert time.monotonic() - began > 2, "an answer that is a moment late is no firewall"
        assert supervisor.unanswered(tables, os.getuid() + 1) == []
    finally:
        child.kill()
        child.wait()


ROW = "   0: 0200007F:C350 0100007F:733D 02 00000000:00000000 01:00000100 {resent:08x} {uid:5d} 0 1 2 0000000000000000 800 0 0 1 7\n"


def test_the_kernels_table_is_read_only_when_a_request_was_repeated(tmp_path, monkeypatch):
    counters, table = tmp_path / "netstat", tmp_path / "tcp"
    monkeypatch.setattr(supervisor, "TCP_COUNTERS", str(counters))
    monkeypatch.setattr(supervisor, "TCP_TABLES", (str(table),))
    torchrun = supervisor.Torchrun(supervisor.MarkedTree(str(tmp_path)), str(tmp_path), str(tmp_path / "errors"), "", lambda: None)

    def look(repeated, resent):
        counters.write_text(f"TcpExt: TW TCPSynRetrans TCPKeepAlive\nTcpExt: 7 {repeated} 3\nIpExt: InOctets\nIpExt: 5\n")
        table.write_text("header\n" + ROW.format(resent=resent, uid=os.geteuid()))
        torchrun.look_for_blocked("127.0.0.2")
        return torchrun.still_blocked()

    sentence = ["127.0.0.1 drops TCP from 127.0.0.2 to port 29501, look at its firewall"]
    assert look(10, 1) == [], "the first look reads the table, but the request was repeated once only"
    assert look(10, 2) == [], "the counter says that there is nothing new"
    assert look(11, 2) == sentence
    seen = torchrun.blocked[sentence[0]]
    assert look(11, 2) == sentence and torchrun.blocked[sentence[0]] > seen, "a known one is looked at until it is gone"
    counters.unlink()
    torchrun.blocked.clear()
    torchrun.look_for_blocked("127.0.0.2")
    assert torchrun.still_blocked() == sentence, "a kernel that does not count"


def test_a_failure_that_an_unanswered_connection_explains_names_it(tmp_path):
    torchrun = supervisor.Torchrun(supervisor.MarkedTree(str(tmp_path)), str(tmp_path), str(tmp_path / "errors"), "", lambda: None)
    torchrun.start(["sh", "-c", "echo 'RuntimeError: connect timed out' >&2; exit 1"], 1)
    torchrun.process.wait()
    torchrun.close()
    assert torchrun.cause()["error"] == "RuntimeError: connect timed out"
    sentence = "198.18.0.11 drops TCP from 198.18.0.12 to port 41234, look at its firewall"
    torchrun.blocked[sentence] = time.monotonic()
    cause = torchrun.cause()
    assert cause["own"] and not cause["echo"] and cause["error"] == f"{sentence}; RuntimeError: connect timed out"
    torchrun.blocked[sentence] -= 2 * supervisor.BLOCKED_COUNTS
    assert torchrun.cause()["error"] == "RuntimeError: connect timed out", "it came through in the meantime"


def test_a_connection_that_a_peer_has_closed_was_no_firewall_s_victim(tmp_path):
    torchrun = supervisor.Torchrun(supervisor.MarkedTree(str(tmp_path)), str(tmp_path), str(tmp_path / "errors"), "", lambda: None)
    torchrun.start(["sh", "-c", "echo 'RuntimeError: Connection closed by peer [198.18.0.13]:5767' >&2; exit 1"], 1)
    torchrun.process.wait()
    torchrun.close()
    torchrun.blocked["198.18.0.11 drops TCP from 198.18.0.12 to port 41234, look at its firewall"] = time.monotonic()
    cause = torchrun.cause()
    assert cause["echo"] and cause["error"] == "RuntimeError: Connection closed by peer [198.18.0.13]:5767"
