# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whoever has the secret, and whatever lies in the supervisor's folder: taken or refused, never a crash, never without end."""
from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import struct
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, supervisor_state
from supervisor_support import load

supervisor = load()
SECRET = b"s" * 32
STATE_BYTES = 256 << 10
GOOD = dict(supervisor.Member("lab2", 2, "r1", supervisor.Limits()).report(), checkpoints=0, lines=0, checkpoint=None, sent=1.0)
CAUSE = {"reason": "error", "error": "ValueError: bad", "time": 5.0, "exit_code": 1, "signal": None, "rank": 1, "local_rank": 0, "own": True,
         "echo": False}
VIEW = supervisor.Coordinator(2, supervisor.Limits(), "r1").view()
# What parsers, counters, terminals and files stumble over.
NASTY = st.sampled_from([None, True, False, 0, -1, 10**9, 2**53, 2**64, 10**400, 1e308, float("nan"), float("inf"), -0.0, "", "x" * 60000,
                         "\x1b]0;OWNED\x07\x1b[2J", "a\nb\r\0", "\ud800", "\U0001f600" * 3000, "\u202e", [], {}, [[]], [None] * 1000,
                         [{"check": "x" * 5000, "text": "\x1b[A" * 5000}] * 9, {"rank": 3}, {"path": "/x\x1b", "time": 1e300},
                         {"generation": 1, "code": 1, "ordered": False, "cause": {"rank": 3, "reason": "error", "error": "x"}}])
JSON = st.recursive(NASTY | st.text(max_size=30) | st.integers() | st.floats(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


def one(folder, rank):
    """A supervisor whose loop does not run."""
    folder.mkdir(parents=True, exist_ok=True)
    options = supervisor.parse(["--job", "j", "--host", f"lab{rank + 1}", "--node-rank", str(rank), "--nnodes", "2", "--coordinator",
                                "127.0.0.1:1", "--secret-file", "/x", "--state-dir", str(folder), "--release", "r1", "--", "true"])
    return supervisor.Supervisor(options, supervisor.Limits(), SECRET)


class Peer:
    """The other end of a supervisor's connection, with the secret and without manners."""

    def __init__(self, made, rank):
        self.made, (near, self.far) = made, socket.socketpair()
        made.add_link(near, None if made.coordinator else 1, time.monotonic())
        self.link = made.links[near.fileno()]
        self.session = supervisor.Session(SECRET, "j", rank)
        for _round in range(3):
            made.take(self.link, self.out(self.session), time.monotonic())
            self.session.feed(self.out(self.link.session))
        assert self.session.open and self.link.session.open

    @staticmethod
    def out(session):
        data = bytes(session.outgoing)
        session.outgoing.clear()
        return data

    def send(self, payload):
        frame = struct.pack(">I", len(payload)) + self.session._mac(0, payload) + payload
        self.made.take(self.link, frame, time.monotonic())
        self.link.session.outgoing.clear()

    def close(self):
        self.made.drop(self.link, "closed", time.monotonic())
        self.far.close()


def looks(made):
    """What the supervisor would do after a message; its state must be small and of the known shape, with nothing that acts."""
    made.turn(time.monotonic())
    made.next_state = 0.0
    made.write_state()
    made.speak(time.monotonic())
    if made.coordinator:
        assert len(json.dumps(made.coordinator.view(), ensure_ascii=False).encode()) < supervisor.Session.LIMIT - 1000
    text = pathlib.Path(made.state_file).read_text(encoding="utf-8")
    assert len(text.encode()) < STATE_BYTES
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    assert hostile_input.load(os.path.dirname(made.state_file), "state.json", supervisor_state.STATE)[1] == ""
    assert hostile_input.load(os.path.dirname(made.state_file), "state.json", supervisor.STATE)[1] in (
        "", f"{made.state_file}: generation is not within 0 and 1e+06"), "it could not be gone on from"


@pytest.fixture(scope="module")
def rank0(tmp_path_factory):
    return one(tmp_path_factory.mktemp("zero") / "state", 0)


@pytest.fixture(scope="module")
def member(tmp_path_factory):
    return one(tmp_path_factory.mktemp("one") / "state", 1)


FUZZ = settings(max_examples=int(os.environ.get("SUPERVISOR_HOSTILE", "150")), deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck))


def changed(data, good):
    """A good message with some leaves of any kind."""
    message = json.loads(json.dumps(good))
    for _change in range(data.draw(st.integers(0, 3))):
        place = message
        while True:
            key = data.draw(st.sampled_from(sorted(place) + ["new"]))
            if isinstance(place.get(key), dict) and place[key] and data.draw(st.booleans()):
                place = place[key]
            else:
                break
        if data.draw(st.integers(0, 5)):
            place[key] = data.draw(JSON)
        else:
            place.pop(key, None)
    return message


def encode(message):
    """As Python writes it, NaN and halves of surrogate pairs included."""
    return json.dumps(message).encode()[:supervisor.Session.LIMIT]


@FUZZ
@given(st.data())
def test_a_member_with_the_secret_cannot_harm_rank_0(rank0, data):
    peer = Peer(rank0, 1)
    try:
        for _message in range(data.draw(st.integers(1, 4))):
            good = dict(GOOD, generation=rank0.coordinator.generation,
                        exit={"generation": rank0.coordinator.generation, "code": 1, "ordered": False, "time": 5.0, "cause": CAUSE})
            peer.send(encode(changed(data, good)))
            if rank0.links.get(peer.link.sock.fileno()) is not peer.link:
                break
        looks(rank0)
    finally:
        peer.close()
        rank0.coordinator.stopped_by = None
        rank0.coordinator.phase, rank0.code = "waiting", None
        rank0.member.result = None


@FUZZ
@given(st.data())
def test_rank_0_cannot_harm_a_member(member, data):
    near, far = socket.socketpair()
    member.add_link(near, 1, time.monotonic())
    link = member.links[near.fileno()]
    server = supervisor.Session(SECRET, "j")
    for _round in range(3):
        server.feed(Peer.out(link.session))
        member.take(link, Peer.out(server), time.monotonic())
    assert server.open and link.session.open
    good = {"order": "wait", "generation": 3, "graceful": True, "hang": False, "echo": 1.0, "now": 1.0,
            "view": dict(VIEW, first_cause=dict(CAUSE, host="lab1", node_rank=0, generation=1, charged=True, text="lab1: bad"))}
    payload = encode(changed(data, good))
    try:
        member.take(link, struct.pack(">I", len(payload)) + server._mac(0, payload) + payload, time.monotonic())
        member.member.order = {"order": "wait"}     # what it is told to do is another matter
        looks(member)
    finally:
        member.drop(link, "closed", time.monotonic())
        far.close()
        member.code, member.member.result = None, None


@pytest.mark.parametrize("payload", [
    b"[" * 60000, b'{"a":' * 10000, b"9" * 60000, b'{"generation": ' + b"9" * 5000 + b"}", b'{"host": "a", "host": "b"}', b'{"sent": NaN}',
    b'{"sent": -Infinity}', b'{"host": "\\ud800"}', b"\xff\xfe", b"null", b"", b'"x"'])
def test_what_json_can_be(rank0, payload):
    peer = Peer(rank0, 1)
    peer.send(payload)
    assert peer.link.sock.fileno() == -1, "the connection is dropped"
    looks(rank0)
    peer.far.close()


def test_host_names_without_end(tmp_path):
    """A rank with another name on each connection: what is remembered has an end, and is what was there first."""
    rank0 = one(tmp_path, 0)
    for number in range(300):
        peer = Peer(rank0, 1)
        peer.send(encode(dict(GOOD, host=f"host-{number}-" + "x" * 200, checkpoint={"path": "/c/step-1", "time": 5.0})))
        peer.send(encode(dict(GOOD, host="another")))
        assert peer.link.sock.fileno() == -1, "a connection has one host"
        peer.far.close()
    assert 60 <= len(rank0.coordinator.checkpoint_hosts) <= 68
    assert any(name.startswith("host-0-") for name in rank0.coordinator.checkpoint_hosts)
    looks(rank0)


# Bytes of a character in a frame: one, one with an escape, two, four.
CHARACTERS = st.sampled_from(["x", '"', "\\", "\u00e9", "\U0001f600"])


def long_text(most):
    return st.builds(lambda character, length: character * length, CHARACTERS, st.sampled_from([1, most // 2, most]))


@st.composite
def left_state(draw):
    """A state.json of the known shape, as large as the job can make it."""
    number, name = draw(st.sampled_from([0, 3, 100, 3000])), draw(long_text(60))
    host, path = draw(long_text(255)), draw(long_text(supervisor.PATH_TOLD))
    cause = dict(CAUSE, host=draw(long_text(255)), node_rank=1, generation=1, charged=True, error=draw(long_text(2000)), text=draw(long_text(2000)))
    return {"job": "j", "release": "r1", "generation": 1, "first_cause": cause, "history": [cause] * draw(st.integers(0, 3)),
            "checkpoint_hosts": [f"{index}{name}"[:255] for index in range(number)],
            "checkpoints": {f"{index}{draw(st.just('') | long_text(250))}"[:255]: {"host": host, "path": path, "time": 5.0}
                            for index in range(draw(st.sampled_from([0, 1, 16])))}}


@settings(max_examples=int(os.environ.get("SUPERVISOR_HOSTILE", "60")), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(left_state(), long_text(255), long_text(1024))
def test_what_the_job_left_in_the_state_fits_into_a_frame(tmp_path_factory, left, host, path):
    """A larger one than peers take would lose rank 0 for ever, whoever starts it anew."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "state.json").write_text(json.dumps(left, ensure_ascii=False)[:hostile_input.MOST_BYTES], encoding="utf-8")
    made = one(folder, 0)
    coordinator = made.coordinator
    coordinator.join(1, 1, time.monotonic())
    coordinator.report(1, 1, dict(GOOD, host=host, checkpoint={"path": path, "time": 5.0}), time.monotonic())
    for phase in supervisor.STATES:
        coordinator.phase, coordinator.stopped_by = phase, host
        order = {"order": "wait", "generation": 2**53, "graceful": True, "hang": False, "echo": 1e10 / 3, "now": 1e10 / 3, "view": coordinator.view()}
        message = supervisor.encoded(order)
        assert len(message) <= supervisor.Session.LIMIT
        assert len(supervisor.encoded(order["view"])) <= supervisor.Session.LIMIT - 4096
        supervisor.expected(hostile_input.parse_json(message.decode(), 8), supervisor.ORDER)
    assert set(coordinator.view()["checkpoint_hosts"]) <= {*left["checkpoint_hosts"], host}
    made.selector.close()
    for descriptor in (made.wake_read, made.wake_write):
        os.close(descriptor)


def test_hosts_that_a_larger_job_knew_leave_room_for_todays(tmp_path):
    """Fewer nodes than before: neither are the old ones' checkpoints forgotten, nor are new ones not noticed."""
    names = sorted(f"gpu-{number:04}" for number in range(300))
    (tmp_path / "state.json").write_text(json.dumps({"checkpoint_hosts": names}))
    made = one(tmp_path, 0)
    made.coordinator.join(1, 1, 0.0)
    made.coordinator.report(1, 1, dict(GOOD, host="new", checkpoint={"path": "/c/step-1", "time": 5.0}), 0.1)
    assert made.coordinator.view()["checkpoint_hosts"] == [*names, "new"]


def test_a_made_up_generation_leads_nobody_astray():
    """Neither a member's claim nor a number in its state.json: all go on with the job's own."""
    limits = supervisor.Limits()
    coordinator = supervisor.Coordinator(2, limits, "r1", 7)
    members = [supervisor.Member("lab1", 2, "r1", limits, 7), supervisor.Member("lab2", 2, "r1", limits, 10**9)]
    coordinator.join(1, 1, 0.0)
    for rank, each in enumerate(members):
        each.problems = []
        coordinator.report(rank, rank, dict(each.report(), checkpoints=0, lines=0, checkpoint=None), 0.1)
    coordinator.tick(0.2)
    assert coordinator.order() == {"order": "run", "generation": 8}
    for each in members:
        each.receive(coordinator.order())
        assert each.step(0.3) == [("start", 8)]
        each.ended(1, None, 0.4)
        each.problems = []
        assert each.step(0.5) == [], "the same generation does not start twice"


ODD = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "dangling": lambda path: os.symlink("/nowhere", path),
    "list": lambda path: pathlib.Path(path).write_text("[1]"),
    "deep": lambda path: pathlib.Path(path).write_text("[" * 100000),
    "huge": lambda path: pathlib.Path(path).write_text(" " * (3 << 20)),
    "generation": lambda path: pathlib.Path(path).write_text('{"job": "j", "release": "r1", "generation": "abc"}'),
    "history": lambda path: pathlib.Path(path).write_text('{"job": "j", "release": "r1", "history": [1], "first_cause": 5}'),
    "hosts": lambda path: pathlib.Path(path).write_text('{"checkpoint_hosts": {"a": 1}, "restarts_left": -5}'),
    "release": lambda path: pathlib.Path(path).write_text('{"release": [], "unacknowledged": [[]]}'),
    "binary": lambda path: pathlib.Path(path).write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["state.json", "done"])
@pytest.mark.parametrize("odd", sorted(ODD))
def test_odd_things_in_its_own_folder_keep_no_supervisor_from_starting(tmp_path, capfd, odd, name, rank):
    (tmp_path / "state").mkdir()
    ODD[odd](str(tmp_path / "state" / name))
    made = one(tmp_path / "state", rank)
    made.turn(time.monotonic())
    made.write_done()
    said = [line for line in capfd.readouterr().out.splitlines() if f"/{name}" in line]
    if not (name == "done" and rank == 1):          # main reads it there, see below
        taken = (odd, name) in (("generation", "done"), ("hosts", "done"), ("history", "done"))
        assert said or taken, f"nothing was said of {odd} as {name}"
    assert len(said) <= 3
    if odd != "folder":
        assert json.loads((tmp_path / "state" / name).read_text())["job"] == "j", "it was not replaced"


@pytest.mark.parametrize("odd", sorted(ODD))
def test_a_command_starts_and_ends_among_odd_things(tmp_path, monkeypatch, odd):
    """The whole program, with odd files wherever it reads or writes: the job is done all the same."""
    state, logs = tmp_path / "state", tmp_path / "logs"
    (logs / "run" / "attempt_0" / "0").mkdir(parents=True)
    state.mkdir()
    for path in (state / "state.json", state / "done", state / "errors", logs / "run" / "attempt_0" / "0" / "error.json"):
        ODD[odd](str(path))
    os.mkfifo(state / f"state.json.{os.getpid()}.tmp")
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor.signal, "set_wakeup_fd", lambda *_, **__: None)
    for command, code in (("true", 0), ("false", supervisor.EXIT_FAILED)):
        assert supervisor.main(["--job", "j", "--host", "lab1", "--node-rank", "0", "--nnodes", "1", "--state-dir", str(state), "--log-dir",
                                str(logs), "--release", f"r-{command}", "--max-restarts", "0", "--", command]) == code


NUMBERS = st.one_of(st.integers(0, 40), st.integers(-10**30, 10**30), st.just("x"))


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.sampled_from([1, -9, -15, 127]), st.text(max_size=60), st.floats(allow_nan=True))
def test_a_cause_is_one_that_every_peer_takes_whatever_the_job_prints(rank, local, code, torchrun, words, moment):
    tail = ["Failures:", f"rank : {rank} (local_rank: {local})", f"exitcode : {code}", words]
    cause = dict(supervisor.cause_from(torchrun, {"message": words}, tail), time=moment)
    made = supervisor.sendable(cause)
    supervisor.check_report(dict(GOOD, exit={"generation": 1, "time": None, "code": torchrun, "ordered": False, "cause": made}))
    assert made["time"] is None or made["time"] >= 0
    if rank in range(40) and local in range(40) and isinstance(code, int) and abs(code) < 1000 and 0 <= moment < 1e9:
        assert made["rank"] == rank, "a real report is believed"


def test_a_flood_of_strangers_pushes_out_its_own(tmp_path):
    """A peer that has not spoken yet is not the one that goes when another address opens one connection after the other."""
    made = one(tmp_path, 0)

    def come(source):
        near, far = socket.socketpair()
        made.listener = type("Listener", (), {"accept": lambda _self: (near, source)})()
        made.accept(time.monotonic())
        made.links[near.fileno()].source = source
        return near, far

    peer = come("198.18.0.12")
    crowd = [come("198.18.0.11") for _number in range(5 * made.STRANGERS)]
    assert peer[0].fileno() in made.links and len(made.links) <= made.STRANGERS
    for pair in (peer, *crowd):
        for end in pair:
            end.close()
