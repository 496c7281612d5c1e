# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a fresh clone to the first training step with warm caches, as the README says; and the same when all is provisioned.

usage: tests/bench/fresh.py    (as root)
"""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from measure import ROOT, verdict

sys.path.insert(0, str(ROOT / "tests" / "quickstart"))
from clone import Clone

STEP = "epoch 1/"
AIM = 90.0


def until(clone: Clone, words: list[str], what: str) -> dict:
    """Seconds of a command until a line has this text, and until its end."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "VIRTUAL_ENV", "ANSIBLE_CONFIG", "MAKEFLAGS")}
    began, seen, lines = time.monotonic(), None, []
    with subprocess.Popen(words, cwd=clone.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        for line in process.stdout:
            lines.append(line)
            if seen is None and what in line:
                seen = time.monotonic() - began
    if process.returncode or seen is None:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}\n{''.join(lines)[-4000:]}")
    return {"first_step_seconds": seen, "seconds": time.monotonic() - began}


def main() -> dict:
    result = {}
    for name in ("caches as they are", "warm caches"):
        with tempfile.TemporaryDirectory() as folder:
            clone = Clone(pathlib.Path(folder))
            clone.make()
            try:
                result[name] = until(clone, ["make", "train"], STEP)
                if name == "warm caches":
                    # More epochs are a new release, which goes on from the last checkpoint on nodes that have everything else.
                    more = '{"torchrun_args": ["--epochs=40", "--batch-size=32"]}'
                    again = [f"{folder}/.venv/bin/ansible-playbook", "train.yml", "-i", "inventories/lab", "-e", more]
                    result["provisioned"] = until(clone, again, "epoch 21/")
            finally:
                clone.run("make", "clean", check=False)
    for name, row in result.items():
        aim = f" ({verdict(row['first_step_seconds'], AIM)})" if name == "warm caches" else ""
        print(f"fresh clone to first step, {name}: {row['first_step_seconds']:.1f} s{aim}; to the finished job {row['seconds']:.1f} s", flush=True)
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
