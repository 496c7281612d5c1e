"""NVIDIA's real NCCL and CUDA runtime on a booted node: the libraries tell their versions, and read what the role writes."""

from __future__ import annotations

import json
import subprocess

import conftest
import pytest
import stack
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse
from builders import MANIFEST

NODE = "nv12"
FOLDER = "/opt/real-nccl"
# libcudart has to be there before NCCL asks for it; neither needs a GPU or a driver to tell its version.
LOAD = """
import ctypes, glob, json
packages = glob.glob("%s/env/lib/python3*/site-packages/nvidia")[0]
runtime = ctypes.CDLL(glob.glob(packages + "/cu13/lib/libcudart.so.13")[0], ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(packages + "/nccl/lib/libnccl.so.2")
""" % FOLDER
ASK = LOAD + """
nccl, cuda = ctypes.c_int(), ctypes.c_int()
results = [library.ncclGetVersion(ctypes.byref(nccl)), runtime.cudaRuntimeGetVersion(ctypes.byref(cuda))]
print(json.dumps({"results": results, "nccl": nccl.value, "cuda": cuda.value}))
"""
# What rank 0 does first, GPU or not: it opens the socket that the others come to, on the interface that it was told.
MEET = LOAD + """
print("result", library.ncclGetUniqueId((ctypes.c_char * 128)()))
"""


def shell(command: str, **options) -> str:
    """Run a command as root on the node."""
    words = ["ssh", "-F", str(conftest.STATE / "ssh_config"), "-o", "BatchMode=yes", NODE, "sudo", "sh", "-c", f"'{command}'"]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=300, **options).stdout.decode()


@pytest.fixture(scope="module")
def nccl(lab):
    """Install the manifest's NCCL and a CUDA runtime on the node, and return NCCL's version."""
    version = MANIFEST["lines"]["13.0"]["nccl_version"].split("-", maxsplit=1)[0]
    requirements = (f"nvidia-nccl-cu13=={version}", "nvidia-cuda-runtime==13.0.96")
    wanted = wheelhouse.Wanted(requirements, {"architecture": "x86_64", "glibc": "2.36", "python": "3.11"})
    folder, wheels = wheelhouse.provide("~/.cache/onprem.torch/wheelhouse", wanted)
    assert any(name.startswith(f"nvidia_nccl_cu13-{version}-") for name in wheels)
    with subprocess.Popen(["tar", "--create", "--directory", folder, "."], stdout=subprocess.PIPE) as archive:
        shell(f"rm -rf {FOLDER} && mkdir -p {FOLDER}/wheels && tar --extract --no-same-owner --directory {FOLDER}/wheels", stdin=archive.stdout)
    uv = f"{FOLDER}/bin/uv-*.data/scripts/uv"
    shell(f"python3 -m zipfile -e {FOLDER}/wheels/uv-*.whl {FOLDER}/bin && chmod 755 {uv} && {uv} venv -q --python /usr/bin/python3 {FOLDER}/env")
    install = "pip install -q --offline --no-index --link-mode copy"
    shell(f"{uv} {install} --find-links {FOLDER}/wheels --python {FOLDER}/env/bin/python3 {' '.join(requirements)}")
    yield version
    shell(f"rm -rf {FOLDER}")


def test_the_installed_nccl_and_cuda_runtime_answer(nccl):
    answer = json.loads(shell(f"{FOLDER}/env/bin/python3 -", input=ASK.encode()))
    major, minor, patch = (int(part) for part in nccl.split("."))
    assert answer == {"results": [0, 0], "nccl": major * 10000 + minor * 100 + patch, "cuda": 13000}


@pytest.mark.usefixtures("nccl")
def test_nccl_takes_the_training_interface_from_the_file_that_the_role_writes(nodes):
    meet = f"NCCL_DEBUG=INFO {FOLDER}/env/bin/python3 - 2>&1"
    of_hosts = {name: {"lab_distribution": distribution} for name, distribution in (("nv12", "debian-12"), ("nv13", "debian-13"))}
    settings = stack.plan(of_hosts)["nodes"][NODE]["nvidia"]["nccl"]["settings"]
    for answer in nodes.bring(settings):
        assert not answer.get("failed"), answer
    told = shell(meet, input=MEET.encode())
    assert "result 0" in told and "NCCL_SOCKET_IFNAME set by environment to =host0" in told and "Using host0:198.18.65.12" in told
    # The name is taken as it stands: another one that begins alike is not it.
    changed = {**settings, "files": {path: text.replace("==host0", "==host") for path, text in settings["files"].items()}}
    for answer in nodes.bring(changed):
        assert answer["changed"]
    told = shell(meet, input=MEET.encode())
    assert "result 0" not in told and "no socket interface found" in told
