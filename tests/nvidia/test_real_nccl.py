"""NVIDIA's real NCCL and CUDA runtime on a booted node: the installed libraries themselves tell their versions."""

from __future__ import annotations

import json
import subprocess

import conftest
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse
from builders import MANIFEST

NODE = "nv12"
FOLDER = "/opt/real-nccl"
# libcudart has to be there before NCCL asks for it; neither needs a GPU or a driver to tell its version.
ASK = """
import ctypes, glob, json
packages = glob.glob("%s/env/lib/python3*/site-packages/nvidia")[0]
runtime = ctypes.CDLL(glob.glob(packages + "/cu13/lib/libcudart.so.13")[0], ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(packages + "/nccl/lib/libnccl.so.2")
nccl, cuda = ctypes.c_int(), ctypes.c_int()
results = [library.ncclGetVersion(ctypes.byref(nccl)), runtime.cudaRuntimeGetVersion(ctypes.byref(cuda))]
print(json.dumps({"results": results, "nccl": nccl.value, "cuda": cuda.value}))
""" % FOLDER


def shell(command: str, **options) -> str:
    """Run a command as root on the node."""
    words = ["ssh", "-F", str(conftest.STATE / "ssh_config"), "-o", "BatchMode=yes", NODE, "sudo", "sh", "-c", f"'{command}'"]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=300, **options).stdout.decode()


def test_the_installed_nccl_and_cuda_runtime_answer(lab):
    line = MANIFEST["lines"]["13.0"]
    nccl = line["nccl_version"].split("-", maxsplit=1)[0]
    requirements = (f"nvidia-nccl-cu13=={nccl}", "nvidia-cuda-runtime==13.0.96")
    wanted = wheelhouse.Wanted(requirements, {"architecture": "x86_64", "glibc": "2.36", "python": "3.11"})
    folder, wheels = wheelhouse.provide("~/.cache/onprem.torch/wheelhouse", wanted)
    assert any(name.startswith(f"nvidia_nccl_cu13-{nccl}-") for name in wheels)
    with subprocess.Popen(["tar", "--create", "--directory", folder, "."], stdout=subprocess.PIPE) as archive:
        shell(f"rm -rf {FOLDER} && mkdir -p {FOLDER}/wheels && tar --extract --no-same-owner --directory {FOLDER}/wheels", stdin=archive.stdout)
    uv = f"{FOLDER}/bin/uv-*.data/scripts/uv"
    shell(f"python3 -m zipfile -e {FOLDER}/wheels/uv-*.whl {FOLDER}/bin && chmod 755 {uv} && {uv} venv -q --python /usr/bin/python3 {FOLDER}/env")
    install = "pip install -q --offline --no-index --link-mode copy"
    shell(f"{uv} {install} --find-links {FOLDER}/wheels --python {FOLDER}/env/bin/python3 {' '.join(requirements)}")
    answer = json.loads(shell(f"{FOLDER}/env/bin/python3 -", input=ASK.encode()))
    major, minor, patch = (int(part) for part in nccl.split("."))
    assert answer == {"results": [0, 0], "nccl": major * 10000 + minor * 100 + patch, "cuda": 13000}
    shell(f"rm -rf {FOLDER}")
