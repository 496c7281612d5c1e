"""torch from a lock file on a booted node: the hashes decide, on the control node and on the node itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex

import conftest
import pytest
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse

NODE = "nv12"
ROOT = "/opt/locked"
H100 = [{"name": "NVIDIA H100", "architecture": "sm_90"}]
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


def module(**arguments: object) -> dict:
    """Run the module on the node and return its answer."""
    words = ["ansible", NODE, "-i", str(conftest.INVENTORY), "-m", "onprem.torch.pytorch_environment", "-a", json.dumps(arguments)]
    return json.loads(conftest.ansible(*words, **conftest.JSON_OUTPUT).stdout)["plays"][0]["tasks"][0]["hosts"][NODE]


def provide(lock: object, name: str) -> dict:
    """Let an environment be made of a lock."""
    return module(
        environment=f"{ROOT}/environments/{name}",
        requirements=list(WANTED.requirements),
        version="2.13.0",
        root=ROOT,
        extra_index_urls=list(WANTED.extra),
        platform=WANTED.platform,
        lock=str(lock),
    )


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
    # The same environment as one of somebody else: good for CPUs, and named where the node has GPUs.
    taken = {"source": "existing", "environment": f"{ROOT}/environments/good", "root": ROOT}
    answer = module(**taken, version="2.13.0")
    assert not answer.get("failed") and not answer["changed"] and answer["versions"]["torch"].startswith("2.13.0")
    answer = module(**taken, gpus=H100)
    assert answer.get("failed") and "is a build for CPUs, but the node has NVIDIA H100" in answer["msg"], answer
    answer = module(**taken, version="2.12.0")
    assert answer.get("failed") and "but pytorch_version is 2.12.0" in answer["msg"], answer
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


# What Python prints where torch is a build for GPUs, which would take gigabytes: the module's questions are the real ones.
STAND_IN = """#!/bin/sh
id -un >>{folder}/asked
cat {folder}/answer
"""


def test_an_existing_torch_of_a_user_s_is_asked_once_and_never_as_root(lab):
    folder = "/opt/stand-in"
    answer = {"torch": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.28.9", "architectures": ["sm_75", "sm_90"]}

    def become(**changes: object) -> None:
        text = json.dumps({**answer, **changes})
        version = f"{folder}/lib/python3/site-packages/torch/version.py"
        lab.run(f"printf %s {shlex.quote(text)} >{folder}/answer; echo \"__version__ = '2.13.0+cu130'\" >{version}")

    lab.run(f"mkdir -p {folder}/bin {folder}/lib/python3/site-packages/torch")
    lab.run(f"printf %s {shlex.quote(STAND_IN.format(folder=folder))} >{folder}/bin/python3; chmod 755 {folder}/bin/python3")
    # The login user can change all of it. Whoever runs it leaves a name.
    lab.run(f"touch {folder}/asked; chown -R ops: {folder}; chmod 666 {folder}/asked")
    taken = {"source": "existing", "environment": folder, "root": ROOT, "gpus": H100}
    try:
        become()
        for _round in range(2):
            found = module(**taken)
            assert not found.get("failed") and found["versions"] == answer, found
        assert lab.run(f"cat {folder}/asked", check=False)[NODE].split() == ["torchrun"], "once, and as the job's user"
        become(architectures=["sm_75", "sm_80"])
        found = module(**taken)
        assert found.get("failed") and "no code for NVIDIA H100 (sm_90), only for sm_75, sm_80" in found["msg"], found
        become(nccl=None)
        found = module(**taken)
        assert found.get("failed") and "built without NCCL" in found["msg"], found
    finally:
        lab.run(f"rm -rf {folder} {ROOT}; userdel torchrun", check=False)
