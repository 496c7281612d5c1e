# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""A hostile network at the port of a real supervisor: garbage, half-open connections, replayed and oversized messages.

The job must go on in the same generation, and the supervisor's memory must stay where it is.
"""
from __future__ import annotations

import os
import random
import re
import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervisor_support import load
from test_supervisor_processes import SECRET, Gang, free_port

supervisor = load()
GROWTH_KIB = 4096


@pytest.fixture
def pair(tmp_path):
    """Two supervisors whose job runs on and on."""
    made = Gang(tmp_path, 2, steps=100000, options=["--lost-after", "20"])     # a busy machine is no lost node
    made.running(1)
    yield made
    made.close()


def memory(gang):
    """Resident memory of rank 0's supervisor in KiB."""
    with open(f"/proc/{gang.processes[0].pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1))


def connect(gang):
    sock = socket.create_connection(("127.0.0.1", gang.port), 5)
    sock.settimeout(5)
    return sock


def frame(payload):
    return struct.pack(">I", len(payload)) + payload


def undisturbed(gang, before):
    """The first generation still trains, and memory has not grown."""
    state = gang.state()
    assert (state["state"], state["generation"], state["restarts"]) == ("running", 1, 0), gang.log()
    steps = gang.log().count("step ")
    gang.wait(lambda: gang.log().count("step ") > steps, what="a new step")
    assert memory(gang) - before < GROWTH_KIB, f"memory grew from {before} to {memory(gang)} KiB"


def test_garbage(pair):
    before, chance = memory(pair), random.Random(5)
    for number in range(400):
        sock = connect(pair)
        try:
            sock.sendall([os.urandom(chance.randrange(1, 5000)), frame(os.urandom(300)), frame(b"[" * 500), frame(b'{"protocol": 1}'),
                          frame(b"\xff\xfe"), frame(b"null")][number % 6])
        except OSError:
            pass        # dropped in the middle, as it should be
        sock.close()
    undisturbed(pair, before)


@pytest.mark.parametrize("length", [513, 65536, 2**31, 2**32 - 1])
def test_oversized_messages_are_dropped_at_their_length(pair, length):
    before = memory(pair)
    for _number in range(20):
        with connect(pair) as sock:
            sock.sendall(struct.pack(">I", length) + b"x" * 512)
            try:
                while sock.recv(4096):
                    pass        # until it is closed
            except ConnectionError:
                pass
    undisturbed(pair, before)


def test_half_open_connections_give_way(pair):
    before, kept = memory(pair), []
    for number in range(300):
        sock = connect(pair)
        sock.sendall(struct.pack(">I", 400)[: number % 5] + b"{" * (number % 3))
        kept.append(sock)
    undisturbed(pair, before)
    pair.processes[1].kill()            # a member that comes in the middle of it is let in
    pair.processes[1].wait()
    pair.start(1)
    pair.running(2, step=0)
    assert memory(pair) - before < GROWTH_KIB
    for sock in kept:
        sock.close()


class Tap(threading.Thread):
    """Stands between a member and rank 0, passes everything on and keeps what the member has sent."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target = self.listener.getsockname()[1], port
        self.sent = bytearray()

    def run(self):
        while True:
            near, _address = self.listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()        # rank 0 does not listen yet; the member tries again
                continue
            threading.Thread(target=self._pass, args=(far, near, None), daemon=True).start()
            self._pass(near, far, self.sent)

    @staticmethod
    def _pass(source, target, keep):
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if keep is not None:
                    keep += data
                target.sendall(data)
        except OSError:
            pass
        target.close()


def test_a_recorded_connection_is_worthless(tmp_path):
    """What a member has sent, sent again byte for byte: the handshake's nonces are new, so nothing of it is taken."""
    port = free_port()
    tap = Tap(port)
    tap.start()
    made = Gang(tmp_path, 2, steps=100000, options=["--lost-after", "20"], port=port, through={1: tap.port})
    try:
        made.running(1)
        time.sleep(1.5)         # some reports
        before, recorded = memory(made), bytes(tap.sent)
        assert len(recorded) > 1000, "nothing was recorded"
        for _number in range(50):
            with connect(made) as sock:
                try:
                    sock.sendall(recorded)
                    while sock.recv(4096):
                        pass
                except ConnectionError:
                    pass
        undisturbed(made, before)
    finally:
        made.close()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=600), max_size=20), st.booleans())
def test_a_session_takes_any_bytes(pieces, server):
    """Whatever comes in: messages, a refusal, or waiting; never more than one frame is held, never another exception."""
    session = supervisor.Session(SECRET.encode(), "train", None if server else 1)
    try:
        for piece in pieces:
            assert session.feed(piece) == []
            assert len(session.incoming) <= 4 + session.HELLO_LIMIT + 600
    except supervisor.ProtocolError:
        pass


def opened():
    """Two sessions after their handshake."""
    server, member = supervisor.Session(SECRET.encode(), "train"), supervisor.Session(SECRET.encode(), "train", 1)
    for _round in range(3):
        server.feed(bytes(member.outgoing))
        member.outgoing.clear()
        member.feed(bytes(server.outgoing))
        server.outgoing.clear()
    assert server.open and member.open
    return server, member


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_repeated_or_swapped_frame_ends_an_open_session(data):
    server, member = opened()
    frames = []
    for number in range(3):
        member.send({"number": number})
        frames.append(bytes(member.outgoing))
        member.outgoing.clear()
    change = data.draw(st.sampled_from(["flip", "repeat", "swap", "drop"]))
    if change == "flip":
        place = data.draw(st.integers(4, len(frames[0]) - 1))
        frames[0] = frames[0][:place] + bytes([frames[0][place] ^ data.draw(st.integers(1, 255))]) + frames[0][place + 1:]
        accepted = 0
    elif change == "repeat":
        frames.insert(1, frames[0])
        accepted = 1
    elif change == "swap":
        frames[0], frames[1] = frames[1], frames[0]
        accepted = 0
    else:
        del frames[1]
        accepted = 1
    got = []
    with pytest.raises(supervisor.ProtocolError):
        for one in frames:
            got += server.feed(one)
    assert len(got) == accepted
