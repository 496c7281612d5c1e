"""What one user is let into stays shut for everybody else, also for those of its primary group."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import folder_acl, safe_files, verify_config
from ansible_collections.onprem.torch.plugins.modules import nccl_all_reduce

ALICE = safe_files.Account("alice", 65533, 65534, (65534,))
BOB = safe_files.Account("bob", 65532, 65534, (65534,))
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture(params=["lists", "no lists"])
def folder(request, monkeypatch):
    """Return a folder of root's that everybody may enter, as /run/nccl-verify is."""
    if request.param == "no lists":

        def refuse(*_words):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(folder_acl.os, "setxattr", refuse)
    with tempfile.TemporaryDirectory(dir="/run") as made:
        os.chmod(made, 0o755)
        yield made


def reads(who, path):
    """Return what a user reads, None where it may not."""

    def read():
        with open(path, encoding="utf-8") as stream:
            return stream.read()

    try:
        return safe_files.as_user(who, read)
    except PermissionError:
        return None


def only_alice(path, text):
    """Check who can read a file."""
    assert reads(ALICE, path) == text
    assert reads(BOB, path) is None, "it shares the primary group"
    with pytest.raises(PermissionError):
        safe_files.as_user(ALICE, lambda: open(path, "w").close())
    assert not stat.S_IMODE(os.stat(path).st_mode) & 0o007


def test_one_user_reads_a_file_and_its_group_does_not(folder):
    path = os.path.join(folder, "secret")
    safe_files.write_new(path, "QXZ", 0o600)
    folder_acl.let_read(path, ALICE.uid)
    only_alice(path, "QXZ")


def test_the_token_of_a_verification_is_for_the_jobs_user_alone(folder, monkeypatch):
    class Module:
        params = {"launch": {"user": "alice", "config": {"a": 1}, "properties": []}, "run": {}, "token": "QXZ", "environment_file": ""}

        def run_command(self, words):
            assert "QXZ" not in str(words)
            return 0, "", ""

    monkeypatch.setattr(verify_config, "FOLDER", folder)
    monkeypatch.setattr(nccl_all_reduce, "ENVIRONMENT_FILE", os.path.join(folder, "env"))
    monkeypatch.setattr(safe_files, "account", lambda _user: ALICE)
    nccl_all_reduce.Verification(Module()).started()
    path = os.path.join(folder, "config.json")
    only_alice(path, json.dumps({"a": 1, "token": "QXZ"}))
    for entry in os.scandir(folder):
        assert "QXZ" not in (reads(BOB, entry.path) or ""), entry.name
