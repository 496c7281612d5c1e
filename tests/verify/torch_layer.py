# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Unpacks torch once, as a layer that lies below the root file systems of all nodes: torch_layer.py FOLDER PYTHON GLIBC.

Eight or thirty-two nodes then share one torch on the disk and in memory, and nothing is installed on any of them.
"""
from __future__ import annotations

import fcntl
import importlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
importlib.import_module("conftest")  # lets the collection be imported from the checkout
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse

REQUIREMENT = "torch==2.13.0"


def build(partial, python, glibc):
    """A virtual environment at /opt/torch of the layer."""
    target = {"architecture": platform.machine(), "glibc": glibc, "python": python}
    wheels, _sizes = wheelhouse.provide("~/.cache/onprem.torch/wheelhouse", wheelhouse.Wanted((REQUIREMENT,), target))
    packages = partial / "opt" / "torch" / "lib" / f"python{python}" / "site-packages"
    packages.mkdir(parents=True)
    subprocess.run([os.path.join(os.path.dirname(sys.executable), "uv"), "pip", "install", "--quiet", "--offline", "--no-index",
                    "--no-config", "--find-links", wheels, "--target", packages, "--python-version", python,
                    "--python-platform", f"{platform.machine()}-manylinux_{glibc.replace('.', '_')}", REQUIREMENT], check=True)
    (partial / "opt" / "torch" / "bin").mkdir()
    (partial / "opt" / "torch" / "bin" / "python3").symlink_to("/usr/bin/python3")
    (partial / "opt" / "torch" / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    # The nodes' users cannot write byte code there, and each start would compile it anew.
    same = pathlib.Path(f"/usr/bin/python{python}")
    if same.exists():
        subprocess.run([same, "-m", "compileall", "-q", "-j", "2", "-s", partial, packages], check=False, stdout=subprocess.DEVNULL)


def main():
    folder, python, glibc = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = pathlib.Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial, python, glibc)
            partial.rename(folder)


if __name__ == "__main__":
    main()
