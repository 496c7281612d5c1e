"""torch from a lock file on a booted node: the hashes decide, on the control node and on the node itself."""

from __future__ import annotations

import hashlib
import json
import os
import re

import conftest
import pytest
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse

NODE = "nv12"
ROOT = "/opt/locked"
HOUSE = "~/.cache/onprem.torch/wheelhouse"
WANTED = wheelhouse.Wanted(
    ("torch==2.13.0",), {"architecture": "x86_64", "glibc": "2.36", "python": "3.11"}, "", ("https://download.pytorch.org/whl/cpu",)
)


def lock_of(folder: str) -> str:
    """Return a lock of the wheels in a folder."""
    lines = []
    for name in sorted(os.listdir(folder)):
        distribution, version = name.split("-")[:2]
        if distribution == "uv":
            continue
        with open(os.path.join(folder, name), "rb") as stream:
            lines.append(f"{distribution.replace('_', '-')}=={version} --hash=sha256:{hashlib.sha256(stream.read()).hexdigest()}\n")
    return "".join(lines)


def provide(lock: object, name: str) -> dict:
    """Run the module on the node and return its answer."""
    arguments = {
        "environment": f"{ROOT}/environments/{name}",
        "requirements": list(WANTED.requirements),
        "version": "2.13.0",
        "root": ROOT,
        "extra_index_urls": list(WANTED.extra),
        "platform": WANTED.platform,
        "lock": str(lock),
    }
    words = ["ansible", NODE, "-i", str(conftest.INVENTORY), "-m", "onprem.torch.pytorch_environment", "-a", json.dumps(arguments)]
    return json.loads(conftest.ansible(*words, **conftest.JSON_OUTPUT).stdout)["plays"][0]["tasks"][0]["hosts"][NODE]


@pytest.fixture
def lock(lab, tmp_path):
    folder, _wheels = wheelhouse.provide(HOUSE, WANTED)
    path = tmp_path / "torch.lock"
    path.write_text(lock_of(folder))
    yield path
    lab.run(f"rm -rf {ROOT}")


def test_a_lock_decides_and_no_changed_wheel_gets_in(lab, lock):
    answer = provide(lock, "good")
    assert not answer.get("failed") and answer["versions"]["torch"].startswith("2.13.0"), answer.get("msg")
    assert not provide(lock, "good")["changed"]
    # The time of a wheel's first file changes on the node: it is a whole wheel of the same size, and not the locked one.
    # Without its cache uv has to read it again.
    change = "printf X | dd of=$(ls mpmath-*.whl) bs=1 seek=10 conv=notrunc status=none"
    lab.run(f"rm -rf {ROOT}/cache; cd {ROOT}/wheels 2>/dev/null || exit 0; {change}")
    answer = provide(lock, "tampered")
    assert answer.get("failed") and "mpmath" in answer["msg"] and "hash" in answer["msg"].lower(), answer
    assert "Traceback" not in answer["msg"]
    # A lock that does not know the wheel is refused before anything is copied.
    lock.write_text(re.sub(r"(?m)^(mpmath==\S+ --hash=sha256:).*$", r"\g<1>" + "0" * 64, lock.read_text()))
    answer = provide(lock, "strange")
    assert answer.get("failed") and "another hash than pytorch_lock says" in answer["msg"], answer
    assert "strange" not in lab.run(f"ls {ROOT}/environments 2>/dev/null || true")[NODE]
