# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor as a module: it lies among a role's files, not in a package."""
from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / "roles/torchrun/files/torchrun_supervisor.py"


def beside() -> str:
    """A folder with what lies beside the supervisor in a release, for this process and those that it starts."""
    folder = tempfile.mkdtemp(prefix="supervisor-")
    os.symlink(ROOT / "plugins/module_utils/hostile_input.py", os.path.join(folder, "hostile_input.py"))
    return folder


def load():
    """The module, loaded once."""
    if "torchrun_supervisor" not in sys.modules:
        sys.path.append(beside())
        os.environ["PYTHONPATH"] = sys.path[-1]
        spec = importlib.util.spec_from_file_location("torchrun_supervisor", PATH)
        module = importlib.util.module_from_spec(spec)
        sys.modules["torchrun_supervisor"] = module
        writing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            spec.loader.exec_module(module)
        finally:
            sys.dont_write_bytecode = writing
    return sys.modules["torchrun_supervisor"]
