# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wire: what is genuine arrives, nothing else does, and memory stays bounded."""
from __future__ import annotations

import json
import pathlib
import sys

import pytest
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from supervisor_support import load

supervisor = load()
Session, ProtocolError = supervisor.Session, supervisor.ProtocolError
SECRET = b"s" * 32


def drain(session):
    data = bytes(session.outgoing)
    session.outgoing.clear()
    return data


def pair(server_secret=SECRET, client_secret=SECRET, job="j"):
    """A coordinator's and a member's end after the handshake."""
    server, client = Session(server_secret, "j"), Session(client_secret, job, 3)
    for _turn in range(2):
        server.feed(drain(client))
        client.feed(drain(server))
    return server, client


def test_both_ends_talk():
    server, client = pair()
    assert server.open and client.open and server.rank == 3
    for number in range(3):
        client.send({"number": number})
        server.send({"answer": number})
    assert server.feed(drain(client)) == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert client.feed(drain(server)) == [{"answer": 0}, {"answer": 1}, {"answer": 2}]


@given(st.integers(1, 40))
def test_any_cutting_of_the_stream_is_the_same(size):
    server, client = pair()
    client.send({"text": "x" * 100})
    client.send({"text": "y"})
    data, found = drain(client), []
    for start in range(0, len(data), size):
        found += server.feed(data[start:start + size])
    assert [len(message["text"]) for message in found] == [100, 1]


@pytest.mark.parametrize("secrets", [(SECRET, b"t" * 32), (b"t" * 32, SECRET)])
def test_wrong_secret_on_either_side(secrets):
    with pytest.raises(ProtocolError):
        pair(*secrets)


def test_other_job():
    with pytest.raises(ProtocolError):
        pair(job="k")


def test_a_server_cannot_be_imitated_by_reflection():
    """A member that is given back its own words does not open."""
    client = Session(SECRET, "j", 3)
    with pytest.raises(ProtocolError):
        client.feed(drain(client))


def test_recorded_connection_is_worthless():
    server, client = Session(SECRET, "j"), Session(SECRET, "j", 3)
    recording = drain(client)
    server.feed(recording)
    client.feed(drain(server))
    proof = drain(client)
    recording += proof
    server.feed(proof)
    client.send({"stop": True})
    recording += drain(client)
    again = Session(SECRET, "j")
    with pytest.raises(ProtocolError):
        again.feed(recording)
    assert not again.open


@pytest.mark.parametrize("change", ["replay", "swap", "drop", "reflect"])
def test_frames_out_of_order(change):
    server, client = pair()
    frames = []
    for number in range(3):
        client.send({"number": number})
        frames.append(drain(client))
    if change == "reflect":
        with pytest.raises(ProtocolError):
            client.feed(frames[0])
        return
    order = {"replay": [0, 0], "swap": [1, 0], "drop": [0, 2]}[change]
    with pytest.raises(ProtocolError):
        for index in order:
            server.feed(frames[index])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_noticed(data):
    server, client = pair()
    client.send({"number": 12345})
    frame = bytearray(drain(client))
    index = data.draw(st.integers(4, len(frame) - 1))
    frame[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        server.feed(bytes(frame))


@given(st.lists(st.binary(max_size=3000), max_size=10))
@settings(max_examples=500, deadline=None)
def test_garbage_before_the_handshake(chunks):
    server = Session(SECRET, "j")
    try:
        for chunk in chunks:
            assert server.feed(chunk) == []
            assert len(server.incoming) <= Session.HELLO_LIMIT + 4
    except ProtocolError:
        pass
    assert not server.open


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))


@given(st.dictionaries(st.sampled_from(["protocol", "job", "rank", "nonce", "proof"]),
                       st.sampled_from([1, 0, -1, True, "j", "x" * 32, "é" * 32, None, [], {}, 1e300]) | json_values))
@settings(max_examples=500, deadline=None)
def test_well_formed_nonsense_in_the_handshake(message):
    for session in (Session(SECRET, "j"), Session(SECRET, "j", 1)):
        payload = json.dumps(message).encode()
        try:
            session.feed(len(payload).to_bytes(4, "big") + payload)
        except ProtocolError:
            pass
        assert not session.open


@pytest.mark.parametrize("length", [Session.HELLO_LIMIT + 1, 1 << 31])
def test_oversized_before_the_handshake(length):
    with pytest.raises(ProtocolError):
        Session(SECRET, "j").feed(length.to_bytes(4, "big"))


def test_oversized_after_the_handshake():
    server, _client = pair()
    with pytest.raises(ProtocolError):
        server.feed((Session.LIMIT + 1).to_bytes(4, "big"))


def test_a_peer_that_does_not_read():
    server, _client = pair()
    with pytest.raises(ProtocolError):
        for _number in range(1000):
            server.send({"text": "x" * 1000})
    assert len(server.outgoing) < Session.BACKLOG + 2000


def test_deep_nesting_is_no_crash():
    server, client = pair()
    payload = b"[" * 60000
    client.outgoing += len(payload).to_bytes(4, "big") + client._mac(0, payload) + payload
    with pytest.raises(ProtocolError):
        server.feed(drain(client))


@given(st.fixed_dictionaries({}, optional={key: json_values | st.booleans() for key in (
    "host", "nnodes", "release", "phase", "generation", "exit", "problems", "final", "unkillable", "failing", "leaving",
    "stop", "checkpoints", "lines", "checkpoint")}))
@settings(max_examples=300, deadline=None)
def test_a_member_gone_mad_cannot_break_the_coordinator(report):
    """Whatever a genuine member says, the coordinator's own errors are of the kinds that drop its connection."""
    coordinator = supervisor.Coordinator(2, supervisor.Limits(), "r1")
    good = supervisor.Member("lab1", 2, "r1", supervisor.Limits())
    coordinator.join(0, 0, 1.0)
    coordinator.join(1, 1, 1.0)
    report = {**good.report(), "checkpoints": 0, "lines": 0, "checkpoint": None, **report}
    try:
        coordinator.report(1, 1, report, 1.0)
    except ProtocolError:
        coordinator.leave(1, 1, "bad message", 1.0)
    coordinator.report(0, 0, dict(good.report(), checkpoints=0, lines=0, checkpoint=None), 1.0)
    coordinator.tick(2.0)
    assert isinstance(coordinator.text(), str) and coordinator.view()
