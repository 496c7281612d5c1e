# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA's nccl-tests, built from a copy that the user gives, against the very NCCL that torch uses."""
from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess

import host
from machines import run


def nccl_folder(python):
    """Folder with include/nccl.h and lib/libnccl.so.2 of the NCCL in torch's environment."""
    return pathlib.Path(run(python, "-c", "import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])").strip().splitlines()[-1])


def start_build(source, python):
    """Begin to build all_reduce_perf in the background; the folder given stays as it is."""
    work = host.BUILD / "nccl-tests"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, ignore=shutil.ignore_patterns(".git", "build"))
    given, ours = nccl_folder(python), work / "nccl"
    (ours / "lib").mkdir(parents=True)
    (ours / "include").symlink_to(given / "include")
    for name in ("libnccl.so", "libnccl.so.2"):
        (ours / "lib" / name).symlink_to(given / "lib" / "libnccl.so.2")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    cuda = os.environ.get("CUDA_HOME") or str(pathlib.Path(nvcc).resolve().parents[1])
    kinds = sorted({row[0].replace(".", "") for row in host.query("compute_cap")})
    codes = " ".join(f"-gencode=arch=compute_{kind},code=sm_{kind}" for kind in kinds)
    log = (host.BUILD / "log" / "nccl-tests-build.log").open("w")
    target = work / "build" / "all_reduce_perf"
    return target, subprocess.Popen(   # pylint: disable=consider-using-with
        ["make", "-C", str(work / "src"), "-j", "8", "MPI=0", f"BUILDDIR={work / 'build'}", f"NCCL_HOME={ours}", f"CUDA_HOME={cuda}",
         f"NVCC_GENCODE={codes}", str(target)], stdout=log, stderr=subprocess.STDOUT)


class Program:
    """all_reduce_perf, one thread for each GPU."""

    def __init__(self, path, gpus, environment):
        self.path, self.gpus = pathlib.Path(path), gpus
        library = self.path.parents[1] / "nccl" / "lib"
        self.environment = {**os.environ, **environment, "LD_LIBRARY_PATH": f"{library}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def __call__(self, *options, log=""):
        """Rows (bytes, in-place time in µs, in-place bus bandwidth in GB/s) of one run."""
        output = host.BUILD / "log" / f"nccl-tests{log}.json"
        text = run(str(self.path), "-t", str(self.gpus), "-g", "1", *options, "-J", str(output), env=self.environment, timeout=300)
        (host.BUILD / "log" / f"nccl-tests{log}.log").write_text(text)
        return rows(text)


def rows(text):
    """Rows of the table that all_reduce_perf prints."""
    found = []
    for line in text.splitlines():
        words = line.split()
        # size count type redop root, then time algbw busbw #wrong out of place and in place
        if len(words) >= 13 and re.fullmatch(r"\d+", words[0]) and words[2] in ("float", "half", "bfloat16"):
            found.append({"bytes": int(words[0]), "time_us": float(words[9]), "busbw": float(words[11])})
    return found


def version(path):
    """The NCCL that a JSON result names, for the record."""
    try:
        return json.loads(pathlib.Path(path).read_text()).get("nccl_version", "")
    except (OSError, ValueError):
        return ""
