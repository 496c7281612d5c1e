# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole way on the GPUs of this machine, in one go: lab, plan, provision, train, faults, overhead, report.

Started by tools/gpu.sh (make gpu), which says what can be set. Tables go to the terminal, everything to build/gpu.json, the
playbooks' output to build/gpu/log. A step that fails is told; the next ones run all the same where they can. Then the exit code is 1.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback

import host
import steps

RESULT = host.ROOT / "build" / "gpu.json"


def table(rows):
    """Print rows of a dictionary each as a table."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [["" if row.get(name) is None else f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names]
                       for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        print("  " + "  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="", help=f"some of {','.join(steps.ALL)}, in this order; default: all")
    parser.add_argument("--keep", action="store_true", help="leave the nodes running")
    options = parser.parse_args()
    gpus = host.query("name,uuid,pci.bus_id,driver_version,memory.total")
    nodes = int(os.environ.get("NODES") or max(len(gpus), 1)) if gpus else int(os.environ.get("NODES") or 2)
    if gpus and len(gpus) % nodes and nodes % len(gpus):
        print(f"gpu: {len(gpus)} GPUs cannot be divided evenly among {nodes} nodes; set NODES to a number that divides them, or to a multiple")
        return 2
    if not gpus and os.environ.get("GPU") != "0":
        print("gpu: nvidia-smi shows no GPU on this machine; GPU=0 tries everything on CPUs")
        return 2
    shutil.rmtree(host.BUILD / "log", ignore_errors=True)
    (host.BUILD / "log").mkdir(parents=True)
    run = steps.Run(gpus, host.share(nodes, len(gpus)))
    result = {"format": 1, "started": time.time(), "nodes": nodes, "gpus": [dict(zip(("name", "uuid", "pci", "driver", "memory_mib"), row)) for row in gpus],
              "memory_used_before_mib": run.memory_before, "steps": {}}
    wanted = options.steps.split(",") if options.steps else steps.ALL
    failed = []
    start = time.monotonic()
    for name in wanted:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        entry: dict = {}
        try:
            entry = getattr(run, name)() or {}
        except Exception as error:   # pylint: disable=broad-exception-caught
            failed.append(name)
            entry = {"error": str(error)[-6000:], "trace": traceback.format_exc()[-3000:]}
            print(f"  FAILED: {str(error)[-3000:]}", flush=True)
            if not isinstance(error, (AssertionError, RuntimeError)):
                print(traceback.format_exc(), flush=True)
        entry["seconds"] = round(time.monotonic() - began, 1)
        result["steps"][name] = entry
        result["seconds"] = round(time.monotonic() - start, 1)
        result["failed"] = failed
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        table(entry.get("rows", []))
        for line in entry.get("lines", []):
            print(f"  {line}", flush=True)
        print(f"  ({entry['seconds']} s)", flush=True)
        if failed and name in steps.NEEDED:
            break
    if not options.keep:
        run.close()
    print(f"== {'FAILED: ' + ', '.join(failed) if failed else 'passed'} in {result['seconds']} s; {RESULT.relative_to(host.ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
