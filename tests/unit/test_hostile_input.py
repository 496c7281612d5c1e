"""The reader of what a job can write, with real files and with anything."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import unicodedata

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input
from hypothesis import given
from hypothesis import strategies as st

# Text with what spoofs a terminal, half surrogate pairs too.
TEXT = st.text(st.characters() | st.sampled_from("\x1b\x07\x9b\r\n\t\u202e\u2028\ud800\udfff"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)
SHAPE = hostile_input.Fields(
    {
        "state": hostile_input.Text(20, choices=("running", "done")),
        "text": hostile_input.Text(10),
        "generation": hostile_input.Number(),
        "time": hostile_input.Number(whole=False),
        "cause": hostile_input.Maybe(hostile_input.Fields({"host": hostile_input.Text()}, required=("host",))),
        "history": hostile_input.ListOf(hostile_input.Flag(), most=2),
        "members": hostile_input.MapOf(hostile_input.Number(0, 9), most=2),
    }
)


def clean(text):
    return not hostile_input.UNPRINTABLE.search(text)


# -- files


def test_a_file_is_read(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/a.json").write_bytes(b'{"text": "\xff"}')
    assert hostile_input.read_text(str(tmp_path), "state/a.json") == '{"text": "\ufffd"}'


def fifo(path):
    os.mkfifo(path)


def fifo_with_a_writer(path):
    os.mkfifo(path)
    threading.Thread(target=lambda: open(path, "wb"), daemon=True).start()


def endless(path):
    path.symlink_to("/dev/zero")


def a_link(path):
    path.symlink_to("/etc/passwd")


def a_broken_link(path):
    path.symlink_to("/nowhere")


def a_socket(path):
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def a_folder(path):
    path.mkdir()


def sparse(path):
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)


def large(path):
    path.write_bytes(b"1" * (hostile_input.MOST_BYTES + 1))


def hard_link(path):
    (path.parent / "other").write_text("{}")
    os.link(path.parent / "other", path)


WRONG = [fifo, fifo_with_a_writer, endless, a_link, a_broken_link, a_socket, a_folder, sparse, large, hard_link]


@pytest.mark.parametrize("make", WRONG)
def test_what_is_no_file_of_the_jobs_is_odd_and_nobody_waits_for_it(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "state.json")
    began = time.monotonic()
    with pytest.raises(hostile_input.Odd) as caught:
        hostile_input.read_text(str(tmp_path), "state.json")
    assert not isinstance(caught.value, hostile_input.Absent)
    assert "state.json" in str(caught.value)
    assert time.monotonic() - began < 5
    value, reason = hostile_input.load(str(tmp_path), "state.json", SHAPE)
    assert value is None and reason == str(caught.value)


def test_what_is_not_there_is_absent(tmp_path):
    with pytest.raises(hostile_input.Absent):
        hostile_input.read_text(str(tmp_path), "state/state.json")
    assert hostile_input.load(str(tmp_path), "state/state.json", SHAPE) == (None, "")


@pytest.mark.parametrize("below", ["link/a.json", "deep/link/a.json", "../outside/a.json", "deep/../../outside/a.json"])
def test_no_part_of_a_path_leads_outside(below, tmp_path):
    trusted = tmp_path / "trusted"
    (trusted / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a.json").write_text("{}")
    (trusted / "link").symlink_to(tmp_path / "outside")
    (trusted / "deep/link").symlink_to(tmp_path / "outside")
    with pytest.raises(hostile_input.Odd):
        hostile_input.read_text(str(trusted), below)


def test_a_file_whose_size_is_not_told_is_read_up_to_the_limit():
    assert hostile_input.read_text("/proc/self", "cmdline")
    with pytest.raises(hostile_input.Odd, match="more than 2 bytes"):
        hostile_input.read_text("/proc/self", "cmdline", limit=2)


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "fifo").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for below in ("fifo", "nothing", "fifo/nothing", "../x", "a\0b", "fifo/a\0b/c"):
        with pytest.raises(hostile_input.Odd):
            hostile_input.read_text(str(tmp_path), below)
    assert len(os.listdir("/proc/self/fd")) == before


# -- JSON


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "1" * 5000,
        "-" + "1" * 5000,
        "1e999",
        "NaN",
        "[Infinity]",
        "-Infinity",
        '{"a": 1, "a": 2}',
        "",
        "{",
        '"abc',
        '"' + "\\" * 99_999,
        '\\"' * 100_000,
        "\ud800",
    ],
)
def test_json_that_nobody_writes_is_odd_soon(text):
    began = time.process_time()
    with pytest.raises(hostile_input.Odd):
        hostile_input.parse_json(text)
    assert time.process_time() - began < 5


def test_half_a_surrogate_pair_is_mended_and_a_whole_one_is_a_character():
    assert hostile_input.parse_json(r'{"\ud800": ["\udfff", "\ud83d\ude00"]}') == {"\ufffd": ["\ufffd", "😀"]}


def test_brackets_in_strings_are_no_depth():
    assert hostile_input.parse_json(json.dumps(["[" * 1000, '\\"[[[[[' * 100])) == ["[" * 1000, '\\"[[[[[' * 100]


@given(TEXT)
def test_no_text_breaks_the_parser(text):
    try:
        json.dumps(hostile_input.parse_json(text)).encode()
    except hostile_input.Odd as odd:
        assert clean(str(odd))


@given(JSON)
def test_what_json_writes_is_read_or_odd(value):
    try:
        found = hostile_input.parse_json(json.dumps(value))
    except hostile_input.Odd:
        return
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


# -- shapes


@given(JSON | st.dictionaries(st.sampled_from(sorted(SHAPE.fields)), JSON))
def test_a_checked_value_has_its_shape_and_a_refused_one_a_sentence(value):
    try:
        found = hostile_input.check(value, SHAPE)
    except hostile_input.Odd as odd:
        assert clean(str(odd)) and len(str(odd)) < 600
        return
    assert set(found) <= set(SHAPE.fields)
    assert len(found.get("text", "")) <= 10 and clean(found.get("text", ""))
    assert isinstance(found.get("generation", 0), int)
    assert len(found.get("members", {})) <= 2
    assert found.get("cause") is None or set(found["cause"]) == {"host"}


@pytest.mark.parametrize(
    "value, sentence",
    [
        ([1], "the whole is a list, but an object was expected"),
        ({"generation": "abc"}, "generation is text, but a whole number was expected"),
        ({"generation": True}, "generation is true or false, but a whole number was expected"),
        ({"generation": -1}, "generation is not within 0 and 9.0072e+15"),
        ({"time": float("nan")}, "time is not within 0 and 9.0072e+15"),
        ({"state": "\x1b[2J"}, r"state is '\\x1b[2J', but one of running, done was expected"),
        ({"cause": {}}, "cause.host is missing"),
        ({"history": [True, 1]}, "history[1] is a whole number, but true or false was expected"),
        ({"history": [True] * 3}, "history has 3 entries, but at most 2 were expected"),
        ({"members": {"\x1b": 10}}, r"members.\x1b is not within 0 and 9"),
    ],
)
def test_the_sentence_names_the_place(value, sentence):
    with pytest.raises(hostile_input.Odd) as caught:
        hostile_input.check(value, SHAPE)
    assert str(caught.value) == sentence


def test_unknown_keys_are_dropped_and_long_texts_cut():
    assert hostile_input.check({"text": "a" * 99, "other": 1}, SHAPE) == {"text": "a" * 9 + "…"}


# -- text


def test_escapes_are_shown():
    assert hostile_input.printable("\x1b]0;OWNED\x07\x1b[2J\x9b1A\tfake\r\n") == r"\x1b]0;OWNED\x07\x1b[2J\x9b1A fake\x0d\x0a"
    assert hostile_input.printable("a\u202eb\u2028c\ud800") == r"a\u202eb\u2028c\ud800"
    assert hostile_input.printable("two\nlines\r", lines=True) == "two\nlines\\x0d"


def test_ordinary_text_stays():
    text = "Größe 日本語 नमस्ते عربى 👩‍👩‍👧 é ≤ 3 │ █▌ 100%|█████|"
    assert hostile_input.printable(text) == text


@given(TEXT, st.integers(1, 50))
def test_printable_text_is_printable_and_bounded(text, limit):
    found = hostile_input.printable(text, limit)
    assert clean(found) and len(found) <= limit
    assert hostile_input.printable(found, limit) == found
    found.encode()


def test_all_that_unicode_calls_control_or_format_is_shown_except_what_scripts_need():
    # Joiners, and signs that Arabic, Syriac, Kaithi and other scripts write visibly.
    needed = {0x200C, 0x200D, *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    for code in range(0x110000):
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in needed:
            assert not clean(chr(code)), hex(code)


@given(JSON)
def test_a_tidy_value_has_no_control_characters(value):
    assert not hostile_input.UNPRINTABLE.search(json.dumps(hostile_input.tidy(value), ensure_ascii=False))


def test_what_is_nested_without_end_is_tidied():
    value: list = []
    for _level in range(10_000):
        value = [value]
    assert "…" in json.dumps(hostile_input.tidy(value), ensure_ascii=False)


# -- patterns


def test_a_pattern_is_found():
    assert hostile_input.search(r"step \d", ["step 1", "loss", "x" * 2000 + "step 1"]) == [True, False, False]
    assert hostile_input.search("", ["a"]) == hostile_input.search("(", ["a"]) == [False]


def test_a_pattern_that_takes_for_ever_takes_two_seconds():
    began = time.monotonic()
    assert hostile_input.search("(a+)+b", ["ab", "a" * 60, "ab"]) == [True, False, False]
    assert time.monotonic() - began < 60
