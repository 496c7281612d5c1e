"""Words that go through systemd's own rules and come out as they went in.

The reader below follows systemd.service(5), "Command lines", and systemd.exec(5), "EnvironmentFile=", not the writer.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import systemd
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc"), whitelist_characters="\n\t\r"), max_size=30)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "s": " ", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def split(line, dollars=True):
    """Split a command line as systemd does: quotes, C escapes, then %% and (in commands) $$."""
    words, word, quote, started = [], "", "", False
    letters = iter(line)
    for letter in letters:
        if letter == "\\":
            word += ESCAPES[next(letters)]
            started = True
        elif quote:
            if letter == quote:
                quote = ""
            else:
                word += letter
        elif letter in "\"'" and not started:
            quote, started = letter, True
        elif letter in " \t\n\r":
            if started:
                words.append(word)
            word, started = "", False
        else:
            word += letter
            started = True
    assert not quote
    if started:
        words.append(word)
    for text in words:
        assert "%" not in text.replace("%%", ""), "a specifier would be expanded"
        assert not dollars or "$" not in text.replace("$$", ""), "a variable would be expanded"
    words = [text.replace("%%", "%") for text in words]
    return [text.replace("$$", "$") for text in words] if dollars else words


@given(st.lists(TEXT, max_size=6))
def test_a_command_line_gives_its_words_back(words):
    assert split(systemd.command(words)) == words


@given(TEXT)
def test_an_assignment_gives_its_value_back(value):
    assert split(systemd.assignment("NAME", value), dollars=False) == [f"NAME={value}"]


def test_a_plain_command_is_not_quoted():
    words = ["/usr/bin/python3", "-m", "torch.distributed.run", "--master-addr=198.18.0.1", "a@b:c,d_e"]
    assert systemd.command(words) == " ".join(words)


def test_numbers_are_words():
    assert systemd.command(["--count", 3]) == "--count 3"


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), TEXT, max_size=5))
def test_an_environment_file_gives_its_values_back(values):
    found, text = {}, systemd.environment_file(values)
    position = 0
    while position < len(text):
        equals = text.index('="', position)
        name, position, value = text[position:equals], equals + 2, ""
        while text[position] != '"':
            if text[position] == "\\" and text[position + 1] in '"\\`$':
                position += 1
            value += text[position]
            position += 1
        assert text[position + 1] == "\n"
        position += 2
        found[name] = value
    assert found == values


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_itself_accepts_a_unit_with_awkward_words(tmp_path):
    words = ["/bin/echo", "a b", 'quote"', "back\\slash", "100%", "$HOME", "it's", "new\nline", ""]
    unit = tmp_path / "awkward.service"
    lines = ["[Service]", f"ExecStart={systemd.command(words)}", f"Environment={systemd.assignment('A', words[4])}"]
    unit.write_text("\n".join(lines) + "\n")
    answer = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    about = [line for line in answer.stderr.splitlines() if "awkward" in line]
    assert about == [], answer.stderr
